"""Profile a decoding step or a prompt: the time of each of its calls."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from ..device import machine_name, mlx_version
from ..errors import ConfigError
from ..system.progress import Report
from .recording import (
    Record,
    Recorder,
    filled_caches,
    next_token,
    prompt,
    resident_runtime_of,
    restorer,
    step,
)
from .timing import HostTimer, StepTimer, Work, timer_for

# Seconds after which no further call is timed.
SECONDS = 60.0
# Tokens timed in a run: as many as take DECODED_S, at most DECODED.
DECODED = 32
DECODED_S = 1.0


@dataclass(frozen=True)
class Row:
    """The cost of one call of a lowered graph, averaged over the layers that share it.

    ``us`` is the time of one call, ``n_bytes`` the bytes it must move, and ``count``
    the number of calls in a whole step. ``kernels`` names our launches in order; it is
    empty if MLX's own operations or a cache object perform the call. ``is_hidden``:
    ``us`` does not include the host's time.
    """

    graph: str
    ops: tuple[str, ...]
    labels: tuple[str, ...]
    kernels: tuple[str, ...]
    count: int
    n_bytes: int
    us: float
    is_hidden: bool = True

    @property
    def label(self) -> str:
        """The Ops' labels."""
        return " + ".join(self.labels)

    @property
    def us_per_step(self) -> float:
        """Microseconds of all these calls in a whole step."""
        return self.us * self.count

    @property
    def gbps(self) -> float:
        """Achieved bandwidth in GB/s."""
        return self.n_bytes / max(self.us, 1e-3) / 1e3


@dataclass(frozen=True)
class Profile:
    """The cost of a whole step, and of its calls in order.

    A decoding step has ``n_tokens`` 1 and ``context`` tokens before it; a prompt has
    none before it. ``whole_us`` is measured end to end and includes sampling.
    ``host_us`` is the time of Python and encoding, which overlaps with the device's;
    None if the host computes itself. ``n_untimed`` counts the calls that have no row
    because there was no time left.
    """

    machine: str
    executor: str
    mlx: str
    n_tokens: int
    context: int
    rows: tuple[Row, ...]
    copy_gbps: float
    whole_us: float
    host_us: float | None
    n_untimed: int = 0

    @property
    def kernels_us(self) -> float:
        """Microseconds of all rows."""
        return sum(row.us_per_step for row in self.rows)

    @property
    def remainder_us(self) -> float:
        """Microseconds of the whole step less all rows; negative if rows overlap."""
        return self.whole_us - self.kernels_us

    @property
    def n_launches(self) -> int:
        """Number of launches of our kernels in a whole step."""
        return sum(row.count * len(row.kernels) for row in self.rows)

    @property
    def n_bytes(self) -> int:
        """Bytes that a whole step must move."""
        return sum(row.count * row.n_bytes for row in self.rows)

    @property
    def title(self) -> str:
        """The subject, the executor and the machine."""
        subject = f"a prompt of {self.n_tokens} tokens"
        if self.n_tokens == 1:
            subject = f"one token after {self.context}"
        return f"{subject}, executor {self.executor}, {self.machine}"

    def largest_first(self) -> list[Row]:
        """Return the rows, most expensive first."""
        return sorted(self.rows, key=lambda row: -row.us_per_step)


def profile(
    model: Any,
    *,
    context: int = 512,
    prefill: int = 0,
    repeats: int = 5,
    seconds: float = SECONDS,
    timer: StepTimer | None = None,
    report: Report | None = None,
) -> Profile:
    """Profile a decoding step, or a prompt, of a loaded model of ours.

    Args:
        model: the model, with all experts in memory.
        context: tokens in the caches before the step; most of them are random rows.
        prefill: profile a prompt of this many tokens instead.
        repeats: measurements of each figure; the median is used.
        seconds: after these no further call is timed. The whole step is timed first,
            then the calls, those of the most bytes first, and at least one.
        report: is told how many calls have been timed.
        timer: default: the one that fits the model's executor.

    Raises:
        ModelError: the model is not one of ours, or its experts are not all in memory.
        ConfigError: a number is out of range.
    """
    for name, value, least in (("--prefill", prefill, 0), ("--repeats", repeats, 1)):
        if value < least:
            raise ConfigError(f"[{name}] expected at least {least} but got {value}")
    runtime = resident_runtime_of(model)
    timer = timer or timer_for(runtime.executor, repeats)
    model.eval()
    vocab_size = model.needs.vocab_size
    tokens = prompt(prefill, vocab_size) if prefill else mx.array([[1]])
    caches = make_prompt_cache(model) if prefill else filled_caches(model, context)
    end = timer.now() + seconds
    if prefill:
        whole, host = _prompt_seconds(model, tokens, timer), None
    else:
        whole, host = _token_seconds(model, context, timer)
    recorder = Recorder(runtime, caches, share=bool(prefill))
    with recorder.attached():
        logits = model(tokens, cache=caches)
    mx.eval(logits)
    kinds = _by_kind(recorder.records)
    with model.engine.threads(tokens):
        rows = _rows(kinds, timer, end, report)
        timed = [row for row in rows if row is not None]
        timed.append(_sampling(logits, timer))
    recorder.records.clear()
    del caches, logits
    return Profile(
        machine=machine_name(),
        executor=runtime.executor.name,
        mlx=mlx_version(),
        n_tokens=prefill or 1,
        context=0 if prefill else context,
        rows=tuple(timed),
        copy_gbps=timer.copy_bytes_per_s() / 1e9,
        whole_us=1e6 * whole,
        host_us=None if host is None else 1e6 * host,
        n_untimed=sum(
            len(records)
            for row, records in zip(rows, kinds, strict=True)
            if row is None
        ),
    )


def _by_kind(records: Iterable[Record]) -> list[list[Record]]:
    """Group the records of the same call over all layers, in order."""
    kinds: dict[int, list[Record]] = {}
    for record in records:
        kinds.setdefault(id(record.step), []).append(record)
    return list(kinds.values())


def _rows(
    kinds: Sequence[list[Record]],
    timer: StepTimer,
    end: float,
    report: Report | None,
) -> list[Row | None]:
    """Time calls of each kind, in order; None for those without time left.

    Args:
        end: the timer's time after which no further kind is timed.
    """
    rows: list[Row | None] = [None] * len(kinds)
    moved = [sum(record.n_bytes for record in records) for records in kinds]
    for n, i in enumerate(sorted(range(len(kinds)), key=lambda i: -moved[i])):
        if n and timer.now() >= end:
            break
        rows[i] = _row(kinds[i], timer)
        if report is not None:
            report("timing calls", n + 1, len(kinds))
    return rows


def _row(records: list[Record], timer: StepTimer) -> Row:
    first = records[0]
    timing = timer.time([record.work for record in records])
    return Row(
        graph=first.graph,
        ops=tuple(op.variant_name for op in first.step.ops),
        labels=tuple(op.label for op in first.step.ops),
        kernels=first.launched,
        count=len(records),
        n_bytes=sum(record.n_bytes for record in records) // len(records),
        us=1e6 * timing.seconds,
        is_hidden=timing.is_hidden,
    )


def _sampling(logits: mx.array, timer: StepTimer) -> Row:
    timing = timer.time([Work(next_token, [logits])])
    n_bytes = logits.nbytes // logits.shape[1]
    labels = ("argmax",)
    us = 1e6 * timing.seconds
    return Row("sampling", labels, labels, (), 1, n_bytes, us, timing.is_hidden)


def _token_seconds(
    model: Any, context: int, timer: StepTimer
) -> tuple[float, float | None]:
    """Return the seconds per token, and those of the host if it does not wait."""
    whole = _decode_seconds(model, context, timer)
    waits = isinstance(timer, HostTimer)
    return whole, None if waits else _host_seconds(model, context, timer)


def _decode_seconds(model: Any, context: int, timer: StepTimer) -> float:
    """Return the seconds per token; the host prepares the next token meanwhile."""
    caches, token = filled_caches(model, context), mx.array([[1]])
    once = timer.elapsed(lambda: [step(model, caches, token)])
    n = int(min(DECODED, max(2, DECODED_S / max(once, 1e-6))))
    return statistics.median(
        _decode(model, caches, token, n, timer) / n for _ in range(timer.repeats)
    )


def _decode(
    model: Any, caches: list[Any], token: mx.array, n: int, timer: StepTimer
) -> float:
    restore = restorer(caches)
    mx.synchronize()
    start = timer.now()
    for _ in range(n):
        following = step(model, caches, token)
        mx.async_eval(following)
        mx.eval(token)
        token = following
    mx.eval(token)
    seconds = timer.now() - start
    restore()
    return seconds


def _host_seconds(model: Any, context: int, timer: StepTimer) -> float:
    """Return the seconds to encode a step on an idle device."""
    caches, token = filled_caches(model, context), mx.array([[1]])
    times = []
    for _ in range(timer.repeats):
        mx.synchronize()
        start = timer.now()
        token = step(model, caches, token)
        mx.async_eval(token)
        times.append(timer.now() - start)
        mx.eval(token)
    return statistics.median(times)


def _prompt_seconds(model: Any, tokens: mx.array, timer: StepTimer) -> float:
    """Return the seconds of a prompt, starting with empty caches."""

    def run() -> list[mx.array]:
        caches = make_prompt_cache(model)
        first = next_token(model(tokens, cache=caches))
        mx.eval(first, [cache.state for cache in caches])
        return [first]

    timer.elapsed(run)
    return statistics.median(timer.elapsed(run) for _ in range(timer.repeats))


def write_csv(found: Profile, path: Path) -> None:
    """Write all rows, then the sum, the whole step, the host's time and the rest."""
    lines = [_cells(found, row) for row in found.rows]
    whole = {
        "sum": found.kernels_us,
        "whole step": found.whole_us,
        "host": found.host_us,
        "remainder": found.remainder_us,
    }
    for name, us in whole.items():
        if us is not None:
            blank = dict.fromkeys(lines[0], "")
            lines.append({**blank, "graph": name, "us_per_step": f"{us:.3f}"})
    facts = {
        "machine": found.machine,
        "executor": found.executor,
        "mlx": found.mlx,
        "n_tokens": found.n_tokens,
        "context": found.context,
        "copy_gbps": f"{found.copy_gbps:.1f}",
    }
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*facts, *lines[0]], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**facts, **line} for line in lines)


def _cells(found: Profile, row: Row) -> dict[str, Any]:
    return {
        "graph": row.graph,
        "ops": "+".join(row.ops),
        "labels": "+".join(row.labels),
        "kernels": "+".join(row.kernels),
        "count": row.count,
        "launches": len(row.kernels),
        "bytes": row.n_bytes,
        "us": f"{row.us:.3f}",
        "us_per_step": f"{row.us_per_step:.3f}",
        "share": f"{row.us_per_step / max(found.kernels_us, 1e-9):.4f}",
        "gbps": f"{row.gbps:.1f}",
        "of_copy": f"{row.gbps / found.copy_gbps:.4f}",
        "is_hidden": int(row.is_hidden),
    }
