"""How every kernel of ``kernels/`` is launched, in the same families."""

from . import attention, elementwise, linear_attention, mla, moe, norm
from .base import KERNELS, Kernel, Launch, prepare

__all__ = [
    "KERNELS",
    "Kernel",
    "Launch",
    "attention",
    "elementwise",
    "linear_attention",
    "mla",
    "moe",
    "norm",
    "prepare",
]
