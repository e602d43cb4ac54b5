"""Run Mixture-of-Experts models larger than memory in MLX, with streamed experts."""

from .system import working_directory

working_directory.forget()

import os  # noqa: E402

if not os.path.isdir(os.path.join(__path__[0], "models")):
    # Python started in a checkout imports this folder, even after ``pip install .``.
    # There the folder of models is beside it.
    __path__.append(os.path.dirname(__path__[0]))

from .system.backend import own_file_limit, require_backend  # noqa: E402

require_backend()

with own_file_limit():
    from mlx_lm import generate, stream_generate

from . import ops  # noqa: E402
from .loading import load  # noqa: E402
from .state import CacheCheckpoint, State, load_state, save_state  # noqa: E402
from .streaming import stream  # noqa: E402
from .system import mlx_cache  # noqa: E402

mlx_cache.guard()

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
