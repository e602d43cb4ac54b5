"""mlx-lm's routed block with the matrices in slots."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from ... import device
from ..files.layout import ALL_PARTS, BIAS
from ..files.modules import RoutedBlock
from ..files.store import ExpertStore
from ..pool.pool import pool_stride
from ..weights import ARRAYS, ExpertWeights, Weight
from .stacks import in_parts, lies_well

# mlx-lm sorts rows by expert from this many ids on, and MLX then uses another kernel.
SORTED_FROM = 64
# The field of a Weight for each of mlx-lm's parameter names.
FIELDS = dict(zip(ALL_PARTS, ARRAYS, strict=True))


class InSlots(nn.Module):
    """Mixed into mlx-lm's projections while their matrices are in slots.

    It has a switch for the kernel that needs sorted ids. It divides stacks that MLX
    cannot index as one. It adds biases that are views of records, since MLX would index
    such a view wrongly.
    """

    by_blocks = True
    bias_of: Callable[[mx.array], mx.array] | None = None

    def __call__(
        self, x: mx.array, indices: mx.array, sorted_indices: bool = False
    ) -> mx.array:
        by_blocks = sorted_indices and self.by_blocks

        def product(part: slice | None, ids: mx.array) -> mx.array:
            module = self if part is None else self._of(part)
            call = super(InSlots, module).__call__  # type: ignore[misc]
            return cast(mx.array, call(x, ids, sorted_indices=by_blocks))

        w, bits = self["weight"], getattr(self, "bits", None)
        out = in_parts(product, w, bits, indices, in_order=by_blocks)
        if self.bias_of is not None:
            out = out + mx.expand_dims(self.bias_of(indices), -2)
        return out

    def _of(self, part: slice) -> InSlots:
        """Return a module of the same class with some of the matrices."""
        module = type(self).__new__(type(self))
        module.__dict__.update(self.__dict__)
        for name, value in self.items():
            is_stack = name in FIELDS and value is not None
            dict.__setitem__(module, name, value[part] if is_stack else value)
        return module


@functools.cache
def in_slots(kind: type[nn.Module]) -> type[InSlots]:
    """Return the class of a projection of mlx-lm whose matrices are in slots."""
    return cast(type[InSlots], type(f"Slot{kind.__name__}", (InSlots, kind), {}))


def least_rows(n_ids: int, n_blocked: int = 0) -> int:
    """Return how many rows a part of a call needs for MLX to choose the call's kernel.

    Args:
        n_ids: number of ids of the whole call.
        n_blocked: number of the part's matrices, if MLX multiplies the call's rows by
            them in blocks.
    """
    if n_blocked:
        return max(SORTED_FROM, device.METAL_ROWS_A_MATRIX * n_blocked)
    return 1 if device.multiplies_row_by_row() else min(n_ids, SORTED_FROM)


def divide_large_stacks(model: nn.Module) -> list[tuple[nn.Module, type[nn.Module]]]:
    """Have mlx-lm's projections divide the stacks that MLX cannot index as one.

    MLX would multiply by other matrices without an error.

    Returns:
        The changed modules with their former classes.
    """
    divided: list[tuple[nn.Module, type[nn.Module]]] = [
        (module, type(module))
        for module in model.modules()
        if type(module) in (SwitchLinear, QuantizedSwitchLinear)
        and len(module.weight)
        > device.most_matrices(module.weight, getattr(module, "bits", None))
    ]
    for module, kind in divided:
        module.__class__ = in_slots(kind)
    return divided


class SlotBlock:
    """mlx-lm's block with the matrices in slots.

    MLX chooses a kernel by the number of matrices and rows, and kernels differ in their
    rounding. To give the same bits on every budget, this class makes MLX choose the
    kernel that it would use for all experts and all ids of the call.
    """

    def __init__(self, block: RoutedBlock):
        self._module, self.projections = block.module, block.projections
        self.n_experts = max(len(array) for array in block.parts.values())
        self._kinds = {name: type(m) for name, m in self.projections.items()}
        self._quantized: list[nn.Module] = [
            module
            for module in self.projections.values()
            if isinstance(module, QuantizedSwitchLinear)
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
        # With all experts, mlx-lm's module itself tells MLX whether ids are sorted.
        by_blocks = resident or self._by_blocks(slots.size if n_ids is None else n_ids)
        in_place = resident or (not by_blocks and _converts_none(weights, x.dtype))
        if in_place and all(map(lies_well, weights.by_name.values())):
            return self._run(weights, x, slots, by_blocks, resident=resident)
        weights, slots = weights.end_to_end(slots, self.n_experts)
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
        by_blocks = self._by_blocks(n_ids)
        return least_rows(n_ids, len(np.unique(np.array(slots))) if by_blocks else 0)

    def _by_blocks(self, n_ids: int) -> bool:
        """Return whether MLX would multiply a call's sorted rows in blocks."""
        is_sorted = n_ids >= SORTED_FROM
        return is_sorted and device.multiplies_by_blocks(n_ids, self.n_experts)

    def let_go(self) -> None:
        """Hold no weights, like mlx-lm's block before its weights are loaded."""
        self._hold(None)

    def _hold(self, weights: ExpertWeights | None, *, resident: bool = True) -> None:
        """Hold ``weights``; resident ones use mlx-lm's own module class if they can."""
        self._held = weights
        for name, module in self.projections.items():
            weight = None if weights is None else weights.by_name[name]
            own = self._kinds[name]
            plain = weight is None or (resident and _is_plain(weight))
            module.__class__ = own if plain else in_slots(own)
            module.bias_of = None
            for part, field in FIELDS.items():
                if weight is None:
                    module.pop(part, None)
                elif (array := getattr(weight, field)) is not None:
                    module[part] = array
            if weight is not None and _has_bias_views(weight):
                del module[BIAS]
                module.bias_of = weight.bias_of


def copied_bytes(store: ExpertStore, n_ids: int) -> int:
    """Return the most bytes of matrices that a block copies out of slots at a time.

    Args:
        n_ids: number of ids of the whole call.
    """
    counts = [store.count(layer) for layer in store.layers]
    copied = (min(n_ids, n) for n in counts if device.copies_slots(n_ids, n))
    stride = pool_stride([store.layout(layer) for layer in store.layers])
    return max(copied, default=0) * stride


def _is_plain(weight: Weight) -> bool:
    """Return whether mlx-lm's own call is right for these matrices."""
    bits = None if weight.quantization is None else weight.quantization.bits
    fits = len(weight.w) <= device.most_matrices(weight.w, bits)
    return fits and not _has_bias_views(weight)


def _has_bias_views(weight: Weight) -> bool:
    """Return whether biases are views of records; MLX indexes these wrongly."""
    return weight.strided and weight.bias is not None


def _converts_none(weights: ExpertWeights, dtype: mx.Dtype) -> bool:
    """Return whether MLX needs no conversion of all slots to ``dtype``."""
    own = (w.w if w.scales is None else w.scales for w in weights.by_name.values())
    return all(array.dtype in (dtype, mx.uint8) for array in own)
