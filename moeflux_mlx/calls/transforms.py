"""Tell a call under a transformation of MLX from one that computes values at once.

``mx.grad``, ``mx.vjp`` and ``mx.jvp`` run a function on arrays that have values like
any others, but a result computed from a copy of such values has no derivative. Whoever
looks at values must ask here first.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx

from .compiling import Compiled


class _Count(threading.local):
    n = 0


_COUNT = _Count()


def is_traced(arrays: Sequence[mx.array]) -> bool:
    """Tell whether a transformation follows any of ``arrays``.

    Nothing is evaluated here.
    """
    if not arrays or not in_transformation():
        return False
    (from_all,) = mx.depends([mx.array(0)], [*arrays])
    return _is_followed(from_all)


def in_transformation() -> bool:
    """Tell whether this is a call under any transformation; cheap."""
    return _is_followed(_FOLLOWED)


def compiles() -> bool:
    """Tell whether MLX compiles functions: somebody may have switched that off."""
    return not _is_called(_PROBE_OF_NOTHING)


def _is_followed(array: mx.array) -> bool:
    """Tell whether a transformation follows an array.

    MLX replays a compiled function without calling it, unless a transformation follows
    an argument: then it calls the function again.
    """
    if not _is_called(_PROBE, array):
        return False
    # Where compiling is switched off, every call is a call.
    with _compiling():
        return _is_called(_PROBE, array)


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """Let MLX compile meanwhile, though somebody may have switched that off."""
    if compiles():
        yield
        return
    mx.enable_compile()
    try:
        yield
    finally:
        mx.disable_compile()


def _is_called(probe: Callable[..., Any], *arguments: mx.array) -> bool:
    """Tell whether MLX calls a function that it has compiled before."""
    before = _COUNT.n
    probe(*arguments)
    if _COUNT.n == before:
        return False
    # That was perhaps the first call in this thread, which compiles.
    before = _COUNT.n
    probe(*arguments)
    return _COUNT.n > before


def _count(*arguments: mx.array) -> mx.array:
    _COUNT.n += 1
    return arguments[0] if arguments else mx.array(0)


def _placeholder() -> mx.array:
    """Return the stand-in for an argument while MLX compiles a function.

    MLX follows it in each later transformation too, and in nothing else. It never has
    a value.
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
