"""Executor ``ops``: every Op by its reference in MLX's own operations."""

from __future__ import annotations

from ..graph.lower import Kernel
from ..graph.op import Op
from .base import Executor


class OpsExecutor(Executor):
    """Runs on any device: for CPUs, for gradients, and as the oracle of kernels."""

    name = "ops"
    takes_host_arrays = True

    def kernel(self, op: Op) -> Kernel:
        return op.reference  # type: ignore[attr-defined,no-any-return]


class LazyOpsExecutor(OpsExecutor):
    """The same on MLX's arrays only, so that MLX can transform it."""

    takes_host_arrays = False
