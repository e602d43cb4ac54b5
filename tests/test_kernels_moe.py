"""The kernels of mixtures of experts together, and the edge cases of routing."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.deepseek_v3 import group_expert_select

from moeflux_mlx.engine import simulator
from moeflux_mlx.engine.executors.sim import SimExecutor
from moeflux_mlx.engine.launch import experts, moe
from moeflux_mlx.engine.launch.check import relative_error
from moeflux_mlx.engine.ops.functions import experts_by_slot
from moeflux_mlx.errors import KernelError
from moeflux_mlx.experts.files.layout import PARTS, PROJECTIONS, ExpertLayout
from moeflux_mlx.experts.pool.pool import SlotPool
from moeflux_mlx.experts.weights import Quantization

pytestmark = pytest.mark.skipif(
    not simulator.available(), reason="the simulator needs ziglang and pyelftools"
)
# T, E, K, n_group, topk_group; the last is DeepSeek-V3's, the others are possible.
ROUTINGS = [(3, 40, 6, 8, 3), (5, 48, 10, 1, 1), (2, 64, 1, 4, 2), (4, 256, 8, 8, 4)]
T, D, N, E, K = 37, 64, 96, 5, 2
Q = Quantization(4, 32)
SLOTS = np.array([6, 1, 4, 3, 0], np.uint32)


def run(launch):
    outputs = SimExecutor(checked=False).run(launch)
    return outputs if len(outputs) > 1 else outputs[0]


def normal(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return mx.array(rng.standard_normal(shape).astype(np.float32))


def by_expert(indices, weights):
    """Return a token's choices sorted by id: mlx-lm's are unordered."""
    order = mx.argsort(indices, axis=-1)
    return (mx.take_along_axis(x, order, axis=-1) for x in (indices, weights))


@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "raw"])
def test_noaux_routing_chooses_as_mlx_lm_does(routing, normalize):
    t, e, k, n_group, topk_group = routing
    logits, bias = normal(t, e), 0.1 * normal(e, seed=1)
    wanted = group_expert_select(logits, bias, k, n_group, topk_group, 2.5, normalize)
    divides = normalize and k > 1
    launch = moe.moe_noaux_topk(logits, bias, k, n_group, topk_group, 2.5, divides)
    indices, weights = by_expert(*run(launch))
    expected_indices, expected_weights = by_expert(*wanted)
    assert indices.tolist() == expected_indices.tolist()
    assert relative_error(weights, expected_weights) < 1e-6


def test_noaux_routing_never_chooses_experts_of_dropped_groups():
    logits = mx.array([[5.0, 4.0, -1.0, -2.0, 3.0, 2.0, -3.0, -4.0]])
    # All scores are negative, so mlx-lm prefers the dropped groups' zeros.
    bias = mx.full((8,), -2.0)
    by_mlx_lm, _ = group_expert_select(logits, bias, 4, 4, 2, 1.0, True)
    assert set(by_mlx_lm[0].tolist()) == {2, 3, 6, 7}
    indices, weights = run(moe.moe_noaux_topk(logits, bias, 4, 4, 2, 1.0, True))
    assert indices[0].tolist() == [0, 1, 4, 5]
    chosen = mx.sigmoid(logits[0, indices[0]])
    assert relative_error(weights[0], chosen / chosen.sum()) < 1e-6
    with pytest.raises(KernelError, match="at most 4 experts of the groups kept"):
        moe.moe_noaux_topk(logits, bias, 5, 4, 2, 1.0, True)


def test_equal_logits_go_to_the_lower_expert():
    logits = mx.zeros((2, 70))
    indices, weights = run(moe.moe_softmax_topk(logits, 10))
    assert indices.tolist() == [list(range(10))] * 2
    assert relative_error(weights, mx.full((2, 10), 1 / 70)) < 1e-6
    indices, _ = run(
        moe.moe_noaux_topk(logits[:, :64], logits[0, :64], 5, 8, 2, 1, True)
    )
    assert indices.tolist() == [list(range(5))] * 2


def test_zeros_of_either_sign_are_equal_logits():
    logits = mx.array([[-1.0, -0.0, 0.0, -0.0, 0.0]])
    indices, _ = run(moe.moe_softmax_topk(logits, 4))
    assert indices.tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("value", [np.nan, -np.inf, np.inf], ids=str)
def test_indices_exist_and_differ_whatever_the_logits(value):
    logits = mx.full((1, 40), value)
    indices, _ = run(moe.moe_softmax_topk(logits, 16))
    assert len(set(indices[0].tolist()) & set(range(40))) == 16


@pytest.fixture(scope="module")
def pool():
    """Experts at odd slots of a pool, as if read from a packed file."""
    shapes = {"gate_proj": (N, D), "up_proj": (N, D), "down_proj": (D, N)}
    parts = {}
    for projection, (o, i) in shapes.items():
        groups = ("BF16", (o, i // Q.group_size))
        words = ("U32", (o, i * Q.bits // 32))
        parts |= {
            (projection, part): form
            for part, form in zip(PARTS, (words, groups, groups), strict=True)
        }
    layout = ExpertLayout.build(parts, dict.fromkeys(PROJECTIONS, Q))
    pool = SlotPool([layout], 7)
    for slot in range(7):
        for spec in layout.tensors:
            o, i = shapes[spec.projection]
            tensors = mx.quantize(
                normal(o, i, seed=slot) / i**0.5, Q.group_size, Q.bits
            )
            tensor = tensors[PARTS.index(spec.part)]
            if spec.part != "weight":
                tensor = tensor.astype(mx.bfloat16)
            data = np.array(tensor.view(mx.uint8)).tobytes()
            pool.bytes[slot, spec.offset : spec.offset + spec.n_bytes] = np.frombuffer(
                data, np.uint8
            )
    return pool.weights(layout)


def routed(t):
    """Return indices and weights of T tokens' experts."""
    return run(moe.moe_softmax_topk(normal(t, E, seed=2), K))


def wanted(x, indices, weights, pool):
    slots = mx.array(SLOTS)[indices]
    return (experts_by_slot(x, slots, pool) * weights[..., None]).sum(axis=1)


def test_one_token_through_its_slots_in_two_launches(pool):
    x, (indices, weights) = normal(1, D), routed(1)
    slots = mx.array(SLOTS)[indices[0]]
    gate, up, down = (w.records for w in (pool.gate, pool.up, pool.down))
    act = run(
        experts.experts_gate_up_swiglu(x[0], slots, gate, up, N, Q.bits, Q.group_size)
    )
    out = run(
        experts.experts_down_sum(act, slots, weights[0], down, D, Q.bits, Q.group_size)
    )
    assert relative_error(out[None], wanted(x, indices, weights, pool)) < 1e-5


def test_many_tokens_grouped_by_expert_on_the_device(pool):
    x, (indices, weights) = normal(T, D), routed(T)
    ids, form = run(moe.moe_id_map(indices, E)), (Q.bits, Q.group_size)
    slots = mx.array(SLOTS)
    gate, up = (
        run(moe.moe_mm_id(x, w.records, *ids, slots, K, N, *form))
        for w in (pool.gate, pool.up)
    )
    act = (gate * mx.sigmoid(gate) * up).reshape(T * K, N)
    down = run(moe.moe_mm_id(act, pool.down.records, *ids, slots, K, D, *form))
    out = run(moe.moe_combine_topk(down, weights))
    assert relative_error(out, wanted(x, indices, weights, pool)) < 1e-5


def test_buckets_one_after_another_give_each_token_its_sum():
    rows, (indices, weights) = normal(T * K, D), routed(T)
    counts, lists = run(moe.moe_id_map(indices, E))
    acc = mx.zeros((T, D))
    for expert, count in enumerate(counts.tolist()):
        chosen = lists[expert, :count]
        if count:
            share = weights.reshape(-1)[chosen]
            acc = run(moe.moe_bucket_accumulate(acc, rows[chosen], chosen // K, share))
    out = run(moe.moe_combine_topk(rows.reshape(T, K, D), weights))
    assert relative_error(acc, out) < 1e-6


def test_arguments_that_no_launch_accepts_are_refused(pool):
    x, slots, up = normal(D), mx.array(SLOTS), pool.up.records
    with pytest.raises(KernelError, match=r"moe_softmax_topk.*logits.*E <= 512"):
        moe.moe_softmax_topk(normal(1, 513), 2)
    with pytest.raises(KernelError, match=r"moe_softmax_topk.*k: expected 1 to 16"):
        moe.moe_softmax_topk(normal(1, 64), 17)
    with pytest.raises(KernelError, match=r"moe_noaux_topk.*a divisor of E = 40"):
        moe.moe_noaux_topk(normal(1, 40), normal(40), 2, 16, 2, 1.0, True)
    with pytest.raises(KernelError, match=r"gate: .*groups of 128"):
        experts.experts_gate_up_swiglu(x, slots, up, up, N, 4, 128)
    with pytest.raises(KernelError, match=r"gate w: expected \d+ values of a row"):
        experts.experts_gate_up_swiglu(x, slots, up, up, 1 << 20, 4, 32)
    with pytest.raises(KernelError, match=r"bits: expected 2, 4 or 8 but got 3"):
        experts.experts_gate_up_swiglu(x, slots, up, up, N, 3, 32)
    with pytest.raises(KernelError, match=r"tokens: expected at most T = 2"):
        moe.moe_bucket_accumulate(
            normal(2, 8), normal(3, 8), mx.zeros(3, mx.uint32), normal(3)
        )
