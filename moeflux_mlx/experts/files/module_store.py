"""The experts of a model's routed blocks, from the tensors they were loaded from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx

from ...errors import ModelError
from ..weights import DTYPE_NAMES, MLX_DTYPES
from .checkpoint import Checkpoint
from .checkpoint_store import TensorExperts
from .layout import DEFAULT_ALIGNMENT, ExpertLayout
from .modules import RoutedBlock
from .routed import ExpertTensors, RoutedLayer
from .safetensors import TensorEntry, load_arrays

Sanitize = Callable[[dict[str, mx.array]], dict[str, mx.array]]


class ModuleExperts(TensorExperts):
    """The experts of a model's blocks in a checkpoint; blocks are its layers."""

    def __init__(
        self,
        blocks: Sequence[RoutedBlock],
        checkpoint: Checkpoint,
        sources: Mapping[str, str],
        alignment: int = DEFAULT_ALIGNMENT,
    ):
        """Find each block's tensors; the checkpoint is kept.

        Args:
            sources: by a parameter's path, the tensor that it is, unchanged.

        Raises:
            ModelError: a parameter is not a tensor of the checkpoint; names it.
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
        # A step that needs more slots than there are is divided.
        super().__init__(checkpoint, routed, layouts, top_k=1)

    def name(self, layer: int) -> str:
        """Return the path of a block."""
        return self.blocks[layer].path


def layout_of(block: RoutedBlock, alignment: int = DEFAULT_ALIGNMENT) -> ExpertLayout:
    """Lay out one expert of a block by its arrays; none is evaluated.

    Raises:
        ModelError: the arrays are of different numbers of experts, or of a type that
            no file has.
    """
    parts = {}
    for (projection, part), array in block.parts.items():
        dtype, n_experts = DTYPE_NAMES.get(array.dtype), count_of(block)
        if dtype is None or array.shape[:1] != (n_experts,):
            raise ModelError(
                f"[experts] {block.path}.{projection}.{part}: expected numbers of "
                f"{n_experts} experts but got {array.dtype} {list(array.shape)}"
            )
        parts[projection, part] = dtype, array.shape[1:]
    return ExpertLayout.build(parts, block.quantization, alignment)


def count_of(block: RoutedBlock) -> int:
    """Return how many experts a block has."""
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
            f"the model makes it of others: run 'moeflux pack {checkpoint.directory} "
            "DST' and stream DST"
        )
    return stacked(entry)


def stacked(entry: TensorEntry) -> ExpertTensors:
    """Return a tensor with a row for each expert as theirs."""
    n_experts, *shape = entry.shape
    stride = entry.n_bytes // n_experts
    return ExpertTensors((entry,), n_experts, tuple(shape), 0, stride)


def own_tensor(
    path: str, array: mx.array, checkpoint: Checkpoint, sources: Mapping[str, str]
) -> TensorEntry | None:
    """Return the tensor of the files that a parameter is, byte for byte, if any."""
    entry = checkpoint.tensors.get(sources.get(path, ""))
    if entry is None or entry.shape != array.shape:
        return None
    return entry if MLX_DTYPES.get(entry.dtype) == array.dtype else None


def refuse_twice(checkpoint: Checkpoint) -> None:
    """Raise ModelError if a tensor is in two files: mlx-lm takes either."""
    for name, entries in checkpoint.twice.items():
        files = " and in ".join(str(entry.file) for entry in entries)
        raise ModelError(
            f"[checkpoint] expected {name!r} once but it is in {files}: remove the "
            "file that is not of this model"
        )


def unchanged(checkpoint: Checkpoint, sanitize: Sanitize | None) -> dict[str, str]:
    """Return, by a parameter's path, the tensor that ``sanitize`` makes it of as it is.

    What is stacked, divided or converted on the way has no entry. No tensor is read.

    Raises:
        ModelError: ``sanitize`` does not take the checkpoint's tensors, or one of
            them is in two files.
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
            f"[stream] {checkpoint.directory}: expected tensors that the model's own "
            f"sanitize takes but got {error!r}"
        ) from error
    return {path: names[id(x)] for path, x in made.items() if id(x) in names}
