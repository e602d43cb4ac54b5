"""Which files this process has open."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator


def count() -> int:
    """Return how many files are open, but those that only garbage holds."""
    gc.collect()
    return len(os.listdir("/dev/fd"))


@contextlib.contextmanager
def none_left() -> Iterator[None]:
    """Fail if more files are open after what is done in here."""
    before = len(os.listdir("/dev/fd"))
    yield
    # To search for garbage takes long, and seldom is some left.
    if len(os.listdir("/dev/fd")) != before:
        assert count() <= before, "files were left open"
