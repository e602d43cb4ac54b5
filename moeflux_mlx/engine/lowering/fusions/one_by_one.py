"""The Ops of a fusion run one by one, where its launch does not fit the values."""

from __future__ import annotations

from collections.abc import Sequence

from ...graph.lower import Kernel
from ...graph.op import Access, Op
from ...graph.rows import whole
from ..registry import Values


def one_by_one(ops: Sequence[Op], kernels: Sequence[Kernel], values: Values) -> Values:
    """Run Ops one by one with their kernels, in place of a fusion."""
    held = {key: whole(value) for key, value in values.items()}
    for op, kernel in zip(ops, kernels, strict=True):
        names = [f.name for f in op.buffer_fields if f.access & Access.READ]
        refs = (getattr(op, name) for name in op.weight_fields)
        keys = [getattr(op, name) for name in names]
        keys += [None if ref is None else ref.name for ref in refs]
        out = kernel(*(held[key] for key in keys))
        outs = out if isinstance(out, tuple) else (out,)
        held |= dict(zip(op.writes, outs, strict=True))
    return held
