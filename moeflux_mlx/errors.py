"""Every error a user can meet, typed by the part that raises it.

Messages read ``[part] expected X but got Y`` and name the file, layer,
expert or argument at fault.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

# How much of another library's error a line of ours repeats.
MOST_TOLD = 400
# The first and last letters kept of an error's text, if it has more than both.
HALF_TEXT = 1000


def one_line(text: str) -> str:
    """Return text as a terminal may show it, names of files being anybody's choice."""
    lines = (line.strip() for line in text.split("\n"))
    return printable(" ".join(line for line in lines if line))


def printable(text: str) -> str:
    """Return text with ``?`` for all that moves a terminal, but for ends of lines."""
    if text.isprintable():
        return text
    shown = (c if c.isprintable() or c == "\n" else "?" for c in text)
    return "".join(shown)


class MoefluxError(Exception):
    """Base of every error raised on purpose by moeflux-mlx; its text is one line.

    It may repeat what a file says, which can be of any length.
    """

    def __str__(self) -> str:
        text = one_line(super().__str__())
        if len(text) <= 2 * HALF_TEXT:
            return text
        return f"{text[:HALF_TEXT]} ... {text[-HALF_TEXT:]}"


class BackendError(MoefluxError, ImportError):
    """No usable MLX backend, or an executor that cannot run here."""


class ConfigError(MoefluxError, ValueError):
    """An argument or environment variable has a value that cannot be used."""


class GraphError(MoefluxError):
    """An Op was given the wrong role, shape or field."""


class SizeMismatch(GraphError):
    """A buffer and the host bytes meant for it differ in size."""

    def __init__(self, label: str, expected: int, actual: int):
        self.label, self.expected, self.actual = label, expected, actual
        super().__init__(
            f"[BufferPool] {label!r} holds {expected} bytes but got {actual}"
        )


class ModelError(MoefluxError, ValueError):
    """A model directory, its configuration or its input is not usable."""


class ExpertStoreError(MoefluxError):
    """Expert files are missing, damaged, unreadable or of another model."""


class BudgetError(ExpertStoreError, ValueError):
    """The memory budget cannot hold the needs of one token."""


class StateError(MoefluxError, ValueError):
    """A saved state is damaged or of another model, or caches cannot be kept."""


class TraceError(MoefluxError, ValueError):
    """A recording of routing is missing, damaged or of another model."""


class RequestError(MoefluxError, ValueError):
    """A request to a server asks for something that it does not give.

    ``status`` is the one of HTTP that says so.
    """

    def __init__(self, message: str, status: int = 400):
        self.status = status
        super().__init__(message)


class GroupError(MoefluxError, RuntimeError):
    """Another process of a group ended, or does something else."""


class PeerError(GroupError):
    """Another process of a group failed, and says so itself."""


class PeerBudgetError(PeerError, BudgetError):
    """Another process of a group has no room for what all of them are to do."""


class KernelError(MoefluxError, ValueError):
    """A kernel's source, arguments or launch do not match its signature."""


class SimulatorError(MoefluxError):
    """A kernel does not compile for the simulator, or did something wrong there."""

    def __str__(self) -> str:
        # A compiler points at places below its lines.
        return printable(Exception.__str__(self))


@contextlib.contextmanager
def memory_errors(where: str) -> Iterator[None]:
    """Give memory that the process cannot have a type and advice.

    Raises:
        BudgetError: in place of a MemoryError.
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
    """Turn errors of other libraries into one line that says where it was.

    Raises:
        ModelError: with the library's error as its cause.
        BudgetError: as ``memory_errors``.
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
