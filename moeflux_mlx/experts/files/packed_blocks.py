"""The experts of a model's routed blocks, from a packed directory."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace

from ...errors import ExpertStoreError
from ...system.files import short
from .layout import ExpertLayout
from .manifest import LayerFile, Manifest
from .module_store import count_of, layout_of
from .modules import RoutedBlock
from .packed import PackedExperts

LAYER = re.compile(r"(?:.*\.)?layers\.(?P<layer>\d+)\..*", re.ASCII)


class PackedBlocks(PackedExperts):
    """The experts of a model's blocks in a packed directory; each block is a layer."""

    @classmethod
    def open_for(
        cls,
        directory: str | os.PathLike,
        blocks: Sequence[RoutedBlock],
        *,
        direct: bool = False,
        whole: bool = True,
    ) -> PackedBlocks:
        """Open a pack after all checks that do not read the experts.

        Args:
            directory: a directory that ``moeflux pack`` made.
            blocks: the result of ``find_blocks``, with their arrays.
            direct: as for ``PackedExperts.open``.
            whole: these are all routed blocks of the model.

        Raises:
            ExpertStoreError: as ``PackedExperts.open``, or the pack has other blocks;
                names the block.
            ModelError: not a model directory.
        """
        store = cls.open(directory, direct=direct)
        try:
            store._assign(blocks, whole)
        except BaseException:
            store.close()
            raise
        return store

    def _assign(self, blocks: Sequence[RoutedBlock], whole: bool) -> None:
        """Renumber the pack's layers in the order of the blocks."""
        paths = [block.path for block in blocks]
        entries = entries_of(self.manifest, paths, whole=whole)
        for block, entry in zip(blocks, entries, strict=True):
            self._check(block, entry)
        fds = dict(self._fds)
        self._fds.clear()
        for layer in fds.keys() - {entry.layer for entry in entries}:
            os.close(fds[layer])
        self._fds.update({i: fds[entry.layer] for i, entry in enumerate(entries)})
        self._paths = {i: self.directory / e.file for i, e in enumerate(entries)}
        self._files = {
            i: replace(entry, layer=i, block=blocks[i].path)
            for i, entry in enumerate(entries)
        }

    def _check(self, block: RoutedBlock, entry: LayerFile) -> None:
        expected = layout_of(block, entry.layout.alignment)
        if (n := count_of(block)) != len(entry.checksums):
            raise self._unlike(block, f"{n} experts", str(len(entry.checksums)))
        if expected != entry.layout:
            raise self._unlike(block, *_difference(expected, entry.layout))

    def _unlike(self, block: RoutedBlock, expected: str, got: str) -> ExpertStoreError:
        return ExpertStoreError(
            f"[pack] {self.directory}, {block.path}: expected {expected} as in the "
            f"model but got {got}: pack the model's own checkpoint"
        )

    @property
    def top_k(self) -> int:
        """1: a step that needs more experts than there are slots is divided."""
        return 1


def entries_of(
    manifest: Manifest, paths: Sequence[str], *, whole: bool = True
) -> list[LayerFile]:
    """Return the expert file of each routed block of a model.

    Args:
        whole: there are no other blocks.

    Raises:
        ExpertStoreError: a block has no file, or a file has no block.
    """
    known: dict[str, LayerFile] = {
        entry.block or str(entry.layer): entry for entry in manifest.layers
    }
    by_path = manifest.is_of_blocks
    names = [path if by_path else _layer_of(path) for path in paths]
    if sorted(names) != sorted(known if whole else known.keys() & set(names)):
        raise ExpertStoreError(
            f"[pack] expected experts of {short(sorted(names))} as in the model but "
            f"got those of {short(sorted(known))}: the pack belongs to another model"
        )
    return [known[name] for name in names]


def _layer_of(path: str) -> str:
    """Return the number of a block's layer, or its path if it has no number."""
    match = LAYER.fullmatch(path)
    return path if match is None else str(int(match["layer"]))


def _difference(expected: ExpertLayout, got: ExpertLayout) -> tuple[str, str]:
    """Return the first difference between two layouts: the expected and the found."""
    forms = [
        [(t.projection, t.part, t.dtype, t.shape) for t in layout.tensors]
        for layout in (expected, got)
    ]
    for one, other in zip(*forms, strict=False):
        if one != other:
            return short(one), short(other)
    if expected.quantization != got.quantization:
        return short(expected.quantization), short(got.quantization)
    return f"{len(forms[0])} tensors of an expert", str(len(forms[1]))
