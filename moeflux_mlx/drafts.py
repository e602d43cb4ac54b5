"""Speculative decoding for models whose caches cannot be trimmed.

mlx-lm's speculative decoding trims rejected tokens from the caches. States of linear
attention and full windows cannot be trimmed. Here such caches are restored to their
values before the call that added the tokens, and the accepted tokens of that call are
computed again, together with the next ones.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generation_stream, speculative_generate_step
from mlx_lm.models.cache import make_prompt_cache

from .errors import ModelError
from .memory.caches import CacheState, always_trim, are_known, single_caches
from .saving.guard import GuardsSaving, put_everywhere

_STOCK = speculative_generate_step
# mlx-lm's default of ``num_draft_tokens``.
DRAFT_TOKENS = 2


def can_go_back(cache: Sequence[Any]) -> bool:
    """Tell whether a model with such caches can take part in speculative decoding."""
    return always_trim(cache) or are_known(cache)


class GoesBack:
    """A stand-in for a model, whose caches can go back by several tokens.

    mlx-lm calls it like the model, with ``layers`` as caches.

    Args:
        most: maximum number of tokens by which the caches can go back.
    """

    def __init__(self, model: Any, caches: list[Any], most: int):
        self._model, self._caches, self._most = model, caches, most
        self.layers = [_Place(self, cache) for cache in caches]
        # The last calls: the caches before each, and its tokens.
        self._calls: list[tuple[list[CacheState], mx.array]] = []
        # Accepted tokens that the caches lack, because restoring removed them too.
        self._lacking = mx.zeros((1, 0), mx.uint32)
        self._failed = False

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        """Return the logits of tokens ``[1, T]``; ``cache`` is ``layers``."""
        n = self._lacking.shape[1]
        if n > self._most:
            self.settle()
            n = 0
        return self._run(mx.concatenate([self._lacking, tokens], axis=1))[:, n:]

    def _run(self, tokens: mx.array) -> mx.array:
        before = [CacheState(one) for one in single_caches(self._caches)]
        try:
            logits: mx.array = self._model(tokens, cache=self._caches)
        except BaseException:
            self._failed = True
            raise
        self._lacking = tokens[:, :0]
        self._calls.append((before, tokens))
        sizes = [tokens.shape[1] for _, tokens in self._calls]
        while sum(sizes[1:]) >= self._most:
            del self._calls[0], sizes[0]
        return logits

    def settle(self) -> None:
        """Compute the accepted tokens that the caches lack."""
        if self._lacking.shape[1] and not self._failed:
            mx.eval(self._run(self._lacking))

    def go_back(self, n: int) -> None:
        """Remove the last ``n`` tokens from the caches.

        Raises:
            ModelError: ``n`` exceeds the recorded calls.
        """
        # After a failed call the number of tokens in the caches is unknown.
        if self._failed:
            return
        while self._lacking.shape[1] < n:
            if not self._calls:
                raise ModelError(
                    f"[draft] expected at most {self._most} tokens to be taken back: "
                    "generate without a draft model"
                )
            before, tokens = self._calls.pop()
            for state in before:
                state.put_back()
            self._lacking = mx.concatenate([tokens, self._lacking], axis=1)
        self._lacking = self._lacking[:, : self._lacking.shape[1] - n]


class _Place:
    """A stand-in for a layer's cache; trimming the first one trims all of them."""

    def __init__(self, owner: GoesBack, cache: Any):
        self._owner, self._cache = owner, cache

    @property
    def state(self) -> Any:
        return self._cache.state

    def is_trimmable(self) -> bool:
        return True

    def trim(self, n: int) -> int:
        if self._owner.layers[0] is self:
            self._owner.go_back(n)
        return n


@functools.wraps(_STOCK)
def _speculative_generate_step(
    prompt: mx.array,
    model: Any,
    draft_model: Any,
    stream: Any = generation_stream,
    **options: Any,
) -> Iterator[tuple[mx.array, mx.array, bool]]:
    models: tuple[Any, ...] = (model, draft_model)
    given = options.pop("prompt_cache", None)
    if given is None:
        caches = [make_prompt_cache(each) for each in models]
    else:
        n = len(model.layers)
        caches = [given[:n], given[n:]]
    if any(isinstance(each, GuardsSaving) for each in models):
        if len(caches[1]) != (n := len(make_prompt_cache(draft_model))):
            raise ModelError(
                "[draft] expected prompt_cache to have the caches of both models, "
                f"{n} more for the draft, but got {len(caches[1])}: leave it out"
            )
        pairs = zip(models, caches, strict=True)
        models = tuple(_helped(*pair, **options) for pair in pairs)
    helped = [each for each in models if isinstance(each, GoesBack)]
    for each in helped:
        caches[models.index(each)] = each.layers
    options["prompt_cache"] = [*caches[0], *caches[1]]
    try:
        yield from _STOCK(prompt, models[0], models[1], stream, **options)
    finally:
        # Caches made here are discarded, so only the caller's need to be complete.
        if given is not None:
            with mx.stream(stream):
                for each in helped:
                    each.settle()


def _helped(
    model: Any,
    cache: list[Any],
    *,
    num_draft_tokens: int = DRAFT_TOKENS,
    kv_bits: int | None = None,
    **_: Any,
) -> Any:
    """Return a stand-in for a model whose caches cannot be trimmed, else the model.

    Raises:
        ModelError: the caches cannot be restored either.
    """
    if always_trim(cache):
        return model
    if not are_known(cache):
        kinds = sorted({type(one).__name__ for one in single_caches(cache)})
        raise ModelError(
            f"[draft] expected caches that can go back but got {', '.join(kinds)}: "
            "generate without a draft model"
        )
    if kv_bits is not None:
        raise ModelError(
            "[draft] expected unquantised keys and values, for a model whose caches "
            "cannot be trimmed, but got kv_bits: leave it out"
        )
    return GoesBack(model, cache, max(1, num_draft_tokens))


def let_all_draft() -> None:
    """Extend mlx-lm's speculative decoding to caches that cannot be trimmed."""
    put_everywhere("speculative_generate_step", _STOCK, _speculative_generate_step)
