"""Every Op at odd sizes, and an oracle for each in plain NumPy and float64.

A spec builds a case: a pool, an Op, seeded inputs and weights. The oracles are written
from the formulas alone, token by token where the formula is, and share no code with the
references.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np

from moeflux_mlx import device, ops
from moeflux_mlx.engine.graph import Access, BufferPool, BufId, Op, WeightRef
from moeflux_mlx.engine.graph import roles as b
from moeflux_mlx.experts.compute.exchange import Exchange
from moeflux_mlx.experts.compute.rank_experts import RankExperts
from moeflux_mlx.experts.compute.resident import ResidentExperts
from moeflux_mlx.experts.weights import ExpertWeights, Quantization, Weight

Q4, Q4_64 = Quantization(4, 32), Quantization(4, 64)
Q8, Q2 = Quantization(8, 32), Quantization(2, 32)
MXFP4, NVFP4 = Quantization(4, 32, "mxfp4"), Quantization(4, 16, "nvfp4")
EPS = 1e-6
# GPUs multiply float32 matrices in TF32.
TOLERANCE = 1e-5 if device.on_cpu() else 2e-3
# The role to use for a union of roles.
CONCRETE = {
    b.RmsNormIn: b.HiddenBuf,
    b.RmsNormOut: b.AttnInputBuf,
    b.MatvecIn: b.AttnInputBuf,
    b.MatvecOut: b.QProjOutBuf,
    b.ResidualIn: b.OProjOutBuf,
}
Maker = Callable[[np.random.Generator, tuple], Any]


def normal(scale: float = 1.0) -> Maker:
    return lambda rng, shape: scale * rng.standard_normal(shape)


def uniform(low: float, high: float) -> Maker:
    return lambda rng, shape: rng.uniform(low, high, shape)


def integers(below: int) -> Maker:
    return lambda rng, shape: rng.integers(below, size=shape)


def distinct(below: int) -> Maker:
    """Rows of distinct integers: the experts of a token."""
    return lambda rng, shape: rng.random((shape[0], below)).argsort(1)[:, : shape[1]]


def sized(*shape: int) -> Maker:
    """Normal values; the shape is known only when an array is bound."""
    return lambda rng, _: rng.standard_normal(shape)


def value(*values: float) -> Maker:
    return lambda _rng, shape: np.array(values).reshape(shape)


@dataclass(frozen=True)
class Case:
    """An Op over a pool, its inputs by field (NumPy) and its weights by field (MLX)."""

    op: Any
    pool: BufferPool
    inputs: dict[str, Any]
    weights: dict[str, Weight]

    @property
    def written(self) -> list[str]:
        """Names of the fields that the Op writes, in order."""
        return [f.name for f in self.op.buffer_fields if f.access & Access.WRITE]

    def on_device(self, field: str) -> Any:
        """Return an input as an MLX array of its buffer's type."""
        x = self.inputs[field]
        if not isinstance(x, np.ndarray):
            return x
        return mx.array(x).astype(self.pool.info(getattr(self.op, field)).dtype)

    def on_device_result(self, **changed: mx.array) -> list[mx.array]:
        """Run the reference on MLX arrays; ``changed`` replaces inputs."""
        inputs = [changed.get(name, self.on_device(name)) for name in self.inputs]
        weights = [self.weights.get(name) for name in self.op.weight_fields]
        return as_list(self.op.reference(*inputs, *weights))

    def on_host_result(self) -> list[np.ndarray]:
        """Run the reference on NumPy arrays."""
        weights = [self.weights.get(name) for name in self.op.weight_fields]
        on_host = [None if w is None else w.on_host for w in weights]
        result = self.op.reference(*self.inputs.values(), *on_host)
        return [np.asarray(x) for x in as_list(result)]

    def expected(self, **changed: np.ndarray) -> list[np.ndarray]:
        """Run the oracle in float64; ``changed`` replaces inputs."""
        wide = {name: widen(x) for name, x in (self.inputs | changed).items()}
        named = {name: self.weights.get(name) for name in self.op.weight_fields}
        unpacked = {name: unpack(weight) for name, weight in named.items()}
        return as_list(ORACLES[type(self.op)](self.op, **wide, **unpacked))


@dataclass(frozen=True)
class Spec:
    """The recipe for a case; its id names the Op, the sizes and the weights' form."""

    op: type[Op]
    fields: dict[str, Any]
    makers: dict[str, Maker]
    form: Quantization | None
    note: str

    @property
    def id(self) -> str:
        fields = ((k, v) for k, v in self.fields.items() if not k.endswith("_bytes"))
        sizes = "x".join(str(v) for _, v in fields if isinstance(v, int))
        form = f"{self.form.bits}bit-g{self.form.group_size}" if self.form else ""
        form = self.form.mode if self.form and self.form.mode != "affine" else form
        return "-".join(p for p in (self.op.__name__, sizes, form, self.note) if p)

    @property
    def gathers_dense(self) -> bool:
        """Return whether unpacked experts are gathered on the device."""
        gathers = (ops.MoeDecodeExperts, ops.MoeGatherIdFuse)
        return self.form is None and self.op in gathers

    def build(self, dtype: mx.Dtype = mx.float32) -> Case:
        """Return a case whose activations and weights are of type ``dtype``."""
        rng = np.random.default_rng(zlib.crc32(self.id.encode()))
        pool = BufferPool(dtype)
        known = [f for f in self.op.buffer_fields if self._is_used(f)]
        names = [*(f.name for f in known), *self._weight_names()]
        op: Any = self.op(label="op", **dict.fromkeys(names), **self.fields)
        shapes = op.shapes()
        buffers: dict[str, BufId] = {}
        for field in known:
            role = CONCRETE.get(field.role, field.role)
            buffers[field.name] = pool.alloc(role, shapes[field.name], field.name)
        weights = {
            name: self._weight(name, shapes[name], rng, dtype)
            for name in self._weight_names()
        }
        refs = {n: ref_of(n, shapes[n], w) for n, w in weights.items()}
        op = dataclasses.replace(op, **buffers, **refs)
        inputs = {
            f.name: self._input(f, shapes, rng, dtype)
            for f in self.op.buffer_fields
            if f.access & Access.READ
        }
        return Case(op, pool, inputs, weights)

    def _is_used(self, field: Any) -> bool:
        return not field.optional or field.name in self.makers

    def _weight_names(self) -> list[str]:
        optional = {f.name for f in dataclasses.fields(self.op) if f.default is None}
        names = self.op.weight_fields
        return [n for n in names if n not in optional or n in self.makers]

    def _weight(
        self, name: str, shape: tuple, rng: np.random.Generator, dtype: mx.Dtype
    ) -> Weight:
        make = self.makers.get(name, normal())
        dense = mx.array(np.asarray(make(rng, shape), np.float32)).astype(dtype)
        return quantized(dense, self.form if dense.ndim > 1 else None)

    def _input(
        self, field: Any, shapes: Any, rng: np.random.Generator, dtype: mx.Dtype
    ) -> Any:
        if not self._is_used(field):
            return None
        if field.role is b.ExpertBaseBuf:
            sizes = (self.fields[n] for n in ("n_experts", "dim", "expert_dim"))
            biased = "limit" in self.fields
            made = random_experts(rng, *sizes, self.form, dtype, biased=biased)
            experts = ResidentExperts(made)
            return alone_in_a_group(experts) if "shared" in self.fields else experts
        made = self.makers.get(field.name, normal())(rng, shapes[field.name])
        kinds = {mx.int32: np.int32, mx.bool_: np.bool_}
        if field.role.dtype in kinds:
            return np.asarray(made, kinds[field.role.dtype])
        return rounded(made, field.role.dtype or dtype)


def alone_in_a_group(experts: ResidentExperts) -> RankExperts:
    """Return the experts of a process group's only rank, which has all of them."""
    exchange = Exchange(mx.distributed.init())
    n_experts = experts.weights.gate.w.shape[0]
    return RankExperts(experts, exchange, "experts", range(n_experts))


def rounded(x: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    """Return float32 values that ``dtype`` can hold."""
    return np.array(mx.array(x.astype(np.float32)).astype(dtype).astype(mx.float32))


def spec(
    op: type[Op], form: Quantization | None = None, note: str = "", **given: Any
) -> Spec:
    """Split the arguments into sizes of the Op and makers of inputs."""
    makers = {k: v for k, v in given.items() if callable(v)}
    fields = {k: v for k, v in given.items() if not callable(v)}
    return Spec(op, fields, makers, form, note)


def quantized(dense: mx.array, form: Quantization | None) -> Weight:
    if form is None:
        return Weight(dense)
    parts = mx.quantize(dense, form.group_size, form.bits, mode=form.mode)
    return Weight(*parts, *[None] * (3 - len(parts)), form)


def ref_of(name: str, shape: tuple[int, ...], weight: Weight) -> WeightRef:
    q = weight.quantization
    return WeightRef(name, shape, q, (weight.w if q is None else weight.scales).dtype)


def random_experts(
    rng: np.random.Generator,
    n: int,
    dim: int,
    width: int,
    form: Quantization | None = None,
    dtype: mx.Dtype = mx.float32,
    *,
    biased: bool = False,
) -> ExpertWeights:
    def stack(n_out: int, n_in: int) -> Weight:
        dense = rng.standard_normal((n, n_out, n_in)) * n_in**-0.5
        made = quantized(mx.array(dense.astype(np.float32)).astype(dtype), form)
        if not biased:
            return made
        bias = mx.array(rng.standard_normal((n, n_out)).astype(np.float32))
        return dataclasses.replace(made, bias=bias.astype(dtype))

    return ExpertWeights(stack(width, dim), stack(width, dim), stack(dim, width))


def as_list(result: Any) -> list[Any]:
    return list(result) if isinstance(result, tuple) else [result]


def relative_rms(got: Any, expected: Any) -> float:
    """Return the error's RMS over the expected value's; NaN counts as wrong."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape, f"expected {expected.shape} but got {got.shape}"
    error = np.sqrt(np.mean((got - expected) ** 2))
    scale = np.sqrt(np.mean(expected**2))
    return float("inf") if np.isnan(error) else error / (scale or 1.0)


# Cases.
LATENT = dict(num_heads=3, latent_dim=8, rope_dim=6, softmax_scale=0.3)


def latents(n_seqs: int, n_rows: int, width: int = 8) -> dict[str, Maker]:
    """Return makers of a compressed cache with this number of rows."""
    shape = n_seqs, 1, n_rows
    return dict(latent=sized(*shape, width), rope=sized(*shape, 6))


QK = dict(num_k_heads=3, key_dim=5)
DELTA = dict(num_v_heads=6, num_k_heads=3, key_dim=5, value_dim=7)
DELTA_INPUTS = dict(
    state=normal(0.3),
    conv_out=normal(5**-0.5),
    g_decay=uniform(0.2, 1),
    beta_gate=uniform(0, 1),
)
# Low enough to clip something; experts then have biases too.
CLIPPED = dict(alpha=1.5, limit=0.5, note="clipped")
# Several ranks share the experts.
SHARED = dict(shared=True, note="shared")
HEADS = dict(num_heads=6, head_dim=7, softmax_scale=7**-0.5)


def routed(n: int, dim: int, width: int, n_experts: int, k: int) -> dict[str, Any]:
    sizes = dict(n_tokens=n, dim=dim, expert_dim=width, n_experts=n_experts, k=k)
    inputs = dict(indices=distinct(n_experts), weights=uniform(0.1, 1))
    return sizes | dict(expert_bytes=4 * 3 * dim * width) | inputs


def cache(n_seqs: int, n_heads: int, n_rows: int, width: int) -> dict[str, Maker]:
    return dict.fromkeys(("k", "v"), sized(n_seqs, n_heads, n_rows, width))


SPECS = [
    spec(ops.EmbedGatherNTokens, n_tokens=5, vocab_size=11, hidden_dim=7,
         token_ids=integers(11)),
    spec(ops.EmbedGatherNTokens, Q4, n_tokens=3, vocab_size=11, hidden_dim=96,
         token_ids=integers(11)),
    spec(ops.EmbedGatherNTokens, Q8, n_tokens=1, vocab_size=5, hidden_dim=32,
         token_ids=integers(5)),
    spec(ops.RmsNormBf16NTokens, n_tokens=3, dim=33, eps=EPS),
    spec(ops.RmsNormQkNTokens, n_tokens=3, **QK, key_offset_per_token=15,
         per_token_total=37),
    spec(ops.RmsNormQkNTokens, n_tokens=1, **QK, key_offset_per_token=17,
         per_token_total=32, note="gap"),
    spec(ops.RmsNormPerHeadNTokens, n_tokens=5, num_heads=3, head_dim=7, eps=EPS),
    spec(ops.RopeNTokens, n_tokens=6, n_seqs=2, num_heads=3, head_dim=10,
         rotary_dim=6, start=value(0, 37), inv_freq=value(1, 0.1, 0.01)),
    spec(ops.RopeNTokens, n_tokens=2, num_heads=1, head_dim=7, rotary_dim=4, scale=1.25,
         start=value(9), inv_freq=value(1, 0.1), note="scaled"),
    spec(ops.RopeNTokens, n_tokens=6, n_seqs=2, num_heads=3, head_dim=7, rotary_dim=6,
         start=value(0, 37), inv_freq=value(1, 0.1, 0.01), pairs=True, scale=0.75),
    spec(ops.SplitQGate, n_tokens=3, num_heads=3, head_dim=5),
    spec(ops.MatvecNTokens, n_tokens=3, in_dim=33, out_dim=7),
    spec(ops.MatvecNTokens, Q4, n_tokens=1, in_dim=96, out_dim=7),
    spec(ops.MatvecNTokens, Q4_64, n_tokens=5, in_dim=192, out_dim=9),
    spec(ops.MatvecNTokens, Q8, n_tokens=3, in_dim=32, out_dim=1),
    spec(ops.MatvecNTokens, Q2, n_tokens=3, in_dim=96, out_dim=5),
    spec(ops.MatvecNTokens, Q4, n_tokens=3, in_dim=32, out_dim=5, bias=normal(),
         note="bias"),
    spec(ops.ResidualAddNTokens, n_tokens=3, dim=7),
    spec(ops.ZeroBuffer, n_tokens=3, dim=5),
    spec(ops.SwigluFusedBatched, n_tokens=3, dim=7, gate=normal(30)),
    spec(ops.SigmoidGateNTokens, n_tokens=3, dim=7, gate=normal(30)),
    spec(ops.KvCacheAppendNTokens, n_tokens=6, n_seqs=2, num_kv_heads=3, head_dim=5,
         k_cache=sized(2, 3, 11, 5), v_cache=sized(2, 3, 11, 5), row=value(4)),
    spec(ops.KvCacheAppendNTokens, n_tokens=6, n_seqs=2, num_kv_heads=3, head_dim=5,
         value_dim=3, k_cache=sized(2, 3, 11, 5), v_cache=sized(2, 3, 11, 3),
         row=value(4), note="narrow values"),
    spec(ops.MlaSplitQKv, n_tokens=5, num_heads=3, nope_dim=7, rope_dim=4,
         latent_dim=9),
    spec(ops.HeadMatvecNTokens, n_tokens=5, num_heads=3, in_dim=7, out_dim=9),
    spec(ops.HeadMatvecNTokens, Q4, n_tokens=3, num_heads=3, in_dim=32, out_dim=9),
    spec(ops.HeadMatvecNTokens, Q4, n_tokens=1, num_heads=3, in_dim=64, out_dim=5),
    spec(ops.SdpaLatentCausal, n_tokens=5, **LATENT, **latents(1, 9)),
    spec(ops.SdpaLatentCausal, n_tokens=6, n_seqs=2, **LATENT, **latents(2, 5),
         note="mask",
         mask=lambda rng, _: (rng.random((2, 1, 3, 5)) < 0.5) | (np.arange(5) == 1)),
    spec(ops.SdpaLatentCausal, n_tokens=2, n_seqs=2, **LATENT, **latents(2, 11),
         note="start", start=value(6, 2)),
    spec(ops.SdpaCausalTiled, n_tokens=1, heads_per_kv=3, **HEADS,
         **cache(1, 2, 9, 7)),
    spec(ops.SdpaCausalTiled, n_tokens=5, heads_per_kv=2, **HEADS,
         **cache(1, 3, 5, 7)),
    spec(ops.SdpaCausalTiled, n_tokens=6, n_seqs=2, heads_per_kv=6, **HEADS,
         **cache(2, 1, 11, 7)),
    spec(ops.SdpaCausalTiled, n_tokens=6, n_seqs=2, heads_per_kv=3, **HEADS,
         **cache(2, 2, 5, 7), note="mask",
         mask=lambda rng, _: (rng.random((2, 1, 3, 5)) < 0.5) | (np.arange(5) == 1)),
    spec(ops.SdpaCausalTiled, n_tokens=6, n_seqs=2, heads_per_kv=3, **HEADS,
         **cache(2, 2, 11, 7), note="start", start=value(6, 2)),
    spec(ops.SdpaCausalTiled, n_tokens=6, n_seqs=2, heads_per_kv=3, **HEADS,
         **cache(2, 2, 9, 7), note="sinks", sinks=normal(3)),
    spec(ops.SdpaCausalTiled, n_tokens=1, heads_per_kv=2, **HEADS,
         **cache(1, 3, 4, 7), note="sinks", sinks=normal(3)),
    spec(ops.SdpaCausalTiled, n_tokens=2, n_seqs=2, heads_per_kv=3, num_heads=6,
         head_dim=32, softmax_scale=0.2, **cache(2, 2, 9, 32), note="start-sinks",
         start=value(6, 2), sinks=normal(3)),
    spec(ops.MoeSoftmaxTopK, n_tokens=5, n_experts=7, k=3),
    spec(ops.MoeSoftmaxTopK, n_tokens=3, n_experts=11, k=10),
    spec(ops.MoeNoauxTopK, n_tokens=5, n_experts=7, k=3, scale=2.5),
    spec(ops.MoeNoauxTopK, n_tokens=4, n_experts=12, k=5, n_group=4, topk_group=2,
         normalised=False, note="groups"),
    spec(ops.MoeNoauxTopK, n_tokens=4, n_experts=12, k=6, n_group=4, topk_group=2,
         bias=uniform(-3, -1), note="negative scores"),
    spec(ops.MoeNormalizeWeights, n_tokens=3, k=7, weights=uniform(0.1, 1)),
    spec(ops.MoeDecodeExperts, **routed(1, 33, 17, 7, 3)),
    spec(ops.MoeDecodeExperts, Q4, **routed(1, 64, 96, 11, 10)),
    spec(ops.MoeDecodeExperts, Q8, **routed(1, 32, 32, 3, 1)),
    spec(ops.MoeDecodeExperts, **routed(1, 33, 17, 7, 3), **CLIPPED),
    spec(ops.MoeDecodeExperts, Q4, **routed(1, 64, 32, 5, 2), **CLIPPED),
    spec(ops.MoeDecodeExperts, MXFP4, **routed(1, 64, 96, 5, 3), **CLIPPED),
    spec(ops.MoeDecodeExperts, NVFP4, **routed(1, 32, 64, 3, 2)),
    spec(ops.MoeDecodeExperts, Q4, **routed(1, 64, 96, 11, 10), **SHARED),
    spec(ops.MoeGatherIdFuse, Q4, **routed(5, 64, 32, 11, 10), **SHARED),
    spec(ops.MoeBatchedPermuteFuse, Q4, **routed(5, 64, 32, 11, 10), **SHARED),
    spec(ops.MoeGatherIdFuse, MXFP4, **routed(5, 64, 32, 7, 3), **CLIPPED),
    spec(ops.MoeGatherIdFuse, NVFP4, **routed(3, 32, 32, 3, 2)),
    spec(ops.MoeBatchedPermuteFuse, MXFP4, **routed(5, 64, 32, 7, 3), **CLIPPED),
    spec(ops.MoeBatchedPermuteFuse, NVFP4, **routed(3, 32, 32, 3, 2)),
    spec(ops.MoeGatherIdFuse, **routed(5, 33, 17, 7, 3), **CLIPPED),
    spec(ops.MoeGatherIdFuse, **routed(5, 33, 17, 7, 3)),
    spec(ops.MoeGatherIdFuse, Q4, **routed(5, 64, 32, 11, 10)),
    spec(ops.MoeBatchedPermuteFuse, **routed(5, 33, 17, 7, 3), **CLIPPED),
    spec(ops.MoeBatchedPermuteFuse, Q4, **routed(5, 64, 32, 11, 10), **CLIPPED),
    spec(ops.MoeBatchedPermuteFuse, **routed(5, 33, 17, 7, 3)),
    spec(ops.MoeBatchedPermuteFuse, Q4, **routed(5, 64, 32, 11, 10)),
    spec(ops.MoeBatchedPermuteFuse, Q8, **routed(3, 32, 32, 3, 1)),
    spec(ops.MoeCombineResidualNTokens, n_tokens=3, dim=7, shared_out=normal(),
         shared_gate=normal()),
    spec(ops.MoeCombineResidualNTokens, n_tokens=3, dim=7, note="alone"),
    spec(ops.PartKeyHeadsNTokens, n_tokens=3, num_k_heads=2, num_v_heads=6, key_dim=5,
         value_dim=7),
    spec(ops.PartKeyHeadsNTokens, n_tokens=1, num_k_heads=3, num_v_heads=3, key_dim=2,
         value_dim=5),
    spec(ops.Conv1dStepNTokens, n_tokens=5, conv_dim=7),
    spec(ops.Conv1dStepNTokens, n_tokens=2, n_seqs=2, conv_dim=5, kernel_size=3),
    spec(ops.Conv1dStepNTokens, n_tokens=10, n_seqs=2, conv_dim=3, note="masked",
         mask=value(0, 0, 1, 1, 1, 1, 1, 1, 1, 1)),
    spec(ops.Conv1dStepNTokens, n_tokens=15, n_seqs=3, conv_dim=3, note="lengths",
         lengths=value(0, 4, 5)),
    spec(ops.ComputeDecayBetaNTokens, n_tokens=5, num_v_heads=3),
    spec(ops.ComputeDecayBetaNTokens, n_tokens=3, num_v_heads=5, note="large",
         alpha_in=value(*np.linspace(-300, 300, 15)), a_log=normal(0.3)),
    spec(ops.ComputeDecayBetaNTokens, n_tokens=6, n_seqs=2, num_v_heads=3,
         note="masked", mask=value(0, 0, 1, 1, 1, 0)),
    spec(ops.GatedDeltaNetStepNTokens, n_tokens=1, **DELTA, **DELTA_INPUTS),
    spec(ops.GatedDeltaNetStepNTokens, n_tokens=6, n_seqs=2, **DELTA, **DELTA_INPUTS),
    spec(ops.GatedDeltaNetChunkwise, n_tokens=7, **DELTA, **DELTA_INPUTS),
    spec(ops.GatedDeltaNetChunkwise, n_tokens=70, n_seqs=2, **DELTA, **DELTA_INPUTS,
         chunk_size=16),
    spec(ops.GatedRmsNormNTokens, n_tokens=3, num_v_heads=3, value_dim=7, eps=EPS),
]  # fmt: skip


# Sizes that kernels accept: widths of whole groups and simdgroups, ragged rows.
DELTA_32 = dict(num_v_heads=4, num_k_heads=2, key_dim=32, value_dim=33)
HEADS_64 = dict(num_heads=8, head_dim=64, softmax_scale=0.125)


def cache_64(n_seqs: int, n_heads: int, n_rows: int) -> dict[str, Maker]:
    return cache(n_seqs, n_heads, n_rows, 64)


KERNEL_SPECS = [
    spec(ops.EmbedGatherNTokens, Q4, n_tokens=5, vocab_size=11, hidden_dim=96,
         token_ids=integers(11)),
    spec(ops.EmbedGatherNTokens, Q8, n_tokens=1, vocab_size=7, hidden_dim=64,
         token_ids=integers(7)),
    spec(ops.MatvecNTokens, Q4, n_tokens=1, in_dim=96, out_dim=37),
    spec(ops.MatvecNTokens, Q4, n_tokens=1, in_dim=4128, out_dim=5),
    spec(ops.MatvecNTokens, Q4, n_tokens=7, in_dim=64, out_dim=37, bias=normal()),
    spec(ops.MatvecNTokens, Q4, n_tokens=3, in_dim=4128, out_dim=5),
    spec(ops.MatvecNTokens, Q8, n_tokens=1, in_dim=96, out_dim=37),
    spec(ops.MatvecNTokens, Q8, n_tokens=5, in_dim=96, out_dim=9),
    spec(ops.MatvecNTokens, Q2, n_tokens=1, in_dim=64, out_dim=9),
    spec(ops.MatvecNTokens, Q4, n_tokens=257, in_dim=64, out_dim=9, bias=normal()),
    spec(ops.MatvecNTokens, n_tokens=1, in_dim=33, out_dim=9),
    spec(ops.MatvecNTokens, n_tokens=5, in_dim=33, out_dim=9),
    spec(ops.RopeNTokens, n_tokens=3, num_heads=5, head_dim=6, rotary_dim=6,
         start=value(37), inv_freq=value(1, 0.1, 0.01), pairs=True, scale=0.75),
    spec(ops.RopeNTokens, n_tokens=6, n_seqs=2, num_heads=3, head_dim=6, rotary_dim=6,
         start=value(37, 5), inv_freq=value(1, 0.1, 0.01), pairs=True, scale=0.75),
    spec(ops.RopeNTokens, n_tokens=6, n_seqs=2, num_heads=3, head_dim=8, rotary_dim=6,
         start=value(37, 5), inv_freq=value(1, 0.1, 0.01), scale=1.25),
    spec(ops.HeadMatvecNTokens, Q4, n_tokens=5, num_heads=3, in_dim=64, out_dim=37),
    spec(ops.KvCacheAppendNTokens, n_tokens=1, num_kv_heads=1, head_dim=33,
         value_dim=6, k_cache=sized(1, 1, 11, 33), v_cache=sized(1, 1, 11, 6),
         row=value(4)),
    spec(ops.HeadMatvecNTokens, Q4, n_tokens=1, num_heads=3, in_dim=32, out_dim=37),
    spec(ops.SdpaLatentCausal, n_tokens=1, **{**LATENT, "latent_dim": 32},
         **latents(1, 21, 32), start=value(13)),
    spec(ops.SdpaLatentCausal, n_tokens=1, **{**LATENT, "latent_dim": 32},
         **latents(1, 600, 32), start=value(520), note="tiles"),
    spec(ops.SdpaLatentCausal, n_tokens=3, n_seqs=3, **{**LATENT, "latent_dim": 32},
         **latents(3, 21, 32), start=value(13, 4, 20)),
    spec(ops.SdpaLatentCausal, n_tokens=4, n_seqs=2, **{**LATENT, "latent_dim": 32},
         **latents(2, 530, 32), note="tiles"),
    spec(ops.SdpaCausalTiled, n_tokens=5, heads_per_kv=1, **HEADS_64,
         **cache_64(1, 8, 11)),
    spec(ops.SdpaCausalTiled, n_tokens=6, n_seqs=2, heads_per_kv=2, **HEADS_64,
         **cache_64(2, 4, 7)),
    spec(ops.SdpaCausalTiled, n_tokens=3, heads_per_kv=4, **HEADS_64,
         **cache_64(1, 2, 9)),
    spec(ops.SdpaCausalTiled, n_tokens=3, heads_per_kv=8, **HEADS_64,
         **cache_64(1, 1, 9)),
    spec(ops.SdpaCausalTiled, n_tokens=1, heads_per_kv=8, **HEADS_64,
         **cache_64(1, 1, 37)),
    spec(ops.SdpaCausalTiled, n_tokens=2, n_seqs=2, heads_per_kv=2, **HEADS_64,
         **cache_64(2, 4, 37)),
    spec(ops.SdpaCausalTiled, n_tokens=2, n_seqs=2, heads_per_kv=4, **HEADS_64,
         **cache_64(2, 2, 130), note="start", start=value(100, 63)),
    spec(ops.GatedDeltaNetStepNTokens, n_tokens=1, **DELTA_32, **DELTA_INPUTS),
    spec(ops.GatedDeltaNetStepNTokens, n_tokens=6, n_seqs=2, **DELTA_32,
         **DELTA_INPUTS),
    spec(ops.GatedDeltaNetChunkwise, n_tokens=37, **DELTA_32, **DELTA_INPUTS),
    spec(ops.RmsNormQkNTokens, n_tokens=3, num_k_heads=2, key_dim=32,
         key_offset_per_token=64, per_token_total=2 * 64 + 33),
]  # fmt: skip


# Oracles: NumPy, float64, one formula each.
def widen(x: Any) -> Any:
    if isinstance(x, ResidentExperts | RankExperts):
        stacks = x.weights.gate, x.weights.up, x.weights.down
        none = (np.zeros(s.w.shape[:2]) for s in stacks)
        biases = (
            zeros if s.bias is None else to_float64(s.bias)
            for s, zeros in zip(stacks, none, strict=True)
        )
        return [unpack(stack) for stack in stacks], [*biases]
    is_float = isinstance(x, np.ndarray) and np.issubdtype(x.dtype, np.floating)
    return x.astype(np.float64) if is_float else x


def unpack(weight: Weight | None) -> np.ndarray | None:
    """Return scale * q + bias, or floats times scales, the lowest bits first."""
    if weight is None:
        return None
    q = weight.quantization
    if q is None:
        return to_float64(weight.w)
    w, shifts = np.array(weight.w), np.arange(0, 32, q.bits, dtype=np.uint32)
    values = (w[..., None] >> shifts) & np.uint32(2**q.bits - 1)
    if q.mode != "affine":
        groups = SMALL_FLOATS[values].reshape(*weight.scales.shape, q.group_size)
        of_bytes = POWERS if q == MXFP4 else BYTE_FLOATS
        dense = groups * of_bytes[np.array(weight.scales)][..., None]
        return dense.reshape(*w.shape[:-1], -1)
    scales, biases = to_float64(weight.scales), to_float64(weight.biases)
    groups = values.reshape(*scales.shape, q.group_size).astype(np.float64)
    dense = groups * scales[..., None] + biases[..., None]
    return dense.reshape(*w.shape[:-1], -1)


# 4-bit floats; then the scales that bytes encode: powers of two, 8-bit floats.
SMALL_FLOATS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
SMALL_FLOATS = np.concatenate([SMALL_FLOATS, -SMALL_FLOATS])
POWERS = 2.0 ** (np.arange(256) - 127)
_E, _M = np.divmod(np.arange(128), 8)
BYTE_FLOATS = np.where(_E, 2.0 ** (_E - 7) * (1 + _M / 8), 2.0**-6 * _M / 8)
BYTE_FLOATS = np.concatenate([BYTE_FLOATS, -BYTE_FLOATS])


def to_float64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def sigmoid(x):
    return np.exp(-np.logaddexp(0, -x))


def silu(x):
    return x * sigmoid(x)


def softmax(x):
    grown = np.exp(x - x.max())
    return grown / grown.sum()


def rms_norm(x, weight=1.0, eps=EPS):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight


def unit(x, eps=EPS):
    return x / np.sqrt((x**2).sum(axis=-1, keepdims=True) + eps)


def norm_qk(op, x):
    x = x.copy()
    width = op.num_k_heads * op.key_dim
    for start, scale in ((0, op.key_dim**-0.5), (op.key_offset_per_token, 1)):
        heads = x[:, start : start + width].reshape(-1, op.num_k_heads, op.key_dim)
        x[:, start : start + width] = (unit(heads) * scale).reshape(-1, width)
    return x


def norm_heads(op, x, weight):
    return rms_norm(x.reshape(-1, op.num_heads, op.head_dim), weight).reshape(x.shape)


def rotate(op, x, inv_freq, start):
    t, half = op.n_tokens // op.n_seqs, op.rotary_dim // 2
    heads = x.reshape(op.n_tokens, op.num_heads, op.head_dim).copy()
    for token in range(op.n_tokens):
        position = start[token // t] + token % t
        turn = np.exp(1j * position * inv_freq)
        one, other = slice(0, half), slice(half, 2 * half)
        if op.pairs:
            one, other = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
        first, second = heads[token, :, one], heads[token, :, other]
        turned = (first + 1j * second) * turn * op.scale
        heads[token, :, one] = turned.real
        heads[token, :, other] = turned.imag
    return heads.reshape(x.shape)


def split_q_gate(op, q_proj):
    heads = q_proj.reshape(op.n_tokens, op.num_heads, 2, op.head_dim)
    return tuple(heads[:, :, i].reshape(op.n_tokens, -1) for i in (0, 1))


def append(op, k_src, v_src, k_cache, v_cache, row):
    t = op.n_tokens // op.n_seqs
    caches = k_cache.copy(), v_cache.copy()
    for new, kept in zip((k_src, v_src), caches, strict=True):
        rows = new.reshape(op.n_seqs, t, op.num_kv_heads, -1)
        for i in range(t):
            kept[:, :, row[0] + i] = rows[:, i]
    return caches


def attend(op, q, k, v, mask, start, sinks=None):
    """Attend with one query and one head at a time."""
    t, s = op.n_tokens // op.n_seqs, k.shape[2]
    queries = q.reshape(op.n_tokens, op.num_heads, op.head_dim)
    out = np.empty_like(queries)
    for token in range(op.n_tokens):
        seq, step = divmod(token, t)
        seen = np.arange(s) <= s - t + step
        if mask is not None:
            seen = mask[seq % len(mask), 0, step]
        if start is not None:
            seen = np.arange(s) <= start[seq] + step
        for head in range(op.num_heads):
            group = head // op.heads_per_kv
            keys, values = k[seq, group][seen], v[seq, group][seen]
            scores = keys @ queries[token, head] * op.softmax_scale
            if sinks is not None:
                scores = np.append(scores, sinks[head])
                values = np.vstack([values, np.zeros(op.head_dim)])
            out[token, head] = softmax(scores) @ values
    return out.reshape(q.shape)


def split_q_kv(op, q, kv):
    heads = np.split(q, op.num_heads, axis=1)
    nope = [head[:, : op.nope_dim] for head in heads]
    rope = [head[:, op.nope_dim :] for head in heads]
    return np.hstack(nope), np.hstack(rope), *np.split(kv, [op.latent_dim], axis=1)


def by_head(op, input, weight):
    heads = np.split(input, op.num_heads, axis=1)
    return np.hstack([x @ w.T for x, w in zip(heads, weight, strict=True)])


def attend_latent(op, q, q_pe, latent, rope, mask, start):
    """Attend with keys whose first channels are the values; all heads share them."""
    n, heads = op.n_tokens, op.num_heads
    both = q.reshape(n, heads, -1), q_pe.reshape(n, heads, -1)
    keys = np.concatenate([latent, rope], axis=-1)
    like = SimpleNamespace(
        n_tokens=n,
        n_seqs=op.n_seqs,
        num_heads=heads,
        heads_per_kv=heads,
        head_dim=keys.shape[-1],
        softmax_scale=op.softmax_scale,
    )
    queries = np.concatenate(both, axis=-1).reshape(n, -1)
    out = attend(like, queries, keys, keys, mask, start).reshape(n, heads, -1)
    return out[..., : op.latent_dim].reshape(q.shape)


def top_k(op, logits):
    scores = np.stack([softmax(row) for row in logits])
    indices = np.empty((op.n_tokens, op.k), np.int32)
    for row, left in zip(indices, scores.copy(), strict=True):
        for i in range(op.k):
            row[i] = left.argmax()
            left[row[i]] = -1
    return indices, np.take_along_axis(scores, indices, axis=1)


def noaux(op, logits, bias):
    indices = np.empty((op.n_tokens, op.k), np.int32)
    weights = np.empty((op.n_tokens, op.k))
    each = op.n_experts // op.n_group
    for row, weight, logit in zip(indices, weights, logits, strict=True):
        biased = (sigmoid(logit) + bias).tolist()
        groups = [biased[g * each : (g + 1) * each] for g in range(op.n_group)]
        pairs = [sum(sorted(group)[-2:]) for group in groups]
        best = sorted(range(op.n_group), key=lambda g: -pairs[g])[: op.topk_group]
        left = [e for e in range(op.n_experts) if e // each in best]
        row[:] = sorted(left, key=lambda e: -biased[e])[: op.k]
        weight[:] = sigmoid(logit[row])
        weight *= op.scale / (weight.sum() if op.normalised else 1.0)
    return indices, weights


def run_experts(op, mlp_in, indices, weights, experts, out_sum=0.0):
    (gate, up, down), (to_gate, to_up, to_down) = experts
    out = np.zeros_like(mlp_in) + out_sum
    for token, x in enumerate(mlp_in):
        for expert, weight in zip(indices[token], weights[token], strict=True):
            opened = gate[expert] @ x + to_gate[expert]
            wide = up[expert] @ x + to_up[expert]
            if op.limit:
                opened, wide = np.fmin(opened, op.limit), np.fmin(wide, op.limit)
                wide = np.fmax(wide, -op.limit)
                hidden = opened / (1 + np.exp(-op.alpha * opened)) * (1 + wide)
            else:
                hidden = silu(opened) * wide
            out[token] += weight * (down[expert] @ hidden + to_down[expert])
    return out


def combine(_op, h_mid, moe_sum, shared_out, shared_gate):
    alone = h_mid + moe_sum
    return alone if shared_out is None else alone + sigmoid(shared_gate) * shared_out


def convolve(op, qkv_in, conv_state, mask, lengths, weight):
    t, keep = op.n_tokens // op.n_seqs, op.kernel_size - 1
    chunk = qkv_in.reshape(op.n_seqs, t, op.conv_dim)
    if mask is not None:
        chunk = chunk * mask[..., None]
    history = np.concatenate([conv_state, chunk], axis=1)
    out = np.zeros_like(chunk)
    for i in range(t):
        for tap in range(op.kernel_size):
            out[:, i] += history[:, i + tap] * weight[:, tap, 0]
    ends = [t] * op.n_seqs if lengths is None else lengths
    kept = [seq[end : end + keep] for seq, end in zip(history, ends, strict=True)]
    return np.stack(kept), silu(out).reshape(qkv_in.shape)


def part_key_heads(op, qkvz, ba):
    """Compute one key head of one token at a time."""
    per_key = op.num_v_heads // op.num_k_heads
    values = per_key * op.value_dim
    parts = [[[] for _ in range(op.n_tokens)] for _ in range(6)]
    for token in range(op.n_tokens):
        row, gates = list(qkvz[token]), list(ba[token])
        for _ in range(op.num_k_heads):
            for i, n in enumerate((op.key_dim, op.key_dim, values, values)):
                parts[i][token] += [row.pop(0) for _ in range(n)]
            for i in (4, 5):
                parts[i][token] += [gates.pop(0) for _ in range(per_key)]
    q, k, v, *rest = map(np.array, parts)
    return np.concatenate([q, k, v], axis=1), *rest


def decay_beta(_op, alpha_in, beta_in, mask, a_log, dt_bias):
    g = np.exp(-np.exp(a_log) * np.logaddexp(0, alpha_in + dt_bias))
    beta = sigmoid(beta_in)
    if mask is not None:
        skipped = ~mask.reshape(-1)
        g[skipped], beta[skipped] = 1, 0
    return g, beta


def delta_rule(op, state, conv_out, g_decay, beta_gate):
    """Compute one token and one head at a time."""
    t, width = op.n_tokens // op.n_seqs, op.num_k_heads * op.key_dim
    state, per_key = state.copy(), op.num_v_heads // op.num_k_heads
    out = np.empty((op.n_tokens, op.num_v_heads, op.value_dim))
    for token, row in enumerate(conv_out):
        q, k, v = np.split(row, [width, 2 * width])
        q, k = (x.reshape(op.num_k_heads, op.key_dim) for x in (q, k))
        v = v.reshape(op.num_v_heads, op.value_dim)
        for head in range(op.num_v_heads):
            query, key = q[head // per_key], k[head // per_key]
            s = g_decay[token, head] * state[token // t, head]
            s = s + beta_gate[token, head] * np.outer(v[head] - s @ key, key)
            state[token // t, head] = s
            out[token, head] = s @ query
    return state, out.reshape(op.n_tokens, -1)


def gated_norm(op, values, z, weight):
    heads = values.reshape(op.n_tokens, op.num_v_heads, op.value_dim)
    return rms_norm(heads, weight).reshape(values.shape) * silu(z)


ORACLES: dict[type[Op], Callable[..., Any]] = {
    ops.EmbedGatherNTokens: lambda _, token_ids, weight: weight[token_ids],
    ops.RmsNormBf16NTokens: lambda _, x, weight: rms_norm(x, weight),
    ops.RmsNormQkNTokens: norm_qk,
    ops.RmsNormPerHeadNTokens: norm_heads,
    ops.RopeNTokens: rotate,
    ops.SplitQGate: split_q_gate,
    ops.MatvecNTokens: lambda _, input, weight, bias: (
        input @ weight.T + (0 if bias is None else bias)
    ),
    ops.ResidualAddNTokens: lambda _, a, b: a + b,
    ops.ZeroBuffer: lambda op: np.zeros((op.n_tokens, op.dim)),
    ops.SwigluFusedBatched: lambda _, gate, up: silu(gate) * up,
    ops.SigmoidGateNTokens: lambda _, x, gate: x * sigmoid(gate),
    ops.KvCacheAppendNTokens: append,
    ops.SdpaCausalTiled: attend,
    ops.MlaSplitQKv: split_q_kv,
    ops.HeadMatvecNTokens: by_head,
    ops.SdpaLatentCausal: attend_latent,
    ops.MoeSoftmaxTopK: top_k,
    ops.MoeNoauxTopK: noaux,
    ops.MoeNormalizeWeights: lambda _, weights: weights / weights.sum(1)[:, None],
    ops.MoeDecodeExperts: run_experts,
    ops.MoeGatherIdFuse: run_experts,
    ops.MoeBatchedPermuteFuse: run_experts,
    ops.MoeCombineResidualNTokens: combine,
    ops.PartKeyHeadsNTokens: part_key_heads,
    ops.Conv1dStepNTokens: convolve,
    ops.ComputeDecayBetaNTokens: decay_beta,
    ops.GatedDeltaNetStepNTokens: delta_rule,
    ops.GatedDeltaNetChunkwise: delta_rule,
    ops.GatedRmsNormNTokens: gated_norm,
}
