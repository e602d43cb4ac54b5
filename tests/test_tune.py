"""Tuning: its decisions, its file, its refusals, and lowering that follows it."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache

import moeflux_mlx
from moeflux_mlx.cli import main
from moeflux_mlx.cli.tune import print_tuning, wide_console
from moeflux_mlx.device import machine_name, mlx_version
from moeflux_mlx.engine import lowering, simulator
from moeflux_mlx.engine.graph import BufferPool, WeightRef, roles
from moeflux_mlx.engine.lowering import tuned
from moeflux_mlx.engine.lowering.registry import Way
from moeflux_mlx.engine.lowering.tuned import (
    ONE_BY_ONE,
    TOGETHER,
    Entry,
    Tuning,
    shape_of,
)
from moeflux_mlx.errors import BackendError, ConfigError, ModelError
from moeflux_mlx.experts.weights import Quantization
from moeflux_mlx.measure import decide, tune
from moeflux_mlx.measure.timing import StepTimer, Timing, Work
from moeflux_mlx.ops import MatvecNTokens, ResidualAddNTokens

simulated = pytest.mark.skipif(
    not simulator.available(), reason="the simulator needs ziglang and pyelftools"
)


def product(n_tokens: int = 1, out_dim: int = 8) -> MatvecNTokens:
    pool = BufferPool(mx.float32)
    return MatvecNTokens(
        label="product",
        weight=WeightRef("w", (out_dim, 32), Quantization(4, 32), mx.float32),
        input=pool.alloc(roles.AttnOutBuf, (n_tokens, 32), "x"),
        output=pool.alloc(roles.OProjOutBuf, (n_tokens, out_dim), "y"),
        in_dim=32,
        out_dim=out_dim,
        n_tokens=n_tokens,
    )


def product_and_residual() -> list:
    pool = BufferPool(mx.float32)
    a, b, out = (
        pool.alloc(role, (1, 8), role.__name__)
        for role in (roles.OProjOutBuf, roles.HiddenBuf, roles.ResidualBuf)
    )
    first = replace(product(), output=a)
    add = ResidualAddNTokens(label="add", a=a, b=b, out=out, n_tokens=1, dim=8)
    return [first, add]


def entry(ops, winner: str, n_tokens: int = 1, name: str = "") -> Entry:
    name = name or ops[0].variant_name
    us = {winner: 1.0, "default": 2.0}
    return Entry(name, shape_of(ops), n_tokens, "default", winner, us)


def tuning(*entries: Entry, executor: str = "cuda") -> Tuning:
    today = "2026-01-02"
    return Tuning(machine_name(), executor, mlx_version(), today, tuple(entries))


@pytest.fixture
def in_force(tmp_path, monkeypatch):
    """Write a tuning file and put it in force."""

    def use(found: Tuning):
        path = tmp_path / "tuned.json"
        tuned.save(found, path)
        monkeypatch.setenv("MOEFLUX_TUNING", str(path))
        return path

    yield use
    tuned._usable.cache_clear()


@pytest.mark.parametrize(
    ("us", "winner"),
    [
        ({"a": 100.0, "b": 96.0}, "a"),
        ({"a": 100.0, "b": 94.0}, "b"),
        ({"a": 100.0, "b": 94.0, "c": 90.0}, "c"),
        ({"b": 500.0, "c": 400.0}, "c"),
        ({"a": 100.0}, "a"),
    ],
    ids=["within noise", "faster", "fastest", "default is wrong", "no other"],
)
def test_only_a_way_faster_by_the_margin_displaces_the_default(us, winner):
    assert decide("a", us, margin=0.05) == winner


def test_a_way_of_more_launches_costs_the_host_more():
    us, launches = {"one": 10.0, "three": 8.0}, {"one": 1, "three": 3}
    found = Entry("Op", "", 1, "three", "one", us, launches, launch_us=4.0)
    assert (found.cost("one"), found.cost("three")) == (14.0, 20.0)
    assert found.gain == 20 / 14
    assert decide("three", {way: found.cost(way) for way in us}) == "one"


def test_one_token_takes_its_own_entry_and_prompts_the_nearest_length():
    op = [product()]
    found = tuning(
        *(entry(op, f"way{n}", n) for n in (64, 512)), entry(op, "way1", n_tokens=1)
    )
    expected = {1: "way1", 2: "way64", 64: "way64", 180: "way64", 182: "way512"}
    expected[9999] = "way512"
    got = {n: found.winner("MatvecNTokens", shape_of(op), n) for n in expected}
    assert got == expected
    assert found.winner("MatvecNTokens", "another", 1) is None
    only_one = tuning(entry(op, "way1"))
    assert only_one.winner("MatvecNTokens", shape_of(op), 64) is None


def test_shapes_tell_dimensions_weights_and_optional_fields_apart():
    assert shape_of([product()]) == "weight=4bit/32/affine/float32 in_dim=32 out_dim=8"
    assert shape_of([product(n_tokens=5)]) == shape_of([product()])
    assert shape_of([product(out_dim=9)]) != shape_of([product()])
    assert " | ResidualAddNTokens dim=8" in shape_of(product_and_residual())


def test_the_environment_goes_before_tuning_and_tuning_before_preference(
    in_force, monkeypatch
):
    op, other = product(), product(out_dim=16)
    default = lowering.choose(op, "cuda").name
    assert default == lowering.PREFERRED["cuda"]["MatvecNTokens"][0].name
    in_force(tuning(entry([op], "dequant_matvec_4bit_v3")))
    assert lowering.choose(op, "cuda").name == "dequant_matvec_4bit_v3"
    assert lowering.choose(other, "cuda").name == default
    assert lowering.default_way(op, "cuda").name == default
    monkeypatch.setenv("MOEFLUX_LOWERING", "MatvecNTokens=qmm_t")
    assert lowering.choose(op, "cuda").name == "qmm_t"
    monkeypatch.delenv("MOEFLUX_LOWERING")
    for off in ("", "0"):
        monkeypatch.setenv("MOEFLUX_TUNING", off)
        assert lowering.choose(op, "cuda").name == default


def test_a_missing_or_unfit_way_is_skipped(in_force):
    op = product(n_tokens=3)
    for way in ("a_kernel_of_old", "dequant_matvec_4bit_v3"):
        in_force(tuning(entry([op], way, n_tokens=3)))
        default = lowering.default_way(op, "cuda").name
        assert lowering.choose(op, "cuda").name == default


def test_ops_found_faster_one_by_one_are_not_run_together(in_force):
    ops = product_and_residual()
    assert lowering.fused(ops, None, "cuda") is not None
    in_force(tuning(entry(ops, TOGETHER, name="matvec_residual")))
    assert lowering.fused(ops, None, "cuda") is not None
    in_force(tuning(entry(ops, ONE_BY_ONE, name="matvec_residual")))
    assert lowering.fused(ops, None, "cuda") is None
    assert lowering.fused(ops, None) is not None


def test_a_file_is_read_back_as_it_was_written(tmp_path):
    found = tuning(replace(entry([product()], "qmm_t"), refused={"mlx": "too far off"}))
    path = tmp_path / "deep" / "tuned.json"
    tuned.save(found, path)
    assert tuned.read(path) == found
    assert [p.name for p in path.parent.iterdir()] == ["tuned.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": 1}',
        '{"format": true}',
        '{"format": 2.0}',
        '{"format": 2, "entries": [{"name": 1}]}',
        '{"format": 2, "entries": []}',
        '{"format": 2, "entries": {}, "device": 1}',
        "[" * 100_000,
        '{"format": ' + "9" * 5000 + "}",
        "\ufeff{}",
    ],
)
def test_a_broken_file_is_an_error_where_it_was_named(text, tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    path.write_text(text)
    monkeypatch.setenv("MOEFLUX_TUNING", str(path))
    with pytest.raises(ConfigError, match=r"\[tuning\] .*tuned.json: expected"):
        lowering.choose(product(), "cuda")


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_tokens": True},
        {"n_tokens": -1},
        {"n_tokens": 1.0},
        {"shape": None},
        {"default": 1},
        {"winner": "another"},
        {"winner": ["mlx"]},
        {"us": {"qmm_t": 0, "mlx": 1}},
        {"us": {"qmm_t": -1.0}},
        {"us": {"qmm_t": "1"}},
        {"us": {"qmm_t": 1e300}},
        {"us": ["qmm_t"]},
        {"launches": {"qmm_t": 1.5}},
        {"launches": {"qmm_t": -1}},
        {"launches": None},
        {"launch_us": -1},
        {"launch_us": "1"},
        {"refused": {"mlx": 1}},
        {"more": 1},
    ],
)
def test_an_entry_of_nonsense_is_an_error_where_it_was_named(
    wrong, tmp_path, monkeypatch
):
    path = tmp_path / "tuned.json"
    right = tuning(entry([product()], "qmm_t"))
    fields = json.loads(json.dumps(dataclasses.asdict(right)))
    path.write_text(json.dumps(fields))
    assert tuned.read(path) == right
    fields["entries"][0].update(wrong)
    path.write_text(json.dumps(fields))
    monkeypatch.setenv("MOEFLUX_TUNING", str(path))
    with pytest.raises(ConfigError, match=r"\[tuning\] .*tuned.json: expected"):
        lowering.choose(product(), "cuda")


def test_an_invalid_tuning_file_is_an_error_at_once(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path):
        monkeypatch.setenv("MOEFLUX_TUNING", str(path))
        with pytest.raises(ConfigError, match="regular file"):
            tuned.current("cuda")


def test_a_broken_file_of_this_machine_is_skipped_with_one_warning(
    tmp_path, monkeypatch
):
    monkeypatch.delenv("MOEFLUX_TUNING")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuned.current("cuda") is None
    path = tuned.default_path("cuda")
    path.write_text("{")
    with pytest.warns(UserWarning, match="run moeflux tune again"):
        assert tuned.current("cuda") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.current("cuda") is None
    tuned.save(tuning(entry([product()], "qmm_t")), path)
    assert lowering.choose(product(), "cuda").name == "qmm_t"


@pytest.mark.parametrize("other", ["device", "executor", "mlx"])
def test_times_from_elsewhere_are_skipped_with_a_warning(other, in_force):
    found = replace(tuning(entry([product()], "qmm_t")), **{other: "another"})
    in_force(found)
    with pytest.warns(UserWarning, match="expected times of .* but they are of"):
        assert lowering.choose(product(), "cuda").name != "qmm_t"


def test_tuning_a_second_model_keeps_the_entries_of_the_first():
    small, large = [product()], [product(out_dim=16)]
    first = tuning(entry(small, "qmm_t"), entry(large, "mlx"))
    second = tuning(entry(small, "mlx"))
    merged = second.merged(first)
    assert {(e.shape, e.winner) for e in merged.entries} == {
        (shape_of(small), "mlx"),
        (shape_of(large), "mlx"),
    }
    assert second.merged(replace(first, mlx="0.1")) == second
    assert second.merged(None) == second


class LastIsBest(StepTimer):
    """A timer that reports each way as faster than those before, without running."""

    def __init__(self):
        super().__init__()
        self.seconds = {}

    def time(self, works: Sequence[Work]) -> Timing:
        call = works[0].call
        return Timing(self.seconds.setdefault(call, 1e3 * 0.9 ** len(self.seconds)))


def tuned_with_bad_ways(checkpoint, progress) -> Tuning:
    """Tune a tiny model, with two bad ways added at the end of an Op's list."""

    def off_by_one(_op, _run, a, b):
        return a + b + 1

    def broken(_op, _run, a, b):
        raise RuntimeError("no such thing")

    bad = [Way(f.__name__, lambda op: True, f) for f in (off_by_one, broken)]
    model = moeflux_mlx.load(checkpoint, executor="sim")[0]
    with pytest.MonkeyPatch.context() as patch:
        known = lowering.WAYS[ResidualAddNTokens]
        patch.setitem(lowering.WAYS, ResidualAddNTokens, (*known, *bad))
        kept: list[Tuning] = []
        timer = LastIsBest()
        more = {"timer": timer, "progress": progress, "keep": kept.append}
        found = tune(model, prompts=[3], context=3, **more)
        assert kept == [replace(found, entries=(entry,)) for entry in found.entries]
        return found


@pytest.fixture(scope="module")
def tuned_tiny(checkpoint):
    """The findings for every Op and fusion."""
    return tuned_with_bad_ways(checkpoint, lambda choices, _: choices)


@pytest.fixture(scope="module")
def tuned_few(checkpoint):
    """The findings for the Op with the bad ways, and for a fusion."""
    few = ("ResidualAddNTokens", "experts_down_combine")
    return tuned_with_bad_ways(
        checkpoint, lambda choices, _: [c for c in choices if c.name in few]
    )


@pytest.mark.slow
@simulated
def test_every_op_and_group_is_tried_at_every_length(tuned_tiny):
    assert tuned_tiny.executor == "sim"
    tried = {(e.name, e.n_tokens) for e in tuned_tiny.entries}
    both = {
        "EmbedGatherNTokens",
        "MatvecNTokens",
        "SdpaCausalTiled",
        "moe_softmax_topk",
    }
    assert {(name, n) for name in both for n in (1, 3)} <= tried
    assert ("experts_down_combine", 1) in tried
    assert ("MoeGatherIdFuse", 3) in tried
    # The cache object does this work, so there is nothing to choose.
    assert not any(name == "KvCacheAppendNTokens" for name, _ in tried)
    for e in tuned_tiny.entries:
        assert bool(e.refused) == (e.name == "ResidualAddNTokens")
        group = {TOGETHER, ONE_BY_ONE}
        assert e.winner == (ONE_BY_ONE if set(e.us) == group else lowering.MLX)
        assert e.default in e.us and e.gain >= 1
        assert set(e.launches) == set(e.us)
    launches = {e.name: e.launches for e in tuned_tiny.entries if e.n_tokens == 1}
    assert launches["gated_delta_decode"] == {TOGETHER: 1, ONE_BY_ONE: 5}
    assert launches["SdpaCausalTiled"] == {"sdpa_decode_parts": 2, lowering.MLX: 1}
    keys = [(e.name, e.shape, e.n_tokens) for e in tuned_tiny.entries]
    assert len(set(keys)) == len(keys)


@pytest.mark.slow
@simulated
def test_a_wrong_way_never_wins_and_is_reported(tuned_few, capsys):
    found = [e for e in tuned_few.entries if e.name == "ResidualAddNTokens"]
    assert len(found) == 2
    for e in found:
        assert set(e.us) == {"residual_add_n_tokens", "mlx"}
        assert "output 0: error" in e.refused["off_by_one"]
        assert e.refused["broken"] == "RuntimeError: no such thing"
    others = [e for e in tuned_few.entries if e.name != "ResidualAddNTokens"]
    assert others and not any(e.refused for e in others)
    print_tuning(tuned_few, wide_console())
    text = capsys.readouterr().out
    assert "refused broken: ResidualAddNTokens, 3 tokens" in text
    assert "experts_down_combine" in text


@pytest.mark.slow
@simulated
def test_a_model_runs_as_tuned_and_gives_the_same(checkpoint, tuned_tiny, in_force):
    def logits():
        model = moeflux_mlx.load(checkpoint, executor="sim")[0]
        cache = make_prompt_cache(model)
        out = model(mx.array([[5]]), cache=cache)
        steps = [len(s.ops) for g in model.runtime.graphs.values() for s in g.calls]
        return out, model.runtime.executor.kernel_count, max(steps)

    expected, n_kernels, most = logits()
    assert n_kernels > 0 and most > 1
    in_force(tuned_tiny)
    got, n_kernels, most = logits()
    # Every winner is MLX's way, without fusion.
    assert (n_kernels, most) == (0, 1)
    assert mx.allclose(got, expected, rtol=1e-3, atol=1e-4)


def test_an_executor_without_kernels_is_refused(checkpoint):
    model = moeflux_mlx.load(checkpoint, executor="ops")[0]
    with pytest.raises(BackendError, match="with kernels, metal, cuda or sim, but got"):
        tune(model)


@simulated
def test_a_model_that_cannot_be_tuned_is_refused(packed, budget, checkpoint):
    streamed = moeflux_mlx.load(packed, executor="sim", expert_memory=budget)[0]
    with pytest.raises(ModelError, match="expected all experts in memory"):
        tune(streamed)
    model = moeflux_mlx.load(checkpoint, executor="sim")[0]
    with pytest.raises(ConfigError, match=r"\[--prompts\] expected at least 2"):
        tune(model, prompts=[64, 1])


@pytest.mark.slow
@simulated
def test_the_command_saves_entries_only_where_times_are_meaningful(
    checkpoint, tuned_few, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    n_found = len(tuned_few.entries)

    def found(_model, *, keep, **_):
        for entry in tuned_few.entries[:n_found]:
            keep(replace(tuned_few, entries=(entry,)))
        if n_found < len(tuned_few.entries):
            raise KeyboardInterrupt
        return tuned_few

    monkeypatch.setattr("moeflux_mlx.cli.tune.tune", found)
    command = ["tune", str(checkpoint), "--executor", "sim"]
    assert main(command) == 0
    assert "nothing is kept" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.json"))
    path = tmp_path / "mine.json"
    assert main([*command, "--file", str(path)]) == 0
    assert len(json.loads(path.read_text())["entries"]) == len(tuned_few.entries)
    path.unlink()
    n_found = 2
    assert main([*command, "--file", str(path)]) == 130
    assert len(json.loads(path.read_text())["entries"]) == 2


def test_the_list_of_lowerings_shows_tuned_entries(in_force, monkeypatch, capsys):
    monkeypatch.setenv("MOEFLUX_EXECUTOR", "cuda")
    in_force(tuning(entry([product()], "qmm_t")))
    assert main(["kernels", "--lowering", "--json"]) == 0
    rows = {row["op"]: row for row in json.loads(capsys.readouterr().out)}
    (line,) = rows["MatvecNTokens"]["tuned"]
    assert line.startswith("qmm_t: 1 tokens, weight=4bit/32")
    assert rows["RopeNTokens"]["tuned"] == []
