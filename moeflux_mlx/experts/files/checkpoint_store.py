"""The experts of a plain checkpoint, read from its tensors in place."""

from __future__ import annotations

import os
import sys

from ...errors import ModelError
from ...system.files import short
from ...system.uncopied import Uncopied
from .checkpoint import Checkpoint, ModelFacts, model_facts, text_config
from .direct import bypass_cache
from .layout import DEFAULT_ALIGNMENT, ExpertLayout
from .reader import Batch, HostPlace, Read
from .routed import RoutedLayer, routed_layers
from .spans import Piece, Span, merge

if sys.version_info >= (3, 11):
    from typing import Self
else:
    from typing_extensions import Self


class TensorExperts(Uncopied):
    """Experts that are scattered over a checkpoint's tensors; a context manager.

    Records have the same layout as in a pack. But each tensor of an expert is a span of
    its own, unless it is adjacent to another one in a file.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        routed: dict[int, RoutedLayer],
        layouts: dict[int, ExpertLayout],
        top_k: int,
    ):
        self.checkpoint, self.routed, self.top_k = checkpoint, routed, top_k
        self.n_experts = max(layer.n_experts for layer in routed.values())
        self._layouts = layouts
        self._spans: dict[tuple[int, int], tuple[Span, ...]] = {}
        self._paths = {checkpoint.fd(shard): shard for shard in checkpoint.shards}
        self.tensor_names = frozenset(
            entry.name
            for layer in self.routed.values()
            for tensors in layer.tensors.values()
            for entry in tensors.entries
        )

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers that have routed experts, ascending."""
        return tuple(self.routed)

    def count(self, layer: int) -> int:
        """Return the number of experts of a layer."""
        return self.routed[layer].n_experts

    def name(self, layer: int) -> str:
        """Return a layer's name for errors."""
        return f"layer {layer}"

    def layout(self, layer: int) -> ExpertLayout:
        """Return the layout of one layer's records."""
        return self._layouts[layer]

    def spans(self, layer: int, expert: int) -> tuple[Span, ...]:
        """Return the reads that fill an expert's record."""
        # Cached: finding them takes a third of the time of a read from the page cache.
        if (spans := self._spans.get((layer, expert))) is None:
            spans = self._spans[layer, expert] = self._find(layer, expert)
        return spans

    def _find(self, layer: int, expert: int) -> tuple[Span, ...]:
        tensors, fd = self.routed[layer].tensors, self.checkpoint.fd
        pieces = []
        for spec in self._layouts[layer].tensors:
            entry, start = tensors[spec.projection, spec.part].locate(expert)
            offset = entry.offset + start
            pieces.append(Piece(fd(entry.file), offset, spec.offset, spec.n_bytes))
        return tuple(
            Span(run[0].fd, self._paths[run[0].fd], run[0].offset, _places(run))
            for run in merge(pieces)
        )

    def checksum(self, layer: int, expert: int) -> None:
        """Return None: a checkpoint has no checksums."""

    def bypass_cache(self) -> None:
        """Make reads bypass the page cache on macOS; elsewhere warn and change nothing.

        Only macOS can do this for tensors at unaligned offsets.
        """
        bypass_cache(list(self._paths), self.checkpoint.directory, aligned=False)

    def read_record(self, layer: int, expert: int, record: memoryview) -> None:
        """Fill ``record`` with an expert's tensors; leave its padding unchanged.

        Raises:
            ExpertStoreError: a file cannot be read or ends early.
        """
        read = Read(self.spans(layer, expert), HostPlace(record), layer, expert)
        Batch([read]).run_here()
        if read.error is not None:
            raise read.error

    def close(self) -> None:
        """Close the files."""
        self.checkpoint.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class CheckpointExperts(TensorExperts):
    """The experts in a checkpoint's safetensors files, found by their names."""

    def __init__(self, checkpoint: Checkpoint, alignment: int = DEFAULT_ALIGNMENT):
        """Find the experts among the tensors of ``checkpoint``, which stays open.

        Raises:
            ModelError: there are none, some are missing or of an unknown form, or they
                contradict each other or ``config.json``; names the tensor.
        """
        routed = find_routed(checkpoint)
        self.model = _checked_facts(checkpoint, routed)
        layouts = {
            number: layer.layout(checkpoint.config, alignment)
            for number, layer in routed.items()
        }
        for number, layout in layouts.items():
            check_sizes(checkpoint.config, routed[number], layout)
        super().__init__(checkpoint, routed, layouts, self.model.top_k)

    @classmethod
    def open(
        cls, directory: str | os.PathLike, *, direct: bool = False
    ) -> CheckpointExperts:
        """Open a checkpoint after all checks that read headers only.

        Args:
            directory: a directory with ``config.json`` and safetensors files.
            direct: call ``bypass_cache``.

        Raises:
            ModelError: not a model directory, a file is missing or truncated, or the
                experts have an unknown form.
        """
        with Checkpoint.kept(directory) as checkpoint:
            store = cls(checkpoint)
            if direct:
                store.bypass_cache()
        return store


def find_routed(checkpoint: Checkpoint) -> dict[int, RoutedLayer]:
    """Collect the routed experts of a checkpoint by layer.

    Raises:
        ModelError: as ``routed_layers``; also names files that are missing.
    """
    try:
        return routed_layers(checkpoint.tensors)
    except ModelError as error:
        if not checkpoint.absent:
            raise
        raise checkpoint.missing(str(error)) from error


def _places(run: list[Piece]) -> tuple[tuple[int, int], ...]:
    return tuple([(start, n_bytes) for _, _, start, n_bytes in run])


def _checked_facts(
    checkpoint: Checkpoint, routed: dict[int, RoutedLayer]
) -> ModelFacts:
    facts = model_facts(checkpoint.config)
    there = checkpoint.layers
    for number in range(facts.n_layers):
        if number not in there:
            raise checkpoint.missing(
                f"expected {facts.n_layers} layers as in config.json but no file has "
                f"any tensor of layer {number}"
            )
    for layer in routed.values():
        if layer.n_experts != facts.n_experts:
            raise ModelError(
                f"[experts] {layer.path}: expected {facts.n_experts} experts as in "
                f"config.json but got {layer.n_experts}"
            )
        if layer.layer >= facts.n_layers:
            raise ModelError(
                f"[experts] {layer.path}: expected a layer below {facts.n_layers}, as "
                f"in config.json, but got {layer.layer}"
            )
    if facts.top_k > facts.n_experts:
        raise ModelError(
            f"[experts] expected at most {facts.n_experts} experts per token but got "
            f"{facts.top_k}"
        )
    return facts


def check_sizes(config: dict, layer: RoutedLayer, layout: ExpertLayout) -> None:
    """Raise ModelError unless gate, up and down have the configuration's row counts."""
    sizes = text_config(config)
    inner, hidden = sizes.get("moe_intermediate_size"), sizes.get("hidden_size")
    expected = {"gate_proj": inner, "up_proj": inner, "down_proj": hidden}
    for spec in layout.tensors:
        rows = expected[spec.projection]
        if spec.part == "weight" and rows not in (None, spec.shape[0]):
            entry = layer.tensors[spec.projection, spec.part].entries[0]
            raise ModelError(
                f"[experts] {entry.name!r} of {entry.file}: expected {short(rows)} "
                f"rows of {spec.projection} as in config.json but got {spec.shape[0]}"
            )
