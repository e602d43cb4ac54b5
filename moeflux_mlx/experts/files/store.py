"""What a streamer asks of the files that experts come from."""

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
    """Open files with experts; layers without routed experts are not in ``layers``.

    A layer here is one stack of experts: where a model's layer has several, each has a
    number of its own.
    """

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers that have routed experts, ascending."""

    @property
    def n_experts(self) -> int:
        """Routed experts of each layer, or of that with the most."""

    @property
    def top_k(self) -> int:
        """Experts that one token uses in one layer, which must fit into memory."""

    def count(self, layer: int) -> int:
        """Return how many experts one layer has."""

    def name(self, layer: int) -> str:
        """Return what errors call a layer."""

    @property
    def tensor_names(self) -> Collection[str]:
        """Names of the experts' tensors among the model's weights, if they are."""

    def layout(self, layer: int) -> ExpertLayout:
        """Return the layout of one layer's records."""

    def spans(self, layer: int, expert: int) -> tuple[Span, ...]:
        """Return the reads that together fill an expert's record.

        They may go on into the padding after it.
        """

    def checksum(self, layer: int, expert: int) -> int | None:
        """Return the xxh3-64 of an expert's record, without padding, if known."""

    def close(self) -> None:
        """Close the files."""


def open_store(
    directory: str | os.PathLike, *, direct: bool = False
) -> PackedExperts | CheckpointExperts:
    """Open the experts of a packed directory or of a plain checkpoint.

    ``direct`` asks for reads past the page cache; a warning says where it cannot be.

    Raises:
        ExpertStoreError: a packed directory with something missing or changed.
        ModelError: not a model directory, or a checkpoint of no usable form.
    """
    store = PackedExperts if is_packed(directory) else CheckpointExperts
    return store.open(directory, direct=direct)


def model_identity(directory: str | os.PathLike) -> str:
    """Return a hash that tells a model from any other, the same once it is packed.

    Raises:
        ExpertStoreError, ModelError: as ``open_store``.
    """
    if is_packed(directory):
        with PackedExperts.open(directory) as pack:
            return pack.manifest.source_identity
    with Checkpoint.open(directory) as checkpoint:
        return checkpoint.identity
