"""``moeflux inspect``: what a model consists of and the memory it asks for."""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from ..errors import ConfigError
from ..experts.files.checkpoint import read_config, text_config
from ..experts.files.layout import ExpertLayout
from ..experts.files.packed import is_packed
from ..experts.files.stock import has_own_class
from ..experts.pool.pool import pool_bytes, pool_stride
from ..experts.pool.segments import full_bytes
from ..experts.streaming.access import slots_fit
from ..loading import plan_load
from .arguments import integer
from .inspect_experts import of_own_class, of_stock_class
from .inspect_graph import report, report_table


@dataclass(frozen=True)
class ModelSummary:
    """A model directory in numbers.

    ``layers`` counts layers by kind, ``n_moe_layers`` those with routed experts, or
    routed blocks where mlx-lm's class runs the model; ``n_experts`` is what the largest
    has. ``resident_bytes`` is everything that is used but routed experts;
    ``minimum_bytes`` and ``full_bytes`` are the least ``expert_memory`` that serves a
    token and the least that holds every expert. ``reads_per_expert`` is how many spans
    of bytes an expert lies in, the mean of all: 1 in a packed directory, None where
    only packing makes experts of the tensors. ``token_reads`` and ``token_bytes`` are
    what a token reads with no expert in memory, None where ``top_k`` is: nothing in
    the configuration says it.
    ``forms`` counts the experts' projections by how they are stored. ``all_fit`` tells
    whether all experts fit into the memory that is taken where none is asked for.
    """

    model_type: str
    is_packed: bool
    layers: dict[str, int]
    n_moe_layers: int
    n_experts: int
    top_k: int | None
    resident_bytes: int
    expert_bytes: int
    bytes_per_expert: int
    reads_per_expert: float | None
    token_reads: int | None
    token_bytes: int | None
    forms: dict[str, int]
    all_fit: bool
    minimum_bytes: int
    full_bytes: int
    files: dict[str, int]


def add_parser(subparsers: Any) -> None:
    """Add ``inspect`` with its flags."""
    text = "show layers, experts, and the memory a model asks for"
    parser = subparsers.add_parser("inspect", description=text, help=text)
    parser.add_argument("model", type=Path, help="plain or packed model directory")
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    graph = "show the Ops of one layer with their costs and planned memory"
    parser.add_argument("--graph", type=int, metavar="LAYER", help=graph)
    tokens = "tokens the layer's graph is built for (default: 512)"
    parser.add_argument("--tokens", type=integer(1, 1 << 20), default=512, help=tokens)
    memory = "show what the memory of a process of this size would go to"
    parser.add_argument("--memory", metavar="BYTES", help=memory)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the summary of ``args.model``, a plan of memory, or one layer's graph."""
    summary = summarize(args.model)
    if args.graph is not None:
        if not has_own_class(read_config(args.model)):
            raise ConfigError(
                f"[inspect] expected a class of our own for --graph but {args.model} "
                f"is a {summary.model_type}, which mlx-lm's class runs: leave it out"
            )
        memory = summary.minimum_bytes if summary.is_packed else None
        graph = report(args.model, memory, args.graph, args.tokens)
        if args.json:
            print(json.dumps(asdict(graph), indent=2))
        else:
            print(graph.dump)
            Console().print(report_table(graph))
        return 0
    plan = None if args.memory is None else plan_load(args.model, args.memory)
    if args.json:
        planned = {} if plan is None else {"plan": asdict(plan)}
        print(json.dumps({**asdict(summary), **planned}, indent=2))
    else:
        Console().print(summary_table(args.model, summary))
        if plan is not None:
            print(plan)
    return 0


def summarize(directory: Path) -> ModelSummary:
    """Count the layers, experts and bytes of a model directory; reads no weights.

    Raises:
        ModelError: not the directory of a Mixture-of-Experts model.
        ExpertStoreError: a packed directory with files missing or changed.
    """
    config = read_config(directory)
    own = has_own_class(config)
    found = of_own_class(directory) if own else of_stock_class(directory)
    layouts, reads, top_k = found.layouts, found.reads_per_expert, found.top_k
    record_bytes = sum(layout.record_bytes for layout in layouts)
    n_reads = None
    if reads is not None and top_k is not None:
        n_reads = round(top_k * len(layouts) * reads)
    return ModelSummary(
        model_type=str(config.get("model_type")),
        is_packed=is_packed(directory),
        layers=_layer_kinds(config, found.n_layers),
        n_moe_layers=len(layouts),
        n_experts=max(found.counts),
        top_k=top_k,
        resident_bytes=found.resident_bytes,
        reads_per_expert=reads,
        token_reads=n_reads,
        token_bytes=None if top_k is None else top_k * record_bytes,
        forms=dict(Counter(form for layout in layouts for form in _forms(layout))),
        all_fit=slots_fit(layouts, found.counts),
        files=_files(directory),
        expert_bytes=sum(
            n * layout.stride for n, layout in zip(found.counts, layouts, strict=True)
        ),
        bytes_per_expert=pool_stride(layouts),
        minimum_bytes=pool_bytes(layouts, found.n_least),
        full_bytes=full_bytes(found.counts, pool_stride(layouts)),
    )


def summary_table(directory: Path, summary: ModelSummary) -> Table:
    """Lay a summary out as two columns."""
    table = Table(str(directory), summary.model_type)
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
    table.add_section()
    for name, sizes in _grouped(summary.files).items():
        n_files = f" in {len(sizes)} files" if len(sizes) > 1 else ""
        table.add_row(name, decimal(sum(sizes)) + n_files)
    return table


def _reads(summary: ModelSummary) -> str:
    if summary.reads_per_expert is None:
        return "none: experts must be packed to be streamed (1 once packed)"
    found = f"{summary.reads_per_expert:.3g}"
    return found if summary.is_packed else f"{found} (1 once packed)"


def _mapped(summary: ModelSummary) -> str:
    """Say whether the files can serve as memory, and how much of it that is."""
    if not summary.all_fit:
        return "no: more than is taken of this machine's memory"
    pages = f"{decimal(summary.expert_bytes)} of page cache, no slots"
    where = "by itself on Metal, else with --expert-io mmap"
    found = f"{pages}; {where}"
    return found if summary.is_packed else f"once packed: {found}"


def _forms(layout: ExpertLayout) -> list[str]:
    """Say how each projection of a layer's experts is stored."""
    weights = [spec for spec in layout.tensors if spec.part == "weight"]
    return [
        spec.dtype if q is None else f"{q.mode} {q.bits} bits/{q.group_size}"
        for spec, q in zip(weights, layout.quantization, strict=True)
    ]


def _layer_kinds(config: dict, n_layers: int) -> dict[str, int]:
    text = text_config(config)
    kinds, interval = text.get("layer_types"), text.get("full_attention_interval")
    if not isinstance(kinds, list) or len(kinds) != n_layers:
        kinds = ["attention"] * n_layers
        if type(interval) is int and interval > 0:
            kinds = ["linear_attention"] * n_layers
            full = range(interval - 1, n_layers, interval)
            for layer in full:
                kinds[layer] = "full_attention"
    counts = Counter(map(str, kinds))
    return {kind.replace("_", " "): n for kind, n in counts.items()}


def _grouped(files: dict[str, int]) -> dict[str, list[int]]:
    """Put files whose names differ in numbers only under one name."""
    groups: dict[str, list[int]] = {}
    for name, n_bytes in files.items():
        groups.setdefault(re.sub(r"\d+", "*", name), []).append(n_bytes)
    return groups


def _rounded_up(n_bytes: int) -> str:
    # Rounded down, the least amount would be refused when given back as memory.
    unit = 1000 ** ((len(str(n_bytes)) - 1) // 3)
    step = max(1, unit // 10)
    return decimal(-(-n_bytes // step) * step)


def _files(directory: Path) -> dict[str, int]:
    paths = sorted(path for path in directory.iterdir() if path.is_file())
    return {path.name: path.stat().st_size for path in paths}
