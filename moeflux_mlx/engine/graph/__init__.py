"""Graphs of Ops: roles, buffers, lifetimes, lowering into calls.

Imports: errors, experts, experts.compute, experts.pool.
"""

from .buffers import BufferPool, BufId
from .graph import Graph
from .lifetime import analyze_lifetimes, greedy_color, planned_peak_bytes
from .op import REGISTRY, Access, Cost, In, InOut, Op, Out, WeightRef
from .roles import Buf

__all__ = [
    "REGISTRY",
    "Access",
    "Buf",
    "BufId",
    "BufferPool",
    "Cost",
    "Graph",
    "In",
    "InOut",
    "Op",
    "Out",
    "WeightRef",
    "analyze_lifetimes",
    "greedy_color",
    "planned_peak_bytes",
]
