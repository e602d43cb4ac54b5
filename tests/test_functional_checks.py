"""Arguments of Ops' functions give right results, or an error that names them."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from commands import python
from synthetic import write_checkpoint
from test_functional import (
    CACHE,
    CALLS,
    CHOSEN,
    DIFFERENTIABLE,
    IDS,
    NARROW,
    SHARES,
    START,
    B,
    D,
    N,
    X,
    as_tuple,
    close,
    executor,  # noqa: F401
    experts,
    noise,
)

from moeflux_mlx import ops
from moeflux_mlx.engine.graph import REGISTRY
from moeflux_mlx.engine.graph.op import Access
from moeflux_mlx.errors import ExpertStoreError, GraphError
from moeflux_mlx.experts.files.pack import pack
from moeflux_mlx.experts.files.packed import PackedExperts
from moeflux_mlx.experts.pool.pool import POOL_ALIGNMENT
from moeflux_mlx.experts.streaming.streamer import ExpertStreamer
from moeflux_mlx.experts.weights import ARRAYS, ExpertWeights, Quantization, Weight
from moeflux_mlx.ops import functional

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "fuzz_ops"
TABLE = ops.quantize(noise(1, 11, D), 32)


def load_script():
    loader = SourceFileLoader("fuzz_ops", str(SCRIPT))
    spec = importlib.util.spec_from_loader("fuzz_ops", loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_ops"] = module
    loader.exec_module(module)
    return module


@pytest.mark.slow
def test_wrong_calls_end_in_typed_errors_and_right_ones_in_right_results():
    found = python(SCRIPT, "--calls", 300, "--seed", 1)
    assert found.returncode == 0, found.stdout + found.stderr
    lines = found.stdout.splitlines()
    right, typed, *faults = map(int, lines[-2].split("|")[1:])
    assert right >= 30 and typed >= 200 and right + typed == 300 and not any(faults)
    assert lines[-1] == "0 of 300 calls ended as they must not (seed 1)"


def test_every_function_and_each_of_its_arguments_is_called_wrongly():
    found = {}
    for name, given in load_script().samples():
        found.setdefault(name, set()).update(given)
    names = {n for n in ops.__all__ if n.islower()}
    wanted = {n: set(inspect.signature(getattr(ops, n)).parameters) for n in names}
    assert found == wanted


def test_the_script_finds_a_function_without_bounds(monkeypatch):
    """The script must notice a result for wrong arguments, and an untyped error."""
    fuzz = load_script()
    name, _, changes = fuzz.catalogue()[0]
    assert name == "embedding"
    labels = [change.label for change in changes["token_ids"]]
    call = fuzz.Call(0, (("token_ids", labels.index("index -1")),))
    monkeypatch.setattr(fuzz.apply_module, "_executor", fuzz.apply_module._executor)
    assert fuzz.outcome(call)[0] == "typed error"
    monkeypatch.setattr(fuzz.apply_module, "bound", lambda _, given: (given, None))
    assert fuzz.outcome(call) == ("wrong in silence", "answered token_ids out of range")
    none = fuzz.Call(0, (("token_ids", labels.index("a NoneType")),))
    monkeypatch.setattr(ops, "embedding", functional.embedding.__wrapped__)
    assert fuzz.outcome(none)[0] == "raw error"


def test_each_op_that_reads_integers_states_their_bounds():
    """Op and kernel clamp lengths, so these have no bound."""
    free = {("Conv1dStepNTokens", "lengths")}
    reading = {
        (name, field.name)
        for name, op in REGISTRY.items()
        if op.__module__.startswith("moeflux_mlx.engine.ops")
        for field in op.buffer_fields
        if field.access & Access.READ and str(field.role.dtype) == str(mx.int32)
    }
    limited = {
        (name, key)
        for name, op in REGISTRY.items()
        if op.__module__.startswith("moeflux_mlx.engine.ops")
        for key in _limits(op)
    }
    assert limited == reading - free and free <= reading


def _limits(op):
    sizes = {f.name: 4 for f in dataclasses.fields(op)}
    made = op(**sizes)
    return made.index_ranges(dict.fromkeys(sizes, (4, 4, 4, 4)))


def changed(row):
    indices = np.array(CHOSEN)
    indices[3] = row
    return mx.array(indices)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda: ops.embedding(mx.array([0, 11], mx.int32), TABLE),
            "[ops.embedding] token_ids: expected values from 0 to 10 but got 11",
        ),
        (
            lambda: ops.embedding(mx.array([-1, 3], mx.int32), noise(1, 11, D)),
            "[ops.embedding] token_ids: expected values from 0 to 10 but got -1",
        ),
        (
            lambda: ops.kv_cache_append(NARROW, NARROW, CACHE, CACHE, START[:1] + 2),
            "[ops.kv_cache_append] row: expected values from 0 to 4 but got 5",
        ),
        (
            lambda: ops.causal_attention(X, CACHE, CACHE, start=START + 2),
            "[ops.causal_attention] start: expected values from 0 to 4 but got 5",
        ),
        (
            lambda: ops.rope(X, mx.exp(noise(2, 8)), START + 2**24, 2),
            "[ops.rope] start: expected values from -16777216 to 16777213 but got "
            "16777219",
        ),
        (
            lambda: ops.gather_experts(X, changed([0, 1, 6]), SHARES, experts()),
            "[ops.gather_experts] indices: expected values from 0 to 5 but got 6",
        ),
        (
            lambda: ops.gather_experts(X, changed([0, 4, 4]), SHARES, experts()),
            "[ops.gather_experts] indices: expected distinct experts in each row but "
            "got 4 twice",
        ),
        (
            lambda: ops.rms_norm(X, noise(2, D), float("nan")),
            "[ops.rms_norm] eps: expected a finite number of at least 0 but got nan",
        ),
        (
            lambda: ops.split_q_gate(X, True),
            "[ops.split_q_gate] num_heads: expected a whole number from 1 to "
            "2147483647 but got True",
        ),
        (
            lambda: ops.linear(X, Weight(TABLE.w, TABLE.scales, None, Q)),
            "[ops.linear] weight.biases: expected an mx.array but got None",
        ),
        (
            lambda: ops.linear(X, dataclasses.replace(TABLE, quantization=BITS_0)),
            "[ops.linear] weight.bits: expected 1, 2, 3, 4, 5, 6, 8 in mode affine but "
            "got 0",
        ),
        (
            lambda: ops.linear(X, dataclasses.replace(TABLE, scales=TABLE.scales[1:])),
            "[ops.linear] weight.scales: expected shape [11, 2] but got [10, 2]",
        ),
        (
            lambda: ops.decode_experts(X[:1], CHOSEN[:1], SHARES[:1], TURNED),
            "[ops.decode_experts] experts.up: expected shape [6, 64, 32] but got "
            "[6, 32, 64]",
        ),
        (
            lambda: ops.residual_add(X, X.astype(mx.float16)),
            "[ops.residual_add] b: expected float32 but got float16",
        ),
        (
            lambda: ops.conv1d_step(X, noise(2, 4, 3, D), noise(3, D, 4, 1)),
            "[ops.conv1d_step] state: expected a divisor of 6 but got 4",
        ),
        (
            lambda: ops.zero_buffer(2**31 - 1, 2**20),
            "[ops.zero_buffer] n_tokens: expected at most",
        ),
        (lambda: ops.rms_norm(X), "[ops.rms_norm] missing a required argument"),
    ],
)
def test_an_error_names_function_and_argument_in_one_line(wrong, message):
    with pytest.raises(GraphError) as error:
        wrong()
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


Q, BITS_0 = Quantization(4, 32), Quantization(0, 32)
TURNED = ExpertWeights(experts().down, experts().gate, experts().up)


def test_the_last_row_and_the_last_id_are_in_range(executor):  # noqa: F811
    keys, _ = ops.kv_cache_append(NARROW, NARROW, CACHE, CACHE, START[:1] + 1)
    wanted = np.array(CACHE)
    wanted[:, 0, 4:] = np.array(NARROW).reshape(B, 3, 32)
    close(keys, wanted)
    dense = noise(1, 11, D)
    close(ops.embedding(mx.array([10], mx.int32), dense), dense[10:])


def test_nan_in_data_is_data(executor):  # noqa: F811
    x = mx.where(mx.arange(N * D).reshape(N, D) == D, mx.nan, X)
    out = np.array(ops.residual_add(x, X))
    assert np.isnan(out).sum() == 1 and np.isnan(out[1, 0])


@pytest.mark.sampled
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_compiled_function_gives_the_same(name):
    call, x = CALLS[name], inspect.signature(CALLS[name]).parameters["x"].default
    got = mx.compile(lambda x: call(getattr(ops, name), x))(x)
    for a, b in zip(as_tuple(got), as_tuple(call(getattr(ops, name), x)), strict=True):
        close(a, b)


OF_INDICES = {
    "rope": (
        lambda i: ops.rope(X, mx.exp(noise(2, 8)), i, 2),
        START,
        (2**24 + 1, -(2**31)),
    ),
    "embedding": (lambda i: ops.embedding(i, TABLE), IDS, (11, -1)),
    "kv_cache_append": (
        lambda i: ops.kv_cache_append(NARROW, NARROW, CACHE, CACHE, i)[0],
        START[:1],
        (5, -1, 2**31 - 1),
    ),
    "causal_attention": (
        lambda i: ops.causal_attention(X, CACHE, CACHE, start=i),
        START,
        (5, -1),
    ),
    "gather_experts": (
        lambda i: ops.gather_experts(X, i, SHARES, experts()),
        CHOSEN,
        (6, -1, 2),
    ),
}


@pytest.mark.parametrize("name", OF_INDICES)
def test_a_traced_index_out_of_range_gives_nan_and_others_right_values(name):
    call, right, wrong = OF_INDICES[name]
    if name in ("gather_experts", "kv_cache_append"):
        traced = mx.compile(call)
    else:

        def traced(x):
            return mx.vmap(call)(x[None])[0]

    close(traced(right), call(right))
    for index in wrong:
        indices = np.array(right)
        indices.reshape(-1)[0] = index
        assert np.isnan(np.array(traced(mx.array(indices)))).all()


def test_a_vmapped_function_checks_each_member():
    out = mx.vmap(lambda i: ops.embedding(i, TABLE))(mx.array([[1, 2], [3, 11]]))
    close(out[0], ops.embedding(mx.array([1, 2]), TABLE))
    assert np.isnan(np.array(out[1])).all()


def test_experts_that_are_visited_one_by_one_cannot_be_traced():
    def call(i):
        return ops.batched_experts(X, i, SHARES, experts(), mx.zeros((N, D)))

    with pytest.raises(GraphError, match=r"indices: expected indices with values"):
        mx.compile(call)(CHOSEN)


@pytest.mark.sampled
def test_streamed_experts_are_those_of_the_file_whichever_have_slots(
    executor,  # noqa: F811
    tmp_path,
):
    """With fewer slots than experts, the number of experts is not that of slots."""
    path = write_checkpoint(tmp_path / "plain", n_layers=1, n_experts=11, top_k=3)
    pack(path, tmp_path / "packed")
    tensors = mx.load(str(path / "model.safetensors"))
    stem = "model.layers.0.mlp.switch_mlp"
    names = "weight", "scales", "biases"
    stacks = (
        Weight(*(tensors[f"{stem}.{p}_proj.{n}"] for n in names), Q)
        for p in ("gate", "up", "down")
    )
    whole = ExpertWeights(*stacks)
    indices = mx.array([[10, 0, 3], [9, 2, 10]], mx.int32)
    with PackedExperts.open(tmp_path / "packed") as store:
        limit = 4 * store.layout(0).stride + POOL_ALIGNMENT
        with ExpertStreamer(store, limit) as streamer:
            source = streamer.source(0)
            assert source.resident is None
            for call in (ops.gather_experts, ops.batched_experts):
                more = [mx.zeros((2, D))] if call is ops.batched_experts else []
                given = X[:2], indices, SHARES[:2]
                close(call(*given, source, *more), call(*given, whole, *more))
            with pytest.raises(ExpertStoreError):
                mx.eval(ops.gather_experts(X[:2], indices + 1, SHARES[:2], source))
            with pytest.raises(GraphError, match="indices: expected values from 0 to"):
                ops.gather_experts(X[:2], indices - 1, SHARES[:2], source)


@pytest.mark.parametrize("field", ["bias", "global_scale"])
@pytest.mark.parametrize("bits", [None, 4])
def test_no_array_of_a_weight_is_ignored(field, bits):
    """Also in a weight of experts, whose biases are added."""
    dense = noise(1, 40, D)
    plain = Weight(dense) if bits is None else ops.quantize(dense, 32, bits)
    weight = dataclasses.replace(plain, **{field: mx.ones(40)})
    for wrong in (
        lambda: ops.linear(X, weight),
        lambda: ops.embedding(IDS, weight),
        lambda: ops.head_linear(X[:, :D], weight[None]),
    ):
        with pytest.raises(GraphError, match=rf"weight\.{field}: expected None"):
            wrong()
    stacks = experts(bits)
    wrong_bias = dataclasses.replace(stacks.up, **{field: mx.ones((6, 31))})
    with pytest.raises(GraphError, match=rf"experts\.up\.{field}: expected"):
        ops.gather_experts(
            X, CHOSEN, SHARES, ExpertWeights(stacks.gate, wrong_bias, stacks.down)
        )


def test_every_array_of_a_weight_is_changed_with_it():
    given = {field: mx.zeros(2) for field in ARRAYS}
    changed = Weight(**given, quantization=Quantization(4, 32)).mapped(lambda x: x + 1)
    arrays = {f.name for f in dataclasses.fields(Weight)} - {"quantization", "in_pool"}
    assert set(ARRAYS) == arrays
    assert all((getattr(changed, field) == 1).all() for field in ARRAYS)
