"""The interface between a streamer and the files of its experts."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Protocol

from .checkpoint import Checkpoint
from .checkpoint_store import CheckpointExperts
from .layout import ExpertLayout
from .packed import PackedExperts, is_packed
from .spans import Span


class ExpertStore(Protocol):
    """The open files of a model's experts.

    A layer here is one stack of experts. If a layer of the model has several stacks,
    each has a number of its own; a layer without routed experts has none.
    """

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers that have routed experts, ascending."""

    @property
    def n_experts(self) -> int:
        """Number of routed experts of the layer with the most."""

    @property
    def top_k(self) -> int:
        """Number of a layer's experts that must fit into memory together."""

    def count(self, layer: int) -> int:
        """Return the number of experts of a layer."""

    def name(self, layer: int) -> str:
        """Return a layer's name for errors."""

    @property
    def tensor_names(self) -> Collection[str]:
        """Names of the weight files' tensors that hold experts."""

    def layout(self, layer: int) -> ExpertLayout:
        """Return the layout of one layer's records."""

    def spans(self, layer: int, expert: int) -> tuple[Span, ...]:
        """Return the reads that fill an expert's record, and maybe its padding."""

    def checksum(self, layer: int, expert: int) -> int | None:
        """Return the xxh3-64 of an expert's record, without padding, if known."""

    def close(self) -> None:
        """Close the files."""


def open_store(
    directory: str | os.PathLike, *, direct: bool = False
) -> PackedExperts | CheckpointExperts:
    """Open the experts of a packed directory or of a plain checkpoint.

    With ``direct`` reads bypass the page cache; a warning says if they cannot.

    Raises:
        ExpertStoreError: a file of a packed directory is missing or changed.
        ModelError: not a model directory, or its experts cannot be streamed.
    """
    store = PackedExperts if is_packed(directory) else CheckpointExperts
    return store.open(directory, direct=direct)


def model_identity(directory: str | os.PathLike) -> str:
    """Return a hash that identifies a model; a pack has its checkpoint's hash.

    Raises:
        ExpertStoreError, ModelError: as ``open_store``.
    """
    if is_packed(directory):
        with PackedExperts.open(directory) as pack:
            return pack.manifest.source_identity
    with Checkpoint.open(directory) as checkpoint:
        return checkpoint.identity
