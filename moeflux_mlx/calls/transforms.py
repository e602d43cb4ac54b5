"""Detect calls under a transformation of MLX.

``mx.grad``, ``mx.vjp`` and ``mx.jvp`` run a function on arrays with ordinary values,
but a result computed from a copy of such values has no derivative. Code that reads
values must check here first.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx

from .compiling import Compiled

# Held while MLX's switch for compilation is changed or asked: all threads share it.
# Python may end a model, and so its training, while this thread holds the lock.
COMPILATION = threading.RLock()


class _Count(threading.local):
    n = 0


_COUNT = _Count()


def is_traced(arrays: Sequence[mx.array]) -> bool:
    """Tell whether a transformation traces any of ``arrays``, without evaluating."""
    if not arrays or not in_transformation():
        return False
    (from_all,) = mx.depends([mx.array(0)], [*arrays])
    return _is_followed(from_all)


def in_transformation() -> bool:
    """Tell whether this call runs under any transformation; this is cheap."""
    return _is_followed(_FOLLOWED)


def compiles() -> bool:
    """Tell whether MLX compiles functions, which a caller may have disabled."""
    return not _is_called(_PROBE_OF_NOTHING)


def _is_followed(array: mx.array) -> bool:
    """Tell whether a transformation traces an array.

    MLX replays a compiled function without calling it, unless a transformation traces
    an argument: then it calls the function again.
    """
    if not _is_called(_PROBE, array):
        return False
    # With compilation disabled MLX always calls the function, so enable it here.
    with _compiling():
        return _is_called(_PROBE, array)


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """Enable compilation within this context."""
    with COMPILATION:
        if compiles():
            yield
            return
        mx.enable_compile()
        try:
            yield
        finally:
            mx.disable_compile()


def _is_called(probe: Callable[..., Any], *arguments: mx.array) -> bool:
    """Tell whether MLX calls an already compiled function again."""
    before = _COUNT.n
    probe(*arguments)
    if _COUNT.n == before:
        return False
    # The call may have been this thread's first, which compiles; try again.
    before = _COUNT.n
    probe(*arguments)
    return _COUNT.n > before


def _count(*arguments: mx.array) -> mx.array:
    _COUNT.n += 1
    return arguments[0] if arguments else mx.array(0)


def _placeholder() -> mx.array:
    """Return the placeholder for an argument while MLX compiles a function.

    Every later transformation traces it too, and nothing else does. It never has a
    value.
    """
    kept: list[mx.array] = []

    def keep(x: mx.array) -> mx.array:
        kept.append(x)
        return x

    with _compiling():
        Compiled(keep)(mx.array(0))
    return kept[0]


_PROBE, _PROBE_OF_NOTHING = Compiled(_count), Compiled(lambda: _count())
_FOLLOWED = _placeholder()
