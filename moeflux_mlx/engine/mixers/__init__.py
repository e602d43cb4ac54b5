"""Mixers: how a layer lets a token see those before it, and its memory of them.

A form says how a family's mixer is built, in numbers. Its parameters, rotary positions
and epsilons are those of mlx-lm's module, so one form serves every family that has one
like it.
"""

from .attention import Attention
from .base import Begun, CacheShapes, Mixer
from .delta_net import GatedDeltaNet
from .latent import LatentAttention

__all__ = [
    "Attention",
    "Begun",
    "CacheShapes",
    "GatedDeltaNet",
    "LatentAttention",
    "Mixer",
]
