"""Find the fastest right way of every Op of a model, on this device."""

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

# By how much of the default's time a way must be faster to displace it: less is noise.
MARGIN = 0.05
# Measurements of a way in a row, each time its turn comes.
PER_TURN = 3
PROMPTS = (64, 512, 2048)
Progress = Callable[[Sequence[Choice], str], Iterable[Choice]]


def decide(default: str, costs: Mapping[str, float], margin: float = MARGIN) -> str:
    """Return the winner: the cheapest way if it beats the default by the margin.

    Args:
        default: the way gone without tuning; it need not be among those timed.
        costs: microseconds of every way that gave right results, at least one.
        margin: share of the default's.
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
    """Time every way of every Op of a loaded model, and of its groups of Ops.

    That is for one token after ``context`` others, and for prompts of the lengths
    ``prompts``. A way takes part if its result is as near to the Op's reference as
    ``moeflux doctor`` asks for; one that is not, or that raises, is refused.

    Args:
        repeats: turns of each way, of which the median counts. All ways of an Op are
            compiled first and then take turns, so that a device that grows faster or
            slower meanwhile favours none.
        timer: by default the one that fits the model's executor.
        progress: wraps choices as they are tried, told what they are of.
        keep: is given each winner when it is found, the entry of a tuning of one.

    Raises:
        BackendError: the model's executor has no kernels.
        ModelError: a model of another package, or one whose experts are not all in
            memory.
        ConfigError: a number that cannot be used.
    """
    for name, least, values in (("--repeats", 1, [repeats]), ("--prompts", 2, prompts)):
        if any(value < least for value in values):
            raise ConfigError(f"[{name}] expected at least {least} but got {values}")
    runtime = resident_runtime_of(model)
    if not isinstance(runtime.executor, KernelExecutor):
        raise BackendError(
            f"[tune] expected executor metal, cuda or sim: {runtime.executor.name!r} "
            "has no kernels"
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
    """Tries choices, and remembers the winners: groups are compared with those."""

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
        """Return entries with their names."""
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
        what: str,
        progress: Progress,
    ) -> None:
        """Run the model once and try every choice it meets and that is new."""
        collector = Collector(self._runtime, self._best)
        with observing(self._executor, collector):
            mx.eval(model(tokens, cache=caches))
        new = [c for key, c in collector.choices.items() if key not in self.entries]
        # Ops before groups, whose Ops go their fastest ways when taken apart.
        new.sort(key=lambda choice: choice.is_group)
        for choice in progress(new, what):
            entry = self._try(choice)
            if entry is not None:
                self.entries[choice.key] = entry
                self._keep(self.found(entry))
            choice.samples.clear()

    def _try(self, choice: Choice) -> Entry | None:
        """Check and time every way; None where none is right."""
        times: dict[str, list[float]] = {}
        launches: dict[str, int] = {}
        refused: dict[str, str] = {}
        expected = choice.expected()

        def attempt(way: str, act: Callable[[str], str]) -> None:
            # Whatever goes wrong with one way, the others are still worth knowing.
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
        """Return the fastest way of an Op, as far as it is known."""
        entry = self.entries.get((op.variant_name, shape_of([op]), n_tokens_of([op])))
        default = self._executor.default_way(op)
        by_name = {way.name: way for way in ways(op)}
        chosen = by_name[entry.winner] if entry else default
        return partial(chosen.call, op, self._executor.run)
