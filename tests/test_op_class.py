"""An incomplete Op does not import; an Op's cost follows from its sizes."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from op_cases import Q2, Q4, Q4_64, Q8, SPECS, routed, spec

from moeflux_mlx import ops
from moeflux_mlx.engine.graph import (
    REGISTRY,
    Access,
    Cost,
    In,
    InOut,
    Op,
    Out,
    WeightRef,
)
from moeflux_mlx.engine.graph.roles import ExpertBaseBuf, HiddenBuf, ResidualBuf
from moeflux_mlx.experts.weights import Quantization


@pytest.fixture(autouse=True)
def registry():
    """Unregister the Ops that a test defines."""
    before = dict(REGISTRY)
    yield REGISTRY
    REGISTRY.clear()
    REGISTRY.update(before)


def shapes(self):
    return {"x": (3, 7), "out": (3, 7)}


def cost(self):
    return Cost()


def reference(self, x, weight):
    return x


WHOLE = {
    "__doc__": "Double ``[3, 7]``.",
    "__annotations__": {
        "x": In[HiddenBuf],
        "weight": WeightRef,
        "out": Out[ResidualBuf],
    },
    "shapes": shapes,
    "cost": cost,
    "reference": reference,
}


def define(**changes: Any) -> type[Op]:
    """Define the Op class ``Double`` with ``changes``; None removes an entry."""
    body = {k: v for k, v in (WHOLE | changes).items() if v is not None}
    return type(Op)("Double", (Op,), body)


def test_a_whole_op_is_registered_with_its_fields_read_off_its_annotations(registry):
    double = define()
    assert registry["Double"] is double
    assert [(f.name, f.role, f.access) for f in double.buffer_fields] == [
        ("x", HiddenBuf, Access.READ),
        ("out", ResidualBuf, Access.WRITE),
    ]
    assert double.weight_fields == ("weight",)


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"shapes": None}, "shapes()"),
        ({"cost": None}, "cost()"),
        ({"reference": None}, "reference()"),
        ({"__doc__": None}, "docstring"),
        ({"__annotations__": {"x": In[HiddenBuf]}}, "writes no buffer"),
    ],
    ids=["shapes", "cost", "reference", "docstring", "written-buffer"],
)
def test_an_op_that_lacks_a_part_does_not_import(changes, missing, registry):
    with pytest.raises(TypeError) as error:
        define(**changes)
    assert "[Double]" in str(error.value) and missing in str(error.value)
    assert "Double" not in registry


def test_a_second_op_of_a_name_is_refused(registry):
    first = define()
    with pytest.raises(TypeError, match="Double"):
        define()
    assert registry["Double"] is first


@pytest.mark.parametrize(
    "wrong",
    [
        lambda self, x: x,
        lambda self, weight, x: x,
        lambda self, x, weight, out: x,
        lambda self, y, weight: y,
    ],
    ids=["too-few", "order", "written-field", "name"],
)
def test_a_reference_takes_the_read_fields_then_the_weights(wrong, registry):
    with pytest.raises(TypeError) as error:
        define(reference=wrong)
    assert str(error.value).startswith("[Double] reference() expected parameters ")
    assert "['self', 'x', 'weight']" in str(error.value)
    assert "Double" not in registry


def test_an_in_place_field_is_read_and_written():
    fields = {"x": InOut[HiddenBuf]}
    op = define(__annotations__=fields, reference=lambda self, x: x)
    (field,) = op.buffer_fields
    assert field.access == Access.READ | Access.WRITE and not field.optional


def test_an_optional_field_is_a_parameter_of_the_reference():
    fields = {"x": In[HiddenBuf] | None, "out": Out[ResidualBuf]}
    op = define(__annotations__=fields, x=None, reference=lambda self, x: 0)
    assert op.buffer_fields[0].optional


def test_ops_cannot_be_changed_once_made():
    op = SPECS[0].build().op
    with pytest.raises(AttributeError):
        op.label = "other"


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.id)
def test_every_op_has_shapes_for_its_fields_and_a_cost(spec):
    op = spec.build().op
    fields = {f.name for f in op.buffer_fields} | set(op.weight_fields)
    assert set(op.shapes()) == fields
    assert op.cost().bytes > 0 and op.cost().flops >= 0
    assert op.scratch_bytes(4) >= op.scratch_bytes(2) >= 0


READS_EXPERTS = (ops.MoeDecodeExperts, ops.MoeGatherIdFuse, ops.MoeBatchedPermuteFuse)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.id)
def test_only_ops_that_read_experts_read_from_disk(spec):
    op = spec.build().op
    assert (op.cost().ssd_bytes > 0) == isinstance(op, READS_EXPERTS)
    reads_experts = any(f.role is ExpertBaseBuf for f in op.buffer_fields)
    assert reads_experts == isinstance(op, READS_EXPERTS)


@pytest.mark.parametrize(
    ("n", "visited"), [(1, 3), (2, 6), (3, 7), (9, 7)], ids=lambda v: str(v)
)
@pytest.mark.parametrize("op", READS_EXPERTS)
def test_an_expert_is_read_from_disk_at_most_once(op, n, visited):
    case = spec(op, **routed(n, 33, 17, 7, 3)).build()
    assert case.op.cost().ssd_bytes == visited * case.op.expert_bytes
    assert case.op.cost().flops >= n * 3 * 6 * 33 * 17


@pytest.mark.parametrize("form", [None, Q4, Q4_64, Q8, Q2], ids=str)
@pytest.mark.parametrize("n", [1, 3])
def test_a_product_costs_two_flops_a_weight_and_the_packed_bytes(n, form):
    sizes = dict(n_tokens=n, in_dim=192, out_dim=7)
    case = spec(ops.MatvecNTokens, form, **sizes).build()
    weight = case.weights["weight"]
    parts = (weight.w, weight.scales, weight.biases)
    packed = sum(x.nbytes for x in parts if x is not None)
    assert case.op.cost() == Cost(2 * n * 192 * 7, 4 * n * (192 + 7) + packed)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize(
    "form",
    [
        Q2,
        Q4,
        Q8,
        Quantization(3, 32),
        Quantization(6, 64),
        Quantization(4, 32, "mxfp4"),
    ],
    ids=str,
)
def test_a_weight_has_the_bytes_of_its_packed_parts(form, dtype):
    dense = mx.ones((5, 192), dtype)
    parts = mx.quantize(dense, form.group_size, form.bits, mode=form.mode)
    ref = WeightRef("w", (5, 192), form, parts[1].dtype)
    assert ref.n_bytes == sum(x.nbytes for x in parts)
    assert WeightRef("w", (5, 192), None, dtype).n_bytes == dense.nbytes


def test_costs_add_up_part_by_part():
    assert Cost(1, 20, 300) + Cost(4, 50, 600) == Cost(5, 70, 900)
    assert Cost() + Cost(1, 2, 3) == Cost(1, 2, 3)
