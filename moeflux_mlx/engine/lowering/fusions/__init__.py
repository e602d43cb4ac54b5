"""Fusions: consecutive Ops of one token that run as one launch.

A launch costs some microseconds, however little it computes, and a layer has about
twenty Ops, most of them tiny.

A fusion finds its Ops by the values that they read of each other, not by the model. So
a family without an output gate or a shared expert still has the other fusions.
"""

from . import attention, experts, latent, linear_attention, products
from .one_by_one import one_by_one

__all__ = [
    "attention",
    "experts",
    "latent",
    "linear_attention",
    "one_by_one",
    "products",
]
