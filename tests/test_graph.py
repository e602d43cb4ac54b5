"""A graph accepts only fitting roles, shapes, weights and buffers of its own pool."""

from __future__ import annotations

import dataclasses
from functools import reduce

import mlx.core as mx
import pytest
from op_cases import CONCRETE, Q4, SPECS

from moeflux_mlx import ops
from moeflux_mlx.engine.graph import Access, BufferPool, BufId, Cost, Graph, WeightRef
from moeflux_mlx.engine.graph import roles as b
from moeflux_mlx.engine.graph.buffers import fits
from moeflux_mlx.errors import GraphError

N, DIM = 3, 7


@pytest.fixture
def pool():
    return BufferPool()


@pytest.fixture
def graph(pool):
    return Graph(pool, "test")


def rows(pool, role, label="rows", dim=DIM):
    return pool.alloc(role, (N, dim), label)


def add(pool, label="resid", **changes):
    """A residual add over ``[3, 7]``, with some fields replaced."""
    fields = {
        "a": lambda: rows(pool, b.OProjOutBuf, "mixed"),
        "b": lambda: rows(pool, b.HiddenBuf, "stream"),
        "out": lambda: rows(pool, b.ResidualBuf, "sum"),
    }
    fields = {k: make() for k, make in fields.items() if k not in changes}
    return ops.ResidualAddNTokens(label=label, n_tokens=N, dim=DIM, **fields, **changes)


def matvec(pool, weight, label="q_proj"):
    return ops.MatvecNTokens(
        label=label,
        weight=weight,
        input=rows(pool, b.AttnInputBuf),
        output=rows(pool, b.QProjOutBuf, dim=5),
        in_dim=DIM,
        out_dim=5,
        n_tokens=N,
    )


def refusal(graph, op):
    """Return the error of adding ``op``, which must not change the graph."""
    with pytest.raises(GraphError) as error:
        graph.push(op)
    assert len(graph) == 0
    return str(error.value)


# Refused.
@pytest.mark.parametrize(
    "op", [ops.MoeDecodeExperts, ops.MoeGatherIdFuse, ops.MoeBatchedPermuteFuse]
)
def test_the_pre_norm_residual_is_not_a_moe_input(op):
    case = next(s for s in SPECS if s.op is op).build()
    shape = case.pool.info(case.op.mlp_in).shape
    residual = case.pool.alloc(b.ResidualBuf, shape, "h_mid")
    wrong = dataclasses.replace(case.op, mlp_in=residual, label="experts")
    assert refusal(Graph(case.pool), wrong) == (
        f"[{op.__name__}] 'experts': field 'mlp_in' expected MoeInputBuf but got "
        "ResidualBuf"
    )


def test_a_wrong_shape_is_refused(graph, pool):
    wide = rows(pool, b.OProjOutBuf, dim=DIM + 1)
    assert refusal(graph, add(pool, a=wide)) == (
        "[ResidualAddNTokens] 'resid': field 'a' expected shape (3, 7) but got (3, 8)"
    )


def test_a_shape_of_another_rank_is_refused(graph, pool):
    deep = pool.alloc(b.OProjOutBuf, (N, DIM, 1), "deep")
    assert "expected shape (3, 7) but got (3, 7, 1)" in refusal(
        graph, add(pool, a=deep)
    )


@pytest.mark.parametrize("quantization", [None, Q4], ids=["dense", "4bit"])
def test_a_weight_of_the_wrong_shape_is_refused(graph, pool, quantization):
    weight = WeightRef("self_attn.q_proj", (DIM, 5), quantization)
    assert refusal(graph, matvec(pool, weight)) == (
        "[MatvecNTokens] 'q_proj': field 'weight' expected shape (5, 7) but got (7, 5)"
    )


def test_a_missing_weight_is_refused(graph, pool):
    message = refusal(graph, matvec(pool, None))
    assert message.startswith("[MatvecNTokens] 'q_proj': field 'weight' expected ")
    assert message.endswith(" but got NoneType")


def test_a_missing_buffer_is_refused(graph, pool):
    assert refusal(graph, add(pool, b=None)) == (
        "[ResidualAddNTokens] 'resid': field 'b' expected RmsNormIn but got NoneType"
    )


def test_an_array_in_place_of_a_buffer_is_refused(graph, pool):
    array = mx.zeros((N, DIM))
    assert "field 'a' expected ResidualIn but got array" in refusal(
        graph, add(pool, a=array)
    )


def test_a_buffer_beyond_the_pool_is_refused_by_name(graph, pool):
    message = refusal(graph, add(pool, a=BufId(99, b.OProjOutBuf)))
    assert message.startswith("[ResidualAddNTokens] 'resid': field 'a'")
    assert "%99" in message


def test_a_buffer_of_another_pool_is_refused_when_its_role_is_another(graph, pool):
    rows(pool, b.HiddenBuf)
    foreign = rows(BufferPool(), b.OProjOutBuf)
    assert refusal(graph, add(pool, a=foreign)) == (
        "[ResidualAddNTokens] 'resid': field 'a' is %0, which this pool allocated as "
        "HiddenBuf, not OProjOutBuf"
    )


# Accepted.
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.id)
def test_every_op_is_taken_over_buffers_of_its_roles(spec):
    case = spec.build()
    graph = Graph(case.pool)
    graph.push(case.op)
    assert list(graph) == [case.op]


@pytest.mark.parametrize(
    "role", [b.EmbedOutBuf, b.HiddenBuf, b.ResidualBuf, b.QBuf, b.KProjOutBuf]
)
def test_a_union_takes_each_of_its_roles(graph, pool, role):
    assert issubclass(role, b.RmsNormIn)
    graph.push(add(pool, b=rows(pool, role)))
    assert len(graph) == 1


@pytest.mark.parametrize("role", [b.AttnInputBuf, b.LogitsBuf, b.MoeOutSumBuf])
def test_a_union_refuses_all_others(graph, pool, role):
    message = refusal(graph, add(pool, b=rows(pool, role)))
    assert f"field 'b' expected RmsNormIn but got {role.__name__}" in message


def test_a_length_known_only_at_run_time_fits_any(pool):
    assert fits((3, None), (3, 5)) and fits((3, 5), (3, None))
    assert not fits((3, None), (4, 5)) and not fits((None,), (3, 5))


# Queries.
def one_of_each():
    """One Op of every class, each over its own pool, for its fields and names only."""
    first = {spec.op: spec for spec in reversed(SPECS)}
    return [spec.build().op for spec in first.values()]


def test_ops_and_labels_keep_the_order_of_pushes(graph, pool):
    names = ["c", "a", "b"]
    for name in names:
        graph.push(add(pool, label=name))
    assert graph.labels() == names and [op.label for op in graph] == names
    assert len(graph) == 3


def test_a_variant_is_named_as_its_class():
    assert {op.variant_name for op in one_of_each()} == {
        spec.op.__name__ for spec in SPECS
    }


def test_no_op_reads_and_writes_nothing():
    for op in one_of_each():
        assert op.writes
        # Only clearing a buffer reads nothing.
        assert op.reads or isinstance(op, ops.ZeroBuffer)


def test_in_place_ops_stand_among_readers_and_writers():
    in_place = set()
    for op in one_of_each():
        for field in op.buffer_fields:
            buf = getattr(op, field.name)
            if field.access == Access.READ | Access.WRITE:
                assert buf in op.reads and buf in op.writes
                in_place.add(f"{op.variant_name}.{field.name}")
    assert in_place == {
        "RmsNormQkNTokens.x",
        "RmsNormPerHeadNTokens.x",
        "RopeNTokens.x",
        "SigmoidGateNTokens.x",
        "MoeNormalizeWeights.weights",
        "MoeBatchedPermuteFuse.out_sum",
        "KvCacheAppendNTokens.k_cache",
        "KvCacheAppendNTokens.v_cache",
        "Conv1dStepNTokens.conv_state",
        "GatedDeltaNetStepNTokens.state",
        "GatedDeltaNetChunkwise.state",
    }


def test_absent_optional_buffers_are_neither_read_nor_written():
    op = next(s for s in SPECS if s.op is ops.SdpaCausalTiled).build().op
    assert op.mask is None and op.reads == (op.q, op.k, op.v)


def test_a_buffer_prints_as_a_numbered_value():
    assert str(BufId(42, b.MoeInputBuf)) == "%42"


def test_the_dump_of_a_small_graph(graph, pool):
    x = rows(pool, b.EmbedOutBuf)
    norm = ops.RmsNormBf16NTokens(
        label="rms_in",
        x=x,
        weight=WeightRef("input_layernorm", (DIM,)),
        out=rows(pool, b.AttnInputBuf),
        dim=DIM,
        n_tokens=N,
        eps=1e-6,
    )
    graph.push(norm)
    graph.push(add(pool, b=x))
    assert graph.dump() == (
        "  0  RmsNormBf16NTokens            rms_in\n"
        "  1  ResidualAddNTokens            resid\n"
    )


def test_the_dump_of_an_empty_graph_is_empty(graph):
    assert graph.dump() == "" and graph.labels() == [] and graph.cost() == Cost()


def test_the_cost_of_a_graph_is_the_sum_of_its_ops(graph, pool):
    graph.push(matvec(pool, WeightRef("w", (5, DIM), None, mx.float32)))
    for label in "ab":
        graph.push(add(pool, label=label))
    assert graph.cost() == reduce(Cost.__add__, (op.cost() for op in graph))
    assert graph.cost().flops == 2 * N * DIM * 5 + 2 * N * DIM


# The graph as a whole.
def test_a_read_before_any_write_is_found(graph, pool):
    stream = pool.alloc(b.HiddenBuf, (N, DIM), "stream", persistent=True)
    mixed = rows(pool, b.OProjOutBuf, "mixed")
    graph.push(add(pool, a=mixed, b=stream))
    with pytest.raises(GraphError) as error:
        graph.verify()
    assert str(error.value) == (
        f"[ResidualAddNTokens] 'resid' reads {mixed} ('mixed') before any Op writes it"
    )


def test_an_in_place_op_does_not_initialise_its_input(graph, pool):
    x = rows(pool, b.AttnOutBuf, "attended")
    gate = pool.alloc(b.QGateBuf, (N, DIM), "gate", persistent=True)
    graph.push(ops.SigmoidGateNTokens(label="g", x=x, gate=gate, dim=DIM, n_tokens=N))
    with pytest.raises(GraphError, match="'attended'"):
        graph.verify()


def test_two_ops_of_one_label_are_found(graph, pool):
    stream = pool.alloc(b.HiddenBuf, (N, DIM), "stream", persistent=True)
    mixed = pool.alloc(b.OProjOutBuf, (N, DIM), "mixed", persistent=True)
    for _ in range(2):
        graph.push(add(pool, a=mixed, b=stream))
    with pytest.raises(GraphError, match=r"\[Graph\] 'test' has two Ops 'resid'"):
        graph.verify()


def test_uploaded_persistent_and_written_buffers_may_be_read(graph, pool):
    stream = pool.alloc(b.HiddenBuf, (N, DIM), "stream", persistent=True)
    mixed = rows(pool, b.OProjOutBuf, "mixed")
    pool.bind(mixed, mx.ones((N, DIM)))
    first = add(pool, label="first", a=mixed, b=stream)
    graph.push(first)
    graph.push(add(pool, label="second", a=mixed, b=first.out))
    graph.verify()


def test_unions_are_no_roles_of_their_own():
    assert all(issubclass(role, union) for union, role in CONCRETE.items())
