"""The source of a pack: its tensors as they lie, or as a model has them.

A class of ours reads tensors under the names that files have. For any other model
mlx-lm's own ``sanitize`` changes the tensors. It is lazy: nothing is read
before it is written, and what was written is let go.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Protocol

import mlx.core as mx
from mlx.utils import tree_flatten

from ...errors import ModelError, one_line_errors
from .checkpoint import Checkpoint, ModelFacts, experts_per_token
from .checkpoint_store import CheckpointExperts, TensorExperts
from .folder import Folder
from .layout import ExpertLayout
from .manifest import LayerFile
from .module_store import count_of, layout_of, own_tensor, refuse_twice, stacked
from .modules import RoutedBlock, find_blocks
from .plain import names_of
from .routed import RoutedLayer
from .safetensors import TensorEntry
from .stock import StockModel, load_lazily
from .writer import (
    Advance,
    Tensor,
    chunks_of_array,
    chunks_of_file,
    entry_of,
    write_layer,
    write_parts,
)


class PackSource(Protocol):
    """A checkpoint on its way into a pack."""

    model: ModelFacts

    @property
    def config(self) -> dict[str, Any]:
        """The configuration that is written."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers that have an expert file each."""

    @property
    def resident(self) -> list[Tensor]:
        """All tensors but the experts'."""

    def count(self, layer: int) -> int:
        """Return how many experts a layer has."""

    def layout(self, layer: int) -> ExpertLayout:
        """Return the layout of a layer's records."""

    def block(self, layer: int) -> str:
        """Return the path of a layer's routed block, if it goes by that."""

    def names(self, layer: int) -> tuple[str, ...]:
        """Return the names of a layer's tensors as ``LayerFile`` has them."""

    def write_layer(self, layer: int, folder: Folder, advance: Advance) -> LayerFile:
        """Write a layer's file."""


class NamedSource:
    """A checkpoint for a class of ours: its tensors as they are."""

    def __init__(self, checkpoint: Checkpoint, alignment: int):
        self._checkpoint = checkpoint
        self.experts = CheckpointExperts(checkpoint, alignment)
        self.model, self.layers = self.experts.model, self.experts.layers
        self.count, self.layout = self.experts.count, self.experts.layout

    @property
    def config(self) -> dict[str, Any]:
        """The checkpoint's own configuration."""
        return self._checkpoint.config

    @property
    def resident(self) -> list[Tensor]:
        """All tensors but the experts', those that nobody uses too."""
        tensors, routed = self._checkpoint.tensors, self.experts.tensor_names
        return [
            Tensor(entry, partial(chunks_of_file, self._checkpoint, entry))
            for name, entry in tensors.items()
            if name not in routed
        ]

    def block(self, layer: int) -> str:
        """Return nothing: layers go by their number."""
        return ""

    def names(self, layer: int) -> tuple[str, ...]:
        """Return the names that the checkpoint's tensors have."""
        return names_of(self.experts.routed[layer], self.layout(layer))

    def write_layer(self, layer: int, folder: Folder, advance: Advance) -> LayerFile:
        """Copy a layer's experts, one after the other."""
        return write_layer(self.experts, layer, folder, advance)


class ModuleSource:
    """A checkpoint as mlx-lm's model takes it: parameters by their own paths.

    Tensors that ``sanitize`` leaves as they are are copied record by record. Others are
    computed when they are written, one tensor of a block's experts at a time.
    """

    def __init__(self, checkpoint: Checkpoint, alignment: int):
        """Build the model; the checkpoint is kept.

        Raises:
            ModelError: mlx-lm cannot load it, or it has no routed blocks.
        """
        refuse_twice(checkpoint)
        stock = load_lazily(checkpoint.directory)
        blocks = find_blocks(stock.model)
        if not blocks:
            raise ModelError(
                f"[pack] {checkpoint.directory}: expected routed experts in mlx-lm's "
                f"{checkpoint.config.get('model_type')} but found none: it needs no "
                "packing"
            )
        self.config = _config(checkpoint, stock)
        self._checkpoint, self._sources = checkpoint, stock.sources
        self._paths = [block.path for block in blocks]
        self._counts = [count_of(block) for block in blocks]
        self._layouts = [layout_of(block, alignment) for block in blocks]
        self._copied = self._find_copied(blocks)
        self._parts = [block.parts for block in blocks]
        self._resident = _besides(stock.model, blocks)
        n_experts = max(self._counts)
        top_k = experts_per_token(checkpoint.config, n_experts) or 0
        model_type = str(checkpoint.config.get("model_type"))
        self.model = ModelFacts(model_type, len(blocks), n_experts, top_k)

    def _find_copied(self, blocks: list[RoutedBlock]) -> TensorExperts | None:
        """Return the experts of blocks whose every array is a tensor of the files."""
        routed = {
            number: RoutedLayer(
                number,
                block.path,
                {key: stacked(own) for key, own in self._own(block).items() if own},
            )
            for number, block in enumerate(blocks)
            if all(self._own(block).values())
        }
        layouts = dict(enumerate(self._layouts))
        return TensorExperts(self._checkpoint, routed, layouts, 1) if routed else None

    def _own(self, block: RoutedBlock) -> dict[tuple[str, str], TensorEntry | None]:
        return {
            (projection, part): self._tensor(f"{block.path}.{projection}.{part}", array)
            for (projection, part), array in block.parts.items()
        }

    def _tensor(self, path: str, array: mx.array) -> TensorEntry | None:
        return own_tensor(path, array, self._checkpoint, self._sources)

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks by number."""
        return tuple(range(len(self._paths)))

    def count(self, layer: int) -> int:
        """Return how many experts a block has."""
        return self._counts[layer]

    def layout(self, layer: int) -> ExpertLayout:
        """Return the layout of a block's records."""
        return self._layouts[layer]

    def block(self, layer: int) -> str:
        """Return a block's path."""
        return self._paths[layer]

    def names(self, layer: int) -> tuple[str, ...]:
        """Return nothing: names follow from the path."""
        return ()

    @property
    def resident(self) -> list[Tensor]:
        """The parameters but the experts'."""
        return [self._resident_tensor(path) for path in self._resident]

    def _resident_tensor(self, path: str) -> Tensor:
        array, file = self._resident[path], self._checkpoint.directory
        entry = entry_of(path, array, f"[pack] {file}: ")
        own = self._tensor(path, array)
        if own is not None:
            return Tensor(entry, partial(chunks_of_file, self._checkpoint, own))
        return Tensor(entry, partial(self._computed, path))

    def _computed(self, path: str) -> Iterator[memoryview]:
        with one_line_errors(f"[pack] {self._checkpoint.directory}: {path}"):
            array = self._resident.pop(path)
            mx.eval(array)
        yield from chunks_of_array(array)
        del array
        mx.clear_cache()

    def write_layer(self, layer: int, folder: Folder, advance: Advance) -> LayerFile:
        """Write a block's experts, copied or as ``sanitize`` makes them."""
        copied = self._copied
        if copied is not None and layer in copied.layers:
            self._parts[layer].clear()
            return write_layer(copied, layer, folder, advance)
        return write_parts(
            partial(self._rows, layer),
            layer,
            self._counts[layer],
            self._layouts[layer],
            folder,
            advance,
        )

    def _rows(self, layer: int, projection: str, part: str) -> Iterator[memoryview]:
        path = f"{self._paths[layer]}.{projection}.{part}"
        with one_line_errors(f"[pack] {self._checkpoint.directory}: {path}"):
            array = self._parts[layer].pop((projection, part))
            mx.eval(array)
        for expert in range(self._counts[layer]):
            row = mx.contiguous(array[expert]).reshape(-1).view(mx.uint8)
            mx.eval(row)
            yield memoryview(row)  # type: ignore[arg-type]
        del array
        mx.clear_cache()


def _config(checkpoint: Checkpoint, stock: StockModel) -> dict[str, Any]:
    """Return the configuration of parameters as mlx-lm made them of the tensors."""
    made = ("quantization", "quantization_config")
    own = {name: stock.config[name] for name in made if name in stock.config}
    return {**checkpoint.config, **own}


def _besides(model: Any, blocks: list[RoutedBlock]) -> dict[str, mx.array]:
    routed = {
        f"{block.path}.{projection}.{part}"
        for block in blocks
        for projection, part in block.parts
    }
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    return {path: x for path, x in parameters.items() if path not in routed}
