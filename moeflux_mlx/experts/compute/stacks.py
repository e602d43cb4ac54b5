"""Products over stacks of matrices, right for stacks of any size."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from ... import device
from ..weights import Weight


def in_parts(
    product: Callable[[slice | None, mx.array], mx.array],
    w: mx.array,
    bits: int | None,
    ids: mx.array,
    in_order: bool = False,
) -> mx.array:
    """Multiply by matrices of a stack, as many at a time as MLX indexes rightly.

    Every part multiplies all rows, so that MLX chooses the kernel of the whole product
    and the bits stay the same. Rows of other parts' matrices are discarded. Gradients
    may add in another order.

    Args:
        product: multiplies by those matrices of the stack that a slice selects, or by
            all for None; takes ids ``[...]`` within them and returns ``[..., M, N]``.
        w: the stack ``[n, rows, columns]``.
        bits: bits of a value; None: dense.
        ids: the id of each row's matrix.
        in_order: ``product`` tells MLX that ids are sorted.
    """
    most = device.most_matrices(w, bits, in_order)
    if len(w) <= most:
        return product(None, ids)
    out = product(slice(0, most), mx.minimum(ids, most - 1))
    for first in range(most, len(w), most):
        last = min(first + most, len(w)) - 1
        own = mx.clip(ids, first, last) - first
        found = product(slice(first, last + 1), own)
        out = mx.where(mx.expand_dims(ids >= first, (-2, -1)), found, out)
    return out


def lies_well(weight: Weight) -> bool:
    """Tell whether MLX multiplies by the matrices where they are, and rightly.

    Views of slots are not multiplied in parts: copies of the needed matrices take less
    time. MLX indexes a ``global_scale`` itself, so views of it are always copied.
    """
    if not weight.strided:
        return True
    q = weight.quantization
    most = device.most_matrices(weight.w, None if q is None else q.bits)
    in_place = device.gathers_strided() and weight.global_scale is None
    return in_place and len(weight.w) <= most
