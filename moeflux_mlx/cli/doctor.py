"""``moeflux doctor``: prove every kernel on this machine, against its reference."""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import json
import platform
import sys
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from .. import __version__, device
from ..errors import BackendError, ConfigError, MoefluxError
from ..executors import gpu_executor, open_executor
from ..executors.kernels import KernelExecutor
from ..executors.verified import (
    Record,
    fingerprint,
    machine_name,
    mlx_version,
    save,
    with_earlier,
)
from ..launch import KERNELS, Kernel
from ..launch.check import check, measure
from .arguments import check_output

N_ERRORS_SHOWN = 3


@dataclass(frozen=True)
class Finding:
    """What became of one kernel: cases run, worst error, speed, first complaints.

    ``error`` is the worst relative RMS error as a share of what is allowed;
    ``build_ms`` the first launch with its compilation; ``us`` and ``gbps`` are of the
    large size, on GPUs only.
    """

    kernel: str
    family: str
    n_cases: int
    error: float
    complaints: list[str]
    build_ms: float
    us: float | None = None
    gbps: float | None = None

    @property
    def passed(self) -> bool:
        """Tell whether every case agreed."""
        return not self.complaints


def add_parser(subparsers: Any) -> None:
    """Add ``doctor`` with its options."""
    text = "build every kernel here and check it against its reference"
    parser = subparsers.add_parser("doctor", description=text, help=text)
    parser.add_argument("--executor", help="metal, cuda or sim (default: what is here)")
    parser.add_argument(
        "--only", default="*", metavar="PATTERN", help="kernels to check, as moe_*"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    parser.add_argument(
        "--record",
        type=Path,
        metavar="FILE",
        help="also write what passed to FILE; what it says of other kernels stays",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check the kernels and report; return 1 if anything failed."""
    check_output("--record", args.record)
    executor = _executor(args.executor)
    chosen = [k for k in KERNELS.values() if fnmatch.fnmatch(k.name, args.only)]
    if not chosen:
        raise ConfigError(f"[--only] expected a kernel's name but got {args.only!r}")
    console = Console(stderr=True)
    findings = [
        examine(kernel, executor)
        for kernel in track(chosen, "kernels", console=console, transient=True)
    ]
    passed = all(f.passed for f in findings)
    record = make_record(executor.name, findings)
    if passed and len(chosen) == len(KERNELS):
        save(record)
    if args.record:
        names = [kernel.name for kernel in chosen]
        save(with_earlier(record, args.record, names), args.record)
    if args.json:
        print(json.dumps(_as_json(executor.name, findings, passed), indent=1))
    else:
        _print(executor.name, findings, passed)
    return 0 if passed else 1


def _executor(name: str | None) -> KernelExecutor:
    if name is None:
        name = gpu_executor() or "sim"
    executor = open_executor(name)
    if not isinstance(executor, KernelExecutor):
        raise BackendError(
            f"[doctor] expected metal, cuda or sim: {name!r} has no kernels"
        )
    return executor


def examine(kernel: Kernel, executor: KernelExecutor) -> Finding:
    """Run a kernel at every type and size, and time it on a GPU."""
    start = time.perf_counter()
    n_cases, error, complaints, build_ms = 0, 0.0, [], 0.0
    for dtype in kernel.dtypes:
        for sizes in kernel.sizes:
            n_cases += 1
            try:
                result = check(kernel, dtype, sizes, executor.run)
            except (MoefluxError, RuntimeError, ValueError) as failure:
                complaints.append(f"{dtype} {dict(sizes)}: {failure}")
                continue
            if n_cases == 1:
                build_ms = 1e3 * (time.perf_counter() - start)
            shares = [e / (result.limits[n] or 1) for n, e in result.errors.items()]
            error = max(error, *shares)
            if not result.passed:
                complaints.append(str(result))
    found = Finding(kernel.name, kernel.family, n_cases, error, complaints, build_ms)
    if complaints or device.on_cpu():
        return found
    timing = measure(kernel, executor.run)
    speed = {"us": 1e6 * timing.seconds, "gbps": timing.gbps}
    return Finding(**{**asdict(found), **speed})


def make_record(executor: str, findings: list[Finding]) -> Record:
    """Return which kernels agreed, with the fingerprint of each."""
    good = {f.kernel: fingerprint(f.kernel, executor) for f in findings if f.passed}
    today = datetime.date.today().isoformat()
    return Record(executor, machine_name(), today, mlx_version(), good)


def _environment() -> dict[str, str]:
    return {
        "moeflux-mlx": __version__,
        "mlx": mlx_version(),
        "mlx-lm": metadata.version("mlx-lm"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": machine_name(),
        "memory": f"{device.physical_memory_bytes() / 2**30:.1f} GiB",
    }


def _as_json(executor: str, findings: list[Finding], passed: bool) -> dict[str, Any]:
    return {
        "environment": _environment(),
        "executor": executor,
        "passed": passed,
        "kernels": [{**asdict(f), "passed": f.passed} for f in findings],
    }


def _print(executor: str, findings: list[Finding], passed: bool) -> None:
    console = Console()
    for name, value in _environment().items():
        console.print(f"{name:<12} {value}", highlight=False)
    console.print(f"{'executor':<12} {executor}", highlight=False)
    console.print(_table(findings))
    for finding in findings:
        for complaint in finding.complaints[:N_ERRORS_SHOWN]:
            print(f"FAILED {finding.kernel}: {complaint}", file=sys.stderr)
    n_good = sum(f.passed for f in findings)
    console.print(f"{n_good} of {len(findings)} kernels agree with their references.")
    if executor == "sim":
        console.print(
            "They ran on the simulator: evidence for Metal, not proof. "
            "Times of a simulator mean nothing."
        )
    elif passed and len(findings) == len(KERNELS):
        console.print(f"Models use executor {executor!r} on this machine from now on.")


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
