"""Guards that keep mlx-lm's own server running.

mlx-lm's server generates in one thread. An exception ends this thread, and then every
later request fails. ``join`` replaces the classes that the thread uses for requests. It
is called when a model is loaded inside that server, and does nothing elsewhere.
``moeflux serve`` is in ``server``, which imports the loader, so it is not imported
here.

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
