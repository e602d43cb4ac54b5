"""Part of ``scripts/bench_streaming``: the reader beside a plain C loop of pread.

Both sides read records of one file into the same slots, with the same number of
threads, in turns. First they must read the same bytes. ``direct`` reads come from the
disk, and no record is read twice in a round. ``cold`` reads do too, but through the
page cache. ``cached`` reads come from pages that were read just before. ``at once``
submits all records of a round. ``batches`` waits for as many records as a token needs
in one layer before it submits more. C compares no checksums, so ``checked`` shows the
cost of the checksum at a record's first read.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from rich.console import Console
from rich.table import Table

from moeflux_mlx import config
from moeflux_mlx.errors import ConfigError
from moeflux_mlx.experts.files.direct import bypass_cache
from moeflux_mlx.experts.files.reader import Batch, HostPlace, Read, ReadWorkers
from moeflux_mlx.experts.files.spans import Span
from moeflux_mlx.experts.pool.budget import parse_bytes
from moeflux_mlx.experts.pool.pool import aligned_rows

# Bytes of an expert of Qwen3.6-35B-A3B in 4 bits, and a token's experts in a layer.
RECORD_BYTES, TOP_K = 1_769_472, 8
N_SLOTS = 64
# Few enough records for the system to keep them in the page cache.
N_CACHED = 128


@dataclass
class Case:
    """One way of reading, with the seconds and CPU seconds of both sides by round."""

    source: str
    name: str
    batch: int
    n_reads: int
    aim: float | None
    checked: bool = False
    seconds: dict[str, list[float]] = field(default_factory=dict)
    cpu_seconds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, side: str, seconds: float, cpu_seconds: float) -> None:
        """Keep one round."""
        self.seconds.setdefault(side, []).append(seconds)
        self.cpu_seconds.setdefault(side, []).append(cpu_seconds)

    def gbps(self, side: str) -> float:
        """Median speed in GB/s."""
        return self.n_reads * RECORD_BYTES / statistics.median(self.seconds[side]) / 1e9

    def cpu_ms_per_gb(self, side: str) -> float:
        """Median milliseconds of CPU time for a GB."""
        n_gb = self.n_reads * RECORD_BYTES / 1e9
        return 1e3 * statistics.median(self.cpu_seconds[side]) / n_gb

    @property
    def ratio(self) -> float:
        """Our speed over C's, the median of rounds."""
        pairs = zip(self.seconds["C"], self.seconds["ours"], strict=True)
        return statistics.median(c / ours for c, ours in pairs)


class Sides:
    """The reader and the C loop, over one open file and the same slots."""

    def __init__(self, path: Path, loop: Any, n_threads: int):
        self.path, self.loop, self.n_threads = path, loop, n_threads
        self.slots = np.array(aligned_rows(N_SLOTS, RECORD_BYTES), copy=False)
        self.slots[:] = 1
        self._checksums: dict[int, int] = {}
        self.pool = ReadWorkers(n_threads, inline_bytes=0)

    def ours(self, fd: int, records: list[int], case: Case) -> float:
        """Return the seconds that our reading threads take."""
        checksums = self.checksums(fd, records) if case.checked else {}
        start = time.perf_counter()
        for first in range(0, len(records), case.batch):
            part = enumerate(records[first : first + case.batch], first)
            reads = [
                Read(
                    (Span(fd, self.path, n * RECORD_BYTES, ((0, RECORD_BYTES),)),),
                    HostPlace(self.slots[i % N_SLOTS].data),
                    layer=0,
                    expert=n,
                    checksum=checksums.get(n),
                )
                for i, n in part
            ]
            batch = Batch(reads)
            self.pool.submit(batch)
            batch.wait()
            for read in reads:
                if read.error is not None:
                    raise read.error
        return time.perf_counter() - start

    def checksums(self, fd: int, records: list[int]) -> dict[int, int]:
        """Return the checksums of these records, and of earlier ones.

        Each is computed once, nearly all of them in the first round, which is not
        counted: computing them here is not the reader's work.
        """
        for n in set(records) - self._checksums.keys():
            record = os.pread(fd, RECORD_BYTES, n * RECORD_BYTES)
            self._checksums[n] = xxhash.xxh3_64_intdigest(record)
        return self._checksums

    def c(self, fd: int, records: list[int], case: Case) -> float:
        """Return the seconds that the C loop takes."""
        offsets = RECORD_BYTES * np.array(records, dtype=np.int64)
        seconds = self.loop(
            fd,
            offsets.ctypes.data,
            len(records),
            RECORD_BYTES,
            case.batch,
            self.slots.ctypes.data,
            N_SLOTS,
            self.n_threads,
        )
        if seconds < 0:
            raise OSError(f"the C loop could not read {self.path}")
        return float(seconds)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this part."""
    parser.add_argument("--directory", type=Path, help="where the file is made")
    parser.add_argument("--size", default="4GB", help="of the file (default: 4GB)")
    parser.add_argument("--threads", type=int, default=config.read_threads())
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--csv", type=Path, metavar="FILE")


def run(args: argparse.Namespace) -> int:
    """Write the file, measure both sides in turns, and print."""
    n_records = parse_bytes(args.size, "size") // RECORD_BYTES
    if n_records < 2 * N_CACHED or args.repeats < 1 or not 1 <= args.threads <= 256:
        least = 2 * N_CACHED * RECORD_BYTES
        raise ConfigError(f"expected {least} bytes, a repeat and 1 to 256 threads")
    if args.directory:
        args.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        loop = compile_loop(Path(directory))
        path = write_file(Path(directory) / "experts.bin", n_records)
        cases = make_cases(n_records)
        with opened(path) as fds:
            measure(cases, Sides(path, loop, args.threads), fds, n_records, args)
    if args.csv:
        write_csv(args.csv, cases, args)
    print_table(cases, args)
    return 0


def make_cases(n_records: int) -> list[Case]:
    """Return the cases to measure."""
    n_cold, n_cached = min(256, n_records // 2), 4 * N_CACHED
    batches = f"batches of {TOP_K}"
    cases = [
        Case("direct", "at once", n_cold, n_cold, 0.9),
        Case("direct", batches, TOP_K, n_cold, None),
        Case("cold", "at once", n_cold, n_cold, None),
        Case("cached", "at once", n_cached, n_cached, 0.8),
        Case("cached", batches, TOP_K, n_cached, None),
        # Two reads into one slot must not be in flight together.
        Case("cached", f"checked, by {N_SLOTS}", N_SLOTS, n_cached, None, True),
    ]
    # Other systems cannot drop pages from the page cache.
    return [c for c in cases if c.source != "cold" or hasattr(os, "posix_fadvise")]


def compile_loop(directory: Path) -> Any:
    """Compile the C loop and return its function."""
    source = Path(__file__).with_name("pread_loop.c")
    library = directory / "pread_loop.so"
    flags = ["-O2", "-shared", "-fPIC", "-pthread", "-o", library]
    subprocess.run([os.environ.get("CC", "cc"), *flags, source], check=True)
    loop = ctypes.CDLL(str(library)).pread_loop
    pointer, n, i = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    loop.argtypes = [i, pointer, n, n, n, pointer, n, i]
    loop.restype = ctypes.c_double
    return loop


def write_file(path: Path, n_records: int) -> Path:
    """Write random records, durably, so that cold reads find them on the disk."""
    block = memoryview(random.Random(0).randbytes(RECORD_BYTES))
    with open(path, "wb") as file:
        for n in range(n_records):
            cut = n * 4_099 % RECORD_BYTES
            file.write(block[cut:])
            file.write(block[:cut])
        file.flush()
        os.fsync(file.fileno())
    return path


@contextlib.contextmanager
def opened(path: Path) -> Iterator[dict[bool, int]]:
    """Open the file twice: past the page cache (True) and through it (False)."""
    fds = {direct: os.open(path, os.O_RDONLY) for direct in (True, False)}
    try:
        if not bypass_cache([fds[True]], path.parent, aligned=True):
            sys.exit("bench_streaming: give another --directory")
        yield fds
    finally:
        for fd in fds.values():
            os.close(fd)


def measure(
    cases: list[Case],
    sides: Sides,
    fds: dict[bool, int],
    n_records: int,
    args: argparse.Namespace,
) -> None:
    """Measure both sides in turns; the first side changes from round to round."""
    rng = random.Random(1)
    functions = {"ours": sides.ours, "C": sides.c}
    check(cases[0], sides, fds[True], rng.sample(range(n_records), N_SLOTS))
    for i in range(args.repeats + 1):
        for case in cases:
            shuffled = rng.sample(range(n_records), n_records)
            for name in ("ours", "C") if i % 2 else ("C", "ours"):
                fd = fds[case.source == "direct"]
                # Each side reads its own records: a disk may cache those read last.
                records, shuffled = shuffled[: case.n_reads], shuffled[case.n_reads :]
                if case.source == "cold":
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                elif case.source == "cached":
                    records = rng.choices(range(N_CACHED), k=case.n_reads)
                    sides.c(fd, list(range(N_CACHED)), case)
                cpu = time.process_time()
                seconds = functions[name](fd, records, case)
                # The first round warms up.
                if i:
                    case.add(name, seconds, time.process_time() - cpu)


def check(case: Case, sides: Sides, fd: int, records: list[int]) -> None:
    """Exit unless both sides fill the slots with the same bytes."""
    found = []
    for function in (sides.ours, sides.c):
        sides.slots[:] = 0
        function(fd, records, case)
        found.append(xxhash.xxh3_64_intdigest(sides.slots))
    if found[0] != found[1]:
        sys.exit("bench_streaming: no speeds, both sides read different bytes")


def write_csv(path: Path, cases: list[Case], args: argparse.Namespace) -> None:
    """Write every round."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["source", "case", "side", "threads", "round", "gbps", "cpu_ms_per_gb"]
        )
        for case in cases:
            n_gb = case.n_reads * RECORD_BYTES / 1e9
            for side, seconds in case.seconds.items():
                for i, (s, cpu) in enumerate(
                    zip(seconds, case.cpu_seconds[side], strict=True)
                ):
                    row = [f"{n_gb / s:.3f}", f"{1e3 * cpu / n_gb:.1f}"]
                    writer.writerow(
                        [case.source, case.name, side, args.threads, i, *row]
                    )


def print_table(cases: list[Case], args: argparse.Namespace) -> None:
    """Print medians, and our share of C's speed beside the aim."""
    mib = RECORD_BYTES / 2**20
    table = Table(f"records of {mib:.2f} MiB, {args.threads} threads")
    for column in ("ours GB/s", "C GB/s", "ours/C", "aim", "CPU ms/GB", "C's"):
        table.add_column(column, justify="right")
    for case in cases:
        speeds = [f"{case.gbps(side):.2f}" for side in ("ours", "C")]
        cpu = [f"{case.cpu_ms_per_gb(side):.0f}" for side in ("ours", "C")]
        aim = "" if case.aim is None else f"{case.aim:.2f}"
        table.add_row(
            f"{case.source}, {case.name}", *speeds, f"{case.ratio:.2f}", aim, *cpu
        )
    console = Console(highlight=False)
    console.print(table)
    console.print(f"medians of {args.repeats} rounds in turns; load {os.getloadavg()}")
