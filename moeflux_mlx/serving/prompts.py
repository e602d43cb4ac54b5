"""The prompts that a server keeps, which count as memory and can be released."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import LRUPromptCache

from ..memory.caches import arrays_of

_kept: weakref.WeakSet[KeptPrompts] = weakref.WeakSet()


class KeptPrompts(LRUPromptCache):
    """mlx-lm's store of prompt caches, without those of failed requests.

    Args:
        max_size, max_bytes: see mlx-lm's class.
        keeper: returns the keeper of the served model's memory plan, if any.
    """

    def __init__(
        self,
        max_size: int = 10,
        max_bytes: int | None = None,
        keeper: Callable[[], Any] = lambda: None,
    ):
        super().__init__(max_size, 1 << 63 if max_bytes is None else max_bytes)
        self._keeper = keeper
        _kept.add(self)

    def insert_cache(
        self, model: Any, tokens: list[int], prompt_cache: Any, **options: Any
    ) -> None:
        """Keep a request's caches, unless it failed and left none."""
        if prompt_cache is None:
            return
        # A lazy slice of a batch's caches would keep all of them in memory.
        mx.eval(arrays_of(prompt_cache))
        self._count(prompt_cache)
        super().insert_cache(model, tokens, prompt_cache, **options)

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> Any:
        """Return caches to continue, but never those of the whole prompt.

        mlx-lm's batches need a remaining token to begin with.
        """
        cache, rest = super().fetch_nearest_cache(model, tokens)
        if not rest:
            return None, tokens
        self._count(cache or [])
        return cache, rest

    def _count(self, cache: Any) -> None:
        if (keeper := self._keeper()) is not None:
            keeper.count(cache)


def release_oldest_prompt() -> bool:
    """Drop the oldest kept prompt; return whether there was one."""
    for prompts in _kept:
        if len(prompts):
            prompts.trim_to(n_sequences=len(prompts) - 1)
            mx.clear_cache()
            return True
    return False
