"""The rounds of ``scripts/soak``: generation under faults of every kind.

Every round continues prompts greedily with a streamed model while budgets change at
random. The round's ``Hardship`` adds failing, interrupted and short reads, Ctrl-C at
random moments, concurrent requests in other threads, and states that are saved and
loaded. A failed call is repeated, as a user would do. Every token must equal the
resident model's.
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
# Share of the first rounds that are ignored for growth, because caches fill.
SETTLING = 1 / 3
# Maximum number of attempts of a call.
MOST_TRIES = 50
# Shares of failing and of short reads in a round with faults. A prompt of a plain model
# takes thousands of reads, so with more failures it would never end.
FAILED_SHARE, SHORT_SHARE = 0.002, 0.01
# Average seconds between interrupts in a round with Ctrl-C.
INTERRUPT_SECONDS = 0.3
# Possible numbers of concurrent requests in a round.
N_THREADS = (1, 2, 4)
# Average number of tokens between changes of budget or state.
CHANGE_TOKENS = 8


class WrongToken(Exception):
    """A token differs from the resident model's."""


@dataclass(frozen=True)
class Hardship:
    """The faults of a round, besides changing budgets."""

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
    """Counts of events by name, and the bytes held after each round."""

    counts: Counter[str] = field(default_factory=Counter)
    memory: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        return ", ".join(f"{n} {name}" for name, n in self.counts.items())


class Soak:
    """Rounds of one model directory, with several options of streaming in turn.

    Args:
        directory: a packed or plain model.
        ways: arguments of ``moeflux_mlx.load``, used in turn.
        n_tokens: number of tokens to generate per prompt.
        seed: determines everything except the timing.
    """

    def __init__(
        self, directory: Path, ways: list[dict[str, Any]], n_tokens: int, seed: int
    ):
        self._chance = random.Random(seed)
        self._n_tokens = n_tokens
        self._prompts = prompts_of(directory)
        # Mapped experts cannot be released, and a plain model is streamed only if its
        # memory is bounded.
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
        """Run rounds until the time is over, at least one with every option.

        Raises:
            WrongToken: the message names the prompt, the position and the faults.
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
            restore: undoes a call that Ctrl-C interrupted as it returned.
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
    """Return the most likely next token; a failed call leaves the cache unchanged."""
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
    """Additional threads, the same ones in each round.

    MLX keeps about a megabyte for every thread that ever computed. The threads are
    daemons that never end, because an ending thread's compiled functions take Python's
    lock, which aborts a process whose interpreter ends at that moment (MLX 0.32.4).
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
    """Let some reads within this context fail or come short, if ``wanted``."""
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
    """Repeated Ctrl-C, but only during calls of the main thread.

    Outside calls nothing would handle the interrupt.
    """

    def __init__(self) -> None:
        self._in_call = False
        self._mean_seconds = INTERRUPT_SECONDS

    @contextlib.contextmanager
    def during_call(self, n_failed: int) -> Iterator[None]:
        """Allow Ctrl-C within this context, later the more often the call failed."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # On a busy machine a prompt may take longer than the first interval.
        self._mean_seconds = INTERRUPT_SECONDS * 1.5**n_failed
        try:
            self._in_call = True
            yield
        finally:
            self._in_call = False

    @contextlib.contextmanager
    def ringing(self, wanted: bool) -> Iterator[None]:
        """Send interrupts within this context, if ``wanted``."""
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
        # Vary the interval, or a call that takes longer would never end.
        delay = random.expovariate(1 / self._mean_seconds)
        signal.setitimer(signal.ITIMER_REAL, min(max(1e-3, delay), 60))

    def _ring(self, *_: object) -> None:
        self._arm()
        if self._in_call:
            self._in_call = False
            raise KeyboardInterrupt


def growth(memory: list[int]) -> float:
    """Return the slope of a line fitted to ``memory``, in bytes per round.

    It ignores the first rounds, during which caches fill.
    """
    settled = memory[int(SETTLING * len(memory)) :]
    if len(settled) < 2:
        return 0.0
    return float(np.polyfit(np.arange(len(settled)), settled, 1)[0])


def n_open_files() -> int:
    """Return the number of this process's open descriptors."""
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
    """Return the memory that this process holds now.

    If the C library reports it, this is the allocated memory: arenas keep freed memory,
    and with several threads they take minutes to reach their size. Python's objects
    count only with ``PYTHONMALLOC=malloc``. Elsewhere it is the resident memory.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallinfo2"):
        library.mallinfo2.restype = MallInfo
        info = library.mallinfo2()
        return int(info.uordblks + info.hblkhd)
    command = ["ps", "-o", "rss=", "-p", str(os.getpid())]
    return int(subprocess.run(command, capture_output=True, text=True).stdout) << 10


def device_bytes() -> int:
    """Return the bytes that MLX holds in device memory; 0 on a CPU."""
    return 0 if mx.default_device() == mx.Device(mx.cpu) else mx.get_active_memory()
