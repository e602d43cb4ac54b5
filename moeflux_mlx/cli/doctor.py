"""``moeflux doctor``: compare every kernel with its reference on this machine."""

from __future__ import annotations

import argparse
import datetime
import difflib
import fnmatch
import json
import platform
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx
from rich.progress import track
from rich.table import Table

from .. import __version__, device
from ..engine.executors import gpu_executor
from ..engine.executors.verified import (
    Record,
    fingerprint,
    lost,
    machine_name,
    mlx_version,
    remember,
    save,
)
from ..engine.launch import KERNELS
from ..errors import ConfigError
from ..proof.examination import KERNEL_SECONDS, Finding, examine_apart, open_kernels
from ..system.backend import BACKENDS
from ..system.terminal import PlainConsole
from .arguments import check_output, number

N_ERRORS_SHOWN = 3
VALIDATION = "MTL_DEBUG_LAYER=1 MTL_SHADER_VALIDATION=1 moeflux doctor"
VALIDATION_TEXT = (
    f"On a Mac, Metal itself checks calls and memory accesses with: {VALIDATION}"
)


def add_parser(subparsers: Any) -> None:
    """Add ``doctor`` with its options."""
    text = "build every kernel here and check it against its reference"
    parser = subparsers.add_parser(
        "doctor", description=text, help=text, epilog=VALIDATION_TEXT
    )
    parser.add_argument(
        "--executor", help="metal, cuda or sim (default: the GPU, else sim)"
    )
    parser.add_argument(
        "--only",
        default="*",
        metavar="PATTERN",
        help="kernels to check, for example moe_*",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    parser.add_argument(
        "--timeout",
        type=number(1),
        default=KERNEL_SECONDS,
        metavar="SECONDS",
        help="time limit per kernel; a kernel that exceeds it is stopped and reported "
        f"(default: {KERNEL_SECONDS:g})",
    )
    parser.add_argument(
        "--record",
        type=Path,
        metavar="FILE",
        help="also write the kernels that passed to FILE, and keep its other entries, "
        "which must be of this executor, machine and MLX",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check the kernels and print a report; return 1 if any failed."""
    check_output("--record", args.record)
    executor = open_kernels(args.executor or gpu_executor() or "sim").name
    names = fnmatch.filter(KERNELS, args.only)
    if not names:
        raise ConfigError(_no_kernel(args.only))
    if args.record and args.only != "*":
        _check_entries(make_record(executor, []), args.record, names)
    console = PlainConsole(stderr=True)
    found = examine_apart(names, executor, args.timeout)
    findings = [*track(found, "kernels", len(names), console=console, transient=True)]
    remembered = _keep(make_record(executor, findings), names, args.record)
    if args.json:
        print(json.dumps(_as_json(executor, findings, remembered), indent=1))
    else:
        _print(executor, findings, remembered)
    return 0 if all(f.passed for f in findings) else 1


def _no_kernel(pattern: str) -> str:
    """Name the kernels closest to an unknown pattern, or all of them."""
    word = pattern.strip("*?")
    near = [name for name in KERNELS if word and word in name]
    near = near or difflib.get_close_matches(word, KERNELS, 5)
    there = ", ".join(near or KERNELS)
    return (
        f"[--only] expected a kernel's name but got {pattern!r}: there are {there}, "
        "and patterns such as moe_*"
    )


def _check_entries(record: Record, path: Path, names: list[str]) -> None:
    """Raise ConfigError if writing these kernels would drop entries of a record."""
    if other := lost(record, path, names):
        raise ConfigError(
            f"[--record] expected a record of {_where(record)} but got {path} of "
            f"{_where(other)}, whose other entries would be lost: leave --only out, "
            "or name another file"
        )


def _where(record: Record) -> str:
    return f"{record.executor} on {record.machine} with MLX {record.mlx}"


def _keep(record: Record, names: list[str], path: Path | None) -> str:
    """Record the kernels that agreed, also in ``path``; return an error or ''."""
    try:
        remember(record, names)
        if path:
            save(record, path, names)
    except OSError as error:
        return str(error)
    return ""


def make_record(executor: str, findings: list[Finding]) -> Record:
    """Return a record of the kernels that agreed, with their fingerprints."""
    good = {f.kernel: fingerprint(f.kernel, executor) for f in findings if f.passed}
    today = datetime.date.today().isoformat()
    return Record(executor, machine_name(), today, mlx_version(), good)


def environment() -> dict[str, Any]:
    """Return the facts about this machine for the report."""
    metal = {"macos": platform.mac_ver()[0]} if sys.platform == "darwin" else {}
    return {
        "moeflux-mlx": __version__,
        **{name: _version(name) for name in ("mlx", *BACKENDS, "mlx-lm")},
        "python": platform.python_version(),
        "platform": platform.platform(),
        **metal,
        "machine": platform.machine(),
        "device": machine_name(),
        "memory": f"{device.physical_memory_bytes() / 2**30:.1f} GiB",
        **{f"device {name}": value for name, value in mx.device_info().items()},
    }


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _as_json(executor: str, findings: list[Finding], failure: str) -> dict[str, Any]:
    return {
        "environment": environment(),
        "executor": executor,
        "passed": all(f.passed for f in findings),
        "not_remembered": failure,
        "validation": VALIDATION,
        "kernels": [{**asdict(f), "passed": f.passed} for f in findings],
    }


def _print(executor: str, findings: list[Finding], failure: str) -> None:
    console = PlainConsole()
    facts = {**environment(), "executor": executor}
    width = max(map(len, facts))
    for name, value in facts.items():
        console.print(f"{name:<{width}} {value}", highlight=False)
    console.print(_table(findings))
    for finding in findings:
        for complaint in finding.complaints[:N_ERRORS_SHOWN]:
            print(f"FAILED {finding.kernel}: {complaint}", file=sys.stderr)
    n_good = sum(f.passed for f in findings)
    console.print(f"{n_good} of {len(findings)} kernels agree with their references.")
    console.print(_conclusion(executor, findings, failure))


def _conclusion(executor: str, findings: list[Finding], failure: str) -> str:
    """State the consequence for models on this machine."""
    if executor == "sim":
        return (
            "They ran on the simulator: evidence for Metal, not proof. "
            "Its times mean nothing."
        )
    if failure:
        return f"No record was written, so models use none of them: {failure}"
    if all(f.passed for f in findings):
        return f"Models on this machine now use them, with executor {executor!r}."
    text = (
        f"Models now use those that agree, with executor {executor!r}; other kernels "
        "or MLX's own operations replace the rest."
    )
    return f"{text}\n{VALIDATION_TEXT}" if executor == "metal" else text


def _table(findings: list[Finding]) -> Table:
    table = Table(
        "family", "kernel", "cases", "error / limit", "build ms", "us", "GB/s"
    )
    for f in findings:
        style = None if f.passed else "red"
        table.add_row(
            f.family,
            f.kernel,
            str(f.n_cases),
            f"{f.error:.2f}" if f.passed else "FAILED",
            f"{f.build_ms:.0f}",
            "" if f.us is None else f"{f.us:.1f}",
            "" if f.gbps is None else f"{f.gbps:.1f}",
            style=style,
        )
    return table
