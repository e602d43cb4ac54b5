"""Find by measuring how many experts in memory make decoding the fastest.

The most are not always the best: the pool's memory is lost to the system's page cache
and to everything else on the machine.
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

# Shares of the most slots that memory has room for, and the time given to each.
SHARES = (1.0, 0.75, 0.5, 0.25)
SECONDS_EACH = 2.0
MIN_TOKENS = 8
# A smaller pool must be this much faster: the rest is of use to others, but a
# larger one will do better once it has seen more tokens.
GAIN = 1.03


@dataclass(frozen=True)
class Trial:
    """Median decoding speed with ``n_slots`` experts in memory."""

    n_slots: int
    expert_bytes: int
    tokens_per_second: float
    hit_rate: float


def find_fastest(
    model: nn.Module, keeper: MemoryKeeper | None, streamer: Any, prompt: list[int]
) -> str:
    """Try decoding with fewer and fewer experts, keep the best number and say it.

    Raises:
        ConfigError: the model's experts do not come from a streamer under a budget.
    """
    if keeper is None or streamer is None:
        raise ConfigError('[memory] expected experts to stream for "auto" but got none')
    most, least = streamer.n_slots, streamer.least_slots
    sizes = {max(least, int(most * share)) for share in SHARES}
    tokens = _greedy(model, prompt)
    trials = []
    # As mlx-lm generates, which then holds all of MLX's buffers resident on a Mac.
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
    """Return the fastest of trials by falling size; the larger one of near equals."""
    best = trials[0]
    for trial in trials[1:]:
        if trial.tokens_per_second > GAIN * best.tokens_per_second:
            best = trial
    return best


def _greedy(model: nn.Module, prompt: list[int]) -> Iterator[int]:
    """Yield tokens without end; a text begins anew where it has become long."""
    while True:
        cache = make_prompt_cache(model)
        for token, _ in generate_step(
            mx.array(prompt), model, max_tokens=256, prompt_cache=cache
        ):
            yield int(token)


def _try(streamer: Any, tokens: Iterator[int]) -> Trial:
    """Decode until the pool has warmed up for half of the time, then measure."""
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
