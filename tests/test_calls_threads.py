"""Several threads may call one model: each gets the tokens of a model of its own."""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from test_steps import Lazy, Traced

import moeflux_mlx
from moeflux_mlx.engine.executors import EXECUTORS
from moeflux_mlx.errors import ExpertStoreError
from moeflux_mlx.experts.files.packed import PackedExperts
from moeflux_mlx.experts.files.reader import Read
from moeflux_mlx.experts.pool.pool import POOL_ALIGNMENT

N_TOKENS = 3
N_THREADS = 2, 8


@pytest.fixture(autouse=True)
def executors(monkeypatch):
    for executor in (Lazy, Traced):
        monkeypatch.setitem(EXECUTORS, executor.name, executor)


@pytest.fixture(scope="module")
def expected(checkpoint) -> Callable[[int], list[np.ndarray]]:
    """Return a sequence's logits from a resident model in one thread."""
    model, _ = moeflux_mlx.load(checkpoint)
    found: dict[int, list[np.ndarray]] = {}

    def of(number: int) -> list[np.ndarray]:
        if number not in found:
            found[number] = [np.array(x) for x in sequence(model, number)]
        return found[number]

    for number in range(8):
        of(number)
    return of


def sequence(model, number: int) -> Iterator[mx.array]:
    """Yield the lazy logits of a prompt and of single tokens after it.

    Even sequences have a cache, odd ones are separate calls; some pass embeddings.
    """
    ids = np.random.RandomState(number).randint(1, 320, (1, 3 + number + N_TOKENS))
    tokens, n = mx.array(ids), 3 + number
    cache = make_prompt_cache(model) if number % 2 == 0 else None
    for start, stop in itertools.pairwise([0, *range(n, n + N_TOKENS)]):
        yield model(tokens[:, start:stop], cache=cache)


def check(model, number: int, expected, tolerance: float = 0) -> None:
    for got, wanted in zip(sequence(model, number), expected(number), strict=True):
        check_same(np.array(got), wanted, tolerance)


def check_same(got: np.ndarray, wanted: np.ndarray, tolerance: float = 0) -> None:
    assert got.argmax(-1).tolist() == wanted.argmax(-1).tolist()
    off = np.linalg.norm(got - wanted)
    assert off <= tolerance * np.linalg.norm(wanted)


def load(path, checkpoint, n_slots: int | None = 5, **options):
    memory = None
    if n_slots is not None:
        with PackedExperts.open(checkpoint.with_name("packed")) as store:
            memory = POOL_ALIGNMENT + n_slots * store.layout(0).stride
    return moeflux_mlx.load(path, expert_memory=memory, **options)[0]


# Where experts are and how they are read. On the host all give the same bits.
KINDS = {
    "packed": ("packed", dict()),
    "packed-ahead": ("packed", dict(read_ahead="on")),
    "packed-not-ahead": ("packed", dict(read_ahead="off")),
    "packed-layer": ("packed", dict(n_slots=9, scope="layer")),
    "packed-whole": ("packed", dict(n_slots=None)),
    "plain": ("checkpoint", dict()),
    "plain-ahead": ("checkpoint", dict(read_ahead="on")),
    "resident": ("checkpoint", dict(n_slots=None)),
}
LAZY_KINDS = {
    "lazy": dict(executor="lazy"),
    "optimistic": dict(optimistic="on"),
    "optimistic-ahead": dict(optimistic="on", read_ahead="on"),
    "traced": dict(executor="traced"),
    "traced-optimistic-off": dict(executor="traced", optimistic="off"),
    "traced-resident": dict(executor="traced", n_slots=None),
}


def together(n_threads: int, work: Callable[[int], None]) -> None:
    """Run ``work(i)`` in ``n`` threads at once; raise the first failure."""
    begin = threading.Barrier(n_threads)

    def run(i: int) -> None:
        begin.wait()
        work(i)

    with ThreadPoolExecutor(n_threads) as threads:
        for done in [threads.submit(run, i) for i in range(n_threads)]:
            done.result()


@pytest.mark.sampled
@pytest.mark.parametrize("kind", KINDS)
def test_threads_get_the_bits_of_a_model_alone(
    kind, request, checkpoint, packed, expected
):
    name, options = KINDS[kind]
    model = load(request.getfixturevalue(name), checkpoint, **options)
    for n_threads in N_THREADS:
        together(n_threads, lambda i: check(model, i, expected))
    check(model, 3, expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAZY_KINDS)
def test_lazy_arrays_are_computed_before_another_thread_changes_slots(
    kind, checkpoint, packed, expected
):
    model = load(packed, checkpoint, **LAZY_KINDS[kind])
    alone = {i: [*map(np.array, sequence(model, i))] for i in range(max(N_THREADS))}
    for i, logits in alone.items():
        for got, wanted in zip(logits, expected(i), strict=True):
            check_same(got, wanted, 1e-4)
    for n_threads in N_THREADS:
        together(n_threads, lambda i: check(model, i, alone.get))


def test_lazy_logits_survive_a_call_of_another_thread(checkpoint, packed, expected):
    """Another thread calls before the first thread uses its logits."""
    model = load(packed, checkpoint, executor="lazy")
    called, go_on = threading.Event(), threading.Event()
    found: list[bool] = []

    def first() -> None:
        logits = next(sequence(model, 1))
        called.set()
        go_on.wait()
        check_same(np.array(logits), expected(1)[0], 1e-4)
        found.append(True)

    thread = threading.Thread(target=first)
    thread.start()
    called.wait()
    for number in (2, 3, 5):
        check(model, number, expected, tolerance=1e-4)
    go_on.set()
    thread.join()
    assert found == [True]


def test_rows_of_the_backbone_count_as_a_call_too(checkpoint, packed, expected):
    model = load(packed, checkpoint)
    tokens = mx.array([[9, 8, 7, 6]])
    wanted = np.array(load(checkpoint, checkpoint, None).model(tokens))

    def work(i: int) -> None:
        if i % 2:
            for _ in range(3):
                assert np.array_equal(np.array(model.model(tokens)), wanted)
        else:
            check(model, i, expected)

    together(4, work)


def test_slots_change_only_between_calls(checkpoint, packed, expected, tmp_path):
    """Load states, preload and change memory while other threads generate."""
    model = load(packed, checkpoint, 12)
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([[5, 6]]), cache=cache))

    def work(i: int) -> None:
        if i % 2 == 0:
            check(model, i, expected)
            return
        for round_ in range(6):
            model.streamer.resize(3 + (i + round_) % 9)
            model.streamer.preload(model.streamer.experts[round_::7])
            state = tmp_path / f"{i}"
            moeflux_mlx.save_state(state, model, cache, [5, 6])
            moeflux_mlx.load_state(state, model)

    together(4, work)


def test_coroutines_may_call_in_other_threads(checkpoint, packed, expected):
    model = load(packed, checkpoint, optimistic="on")

    async def serve() -> None:
        async def one(number: int) -> None:
            for _ in range(2):
                await asyncio.to_thread(check, model, number, expected, 1e-4)

        await asyncio.gather(*(one(number) for number in range(4)))

    asyncio.run(serve())


def test_generators_take_turns_in_one_thread(checkpoint, packed, expected):
    model = load(packed, checkpoint)
    running = [sequence(model, number) for number in range(3)]
    lazy = [list(step) for step in zip(*running, strict=True)]
    for i, step in enumerate(lazy):
        for number, got in enumerate(step):
            check_same(np.array(got), expected(number)[i])


def test_a_failed_thread_lets_the_next_one_call(
    checkpoint, packed, expected, monkeypatch
):
    model = load(packed, checkpoint)
    finish, doomed = Read.finish, set()

    def fail(read: Read) -> None:
        if threading.get_ident() in doomed:
            raise ExpertStoreError("[test] this read fails")
        finish(read)

    monkeypatch.setattr(Read, "finish", fail)

    def work(i: int) -> None:
        if i % 2 == 0:
            check(model, i, expected)
            return
        doomed.add(threading.get_ident())
        for _ in range(3):
            with pytest.raises(ExpertStoreError, match="this read fails"):
                list(sequence(model, i))
            # Other threads evict the experts that it needs.
            model.streamer.resize(2)
            model.streamer.resize(5)

    together(4, work)
    check(model, 1, expected)


class Ended(Exception):
    """An error that another thread raises in this one."""


@pytest.mark.sampled
@pytest.mark.parametrize("options", [{}, dict(optimistic="on")], ids=["ops", "on"])
def test_a_thread_ended_anywhere_lets_the_next_one_call(
    checkpoint, packed, expected, options
):
    model = load(packed, checkpoint, **options)
    ended = 0
    for delay in range(8):
        begun = threading.Event()

        def work(begun=begun) -> None:
            nonlocal ended
            try:
                for number in itertools.cycle(range(8)):
                    for _ in sequence(model, number):
                        begun.set()
            except Ended:
                ended += 1
            except ExpertStoreError as error:
                # The read was cut short, and its bytes must not pass for a record.
                assert isinstance(error.__cause__, Ended), error
                ended += 1

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        begun.wait()
        for number in range(delay % 3):
            check(model, number, expected, tolerance=1e-4)
        raise_in(thread, Ended)
        check(model, delay % 8, expected, tolerance=1e-4)
        thread.join(60)
        assert not thread.is_alive()
    assert ended == 8


def raise_in(thread: threading.Thread, error: type[BaseException]) -> None:
    """Raise an error in another thread, at its next bytecode."""
    ident = ctypes.c_ulong(thread.ident)
    n = ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(error))
    assert n == 1


def test_ctrl_c_ends_the_wait_for_another_call(checkpoint, packed, expected):
    model = load(packed, checkpoint)
    held, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with model.runtime.lock:
            held.set()
            go_on.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    main = threading.main_thread().ident
    press = threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT))
    press.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            model(mx.array([[1, 2]]))
    finally:
        go_on.set()
        holder.join()
        press.join()
    check(model, 2, expected)
