"""Serve a model over HTTP with mlx-lm's own server, and keep that server up.

mlx-lm's server generates in one thread, which an exception ends for good: every later
request then fails. ``join`` puts classes of ours in the places of those that this
thread looks up for each request. It is called where a model of ours is loaded inside
that server, and changes nothing elsewhere. ``moeflux serve`` adds what is in
``server``, which imports the loader and so is not imported here.

Imports: errors, memory, system.
"""

from __future__ import annotations

from .batches import GuardedBatches, n_waiting
from .guards import join, running_server
from .prompts import KeptPrompts, release_oldest_prompt

__all__ = [
    "GuardedBatches",
    "KeptPrompts",
    "join",
    "n_waiting",
    "release_oldest_prompt",
    "running_server",
]
