"""Check that MLX has a library, and name the one to install if not."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from collections.abc import Iterator
from importlib import metadata

from ..errors import BackendError

# Packages that contain MLX's library; one of them is needed.
BACKENDS = ("mlx-cpu", "mlx-cuda-12", "mlx-cuda-13", "mlx-metal")


def require_backend() -> None:
    """Import MLX, or name the extra that provides the missing library.

    Before that, set a variable that keeps macOS from stopping long GPU work, such as a
    long prompt. It must be set before MLX opens the device.

    Raises:
        BackendError: ``import mlx.core`` failed; the message names the extra.
    """
    os.environ.setdefault("AGX_RELAX_CDM_CTXSTORE_TIMEOUT", "1")
    try:
        import mlx.core  # noqa: F401
    except ImportError as error:
        raise BackendError(_advice(error)) from error


@contextlib.contextmanager
def own_file_limit() -> Iterator[None]:
    """Let modules request more open files than the hard limit within this context.

    mlx-lm sets the limit when it is imported, which fails under a lower hard limit. In
    that case the hard limit is used.
    """
    set_limit = resource.setrlimit

    def set_if_allowed(which: int, limits: tuple[int, int]) -> None:
        try:
            set_limit(which, limits)
        except (ValueError, OSError):
            hard = resource.getrlimit(which)[1]
            set_limit(which, (hard, hard))

    resource.setrlimit = set_if_allowed
    try:
        yield
    finally:
        resource.setrlimit = set_limit


def _advice(error: ImportError) -> str:
    found = ", ".join(filter(_is_installed, BACKENDS)) or "none"
    if sys.platform == "darwin":
        fix = "Install it again on Apple silicon: pip install --force-reinstall mlx"
    else:
        fix = (
            "Install one of them, never both: pip install 'moeflux-mlx[cpu]' (any "
            "machine) or pip install 'moeflux-mlx[cuda]' (NVIDIA)"
        )
    return (
        f"[backend] expected an MLX library but importing mlx.core failed: {error} "
        f"(libraries installed: {found}). {fix}"
    )


def _is_installed(distribution: str) -> bool:
    try:
        return bool(metadata.version(distribution))
    except metadata.PackageNotFoundError:
        return False
