"""One side of ``scripts/bench_streaming decode``: an engine that runs step by step."""

from __future__ import annotations

import os
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from streaming_files import Extent, drop, fill
from streaming_model import TracedModel, record_choices, record_routing

import moeflux_mlx
from moeflux_mlx.cli.inspect import summarize
from moeflux_mlx.experts.files.checkpoint import Checkpoint
from moeflux_mlx.experts.files.module_store import ModuleExperts, unchanged
from moeflux_mlx.experts.files.modules import find_blocks
from moeflux_mlx.experts.files.safetensors import read_header
from moeflux_mlx.experts.pool.pool import POOL_ALIGNMENT
from moeflux_mlx.experts.pool.stats import Counters
from moeflux_mlx.measure.compare import load_stock

# Whether the experts of the next token are in the page cache.
STATES = ("cold", "warm")
# Steps of a trace whose routing is checked before anything is timed.
CHECKED_STEPS = 8


@dataclass(frozen=True)
class Side:
    """An engine and the percentage of experts in memory; None: they are parameters."""

    engine: str
    share: float | None = None

    @property
    def name(self) -> str:
        """The engine and its share of experts."""
        return f"{self.engine}, " + (
            "resident" if self.share is None else f"{self.share:.4g} %"
        )


@dataclass(frozen=True)
class Plan:
    """The task of every side: traces, untimed and timed tokens, and options.

    ``n_timed`` tokens of a trace are timed in each state, in turns. ``unpacked``: our
    side with mlx-lm's class streams the plain checkpoint, not a pack.
    """

    traces: tuple[str, ...]
    n_warm_up: int
    n_timed: int
    states: tuple[str, ...] = STATES
    device: str = "cpu"
    executor: str | None = None
    policy: str | None = None
    read_ahead: str = "auto"
    optimistic: str | None = None
    unpacked: bool = False

    @property
    def n_steps(self) -> int:
        """Number of a trace's tokens."""
        return self.n_warm_up + self.n_timed * len(self.states)

    def state(self, i: int) -> str:
        """Return the state of the page cache for step ``i``.

        Untimed steps alternate too, so that reading ahead is decided by a trial under
        the same conditions as the timed steps.
        """
        return self.states[i % len(self.states)]

    def is_timed(self, i: int) -> bool:
        """Tell whether step ``i`` comes after the warm-up."""
        return i >= self.n_warm_up


class Step(NamedTuple):
    """One token: seconds of the clock and of all cores, experts, logits ``[V]``."""

    seconds: float
    cpu_seconds: float
    counters: Counters
    logits: np.ndarray


class MlxLm:
    """Stock mlx-lm with every expert in memory; the base of the other engines."""

    def __init__(self, traced: TracedModel, side: Side, plan: Plan):
        self.model = load_stock(traced.plain)

    def begin(self) -> None:
        """Begin a sequence."""
        self._cache = make_prompt_cache(self.model)

    def step(self, token: int) -> mx.array:
        """Return the float32 logits ``[V]`` after one more token."""
        logits = self.model(mx.array([[token]]), cache=self._cache)
        return logits[0, -1].astype(mx.float32)

    def take_counters(self) -> Counters:
        """Return the counters since the last call."""
        return Counters()

    def files(self) -> list[Path]:
        """Return the files from which experts are read while decoding."""
        return []

    def extents(self, layer: int, expert: int) -> list[Extent]:
        """Return the places of an expert in these files."""
        return []


class Ours(MlxLm):
    """moeflux-mlx with its own class: the plain checkpoint if resident, else a pack."""

    def __init__(self, traced: TracedModel, side: Side, plan: Plan):
        memory = None
        if side.share is not None:
            memory = memory_for(traced.packed, side.share)
        path = traced.plain if memory is None else traced.packed
        self.model = moeflux_mlx.load(
            path,
            expert_memory=memory,
            executor=plan.executor,
            policy=plan.policy,
            read_ahead=plan.read_ahead,
        )[0]
        self._runtime = self.model.runtime

    def take_counters(self) -> Counters:
        if self._runtime.streamer is None:
            return Counters()
        total = self._runtime.streamer.stats.total
        self._runtime.streamer.stats.reset()
        return total

    def files(self) -> list[Path]:
        if not self._runtime.streams:
            return []
        store = self._runtime.store
        return [span.path for layer in store.layers for span in store.spans(layer, 0)]

    def extents(self, layer: int, expert: int) -> list[Extent]:
        return [
            Extent(span.path, span.offset, sum(n for _, n in span.pieces))
            for span in self._runtime.store.spans(layer, expert)
        ]


class Door(Ours):
    """moeflux-mlx with mlx-lm's class; it can stream the plain checkpoint too."""

    def __init__(self, traced: TracedModel, side: Side, plan: Plan):
        memory, path = None, traced.plain
        if side.share is not None and plan.unpacked:
            memory = door_memory_for(path, side.share)
        elif side.share is not None:
            path = traced.packed
            memory = memory_for(path, side.share)
        self.model = moeflux_mlx.load(
            path,
            expert_memory=memory,
            policy=plan.policy,
            read_ahead=plan.read_ahead,
            optimistic=plan.optimistic,
            native=False,
        )[0]
        self._streamer = getattr(self.model, "streamer", None)

    def take_counters(self) -> Counters:
        if self._streamer is None:
            return Counters()
        total = self._streamer.stats.total
        self._streamer.stats.reset()
        return total

    def files(self) -> list[Path]:
        if self._streamer is None or self._streamer.resident:
            return []
        store = self._streamer.store
        spans = [span for layer in store.layers for span in store.spans(layer, 0)]
        return sorted({span.path for span in spans})

    def extents(self, layer: int, expert: int) -> list[Extent]:
        return [
            Extent(span.path, span.offset, sum(n for _, n in span.pieces))
            for span in self._streamer.store.spans(layer, expert)
        ]


class MlxVlm(MlxLm):
    """mlx-vlm: the plain checkpoint if resident, else its own repacked copy."""

    def __init__(self, traced: TracedModel, side: Side, plan: Plan):
        from mlx_vlm.moe_offload import patch_model
        from mlx_vlm.utils import load_model

        # mlx-vlm's loader of repacked copies refuses models without images.
        self.model, self._store = load_model(traced.plain, lazy=True), None
        if side.share is not None:
            copy = repacked(traced)
            self._files = expert_files(copy)
            self._headers = [read_header(file) for file in self._files]
            n_bytes = sum(
                e.n_bytes for header in self._headers for e in header.values()
            )
            self._store = patch_model(
                self.model, str(copy), expert_cache_gb=n_bytes * side.share / 100 / 1e9
            )
            self._before = Counters()
        mx.eval(self.model.parameters())

    def begin(self) -> None:
        self._text = getattr(self.model, "language_model", self.model)
        self._cache = make_prompt_cache(self._text)

    def step(self, token: int) -> mx.array:
        out = self._text(mx.array([[token]]), cache=self._cache)
        return getattr(out, "logits", out)[0, -1].astype(mx.float32)

    def take_counters(self) -> Counters:
        if self._store is None:
            return Counters()
        stats, before = self._store.stats(), self._before
        each = stats["resident_bytes"] // max(1, stats["resident_experts"])
        self._before = Counters(stats["hits"], stats["misses"])
        misses = stats["misses"] - before.misses
        return Counters(stats["hits"] - before.hits, misses, read_bytes=misses * each)

    def files(self) -> list[Path]:
        return [] if self._store is None else self._files

    def extents(self, layer: int, expert: int) -> list[Extent]:
        header = self._headers[layer]
        # mlx-vlm parses the header again for every read.
        found = [
            Extent(entry.file, 0, entry.offset) for entry in [*header.values()][:1]
        ]
        own = [e for name, e in header.items() if name.startswith(f"e{expert}.")]
        return found + [
            Extent(entry.file, entry.offset, entry.n_bytes) for entry in own
        ]


ENGINES = {"mlx-lm": MlxLm, "ours": Ours, "mlx-vlm": MlxVlm}


def memory_for(packed: Path, share: float) -> int:
    """Return the ``expert_memory=`` that holds ``share`` % of a pack's experts."""
    summary = summarize(packed)
    n_slots = round(summary.n_moe_layers * summary.n_experts * share / 100)
    return n_slots * summary.bytes_per_expert + POOL_ALIGNMENT


def door_memory_for(plain: Path, share: float) -> int:
    """Return the ``expert_memory=`` for ``share`` % of a checkpoint's experts."""
    model, _ = load_model(plain, lazy=True)
    checkpoint = Checkpoint.open(plain)
    sources = unchanged(checkpoint, model.sanitize)
    with ModuleExperts(find_blocks(model), checkpoint, sources) as store:
        n_records = sum(store.count(layer) for layer in store.layers)
        stride = max(store.layout(layer).stride for layer in store.layers)
    return round(n_records * share / 100) * stride + POOL_ALIGNMENT


def has_mlx_vlm() -> bool:
    """Tell whether mlx-vlm is installed."""
    return find_spec("mlx_vlm") is not None


def repacked(traced: TracedModel) -> Path:
    """Return mlx-vlm's own copy of the checkpoint, made unless it is there."""
    from mlx_vlm.moe_offload import repack

    path = traced.plain.with_name("mlx-vlm")
    # mlx-vlm writes the index last.
    if not (path / "offload_index.json").is_file():
        with redirect_stdout(StringIO()):
            repack(str(traced.plain), str(path))
    return path


def expert_files(path: Path) -> list[Path]:
    """Return the files of mlx-vlm's copy that hold experts."""
    return sorted((path / "experts").glob("layer_*.safetensors"))


class Follower:
    """One side, following traces step by step."""

    def __init__(self, side: Side, traced: TracedModel, plan: Plan):
        # With this variable even the resident side would stream its experts.
        os.environ.pop("MOEFLUX_MEMORY", None)
        mx.set_default_device(mx.gpu if plan.device == "gpu" else mx.cpu)
        self._side, self._traced, self._plan = side, traced, plan
        kind = ENGINES[side.engine]
        if kind is Ours and not traced.native:
            kind = Door
        self._engine = kind(traced, side, plan)
        self._files = self._engine.files()
        # Compile kernels now, while the other sides do so too.
        self._engine.begin()
        mx.eval(self._engine.step(traced.tokens(plan.traces[0])[0]))

    def step(self, trace: str, i: int) -> Step:
        """Run step ``i`` of a trace in the plan's state of the page cache.

        Step 0 begins a new sequence.

        Raises:
            RuntimeError: the model chooses other experts than the trace.
        """
        engine = self._engine
        if i == 0:
            self._check_routing(trace)
            engine.begin()
        self._prepare(self._traced.routing[trace][i], self._plan.state(i))
        engine.take_counters()
        token = self._traced.tokens(trace)[i]
        start = time.perf_counter(), time.process_time()
        logits = engine.step(token)
        mx.eval(logits)
        took = time.perf_counter() - start[0], time.process_time() - start[1]
        return Step(*took, engine.take_counters(), np.array(logits))

    def _check_routing(self, trace: str) -> None:
        if not isinstance(self._engine, Ours) or self._side.share is not None:
            return
        tokens = self._traced.tokens(trace)[:CHECKED_STEPS]
        record = record_routing if self._traced.native else record_choices
        found = record(self._engine.model, tokens)
        wanted = self._traced.routing[trace][:CHECKED_STEPS]
        if (np.sort(found) != np.sort(wanted)).any():
            raise RuntimeError(f"[{trace}] expected the trace's experts to be chosen")

    def _prepare(self, chosen: np.ndarray, state: str) -> None:
        """Read a step's experts ``[layers, K]`` into the page cache, or drop all."""
        if state == "cold":
            drop(self._files)
        if state == "warm" and self._files:
            for layer, experts in enumerate(chosen.tolist()):
                for expert in experts:
                    fill(self._engine.extents(layer, expert))


_follower: Follower


def open_follower(side: Side, traced: TracedModel, plan: Plan) -> None:
    """Open one side in this process."""
    global _follower
    _follower = Follower(side, traced, plan)


def follow(trace: str, i: int) -> Step:
    """Run a step of this process's side."""
    return _follower.step(trace, i)
