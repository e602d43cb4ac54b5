"""How every kernel of ``kernels/`` is launched, in the same families."""

from .base import KERNELS, Kernel, Launch, prepare

__all__ = ["KERNELS", "Kernel", "Launch", "prepare"]
