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

from ..experts.stats import Counters


def generate_and_print(
    model: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    *,
    with_table: bool = True,
    **options: Any,
) -> None:
    """Print a continuation of ``prompt`` as it comes, then the table of its cost.

    Args:
        prompt: Token ids.
        with_table: Print the table too.
        options: Passed on to ``mlx_lm.stream_generate``.
    """
    for response in stream_generate(model, tokenizer, list(prompt), **options):
        sys.stdout.write(response.text)
        sys.stdout.flush()
    print()
    if with_table:
        streamer = getattr(model, "streamer", None)
        experts = None if streamer is None else streamer.stats.total
        Console().print(cost_table(response, experts))


def cost_table(last: GenerationResponse, experts: Counters | None) -> Table:
    """Lay out speed, expert cache and memory after a generation's ``last`` response.

    ``experts`` counts from loading on; None when no expert is streamed.
    """
    table = Table("", "tokens", "tokens/s")
    table.add_row("prompt", str(last.prompt_tokens), f"{last.prompt_tps:.1f}")
    table.add_row(
        "generation", str(last.generation_tokens), f"{last.generation_tps:.1f}"
    )
    table.add_section()
    for name, value in _cost_rows(last, experts):
        table.add_row(name, value)
    return table


def _cost_rows(
    last: GenerationResponse, experts: Counters | None
) -> list[tuple[str, str]]:
    if experts is None:
        rows = [("experts", "all in memory")]
    else:
        rows = [
            ("expert cache hits", f"{experts.hit_rate:.1%}"),
            ("bytes read", decimal(experts.read_bytes)),
        ]
    return [
        *rows,
        ("peak memory of MLX", decimal(round(last.peak_memory * 1e9))),
        ("peak memory of the process", decimal(_peak_process_bytes())),
    ]


def _peak_process_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return peak if sys.platform == "darwin" else peak * 1024
