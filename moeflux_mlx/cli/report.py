"""Generate text and say what it cost: the table of ``generate`` and the demo."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from typing import Any

from mlx_lm import stream_generate
from mlx_lm.generate import GenerationResponse
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from ..experts.streaming.mapped import MappedExperts
from ..experts.streaming.streamer import ExpertStreamer

WIDE = 140


def wide_console() -> Console:
    """Return a console for tables that would be unreadable in 80 columns."""
    return Console(width=max(WIDE, Console().width))


def generate_and_print(
    model: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    *,
    with_table: bool = True,
    **options: Any,
) -> list[int]:
    """Print a continuation of ``prompt`` as it comes, then the table of its cost.

    Args:
        prompt: Token ids.
        with_table: Print the table too.
        options: Passed on to ``mlx_lm.stream_generate``.

    Returns:
        The ids of the continuation.
    """
    tokens = []
    for response in stream_generate(model, tokenizer, list(prompt), **options):
        tokens.append(response.token)
        sys.stdout.write(response.text)
        sys.stdout.flush()
    print()
    if with_table:
        Console().print(cost_table(response, getattr(model, "streamer", None)))
    return tokens


def cost_table(
    last: GenerationResponse, streamer: ExpertStreamer | MappedExperts | None
) -> Table:
    """Lay out speed, expert cache and memory after a generation's ``last`` response.

    The expert cache is counted from loading on.
    """
    table = Table("", "tokens", "tokens/s")
    table.add_row("prompt", str(last.prompt_tokens), f"{last.prompt_tps:.1f}")
    table.add_row(
        "generation", str(last.generation_tokens), f"{last.generation_tps:.1f}"
    )
    table.add_section()
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
            ("bytes read ahead in vain", decimal(total.wasted_bytes)),
        ]
    return rows


def _peak_process_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return peak if sys.platform == "darwin" else peak * 1024
