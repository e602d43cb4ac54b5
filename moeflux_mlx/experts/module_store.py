"""The experts of a model's routed blocks, from the tensors they were loaded from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import mlx.core as mx

from ..errors import ModelError
from .checkpoint import Checkpoint
from .checkpoint_store import TensorExperts
from .layout import DEFAULT_ALIGNMENT, ExpertLayout
from .modules import RoutedBlock
from .pool import MLX_DTYPES
from .routed import ExpertTensors, RoutedLayer
from .safetensors import load_arrays

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
            number: ExpertLayout.build(
                {key: (t.dtype, t.shape) for key, t in layer.tensors.items()},
                self.blocks[number].quantization,
                alignment,
            )
            for number, layer in routed.items()
        }
        # A step that needs more slots than there are is divided.
        super().__init__(checkpoint, routed, layouts, top_k=1)

    def name(self, layer: int) -> str:
        """Return the path of a block."""
        return self.blocks[layer].path


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
    if path not in sources:
        raise _unlike(path, checkpoint.directory, "no tensor that is this parameter")
    entry = checkpoint.tensors[sources[path]]
    if entry.shape != array.shape or MLX_DTYPES.get(entry.dtype) != array.dtype:
        raise _unlike(path, entry.file, f"{entry.dtype} {list(entry.shape)}", array)
    n_experts, *shape = entry.shape
    stride = entry.n_bytes // n_experts
    return ExpertTensors((entry,), n_experts, tuple(shape), 0, stride)


def _unlike(
    path: str, file: Path, got: str, array: mx.array | None = None
) -> ModelError:
    form = "" if array is None else f" as {array.dtype} {list(array.shape)}"
    return ModelError(
        f"[stream] {file}: expected {path}{form} as the model uses it but got {got}: "
        "convert the checkpoint with mlx_lm.convert first"
    )


def unchanged(checkpoint: Checkpoint, sanitize: Sanitize | None) -> dict[str, str]:
    """Return, by a parameter's path, the tensor that ``sanitize`` makes it of as it is.

    What is stacked, divided or converted on the way has no entry. No tensor is read.

    Raises:
        ModelError: ``sanitize`` does not take the checkpoint's tensors.
    """
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
