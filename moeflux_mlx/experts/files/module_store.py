"""The experts of a model's routed blocks, in the checkpoint's tensors."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx
import numpy as np

from ...errors import ModelError
from ..weights import DTYPE_NAMES, MLX_DTYPES
from .checkpoint import Checkpoint
from .checkpoint_store import TensorExperts
from .layout import DEFAULT_ALIGNMENT, ExpertLayout
from .modules import RoutedBlock
from .routed import ExpertTensors, RoutedLayer
from .safetensors import TensorEntry, load_arrays
from .writer import chunks_of_array

Sanitize = Callable[[dict[str, mx.array]], dict[str, mx.array]]


class ModuleExperts(TensorExperts):
    """The experts of a model's blocks in a checkpoint; each block is a layer."""

    def __init__(
        self,
        blocks: Sequence[RoutedBlock],
        checkpoint: Checkpoint,
        sources: Mapping[str, str],
        alignment: int = DEFAULT_ALIGNMENT,
    ):
        """Find each block's tensors in ``checkpoint``, which stays open.

        Args:
            sources: the name of each parameter's unchanged tensor, by the parameter's
                path.

        Raises:
            ModelError: a parameter is not an unchanged tensor; names it. Only
                parameters that are not to be read from a file are compared with it.
        """
        self.blocks = list(blocks)
        routed = {
            number: RoutedLayer(
                number, block.path, _tensors(block, checkpoint, sources)
            )
            for number, block in enumerate(blocks)
        }
        layouts = {
            number: layout_of(block, alignment) for number, block in enumerate(blocks)
        }
        # 1: a step that needs more experts than there are slots is divided.
        super().__init__(checkpoint, routed, layouts, top_k=1)

    def name(self, layer: int) -> str:
        """Return the path of a block."""
        return self.blocks[layer].path


def layout_of(block: RoutedBlock, alignment: int = DEFAULT_ALIGNMENT) -> ExpertLayout:
    """Lay out one expert of a block by its arrays, without evaluating them.

    Raises:
        ModelError: the arrays have different numbers of experts, or a type that
            safetensors does not have.
    """
    parts = {}
    for (projection, part), array in block.parts.items():
        dtype, n_experts = DTYPE_NAMES.get(array.dtype), count_of(block)
        if dtype is None or array.shape[:1] != (n_experts,):
            raise ModelError(
                f"[experts] {block.path}.{projection}.{part}: expected an array of "
                f"{n_experts} experts but got {array.dtype} {list(array.shape)}"
            )
        parts[projection, part] = dtype, array.shape[1:]
    return ExpertLayout.build(parts, block.quantization, alignment)


def count_of(block: RoutedBlock) -> int:
    """Return the number of experts of a block."""
    return int(next(iter(block.parts.values())).shape[0])


def _tensors(
    block: RoutedBlock, checkpoint: Checkpoint, sources: Mapping[str, str]
) -> dict[tuple[str, str], ExpertTensors]:
    return {
        (projection, part): _stacked(
            f"{block.path}.{projection}.{part}", array, checkpoint, sources
        )
        for (projection, part), array in block.parts.items()
    }


def _stacked(
    path: str, array: mx.array, checkpoint: Checkpoint, sources: Mapping[str, str]
) -> ExpertTensors:
    entry = own_tensor(path, array, checkpoint, sources)
    if entry is None:
        raise ModelError(
            f"[stream] {checkpoint.directory}: expected {path} among the tensors but "
            f"the model computes it from others: run 'moeflux pack "
            f"{checkpoint.directory} DST' and stream DST"
        )
    if not (_is_to_be_read(array) or _has_values_of(array, entry)):
        raise ModelError(
            f"[stream] {path}: expected the values of {entry.file} but got others: "
            "stream the model before you change it, or load it with all experts in "
            "memory"
        )
    return stacked(entry)


def _is_to_be_read(array: mx.array) -> bool:
    """Tell whether an array will be read from a file, and nothing changes it then."""
    graph = io.StringIO()
    mx.export_to_dot(graph, array)
    return re.findall(r'label ="(\w+)"', graph.getvalue()) == ["Load"]


def _has_values_of(array: mx.array, entry: TensorEntry) -> bool:
    own = load_arrays(entry.file)[entry.name]
    if (own.shape, own.nbytes) != (array.shape, array.nbytes):
        return False
    # MLX on a CPU compares at most 2^31 elements, and returns noise for more.
    pairs = zip(chunks_of_array(array), chunks_of_array(own), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def stacked(entry: TensorEntry) -> ExpertTensors:
    """Return a tensor with a leading expert axis as ``ExpertTensors``."""
    n_experts, *shape = entry.shape
    stride = entry.n_bytes // n_experts
    return ExpertTensors((entry,), n_experts, tuple(shape), 0, stride)


def own_tensor(
    path: str, array: mx.array, checkpoint: Checkpoint, sources: Mapping[str, str]
) -> TensorEntry | None:
    """Return the tensor whose bytes a parameter has unchanged, or None."""
    entry = checkpoint.tensors.get(sources.get(path, ""))
    if entry is None or entry.shape != array.shape:
        return None
    return entry if MLX_DTYPES.get(entry.dtype) == array.dtype else None


def refuse_twice(checkpoint: Checkpoint) -> None:
    """Raise ModelError if a tensor is in two files: mlx-lm might take either."""
    for name, entries in checkpoint.twice.items():
        files = " and in ".join(str(entry.file) for entry in entries)
        raise ModelError(
            f"[checkpoint] expected {name!r} once but it is in {files}: remove the "
            "file that does not belong to this model"
        )


def unchanged(checkpoint: Checkpoint, sanitize: Sanitize | None) -> dict[str, str]:
    """Return the tensors that ``sanitize`` only renames: names by parameter path.

    Stacked, split and converted tensors have no entry. No tensor is read.

    Raises:
        ModelError: ``sanitize`` fails on the checkpoint's tensors, or one of them is in
            two files.
    """
    refuse_twice(checkpoint)
    arrays: dict[str, mx.array] = {}
    for shard in checkpoint.shards:
        arrays |= load_arrays(shard)
    names = {id(array): name for name, array in arrays.items()}
    try:
        made = arrays if sanitize is None else sanitize(dict(arrays))
    except Exception as error:
        raise ModelError(
            f"[stream] {checkpoint.directory}: expected tensors for the model's own "
            f"sanitize but it failed: {error!r}"
        ) from error
    return {path: names[id(x)] for path, x in made.items() if id(x) in names}
