"""Generate text and print its cost, for ``generate`` and the demo."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm import stream_generate
from mlx_lm.generate import GenerationResponse
from mlx_lm.models.cache import make_prompt_cache
from rich.filesize import decimal
from rich.table import Table

from ..experts.streaming.mapped import MappedExperts
from ..experts.streaming.streamer import ExpertStreamer
from ..system.progress import showing_prompts
from ..system.terminal import PlainConsole


def prepare(model: Any) -> float:
    """Run one token on a temporary cache, and return the seconds it took.

    A model's first call reads weights, arranges them and compiles kernels. The measured
    speed should not contain this time.
    """
    start = time.perf_counter()
    mx.eval(model(mx.array([[0]]), cache=make_prompt_cache(model)))
    return time.perf_counter() - start


def generate_and_print(
    model: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    *,
    preparation: float | None = None,
    **options: Any,
) -> list[int]:
    """Print a continuation of ``prompt`` as it appears, then the table of costs.

    Args:
        prompt: Token ids.
        preparation: Seconds that ``prepare`` took; if None, print no table.
        options: Passed to ``mlx_lm.stream_generate``.

    Returns:
        The ids of the continuation.
    """
    tokens = []
    with showing_prompts():
        for response in stream_generate(model, tokenizer, list(prompt), **options):
            tokens.append(response.token)
            sys.stdout.write(response.text)
            sys.stdout.flush()
    print()
    if preparation is not None:
        streamer = getattr(model, "streamer", None)
        group = vars(model).get("group")
        n_processes = 1 if group is None else group.size()
        PlainConsole().print(cost_table(response, preparation, streamer, n_processes))
    return tokens


def cost_table(
    last: GenerationResponse,
    preparation: float,
    streamer: ExpertStreamer | MappedExperts | None,
    n_processes: int = 1,
) -> Table:
    """Return a table of speed, expert cache and memory after the ``last`` response.

    The expert cache is counted since loading. In a process group, bytes and memory are
    those of rank 0.

    Args:
        preparation: seconds of the model's first call.
    """
    table = Table("", "tokens", "tokens/s")
    table.add_row("prompt", str(last.prompt_tokens), f"{last.prompt_tps:.1f}")
    table.add_row(
        "generation", str(last.generation_tokens), f"{last.generation_tps:.1f}"
    )
    table.add_section()
    table.add_row("first call, before the prompt", f"{preparation:.2f} s")
    if n_processes > 1:
        table.add_row("processes", f"{n_processes}, below: the first")
    for name, value in _expert_rows(streamer):
        table.add_row(name, value)
    table.add_section()
    table.add_row("peak memory of MLX", decimal(round(last.peak_memory * 1e9)))
    table.add_row("peak memory of the process", decimal(_peak_process_bytes()))
    return table


def _expert_rows(
    streamer: ExpertStreamer | MappedExperts | None,
) -> list[tuple[str, str]]:
    if streamer is None:
        return [("experts", "all in memory")]
    total = streamer.stats.total
    rows = [
        ("memory for experts", decimal(streamer.memory_bytes)),
        ("expert cache hits", f"{total.hit_rate:.1%}"),
        ("bytes read", decimal(total.read_bytes)),
    ]
    if total.read_ahead:
        rows += [
            ("missing experts read ahead", f"{total.recall:.1%}"),
            ("read ahead and used", f"{total.precision:.1%}"),
            ("bytes read ahead and not used", decimal(total.wasted_bytes)),
        ]
    return rows


def _peak_process_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return peak if sys.platform == "darwin" else peak * 1024
