"""``moeflux inspect``: a model's parts and its memory."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.filesize import decimal
from rich.table import Table

from ..errors import ConfigError
from ..experts.files.checkpoint import read_config
from ..experts.files.stock import has_own_class
from ..experts.pool.budget import Amounts
from ..loading import find_model, plan_load
from ..memory.forecast import Forecast
from ..opening.headers import model_headers
from ..system.terminal import PlainConsole
from .arguments import integer
from .inspect_graph import report, report_table
from .inspect_summary import ModelSummary, summarize
from .preflight import advice, forecast

__all__ = ["ModelSummary", "summarize"]


def add_parser(subparsers: Any) -> None:
    """Add ``inspect`` with its flags."""
    text = "show a model's layers, experts and memory"
    parser = subparsers.add_parser("inspect", description=text, help=text)
    parser.add_argument(
        "model",
        help="plain or packed model directory, or hub id (only headers are read)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    graph = "show the Ops of one layer with their costs and planned memory"
    parser.add_argument("--graph", type=int, metavar="LAYER", help=graph)
    tokens = "number of tokens in the layer's graph (default: 512)"
    parser.add_argument("--tokens", type=integer(1, 1 << 20), default=512, help=tokens)
    memory = "show the memory plan of a process of this size"
    parser.add_argument("--memory", metavar="BYTES", help=memory)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the summary of ``args.model``, its memory plan, or one layer's graph."""
    if args.graph is not None:
        return _run_graph(args)
    amounts = Amounts.read(args.memory, None)
    with model_headers(args.model) as path:
        if not (path / "config.json").exists():
            # Raises the error that explains a missing model.
            find_model(path)
        summary = summarize(path)
        plan = None if args.memory is None else plan_load(path, args.memory)
        found = forecast(path, summary, amounts, plan)
    if args.json:
        planned = {} if plan is None else {"plan": asdict(plan)}
        fields = {**asdict(summary), "forecast": _as_json(found), **planned}
        print(json.dumps(fields, indent=2))
    else:
        PlainConsole().print(summary_table(args.model, summary, found))
        if plan is not None:
            print(plan)
    return 0


def _run_graph(args: argparse.Namespace) -> int:
    path = find_model(args.model)
    summary = summarize(path)
    if not has_own_class(read_config(path)):
        raise ConfigError(
            f"[inspect] expected a native class for --graph but {args.model} "
            f"is a {summary.model_type}, which mlx-lm's class runs: omit --graph"
        )
    memory = summary.minimum_bytes if summary.is_packed else None
    graph = report(path, memory, args.graph, args.tokens)
    if args.json:
        print(json.dumps(asdict(graph), indent=2))
    else:
        print(graph.dump)
        PlainConsole().print(report_table(graph))
    return 0


def _as_json(found: Forecast) -> dict[str, Any]:
    return {
        **asdict(found),
        "fits": found.fits,
        "token_seconds": found.token_seconds,
        "first_token_seconds": found.first_token_seconds,
    }


def summary_table(
    model: str | Path, summary: ModelSummary, found: Forecast | None = None
) -> Table:
    """Return a table of the summary, and of a forecast if there is one."""
    table = Table(str(model), summary.model_type)
    kinds = ", ".join(f"{n} {kind}" for kind, n in summary.layers.items())
    table.add_row("layers", kinds)
    table.add_row(
        "experts",
        f"{summary.n_experts} in each of {summary.n_moe_layers} layers, "
        f"{'?' if summary.top_k is None else summary.top_k} per token",
    )
    table.add_section()
    table.add_row("resident", decimal(summary.resident_bytes))
    table.add_row("experts", decimal(summary.expert_bytes))
    forms = sorted(summary.forms.items(), key=lambda item: -item[1])
    table.add_row("stored as", ", ".join(f"{form} ({n} x)" for form, n in forms))
    table.add_row("one expert", decimal(summary.bytes_per_expert))
    table.add_row("reads per expert", _reads(summary))
    if summary.token_bytes is not None:
        n_reads = (
            "" if summary.token_reads is None else f"{summary.token_reads} reads, "
        )
        table.add_row("one token, cold", n_reads + decimal(summary.token_bytes))
    table.add_row("least expert memory", _rounded_up(summary.minimum_bytes))
    table.add_row("memory for all experts", _rounded_up(summary.full_bytes))
    table.add_row("mapped", _mapped(summary))
    if found is not None:
        table.add_section()
        for name, value in _forecast_rows(found):
            table.add_row(name, value)
    table.add_section()
    for name, sizes in _grouped(summary.files).items():
        n_files = f" in {len(sizes)} files" if len(sizes) > 1 else ""
        table.add_row(name, decimal(sum(sizes)) + n_files)
    return table


def _forecast_rows(found: Forecast) -> list[tuple[str, str]]:
    rows = [("memory here", found.mode())]
    if not found.fits and not found.streams:
        return [*rows, ("to run it here", advice(found))]
    return [*rows, ("speed", found.speed()), ("first token", found.first_token())]


def _reads(summary: ModelSummary) -> str:
    if summary.reads_per_expert is None:
        return "none: experts must be packed to be streamed (1 once packed)"
    found = f"{summary.reads_per_expert:.3g}"
    return found if summary.is_packed else f"{found} (1 once packed)"


def _mapped(summary: ModelSummary) -> str:
    """Describe whether the experts' files can be mapped, and their size."""
    if not summary.all_fit:
        return "no: larger than the default share of this machine's memory"
    pages = f"{decimal(summary.expert_bytes)} of page cache, no slots"
    where = "by default on Metal, else with --expert-io mmap"
    found = f"{pages}; {where}"
    return found if summary.is_packed else f"once packed: {found}"


def _grouped(files: dict[str, int]) -> dict[str, list[int]]:
    """Group the sizes of files whose names differ only in numbers."""
    groups: dict[str, list[int]] = {}
    for name, n_bytes in files.items():
        groups.setdefault(re.sub(r"\d+", "*", name), []).append(n_bytes)
    return groups


def _rounded_up(n_bytes: int) -> str:
    # Round up, because a minimum that is rounded down would be refused as --memory.
    unit = 1000 ** ((len(str(n_bytes)) - 1) // 3)
    step = max(1, unit // 10)
    return decimal(-(-n_bytes // step) * step)
