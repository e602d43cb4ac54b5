"""``moeflux kernels``: list kernels with signature, launch and verification."""

from __future__ import annotations

import argparse
import json
from typing import Any

import mlx.core as mx
from rich.table import Table

from .. import config
from ..engine.executors import gpu_executor
from ..engine.executors.verified import Record, records
from ..engine.launch import KERNELS, Kernel, Launch, prepare
from ..engine.lowering import FUSIONS, WAYS, launched_by
from ..engine.lowering.tuned import Tuning, current
from ..engine.metal import Scalar
from ..system.terminal import WIDE, PlainConsole

# The user of a kernel that no Op is lowered to.
LIBRARY = "scripts (no Op)"
# The columns of a table that has to fit into 80 characters.
NARROW = ("kernel", "launch", "verified")


def add_parser(subparsers: Any) -> None:
    """Add ``kernels`` with its options."""
    text = "list all kernels, the Ops that launch them, and where they were verified"
    parser = subparsers.add_parser("kernels", description=text, help=text)
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    parser.add_argument(
        "--lowering", action="store_true", help="list the ways of every Op"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the table of kernels, or of lowerings."""
    if args.lowering:
        rows = lowering_rows(tuning_in_force())
    else:
        known = records()
        rows = [describe(kernel, known) for kernel in KERNELS.values()]
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        console = PlainConsole()
        console.print(_table(rows, console.width))
    return 0


def tuning_in_force() -> Tuning | None:
    """Return the tuning of the executor that runs our kernels here."""
    executor = config.executor_name() or gpu_executor()
    return current(executor) if executor else None


def lowering_rows(tuning: Tuning | None) -> list[dict[str, Any]]:
    """Return a row for each Op and fusion: its ways, and the choices of tuning."""
    names = {op.__name__: [way.name for way in ways] for op, ways in WAYS.items()}
    rows = [
        {"op": op, "ways": ways, "tuned": _tuned(op, tuning)}
        for op, ways in names.items()
    ]
    for group in FUSIONS:
        ops = " + ".join(op.__name__ for op in group.types)
        tuned = _tuned(group.name, tuning)
        rows.append({"op": ops, "ways": [group.name], "tuned": tuned})
    return rows


def _tuned(name: str, tuning: Tuning | None) -> list[str]:
    """Describe the cases in which a way was faster than the default."""
    return [
        f"{e.winner}: {e.n_tokens} tokens, {e.shape}"
        for e in (tuning.entries if tuning else ())
        if e.name == name and e.winner != e.default
    ]


def describe(kernel: Kernel, known: list[Record]) -> dict[str, Any]:
    """Return a kernel's row: its signature, and one launch as an example."""
    metal = kernel.metal
    launch = kernel(*kernel.arguments(kernel.dtypes[0], **kernel.sizes[-1]))
    values = prepare(launch).instance.values
    types = {name: v for name, v in values.items() if isinstance(v, mx.Dtype)}
    return {
        "family": kernel.family,
        "kernel": kernel.name,
        "inputs": [
            f"{p.type}& {p.name}" if isinstance(p, Scalar) else f"{p.type} {p.name}"
            for p in metal.inputs
        ],
        "outputs": [f"{p.type} {p.name}" for p in metal.outputs],
        "template": [f"{p.kind} {p.name}" for p in metal.template],
        "threadgroup_bytes": metal.threadgroup_bytes(launch.template, types),
        "launch": _launch(launch),
        "launched_by": launched_by(kernel.name) or [LIBRARY],
        "verified": _verified(kernel.name, known),
    }


def _launch(launch: Launch) -> str:
    grid = "x".join(map(str, launch.grid))
    group = "x".join(str(n) for n in launch.threadgroup)
    return f"{grid} / {group}"


def _verified(name: str, known: list[Record]) -> list[str]:
    return [
        f"{record.executor}: {record.machine}, {record.date}"
        for record in known
        if record.holds(name)
    ]


def _table(rows: list[dict[str, Any]], width: int) -> Table:
    """Return a table of the rows, without signatures on a narrow terminal."""
    narrow = width < WIDE and "kernel" in rows[0]
    names = NARROW if narrow else tuple(rows[0])
    caption = "wider terminals, and --json, show signatures too" if narrow else None
    table = Table(show_lines=True, caption=caption)
    for name in names:
        # A kernel's name must stay whole to be usable.
        table.add_column(name.replace("_", " "), no_wrap=name == "kernel")
    for row in rows:
        cells = (
            [*map(str, v)] if isinstance(v, list) else [str(v)]
            for v in map(row.get, names)
        )
        table.add_row(*("\n".join(cell) for cell in cells))
    return table
