"""Count the files that this process has open."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator


def count() -> int:
    """Return the number of open files, without those that only garbage holds."""
    gc.collect()
    return len(os.listdir("/dev/fd"))


@contextlib.contextmanager
def none_left() -> Iterator[None]:
    """Fail if more files are open at the end of the block than at its start."""
    before = len(os.listdir("/dev/fd"))
    yield
    # Collecting garbage is slow and rarely needed, so count first.
    if len(os.listdir("/dev/fd")) != before:
        assert count() <= before, "files were left open"
