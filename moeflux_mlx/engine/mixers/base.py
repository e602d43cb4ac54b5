"""The interface of a mixer, and its inputs in a call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.nn as nn

from ..blocks import Call, SameInput, Shapes
from ..context import Context
from ..graph import BufId, Op
from ..graph.lower import Kernel
from ..model import GraphBuilder
from ..ops.functions import Array

# The arrays of a layer's cache for one sequence, ``[1, H, None, d]`` if they grow.
CacheShapes = tuple[tuple[int | None, ...], ...]
Pushed = tuple[BufId, dict[str, BufId]]


@dataclass(frozen=True)
class Begun:
    """A mixer's inputs in one call.

    ``masks`` are fields of a ``Call``; ``inputs`` its graph's by name; ``host`` the Ops
    that a cache object performs itself.
    """

    masks: Mapping[str, bool]
    inputs: Mapping[str, Any]
    host: Mapping[type[Op], Kernel] | None = None


class Mixer(Protocol):
    """The interface of a mixer."""

    @property
    def name(self) -> str:
        """Its name in reports."""

    @property
    def path(self) -> str:
        """Where mlx-lm's layer keeps its module."""

    @property
    def grows(self) -> bool:
        """Whether its cache has a row for each token."""

    @property
    def window(self) -> int | None:
        """How many of the last tokens a token sees, itself among them; None: all."""

    @property
    def same_input(self) -> SameInput:
        """Its matrices that read the same row, by path."""

    @property
    def cache_shapes(self) -> CacheShapes:
        """The arrays of its cache for one sequence."""

    def shapes(self, dim: int) -> Shapes:
        """Return its tensors by path below the layer, as they are once unpacked."""

    def check(self, module: nn.Module) -> None:
        """Raise ModelError for a module that graphs cannot perform."""

    def begin(
        self, module: nn.Module, cache: Any, context: Context, *, spare: bool
    ) -> Begun:
        """Return its graph's inputs for a call.

        Args:
            spare: kernels can read a cache with room for later rows as it is.
        """

    def push(self, g: GraphBuilder, module: nn.Module, x: BufId, call: Call) -> Pushed:
        """Push its Ops; return its output and, by name, its cache's new values."""

    def end(self, cache: Any, state: Mapping[str, Array], context: Context) -> None:
        """Move its cache on."""
