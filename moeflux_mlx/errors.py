"""Every error that a user can meet, with one type for each part.

Messages read ``[part] expected X but got Y`` and name the file, layer, expert or
argument at fault.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

# Maximum length of another library's error within a line of ours.
MOST_TOLD = 400
# Number of characters kept at each end of a longer text.
HALF_TEXT = 1000


def one_line(text: str) -> str:
    """Return text as one line that is safe on a terminal.

    File names in it may contain any character.
    """
    lines = (line.strip() for line in text.split("\n"))
    return printable(" ".join(line for line in lines if line))


def printable(text: str) -> str:
    """Replace control characters except line ends by ``?``."""
    if text.isprintable():
        return text
    shown = (c if c.isprintable() or c == "\n" else "?" for c in text)
    return "".join(shown)


class MoefluxError(Exception):
    """Base class of every error that moeflux-mlx raises; its text is one line.

    A long text is cut in the middle, because it may quote a file.
    """

    def __str__(self) -> str:
        text = one_line(super().__str__())
        if len(text) <= 2 * HALF_TEXT:
            return text
        return f"{text[:HALF_TEXT]} ... {text[-HALF_TEXT:]}"


class BackendError(MoefluxError, ImportError):
    """MLX has no usable backend, or an executor cannot run here."""


class ConfigError(MoefluxError, ValueError):
    """An argument or environment variable has an unusable value."""


class GraphError(MoefluxError):
    """An Op was given the wrong role, shape or field."""


class SizeMismatch(GraphError):
    """A buffer differs in size from the bytes of the host."""

    def __init__(self, label: str, expected: int, actual: int):
        self.label, self.expected, self.actual = label, expected, actual
        super().__init__(
            f"[BufferPool] {label!r} holds {expected} bytes but got {actual}"
        )


class ModelError(MoefluxError, ValueError):
    """A model directory, its configuration or its input is unusable."""


class ExpertStoreError(MoefluxError):
    """Expert files are missing, damaged, unreadable or belong to another model."""


class BudgetError(ExpertStoreError, ValueError):
    """The memory budget cannot hold the needs of one token."""


class StateError(MoefluxError, ValueError):
    """A saved state is unusable, or caches cannot be saved."""


class TraceError(MoefluxError, ValueError):
    """A routing trace is missing, damaged or belongs to another model."""


class RequestError(MoefluxError, ValueError):
    """A server refuses a request; ``status`` is the HTTP status."""

    def __init__(self, message: str, status: int = 400):
        self.status = status
        super().__init__(message)


class GroupError(MoefluxError, RuntimeError):
    """Another process of the group ended, or makes another call."""


class PeerError(GroupError):
    """Another process of the group failed and reports the error itself."""


class PeerBudgetError(PeerError, BudgetError):
    """Another process of the group has no memory for a call that all must make."""


class KernelError(MoefluxError, ValueError):
    """A kernel's source, arguments or launch do not match its signature."""


class SimulatorError(MoefluxError):
    """A kernel does not compile for the simulator, or made an error there."""

    def __str__(self) -> str:
        # Keep line ends: a compiler marks columns on a line below the code.
        return printable(Exception.__str__(self))


@contextlib.contextmanager
def memory_errors(where: str) -> Iterator[None]:
    """Turn a MemoryError into an error with advice.

    Raises:
        BudgetError: instead of the MemoryError.
    """
    try:
        yield
    except MemoryError as error:
        raise BudgetError(
            f"[memory] {where}: this process can have no more memory: raise its limit, "
            "or give experts less"
        ) from error


@contextlib.contextmanager
def one_line_errors(where: str) -> Iterator[None]:
    """Turn errors of other libraries into one line that begins with ``where``.

    Raises:
        ModelError: with the library's error as its cause.
        BudgetError: see ``memory_errors``.
    """
    try:
        with memory_errors(where):
            yield
    except MoefluxError:
        raise
    except Exception as error:
        told = one_line(f"{type(error).__name__}: {error}")
        told = told if len(told) <= MOST_TOLD else f"{told[:MOST_TOLD]}..."
        raise ModelError(f"{where}: cannot use it: {told}") from error
