"""Every family with a class of our own gives what mlx-lm's class gives, bounded or not.

A new family adds a line to ``native_family_table.FAMILIES``. A file of its own tests
the rest of its behaviour.
"""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import SwitchGLU
from native_family_table import FAMILIES
from native_models import (
    adapt,
    assert_kernels_give_mlx_lms,
    assert_large_caches_give_the_same_bits,
    greedy,
    least,
    load,
    relative_rms,
    simulated,
    tokens,
)
from test_steps import Lazy, Traced
from tiny import make_gpt_oss, make_minimax, make_qwen3_moe

import moeflux_mlx
from moeflux_mlx.engine.executors import EXECUTORS
from moeflux_mlx.measure.routing import record_routing
from moeflux_mlx.streaming import StreamedModel

CASES = [(name, config) for name in FAMILIES for config in FAMILIES[name].configs]
FIRST = {name: next(iter(family.configs)) for name, family in FAMILIES.items()}


def on(cases, slow=()) -> pytest.MarkDecorator:
    """Have a test try these checkpoints; those in ``slow`` are left to slow runs."""
    params = []
    for case in cases:
        marks = [pytest.mark.slow] if case in slow else []
        params.append(pytest.param(case, id="-".join(case), marks=marks))
    return pytest.mark.parametrize("plain", params, indirect=True)


# The first configuration; slow runs try them all.
MORE = [case for case in CASES if FIRST[case[0]] != case[1]]
each_family = on(CASES, MORE)
# The tests of streaming and of steps, which take this family, need not be repeated.
each_other_family = on(CASES, [*MORE, ("qwen3_5_moe", FIRST["qwen3_5_moe"])])


@pytest.fixture
def tolerance(request) -> float:
    """How far logits may be from mlx-lm's in the family that a test tries."""
    family, _ = request.node.callspec.params["plain"]
    return FAMILIES[family].tolerance


def test_no_family_is_left_out():
    models = Path(__file__).resolve().parents[1] / "models"
    written = {path.stem for path in models.glob("[!_]*.py")}
    # Another family's class under a publisher's name.
    assert written == {*FAMILIES, "kimi_k2", "minimax_m2"}


@each_other_family
@pytest.mark.parametrize("n_seqs", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_greedy_tokens_and_their_logits_are_mlx_lms(
    plain, plain_packed, n_seqs, tolerance, request
):
    # Many tokens with one configuration of a family, fewer with the others.
    is_first = tuple(request.node.callspec.params["plain"]) in FIRST.items()
    n_tokens = {1: 64, 3: 24}[n_seqs] // (1 if is_first else 4)
    expected, chosen = greedy(mlx_lm.load(str(plain))[0], n_seqs, n_tokens)
    few = {"expert_memory": least(plain)}
    ways = {
        "resident": (plain, {}, n_tokens),
        "least": (plain, few, n_tokens),
        "least of a pack": (plain_packed, {**few, "read_ahead": "off"}, 6),
        "reads ahead": (plain_packed, {**few, "read_ahead": "on"}, n_tokens),
    }
    found = {}
    for way, (path, options, n) in ways.items():
        model = load(path, executor="ops", **options)
        found[way], ids = greedy(model, n_seqs, n)
        assert ids == chosen[: n + 1], way
        same = found["resident"][:, : found[way].shape[1]]
        assert mx.array_equal(found[way], same), way
        if way != "resident":
            assert model.streamer.stats.total.misses, way
    assert relative_rms(found["resident"], expected) < tolerance


@pytest.mark.slow
@simulated
@on(FIRST.items())
@pytest.mark.parametrize("n_seqs", [1, 3])
def test_kernels_give_mlx_lms_tokens_and_logits(plain, n_seqs):
    assert_kernels_give_mlx_lms(plain, n_seqs)


def ahead_or_waiting(path, n_seqs: int, executor: str, optimistic: str, **memory):
    """Return logits of tokens that run ahead of their experts, or wait for them."""
    options = {"executor": executor, "optimistic": optimistic, "read_ahead": "on"}
    model = load(path, **options, **memory)
    logits, _ = greedy(model, n_seqs, 6)
    assert model.runtime.steps == (optimistic == "on")
    return logits


@pytest.mark.sampled
@each_other_family
@pytest.mark.parametrize("n_seqs", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_running_ahead_gives_what_waiting_gives(plain_packed, n_seqs, monkeypatch):
    monkeypatch.setitem(EXECUTORS, Lazy.name, Lazy)
    # All that a call of three sequences can ask of a layer fits.
    memory = {"expert_memory": least(plain_packed, 9)}
    expected = ahead_or_waiting(plain_packed, n_seqs, Lazy.name, "off", **memory)
    got = ahead_or_waiting(plain_packed, n_seqs, Lazy.name, "on", **memory)
    assert relative_rms(got, expected) < 1e-6


# MLX compiles traces for seconds.
@on(FIRST.items(), [case for case in FIRST.items() if case[0] != "qwen3_moe"])
@pytest.mark.parametrize("n_seqs", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_traces_that_run_ahead_give_what_waiting_gives(
    plain_packed, n_seqs, monkeypatch
):
    for executor in (Lazy, Traced):
        monkeypatch.setitem(EXECUTORS, executor.name, executor)
    few = {"expert_memory": least(plain_packed, 9)}
    expected = ahead_or_waiting(plain_packed, n_seqs, Lazy.name, "off", **few)
    for executor, memory, bound in (
        (Lazy.name, {}, 1e-6),
        (Traced.name, few, 1e-6),
        (Traced.name, {}, 1e-6),
        # Where nothing runs ahead it adds on the host, in another order.
        ("ops", few, 1e-5),
    ):
        got = ahead_or_waiting(plain_packed, n_seqs, executor, "on", **memory)
        assert relative_rms(got, expected) < bound, (executor, memory)


def assert_same_state(own, theirs) -> None:
    """Check arrays and numbers of a cache; states of linear attention add up much."""
    states = [dict(tree_flatten(state)) for state in (own, theirs)]
    assert states[0].keys() == states[1].keys()
    for name, expected in states[1].items():
        if isinstance(expected, mx.array):
            assert relative_rms(states[0][name], expected) < 1e-4, name
        else:
            assert states[0][name] == expected, name


@each_family
def test_names_of_weights_and_calls_and_caches_are_mlx_lms(plain, tolerance):
    expected, ours = mlx_lm.load(str(plain))[0], load(plain)
    assert isinstance(ours, type(expected))
    assert len(ours.layers) == len(expected.layers)
    names = {name: p.shape for name, p in tree_flatten(expected.parameters())}
    assert {name: p.shape for name, p in tree_flatten(ours.parameters())} == names
    prompt = tokens(19, seed=4, n_seqs=2)
    rows, wanted = ours.model.embed_tokens(prompt), expected(prompt)
    assert relative_rms(ours(prompt), wanted) < tolerance
    assert relative_rms(ours(0 * prompt, input_embeddings=rows), wanted) < tolerance
    caches = [make_prompt_cache(model) for model in (expected, ours)]
    for model, cache in zip((expected, ours), caches, strict=True):
        mx.eval(model(prompt, cache=cache))
    for theirs, own in zip(*caches, strict=True):
        assert type(own) is type(theirs)
        assert_same_state(own.state, theirs.state)


@pytest.mark.sampled
@each_family
def test_adapters_and_a_compiled_call_take_mlx_lms_modules(plain, tolerance):
    models, prompt = (mlx_lm.load(str(plain))[0], load(plain)), tokens(7)
    expected, ours = models
    assert relative_rms(mx.compile(ours)(prompt), expected(prompt)) < tolerance
    found = []
    for model in models:
        adapt(model)
        cache = make_prompt_cache(model)
        mx.eval(model(prompt, cache=cache))
        found.append(model(tokens(2, seed=5), cache=cache))
    assert relative_rms(found[1], found[0]) < tolerance
    rows, wanted = ours.model.embed_tokens(prompt), expected(prompt)
    assert relative_rms(ours(prompt), wanted) < tolerance
    assert relative_rms(ours(0 * prompt, input_embeddings=rows), wanted) < tolerance


@each_family
def test_a_state_goes_on_where_it_was_saved(plain_packed, tmp_path):
    few = {"expert_memory": least(plain_packed, 3)}
    model, prompt = load(plain_packed, **few), tokens(21)
    cache = make_prompt_cache(model)
    mx.eval(model(prompt, cache=cache))
    moeflux_mlx.save_state(tmp_path / "state", model, cache, prompt[0].tolist())
    expected = model(tokens(1, seed=9), cache=cache)
    again = load(plain_packed, **few)
    state = moeflux_mlx.load_state(tmp_path / "state", again)
    assert state.tokens == prompt[0].tolist()
    assert mx.array_equal(again(tokens(1, seed=9), cache=state.cache), expected)


@each_family
def test_routing_is_recorded_of_the_layers_that_route(plain):
    model, theirs = load(plain), mlx_lm.load(str(plain), lazy=True)[0]
    routed = [
        i
        for i, layer in enumerate(theirs.layers)
        if any(isinstance(module, SwitchGLU) for module in layer.modules())
    ]
    config = json.loads((plain / "config.json").read_text())
    top_k = config.get("text_config", config)["num_experts_per_tok"]
    trace = record_routing(model, [5, 6, 7], max_tokens=3)
    assert list(trace.layers) == routed
    assert trace.chosen.shape[1:] == (len(routed), top_k)


@pytest.mark.sampled
@each_family
def test_a_budget_of_the_process_gives_the_same(plain_packed, tolerance):
    bounded, free = load(plain_packed, memory="4GB"), load(plain_packed)
    assert bounded.runtime.plan is not None
    got, expected = (greedy(model, 1, 4)[0] for model in (bounded, free))
    assert relative_rms(got, expected) < tolerance


@each_family
def test_mlx_lms_class_serves_where_it_is_asked_for(plain, plain_packed, tolerance):
    expected = mlx_lm.load(str(plain))[0](tokens(9))
    for path in (plain, plain_packed):
        options = {"native": False, "expert_memory": least(plain)}
        model, _ = moeflux_mlx.load(path, **options)
        assert isinstance(model, StreamedModel)
        assert relative_rms(model(tokens(9)), expected) < tolerance


@pytest.mark.slow
@simulated
@pytest.mark.parametrize("numbers", ["plain", "fast"])
@pytest.mark.parametrize("make", [make_minimax, make_qwen3_moe, make_gpt_oss])
def test_a_cache_too_large_to_be_copied_gets_the_same_bits(
    tmp_path, monkeypatch, make, numbers
):
    """Norms are of the row of all heads, of each head, and absent."""
    path = make(tmp_path / "model", group_size=64)
    kernels = "attention_inputs_append", "attention_inputs_ungated"
    assert_large_caches_give_the_same_bits(path, monkeypatch, *kernels, numbers=numbers)
