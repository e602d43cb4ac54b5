"""Mixers: the part of a layer in which a token sees those before it, and its cache.

A form describes a mixer in numbers. Parameters, rotary positions and epsilons are those
of mlx-lm's module, so one form serves all families with such a mixer.
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
