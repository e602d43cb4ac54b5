"""mlx-lm's routed block on the matrices in slots."""

from __future__ import annotations

from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

from ... import device
from ..files.layout import ALL_PARTS
from ..files.modules import RoutedBlock
from ..weights import ExpertWeights, Weight

# From so many ids on mlx-lm sorts rows by expert, which takes another kernel.
SORTED_FROM = 64
# mlx-lm's names of the parts of a Weight.
FIELDS = dict(
    zip(ALL_PARTS, ("w", "scales", "biases", "bias", "global_scale"), strict=True)
)


class SlotLinear(QuantizedSwitchLinear):
    """mlx-lm's module, told whether to make use of it that ids are sorted."""

    by_blocks = False

    def __call__(
        self, x: mx.array, indices: mx.array, sorted_indices: bool = False
    ) -> mx.array:
        by_blocks = sorted_indices and self.by_blocks
        out: mx.array = super().__call__(x, indices, sorted_indices=by_blocks)
        return out


class SlotBlock:
    """mlx-lm's block with the matrices that are in slots.

    MLX chooses a kernel by the number of matrices and of rows. So it is told of those
    that the block of all experts would have, in a call for all ids.
    """

    def __init__(self, block: RoutedBlock):
        self._module, self.projections = block.module, block.projections
        self.n_experts = max(len(array) for array in block.parts.values())
        self._quantized: list[nn.Module] = [
            module
            for module in self.projections.values()
            if type(module) is QuantizedSwitchLinear
        ]
        self._held: ExpertWeights | None = None
        self._told = False
        # Let go of the parameters loaded for it, unread.
        self._hold(None)

    def __call__(
        self,
        weights: ExpertWeights,
        x: mx.array,
        slots: mx.array,
        n_ids: int | None = None,
        *,
        settled: bool = False,
    ) -> mx.array:
        """Run rows ``[..., D]`` through the experts in ``slots`` ``[..., K]``.

        Args:
            n_ids: of the whole call, if this is a part of it.
            settled: the weights are those of the block's own experts, all of them.
        """
        if settled and weights is self._held:
            return cast(mx.array, self._module(x, slots))
        by_blocks = self._by_blocks(slots.size if n_ids is None else n_ids)
        in_place = settled or (not by_blocks and _converts_none(weights, x.dtype))
        if not (in_place and _lies_well(weights)):
            weights, slots = _end_to_end(weights, slots)
        if weights is not self._held:
            self._hold(weights, settled=settled)
        if by_blocks is not self._told:
            self._told = by_blocks
            for module in self._quantized:
                module.by_blocks = by_blocks
        out: mx.array = self._module(x, slots)
        return out

    def least_rows(self, slots: mx.array, n_ids: int) -> int:
        """Return how many rows a part of a call needs to take the call's kernel.

        Args:
            slots: of the part.
            n_ids: of the whole call.
        """
        if self._by_blocks(n_ids):
            n_matrices = len(np.unique(np.array(slots)))
            return max(SORTED_FROM, device.METAL_ROWS_A_MATRIX * n_matrices)
        return 1 if device.multiplies_row_by_row() else min(n_ids, SORTED_FROM)

    def _by_blocks(self, n_ids: int) -> bool:
        is_sorted = n_ids >= SORTED_FROM
        return is_sorted and device.multiplies_by_blocks(n_ids, self.n_experts)

    def release(self) -> None:
        """Hold nothing, as mlx-lm's own block before its weights are loaded."""
        self._hold(None)

    def _hold(self, weights: ExpertWeights | None, *, settled: bool = True) -> None:
        """Have these weights; with all of them each module is mlx-lm's own."""
        self._held = weights
        for module in self._quantized:
            module.__class__ = QuantizedSwitchLinear if settled else SlotLinear
        for name, module in self.projections.items():
            for part, field in FIELDS.items():
                if weights is None:
                    module.pop(part, None)
                elif (array := getattr(weights.by_name[name], field)) is not None:
                    module[part] = array


def _lies_well(weights: ExpertWeights) -> bool:
    """Tell whether MLX gathers matrices as they lie."""
    return device.gathers_strided() or not any(
        weight.strided for weight in weights.by_name.values()
    )


def _converts_none(weights: ExpertWeights, dtype: mx.Dtype) -> bool:
    """Tell whether MLX takes slots as they are; another type would convert them all."""
    own = (w.w if w.scales is None else w.scales for w in weights.by_name.values())
    return all(array.dtype in (dtype, mx.uint8) for array in own)


def _end_to_end(
    weights: ExpertWeights, slots: mx.array
) -> tuple[ExpertWeights, mx.array]:
    """Return copies of the matrices in ``slots``, and where each is among them."""
    if slots.size < SORTED_FROM:
        # A token's are distinct, and may not be known to the host yet.
        take = slots.flatten()
        found = mx.arange(slots.size, dtype=mx.uint32).reshape(slots.shape)
    else:
        chosen, places = np.unique(np.array(slots), return_inverse=True)
        take = mx.array(chosen)
        found = mx.array(places.reshape(slots.shape).astype(np.uint32))

    def copy(weight: Weight) -> Weight:
        arrays = {field: getattr(weight, field) for field in FIELDS.values()}
        own = {f: None if x is None else x[take] for f, x in arrays.items()}
        return Weight(**own, quantization=weight.quantization)

    copies = {name: copy(weight) for name, weight in weights.by_name.items()}
    return ExpertWeights.named(copies), found
