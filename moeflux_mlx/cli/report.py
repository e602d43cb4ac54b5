"""Generate text and say what it cost: the table of ``generate`` and the demo."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lm import stream_generate
from mlx_lm.generate import GenerationResponse
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table


@dataclass(frozen=True)
class ExpertReads:
    """What the expert cache did: experts found, experts read, bytes read."""

    n_hits: int
    n_misses: int
    n_bytes: int

    def since(self, earlier: ExpertReads) -> ExpertReads:
        """Return what happened after ``earlier`` was taken."""
        return ExpertReads(
            self.n_hits - earlier.n_hits,
            self.n_misses - earlier.n_misses,
            self.n_bytes - earlier.n_bytes,
        )

    @property
    def hit_rate(self) -> float:
        """Hits over look-ups, 1 when there were none."""
        n_lookups = self.n_hits + self.n_misses
        return self.n_hits / n_lookups if n_lookups else 1.0


def expert_reads(model: Any) -> ExpertReads | None:
    """Return a model's counts so far, None when no expert is streamed."""
    streamer = getattr(model, "streamer", None)
    if streamer is None:
        return None
    stats = streamer.snapshot()
    return ExpertReads(stats.hits, stats.misses, stats.bytes_read)


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
    before = expert_reads(model)
    for response in stream_generate(model, tokenizer, list(prompt), **options):
        sys.stdout.write(response.text)
        sys.stdout.flush()
    print()
    if with_table:
        after = expert_reads(model)
        reads = after.since(before) if after and before else None
        Console().print(cost_table(response, reads))


def cost_table(last: GenerationResponse, reads: ExpertReads | None) -> Table:
    """Lay out speed, expert cache and memory after a generation's ``last`` response."""
    table = Table("", "tokens", "tokens/s")
    table.add_row("prompt", str(last.prompt_tokens), f"{last.prompt_tps:.1f}")
    table.add_row(
        "generation", str(last.generation_tokens), f"{last.generation_tps:.1f}"
    )
    table.add_section()
    for name, value in _cost_rows(last, reads):
        table.add_row(name, value)
    return table


def _cost_rows(
    last: GenerationResponse, reads: ExpertReads | None
) -> list[tuple[str, str]]:
    if reads is None:
        experts = [("experts", "all in memory")]
    else:
        experts = [
            ("expert cache hits", f"{reads.hit_rate:.1%}"),
            ("bytes read", decimal(reads.n_bytes)),
        ]
    return [
        *experts,
        ("peak memory of MLX", decimal(round(last.peak_memory * 1e9))),
        ("peak memory of the process", decimal(_peak_process_bytes())),
    ]


def _peak_process_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return peak if sys.platform == "darwin" else peak * 1024
