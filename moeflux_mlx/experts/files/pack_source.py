"""The source of a pack: a checkpoint's tensors, or the parameters of mlx-lm's model.

A class of ours reads tensors by their names in the files. For any other model mlx-lm's
own ``sanitize`` renames and changes the tensors. Its result is lazy: each tensor is
read when it is written, and freed afterwards.
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
    """A checkpoint in the form in which it is packed."""

    model: ModelFacts

    @property
    def config(self) -> dict[str, Any]:
        """The configuration to write."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers; each gets an expert file."""

    @property
    def resident(self) -> list[Tensor]:
        """All tensors that are not experts."""

    def count(self, layer: int) -> int:
        """Return the number of experts of a layer."""

    def layout(self, layer: int) -> ExpertLayout:
        """Return the layout of a layer's records."""

    def block(self, layer: int) -> str:
        """Return ``LayerFile.block`` of a layer."""

    def names(self, layer: int) -> tuple[str, ...]:
        """Return ``LayerFile.names`` of a layer."""

    def write_layer(self, layer: int, folder: Folder, advance: Advance) -> LayerFile:
        """Write a layer's file."""


class NamedSource:
    """A checkpoint for a class of ours: its tensors unchanged."""

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
        """All tensors that are not experts, unused ones included."""
        tensors, routed = self._checkpoint.tensors, self.experts.tensor_names
        return [
            Tensor(entry, partial(chunks_of_file, self._checkpoint, entry))
            for name, entry in tensors.items()
            if name not in routed
        ]

    def block(self, layer: int) -> str:
        """Return an empty path: layers are identified by number."""
        return ""

    def names(self, layer: int) -> tuple[str, ...]:
        """Return the names of a layer's tensors in the checkpoint."""
        return names_of(self.experts.routed[layer], self.layout(layer))

    def write_layer(self, layer: int, folder: Folder, advance: Advance) -> LayerFile:
        """Copy a layer's experts record by record."""
        return write_layer(self.experts, layer, folder, advance)


class ModuleSource:
    """A checkpoint in the form of mlx-lm's model: parameters by their paths.

    Tensors that ``sanitize`` does not change are copied record by record. Other tensors
    are computed when they are written, one at a time for all experts of a block.
    """

    def __init__(self, checkpoint: Checkpoint, alignment: int):
        """Build the model of ``checkpoint``, which stays open.

        Raises:
            ModelError: mlx-lm cannot load the model, or it has no routed blocks.
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
        """Return the experts of those blocks whose arrays are all unchanged tensors."""
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
        """Numbers of the blocks, from 0."""
        return tuple(range(len(self._paths)))

    def count(self, layer: int) -> int:
        """Return the number of experts of a block."""
        return self._counts[layer]

    def layout(self, layer: int) -> ExpertLayout:
        """Return the layout of a block's records."""
        return self._layouts[layer]

    def block(self, layer: int) -> str:
        """Return a block's path."""
        return self._paths[layer]

    def names(self, layer: int) -> tuple[str, ...]:
        """Return no names: they follow from the block's path."""
        return ()

    @property
    def resident(self) -> list[Tensor]:
        """All parameters that are not experts."""
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
        """Write a block's experts: copy them, or compute the result of ``sanitize``."""
        copied = self._copied
        if copied is not None and layer in copied.layers:
            self._parts[layer].clear()
            return write_layer(copied, layer, folder, advance)
        return write_parts(
            partial(self._expert_bytes, layer),
            layer,
            self._counts[layer],
            self._layouts[layer],
            folder,
            advance,
        )

    def _expert_bytes(
        self, layer: int, projection: str, part: str
    ) -> Iterator[memoryview]:
        """Yield one tensor's bytes expert by expert, then free it."""
        path = f"{self._paths[layer]}.{projection}.{part}"
        with one_line_errors(f"[pack] {self._checkpoint.directory}: {path}"):
            array = self._parts[layer].pop((projection, part))
            mx.eval(array)
        for expert in range(self._counts[layer]):
            data = mx.contiguous(array[expert]).reshape(-1).view(mx.uint8)
            mx.eval(data)
            yield memoryview(data)  # type: ignore[arg-type]
        del array
        mx.clear_cache()


def _config(checkpoint: Checkpoint, stock: StockModel) -> dict[str, Any]:
    """Return the checkpoint's configuration with mlx-lm's own quantisation entries."""
    made = ("quantization", "quantization_config")
    own = {name: stock.config[name] for name in made if name in stock.config}
    return {**checkpoint.config, **own}


def _besides(model: Any, blocks: list[RoutedBlock]) -> dict[str, mx.array]:
    """Return the parameters by path that belong to no block's experts."""
    routed = {
        f"{block.path}.{projection}.{part}"
        for block in blocks
        for projection, part in block.parts
    }
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    return {path: x for path, x in parameters.items() if path not in routed}
