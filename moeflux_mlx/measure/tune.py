"""Find the fastest correct way of every Op of a model on this device."""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from ..device import machine_name, mlx_version
from ..engine.executors.kernels import KernelExecutor
from ..engine.graph.lower import Kernel
from ..engine.graph.op import Op
from ..engine.lowering import ways
from ..engine.lowering.tuned import Entry, Tuning, n_tokens_of, shape_of
from ..engine.runtime import Runtime
from ..errors import BackendError, ConfigError
from .choices import Choice, Collector, Key
from .recording import filled_caches, hearing, observing, prompt, resident_runtime_of
from .timing import StepTimer, timer_for

# A way must save this share of the default's time to replace it; less is noise.
MARGIN = 0.05
# Measurements of a way in each of its turns.
PER_TURN = 3
PROMPTS = (64, 512, 2048)
Progress = Callable[[Sequence[Choice], str], Iterable[Choice]]


def decide(default: str, costs: Mapping[str, float], margin: float = MARGIN) -> str:
    """Return the winner: the cheapest way if it beats the default by the margin.

    Args:
        default: the way without tuning; ``costs`` need not contain it.
        costs: microseconds of every correct way, at least one.
        margin: share of the default's cost.
    """
    best = min(costs, key=lambda way: costs[way])
    if default not in costs or costs[best] < (1 - margin) * costs[default]:
        return best
    return default


def tune(
    model: Any,
    *,
    prompts: Sequence[int] = PROMPTS,
    context: int = 512,
    repeats: int = 3,
    timer: StepTimer | None = None,
    progress: Progress = lambda choices, _: choices,
    keep: Callable[[Tuning], None] = lambda found: None,
) -> Tuning:
    """Time every way of every Op and every fusion of a loaded model.

    The ways are timed for one token after ``context`` tokens, and for prompts of the
    lengths ``prompts``. A way is refused if it raises, or if its result is further from
    the Op's reference than ``moeflux doctor`` allows.

    Args:
        model: the model, with all experts in memory.
        prompts: lengths of prompts in tokens.
        context: tokens in the caches before the single token.
        repeats: turns of each way; the median is used. All ways of an Op are compiled
            first and then take turns, so that a device whose speed drifts favours none.
        timer: default: the one that fits the model's executor.
        progress: wraps the choices while they are tried; also receives their subject.
        keep: receives each winner when it is found, as a tuning with one entry.

    Raises:
        BackendError: the model's executor has no kernels.
        ModelError: the model is not one of ours, or its experts are not all in memory.
        ConfigError: a number is out of range.
    """
    for name, least, values in (("--repeats", 1, [repeats]), ("--prompts", 2, prompts)):
        if any(value < least for value in values):
            raise ConfigError(f"[{name}] expected at least {least} but got {values}")
    runtime = resident_runtime_of(model)
    if not isinstance(runtime.executor, KernelExecutor):
        raise BackendError(
            "[tune] expected an executor with kernels, metal, cuda or sim, but got "
            f"{runtime.executor.name!r}: set MOEFLUX_EXECUTOR"
        )
    model.eval()
    timer = timer or timer_for(runtime.executor, PER_TURN)
    tuner = Tuner(runtime, timer, repeats, keep)
    caches = filled_caches(model, context)
    tuner.tune(model, mx.array([[1]]), caches, "one token", progress)
    del caches
    vocab_size = model.needs.vocab_size
    for n_tokens in sorted(set(prompts)):
        tokens, caches = prompt(n_tokens, vocab_size), make_prompt_cache(model)
        tuner.tune(model, tokens, caches, f"{n_tokens} tokens", progress)
    return tuner.found(*tuner.entries.values())


class Tuner:
    """Time choices and remember the winners, which compete with fusions."""

    def __init__(
        self,
        runtime: Runtime,
        timer: StepTimer,
        repeats: int,
        keep: Callable[[Tuning], None],
    ):
        assert isinstance(runtime.executor, KernelExecutor)
        self.entries: dict[Key, Entry] = {}
        self._runtime, self._timer, self._keep = runtime, timer, keep
        self._executor, self._repeats = runtime.executor, repeats
        self._launch_us = round(1e6 * timer.launch_seconds(), 3)

    def found(self, *entries: Entry) -> Tuning:
        """Return a tuning of this device with these entries."""
        return Tuning(
            device=machine_name(),
            executor=self._executor.name,
            mlx=mlx_version(),
            date=datetime.date.today().isoformat(),
            entries=entries,
        )

    def tune(
        self,
        model: Any,
        tokens: mx.array,
        caches: list[Any],
        subject: str,
        progress: Progress,
    ) -> None:
        """Run the model once, and time every choice that is new."""
        collector = Collector(self._runtime, self._best)
        with observing(self._executor, collector):
            mx.eval(model(tokens, cache=caches))
        new = [c for key, c in collector.choices.items() if key not in self.entries]
        # Ops before fusions: the alternative to a fusion is its Ops' fastest ways.
        new.sort(key=lambda choice: choice.is_fusion)
        for choice in progress(new, subject):
            entry = self._try(choice)
            if entry is not None:
                self.entries[choice.key] = entry
                self._keep(self.found(entry))
            choice.samples.clear()

    def _try(self, choice: Choice) -> Entry | None:
        """Check and time every way; return None if none is correct."""
        times: dict[str, list[float]] = {}
        launches: dict[str, int] = {}
        refused: dict[str, str] = {}
        expected = choice.expected()

        def attempt(way: str, act: Callable[[str], str]) -> None:
            # A failing way must not stop the others.
            try:
                wrong = act(way)
            except Exception as error:
                wrong = f"{type(error).__name__}: {error}"
            if wrong:
                refused[way] = wrong

        def check(way: str) -> str:
            launched: list[str] = []
            with hearing(self._executor, launched.append):
                wrong = choice.error(way, expected)
            launches[way] = choice.n_launches(way, launched)
            return wrong

        def take_turn(way: str) -> str:
            timing = self._timer.time(choice.works(way))
            times.setdefault(way, []).append(1e6 * timing.seconds)
            return ""

        for way in choice.ways:
            attempt(way, check)
        for _ in range(self._repeats):
            for way in choice.ways:
                if way not in refused:
                    attempt(way, take_turn)
        right = [way for way in choice.ways if way not in refused]
        if not right:
            return None
        entry = Entry(
            name=choice.name,
            shape=choice.shape,
            n_tokens=choice.n_tokens,
            default=choice.default,
            winner="",
            us={way: round(statistics.median(times[way]), 3) for way in right},
            launches={way: launches[way] for way in right},
            launch_us=self._launch_us,
            refused=refused,
        )
        costs = {way: entry.cost(way) for way in right}
        return replace(entry, winner=decide(choice.default, costs))

    def _best(self, op: Op) -> Kernel:
        """Return the fastest known way of an Op."""
        entry = self.entries.get((op.variant_name, shape_of([op]), n_tokens_of([op])))
        default = self._executor.default_way(op)
        by_name = {way.name: way for way in ways(op)}
        chosen = by_name[entry.winner] if entry else default
        return partial(chosen.call, op, self._executor.run)
