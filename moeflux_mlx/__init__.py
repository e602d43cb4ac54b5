"""Mixture-of-Experts models larger than memory in MLX, experts streamed from disk."""

from .backend import require_backend

require_backend()

from mlx_lm import generate, stream_generate  # noqa: E402

from . import ops  # noqa: E402
from .loading import load  # noqa: E402
from .state import CacheCheckpoint, State, load_state, save_state  # noqa: E402
from .streaming import stream  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "CacheCheckpoint",
    "State",
    "__version__",
    "generate",
    "load",
    "load_state",
    "ops",
    "save_state",
    "stream",
    "stream_generate",
]
