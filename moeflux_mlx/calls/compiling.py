"""Functions that MLX compiled, none of which it ever takes for another one.

MLX keeps compiled functions for each thread, under the address of the Python function.
When a function goes, only the thread that called it last forgets it. A new function may
get the same address, and in the other threads MLX would run the old one, without an
error. So an address must not be used again while a thread may know it: each thread
keeps the functions it called until it has made MLX forget them.
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
    """A function that MLX knows by its address, or nothing once that is gone."""

    def __init__(self, function: Callable[..., Any]):
        # Threads that keep this must not keep the function and all that it holds.
        self.function = weakref.ref(function)

    def __call__(self, *args: Any, **options: Any) -> Any:
        function = self.function()
        return [] if function is None else function(*args, **options)


class _Thread(threading.local):
    """The functions that a thread has called and MLX may know there."""

    def __init__(self) -> None:
        self.called: set[_Known] = set()

    def forget(self) -> None:
        """Let MLX forget, in this thread, every function that is gone."""
        for known in [known for known in self.called if known.function() is None]:
            # A compiled function takes its last thread's knowledge with it.
            mx.compile(known)()
            self.called.discard(known)


_THREAD = _Thread()


class Compiled(Generic[P, R]):
    """A function as ``mx.compile`` makes it, for use in any thread.

    Each thread compiles it at its first call there.
    """

    def __init__(self, function: Callable[P, R]):
        self._function, self._known = function, _Known(function)
        self._call = mx.compile(self._known)

    def __call__(self, *args: P.args, **options: P.kwargs) -> R:
        if self._known not in _THREAD.called:
            _THREAD.forget()
            _THREAD.called.add(self._known)
        return self._call(*args, **options)  # type: ignore[no-any-return]
