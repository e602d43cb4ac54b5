"""Compiled functions that MLX never confuses with one another.

MLX stores compiled functions per thread, under the address of the Python function. When
a function is deleted, only the thread that called it last forgets it. A new function
may get the same address, and in the other threads MLX would silently run the old one.
So an address must not be reused while a thread may know it: each thread keeps the
functions that it called until it has made MLX forget them.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import mlx.core as mx

P = ParamSpec("P")
R = TypeVar("R")


class _Known:
    """A callable whose address MLX knows; it holds its function weakly."""

    def __init__(self, function: Callable[..., Any]):
        # A thread that keeps this object must not keep the function alive.
        self.function = weakref.ref(function)

    def __call__(self, *args: Any, **options: Any) -> Any:
        function = self.function()
        return [] if function is None else function(*args, **options)


class _Functions:
    """The functions that MLX may know in a thread, because it has called them.

    Python deletes this when the thread ends, and MLX then forgets the thread. MLX
    itself would do so later, without Python's lock. If the process ends meanwhile, it
    aborts: "terminate called without an active exception".
    """

    def __init__(self) -> None:
        self.called: set[_Known] = set()
        self._is_main = threading.current_thread() is threading.main_thread()

    def forget(self) -> None:
        """Let MLX forget every deleted function in this thread."""
        for known in [known for known in self.called if known.function() is None]:
            # Deleting a compiled function makes its last calling thread forget it.
            mx.compile(known)()
            self.called.discard(known)

    def __del__(self) -> None:
        if not self._is_main:
            mx.clear_streams()


class _Thread(threading.local):
    """The present thread's functions."""

    def __init__(self) -> None:
        self.functions = _Functions()


_THREAD = _Thread()


def forget_gone() -> None:
    """Let MLX forget deleted functions, and their arrays, in this thread.

    Other threads do so when they next call a compiled function, or end.
    """
    _THREAD.functions.forget()


class Compiled(Generic[P, R]):
    """A compiled function that any thread may call.

    Each thread compiles it at its first call.
    """

    def __init__(self, function: Callable[P, R]):
        self._function, self._known = function, _Known(function)
        self._call = mx.compile(self._known)

    def __call__(self, *args: P.args, **options: P.kwargs) -> R:
        functions = _THREAD.functions
        if self._known not in functions.called:
            functions.forget()
            functions.called.add(self._known)
        return self._call(*args, **options)  # type: ignore[no-any-return]
