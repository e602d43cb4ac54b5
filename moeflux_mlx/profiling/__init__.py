"""Measure what a model's steps cost, and find the fastest ways to perform its Ops."""

from .plot import check_plot, save_plot
from .profile import Profile, Row, profile, write_csv
from .tune import PROMPTS, decide, tune

__all__ = [
    "PROMPTS",
    "Profile",
    "Row",
    "check_plot",
    "decide",
    "profile",
    "save_plot",
    "tune",
    "write_csv",
]
