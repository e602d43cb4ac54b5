"""Rounds of ``scripts/soak``: generation while everything around it goes wrong.

Every round continues prompts greedily by a streamed model while budgets change at
random. The round's ``Hardship`` adds reads that fail, are interrupted or come short,
Ctrl-C at random moments, requests at the same time in other threads, and states that
are saved and loaded in the middle. A failed call is made again, as a user would do.
Every token must be the resident model's.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import gc
import itertools
import os
import queue
import random
import signal
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_tokenizer

import moeflux_mlx
from moeflux_mlx.errors import ExpertStoreError

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent
N_PROMPTS, PROMPT_TOKENS = 5, 16
# Share of the first rounds during which caches fill, not looked at for growth.
SETTLING = 1 / 3
# A call is made again so often before the soak gives up on it.
MOST_TRIES = 50
# Reads of a round with faults that fail, and that come short. A prompt of a plain model
# takes thousands of reads: with more failures it would never end.
FAILED_SHARE, SHORT_SHARE = 0.002, 0.01
# Ctrl-C comes once in so many seconds, on average, in a round that has it.
INTERRUPT_SECONDS = 0.3
# How many requests at the same time a round may have.
N_THREADS = (1, 2, 4)
# Another budget, or another state, after so many tokens on average.
CHANGE_TOKENS = 8


class WrongToken(Exception):
    """A token that the resident model would not give."""


@dataclass(frozen=True)
class Hardship:
    """What a round adds to changing budgets."""

    faults: bool
    interrupts: bool
    states: bool
    n_threads: int

    @classmethod
    def draw(cls, chance: random.Random) -> Hardship:
        """Choose at random."""
        faults, interrupts, states = (chance.random() < 0.5 for _ in range(3))
        return cls(faults, interrupts, states, chance.choice(N_THREADS))


@dataclass
class Tally:
    """What happened so far, by name, and bytes held after each round."""

    counts: Counter[str] = field(default_factory=Counter)
    memory: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        return ", ".join(f"{n} {name}" for name, n in self.counts.items())


class Soak:
    """Rounds of one model directory, each by one of several ways to stream it.

    Args:
        directory: a packed or plain model.
        ways: arguments of ``moeflux_mlx.load`` that take turns.
        n_tokens: how far prompts are continued.
        seed: decides everything but the moments at which things happen.
    """

    def __init__(
        self, directory: Path, ways: list[dict[str, Any]], n_tokens: int, seed: int
    ):
        self._chance = random.Random(seed)
        self._n_tokens = n_tokens
        self._prompts = prompts_of(directory)
        # Mapped experts cannot be taken away, and those of a plain model are streamed
        # only if something bounds them.
        common = {"expert_io": "pread", "expert_memory": "8GB"}
        resident = moeflux_mlx.load(directory, **common)[0]
        self.expected = {p: continued(resident, p, n_tokens) for p in self._prompts}
        resident.streamer.close()
        self.models = [moeflux_mlx.load(directory, **common, **way)[0] for way in ways]
        self._states = tempfile.TemporaryDirectory(prefix="moeflux-soak-")
        self._bell = Bell()
        self._others = Others(max(N_THREADS) - 1)
        self.tally = Tally()

    def run(self, seconds: float) -> None:
        """Do rounds until the time is over, at least one by every way.

        Raises:
            WrongToken: names the prompt, the token's place and what was going on.
        """
        end = time.monotonic() + seconds
        for n, model in enumerate(itertools.cycle(self.models)):
            if n >= len(self.models) and time.monotonic() > end:
                return
            self.round(model, Hardship.draw(self._chance))

    def round(self, model: Any, hardship: Hardship) -> None:
        """Continue a prompt in each thread."""
        chances = [random.Random(self._chance.random()) for _ in range(8)]
        prompts = [self._chance.choice(self._prompts) for _ in range(8)]
        failures: list[BaseException] = []

        def work(n: int) -> None:
            try:
                self._continue(model, prompts[n], hardship, chances[n])
            except BaseException as error:
                failures.append(error)

        with failing_reads(hardship.faults, chances[-1], self.tally):
            self._others.begin(work, range(1, hardship.n_threads))
            with self._bell.ringing(hardship.interrupts):
                work(0)
            self._others.wait()
        if failures:
            raise failures[0]
        self._look_at_memory(model)

    def _continue(
        self,
        model: Any,
        prompt: tuple[int, ...],
        hardship: Hardship,
        chance: random.Random,
    ) -> None:
        cache, tokens = make_prompt_cache(model), list(prompt)
        done: list[int] = []
        path = Path(self._states.name) / f"{threading.get_ident()}"
        for place, wanted in enumerate(self.expected[prompt]):
            if chance.random() < 1 / CHANGE_TOKENS:
                self._again(lambda: self._resize(model, chance))
            if hardship.states and place and chance.random() < 1 / CHANGE_TOKENS:
                seen = [*prompt, *done[:-1]]
                cache = self._again(
                    lambda c=cache, s=seen: self._through_file(model, path, c, s)
                )
            token = self._again(
                lambda t=tokens, c=cache: next_token(model, t, c),
                moeflux_mlx.CacheCheckpoint.take(cache).restore,
            )
            if token != wanted:
                raise WrongToken(
                    f"token {place} after {prompt[:4]}... is {token}, expected "
                    f"{wanted}, with {hardship}"
                )
            self.tally.counts["tokens"] += 1
            tokens = [token]
            done.append(token)

    def _again(
        self, call: Callable[[], T], restore: Callable[[], None] = lambda: None
    ) -> T:
        """Make a call until neither a read nor Ctrl-C ends it.

        Args:
            restore: takes back the work of a call that Ctrl-C ended as it returned.
        """
        last: BaseException | None = None
        for n_failed in range(MOST_TRIES):
            try:
                with self._bell.during_call(n_failed):
                    return call()
            except ExpertStoreError as error:
                self.tally.counts["failed calls"] += 1
                last = error
            except KeyboardInterrupt as error:
                self.tally.counts["interrupted calls"] += 1
                last = error
            restore()
        raise WrongToken(f"a call failed {MOST_TRIES} times, lastly by {last!r}")

    def _resize(self, model: Any, chance: random.Random) -> None:
        streamer = model.streamer
        most = streamer.most_slots
        n_slots = chance.choice(
            (streamer.least_slots, most, chance.randint(streamer.least_slots, most))
        )
        streamer.resize(n_slots)
        self.tally.counts["budgets"] += 1

    def _through_file(
        self, model: Any, path: Path, cache: list[Any], tokens: list[int]
    ) -> list[Any]:
        moeflux_mlx.save_state(path, model, cache, tokens)
        loaded = moeflux_mlx.load_state(path, model)
        if loaded.tokens != tokens:
            raise WrongToken(f"a state has {loaded.tokens}, expected {tokens}")
        self.tally.counts["states"] += 1
        return loaded.cache

    def _look_at_memory(self, model: Any) -> None:
        model.streamer.resize(model.streamer.least_slots)
        gc.collect()
        mx.clear_cache()
        self.tally.memory.append(process_bytes() + device_bytes())


def next_token(model: Any, tokens: list[int], cache: list[Any]) -> int:
    """Return the likeliest token after ``tokens``; a failed call leaves the cache."""
    return int(mx.argmax(model(mx.array([tokens]), cache=cache)[0, -1]))


def continued(model: Any, prompt: tuple[int, ...], n_tokens: int) -> list[int]:
    """Return ``n_tokens`` of greedy decoding after a prompt."""
    cache, tokens, out = make_prompt_cache(model), list(prompt), []
    for _ in range(n_tokens):
        tokens = [next_token(model, tokens, cache)]
        out += tokens
    return out


def prompts_of(model: Path) -> list[tuple[int, ...]]:
    """Return the first tokens of some files of the package."""
    tokenizer = load_tokenizer(model)
    files = sorted((ROOT / "moeflux_mlx").glob("*.py"))[-N_PROMPTS:]
    texts = (path.read_text()[: 8 * PROMPT_TOKENS] for path in files)
    return [tuple(tokenizer.encode(text)[:PROMPT_TOKENS]) for text in texts]


class Others:
    """Threads beside the main one, the same ones in each round.

    MLX keeps about a megabyte of every thread that ever computed. They are daemons that
    never end: a thread's compiled functions take Python's lock as the thread ends. This
    aborts a process whose interpreter ends at that moment (MLX 0.32.4).
    """

    def __init__(self, n_threads: int):
        self._calls: queue.Queue[Callable[[], None]] = queue.Queue()
        for _ in range(n_threads):
            threading.Thread(target=self._work, daemon=True).start()

    def begin(self, function: Callable[[int], None], numbers: Iterable[int]) -> None:
        """Call ``function``, which must not raise, with each number, in any thread."""
        for number in numbers:
            self._calls.put(functools.partial(function, number))

    def wait(self) -> None:
        """Return when every call has ended."""
        self._calls.join()

    def _work(self) -> None:
        while True:
            self._calls.get()()
            self._calls.task_done()


@contextlib.contextmanager
def failing_reads(wanted: bool, chance: random.Random, tally: Tally) -> Iterator[None]:
    """Let some reads of the block fail or come short, if that is ``wanted``."""
    preadv = os.preadv

    def read(fd: int, buffers: Any, offset: int, *flags: int) -> int:
        fate = chance.random()
        if fate < FAILED_SHARE:
            tally.counts["failed reads"] += 1
            code = errno.EIO if fate < FAILED_SHARE / 2 else errno.EINTR
            raise OSError(code, os.strerror(code))
        if fate < FAILED_SHARE + SHORT_SHARE:
            tally.counts["short reads"] += 1
            first = memoryview(buffers[0])
            return preadv(fd, [first[: max(1, len(first) // 2)]], offset, *flags)
        return preadv(fd, buffers, offset, *flags)

    if not wanted:
        yield
        return
    os.preadv = read
    try:
        yield
    finally:
        os.preadv = preadv


class Bell:
    """Ctrl-C again and again while on, but only in calls of the main thread.

    Outside of calls nobody would make up for an interrupt.
    """

    def __init__(self) -> None:
        self._in_call = False
        self._mean_seconds = INTERRUPT_SECONDS

    @contextlib.contextmanager
    def during_call(self, n_failed: int) -> Iterator[None]:
        """Let Ctrl-C come in the block, the later the more often the call failed."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # On a busy machine a prompt may take longer than it is left alone at first.
        self._mean_seconds = INTERRUPT_SECONDS * 1.5**n_failed
        try:
            self._in_call = True
            yield
        finally:
            self._in_call = False

    @contextlib.contextmanager
    def ringing(self, wanted: bool) -> Iterator[None]:
        """Be on in the block, if that is ``wanted``."""
        if not wanted:
            yield
            return
        before = signal.signal(signal.SIGALRM, self._ring)
        self._arm()
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def _arm(self) -> None:
        # Never at equal distances: a call that takes longer would never end.
        delay = random.expovariate(1 / self._mean_seconds)
        signal.setitimer(signal.ITIMER_REAL, min(max(1e-3, delay), 60))

    def _ring(self, *_: object) -> None:
        self._arm()
        if self._in_call:
            self._in_call = False
            raise KeyboardInterrupt


def growth(memory: list[int]) -> float:
    """Return the slope of the straight line nearest to ``memory``, bytes a round.

    The first rounds are left out: caches fill during them.
    """
    settled = memory[int(SETTLING * len(memory)) :]
    if len(settled) < 2:
        return 0.0
    return float(np.polyfit(np.arange(len(settled)), settled, 1)[0])


def n_open_files() -> int:
    """Return how many descriptors this process has open."""
    return len(os.listdir("/dev/fd"))


class MallInfo(ctypes.Structure):
    """``struct mallinfo2`` of the GNU C library."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks"),
            *("uordblks", "fordblks", "keepcost"),
        )
    )


def process_bytes() -> int:
    """Return how much memory this process holds now.

    Where the C library tells, that is what it gave out: its arenas keep freed memory,
    and with several threads they take minutes to come to their size. Python's objects
    count with ``PYTHONMALLOC=malloc`` alone. Elsewhere it is what is resident.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallinfo2"):
        library.mallinfo2.restype = MallInfo
        info = library.mallinfo2()
        return int(info.uordblks + info.hblkhd)
    command = ["ps", "-o", "rss=", "-p", str(os.getpid())]
    return int(subprocess.run(command, capture_output=True, text=True).stdout) << 10


def device_bytes() -> int:
    """Return what MLX holds in memory of its own, none on a CPU."""
    return 0 if mx.default_device() == mx.Device(mx.cpu) else mx.get_active_memory()
