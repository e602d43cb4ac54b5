"""Memory plans for mlx-lm's models: those from headers equal the measured ones."""

from __future__ import annotations

import gc
import json
import re
import threading
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.utils import load_model
from tiny import write_tokenizer

import moeflux_mlx
from moeflux_mlx import device
from moeflux_mlx.calls.call_pieces import CallPieces
from moeflux_mlx.calls.measured_needs import MeasuredNeeds
from moeflux_mlx.calls.measured_scratch import ScratchMeasure
from moeflux_mlx.cli import main as moeflux
from moeflux_mlx.errors import BudgetError
from moeflux_mlx.experts.files.pack import pack
from moeflux_mlx.loading import plan_load
from moeflux_mlx.memory.preflight import UNASKED_TOKENS
from moeflux_mlx.memory.steady import STEADY
from moeflux_mlx.opening.stock_model import load_stock_lazily
from moeflux_mlx.streaming import plan_stream, stream

ROOT = Path(__file__).resolve().parents[1]
VOCAB = 128
TOKENS = mx.array([[7, 31, 100, 5, 90]])


@pytest.fixture(scope="module", autouse=True)
def scripts():
    """Make the scripts' modules importable."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Callable[..., Path]:
    """Tiny models on disk, by family, plain or packed."""
    import family_trials

    @cache
    def write(family: str, packed: bool = False) -> Path:
        if packed:
            plain = write(family)
            pack(plain, plain.with_name("packed"))
            return plain.with_name("packed")
        path = tmp_path_factory.mktemp("door-plan") / "plain"
        path.mkdir()
        family_trials.write_model(path, family, 4)
        write_tokenizer(path, VOCAB)
        return path

    return write


@pytest.fixture
def own_bytes(monkeypatch):
    """Pretend that the interpreter's memory is constant: that of the tests grows."""
    for name in (
        "moeflux_mlx.memory.plan.own_bytes",
        "moeflux_mlx.streaming.own_bytes",
    ):
        monkeypatch.setattr(name, lambda: 100 << 20)


FAMILIES = ["qwen3_moe", "gpt_oss", "qwen3_next", "deepseek_v3", "glm4_moe"]


@pytest.mark.sampled
@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_without_weights_is_the_measured_one(written, family, own_bytes):
    path = written(family, packed=family == "gpt_oss")
    ratios = []
    # MLX's threads free memory at varying times, so peaks vary.
    while not any(0.8 < ratio < 1.25 for ratio in ratios):
        assert len(ratios) < 4, ratios
        other = asdict(plan_load(path, "4GB"))
        model = stream(load_stock_lazily(path).model, path, memory="4GB")
        measured = asdict(model.plan)
        ratios.append(other.pop("scratch_bytes") / measured.pop("scratch_bytes"))
        assert other == measured


def test_the_collector_frees_nothing_while_memory_is_measured(written, monkeypatch):
    """A model that it freed meanwhile made the plan's scratch half as large."""
    measure, enabled = ScratchMeasure._peaks, []

    def watched(self, *sizes):
        enabled.append(gc.isenabled())
        return measure(self, *sizes)

    monkeypatch.setattr(ScratchMeasure, "_peaks", watched)
    plan_load(written("qwen3_moe"), "4GB")
    assert enabled and not any(enabled) and gc.isenabled()
    # Two measurements overlap, and the one that began first ends first.
    inside, ended = threading.Event(), threading.Event()

    def other() -> None:
        with STEADY:
            inside.set()
            ended.wait(60)

    thread = threading.Thread(target=other)
    with STEADY:
        thread.start()
        assert inside.wait(60)
    assert not gc.isenabled()
    ended.set()
    thread.join()
    assert gc.isenabled()


def test_planning_leaves_a_model_as_it_was(written):
    path = written("qwen3_moe")
    model, stock = load_stock_lazily(path).model, load_model(path)[0]
    kinds = [type(module) for module in model.modules()]
    plan_stream(model, path, "4GB")
    assert [type(module) for module in model.modules()] == kinds
    assert mx.array_equal(model(TOKENS), stock(TOKENS))
    with pytest.raises(BudgetError, match=r"\[memory\] expected at least"):
        plan_stream(model, path, 1)
    streamed = stream(model, path, memory="4GB")
    assert mx.array_equal(streamed(TOKENS), stock(TOKENS))


@pytest.mark.slow
def test_a_published_model_is_planned_from_its_headers(tmp_path, capsys, monkeypatch):
    """Planning reads no weight: the file of 17 GB has no contents."""
    import real_sizes

    name = "Qwen3-30B-A3B"
    # Our own class steps aside for this setting, which mlx-lm's class ignores.
    config = {**real_sizes.MODELS[name], "use_sliding_window": True}
    monkeypatch.setitem(real_sizes.MODELS, name, config)
    real_sizes.write_sparse(tmp_path, name)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    command = ["inspect", str(tmp_path), "--memory", "12GB", "--json"]
    assert moeflux(command) == 0
    found = json.loads(capsys.readouterr().out)
    plan = found["plan"]
    assert mx.get_peak_memory() - before < found["resident_bytes"] / 2
    assert plan["resident_bytes"] == found["resident_bytes"]
    assert plan["n_experts"] == 48 * 128
    # Keys and values of 48 layers, 4 heads of 128 bfloat16 each, for 256 tokens.
    assert plan["cache_bytes"] == 256 * 48 * 2 * 4 * 128 * 2
    parts = ("process", "resident", "scratch", "cache", "expert")
    total = sum(plan[f"{name}_bytes"] for name in parts)
    assert 12e9 - found["bytes_per_expert"] < total <= 12e9
    # At least the scores of 32 heads for 2048 tokens, and at most a few copies.
    scores = 32 * 2048 * 256 * 2
    assert scores < plan["scratch_bytes"] < 40 * scores


class Cache:
    """A cache that counts tokens."""

    max_size, offset = None, 0

    def __init__(self, max_size: int | None = None):
        self.max_size = max_size


def last_new(layers: str, *, tail: str = "") -> int | None:
    """Return ``last_new`` after a call of layers; lower-case kinds have windows."""
    caches = [Cache(32 if kind.islower() else None) for kind in layers + tail]
    pieces = CallPieces(caches)
    for number, kind in enumerate(layers):
        caches[number].offset += 1
        pieces.heard(mx.array, (ord(kind.upper()),))
        pieces.watch(True, [])
    for number in range(len(tail)):
        caches[len(layers) + number].offset += 1
    return pieces.last_new()


@pytest.mark.parametrize(
    ("layers", "last"),
    [("AAAA", 0), ("ABBB", 1), ("AaAa", 1), ("AAABAAAB", 3), ("AAAAC", 4)],
)
def test_layers_of_each_kind_are_measured_once(layers, last):
    assert last_new(layers) == last


def test_attention_after_the_last_experts_is_measured_too():
    assert last_new("AAAA", tail="A") is None


def test_unbounded_experts_leave_memory_for_the_rest(written, monkeypatch):
    path = written("qwen3_moe", packed=True)
    # Measured peaks differ from call to call.
    monkeypatch.setattr(MeasuredNeeds, "scratch_bytes", lambda *_: 1 << 20)
    needs = stream(load_stock_lazily(path).model, path).needs
    others = needs.resident_bytes(False) + device.PROCESS_GROWTH_BYTES
    others += needs.cache_state_bytes + UNASKED_TOKENS * needs.cache_row_bytes
    others += needs.scratch_bytes(UNASKED_TOKENS, UNASKED_TOKENS)
    # All experts take 5 MB.
    monkeypatch.setattr(device, "left_bytes", lambda: others + (8 << 20))
    assert moeflux_mlx.load(path, native=False)[0].streamer.resident
    monkeypatch.setattr(device, "left_bytes", lambda: others + (1 << 20))
    with pytest.raises(BudgetError, match=r"\[expert_memory\] expected at least"):
        moeflux_mlx.load(path, native=False)


@pytest.mark.parametrize("packed", [False, True])
def test_a_model_larger_than_memory_is_reported_before_loading(
    written, packed, monkeypatch
):
    path = written("qwen3_moe", packed=packed)
    before = mx.get_active_memory()
    monkeypatch.setattr(device, "left_bytes", lambda: 30_000)
    why = rf"\[load\] {re.escape(str(path))}: expected .* with --memory"
    with pytest.raises(BudgetError, match=why):
        moeflux_mlx.load(path, native=False)
    with pytest.raises(BudgetError, match=why):
        stream(load_stock_lazily(path).model, path)
    assert mx.get_active_memory() <= before + 1000
