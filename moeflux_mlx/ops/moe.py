"""Mixture of experts: routing, the routed experts three ways, and the combination.

Letters: N tokens, D model width, E experts, K experts a token, F expert width.
The routed experts come as an ``ExpertSource``: whether they are in memory or on disk
changes when they are read, never what is computed.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ..graph.buffers import (
    ExpertBaseBuf,
    HiddenBuf,
    MoeInputBuf,
    MoeOutSumBuf,
    ResidualBuf,
    RouterIdxBuf,
    RouterLogitsBuf,
    RouterWeightsBuf,
    Shape,
    SharedFfnDownBuf,
    SharedGateBuf,
)
from ..graph.op import Cost, In, InOut, Op, Out
from ..weights import ExpertSource, ExpertWeights
from .products import gated_mlp, gather_linear, swiglu


class MoeSoftmaxTopK(Op):
    """Softmax ``[N, E]`` logits in float32 and keep the K largest.

    Indices come in order of falling weight; ties go to the lower index.
    """

    logits: In[RouterLogitsBuf]
    indices_out: Out[RouterIdxBuf]
    weights_out: Out[RouterWeightsBuf]
    n_tokens: int
    n_experts: int
    k: int

    def shapes(self) -> dict[str, Shape]:
        chosen = (self.n_tokens, self.k)
        return {
            "logits": (self.n_tokens, self.n_experts),
            "indices_out": chosen,
            "weights_out": chosen,
        }

    def cost(self) -> Cost:
        n = self.n_tokens * self.n_experts
        return Cost(flops=5 * n, bytes=4 * n + 8 * self.n_tokens * self.k)

    def scratch_bytes(self, itemsize: int) -> int:
        return 3 * 4 * self.n_tokens * self.n_experts

    def reference(self, logits: mx.array) -> tuple[mx.array, mx.array]:
        scores = mx.softmax(logits.astype(mx.float32), axis=-1, precise=True)
        indices = mx.argsort(-scores, axis=-1)[:, : self.k]
        indices = mx.stop_gradient(indices.astype(mx.int32))
        return indices, mx.take_along_axis(scores, indices, axis=-1)


class MoeNormalizeWeights(Op):
    """Divide each token's K weights by their sum, in place."""

    weights: InOut[RouterWeightsBuf]
    n_tokens: int
    k: int

    def shapes(self) -> dict[str, Shape]:
        return {"weights": (self.n_tokens, self.k)}

    def cost(self) -> Cost:
        n = self.n_tokens * self.k
        return Cost(flops=2 * n, bytes=8 * n)

    def reference(self, weights: mx.array) -> mx.array:
        return weights / weights.sum(axis=-1, keepdims=True)


class _RoutedExperts:
    """What the Ops over routed experts share: shapes and cost."""

    n_tokens: int
    dim: int
    expert_dim: int
    n_experts: int
    k: int
    expert_bytes: int

    def shapes(self) -> dict[str, Shape]:
        chosen, rows = (self.n_tokens, self.k), (self.n_tokens, self.dim)
        return {
            "mlp_in": rows,
            "indices": chosen,
            "weights": chosen,
            "experts": (None,),
            "out_sum": rows,
        }

    def cost(self) -> Cost:
        """Count every expert that can be asked for as read from disk once."""
        rows = self.n_tokens * self.k
        visited = min(rows, self.n_experts)
        return Cost(
            flops=rows * (6 * self.dim * self.expert_dim + 5 * self.expert_dim),
            bytes=visited * self.expert_bytes + 4 * rows * (2 * self.dim),
            ssd_bytes=visited * self.expert_bytes,
        )

    def scratch_bytes(self, itemsize: int) -> int:
        """Rows by expert, before and after the experts, and once more in token order."""
        return 3 * self.n_tokens * self.k * self.dim * itemsize


def experts_by_slot(
    x: mx.array, slots: mx.array, stacks: ExpertWeights, *, in_order: bool = False
) -> mx.array:
    """Run each row ``[N, 1 or K, D]`` through the experts in its slots ``[N, K]``."""
    gate = gather_linear(x, stacks.gate, slots, in_order=in_order)
    up = gather_linear(x, stacks.up, slots, in_order=in_order)
    return gather_linear(swiglu(gate, up), stacks.down, slots, in_order=in_order)


class MoeDecodeExperts(_RoutedExperts, Op):
    """Run one token's K experts against the slots that hold them: ``[1, D]``."""

    mlp_in: In[MoeInputBuf]
    indices: In[RouterIdxBuf]
    weights: In[RouterWeightsBuf]
    experts: In[ExpertBaseBuf]
    out_sum: Out[MoeOutSumBuf]
    n_tokens: int
    dim: int
    expert_dim: int
    n_experts: int
    k: int
    expert_bytes: int

    def reference(
        self,
        mlp_in: mx.array,
        indices: mx.array,
        weights: mx.array,
        experts: ExpertSource,
    ) -> mx.array:
        slots = experts.slots(indices)
        out = experts_by_slot(mlp_in[:, None], slots, experts.weights)
        experts.guard(out)
        return (out * weights[..., None]).sum(axis=1)


class MoeGatherIdFuse(_RoutedExperts, Op):
    """Run all N tokens' experts at once, rows sorted by expert on the device.

    Every expert must have a slot at the same time; nothing is read back to the host.
    """

    mlp_in: In[MoeInputBuf]
    indices: In[RouterIdxBuf]
    weights: In[RouterWeightsBuf]
    experts: In[ExpertBaseBuf]
    out_sum: Out[MoeOutSumBuf]
    n_tokens: int
    dim: int
    expert_dim: int
    n_experts: int
    k: int
    expert_bytes: int

    def reference(
        self,
        mlp_in: mx.array,
        indices: mx.array,
        weights: mx.array,
        experts: ExpertSource,
    ) -> mx.array:
        slots = experts.slots(indices).reshape(-1)
        order = mx.argsort(slots)
        rows = mlp_in[order // self.k][:, None]
        by_slot = experts_by_slot(
            rows, slots[order][:, None], experts.weights, in_order=True
        )
        out = by_slot[mx.argsort(order)].reshape(self.n_tokens, self.k, self.dim)
        experts.guard(out)
        return (out * weights[..., None]).sum(axis=1)


class MoeBatchedPermuteFuse(_RoutedExperts, Op):
    """Run expert after expert over the tokens that chose it, adding to ``out_sum``.

    Tokens are sorted by expert on the host, so each needed expert is visited once
    whatever the number of slots. A token's sum runs over its experts in rising id: the
    result does not depend on the order in which experts were at hand.
    """

    mlp_in: In[MoeInputBuf]
    indices: In[RouterIdxBuf]
    weights: In[RouterWeightsBuf]
    experts: In[ExpertBaseBuf]
    out_sum: InOut[MoeOutSumBuf]
    n_tokens: int
    dim: int
    expert_dim: int
    n_experts: int
    k: int
    expert_bytes: int

    def reference(
        self,
        mlp_in: mx.array,
        indices: mx.array,
        weights: mx.array,
        experts: ExpertSource,
        out_sum: mx.array,
    ) -> mx.array:
        ids = np.array(indices).reshape(-1)
        order = np.argsort(ids, kind="stable")
        used, starts = np.unique(ids[order], return_index=True)
        bounds = dict(
            zip(
                used.tolist(),
                zip(starts, [*starts[1:], ids.size], strict=True),
                strict=True,
            )
        )
        rows = mlp_in[mx.array(order // self.k)]
        outs: dict[int, mx.array] = {}
        for wave in experts.waves(used.tolist()):
            for expert, slot in wave:
                start, stop = bounds[expert]
                outs[expert] = gated_mlp(rows[start:stop], experts.weights, slot)
            experts.guard(*(outs[expert] for expert, _ in wave))
        sorted_out = mx.concatenate([outs[expert] for expert in used.tolist()])
        position = np.empty_like(order)
        position[order] = np.arange(order.size)
        position = position.reshape(self.n_tokens, self.k)
        rising = np.argsort(position, axis=1)
        weights = mx.take_along_axis(weights, mx.array(rising), axis=1)
        position = np.take_along_axis(position, rising, axis=1)
        per_token = sorted_out[mx.array(position)]
        return out_sum + (per_token * weights[..., None]).sum(axis=1)


class MoeCombineResidualNTokens(Op):
    """Return ``h_mid + moe_sum + sigmoid(shared_gate) * shared_out`` over ``[N, D]``."""

    h_mid: In[ResidualBuf]
    moe_sum: In[MoeOutSumBuf]
    shared_out: In[SharedFfnDownBuf]
    shared_gate: In[SharedGateBuf]
    hidden_out: Out[HiddenBuf]
    n_tokens: int
    dim: int

    def shapes(self) -> dict[str, Shape]:
        rows = (self.n_tokens, self.dim)
        return {
            **dict.fromkeys(("h_mid", "moe_sum", "shared_out", "hidden_out"), rows),
            "shared_gate": (self.n_tokens, 1),
        }

    def cost(self) -> Cost:
        n = self.n_tokens * self.dim
        return Cost(flops=3 * n + 4 * self.n_tokens, bytes=16 * n)

    def scratch_bytes(self, itemsize: int) -> int:
        return self.n_tokens * self.dim * itemsize

    def reference(
        self,
        h_mid: mx.array,
        moe_sum: mx.array,
        shared_out: mx.array,
        shared_gate: mx.array,
    ) -> mx.array:
        out = h_mid + moe_sum + mx.sigmoid(shared_gate) * shared_out
        return out.astype(h_mid.dtype)
