"""Measure what a model's steps cost, and find the fastest ways to perform its Ops."""

from .plot import check_plot, save_plot
from .profile import Profile, Row, profile, write_csv

__all__ = ["Profile", "Row", "check_plot", "profile", "save_plot", "write_csv"]
