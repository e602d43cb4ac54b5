"""Run each side in a process of its own: start it, do its job, read its results."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ...errors import (
    BackendError,
    BudgetError,
    ConfigError,
    ExpertStoreError,
    ModelError,
    MoefluxError,
)
from ...system.children import run_module
from .measurement import Job, measure

KINDS = (BackendError, BudgetError, ConfigError, ExpertStoreError, ModelError)
FAILED = 2


@dataclass(frozen=True)
class Side:
    """One side's speed and memory, and its perplexity if there was a text.

    ``prompt_tps`` and ``generation_tps`` are tokens per second. The peaks cover loading
    and generating: ``peak_process_bytes`` of the process, ``peak_mlx_bytes`` of MLX's
    allocations, which on a CPU are only a part. ``executor`` is the one that ran our
    class; None: mlx-lm's class ran.
    """

    prompt_tps: float
    generation_tps: float
    peak_process_bytes: int
    peak_mlx_bytes: int
    perplexity: float | None = None
    expert_hit_rate: float | None = None
    expert_read_bytes: int | None = None
    executor: str | None = None


@dataclass(frozen=True)
class Measured:
    """A job's results: figures, tokens, and logits ``[T, V]``.

    ``layers`` is the file of the layers' outputs.
    """

    side: Side
    tokens: list[int]
    logits: np.ndarray
    layers: Path


def run_job(job: Job, directory: Path) -> Measured:
    """Run a job in a process of its own and read its results."""
    path = directory / f"{job.side}.json"
    path.write_text(json.dumps(asdict(job)))
    done = run_module("moeflux_mlx.measure.compare", str(path))
    if done.returncode:
        raise _failure(job, done)
    with np.load(path.with_suffix(".npz")) as arrays:
        found = {name: arrays[name].tolist() for name in arrays.files}
    tokens, n_vocabulary = found.pop("tokens"), found.pop("n_vocabulary")
    rows = np.memmap(path.with_suffix(".logits"), np.float32, "r")
    layers = path.with_suffix(".layers.npz")
    return Measured(Side(**found), tokens, rows.reshape(-1, n_vocabulary), layers)


def _failure(job: Job, done: subprocess.CompletedProcess[str]) -> MoefluxError:
    if done.returncode == FAILED and done.stdout.strip():
        name, message = json.loads(done.stdout.splitlines()[-1])
        return {kind.__name__: kind for kind in KINDS}.get(name, ModelError)(message)
    if done.returncode < 0:
        why = f"signal {-done.returncode} ended it; is there enough memory?"
    else:
        why = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return ModelError(f"[compare] {job.side} with {job.path}: {why}")


def work(path: Path) -> int:
    """Run the job in a file; write the results to files of the same name."""
    job = Job(**json.loads(path.read_text()))
    try:
        measure(job, path)
    except (MoefluxError, OSError) as error:
        print(json.dumps([type(error).__name__, str(error)]))
        return FAILED
    return 0
