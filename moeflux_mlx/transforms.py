"""Tell a call under a transformation of MLX from one that computes values at once.

``mx.grad``, ``mx.vjp`` and ``mx.jvp`` run a function on arrays that have values like
any others, but what is computed from a copy of such values has no derivative. Whoever
looks at values must ask here first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from .compiling import Compiled


class _Count(threading.local):
    n = 0


_COUNT = _Count()


def is_traced(arrays: Sequence[mx.array]) -> bool:
    """Tell whether a transformation follows what becomes of any of ``arrays``.

    MLX replays a compiled function without calling it, unless a transformation follows
    an argument: then it calls the function again. Nothing is evaluated here.
    """
    if not arrays:
        return False
    (from_all,) = mx.depends([mx.array(0)], [*arrays])
    if not _is_called(_PROBE, from_all):
        return False
    # Somebody may have switched compiling off; then every call is a call.
    if not _is_called(_PROBE_OF_NOTHING):
        return True
    mx.enable_compile()
    try:
        return _is_called(_PROBE, from_all)
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


_PROBE, _PROBE_OF_NOTHING = Compiled(_count), Compiled(lambda: _count())
