"""The second half of a layer as Ops pushed onto a graph: routed experts or an MLP.

Letters: B sequences, T tokens each, N = B T, D model width, K experts of a token.
"""

from __future__ import annotations

from ..experts.weights import Weight
from . import ops
from .blocks import MLP, Call, Moe, RoutedShape
from .graph import BufId
from .graph import roles as b
from .graph.experts import GraphExperts
from .graph.lower import Kernel
from .model import GraphBuilder
from .ops.functions import Array, to_device
from .ops.moe import noaux_topk, softmax_topk

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
            shared=routed.shared,
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
    logits = g.matvec(form.router_path, x, b.RouterLogitsBuf, label="router")
    if call.requests_early:
        # The shared expert runs while the chosen ones are being read.
        chosen = choose_experts(g, form, logits, n)
        shared.open(x)
        down = shared.close(n)
        out_sum = _experts_sum(g, form, x, chosen, experts, call, routed)
    else:
        # An order in which neighbours can be fused.
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
