"""scripts/bench_streaming: tokens route as traced, and wrong ones yield no figure."""

from __future__ import annotations

import argparse
import csv
import importlib
from collections import OrderedDict
from pathlib import Path
from types import ModuleType

import commands
import numpy as np
import pytest

import moeflux_mlx
from moeflux_mlx.experts.pool.stats import Counters

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(
    hidden_size=128,
    num_attention_heads=4,
    head_dim=64,
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=64,
    linear_value_head_dim=64,
    num_experts=16,
    num_experts_per_tok=4,
    moe_intermediate_size=64,
    shared_expert_intermediate_size=64,
)
N_STEPS = 8


@pytest.fixture
def scripts(monkeypatch) -> None:
    """Make the scripts' modules importable, and add a tiny geometry."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    geometries = importlib.import_module("bench_geometry").GEOMETRIES
    tiny = {**geometries["qwen3.6-35b-a3b"], **TINY}
    monkeypatch.setitem(geometries, "tiny", tiny)


@pytest.fixture
def decode(scripts, monkeypatch) -> ModuleType:
    module = importlib.import_module("streaming_decode")
    monkeypatch.setattr(module, "TRACE_STEPS", N_STEPS)
    monkeypatch.setattr(module, "get_context", lambda _: commands.SERVER)
    return module


def run(part: ModuleType, *flags: object) -> int:
    parser = argparse.ArgumentParser()
    part.add_arguments(parser)
    return part.run(parser.parse_args([str(flag) for flag in flags]))


def hits_of_lru(trace: np.ndarray, n_slots: int, n_warm_up: int) -> float:
    """Return the hit rate after the first steps, with one pool for all layers."""
    held: OrderedDict[tuple[int, int], None] = OrderedDict()
    hits = []
    for step in trace.tolist():
        hits.append(0)
        for layer, experts in enumerate(step):
            asked = [(layer, expert) for expert in sorted(experts)]
            hits[-1] += sum(key in held for key in asked)
            for key in asked:
                held[key] = None
                held.move_to_end(key)
            while len(held) > n_slots:
                held.popitem(last=False)
    return sum(hits[n_warm_up:]) / trace[n_warm_up:].size


@pytest.mark.slow
def test_decoding_is_measured_on_the_traced_routing(decode, tmp_path):
    rows = tmp_path / "rows.csv"
    flags = ["--directory", tmp_path, "--geometry", "tiny", "--layers", 4]
    flags += ["--shares", 50, "--warm-up", 4, "--tokens", 2, "--without-mlx-vlm"]
    flags += ["--policy", "lru", "--read-ahead", "off"]
    assert run(decode, *flags, "--device", "cpu", "--csv", rows) == 0
    found = list(csv.DictReader(rows.read_text().splitlines()))
    sides = ["mlx-lm, resident", "ours, resident", "ours, 50 %"]
    cells = [(t, s) for t in ("zipf", "recorded") for s in ("cold", "warm")]
    assert [(r["trace"], r["state"]) for r in found[::3]] == cells
    assert [row["side"] for row in found] == 4 * sides
    assert all(float(row["tokens_per_s"]) > 0 for row in found)
    traces = importlib.import_module("streaming_model")
    config = traces.geometry_config("tiny", 4)
    for name, trace in traces.make_traces(config, N_STEPS).items():
        ours = [r for r in found if r["trace"] == name and r["side"] == "ours, 50 %"]
        rate = np.mean([float(row["hit_rate"]) for row in ours])
        assert rate == pytest.approx(hits_of_lru(trace, 32, 4), abs=1e-4)
        assert all(float(row["mb_per_token"]) > 0 for row in ours)
        assert all(float(row["recall"]) == 0 for row in ours)
    # The same model with another way of reading.
    flags += ["--read-ahead", "on", "--traces", "zipf"]
    assert run(decode, *flags, "--device", "cpu", "--csv", rows) == 0
    found = list(csv.DictReader(rows.read_text().splitlines()))
    recalls = [float(row["recall"]) for row in found if row["side"] == "ours, 50 %"]
    assert len(recalls) == 2 and min(recalls) > 0


@pytest.mark.slow
def test_tokens_choose_the_experts_of_their_traces(scripts, tmp_path):
    mx = importlib.import_module("mlx.core")
    models = importlib.import_module("streaming_model")
    traced = models.make_model(tmp_path, "tiny", 4, mx.float32, N_STEPS)
    model, _ = moeflux_mlx.load(traced.packed, expert_memory="3MB")
    for name, trace in traced.routing.items():
        found = models.record_routing(model, traced.tokens(name))
        assert np.array_equal(np.sort(found), np.sort(trace))
    again = models.make_model(tmp_path, "tiny", 4, mx.float32, N_STEPS)
    assert again.plain == traced.plain
    assert np.array_equal(again.routing["zipf"], traced.routing["zipf"])


@pytest.mark.slow
def test_tokens_choose_the_experts_of_their_traces_in_mlx_lms_class_too(
    scripts, tmp_path, monkeypatch
):
    models = importlib.import_module("streaming_model")
    sides = importlib.import_module("streaming_side")
    published = models.DOOR_GEOMETRIES["qwen3-30b-a3b"]
    cut = {name: value for name, value in TINY.items() if name in published}
    tiny = {**published, **cut, "num_key_value_heads": 2}
    monkeypatch.setitem(models.DOOR_GEOMETRIES, "tiny door", tiny)
    mx = importlib.import_module("mlx.core")
    traced = models.make_model(tmp_path, "tiny door", 3, mx.float32, N_STEPS)
    assert not traced.native
    plan = sides.Plan(("zipf",), 2, 1, optimistic="on")
    stock = sides.MlxLm(traced, sides.Side("mlx-lm"), plan)
    tokens = traced.tokens("zipf")
    wanted = traced.routing["zipf"]
    found = models.record_choices(stock.model, tokens)
    assert np.array_equal(np.sort(found), np.sort(wanted))
    half = sides.Door(traced, sides.Side("ours", 50.0), plan)
    assert half.model.streamer.n_slots in (23, 24)
    stock.begin()
    half.begin()
    for token, experts in zip(tokens, wanted, strict=True):
        assert mx.array_equal(stock.step(token), half.step(token))
        counted = half.take_counters()
        assert counted.hits + counted.misses == experts.size
    spans = half.extents(1, 2)
    assert {span.path for span in spans} <= set(half.files())
    store = half.model.streamer.store
    assert sum(s.n_bytes for s in spans) == store.layout(1).record_bytes


def test_traces_are_skewed_and_recorded_ones_keep_their_experts(scripts):
    models = importlib.import_module("streaming_model")
    zipf = models.zipf_trace(300, 3, 64, 4)
    assert zipf.shape == (300, 3, 4)
    assert all(len(set(row)) == 4 for row in zipf.reshape(-1, 4).tolist())
    counts = np.sort(np.bincount(zipf[:, 0].ravel(), minlength=64))[::-1]
    assert counts[0] > 2 * counts[7] > 4 * counts[63]
    recorded = models.recorded_trace(9, 10, 32, 4)
    assert np.array_equal(recorded // 8, np.broadcast_to(np.arange(4), (9, 10, 4)))
    assert len(np.unique(recorded)) > 8


def test_no_speed_is_printed_for_wrong_logits(decode):
    side, step = decode.Side, decode.Step
    right, near = np.ones(5, np.float32), np.full(5, 1 + 1e-6, np.float32)

    def runs(logits: np.ndarray) -> list:
        sides = {side("mlx-lm"): right, side("ours", 50.0): near}
        sides[side("ours", 25.0)] = logits
        steps = {s: {"zipf": [step(1.0, 1.0, Counters(), x)]} for s, x in sides.items()}
        return [decode.Run(steps, [1.0])]

    assert decode.disagreement(runs(near), 1e-4) is None
    assert "other bits" in decode.disagreement(runs(right), 1e-4)
    assert "ours, 25 % is off" in decode.disagreement(runs(2 * right), 1e-4)
    assert "is off" in decode.disagreement(runs(np.nan * right), 1e-4)


def test_the_worst_ratio_is_compared_with_its_goal(decode):
    rows = [
        {"side": "ours, 100 %", "of_resident": 1.01},
        {"side": "ours, 50 %", "of_resident": 1.5, "of_mlx_vlm": 0.2, "of_disk": 1.1},
        {"side": "ours, 25 %", "of_mlx_vlm": float("nan")},
        {"side": "mlx-vlm, 50 %", "of_disk": 9.0},
    ]
    found = decode.aims(rows)
    vlm, disk, full = (worst for worst, _ in found.values())
    assert np.isnan(vlm) and (disk, full) == (1.1, 1.01)


@pytest.mark.slow
def test_no_speed_of_drafts_is_printed_for_wrong_tokens(
    scripts, checkpoint, capsys, monkeypatch
):
    part = importlib.import_module("streaming_draft")
    flags = "--model", checkpoint, "--tokens", 8, "--rounds", 1, "--shares", 50
    assert run(part, *flags, "--drafted", 3) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "50 %" in line]
    # No draft, a draft that is right three times of four, and one that is wrong.
    assert [row.split("│")[4].strip() for row in rows[:2]] == ["0%", "75%"]
    assert len(rows) == 3
    monkeypatch.setattr(part, "generate_step", lambda *_, **__: iter([(7, None)] * 8))
    assert run(part, *flags, "--drafted", 3) == 1
    assert "tokens/s" not in capsys.readouterr().out
