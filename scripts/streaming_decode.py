"""``scripts/bench_streaming decode``: decode with part of the experts in memory.

A random model has a few layers of a published geometry. It follows a Zipf-like routing
trace and a recorded one (see ``streaming_model.py``). Each share of experts in memory
is measured for moeflux-mlx and for mlx-vlm's ``moe_offload``, beside the same engine
with all experts in memory, and beside stock mlx-lm. "Cold" means that the page cache is
dropped before each token, "warm" that the token's experts are read into it.

Each side has its own process, and sides take turns token by token. A speed is printed
only if the logits of every token agree: those of moeflux-mlx bit by bit at every share,
those of all sides with stock's within a tolerance. The results for a share are printed
and written before the next share begins.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np
from bench_geometry import GEOMETRIES
from rich.console import Console
from rich.progress import track
from rich.table import Table
from streaming_files import can_drop, disk_bytes_per_s, sync
from streaming_model import DOOR_GEOMETRIES, TracedModel, make_model
from streaming_side import (
    STATES,
    Plan,
    Side,
    Step,
    follow,
    has_mlx_vlm,
    open_follower,
    repacked,
)

from moeflux_mlx.device import machine_name
from moeflux_mlx.experts.files.packed import PackedExperts
from moeflux_mlx.experts.pool.stats import Counters

# Relative RMS of logits from stock's, by the type of activations.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}
# The ratios that streaming is meant to reach.
AIM_OF_MLX_VLM, AIM_OF_DISK, AIM_OF_RESIDENT = 1 / 3, 1.25, 1.03
# The same for models of mlx-lm's class.
AIM_OF_RESIDENT_DOOR = 1.05
# Records that one measurement of the disk's speed reads, and timed tokens between two
# such measurements.
DISK_READS, STEPS_PER_DISK_SAMPLE = 64, 4
# Bytes of one such read from a plain checkpoint: about a matrix of an expert.
PLAIN_READ_BYTES = 1 << 20
PROGRESS = Console(stderr=True)
# Steps of the traces that a model is made for. Shorter runs can use the same model.
TRACE_STEPS = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this part."""
    add = parser.add_argument
    add("--directory", type=Path, help="where the model is kept (default: nowhere)")
    choices = [*GEOMETRIES, *DOOR_GEOMETRIES]
    add("--geometry", choices=choices, default="qwen3.6-35b-a3b")
    add("--layers", type=int, default=8, metavar="N")
    shares = [100.0, 50.0, 25.0, 12.5]
    text = "percentages of experts in memory (default: 100 50 25 12.5)"
    add("--shares", type=float, nargs="+", default=shares, metavar="P", help=text)
    traces = ("zipf", "recorded")
    add("--traces", nargs="+", choices=traces, default=traces)
    add("--warm-up", type=int, default=48, metavar="N", help="untimed tokens")
    text = "tokens of a trace that are timed cold, and as many warm (default: 24)"
    add("--tokens", type=int, default=24, metavar="N", help=text)
    device = "gpu" if mx.metal.is_available() or mx.cuda.is_available() else "cpu"
    add("--device", choices=("cpu", "gpu"), default=device)
    add("--executor", help="of ours (default: as in moeflux_mlx.load)")
    add("--policy", help="of eviction, likewise")
    choices = ("auto", "on", "off")
    add("--read-ahead", choices=choices, default="auto", help="of ours")
    add("--optimistic", choices=choices, help="of ours, where mlx-lm's class runs")
    text = "ours reads the plain checkpoint, where mlx-lm's class runs"
    add("--unpacked", action="store_true", help=text)
    add("--without-mlx-vlm", action="store_true", help="leave it out")
    add("--csv", type=Path, help="also write the rows to this file")


def run(args: argparse.Namespace) -> int:
    """Make the model, measure all sides in turns, check the logits and print."""
    if args.directory:
        return _run(args, args.directory)
    with tempfile.TemporaryDirectory(prefix="moeflux-bench-") as directory:
        return _run(args, Path(directory))


def _run(args: argparse.Namespace, directory: Path) -> int:
    console = Console(highlight=False, width=160)
    states = STATES if can_drop() else STATES[1:]
    plan = Plan(
        tuple(args.traces),
        args.warm_up,
        args.tokens,
        states,
        args.device,
        args.executor,
        args.policy,
        args.read_ahead,
        args.optimistic,
        args.unpacked,
    )
    for what in left_out(args):
        console.print(f"Left out: {what}")
    dtype = mx.float32 if args.device == "cpu" else mx.bfloat16
    n_steps = max(TRACE_STEPS, plan.n_steps)
    traced = make_model(directory, args.geometry, args.layers, dtype, n_steps)
    tolerance = TOLERANCES[str(dtype).removeprefix("mlx.core.")]
    runs: list[Run] = []
    rows: list[dict[str, Any]] = []
    for sides in groups(args, has_mlx_vlm() and not args.without_mlx_vlm):
        runs.append(measure(sides, traced, plan))
        if wrong := disagreement(runs, tolerance):
            print(f"bench_streaming: no speeds, {wrong}", file=sys.stderr)
            return 1
        cells = ((trace, state) for trace in plan.traces for state in plan.states)
        new = [row for cell in cells for row in summarize(runs[-1], plan, *cell)]
        print_rows(new, console)
        rows += new
        if args.csv:
            _write_csv(rows, args)
    report_aims(rows, runs, console, args)
    return 0


def left_out(args: argparse.Namespace) -> Iterator[str]:
    """Yield the sides and states that are not measured here, with the reason."""
    if not can_drop():
        yield "cold; this system cannot drop pages from its cache."
    if args.without_mlx_vlm:
        yield "mlx-vlm, as requested."
    elif not has_mlx_vlm():
        yield "mlx-vlm, which is not installed: pip install mlx-vlm"


def groups(args: argparse.Namespace, with_mlx_vlm: bool) -> Iterator[list[Side]]:
    """Yield the sides that are measured together, for each share of experts.

    Only their models are in memory at the same time. mlx-vlm has no side with a share
    of 100 %, because its resident side is that. Stock joins the largest share.
    """
    for i, share in enumerate(sorted(args.shares, reverse=True)):
        sides = [Side("mlx-lm")] if i == 0 else []
        sides += [Side("ours"), Side("ours", share)]
        if with_mlx_vlm and share < 100:
            sides += [Side("mlx-vlm"), Side("mlx-vlm", share)]
        yield sides


@dataclass
class Run:
    """The steps of sides measured together, and the disk's speed meanwhile."""

    steps: dict[Side, dict[str, list[Step]]]
    disk_bytes_per_s: list[float]


def measure(sides: list[Side], traced: TracedModel, plan: Plan) -> Run:
    """Let the sides follow the traces token by token, each in its own process.

    The first side changes from token to token.
    """
    if any(side.engine == "mlx-vlm" for side in sides):
        repacked(traced)
    sync(path for path in traced.plain.parent.rglob("*") if path.is_file())
    run = Run({side: {trace: [] for trace in plan.traces} for side in sides}, [])
    names = "; ".join(side.name for side in sides)
    with ExitStack() as stack:
        workers = {
            side: stack.enter_context(ProcessPoolExecutor(1, get_context("spawn")))
            for side in sides
        }
        # All load at the same time. Do not pass the traces to an initializer: each
        # process would then start only after the previous one has imported MLX.
        for opened in [
            worker.submit(open_follower, side, traced, plan)
            for side, worker in workers.items()
        ]:
            opened.result()
        for trace in plan.traces:
            for i in track(range(plan.n_steps), f"{trace}: {names}", console=PROGRESS):
                if plan.is_timed(i) and i % STEPS_PER_DISK_SAMPLE == 0:
                    run.disk_bytes_per_s.append(_disk_sample(traced, plan))
                first = i % len(sides)
                for side in sides[first:] + sides[:first]:
                    step = workers[side].submit(follow, trace, i).result()
                    run.steps[side][trace].append(step)
    return run


def _disk_sample(traced: TracedModel, plan: Plan) -> float:
    if plan.unpacked and not traced.native:
        paths = sorted(traced.plain.glob("*.safetensors"))[1:]
        return disk_bytes_per_s(paths, PLAIN_READ_BYTES, DISK_READS)
    with PackedExperts.open(traced.packed) as store:
        paths = [store.path(layer) for layer in store.layers]
        record_bytes = store.layout(store.layers[0]).record_bytes
    return disk_bytes_per_s(paths, record_bytes, DISK_READS)


def disagreement(runs: list[Run], tolerance: float) -> str | None:
    """Return a sentence about the first wrong logits; None if there are none.

    Those of moeflux-mlx must have the same bits at every share, and all must be close
    to stock's.
    """
    stock = runs[0].steps[Side("mlx-lm")]
    same: dict[str, np.ndarray] = {}
    for run in runs:
        for side, traces in run.steps.items():
            for trace, steps in traces.items():
                logits, wanted = _logits(steps), _logits(stock[trace])
                off = np.linalg.norm(logits - wanted, axis=-1)
                worst = (off / np.linalg.norm(wanted, axis=-1)).max()
                if not worst <= tolerance:
                    return f"{side.name} is off by {worst:.1e} on {trace}"
                if side.engine != "ours" or side.share is None:
                    continue
                if not np.array_equal(logits, same.setdefault(trace, logits)):
                    return f"{side.name} has other bits than another share on {trace}"
    return None


def _logits(steps: list[Step]) -> np.ndarray:
    return np.stack([step.logits for step in steps])


def summarize(run: Run, plan: Plan, trace: str, state: str) -> Iterator[dict[str, Any]]:
    """Yield a row for each side: medians over the tokens timed in one state.

    A token's time over resident is its time minus that of the same token on the
    engine's resident side, just before or after. ``over_ms`` is the median, and
    ``over_spread_ms`` the range of the middle half. ``recall`` is the share of missing
    experts that were read before a request; they count as hits.
    """
    timed = {
        side: [
            step
            for i, step in enumerate(traces[trace])
            if plan.is_timed(i) and plan.state(i) == state
        ]
        for side, traces in run.steps.items()
    }
    differences = {
        side: [
            a.seconds - b.seconds
            for a, b in zip(steps, timed.get(Side(side.engine), steps), strict=True)
        ]
        for side, steps in timed.items()
    }
    over = {side: median(seconds) for side, seconds in differences.items()}
    for side, steps in timed.items():
        seconds = median(step.seconds for step in steps)
        row: dict[str, Any] = {
            "trace": trace,
            "state": state,
            "side": side.name,
            "tokens_per_s": round(1 / seconds, 2),
            "ms": round(1e3 * seconds, 2),
            "cpu_ms": round(1e3 * median(step.cpu_seconds for step in steps), 2),
        }
        if side.share is not None:
            resident = median(step.seconds for step in timed[Side(side.engine)])
            row["over_ms"] = round(1e3 * over[side], 2)
            quarters = np.percentile(differences[side], [25, 75])
            row["over_spread_ms"] = round(1e3 * float(np.ptp(quarters)), 2)
            row["of_resident"] = round(1 + over[side] / resident, 3)
            total = sum((step.counters for step in steps), Counters())
            row |= _experts(total, len(steps), over[side], run, state)
            peer = Side("mlx-vlm", side.share)
            if side.engine == "ours":
                waiting = total.wait_seconds / sum(step.seconds for step in steps)
                row["wait_share"] = round(waiting, 4)
                row["recall"] = round(total.recall, 4)
                if peer in over:
                    row["of_mlx_vlm"] = _ratio(over[side], over[peer])
        yield row


def _experts(
    total: Counters, n_steps: int, over_s: float, run: Run, state: str
) -> dict[str, float]:
    """Return hits and bytes of some steps, and their time relative to the disk's."""
    n_bytes = total.read_bytes / n_steps
    found = {
        "hit_rate": round(total.hit_rate, 4),
        "mb_per_token": round(n_bytes / 1e6, 2),
    }
    if state == "cold" and n_bytes:
        found["of_disk"] = _ratio(over_s, n_bytes / median(run.disk_bytes_per_s))
    return found


def _ratio(a: float, b: float) -> float:
    """Return ``a / b``; NaN if noise made ``b`` zero or negative."""
    return round(a / b, 3) if b > 0 else math.nan


COLUMNS = {
    "side": "side",
    "tokens_per_s": "tokens/s",
    "ms": "ms",
    "cpu_ms": "CPU ms",
    "over_ms": "over resident, ms",
    "over_spread_ms": "spread",
    "of_resident": "x resident",
    "hit_rate": "hits",
    "mb_per_token": "MB/token",
    "recall": "read ahead",
    "wait_share": "waiting",
    "of_mlx_vlm": "over, x mlx-vlm",
    "of_disk": "over, x disk",
}


def print_rows(rows: list[dict[str, Any]], console: Console) -> None:
    """Print a table for each trace and state."""
    for trace, state in dict.fromkeys((row["trace"], row["state"]) for row in rows):
        table = Table(title=f"{trace}, {state}")
        for i, heading in enumerate(COLUMNS.values()):
            table.add_column(heading, justify="right" if i else "left")
        for row in rows:
            if (row["trace"], row["state"]) == (trace, state):
                table.add_row(*(str(row.get(name, "")) for name in COLUMNS))
        console.print(table)


def report_aims(
    rows: list[dict[str, Any]],
    runs: list[Run],
    console: Console,
    args: argparse.Namespace,
) -> None:
    """Print whether the aims were met, the disk's speed, and the machine."""
    native = args.geometry in GEOMETRIES
    of_resident = AIM_OF_RESIDENT if native else AIM_OF_RESIDENT_DOOR
    for name, (worst, aim) in aims(rows, of_resident).items():
        verdict = "met" if worst <= aim else "missed"
        if not worst > 0:
            verdict = "unknown, the machine is too noisy"
        console.print(f"{name}: at worst {worst:.2f}, aim {aim:.2f}: {verdict}")
    disk = median(gbps / 1e9 for run in runs for gbps in run.disk_bytes_per_s)
    console.print(f"disk: {disk:.2f} GB/s, eight random uncached reads at a time")
    console.print(f"{args.geometry}, {args.layers} layers, {_facts()}")


def aims(
    rows: list[dict[str, Any]], of_resident: float = AIM_OF_RESIDENT
) -> dict[str, tuple[float, float]]:
    """Return our worst ratio and its aim, for each aim that was measured."""
    wanted = {
        "over resident, of mlx-vlm's": ("of_mlx_vlm", AIM_OF_MLX_VLM),
        "over resident when cold, of the disk's time": ("of_disk", AIM_OF_DISK),
        "all experts in the pool, of resident": ("of_resident", of_resident),
    }
    found = {}
    for name, (column, aim) in wanted.items():
        partial = column != "of_resident"
        ratios = [
            row[column]
            for row in rows
            if row["side"].startswith("ours")
            and row["side"].endswith(" 100 %") != partial
            and column in row
        ]
        if ratios:
            # NaN counts as the worst ratio.
            found[name] = max(ratios, key=lambda x: math.inf if x != x else x), aim
    return found


def _facts() -> str:
    packages = ("mlx", "mlx-lm", *(("mlx-vlm",) if has_mlx_vlm() else ()))
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    date = datetime.now(timezone.utc).date().isoformat()
    return f"{machine_name()}, {versions}, {date}"


def _write_csv(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    facts = {"geometry": args.geometry, "layers": args.layers, "machine": _facts()}
    with open(args.csv, "w", newline="") as file:
        names = [*facts, "trace", "state", *COLUMNS]
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows({**facts, **row} for row in rows)
