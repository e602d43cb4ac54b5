"""The measurements of one side: speed, memory, logits and perplexity."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from ...loading import load
from .layers import layer_rows
from .reference import load_stock

# The logits of one piece stay below 130 MB, with a vocabulary of 248,000.
PIECE_TOKENS = 128
# Perplexity is scored in separate windows of this many tokens, as in mlx_lm.perplexity.
WINDOW_TOKENS = 512


@dataclass(frozen=True)
class Job:
    """One side's job; ``forced`` are stock's tokens, which our side must follow."""

    side: str
    path: str
    prompt: list[int]
    text: list[int]
    max_tokens: int
    dtype: str
    forced: list[int] | None = None
    options: dict[str, Any] = field(default_factory=dict)


def measure(job: Job, path: Path) -> None:
    """Load and run one side; write ``path`` as .npz, .logits and .layers.npz."""
    model = _load(job)
    # Warm up: one-time costs are not part of the speed.
    greedy(model, job.prompt[:1], 2)
    streamer = getattr(model, "streamer", None)
    if streamer is not None:
        streamer.stats.reset()
    tokens, prompt_tps, generation_tps = greedy(model, job.prompt, job.max_tokens)
    found: dict[str, Any] = {
        "tokens": tokens,
        "prompt_tps": prompt_tps,
        "generation_tps": generation_tps,
        "peak_process_bytes": peak_process_bytes(),
        "peak_mlx_bytes": mx.get_peak_memory(),
    }
    if hasattr(model, "runtime"):
        found["executor"] = model.runtime.executor.name
    if streamer is not None:
        counters = streamer.stats.total
        found["expert_hit_rate"] = counters.hit_rate
        found["expert_read_bytes"] = counters.read_bytes
    with path.with_suffix(".logits").open("wb") as file:
        found["n_vocabulary"] = _force(model, job.prompt, job.forced or tokens, file)
    if job.text:
        found["perplexity"] = perplexity(model, job.text)
    np.savez(path.with_suffix(".layers.npz"), *layer_rows(model, job.prompt))
    np.savez(path.with_suffix(".npz"), **found)


def _load(job: Job) -> nn.Module:
    if job.side == "stock":
        model = load_stock(job.path)
    else:
        model = load(job.path, **job.options)[0]
    if job.dtype == "float32":
        _cast(model)
    return model


def _cast(model: nn.Module) -> None:
    """Cast a model's parameters to float32; streamed experts keep their type."""
    cast = [
        (name, array.astype(mx.float32))
        for name, array in dict(tree_flatten(model.parameters())).items()
        if mx.issubdtype(array.dtype, mx.floating)
    ]
    model.load_weights(cast, strict=False)


def greedy(
    model: nn.Module, prompt: Sequence[int], max_tokens: int
) -> tuple[list[int], float, float]:
    """Return ``(tokens, prompt tokens/s, generated tokens/s)``; ignore end tokens.

    The first token counts to the prompt's time, so a single token has speed 0.
    """
    tokens, times = [], [time.perf_counter()]
    for token, _ in generate_step(mx.array(list(prompt)), model, max_tokens=max_tokens):
        tokens.append(int(token))
        times.append(time.perf_counter())
    generating = times[-1] - times[1]
    speed = (len(tokens) - 1) / generating if generating else 0.0
    return tokens, len(prompt) / (times[1] - times[0]), speed


def _force(
    model: nn.Module, prompt: list[int], continuation: list[int], file: BinaryIO
) -> int:
    """Write the logits of every position, computed as in generation; return V."""
    pieces = [prompt[i : i + PIECE_TOKENS] for i in range(0, len(prompt), PIECE_TOKENS)]
    pieces += [[token] for token in continuation[:-1]]
    for logits in _logits(model, pieces):
        np.array(logits).tofile(file)
    return int(logits.shape[-1])


def _logits(model: nn.Module, pieces: list[list[int]]) -> Iterator[mx.array]:
    """Yield float32 logits ``[T, V]`` of each piece of one sequence."""
    cache = make_prompt_cache(model)
    for piece in pieces:
        logits = model(mx.array([piece]), cache=cache)[0].astype(mx.float32)
        mx.eval(logits, [c.state for c in cache])
        yield logits


def perplexity(model: nn.Module, tokens: Sequence[int]) -> float:
    """Return exp of the mean negative log-likelihood of ``tokens``.

    Windows of ``WINDOW_TOKENS`` are scored separately, without their first token.
    """
    total, n_scored = 0.0, 0
    for start in range(0, len(tokens) - 1, WINDOW_TOKENS):
        window = list(tokens[start : start + WINDOW_TOKENS])
        total += log_likelihood(model, window)
        n_scored += len(window) - 1
    return float(np.exp(-total / n_scored))


def log_likelihood(model: nn.Module, tokens: list[int]) -> float:
    """Return the sum of log-probabilities (nats) of all tokens after the first."""
    starts = range(0, len(tokens) - 1, PIECE_TOKENS)
    pieces = [tokens[:-1][i : i + PIECE_TOKENS] for i in starts]
    total = 0.0
    for start, logits in zip(starts, _logits(model, pieces), strict=True):
        targets = mx.array(tokens[start + 1 : start + 1 + len(logits)])
        chosen = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        total += float((chosen - mx.logsumexp(logits, axis=-1)).sum())
    return total


def peak_process_bytes() -> int:
    """Return the process's peak resident memory in bytes."""
    try:
        # Prefer this to ru_maxrss, which starts at the parent process's size.
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024  # type: ignore[index]
    except (OSError, TypeError):
        import resource

        # Linux counts in KiB, macOS in bytes.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
