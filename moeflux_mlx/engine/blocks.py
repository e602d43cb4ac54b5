"""The second half of a layer as Ops pushed onto a graph: routed experts or an MLP.

A form describes the block of a family in numbers. Its parameters are those of mlx-lm's
module, by their paths below the layer.

Letters: B sequences, T tokens each, N = B T, D model width, K experts of a token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import ModelError
from ..experts.weights import Weight
from . import ops
from .graph import BufId
from .graph import roles as b
from .graph.experts import GraphExperts
from .graph.lower import Kernel
from .model import GraphBuilder
from .ops.functions import Array, to_device
from .ops.moe import noaux_topk, softmax_topk


@dataclass(frozen=True)
class Call:
    """The facts of a call that shape its graphs: sequences, tokens, masks, experts.

    ``requests_early``: reading starts when experts are chosen; see ``requesting``.
    """

    n_seqs: int
    t: int
    dtype: mx.Dtype
    attention_mask: bool = False
    sequence_mask: bool = False
    lengths: bool = False
    spare_rows: bool = False
    gather_by_id: bool = False
    requests_early: bool = False

    @property
    def n(self) -> int:
        """Tokens of all sequences."""
        return self.n_seqs * self.t


# mlx-lm's name for the stacked experts of a layer's MoE block.
ROUTED = "switch_mlp"
# Where mlx-lm keeps the second half of a layer.
MLP = "mlp"
# Matrices that multiply the same row one after the other, by path.
SameInput = tuple[tuple[str, ...], ...]
# The unpacked shapes of tensors, by name.
Shapes = Mapping[str, tuple[int, ...]]


def rotation(rope: nn.Module, *, pairs: bool = False) -> tuple[mx.array, float]:
    """Return the angles and the factor of one of mlx-lm's rotary modules.

    Args:
        pairs: neighbouring channels form pairs, not channels of two halves.

    Returns:
        The angle per position of each channel pair, ``[rotary_dim / 2]``, and the
        factor of rotated channels.

    Raises:
        ModelError: angles depend on the length of the sequence or are not finite, or
            the module pairs other channels.
    """
    scale = getattr(rope, "mscale", getattr(rope, "_scale", 1.0))
    traditional = getattr(rope, "traditional", False)
    if hasattr(rope, "_freqs") and traditional == pairs:
        angles = mx.reciprocal(rope._freqs.astype(mx.float32))
    elif isinstance(rope, nn.RoPE) and traditional == pairs:
        half = rope.dims // 2
        exponent = mx.arange(half, dtype=mx.float32) / half
        angles = mx.exp(-exponent * mx.log(mx.array(rope.base, mx.float32)))
        if rope.scale != 1.0:
            angles = angles * rope.scale
    else:
        raise ModelError(
            "[rope] expected rotary positions that do not depend on the length of the "
            f"sequence but got {type(rope).__name__}: choose another rope_type in "
            "config.json"
        )
    dims = getattr(rope, "dims", getattr(rope, "dim", None))
    found = np.array(angles)
    is_finite = math.isfinite(scale) and bool(np.isfinite(found).all())
    if found.size == 0 or 2 * found.size != dims or not is_finite:
        raise ModelError(
            f"[rope] expected an even number of rotated channels with finite angles "
            f"but got {dims} channels and angles {found[:4].tolist()}: mend "
            "rope_parameters in config.json"
        )
    return angles, float(scale)


@dataclass(frozen=True)
class RoutedShape:
    """Width of the model and of an expert, and the stored bytes of one expert."""

    dim: int
    expert_dim: int
    expert_bytes: int


@dataclass(frozen=True)
class Noaux:
    """A choice by sigmoids with a correction, among the best groups of experts.

    See ``MoeNoauxTopK``. ``bias`` is the path of the correction in the block.
    """

    n_group: int = 1
    topk_group: int = 1
    scale: float = 1.0
    bias: str = "gate.e_score_correction_bias"


@dataclass(frozen=True, eq=False)
class Moe:
    """Routed experts: the ``k`` likeliest by a softmax over all, unless ``noaux``.

    Args:
        normalised: the weights of a token's experts are divided by their sum.
        shared_dim: width of the shared expert; 0: there is none.
        shared_name: mlx-lm's name of the shared expert.
        gated: a gate scales the output of the shared expert.
        noaux: experts are chosen by sigmoids.
        path: mlx-lm's name of the block in a layer.
        routed_name, router: mlx-lm's names of the experts and of their router.
        biased: the experts and the router add biases.
        alpha, limit: numbers of ``clipped_swiglu``; a limit of 0 is a plain SwiGLU.
    """

    n_experts: int
    k: int
    expert_dim: int
    normalised: bool
    shared_dim: int = 0
    shared_name: str = "shared_expert"
    gated: bool = True
    noaux: Noaux | None = None
    path: str = MLP
    routed_name: str = ROUTED
    router: str = "gate"
    biased: bool = False
    alpha: float = 1.0
    limit: float = 0.0

    @property
    def router_path(self) -> str:
        """The path of the router."""
        return f"{self.path}.{self.router}"

    @property
    def shared(self) -> str:
        """The path of the shared expert."""
        return f"{self.path}.{self.shared_name}"

    @property
    def same_input(self) -> SameInput:
        """Paths of matrices that multiply the same row."""
        return (
            (self.router_path, f"{self.shared}_gate"),
            (f"{self.shared}.gate_proj", f"{self.shared}.up_proj"),
        )

    def shapes(self, dim: int) -> Shapes:
        """Return the unpacked shapes of the block's tensors by name."""
        n, inner, stem = (
            self.n_experts,
            self.expert_dim,
            f"{self.path}.{self.routed_name}",
        )
        routed: dict[str, tuple[int, ...]] = {
            f"{self.router_path}.weight": (n, dim),
            f"{stem}.gate_proj.weight": (n, inner, dim),
            f"{stem}.up_proj.weight": (n, inner, dim),
            f"{stem}.down_proj.weight": (n, dim, inner),
        }
        if self.biased:
            biases = {
                f"{name.removesuffix('.weight')}.bias": shape[:-1]
                for name, shape in routed.items()
            }
            routed |= biases
        if self.noaux is not None:
            routed[f"{self.path}.{self.noaux.bias}"] = (n,)
        if self.shared_dim:
            routed |= mlp_shapes(self.shared, dim, self.shared_dim)
            if self.gated:
                routed[f"{self.shared}_gate.weight"] = (1, dim)
        return routed

    def chosen_by(self, block: nn.Module) -> Moe:
        """Return the form with the module's own choice; users may change it."""
        noaux, gate = self.noaux, block[self.router]
        if noaux is not None and hasattr(gate, "topk_group"):
            block, scale = gate, float(gate.routed_scaling_factor)
            noaux = replace(
                noaux, n_group=gate.n_group, topk_group=gate.topk_group, scale=scale
            )
        k = getattr(block, "top_k", None) or block.num_experts_per_tok
        normalised = bool(getattr(block, "norm_topk_prob", self.normalised))
        # mlx-lm does not normalise the weight of a single sigmoid.
        normalised = normalised and (block is not gate or k > 1)
        if (k, normalised, noaux) == (self.k, self.normalised, self.noaux):
            return self
        return replace(self, k=k, normalised=normalised, noaux=noaux)

    @property
    def choice(self) -> type[ops.MoeSoftmaxTopK] | type[ops.MoeNoauxTopK]:
        """The Op that chooses experts."""
        return ops.MoeSoftmaxTopK if self.noaux is None else ops.MoeNoauxTopK


@dataclass(frozen=True, eq=False)
class DenseMlp:
    """One SwiGLU for every token, in place of experts."""

    inner_dim: int
    path: ClassVar[str] = MLP
    same_input: ClassVar[SameInput] = ((f"{MLP}.gate_proj", f"{MLP}.up_proj"),)

    def shapes(self, dim: int) -> Shapes:
        """Return the unpacked shapes of the block's tensors by name."""
        return mlp_shapes(MLP, dim, self.inner_dim)


def mlp_shapes(path: str, dim: int, inner: int) -> Shapes:
    """Return the shapes of the tensors of a SwiGLU at ``path``."""
    return {
        f"{path}.gate_proj.weight": (inner, dim),
        f"{path}.up_proj.weight": (inner, dim),
        f"{path}.down_proj.weight": (dim, inner),
    }


RoutedOp = (
    type[ops.MoeDecodeExperts]
    | type[ops.MoeGatherIdFuse]
    | type[ops.MoeBatchedPermuteFuse]
)


def experts_op(call: Call) -> RoutedOp:
    """Return the Op that runs the routed experts of a call.

    It never depends on the memory budget, and so results do not either.
    """
    if call.n == 1:
        return ops.MoeDecodeExperts
    return ops.MoeGatherIdFuse if call.gather_by_id else ops.MoeBatchedPermuteFuse


def choose_experts(
    g: GraphBuilder, form: Moe, logits: BufId, n: int
) -> tuple[BufId, BufId]:
    """Push the choice of each token's K experts and of their weights."""
    k = form.k
    indices = g.new("expert_indices", b.RouterIdxBuf, (n, k))
    weights = g.new("expert_weights", b.RouterWeightsBuf, (n, k))
    if (noaux := form.noaux) is not None:
        g.push(
            ops.MoeNoauxTopK(
                label="route",
                logits=logits,
                bias=g.ref(f"{form.path}.{noaux.bias}"),
                indices_out=indices,
                weights_out=weights,
                n_tokens=n,
                n_experts=form.n_experts,
                k=k,
                n_group=noaux.n_group,
                topk_group=noaux.topk_group,
                scale=noaux.scale,
                normalised=form.normalised,
            )
        )
        return indices, weights
    g.push(
        ops.MoeSoftmaxTopK(
            label="route",
            logits=logits,
            indices_out=indices,
            weights_out=weights,
            n_tokens=n,
            n_experts=form.n_experts,
            k=k,
        )
    )
    if form.normalised:
        g.push(
            ops.MoeNormalizeWeights(
                label="normalize_weights", weights=weights, n_tokens=n, k=k
            )
        )
    return indices, weights


def requesting(experts: GraphExperts, form: Moe) -> Kernel:
    """Return a function that performs ``form.choice`` and starts to read experts."""

    def choose(logits: Array, *bias: Weight) -> tuple[Array, Array]:
        if (by := form.noaux) is None:
            indices, weights = softmax_topk(logits, form.k)
        else:
            how = by.n_group, by.topk_group, by.scale, form.normalised
            indices, weights = noaux_topk(logits, bias[0].w, form.k, *how)
        experts.request(to_device(indices))
        return indices, weights

    return choose


def expected_experts(g: GraphBuilder, form: Moe, x: BufId, n: int) -> BufId:
    """Push a router on rows close to its own, to predict its next choice."""
    logits = g.matvec(form.router_path, x, b.RouterLogitsBuf, label="router")
    return choose_experts(g, form, logits, n)[0]


class _Swiglu:
    """A SwiGLU at a path, pushed in two parts, so that other Ops may come between.

    Args:
        name: the prefix of its labels.
    """

    def __init__(self, g: GraphBuilder, path: str, name: str):
        self._g, self._path, self._name = g, path, name

    def open(self, x: BufId) -> None:
        """Push the two matrices that read ``x``."""
        self._gate = self._matvec("gate_proj", x, b.SharedFfnGateBuf)
        self._up = self._matvec("up_proj", x, b.SharedFfnUpBuf)

    def close(self, n: int) -> BufId:
        """Push the activation and the down projection."""
        width = self._g.ref(f"{self._path}.gate_proj").shape[0]
        act = self._g.new(f"{self._name}act", b.SharedFfnActBuf, (n, width))
        self._g.push(
            ops.SwigluFusedBatched(
                label=f"{self._name}swiglu",
                gate=self._gate,
                up=self._up,
                out=act,
                n_tokens=n,
                dim=width,
            )
        )
        return self._matvec("down_proj", act, b.SharedFfnDownBuf)

    def _matvec(self, part: str, x: BufId, role: type[b.MatvecOut]) -> BufId:
        label = f"{self._name}{part}"
        return self._g.matvec(f"{self._path}.{part}", x, role, label=label)


class _Shared:
    """The shared expert and its gate, if there are any.

    It is pushed in two parts, with the choice of experts between or after them.
    """

    def __init__(self, g: GraphBuilder, form: Moe):
        self._g, self._form, self._is_there = g, form, bool(form.shared_dim)
        self._mlp = _Swiglu(g, form.shared, "shared_")
        self.gate: BufId | None = None

    def open(self, x: BufId) -> None:
        """Push the products with the layer's row."""
        if not self._is_there:
            return
        if self._form.gated:
            path = f"{self._form.shared}_gate"
            self.gate = self._g.matvec(path, x, b.SharedGateBuf)
        self._mlp.open(x)

    def close(self, n: int) -> BufId | None:
        """Push the activation and the down projection."""
        return self._mlp.close(n) if self._is_there else None


def _experts_sum(
    g: GraphBuilder,
    form: Moe,
    x: BufId,
    chosen: tuple[BufId, BufId],
    experts: BufId,
    call: Call,
    routed: RoutedShape,
) -> BufId:
    """Push the weighted sum of the routed experts."""
    n, dim = call.n, routed.dim
    out_sum = g.new("experts_sum", b.MoeOutSumBuf, (n, dim))
    kind = experts_op(call)
    if kind is ops.MoeBatchedPermuteFuse:
        g.push(ops.ZeroBuffer(label="zero_sum", buf=out_sum, n_tokens=n, dim=dim))
    indices, weights = chosen
    g.push(
        kind(
            label="experts",
            mlp_in=x,
            indices=indices,
            weights=weights,
            experts=experts,
            out_sum=out_sum,
            n_tokens=n,
            dim=dim,
            expert_dim=routed.expert_dim,
            n_experts=form.n_experts,
            k=form.k,
            expert_bytes=routed.expert_bytes,
            alpha=form.alpha,
            limit=form.limit,
        )
    )
    return out_sum


def moe(
    g: GraphBuilder,
    form: Moe,
    residual: BufId,
    x: BufId,
    call: Call,
    routed: RoutedShape,
) -> BufId:
    """Push router, shared expert, routed experts and the sum with the residual."""
    n, dim = call.n, routed.dim
    experts = g.input("experts", b.ExpertBaseBuf, (None,))
    shared = _Shared(g, form)
    # An unquantised router cannot join the norm's launch, so it must not part others.
    apart = form.noaux is not None and not call.requests_early
    if apart:
        shared.open(x)
    logits = g.matvec(form.router_path, x, b.RouterLogitsBuf, label="router")
    if call.requests_early:
        # The shared expert runs while the chosen ones are being read.
        chosen = choose_experts(g, form, logits, n)
        shared.open(x)
        down = shared.close(n)
        out_sum = _experts_sum(g, form, x, chosen, experts, call, routed)
    else:
        # An order in which neighbours can be fused.
        if not apart:
            shared.open(x)
        chosen = choose_experts(g, form, logits, n)
        out_sum = _experts_sum(g, form, x, chosen, experts, call, routed)
        down = shared.close(n)
    hidden = g.new("hidden_out", b.HiddenBuf, (n, dim))
    g.push(
        ops.MoeCombineResidualNTokens(
            label="combine",
            h_mid=residual,
            moe_sum=out_sum,
            shared_out=down,
            shared_gate=shared.gate,
            hidden_out=hidden,
            n_tokens=n,
            dim=dim,
        )
    )
    return hidden


def dense_mlp(g: GraphBuilder, residual: BufId, x: BufId, call: Call) -> BufId:
    """Push a SwiGLU and its sum with the residual."""
    mlp = _Swiglu(g, MLP, "")
    mlp.open(x)
    return g.residual_add(mlp.close(call.n), residual, label="combine")
