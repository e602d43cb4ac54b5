"""How every kernel of ``kernels/`` is launched, in the same families."""

from . import elementwise, moe
from .base import KERNELS, Kernel, Launch, prepare

__all__ = ["KERNELS", "Kernel", "Launch", "elementwise", "moe", "prepare"]
