"""One measurement of scripts/bench_mac, in its own process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler

import moeflux_mlx
from moeflux_mlx.measure.compare import load_stock, peak_process_bytes

# Small models repeat themselves under greedy decoding.
TEMPERATURE = 0.7
# Length of the runs by which a text is judged, and its minimum length.
RUN_TOKENS = 4
LEAST_TOKENS = 32
# Maximum share of runs that occurred before in the text, and maximum number of
# repetitions at its end.
MOST_REPEATED = 0.5
MOST_TIMES = 4
# Share of its time during which a process may start another text.
BUSY_SHARE = 0.8


@dataclass(frozen=True)
class Way:
    """The task of a process: ``stock``, or ours with bytes for experts (None: all).

    It continues ``prompts`` in turn, as long as ``seconds`` allow.
    """

    name: str
    model: str
    is_stock: bool
    expert_memory: int | None
    prompts: list[list[int]]
    n_tokens: int
    seconds: float


def loops(tokens: Sequence[int]) -> str | None:
    """Describe how a text repeats itself; None if it does not.

    It does if most of its runs of ``RUN_TOKENS`` occurred before, or if it ends with
    the same tokens more than ``MOST_TIMES`` times, ``LEAST_TOKENS`` in all.
    """
    runs = [tuple(tokens[i : i + RUN_TOKENS]) for i in range(len(tokens) - 3)]
    repeated = 1 - len(set(runs)) / len(runs) if runs else 0.0
    if repeated > MOST_REPEATED:
        return f"{repeated:.0%} of its runs of {RUN_TOKENS} tokens stood there before"
    for period in range(1, len(tokens) // MOST_TIMES + 1):
        same = 0
        while same < len(tokens) - period and (
            tokens[-1 - same] == tokens[-1 - same - period]
        ):
            same += 1
        length = same + period
        if length >= max(LEAST_TOKENS, (MOST_TIMES + 1) * period):
            return f"its last {length} tokens are {period} again and again"
    return None


def measure(way: Way) -> dict[str, Any]:
    """Load the model, generate from each prompt while there is time, and count."""
    start = time.monotonic()
    if way.is_stock:
        model = load_stock(way.model)
    else:
        model = moeflux_mlx.load(way.model, expert_memory=way.expert_memory)[0]
    # Warm up first, because one-time work must not count as speed.
    generate(model, way.prompts[0][:1], 2, start + way.seconds)
    loaded = time.monotonic() - start
    streamer = getattr(model, "streamer", None)
    runs: list[dict[str, Any]] = []
    for seed, prompt in enumerate(way.prompts):
        began = time.monotonic()
        mx.random.seed(seed)
        runs.append(generate(model, prompt, way.n_tokens, start + way.seconds))
        again = 2 * time.monotonic() - began
        if again > start + BUSY_SHARE * way.seconds:
            break
    runtime = getattr(model, "runtime", None)
    return {
        "load_seconds": loaded,
        "runs": runs,
        "model_class": type(model).__module__,
        "executor": runtime.executor.name if runtime is not None else "mlx-lm",
        "expert_bytes": getattr(streamer, "memory_bytes", None),
        "experts_held": getattr(streamer, "n_slots", None),
        "peak_process_bytes": peak_process_bytes(),
        "peak_mlx_bytes": mx.get_peak_memory(),
    }


def generate(
    model: Any, prompt: list[int], n_tokens: int, end: float
) -> dict[str, Any]:
    """Generate past any end of text, until the time ``end``."""
    streamer = getattr(model, "streamer", None)
    steps = generate_step(
        mx.array(prompt),
        model,
        max_tokens=n_tokens,
        sampler=make_sampler(TEMPERATURE),
        prompt_cache=make_prompt_cache(model),
    )
    start, tokens = time.perf_counter(), [int(next(steps)[0])]
    first, counts = time.perf_counter(), _counts(streamer)
    for token, _ in steps:
        tokens.append(int(token))
        if time.monotonic() > end:
            break
    seconds = time.perf_counter() - first
    hits, misses, read = (b - a for a, b in zip(counts, _counts(streamer), strict=True))
    return {
        "tokens": tokens,
        "first_token_seconds": first - start,
        "tokens_per_second": (len(tokens) - 1) / seconds if len(tokens) > 1 else None,
        "hits": hits,
        "misses": misses,
        "read_bytes": read,
    }


def _counts(streamer: Any) -> tuple[int, int, int]:
    if streamer is None:
        return 0, 0, 0
    total = streamer.stats.total
    return total.hits, total.misses, total.read_bytes
