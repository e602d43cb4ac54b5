"""Matrices that are never read, for a call that shows how much memory it takes.

A product with such a matrix has the right shape and type, and is zero: all but the
product itself happens as ever, in no time and without the weights.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

SWITCHES = (SwitchLinear, QuantizedSwitchLinear)
KINDS = (
    *SWITCHES,
    nn.Linear,
    nn.QuantizedLinear,
    nn.Embedding,
    nn.QuantizedEmbedding,
    MultiLinear,
    QuantizedMultiLinear,
)
# Hears of each matrix that is called: its class, and the shape of all its weights.
Heard = Callable[[type, tuple[int, ...]], None]


class BlankMatrix(nn.Module):
    """The class that ``blank_matrices`` puts before a matrix's own."""

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        heard: Heard = self.__dict__["heard"]
        heard(type(self), tuple(self.weight.shape))
        # Lazy: it tells shape and type, and is never computed.
        product: mx.array = super().__call__(x, *args, **kwargs)
        # A product's operands are there until it is made.
        blank: mx.array = mx.depends(mx.zeros(product.shape, product.dtype), x)
        return blank


@contextlib.contextmanager
def blank_matrices(modules: Iterable[nn.Module], heard: Heard) -> Iterator[None]:
    """Have those of the modules that are matrices give zeros in here."""
    with contextlib.ExitStack() as undo:
        for module in modules:
            kind = type(module)
            if isinstance(module, KINDS):
                undo.callback(setattr, module, "__class__", kind)
                module.__class__ = _blank_class(kind)
                module.__dict__["heard"] = heard
        yield


@functools.cache
def _blank_class(kind: type) -> type:
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (BlankMatrix, kind), names)
