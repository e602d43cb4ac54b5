"""The launch of every kernel, in modules named after the files of ``kernels/``.

Imports: errors, device, engine.metal, engine.ops, experts.
"""

from . import (
    attention,
    elementwise,
    embed,
    experts,
    linear_attention,
    mla,
    moe,
    norm,
    quant,
)
from .base import KERNELS, Kernel
from .prepared import Launch, prepare

__all__ = [
    "KERNELS",
    "Kernel",
    "Launch",
    "attention",
    "elementwise",
    "embed",
    "experts",
    "linear_attention",
    "mla",
    "moe",
    "norm",
    "prepare",
    "quant",
]
