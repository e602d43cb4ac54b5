"""mlx-lm's routed block with the matrices in slots."""

from __future__ import annotations

from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

from ... import device
from ..files.layout import ALL_PARTS
from ..files.modules import RoutedBlock
from ..files.store import ExpertStore
from ..pool.pool import pool_stride
from ..weights import ExpertWeights, Weight

# mlx-lm sorts rows by expert from this many ids on, and MLX then uses another kernel.
SORTED_FROM = 64
# The field of a Weight for each of mlx-lm's parameter names.
FIELDS = dict(
    zip(ALL_PARTS, ("w", "scales", "biases", "bias", "global_scale"), strict=True)
)


class SlotLinear(QuantizedSwitchLinear):
    """mlx-lm's module, with a switch for the kernel that needs sorted ids."""

    by_blocks = False

    def __call__(
        self, x: mx.array, indices: mx.array, sorted_indices: bool = False
    ) -> mx.array:
        by_blocks = sorted_indices and self.by_blocks
        out: mx.array = super().__call__(x, indices, sorted_indices=by_blocks)
        return out


class SlotBlock:
    """mlx-lm's block with the matrices in slots.

    MLX chooses a kernel by the number of matrices and rows, and kernels differ in their
    rounding. To give the same bits on every budget, this class makes MLX choose the
    kernel that it would use for all experts and all ids of the call.
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
        self._last_by_blocks = False
        # Drop the block's lazily loaded parameters, so that they are never read.
        self._hold(None)

    def __call__(
        self,
        weights: ExpertWeights,
        x: mx.array,
        slots: mx.array,
        n_ids: int | None = None,
        *,
        resident: bool = False,
    ) -> mx.array:
        """Run rows ``[..., D]`` through the experts in ``slots`` ``[..., K]``.

        Args:
            n_ids: number of ids of the whole call, if this is one portion of it.
            resident: ``weights`` has all experts of the block, slot == id.
        """
        if resident and weights is self._held:
            return cast(mx.array, self._module(x, slots))
        by_blocks = self._by_blocks(slots.size if n_ids is None else n_ids)
        in_place = resident or (not by_blocks and _converts_none(weights, x.dtype))
        if in_place and _lies_well(weights):
            return self._run(weights, x, slots, by_blocks, resident=resident)
        weights, slots = _end_to_end(weights, slots, self.n_experts)
        try:
            return self._run(weights, x, slots, by_blocks, resident=resident)
        finally:
            # Only the lazy result may hold the copies: those of all blocks together
            # could take as much memory as the whole model.
            self._hold(None)

    def _run(
        self,
        weights: ExpertWeights,
        x: mx.array,
        slots: mx.array,
        by_blocks: bool,
        *,
        resident: bool,
    ) -> mx.array:
        """Run rows through mlx-lm's block with ``weights``."""
        if weights is not self._held:
            self._hold(weights, resident=resident)
        if by_blocks is not self._last_by_blocks:
            self._last_by_blocks = by_blocks
            for module in self._quantized:
                module.by_blocks = by_blocks
        out: mx.array = self._module(x, slots)
        return out

    def least_rows(self, slots: mx.array, n_ids: int) -> int:
        """Return how many rows a portion needs for MLX to choose the call's kernel.

        Args:
            slots: the portion's slots.
            n_ids: number of ids of the whole call.
        """
        if self._by_blocks(n_ids):
            n_matrices = len(np.unique(np.array(slots)))
            return max(SORTED_FROM, device.METAL_ROWS_A_MATRIX * n_matrices)
        return 1 if device.multiplies_row_by_row() else min(n_ids, SORTED_FROM)

    def _by_blocks(self, n_ids: int) -> bool:
        """Return whether MLX would multiply a call's sorted rows in blocks."""
        is_sorted = n_ids >= SORTED_FROM
        return is_sorted and device.multiplies_by_blocks(n_ids, self.n_experts)

    def let_go(self) -> None:
        """Hold no weights, like mlx-lm's block before its weights are loaded."""
        self._hold(None)

    def _hold(self, weights: ExpertWeights | None, *, resident: bool = True) -> None:
        """Hold ``weights``; resident ones use mlx-lm's own module class."""
        self._held = weights
        for module in self._quantized:
            module.__class__ = QuantizedSwitchLinear if resident else SlotLinear
        for name, module in self.projections.items():
            for part, field in FIELDS.items():
                if weights is None:
                    module.pop(part, None)
                elif (array := getattr(weights.by_name[name], field)) is not None:
                    module[part] = array


def copied_bytes(store: ExpertStore, n_ids: int) -> int:
    """Return the most bytes of matrices that a block copies out of slots at a time.

    Args:
        n_ids: number of ids of the whole call.
    """
    counts = [store.count(layer) for layer in store.layers]
    copied = (min(n_ids, n) for n in counts if device.copies_slots(n_ids, n))
    stride = pool_stride([store.layout(layer) for layer in store.layers])
    return max(copied, default=0) * stride


def _lies_well(weights: ExpertWeights) -> bool:
    """Return whether MLX can gather the matrices in place."""
    return device.gathers_strided() or not any(
        weight.strided for weight in weights.by_name.values()
    )


def _converts_none(weights: ExpertWeights, dtype: mx.Dtype) -> bool:
    """Return whether MLX needs no conversion of all slots to ``dtype``."""
    own = (w.w if w.scales is None else w.scales for w in weights.by_name.values())
    return all(array.dtype in (dtype, mx.uint8) for array in own)


def _end_to_end(
    weights: ExpertWeights, slots: mx.array, n_experts: int
) -> tuple[ExpertWeights, mx.array]:
    """Return contiguous copies of the matrices in ``slots``, and their indices.

    There are no more copies than experts. Few slots are not read back, because the host
    may not know them yet.
    """
    if slots.size <= min(n_experts, SORTED_FROM - 1):
        # Few ids of many experts hardly repeat.
        take = slots.flatten()
        found = mx.arange(slots.size, dtype=mx.uint32).reshape(slots.shape)
    elif slots.size < SORTED_FROM:
        take, found = _distinct(slots, n_experts)
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


def _distinct(slots: mx.array, n: int) -> tuple[mx.array, mx.array]:
    """Return ``n`` slots, among them all in ``slots``, and the place of each there."""
    flat = slots.flatten()
    order = mx.argsort(flat)
    rising = flat[order]
    is_other = mx.concatenate([mx.array([False]), rising[1:] != rising[:-1]])
    places = mx.cumsum(is_other.astype(mx.uint32))
    take, found = mx.zeros(n, mx.uint32), mx.zeros(slots.size, mx.uint32)
    take[places], found[order] = rising, places
    return take, found.reshape(slots.shape)
