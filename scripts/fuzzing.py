"""Read damaged files of every kind: the result must be right or a typed error.

The kind's name, a seed and a number determine a case, so any case can be repeated.
These are faults: an error that is not moeflux-mlx's own, an error of several lines, a
file opened outside the case's folder, a case that takes ten seconds, growing memory.
"""

from __future__ import annotations

import json
import random
import resource
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import xxhash

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from hostile_files import (  # noqa: E402
    mutate_json_file,
    mutate_npz,
    mutate_safetensors,
)
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from synthetic import write_checkpoint  # noqa: E402
from tiny import make_checkpoint  # noqa: E402

import moeflux_mlx  # noqa: E402
from moeflux_mlx import load_state, save_state  # noqa: E402
from moeflux_mlx.engine.executors import verified  # noqa: E402
from moeflux_mlx.engine.lowering import tuned  # noqa: E402
from moeflux_mlx.errors import MoefluxError  # noqa: E402
from moeflux_mlx.experts.files.checkpoint import Checkpoint  # noqa: E402
from moeflux_mlx.experts.files.checkpoint_store import CheckpointExperts  # noqa: E402
from moeflux_mlx.experts.files.manifest import MANIFEST_NAME, checksum_of  # noqa: E402
from moeflux_mlx.experts.files.pack import pack  # noqa: E402
from moeflux_mlx.experts.files.packed import PackedExperts  # noqa: E402
from moeflux_mlx.experts.files.safetensors import read_header  # noqa: E402
from moeflux_mlx.experts.pool.routing_trace import RoutingTrace  # noqa: E402

LIMIT_S = 10
Mutate = Callable[[bytes, random.Random], bytes]


@dataclass
class Kind:
    """A kind of file: valid files, a function that damages them, a path, a reader."""

    samples: list[bytes]
    mutate: Mutate
    path: Path
    read: Callable[[Path], Any]


@dataclass(frozen=True)
class Fault:
    """A case with a forbidden effect."""

    kind: str
    number: int
    seed: int
    what: str

    def __str__(self) -> str:
        return f"{self.kind} --seed {self.seed} --first {self.number}: {self.what}"


class Watch:
    """Records every file that Python opens while a case runs."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.outside: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if event != "open" or self.folder is None or isinstance(args[0], int):
            return
        path = str(args[0])
        code = (sys.prefix, sys.base_prefix, str(ROOT / "moeflux_mlx"))
        if not path.startswith((str(self.folder), *code)):
            self.outside.append(path)


WATCH = Watch()


def make_kinds(folder: Path) -> dict[str, Kind]:
    """Write valid files of every kind to ``folder``."""
    plain = write_checkpoint(folder / "plain", n_shards=2)
    pack(plain, folder / "packed")
    shard = plain / "model-00001-of-00002.safetensors"
    index, config = plain / "model.safetensors.index.json", plain / "config.json"
    manifest = folder / "packed" / MANIFEST_NAME
    states, load = _states(folder)
    state, trace = folder / "state", folder / "trace.npz"
    _trace().save(trace)
    record, tuning = folder / "record.json", folder / "tuned.json"
    verified.save(_record(), record, ())
    tuned.save(_tuning(), tuning)

    def open_plain(_: Path) -> None:
        CheckpointExperts.open(plain).close()

    def open_index(_: Path) -> None:
        Checkpoint.open(plain).close()

    def open_pack(_: Path) -> None:
        PackedExperts.open(folder / "packed").close()

    kinds = {
        "header": (shard, mutate_safetensors, read_header),
        "index": (index, mutate_json_file, open_index),
        "config": (config, mutate_json_file, open_plain),
        "manifest": (manifest, _mutate_manifest, open_pack),
        "trace": (trace, mutate_npz, RoutingTrace.load),
        "tuning": (tuning, mutate_json_file, tuned.read),
        "verification": (record, mutate_json_file, verified._read),
    }
    found = {
        name: Kind([path.read_bytes()], mutate, path, read)
        for name, (path, mutate, read) in kinds.items()
    }
    # Damaging the shard itself would spoil the files for other kinds.
    found["header"].path = folder / "header.safetensors"
    return found | {"state": Kind(states, _mutate_state, state, load)}


def fuzz(
    name: str, kind: Kind, seed: int, first: int, n_cases: int
) -> Iterator[Fault | None]:
    """Run cases in sequence; yield the fault of each, or None."""
    before = kind.path.read_bytes() if kind.path.exists() else None
    _attempt(kind, kind.samples[0])
    resident = _peak_bytes()
    try:
        for number in range(first, first + n_cases):
            rng = random.Random(f"{name} {seed} {number}")
            data = kind.mutate(rng.choice(kind.samples), rng)
            what = _attempt(kind, data)
            if what is None and (grown := _peak_bytes() - resident) > 256 << 20:
                what, resident = f"{grown} bytes more", resident + grown
            yield what and Fault(name, number, seed, what)
    finally:
        if before is not None:
            kind.path.write_bytes(before)


def _attempt(kind: Kind, data: bytes) -> str | None:
    """Read a file of these bytes; return a description of a fault, or None."""
    kind.path.write_bytes(data)
    WATCH.outside.clear()
    try:
        with _time_limit(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            WATCH.folder = kind.path.parent
            kind.read(kind.path)
    except MoefluxError as error:
        text = str(error)
        if "\n" in text or len(text) > 3000:
            return f"not one line: {text[:200]!r}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        WATCH.folder = None
    return f"opened {WATCH.outside}" if WATCH.outside else None


@contextmanager
def _time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"it took {LIMIT_S} seconds")

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def _peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _mutate_manifest(data: bytes, rng: random.Random) -> bytes:
    """Change a manifest; in most cases correct its checksum."""
    text = mutate_json_file(data, rng)
    try:
        fields = json.loads(text)
        sealed = {**fields, "checksum": checksum_of(fields)}
    except (ValueError, TypeError, RecursionError):
        return text
    return json.dumps(sealed).encode() if rng.random() < 0.8 else text


def _mutate_state(data: bytes, rng: random.Random) -> bytes:
    """Change a state; in most cases correct its checksum."""

    def seal(fields: Any, rest: bytes) -> None:
        try:
            about = fields["__metadata__"]
            left = {k: v for k, v in about.items() if k != "checksum"}
            digest = xxhash.xxh3_64(json.dumps(left, sort_keys=True).encode())
            for name in sorted(set(fields) - {"__metadata__"}):
                field = fields[name]
                begin, end = field["data_offsets"]
                shape = tuple(field["shape"])
                digest.update(f"{name} {field['dtype']} {shape}\n".encode())
                digest.update(rest[begin:end])
            about["checksum"] = digest.hexdigest()
        except (KeyError, TypeError, ValueError, AttributeError):
            return

    return mutate_safetensors(data, rng, seal)


def _states(folder: Path) -> tuple[list[bytes], Callable[[Path], Any]]:
    """Return states of a small model, plain and quantised, and their reader."""
    packed = folder / "model-packed"
    pack(make_checkpoint(folder / "model"), packed)
    model, _ = moeflux_mlx.load(packed, expert_memory="3MB")
    states = []
    for quantized in (False, True):
        cache, tokens = make_prompt_cache(model), [5, 17, 60, 3]
        mx.eval(model(mx.array([tokens]), cache=cache))
        if quantized:
            cache = [
                c.to_quantized(32, 8) if hasattr(c, "to_quantized") else c
                for c in cache
            ]
        save_state(folder / "state", model, cache, tokens)
        states.append((folder / "state").read_bytes())
    return states, lambda path: load_state(path, model)


def _trace() -> RoutingTrace:
    rng = np.random.default_rng(0)
    chosen = rng.integers(0, 8, (19, 4, 2), np.uint8)
    likely = rng.integers(0, 8, (13, 3, 2), np.uint8)
    passes = np.array([6] + [1] * 13, np.uint32)
    return RoutingTrace("m", (0, 1, 2, 3), 8, (64,) * 4, 7, passes, chosen, likely)


def _record() -> verified.Record:
    kernels = {f"kernel_{i}": f"{i:016x}" for i in range(12)}
    return verified.Record("sim", "a machine", "2026-01-01", "0.32.4", kernels)


def _tuning() -> tuned.Tuning:
    us = {"mlx": 5.5, "qmm_t": 1.25}
    entries = tuple(
        tuned.Entry(
            "Op", f"dim={i}", i, "mlx", "qmm_t", us, {"mlx": 1}, 3.5, {"x": "y"}
        )
        for i in range(4)
    )
    return tuned.Tuning("a device", "cuda", "0.32.4", "2026-01-01", entries)
