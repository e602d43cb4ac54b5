"""Matrices without data, to measure a call's memory without reading weights.

A product with such a matrix has the right shape and type, and is zero. Everything
except the product is computed normally.
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
# Called for each matrix in use, with its class and the shape of its weights.
Heard = Callable[[type, tuple[int, ...]], None]


class BlankMatrix(nn.Module):
    """The base class that ``blank_matrices`` adds to a matrix."""

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        heard: Heard = self.__dict__["heard"]
        heard(type(self), tuple(self.weight.shape))
        # This product only provides shape and type, and is never computed.
        product: mx.array = super().__call__(x, *args, **kwargs)
        # Keep the operand alive until the product exists, as a real product does.
        blank: mx.array = mx.depends(mx.zeros(product.shape, product.dtype), x)
        return blank


@contextlib.contextmanager
def blank_matrices(modules: Iterable[nn.Module], heard: Heard) -> Iterator[None]:
    """Make the matrices among ``modules`` return zeros within this context."""
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
