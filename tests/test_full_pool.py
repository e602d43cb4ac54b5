"""A token makes the same operations whether all experts are in the pool or resident."""

from __future__ import annotations

import io
import re
from collections import Counter
from pathlib import Path

import mlx.core as mx
import pytest
from native_models import of

import moeflux_mlx
from moeflux_mlx import device

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture
def host(monkeypatch):
    """The bench of the host's work, as on CUDA; nothing is computed."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import bench_host

    with bench_host.as_on_cuda():
        yield bench_host


def operations(*outputs: mx.array) -> Counter[str]:
    text = io.StringIO()
    mx.export_to_dot(text, *outputs)
    return Counter(re.findall(r'label ="([^"]*)", shape=rectangle', text.getvalue()))


def of_token(host, monkeypatch, model) -> Counter[str]:
    steps = host.Steps(model, 300)
    with monkeypatch.context() as patch:
        # Stand-ins cannot be computed, and computed arrays have no operations.
        patch.setattr(mx, "async_eval", lambda *_: None)
        # The first call compiles.
        steps.build()
        return steps.operations()


def both(plain, plain_packed, **options):
    """Return a model with experts among its parameters, and one with a full pool."""
    resident, _ = moeflux_mlx.load(plain, **options)
    pooled, _ = moeflux_mlx.load(plain_packed, expert_memory="1GB", **options)
    assert pooled.streamer.resident
    return resident, pooled


@pytest.mark.parametrize("stacks", [True, False], ids=["stacked", "strided"])
@of("qwen3_moe", "e8-k2")
def test_the_door_adds_only_its_check_of_ids(
    plain, plain_packed, stacks, host, monkeypatch
):
    monkeypatch.setattr(device, "gathers_strided", lambda: not stacks)
    models = both(plain, plain_packed, native=False)
    resident, pooled = (of_token(host, monkeypatch, model) for model in models)
    ids = mx.array([[1]], mx.uint32)
    unchecked, checked = (operations(model.model.embed_tokens(ids)) for model in models)
    more = checked - unchecked
    assert not unchecked - checked and not resident - pooled
    assert pooled - resident == more
    # Two of them are launches on a GPU.
    assert sum(n for name, n in more.items() if not host.is_view(name)) == 2


@of("qwen3_moe", "e8-k2")
def test_our_own_class_adds_nothing(plain, plain_packed, host, monkeypatch):
    models = both(plain, plain_packed, executor=host.NAME)
    resident, pooled = (of_token(host, monkeypatch, model) for model in models)
    assert pooled == resident
