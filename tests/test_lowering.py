"""Compare every Op, by each of its ways, with its reference on the simulator."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import pytest
from op_cases import KERNEL_SPECS, Q4, Q8, SPECS, Spec, as_list

from moeflux_mlx import ops
from moeflux_mlx.engine import lowering, simulator
from moeflux_mlx.engine.executors.sim import SimExecutor
from moeflux_mlx.engine.graph import REGISTRY, BufferPool, WeightRef, roles
from moeflux_mlx.engine.graph.op import JointRows
from moeflux_mlx.engine.launch import KERNELS
from moeflux_mlx.engine.launch.check import relative_error
from moeflux_mlx.engine.lowering import MLX, PREFERRED, WAYS
from moeflux_mlx.errors import ConfigError
from moeflux_mlx.experts.weights import Quantization

simulated = pytest.mark.skipif(
    not simulator.available(), reason="the simulator needs ziglang and pyelftools"
)
ALL_SPECS = [*SPECS, *KERNEL_SPECS]
WAY_CASES = [
    pytest.param(spec, way.name, id=f"{spec.id}-{way.name}")
    for spec in ALL_SPECS
    for way in lowering.ways(spec.build().op)
    if way.name != MLX
]


@pytest.mark.sampled
@simulated
@pytest.mark.parametrize(("spec", "way"), WAY_CASES)
def test_an_op_on_the_simulator_gives_the_result_of_its_reference(
    spec: Spec, way: str, monkeypatch
):
    case = spec.build()
    monkeypatch.setenv("MOEFLUX_LOWERING", f"{case.op.variant_name}={way}")
    executor, launched = SimExecutor(), []
    executor.on_launch = launched.append
    kernel = executor.kernel(case.op)
    weights = [case.weights.get(name) for name in case.op.weight_fields]
    inputs = [case.on_device(name) for name in case.inputs]
    got = as_list(kernel(*inputs, *weights))
    named = next(w.kernels for w in lowering.ways(case.op) if w.name == way)
    assert set(launched) <= set(named)
    wanted = case.on_device_result()
    assert len(got) == len(wanted) == len(case.written)
    for name, a, b in zip(case.written, got, wanted, strict=True):
        assert a.dtype == b.dtype, name
        limit = 2e-5 if mx.issubdtype(b.dtype, mx.floating) else 0
        assert relative_error(a, b) <= limit, name


def test_every_op_has_kernels_and_a_case_that_runs_them():
    assert set(WAYS) == set(REGISTRY.values())
    tried = {(type(p.values[0].build().op), p.values[1]) for p in WAY_CASES}
    assert tried == {(op, way.name) for op, ways in WAYS.items() for way in ways}


def test_a_way_is_named_after_a_kernel():
    names = {way.name for ways in WAYS.values() for way in ways}
    # This one prepares the operands of MLX's product.
    assert names - set(KERNELS) == {"mlx_dequantize"}


def test_the_environment_chooses_a_way(monkeypatch):
    op = next(s for s in KERNEL_SPECS if s.op.__name__ == "MatvecNTokens").build().op
    for way in lowering.ways(op):
        monkeypatch.setenv("MOEFLUX_LOWERING", f"MatvecNTokens={way.name}")
        assert lowering.choose(op).name == way.name


def test_ops_run_together_unless_the_environment_says_otherwise(monkeypatch):
    pool = BufferPool(mx.float32)
    ref = WeightRef("w", (8, 32), Quantization(4, 32, "affine"), mx.float32)
    x, out, stream, total = (
        pool.alloc(role, (1, n), str(n))
        for role, n in (
            (roles.AttnOutBuf, 32),
            (roles.OProjOutBuf, 8),
            (roles.HiddenBuf, 8),
            (roles.ResidualBuf, 8),
        )
    )
    product = ops.MatvecNTokens(
        label="product",
        weight=ref,
        input=x,
        output=out,
        in_dim=32,
        out_dim=8,
        n_tokens=1,
    )
    add = ops.ResidualAddNTokens(
        label="add", a=out, b=stream, out=total, n_tokens=1, dim=8
    )
    found = lowering.fused([product, add], None)
    assert found is not None and found.n == 2
    assert lowering.fused([product], None) is None
    assert lowering.fused([add, product], None) is None
    with monkeypatch.context() as patch:
        patch.setenv("MOEFLUX_FUSE", "0")
        assert lowering.fused([product, add], None) is None
    monkeypatch.setenv("MOEFLUX_LOWERING", "MatvecNTokens=qmm_t")
    assert lowering.fused([product, add], None) is None


def norm_and_swiglu() -> list:
    """Return a norm, both halves of a joint matrix, and their SwiGLU."""
    pool = BufferPool(mx.float32)
    x, normed, gate, up, act = (
        pool.alloc(role, (1, n), role.__name__)
        for role, n in (
            (roles.HiddenBuf, 32),
            (roles.MoeInputBuf, 32),
            (roles.SharedFfnGateBuf, 8),
            (roles.SharedFfnUpBuf, 8),
            (roles.SharedFfnActBuf, 8),
        )
    )
    weight = WeightRef("norm", (32,))
    norm = dict(x=x, weight=weight, out=normed, dim=32, n_tokens=1, eps=1e-5)
    half = dict(input=normed, in_dim=32, out_dim=8, n_tokens=1)
    form = Quantization(4, 32)
    halves = (
        WeightRef("w", (8, 32), form, joint=JointRows("both", first, 16))
        for first in (0, 8)
    )
    swiglu = dict(gate=gate, up=up, out=act, n_tokens=1, dim=8)
    return [
        ops.RmsNormBf16NTokens(label="norm", **norm),
        *(
            ops.MatvecNTokens(label="half", weight=ref, output=out, **half)
            for ref, out in zip(halves, (gate, up), strict=True)
        ),
        ops.SwigluFusedBatched(label="swiglu", **swiglu),
    ]


def test_a_swiglu_runs_with_its_products_if_nothing_else_reads_them():
    chain = norm_and_swiglu()
    found = lowering.fused(chain, None)
    assert found is not None and found.n == 4
    assert set(found.weights) == {"norm", "both"}
    norm, gate, up, swiglu = chain
    for other in (gate, swiglu):
        found = lowering.fused([*chain, other], None)
        assert found is not None and found.n == 3
    swapped = dataclasses.replace(swiglu, gate=up.output, up=gate.output)
    found = lowering.fused([norm, gate, up, swapped], None)
    assert found is not None and found.n == 3


def test_preferred_ways_of_an_executor_exist_and_come_first(monkeypatch):
    for op_name, names in (
        pair for each in PREFERRED.values() for pair in each.items()
    ):
        known = {way.name for way in WAYS[REGISTRY[op_name]]} | {MLX}
        assert {preferred.name for preferred in names} <= known
    builds = (s.build().op for s in KERNEL_SPECS if s.op.__name__ == "MatvecNTokens")
    found = {(op.n_tokens > 1, op.weight.quantization is None): op for op in builds}
    many, one = found[True, False], found[False, False]
    many = dataclasses.replace(many, n_tokens=5)
    assert lowering.choose(many, "cuda").name == MLX
    four_bits = dataclasses.replace(many, n_tokens=1)
    assert lowering.choose(four_bits, "cuda").name == "dequant_matvec_4bit_fast"
    large = dataclasses.replace(four_bits, out_dim=4096, in_dim=2048)
    assert lowering.choose(large, "cuda").name == "dequant_matvec_4bit_v4"
    prompt = dataclasses.replace(many, n_tokens=512)
    assert lowering.choose(prompt, "cuda").name == "mlx_dequantize"
    monkeypatch.setenv("MOEFLUX_LOWERING", "MatvecNTokens=qmm_t")
    assert lowering.choose(many, "cuda").name == "qmm_t"
    assert lowering.choose(one, "cuda").name == "qmm_t"


@pytest.mark.parametrize("n_tokens", [1, 2, 3, 16, 512])
@pytest.mark.parametrize("name", ["MatvecNTokens", "SdpaCausalTiled"])
def test_on_a_mac_several_tokens_go_to_mlx_until_it_is_tuned(
    name, n_tokens, monkeypatch
):
    specs = [s for s in (*SPECS, *KERNEL_SPECS) if s.op.__name__ == name]
    ops_of = {spec.build().op for spec in specs}
    assert len(ops_of) > 3
    for op in ops_of:
        op = dataclasses.replace(op, n_tokens=n_tokens)
        several = n_tokens > getattr(op, "n_seqs", 1)
        way = lowering.choose(op, "metal")
        assert not several or way.name == MLX
        own = [w for w in lowering.ways(op) if w.name != MLX]
        if several and own:
            with monkeypatch.context() as patch:
                patch.setenv("MOEFLUX_LOWERING", f"{name}={own[-1].name}")
                assert lowering.choose(op, "metal").name == own[-1].name


def test_on_a_mac_one_token_goes_to_our_products_where_those_won_somewhere():
    ops_of = [s.build().op for s in KERNEL_SPECS if s.op.__name__ == "MatvecNTokens"]
    op = next(x for x in ops_of if x.weight.quantization and x.weight.quantization.bits)
    for in_dim, way in (
        (512, "dequant_matvec_4bit_v3"),
        (544, "dequant_matvec_4bit_v4"),
        (4096, "dequant_matvec_4bit_v4"),
        (8192, "dequant_matvec_4bit_v4"),
    ):
        four = dataclasses.replace(
            op,
            n_tokens=1,
            in_dim=in_dim,
            weight=dataclasses.replace(op.weight, quantization=Q4),
        )
        assert lowering.choose(four, "metal").name == way
        eight = dataclasses.replace(
            four, weight=dataclasses.replace(op.weight, quantization=Q8)
        )
        assert lowering.choose(eight, "metal").name == MLX
        dense = dataclasses.replace(
            four, weight=dataclasses.replace(op.weight, quantization=None)
        )
        assert lowering.choose(dense, "metal").name == "bf16_matvec"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("Matvec=mlx", "expected an Op but got 'Matvec'"),
        ("MatvecNTokens=fastest", "MatvecNTokens: expected one of .*qmm_t.*mlx"),
        ("MatvecNTokens", "expected Op=way"),
    ],
)
def test_a_choice_that_does_not_exist_is_refused(value, message, monkeypatch):
    monkeypatch.setenv("MOEFLUX_LOWERING", value)
    op = SPECS[0].build().op
    with pytest.raises(ConfigError, match=message):
        lowering.choose(op)
