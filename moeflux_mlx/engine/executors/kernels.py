"""The base of executors that run our kernels: building and launching."""

from __future__ import annotations

import functools
import hashlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ..graph.graph import Graph
from ..graph.lower import FusedCall, Kernel, LoweredCall, lower
from ..graph.op import Op
from ..launch import KERNELS, Launch, prepare
from ..launch.prepared import Prepared
from ..lowering import Usable, Way, any_kernel, default_way, fused, lowered
from ..metal import Instance, library
from .base import Executor


class KernelExecutor(Executor):
    """Runs Ops as launches of our kernels; subclasses say where.

    The first launch of a kernel builds it.
    """

    spare_rows = True
    joins_matrices = True

    def __init__(self) -> None:
        super().__init__()
        self._built: dict[Instance, Any] = {}
        # Is called with the name of every kernel launched.
        self.on_launch: Callable[[str], object] | None = None
        # Ways with kernels that are not usable are skipped.
        self.usable: Usable = any_kernel

    @property
    def instances(self) -> tuple[Instance, ...]:
        """Instances built so far, in order; a kernel has one for each set of values."""
        return tuple(self._built)

    @property
    def built(self) -> tuple[str, ...]:
        """Names of the kernels built so far, in order."""
        return tuple(dict.fromkeys(instance.kernel.name for instance in self._built))

    @property
    def kernel_count(self) -> int:
        """Number of kernels built so far."""
        return len(self.built)

    def warm_all(self) -> int:
        """Build every kernel and run its smallest sample; return their number."""
        for kernel in KERNELS.values():
            launch = kernel(*kernel.arguments(kernel.dtypes[0], **kernel.sizes[0]))
            mx.eval(self.run(launch))
        return self.kernel_count

    def kernel(self, op: Op) -> Kernel:
        return lowered(op, self.run, self.name, self.usable)

    def lower(self, graph: Graph) -> list[LoweredCall]:
        def fuse(ops: Sequence[Op]) -> FusedCall | None:
            return fused(ops, self.run, self.name, self.usable)

        return lower(graph, self.kernel, fuse)

    def default_way(self, op: Op) -> Way:
        """Return the way of an Op without a request and without tuning."""
        return default_way(op, self.name, self.usable)

    def run(self, launch: Launch) -> tuple[mx.array, ...]:
        """Launch a kernel; return its outputs in the order of the signature.

        Raises:
            KernelError: the launch does not match the signature.
        """
        ready = prepare(launch)
        instance = ready.instance
        if self.on_launch is not None:
            self.on_launch(instance.kernel.name)
        if instance not in self._built:
            self._built[instance] = self.build(instance)
        return tuple(self.call(self._built[instance], ready))

    def build(self, instance: Instance) -> Any:
        """Return MLX's kernel object for an instance."""
        return metal_kernel(instance, lines=False)

    @abstractmethod
    def call(self, built: Any, ready: Prepared) -> list[mx.array]:
        """Launch a built kernel with checked arguments."""


@functools.cache
def metal_kernel(instance: Instance, *, lines: bool) -> Any:
    """Register an instance of a kernel with MLX, by its signature.

    Template values are compiled in: MLX would expand a template at every launch.

    Args:
        lines: add ``#line`` to the source, for the compiler's messages.
    """
    kernels, kernel = library(), instance.kernel
    body = kernels.body(kernel, instance.values, lines=lines)
    # MLX may identify compiled kernels by name alone.
    digest = hashlib.sha256(body.encode()).hexdigest()[:16]
    return mx.fast.metal_kernel(
        name=f"moeflux_{kernel.name}_{digest}",
        input_names=[p.name for p in instance.inputs],
        output_names=[p.name for p in kernel.outputs],
        source=body,
        header=kernels.header(kernel, lines=lines),
    )
