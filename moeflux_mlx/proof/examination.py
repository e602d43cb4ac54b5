"""Examine kernels in a separate process, so that a faulty one does not stop the rest.

A fault in a kernel may end its process, as MLX does after a GPU error.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace

from .. import device
from ..engine.executors import open_executor
from ..engine.executors.kernels import KernelExecutor
from ..engine.launch import KERNELS, Kernel
from ..engine.launch.check import check, measure
from ..errors import BackendError
from ..system import children

# Number of characters of a dead process's last output in the report.
LAST_WORDS = 4000
# Time limit of one kernel at all its sizes, including compilation. The slowest kernel
# needs far less in the simulator.
KERNEL_SECONDS = 300.0
# Time for a process to end, which a GPU's driver may delay.
ENDING_SECONDS = 30.0


@dataclass(frozen=True)
class Finding:
    """The result of one kernel: cases run, worst error, speed, complaints.

    ``error`` is the worst relative RMS error as a share of the limit. ``build_ms`` is
    the time of the first launch with its compilation. ``us`` and ``gbps`` belong to the
    large size, and are measured on GPUs only.
    """

    kernel: str
    family: str
    n_cases: int = 0
    error: float = 0.0
    complaints: list[str] = field(default_factory=list)
    build_ms: float = 0.0
    us: float | None = None
    gbps: float | None = None

    @property
    def passed(self) -> bool:
        """Tell whether every case agreed."""
        return not self.complaints


def open_kernels(name: str) -> KernelExecutor:
    """Open an executor that runs our kernels.

    Raises:
        BackendError: the executor has no kernels, or cannot run here.
    """
    executor = open_executor(name)
    if not isinstance(executor, KernelExecutor):
        raise BackendError(
            f"[doctor] expected metal, cuda or sim: {name!r} has no kernels"
        )
    return executor


def examine_apart(
    names: Sequence[str], executor: str, timeout: float = KERNEL_SECONDS
) -> Iterator[Finding]:
    """Examine kernels in another process, and yield a finding for each.

    If the process dies or hangs, that is a complaint about its present kernel, and a
    new process continues with the next one.

    Args:
        timeout: seconds per kernel.
    """
    waiting = list(names)
    while waiting:
        with tempfile.TemporaryFile("w+", errors="replace") as printed:
            process = children.start_module(
                "moeflux_mlx.proof.examination", executor, *waiting, stderr=printed
            )
            fate = ""
            try:
                for line in _lines(process, timeout):
                    yield Finding(**json.loads(line))
                    del waiting[0]
            except TimeoutError:
                process.kill()
                fate = f"was stopped: it gave no result in {timeout:g} seconds"
            finally:
                _end(process)
            if waiting:
                printed.seek(0)
                words = printed.read()[-LAST_WORDS:].strip()
                fate = fate or f"ended with {process.returncode}"
                yield _of_the_dead(waiting.pop(0), fate, words)


def _lines(process: subprocess.Popen[str], timeout: float) -> Iterator[bytes]:
    """Yield the lines that a process prints, until it closes its output.

    Raises:
        TimeoutError: no line came within ``timeout`` seconds.
    """
    assert process.stdout is not None
    # Read without Python's buffer, because a selector does not see its contents.
    output, rest = process.stdout.fileno(), b""
    end = time.monotonic() + timeout
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        while True:
            if not selector.select(max(0.0, end - time.monotonic())):
                raise TimeoutError
            if not (piece := os.read(output, 1 << 16)):
                return
            *whole, rest = (rest + piece).split(b"\n")
            if whole:
                yield from whole
                end = time.monotonic() + timeout


def _end(process: subprocess.Popen[str]) -> None:
    """Wait for a process to end, and kill it if that takes too long."""
    assert process.stdout is not None
    process.stdout.close()
    try:
        process.wait(ENDING_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        # A process that survives even this is left to the system.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(ENDING_SECONDS)


def _of_the_dead(name: str, fate: str, words: str) -> Finding:
    complaint = f"the process {fate} while it examined this: {words}"
    return Finding(name, KERNELS[name].family, complaints=[complaint])


def examine(kernel: Kernel, executor: KernelExecutor) -> Finding:
    """Run a kernel at every type and size, and time it on a GPU."""
    start = time.perf_counter()
    n_cases, error, complaints, build_ms = 0, 0.0, [], 0.0
    for dtype in kernel.dtypes:
        for sizes in kernel.sizes:
            n_cases += 1
            try:
                result = check(kernel, dtype, sizes, executor.run)
            # Any error of a kernel belongs into the report.
            except Exception as failure:
                complaints.append(f"{dtype} {dict(sizes)}: {_said(failure)}")
                continue
            if n_cases == 1:
                build_ms = 1e3 * (time.perf_counter() - start)
            shares = [e / (result.limits[n] or 1) for n, e in result.errors.items()]
            error = max(error, *shares)
            if not result.passed:
                complaints.append(str(result))
    found = Finding(kernel.name, kernel.family, n_cases, error, complaints, build_ms)
    return found if complaints or device.on_cpu() else _timed(found, kernel, executor)


def _timed(found: Finding, kernel: Kernel, executor: KernelExecutor) -> Finding:
    try:
        timing = measure(kernel, executor.run)
    except Exception as failure:
        complaint = f"timing at {dict(kernel.large)}: {_said(failure)}"
        return replace(found, complaints=[complaint])
    return replace(found, us=1e6 * timing.seconds, gbps=timing.gbps)


def _said(failure: Exception) -> str:
    """Return the complete text of an error; a compiler's may have many lines."""
    return f"{type(failure).__name__}: {failure}"


def main(executor: str, *names: str) -> None:
    """Examine kernels and print each finding as a line of JSON."""
    findings = os.fdopen(os.dup(1), "w")
    # Redirect other output, so that it does not mix with the findings.
    os.dup2(2, 1)
    opened = open_kernels(executor)
    for name in names:
        finding = examine(KERNELS[name], opened)
        print(json.dumps(asdict(finding)), file=findings, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
