"""What executors that run our kernels share: building, calling, counting."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ..graph.graph import Graph
from ..graph.lower import Kernel, Step, Together, lower
from ..graph.op import Op
from ..launch import KERNELS, Launch, prepare
from ..launch.base import Prepared
from ..lowering import Usable, Way, any_kernel, default_way, fused, lowered
from ..metal import MetalKernel, library
from .base import Executor


class KernelExecutor(Executor):
    """Runs every Op as launches of our kernels; subclasses say where.

    A kernel is built when it is first launched.
    """

    spare_rows = True
    joins_matrices = True

    def __init__(self) -> None:
        super().__init__()
        self._built: dict[str, Any] = {}
        # Hears the name of every kernel launched.
        self.on_launch: Callable[[str], object] | None = None
        # Ways whose kernels are not usable are passed over.
        self.usable: Usable = any_kernel

    @property
    def built(self) -> tuple[str, ...]:
        """Names of the kernels built so far, in order."""
        return tuple(self._built)

    @property
    def kernel_count(self) -> int:
        """How many kernels were built so far."""
        return len(self._built)

    def warm_all(self) -> int:
        """Build every kernel and run its smallest sample; return how many there are."""
        for kernel in KERNELS.values():
            launch = kernel(*kernel.arguments(kernel.dtypes[0], **kernel.sizes[0]))
            mx.eval(self.run(launch))
        return self.kernel_count

    def kernel(self, op: Op) -> Kernel:
        return lowered(op, self.run, self.name, self.usable)

    def lower(self, graph: Graph) -> list[Step]:
        def fuse(ops: Sequence[Op]) -> Together | None:
            return fused(ops, self.run, self.name, self.usable)

        return lower(graph, self.kernel, fuse)

    def default_way(self, op: Op) -> Way:
        """Return the way of an Op where nobody chose and nothing is tuned."""
        return default_way(op, self.name, self.usable)

    def run(self, launch: Launch) -> tuple[mx.array, ...]:
        """Launch a kernel; return its outputs in the signature's order.

        Raises:
            KernelError: the launch is not what the signature says.
        """
        ready = prepare(launch)
        name = ready.kernel.name
        if self.on_launch is not None:
            self.on_launch(name)
        if name not in self._built:
            self._built[name] = self.build(ready.kernel)
        return tuple(self.call(self._built[name], ready))

    def build(self, kernel: MetalKernel) -> Any:
        """Return MLX's kernel object of a parsed kernel."""
        return metal_kernel(kernel.name, lines=False)

    @abstractmethod
    def call(self, built: Any, ready: Prepared) -> list[mx.array]:
        """Launch a built kernel with checked arguments."""


@functools.cache
def metal_kernel(name: str, *, lines: bool) -> Any:
    """Register one of our kernels with MLX from its own signature.

    Args:
        lines: keep the file and line of every part in the source.
    """
    kernels = library()
    kernel = kernels[name]
    return mx.fast.metal_kernel(
        name=f"moeflux_{name}",
        input_names=[p.name for p in kernel.inputs],
        output_names=[p.name for p in kernel.outputs],
        source=kernels.body(kernel, lines=lines),
        header=kernels.header(kernel, lines=lines),
    )
