"""Measure the cost of a model's steps, and find the fastest ways to perform its Ops.

Imports: errors, device, calls, engine, engine.executors, engine.graph, engine.launch,
engine.lowering, engine.ops, experts, experts.compute, experts.files, experts.pool,
experts.streaming, system.
"""

from .plot import check_plot, save_hit_rates, save_plot
from .profile import SECONDS, Profile, Row, profile, write_csv
from .routing import record_routing
from .tune import PROMPTS, decide, tune

__all__ = [
    "PROMPTS",
    "SECONDS",
    "Profile",
    "Row",
    "check_plot",
    "decide",
    "profile",
    "record_routing",
    "save_hit_rates",
    "save_plot",
    "tune",
    "write_csv",
]
