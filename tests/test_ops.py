"""Compare each Op's reference with formulas in float64, itself and mlx-lm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import gated_delta
from mlx_lm.models.cache import KVCache
from mlx_lm.models.qwen3_next import Qwen3NextRMSNormGated
from mlx_lm.models.switch_layers import SwitchGLU
from op_cases import (
    DELTA,
    DELTA_INPUTS,
    EPS,
    Q4,
    Q8,
    SPECS,
    TOLERANCE,
    Spec,
    random_experts,
    relative_rms,
    routed,
    spec,
)

from moeflux_mlx import device, ops
from moeflux_mlx.engine.graph import REGISTRY
from moeflux_mlx.engine.graph.buffers import fits
from moeflux_mlx.engine.ops.functions import namespace
from moeflux_mlx.experts.compute.resident import ResidentExperts
from moeflux_mlx.experts.weights import ExpertWeights, Quantization, Weight

MXFP4 = Quantization(4, 32, "mxfp4")
every_op = pytest.mark.parametrize("case", SPECS, ids=lambda s: s.id, indirect=True)
on_both = pytest.mark.parametrize("to", [mx.array, np.array], ids=["mlx", "numpy"])


def is_float(x):
    return isinstance(x, np.ndarray) and np.issubdtype(x.dtype, np.floating)


@pytest.fixture(autouse=True)
def uncompiled():
    """Run mlx-lm's compiled functions uncompiled: a CPU compiles for seconds."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture
def case(request):
    return request.param.build()


def test_every_registered_op_has_a_case():
    assert {s.op.__name__ for s in SPECS} == set(REGISTRY)
    assert len(REGISTRY) == 29


@every_op
def test_the_reference_gives_the_result_of_the_formula(case):
    for got, expected in zip(case.on_device_result(), case.expected(), strict=True):
        assert relative_rms(got, expected) < TOLERANCE


@every_op
def test_the_reference_gives_the_same_on_numpy_arrays(case):
    for got, expected in zip(case.on_host_result(), case.expected(), strict=True):
        assert relative_rms(got, expected) < 1e-5


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.id)
def test_results_have_the_shape_and_type_of_their_buffers(spec, dtype):
    if dtype == mx.bfloat16 and device.on_cpu() and spec.gathers_dense:
        pytest.skip("MLX's dense gather on a CPU takes float32 only")
    case = spec.build(dtype)
    results = zip(case.written, case.on_device_result(), case.expected(), strict=True)
    for name, got, expected in results:
        info = case.pool.info(getattr(case.op, name))
        assert got.dtype == info.dtype, f"{name}: {got.dtype} for {info.dtype}"
        assert fits(info.shape, got.shape)
        # MLX's quantised product on a CPU sums in bfloat16.
        assert relative_rms(got.astype(mx.float32), expected) < 5e-2


def projected(outputs, directions):
    """Return the inner product of all outputs with ``directions``, to differentiate."""
    return sum((x * d).sum() for x, d in zip(outputs, directions, strict=True))


CONSTANT = (ops.ZeroBuffer, ops.EmbedGatherNTokens)


def has_slopes(spec: Spec) -> bool:
    """Return whether an Op depends on its inputs; ranks exchange bits of rows."""
    return spec.op not in CONSTANT and "shared" not in spec.fields


@pytest.mark.parametrize(
    "spec", [s for s in SPECS if has_slopes(s)], ids=lambda s: s.id
)
def test_gradients_are_the_slopes_of_the_formula(spec):
    case, rng, step = spec.build(), np.random.default_rng(7), 1e-5
    inputs = {k: x for k, x in case.inputs.items() if is_float(x) and k != "inv_freq"}
    towards = {k: rng.standard_normal(x.shape) for k, x in inputs.items()}
    directions = [
        rng.standard_normal(x.shape).astype(np.float32) * is_float(x)
        for x in case.expected()
    ]

    def loss(given):
        return projected(case.on_device_result(**given), map(mx.array, directions))

    def formula(distance):
        moved = {k: x + distance * towards[k] for k, x in inputs.items()}
        return projected(case.expected(**moved), directions)

    gradients = mx.grad(loss)({k: case.on_device(k) for k in inputs})
    parts = [np.array(gradients[k], np.float64) * towards[k] for k in inputs]
    slope = (formula(step) - formula(-step)) / (2 * step)
    scale = np.sqrt(sum((part**2).sum() for part in parts))
    assert abs(sum(part.sum() for part in parts) - slope) < 10 * TOLERANCE * scale


# Routing and routed experts.
@on_both
def test_ties_between_logits_go_to_the_lower_expert(to):
    case = spec(ops.MoeSoftmaxTopK, n_tokens=3, n_experts=301, k=10).build()
    logits = np.zeros((3, 301), np.float32)
    logits[1, 7::2], logits[2, 150:] = 1, 2
    indices, weights = case.op.reference(to(logits))
    assert np.array(indices).tolist() == [
        list(range(10)),
        list(range(7, 27, 2)),
        list(range(150, 160)),
    ]
    assert np.ptp(np.array(weights), axis=1).tolist() == [0, 0, 0]


@on_both
def test_routing_survives_logits_that_overflow_a_naive_softmax(to):
    case = spec(ops.MoeSoftmaxTopK, n_tokens=1, n_experts=3, k=2).build()
    indices, weights = case.op.reference(to(np.array([[-1e4, 1e4, 1e4]], np.float32)))
    assert np.array(indices).tolist() == [[1, 2]]
    assert np.array(weights).tolist() == [[0.5, 0.5]]


class ShuffledExperts:
    """Experts in permuted slots, given out in permuted waves of uneven length."""

    def __init__(self, experts: ExpertWeights, seed: int):
        self.rng = np.random.default_rng(seed)
        self.slot_of = self.rng.permutation(experts.gate.w.shape[0])
        held = mx.array(self.slot_of.argsort())
        stacks = (experts.gate, experts.up, experts.down)
        self.weights = ExpertWeights(*(take(stack, held) for stack in stacks))
        self.events: list[int | str] = []

    resident = None

    def slots(self, indices: mx.array) -> mx.array:
        return mx.array(self.slot_of)[indices].astype(mx.uint32)

    def portions(self, indices: mx.array) -> Iterator[tuple[np.ndarray, mx.array]]:
        ids = np.array(indices).ravel()
        for wave in self.waves(np.unique(ids).tolist()):
            places = np.flatnonzero(np.isin(ids, [expert for expert, _ in wave]))
            yield places, mx.array(self.slot_of[ids[places]].astype(np.uint32))

    def parts(self, indices: mx.array) -> Iterator[tuple[list[int], list[int]]]:
        slots = np.array(self.slots(indices)).ravel()
        left = self.rng.permutation(slots.size).tolist()
        while left:
            n = int(self.rng.integers(1, 4))
            columns, left = left[:n], left[n:]
            yield columns, slots[columns].tolist()

    def waves(self, experts: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
        left = self.rng.permutation(experts).tolist()
        while left:
            n = int(self.rng.integers(1, 4))
            wave, left = left[:n], left[n:]
            self.events += wave
            yield [(expert, int(self.slot_of[expert])) for expert in wave]

    def guard(self, *outputs: mx.array) -> None:
        self.events.append(f"guard {len(outputs)}")


def take(weight: Weight, index: mx.array) -> Weight:
    parts = (weight.w, weight.scales, weight.biases)
    taken = (None if x is None else x[index] for x in parts)
    return Weight(*taken, weight.quantization)


@pytest.mark.parametrize("by_blocks", [False, True])
def test_portions_have_the_rows_for_which_a_gpu_takes_the_kernel_of_the_whole_call(
    by_blocks, monkeypatch
):
    case = spec(ops.MoeGatherIdFuse, Q4, **routed(40, 64, 32, 11, 5)).build()
    experts = case.inputs.pop("experts")
    given = [mx.array(x) for x in case.inputs.values()]
    expected = case.op.reference(*given, experts)
    calls: list[tuple[int, int, bool]] = []
    original = mx.gather_qmm

    def note(x, w, *rest, **options):
        calls.append((options["rhs_indices"].size, len(w), options["sorted_indices"]))
        return original(x, w, *rest, **options)

    monkeypatch.setattr(mx, "gather_qmm", note)
    monkeypatch.setattr(device, "multiplies_row_by_row", lambda: False)
    monkeypatch.setattr(device, "multiplies_by_blocks", lambda *_: by_blocks)
    got = case.op.reference(*given, ShuffledExperts(experts.weights, 0))
    assert mx.array_equal(got, expected)
    assert len(calls) > 9
    for n_rows, n_matrices, is_sorted in calls:
        assert n_rows >= 64 and is_sorted
        assert not by_blocks or n_rows >= 4 * n_matrices


@on_both
@pytest.mark.parametrize("form", [None, Q4, Q8], ids=["dense", "4bit", "8bit"])
@pytest.mark.parametrize("n", [2, 9])
def test_the_sum_over_experts_has_the_same_bits_in_any_order_of_waves(form, n, to):
    """Two tokens give an expert so few rows that several experts share a product."""
    case = spec(ops.MoeBatchedPermuteFuse, form, **routed(n, 64, 32, 11, 5)).build()
    experts = case.inputs.pop("experts")
    mlp_in, indices, weights, out_sum = map(to, case.inputs.values())

    def bits(source):
        result = case.op.reference(mlp_in, indices, weights, source, out_sum)
        return np.array(result).tobytes()

    expected = bits(experts)
    for seed in range(5):
        assert bits(ShuffledExperts(experts.weights, seed)) == expected


def test_each_expert_is_visited_once_and_guarded_before_the_next_wave():
    case = spec(ops.MoeBatchedPermuteFuse, **routed(9, 33, 17, 11, 5)).build()
    source = ShuffledExperts(case.inputs["experts"].weights, seed=3)
    case.inputs["experts"] = source
    case.on_device_result()
    visited = [e for e in source.events if isinstance(e, int)]
    assert sorted(visited) == np.unique(case.inputs["indices"]).tolist()
    n_open = 0
    for event in source.events:
        n_open = n_open + 1 if isinstance(event, int) else n_open - int(event[6:])
        assert 0 <= n_open <= 3
    assert n_open == 0


@on_both
@pytest.mark.parametrize("k", [1, 2, 3, 7, 10])
@pytest.mark.parametrize("form", [None, Q4, Q8], ids=["dense", "4bit", "8bit"])
def test_the_routed_experts_agree_however_they_are_run(form, k, to):
    case = spec(ops.MoeBatchedPermuteFuse, form, **routed(7, 64, 32, 13, k)).build()
    case.inputs["out_sum"][:] = 0
    (expected,) = case.expected()
    source = ShuffledExperts(case.inputs["experts"].weights, seed=k)
    mlp_in, indices, weights = (
        to(case.inputs[n]) for n in ("mlp_in", "indices", "weights")
    )
    sizes = routed(7, 64, 32, 13, k)
    gather = spec(ops.MoeGatherIdFuse, form, **sizes).build().op
    decode = spec(ops.MoeDecodeExperts, form, **sizes | {"n_tokens": 1}).build().op
    by_token = [
        decode.reference(
            mlp_in[i : i + 1], indices[i : i + 1], weights[i : i + 1], source
        )
        for i in range(7)
    ]
    out_sum = to(case.inputs["out_sum"])
    for got in (
        case.op.reference(mlp_in, indices, weights, source, out_sum),
        gather.reference(mlp_in, indices, weights, source),
        namespace(mlp_in).concatenate(by_token),
    ):
        assert relative_rms(got, expected) < TOLERANCE


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("form", [None, Q4, MXFP4], ids=["dense", "4bit", "mxfp4"])
@pytest.mark.parametrize(
    "op", [ops.MoeDecodeExperts, ops.MoeGatherIdFuse, ops.MoeBatchedPermuteFuse]
)
def test_experts_of_any_stored_type_give_the_same_on_numpy_arrays(op, form, dtype):
    case = spec(op, form, **routed(1, 64, 32, 3, 2)).build()
    rng = np.random.default_rng(5)
    stored = ResidentExperts(random_experts(rng, 3, 64, 32, form, dtype))
    case.inputs["experts"] = stored
    (on_host,), (on_device,) = case.on_host_result(), case.on_device_result()
    assert relative_rms(on_host, on_device) < TOLERANCE


@pytest.mark.parametrize("n", [5, 31], ids=["5x3", "31x3-sorted"])
@pytest.mark.parametrize("form", [None, Q4], ids=["dense", "4bit"])
def test_routed_experts_equal_switch_glu(form, n):
    mx.random.seed(3)
    stock = SwitchGLU(64, 32, 7)
    if form:
        nn.quantize(stock, form.group_size, form.bits)
    parts = ("weight", "scales", "biases")
    projections = (stock.gate_proj, stock.up_proj, stock.down_proj)
    stacks = [Weight(*(p.get(x) for x in parts), form) for p in projections]
    case = spec(ops.MoeGatherIdFuse, form, **routed(n, 64, 32, 7, 3)).build()
    case.inputs["experts"] = ResidentExperts(ExpertWeights(*stacks))
    x, indices, weights = (
        case.on_device(field) for field in ("mlp_in", "indices", "weights")
    )
    expected = (stock(x, indices) * weights[..., None]).sum(axis=-2)
    assert relative_rms(case.on_device_result()[0], expected) < TOLERANCE


# Gated DeltaNet.
def rows_of(shape):
    return np.arange(shape[0])[:, None]


DECAYS = {
    "gentle": lambda rng, shape: rng.uniform(0.9, 1, shape),
    "strong": lambda rng, shape: rng.uniform(0, 1e-6, shape),
    "reset": lambda rng, shape: rng.uniform(0.9, 1, shape) * (rows_of(shape) % 64 > 49),
    "mixed": lambda rng, shape: rng.choice([0, 1e-30, 1e-3, 0.9, 0.999], shape),
}


def delta_case(op, n, decay="gentle", **fields):
    inputs = dict(DELTA_INPUTS, g_decay=DECAYS[decay])
    return spec(op, n_tokens=n, **DELTA, **fields, **inputs).build()


@pytest.mark.parametrize("n", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("decay", DECAYS)
def test_chunks_equal_the_token_by_token_rule(n, decay):
    case = delta_case(ops.GatedDeltaNetChunkwise, n, decay)
    expected = case.expected()
    for results in (case.on_device_result(), case.on_host_result()):
        for got, want in zip(results, expected, strict=True):
            assert relative_rms(got, want) < max(TOLERANCE, 1e-4)


@pytest.mark.parametrize("n", [1, 63, 130])
@pytest.mark.parametrize("decay", DECAYS)
def test_steps_equal_mlx_lms_gated_delta(n, decay):
    case = delta_case(ops.GatedDeltaNetStepNTokens, n, decay, n_seqs=1)
    conv, g, beta, state = (
        case.on_device(f)[None] for f in ("conv_out", "g_decay", "beta_gate", "state")
    )
    q, k, v = mx.split(conv, [15, 30], axis=-1)
    q, k, v = q.reshape(1, n, 3, 5), k.reshape(1, n, 3, 5), v.reshape(1, n, 6, 7)
    expected_y, expected_state = gated_delta.gated_delta_ops(q, k, v, g, beta, state[0])
    for got_state, got_y in (case.on_device_result(), case.on_host_result()):
        assert relative_rms(got_y, expected_y.reshape(n, -1)) < TOLERANCE
        assert relative_rms(got_state, expected_state) < TOLERANCE


@on_both
@pytest.mark.parametrize("chunk_size", [1, 2, 16, 128])
def test_the_chunk_length_does_not_matter(chunk_size, to):
    case = delta_case(ops.GatedDeltaNetChunkwise, 37, chunk_size=chunk_size)
    got = case.op.reference(*map(to, case.inputs.values()))
    for result, expected in zip(got, case.expected(), strict=True):
        assert relative_rms(result, expected) < TOLERANCE


@on_both
@pytest.mark.parametrize(
    "op", [ops.GatedDeltaNetStepNTokens, ops.GatedDeltaNetChunkwise]
)
def test_the_delta_state_carries_over_a_split_prompt(op, to):
    case = delta_case(op, 37)
    state, *rows = map(to, case.inputs.values())
    whole_state, whole = case.op.reference(state, *rows)
    outs, start = [], 0
    for n in (17, 1, 19):
        part = replace(case.op, n_tokens=n)
        state, out = part.reference(state, *(x[start : start + n] for x in rows))
        outs.append(np.array(out))
        start += n
    assert relative_rms(np.concatenate(outs), whole) < TOLERANCE
    assert relative_rms(state, whole_state) < TOLERANCE


@on_both
@pytest.mark.parametrize(
    "op", [ops.GatedDeltaNetStepNTokens, ops.GatedDeltaNetChunkwise]
)
def test_masked_tokens_leave_the_delta_state_alone(op, to):
    n, n_padding = 13, 4
    gates = spec(ops.ComputeDecayBetaNTokens, n_tokens=n, num_v_heads=6).build()
    alpha, beta, _ = gates.inputs.values()
    weights = [Weight(to(np.array(w.w))) for w in gates.weights.values()]
    mask = np.arange(n)[None] >= n_padding
    g, beta = gates.op.reference(to(alpha), to(beta), to(mask), *weights)
    case = delta_case(op, n)
    state, conv = to(case.inputs["state"]), to(case.inputs["conv_out"])
    padded_state, padded = case.op.reference(state, conv, g, beta)
    short = replace(case.op, n_tokens=n - n_padding)
    bare_state, bare = short.reference(
        state, conv[n_padding:], g[n_padding:], beta[n_padding:]
    )
    assert relative_rms(padded[n_padding:], bare) < TOLERANCE
    assert relative_rms(padded_state, bare_state) < TOLERANCE


@pytest.mark.parametrize("n_seqs", [1, 3])
def test_masks_act_as_in_mlx_lms_gated_delta(n_seqs):
    t, rng = 9, np.random.default_rng(11)
    mask = np.arange(t) >= rng.integers(0, t, (n_seqs, 1))
    gates = spec(
        ops.ComputeDecayBetaNTokens,
        n_tokens=n_seqs * t,
        n_seqs=n_seqs,
        num_v_heads=6,
        mask=lambda *_: mask,
    ).build()
    g, beta = gates.on_device_result()
    a_log, dt_bias = (w.w for w in gates.weights.values())
    alpha, beta_in = gates.on_device("alpha_in"), gates.on_device("beta_in")
    stock_g = gated_delta.compute_g(a_log, alpha, dt_bias).reshape(n_seqs, t, 6)
    stock_beta = mx.sigmoid(beta_in).reshape(n_seqs, t, 6)
    case = delta_case(ops.GatedDeltaNetChunkwise, n_seqs * t, n_seqs=n_seqs)
    state, conv = case.on_device("state"), case.on_device("conv_out")
    q, k, v = mx.split(conv.reshape(n_seqs, t, -1), [15, 30], axis=-1)
    q, k = q.reshape(n_seqs, t, 3, 5), k.reshape(n_seqs, t, 3, 5)
    v = v.reshape(n_seqs, t, 6, 7)
    expected_y, expected_state = gated_delta.gated_delta_ops(
        q, k, v, stock_g, stock_beta, state, mx.array(mask)
    )
    got_state, got_y = case.on_device_result(g_decay=g, beta_gate=beta)
    assert relative_rms(got_state, expected_state) < TOLERANCE
    seen = mask.reshape(-1)
    expected_y = np.array(expected_y.reshape(n_seqs * t, -1))
    assert relative_rms(np.array(got_y)[seen], expected_y[seen]) < TOLERANCE


def test_q_and_k_are_normalised_as_in_mlx_lm():
    case = next(s for s in SPECS if s.op is ops.RmsNormQkNTokens).build()
    q, k, rest = mx.split(case.on_device("x"), [15, 30], axis=1)
    q, k = q.reshape(3, 3, 5), k.reshape(3, 3, 5)
    q, k = gated_delta.normalize_qk(q, k, inv_scale=5**-0.5, eps=EPS)
    expected = mx.concatenate([q.reshape(3, 15), k.reshape(3, 15), rest], axis=1)
    assert relative_rms(case.on_device_result()[0], expected) < TOLERANCE


@pytest.mark.parametrize("note", ["", "large"], ids=["usual", "large"])
def test_the_decay_is_mlx_lms(note):
    specs = (s for s in SPECS if s.op is ops.ComputeDecayBetaNTokens)
    case = next(s for s in specs if s.note == note).build()
    a_log, dt_bias = (w.w for w in case.weights.values())
    expected = gated_delta.compute_g(a_log, case.on_device("alpha_in"), dt_bias)
    assert relative_rms(case.on_device_result()[0], expected) < TOLERANCE


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["f32", "bf16"])
def test_the_gated_norm_is_mlx_lms(dtype):
    case = spec(
        ops.GatedRmsNormNTokens, n_tokens=5, num_v_heads=3, value_dim=7, eps=EPS
    ).build(dtype)
    stock = Qwen3NextRMSNormGated(7, EPS)
    stock.weight = case.weights["weight"].w
    values, z = (case.on_device(f).reshape(5, 3, 7) for f in ("values", "z"))
    expected = stock(values, z).reshape(5, 21)
    (got,) = case.on_device_result()
    assert got.dtype == expected.dtype == dtype
    got, expected = got.astype(mx.float32), expected.astype(mx.float32)
    assert relative_rms(got, expected) < (TOLERANCE if dtype == mx.float32 else 1e-3)


# The states of the convolution and the cache.
@on_both
@pytest.mark.parametrize("split", [(1, 6), (2, 5), (3, 4), (6, 1), (1, 1, 5)], ids=str)
def test_the_convolution_continues_where_the_last_chunk_ended(split, to):
    case = spec(ops.Conv1dStepNTokens, n_tokens=14, n_seqs=2, conv_dim=5).build()
    weight = Weight(to(np.array(case.weights["weight"].w)))
    state = to(case.inputs["conv_state"])
    chunk = case.inputs["qkv_in"].reshape(2, 7, 5)
    whole_state, whole = case.op.reference(
        to(case.inputs["qkv_in"]), state, None, None, weight
    )
    outs, start = [], 0
    for t in split:
        rows = to(np.ascontiguousarray(chunk[:, start : start + t]).reshape(2 * t, 5))
        part = replace(case.op, n_tokens=2 * t)
        state, out = part.reference(rows, state, None, None, weight)
        outs.append(np.array(out).reshape(2, t, 5))
        start += t
    assert relative_rms(np.concatenate(outs, 1).reshape(14, 5), whole) < 1e-6
    assert relative_rms(state, whole_state) < 1e-6


@on_both
def test_lengths_outside_the_chunk_end_at_its_borders(to):
    case = spec(ops.Conv1dStepNTokens, n_tokens=15, n_seqs=3, conv_dim=5).build()
    weight = Weight(to(np.array(case.weights["weight"].w)))
    rows, state = to(case.inputs["qkv_in"]), to(case.inputs["conv_state"])

    def state_after(lengths):
        lengths = to(np.array(lengths, np.int32))
        return np.array(case.op.reference(rows, state, None, lengths, weight)[0])

    assert np.array_equal(state_after([-3, 2, 9]), state_after([0, 2, 5]))


def test_the_convolution_is_nn_conv1d_after_its_history():
    case = spec(ops.Conv1dStepNTokens, n_tokens=14, n_seqs=2, conv_dim=5).build()
    stock = nn.Conv1d(5, 5, 4, groups=5, bias=False)
    stock.weight = case.weights["weight"].w
    chunk = case.on_device("qkv_in").reshape(2, 7, 5)
    history = mx.concatenate([case.on_device("conv_state"), chunk], axis=1)
    expected = nn.silu(stock(history)).reshape(14, 5)
    assert relative_rms(case.on_device_result()[1], expected) < TOLERANCE


@on_both
def test_appended_rows_stand_where_mlx_lms_cache_has_them(to):
    stock, rng = KVCache(), np.random.default_rng(2)
    op = next(s for s in SPECS if s.op is ops.KvCacheAppendNTokens).build().op
    keys = values = to(np.full((2, 3, 11, 5), np.nan, np.float32))
    row = 0
    for t in (4, 1, 3):
        k, v = rng.standard_normal((2, 2, t, 3, 5)).astype(np.float32)
        stock.update_and_fetch(*(mx.array(x.swapaxes(1, 2)) for x in (k, v)))
        rows = [to(x.reshape(2 * t, 15)) for x in (k, v)]
        start = to(np.array([row], np.int32))
        part = replace(op, n_tokens=2 * t)
        keys, values = part.reference(*rows, keys, values, start)
        row += t
    expected = stock.keys_and_values()
    for got, want in zip((keys, values), expected, strict=True):
        assert np.array_equal(np.array(got)[:, :, :row], np.array(want))
        assert np.isnan(np.array(got)[:, :, row:]).all()
