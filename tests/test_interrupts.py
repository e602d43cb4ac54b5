"""After Ctrl-C at any moment of a call, the next call in any thread is right."""

from __future__ import annotations

import dis
import functools
import random
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

import moeflux_mlx
from moeflux_mlx.memory.caches import PutBackOnFailure

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
N_MOMENTS = 12
# Six experts of four layers with eight each.
MEMORY = (2 << 20) + 6 * (16 << 10)
# Modules where an interrupt is likely to leave something half done.
WATCHED = tuple(
    str(Path(moeflux_mlx.__file__).parent / name)
    for name in ("", "../models/", "experts/")
)
WAYS = {
    "waiting": {"optimistic": "off"},
    "running ahead": {"optimistic": "on", "read_ahead": "on"},
    "stock": {"native": False},
    "stock running ahead": {"native": False, "optimistic": "on"},
}


# Python checks signals when a function begins, when a loop repeats and after a call.
AFTER_CALL = ("POP_TOP", "RETURN_VALUE")


@functools.cache
def checkpoints(code: CodeType) -> frozenset[int]:
    """Return a function's instructions at which Ctrl-C may be raised."""
    found, before = set(), ""
    for step in dis.get_instructions(code):
        called = before.startswith("CALL") and step.opname.startswith(
            (*AFTER_CALL, "STORE")
        )
        if called or step.opname in ("RESUME", "JUMP_BACKWARD"):
            found.add(step.offset)
        before = step.opname
    return frozenset(found)


@functools.cache
def is_watched(file: str) -> bool:
    """Tell whether a function of this file may be interrupted."""
    return file.startswith(WATCHED) or file.endswith("contextlib.py")


class Clock:
    """Count moments in the package's code in this thread, and interrupt at one."""

    def __init__(self, moment: int | None = None):
        self.n, self._moment = 0, moment

    def _trace(self, frame: FrameType, event: str, _: object) -> Any:
        if not is_watched(frame.f_code.co_filename):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        # Look this up once per call: hashing a function's code is slow.
        points = checkpoints(frame.f_code)

        def step(frame: FrameType, event: str, _: object) -> Any:
            if event == "opcode" and frame.f_lasti in points:
                self.n += 1
                if self.n == self._moment:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return step

        return step

    def run(self, call: Callable[[], object]) -> None:
        sys.settrace(self._trace)
        try:
            call()
        finally:
            sys.settrace(None)


def logits(model: Any, tokens: list[int], cache: list[Any]) -> np.ndarray:
    return np.array(model(mx.array([tokens]), cache=cache)[0, -1])


@pytest.fixture
def in_thread() -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Return a caller in another thread; a lock that is never freed is an error."""
    with ThreadPoolExecutor(1) as pool:
        yield lambda call: pool.submit(call).result(timeout=60)


def moments(n: int) -> Iterator[int]:
    """Choose some of ``n`` moments, those near the ends more often."""
    chance = random.Random(n)
    yield from chance.sample(range(1, n), N_MOMENTS)
    yield from (*range(1, 20, 3), *range(n - 20, n, 2))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_call_interrupted_anywhere_leaves_the_model_and_its_caches_right(
    checkpoint, way, in_thread
):
    options = {"expert_io": "pread", **WAYS[way]}
    model = moeflux_mlx.load(checkpoint, expert_memory=MEMORY, **options)[0]
    assert not model.streamer.resident
    cache, other = make_prompt_cache(model), make_prompt_cache(model)
    logits(model, PROMPT, cache)
    logits(model, PROMPT[:5], other)
    point, other_point = map(moeflux_mlx.CacheCheckpoint.take, (cache, other))
    wanted = logits(model, [7], cache)
    point.restore()
    other_wanted = logits(model, [8], other)
    other_point.restore()
    clock = Clock()
    clock.run(lambda: logits(model, [7], cache))
    point.restore()
    n_interrupted = 0
    for moment in moments(clock.n):
        # Read other experts in between, so that the call must read some.
        model.streamer.preload([(layer, moment % 8) for layer in range(4)])
        held: BaseException | None = None
        try:
            Clock(moment).run(lambda: logits(model, [7], cache))
        except KeyboardInterrupt as interrupt:
            # A kept error keeps every frame in its traceback.
            held = interrupt
            n_interrupted += 1
        found = in_thread(lambda: logits(model, [8], other))
        other_point.restore()
        np.testing.assert_array_equal(found, other_wanted, str(moment))
        point.restore()
        np.testing.assert_array_equal(logits(model, [7], cache), wanted, str(moment))
        point.restore()
        del held
    assert n_interrupted > N_MOMENTS


def test_caches_are_restored_when_a_call_fails_not_when_its_error_is_freed():
    class Cache:
        offset = 0

    one = Cache()
    one.offset = 3
    frames = PutBackOnFailure([one])
    with pytest.raises(ZeroDivisionError), frames:
        one.offset = 4
        raise ZeroDivisionError
    assert one.offset == 3
    one.offset = 5
    del frames
    assert one.offset == 5


@pytest.mark.sampled
@pytest.mark.parametrize("way", WAYS)
def test_lazy_results_survive_the_eviction_of_their_experts(checkpoint, way):
    def run(*, gives_way: bool) -> list[np.ndarray]:
        options = {"expert_io": "pread", **WAYS[way]}
        model = moeflux_mlx.load(checkpoint, expert_memory="8GB", **options)[0]
        assert model.streamer.resident
        cache = make_prompt_cache(model)
        results = [model(mx.array([PROMPT]), cache=cache)]
        results += [model(mx.array([[token]]), cache=cache) for token in range(6)]
        if gives_way:
            model.streamer.resize(model.streamer.least_slots)
            model.streamer.preload([(layer, 7) for layer in range(4)])
        results.append(model(mx.array([[9]]), cache=cache))
        return [*map(np.array, results)]

    for found, wanted in zip(run(gives_way=True), run(gives_way=False), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("way", WAYS)
def test_a_thread_may_shrink_a_pool_that_lazy_results_of_another_read(
    checkpoint, way, in_thread
):
    options = {"expert_io": "pread", **WAYS[way]}
    model = moeflux_mlx.load(checkpoint, expert_memory="8GB", **options)[0]
    wanted = logits(model, PROMPT, make_prompt_cache(model))
    lazy = model(mx.array([PROMPT]), cache=make_prompt_cache(model))

    def shrink() -> None:
        model.streamer.resize(model.streamer.least_slots)
        model.streamer.preload([(layer, 7) for layer in range(4)])

    in_thread(shrink)
    np.testing.assert_array_equal(np.array(lazy[0, -1]), wanted)
