"""Find by measurement the pool size that makes decoding the fastest.

The largest pool is not always the best: its memory is missing from the system's page
cache and from other programs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step, wired_limit
from mlx_lm.models.cache import make_prompt_cache
from rich.filesize import decimal

from ..errors import ConfigError
from .keeper import MemoryKeeper

# The trials: shares of the largest possible pool, and seconds for each.
SHARES = (1.0, 0.75, 0.5, 0.25)
SECONDS_EACH = 2.0
MIN_TOKENS = 8
# A smaller pool must be faster by this factor: a larger one still improves as it sees
# more tokens.
GAIN = 1.03


@dataclass(frozen=True)
class Trial:
    """The median decoding speed with ``n_slots`` experts in memory."""

    n_slots: int
    expert_bytes: int
    tokens_per_second: float
    hit_rate: float


def find_fastest(
    model: nn.Module, keeper: MemoryKeeper | None, streamer: Any, prompt: list[int]
) -> str:
    """Decode with ever smaller pools, set the fastest size and return a summary.

    Raises:
        ConfigError: the model's experts are not streamed under a budget.
    """
    if keeper is None or streamer is None:
        raise ConfigError('[memory] expected experts to stream for "auto" but got none')
    most, least = streamer.n_slots, streamer.least_slots
    sizes = {max(least, int(most * share)) for share in SHARES}
    tokens = _greedy(model, prompt)
    trials = []
    # mlx-lm generates inside this too: on a Mac it keeps all of MLX's buffers resident.
    with wired_limit(model):
        for n_slots in sorted(sizes, reverse=True):
            keeper.limit(n_slots)
            trials.append(_try(streamer, tokens))
    best = choose(trials)
    keeper.limit(best.n_slots)
    tried = ", ".join(
        f"{t.tokens_per_second:.1f} tokens/s with {decimal(t.expert_bytes)} "
        f"({t.hit_rate:.0%} hits)"
        for t in trials
    )
    return f"memory auto: {tried}; experts get {decimal(best.expert_bytes)}"


def choose(trials: list[Trial]) -> Trial:
    """Return the fastest trial; the trials are in order of falling size."""
    best = trials[0]
    for trial in trials[1:]:
        if trial.tokens_per_second > GAIN * best.tokens_per_second:
            best = trial
    return best


def _greedy(model: nn.Module, prompt: list[int]) -> Iterator[int]:
    """Yield tokens without end; start a new text after 256 tokens."""
    while True:
        cache = make_prompt_cache(model)
        for token, _ in generate_step(
            mx.array(prompt), model, max_tokens=256, prompt_cache=cache
        ):
            yield int(token)


def _try(streamer: Any, tokens: Iterator[int]) -> Trial:
    """Warm the pool up for half of the time, then measure for the other half."""
    warm = time.perf_counter() + SECONDS_EACH / 2
    for n, _ in enumerate(tokens):
        if n >= MIN_TOKENS and time.perf_counter() > warm:
            break
    before = streamer.stats.total
    seconds: list[float] = []
    end = time.perf_counter() + SECONDS_EACH / 2
    while len(seconds) < MIN_TOKENS or time.perf_counter() < end:
        start = time.perf_counter()
        next(tokens)
        seconds.append(time.perf_counter() - start)
    after = streamer.stats.total
    hits, misses = after.hits - before.hits, after.misses - before.misses
    return Trial(
        streamer.n_slots,
        streamer.memory_bytes,
        1 / statistics.median(seconds),
        hits / max(1, hits + misses),
    )
