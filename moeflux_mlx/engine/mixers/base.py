"""The interface of mixers, and a mixer's inputs in a call."""

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

# The shapes of a layer's cache for one sequence; ``[1, H, None, d]`` grows.
CacheShapes = tuple[tuple[int | None, ...], ...]
Pushed = tuple[BufId, dict[str, BufId]]


@dataclass(frozen=True)
class Begun:
    """A mixer's inputs in one call.

    ``masks`` are fields of a ``Call``, and ``inputs`` those of its graph by name.
    ``host`` has functions of a cache object that replace kernels, by type of Op.
    """

    masks: Mapping[str, bool]
    inputs: Mapping[str, Any]
    host: Mapping[type[Op], Kernel] | None = None


class Mixer(Protocol):
    """The interface of a mixer."""

    @property
    def name(self) -> str:
        """The name in reports."""

    @property
    def path(self) -> str:
        """The path of mlx-lm's module in a layer."""

    @property
    def grows(self) -> bool:
        """Whether the cache has a row for each token."""

    @property
    def window(self) -> int | None:
        """Number of last tokens that a token sees, itself included; None: all."""

    @property
    def same_input(self) -> SameInput:
        """Paths of matrices that multiply the same row."""

    @property
    def cache_shapes(self) -> CacheShapes:
        """The shapes of the cache's arrays for one sequence."""

    def shapes(self, dim: int) -> Shapes:
        """Return the unpacked shapes of its tensors by path below the layer."""

    def check(self, module: nn.Module) -> None:
        """Raise ModelError if graphs cannot perform the module."""

    def begin(
        self, module: nn.Module, cache: Any, context: Context, *, spare: bool
    ) -> Begun:
        """Return the graph's inputs for a call.

        Args:
            spare: kernels can read a cache with spare rows without slicing it.
        """

    def push(self, g: GraphBuilder, module: nn.Module, x: BufId, call: Call) -> Pushed:
        """Push the Ops; return the output and, by name, the cache's new values."""

    def end(self, cache: Any, state: Mapping[str, Array], context: Context) -> None:
        """Advance the cache."""
