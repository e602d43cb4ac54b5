"""Nothing of a call outlives it but the result and caches that the caller keeps.

The collector is off: no call may leave reference cycles with arrays.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache, make_prompt_cache
from native_models import least, of, simulated, tokens
from test_compiled import Lazy, Traced
from test_native_families import each_family

import moeflux_mlx
from moeflux_mlx.engine.executors import EXECUTORS
from moeflux_mlx.memory.steady import active_bytes
from moeflux_mlx.system import commands

# Far less than a layer's rows of the long prompt below.
FEW_BYTES = 4 << 10
N_TOKENS = 40


@pytest.fixture(autouse=True)
def executors(monkeypatch):
    for executor in (Lazy, Traced):
        monkeypatch.setitem(EXECUTORS, executor.name, executor)


@pytest.fixture(autouse=True)
def uncollected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def left_by(model, n_tokens: int) -> int:
    """Run a prompt and two tokens, drop everything, and return MLX's active bytes."""
    cache = make_prompt_cache(model)
    gone = [weakref.ref(one) for one in cache]
    for n in (n_tokens, 1, 1):
        mx.eval(model(tokens(n), cache=cache))
    del cache
    assert [one() for one in gone] == [None] * len(gone)
    # A call without caches, whose result nobody computes.
    model(tokens(n_tokens))
    return active_bytes()


def check(path, **options) -> None:
    """Check a model after its first calls, which make graphs and tables that stay."""
    model, _ = moeflux_mlx.load(path, **options)
    left_by(model, N_TOKENS)
    few = left_by(model, 1)
    assert left_by(model, N_TOKENS) - few < FEW_BYTES


@each_family
def test_nothing_of_a_call_outlives_it(plain, plain_packed):
    """With all experts in the pool, and with the fewest through the door."""
    check(plain_packed, executor="lazy", expert_memory="1GB")
    fewest = least(plain_packed)
    check(plain_packed, native=False, optimistic="on", expert_memory=fewest)


@of("qwen3_moe", "e8-k2")
@pytest.mark.parametrize(
    "options",
    [
        dict(executor="ops"),
        dict(executor="lazy"),
        dict(executor="traced", optimistic="on"),
        dict(native=False, optimistic="off"),
        pytest.param(dict(executor="sim"), marks=[simulated, pytest.mark.slow]),
    ],
    ids=["ops", "lazy", "compiled", "door", "sim"],
)
def test_no_way_to_run_keeps_a_call(plain, plain_packed, options):
    check(plain, **options)
    for memory in ("1GB", least(plain_packed)):
        check(plain_packed, expert_memory=memory, **options)


def test_a_measurement_waits_for_the_device_to_free_what_it_used(monkeypatch):
    pending = [1000]
    monkeypatch.setattr(mx, "get_active_memory", lambda: 50 + sum(pending))
    monkeypatch.setattr(mx, "synchronize", pending.clear)
    assert active_bytes() == 50


def test_all_code_that_measures_memory_waits():
    """Only the report of a running server does not."""
    package = Path(moeflux_mlx.__file__).parent
    found = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if "get_active_memory" in path.read_text()
    }
    assert found == {"memory/steady.py", "server/metrics.py"}


@pytest.mark.parametrize(
    "look",
    [
        commands.divides_data,
        commands.is_to_be_saved,
        commands.refuse_division_of_layers,
        commands.refuse_quantisers,
        commands.type_of_convert,
    ],
)
def test_a_look_for_commands_keeps_no_local_of_a_user(look):
    """Python keeps all locals of a frame whose ``f_locals`` was read."""
    cache = KVCache()
    gone = weakref.ref(cache)
    look()
    del cache
    assert gone() is None
