"""Checks of the arguments of a model of mlx-lm's class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlx_lm.models.cache import ArraysCache, CacheList

from .arguments import (
    SeenCaches,
    check_number,
    check_position,
    check_sequences,
    first_states,
    float_rows,
    got,
    misfit,
    token_ids,
    tokens_beside,
)


class StockChecks:
    """Checks the arguments of calls of a model of mlx-lm's class.

    Args:
        make_caches: makes the model's own caches.
    """

    def __init__(self, make_caches: Callable[[], list[Any]]):
        self._make_caches = make_caches
        self._made: list[Any] | None = None
        self._seen = SeenCaches()

    def __call__(self, arguments: dict[str, Any], tokens: str) -> None:
        """Check arguments by name, and replace lists of tokens by arrays.

        Args:
            tokens: the name of the argument with the tokens.

        Raises:
            ModelError: an argument is unusable, which it names.
        """
        embeddings = arguments.get("input_embeddings")
        if embeddings is None:
            found = arguments[tokens] = token_ids(arguments.get(tokens))
        else:
            arguments["input_embeddings"] = embeddings = float_rows(embeddings)
            found = tokens_beside(arguments.get(tokens), embeddings)
        if (cache := arguments.get("cache")) is not None:
            self._check_caches(cache, *found.shape)

    def _check_caches(self, cache: Any, n_seqs: int, t: int) -> None:
        if self._made is None:
            self._made = self._make_caches()
        check_number(cache, len(self._made), "as the model makes them")
        types = [*map(type, cache)]
        if not self._seen.holds(cache, types, t):
            for i, (each, made) in enumerate(zip(cache, self._made, strict=True)):
                if each is not None and not _is_like(each, made):
                    advice = "make them with make_prompt_cache"
                    wanted = f"a cache like {type(made).__name__}"
                    raise misfit(f"cache of layer {i}", wanted, got(each), advice)
            ends = (getattr(c, "offset", None) for c in cache if _is_used(c))
            check_position({end for end in ends if isinstance(end, int)})
            self._seen.keep(cache, types)
        check_sequences(first_states(cache, types), n_seqs)


def _is_like(cache: Any, made: Any) -> bool:
    """Tell whether a model that makes the cache ``made`` could use ``cache``."""
    if isinstance(made, ArraysCache):
        return isinstance(cache, ArraysCache) and len(cache.cache) == len(made.cache)
    if isinstance(made, CacheList):
        inner = getattr(cache, "caches", None)
        return inner is not None and len(inner) == len(made.caches)
    if hasattr(made, "update_and_fetch"):
        return hasattr(cache, "update_and_fetch") and hasattr(cache, "offset")
    return isinstance(cache, type(made))


def _is_used(cache: Any) -> bool:
    return cache is not None and not cache.empty()
