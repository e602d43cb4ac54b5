"""Mixture of experts: routing, three Ops for routed experts, and the combination.

Letters: N tokens, D model width, E experts, K experts per token, F expert width. Ops
get the routed experts as a ``GraphExperts``. Whether these are in memory or on disk
decides when they are read, and never changes the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar

import mlx.core as mx
import numpy as np

from ... import device
from ...experts.compute.rank_experts import RankExperts
from ...experts.compute.slot_block import least_rows
from ...experts.compute.source import filled, in_portions
from ...experts.weights import ExpertWeights, Weight
from ..graph.buffers import Shape
from ..graph.experts import GraphExperts
from ..graph.op import Cost, In, InOut, Op, OpFields, Out, WeightRef
from ..graph.roles import (
    ExpertBaseBuf,
    HiddenBuf,
    MoeInputBuf,
    MoeOutSumBuf,
    ResidualBuf,
    RouterIdxBuf,
    RouterLogitsBuf,
    RouterWeightsBuf,
    SharedFfnDownBuf,
    SharedGateBuf,
)
from .functions import (
    Activation,
    Array,
    argsort,
    clipped_swiglu,
    expert_mlp,
    experts_by_slot,
    float32,
    namespace,
    sigmoid,
    softmax,
    swiglu,
    take_columns,
    to_device,
    to_host,
)

# Rows of several experts that the host multiplies together.
SHARED_ROWS = 64
# The rows of each expert, by expert.
Ranges = dict[int, tuple[int, int]]
RowsByExpert = Callable[[Array, np.ndarray, list[int], Ranges, GraphExperts], Array]
RunRows = Callable[[Array, Array, Array, GraphExperts], Array]


class MoeSoftmaxTopK(Op):
    """Apply a float32 softmax to logits ``[N, E]`` and keep the K largest.

    Indices are in order of decreasing weight; ties go to the lower index.
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
        return 2 * 4 * self.n_tokens * self.n_experts

    def reference(self, logits: Array) -> tuple[Array, Array]:
        return softmax_topk(logits, self.k)


def softmax_topk(logits: Array, k: int) -> tuple[Array, Array]:
    """Return ids and weights ``[N, k]`` as ``MoeSoftmaxTopK`` does for ``[N, E]``."""
    xp = namespace(logits)
    scores = softmax(float32(logits))
    indices = argsort(-scores)[:, :k].astype(xp.int32)
    if xp is mx:
        indices = mx.stop_gradient(indices)
    return indices, take_columns(scores, indices)


class MoeNoauxTopK(Op):
    """Keep the K best of ``[N, E]`` sigmoids, corrected for the choice only (noaux_tc).

    The correction ``bias`` ``[E]`` is added to the scores. Experts form ``n_group``
    groups of neighbours; the ``topk_group`` groups with the largest sum of their two
    best scores stay. The K best experts in them are chosen; ties go to the lower index.
    Weights are the uncorrected scores, divided by their sum if ``normalised``, times
    ``scale``. Source: DeepSeek-V3.
    """

    logits: In[RouterLogitsBuf]
    indices_out: Out[RouterIdxBuf]
    weights_out: Out[RouterWeightsBuf]
    bias: WeightRef
    n_tokens: int
    n_experts: int
    k: int
    n_group: int = 1
    topk_group: int = 1
    scale: float = 1.0
    normalised: bool = True

    def shapes(self) -> dict[str, Shape]:
        chosen = (self.n_tokens, self.k)
        return {
            "logits": (self.n_tokens, self.n_experts),
            "indices_out": chosen,
            "weights_out": chosen,
            "bias": (self.n_experts,),
        }

    def cost(self) -> Cost:
        n = self.n_tokens * self.n_experts
        moved = 4 * n + self.bias.n_bytes + 8 * self.n_tokens * self.k
        return Cost(flops=5 * n, bytes=moved)

    def scratch_bytes(self, itemsize: int) -> int:
        return 4 * 4 * self.n_tokens * self.n_experts

    def reference(self, logits: Array, bias: Weight) -> tuple[Array, Array]:
        groups = self.n_group, self.topk_group
        return noaux_topk(logits, bias.w, self.k, *groups, self.scale, self.normalised)


def noaux_topk(
    logits: Array,
    bias: Array,
    k: int,
    n_group: int,
    topk_group: int,
    scale: float,
    normalize: bool,
) -> tuple[Array, Array]:
    """Return ids and weights ``[N, k]`` as ``MoeNoauxTopK`` does for ``[N, E]``."""
    xp, n_tokens = namespace(logits), len(logits)
    scores = sigmoid(float32(logits))
    biased = scores + float32(bias)
    if topk_group < n_group:
        by_group = biased.reshape(n_tokens, n_group, -1)
        best_two = xp.sort(by_group, axis=-1)[..., -2:].sum(axis=-1)
        rank = argsort(argsort(-best_two))
        kept = (rank < topk_group)[..., None]
        biased = xp.where(kept, by_group, -xp.inf).reshape(n_tokens, -1)
    indices = argsort(-biased)[:, :k].astype(xp.int32)
    if xp is mx:
        indices = mx.stop_gradient(indices)
    weights = take_columns(scores, indices)
    if normalize:
        # As in transformers: scores of zero give weights of zero, not NaN.
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return indices, weights * scale


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

    def reference(self, weights: Array) -> Array:
        return normalised(weights)


def normalised(weights: Array) -> Array:
    """Divide each token's K weights by their sum."""
    return weights / weights.sum(axis=-1, keepdims=True)


class RoutedExperts(OpFields):
    """Fields, shapes and cost of the Ops over routed experts; Ops add the output.

    ``shared``: ``experts`` is a ``RankExperts``. Several ranks compute the experts'
    rows and exchange them, and each adds all of a token's rows itself.
    """

    mlp_in: In[MoeInputBuf]
    indices: In[RouterIdxBuf]
    weights: In[RouterWeightsBuf]
    experts: In[ExpertBaseBuf]
    n_tokens: int
    dim: int
    expert_dim: int
    n_experts: int
    k: int
    expert_bytes: int
    alpha: float = 1.0
    limit: float = 0.0
    shared: bool = False

    def activation(self, gate: Array, up: Array) -> Array:
        """Apply a SwiGLU, or with a ``limit`` the clipped one."""
        if not self.limit:
            return swiglu(gate, up)
        return clipped_swiglu(gate, up, self.alpha, self.limit)

    def shapes(self) -> dict[str, Shape]:
        chosen, rows = (self.n_tokens, self.k), (self.n_tokens, self.dim)
        return {
            "mlp_in": rows,
            "indices": chosen,
            "weights": chosen,
            "experts": (None,),
            "out_sum": rows,
        }

    def index_ranges(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, range]:
        return {"indices": range(self.n_experts)}

    def cost(self) -> Cost:
        """Count every expert that may be chosen as read from disk once."""
        rows = self.n_tokens * self.k
        visited = min(rows, self.n_experts)
        return Cost(
            flops=rows * (6 * self.dim * self.expert_dim + 5 * self.expert_dim),
            bytes=visited * self.expert_bytes + 4 * rows * (2 * self.dim),
            ssd_bytes=visited * self.expert_bytes,
        )

    @property
    def n_experts_used(self) -> int:
        """K per token."""
        return self.n_tokens * self.k

    def scratch_bytes(self, itemsize: int) -> int:
        """Count rows before and after the experts, and once more in token order."""
        chosen = self.n_tokens * self.k
        # In the worst case all tokens choose the same expert.
        together = max(self.n_tokens, min(chosen, SHARED_ROWS))
        one = together * (6 * self.expert_dim + 3 * self.dim)
        # This rank's rows among zeros, then with marks, and the sum of all ranks'.
        exchanged = 3 * chosen * (self.dim * itemsize + 12) if self.shared else 0
        most = max(3 * chosen * self.dim, chosen * self.dim + one) * itemsize
        return exchanged + most

    def rows_of_all_ranks(
        self, mlp_in: Array, indices: Array, experts: GraphExperts
    ) -> Array:
        """Return the rows ``[N, K, D]`` of experts that ranks share."""
        assert isinstance(experts, RankExperts)
        stacks = experts.weights

        def make(x: Array, tokens: Array, _: Array, slots: Array) -> Array:
            chosen, n = slots.reshape(-1), slots.size
            if not isinstance(x, np.ndarray):
                tokens = mx.array(tokens)
                if n < (least := least_rows(self.n_experts_used)):
                    every = filled(n, least)
                    tokens, chosen = tokens[every], chosen[every]
            out = experts_by_slot(
                x[tokens], chosen[:, None], stacks, activation=self.activation
            )
            return out[:n, 0]

        return experts.by_slot(mlp_in, indices, make)


class MoeDecodeExperts(RoutedExperts, Op):
    """Run one token's K experts from the slots that hold them: ``[1, D]``."""

    out_sum: Out[MoeOutSumBuf]

    def reference(
        self,
        mlp_in: Array,
        indices: Array,
        weights: Array,
        experts: GraphExperts,
    ) -> Array:
        if self.shared:
            out = self.rows_of_all_ranks(mlp_in, indices, experts)
        elif isinstance(mlp_in, np.ndarray):
            out = as_they_come(mlp_in, indices, experts, self.activation)
        else:
            slots, stacks = experts.slots(indices), experts.weights
            out = experts_by_slot(mlp_in, slots, stacks, activation=self.activation)
            guard(experts, [out])
        return (out * weights[..., None]).sum(axis=1)


def as_they_come(
    mlp_in: np.ndarray,
    indices: np.ndarray,
    experts: GraphExperts,
    activation: Activation = swiglu,
) -> np.ndarray:
    """Run one row through its experts ``[1, K]`` as they arrive from disk.

    Returns:
        ``[1, K, D]``; the bits do not depend on which experts were in memory.
    """
    out = np.empty((1, indices.size, mlp_in.shape[1]), "f4")
    for columns, slots in experts.parts(to_device(indices)):
        stacks, chosen = experts.weights, np.array([slots])
        part = experts_by_slot(mlp_in, chosen, stacks, activation=activation)
        out[:, columns] = part
    return out


class MoeGatherIdFuse(RoutedExperts, Op):
    """Run all N tokens' experts at once, rows sorted by slot on the device.

    If not all experts fit into memory together, they are divided into portions, which
    changes no bit: a row depends on its own expert only, and a token's sum runs over
    its experts in the order of ``indices``.
    """

    out_sum: Out[MoeOutSumBuf]

    def reference(
        self,
        mlp_in: Array,
        indices: Array,
        weights: Array,
        experts: GraphExperts,
    ) -> Array:
        if self.shared:
            out = self.rows_of_all_ranks(mlp_in, indices, experts)
        else:
            out = self.rows_in_portions(mlp_in, indices, experts, self._gather)
        return (out * weights[..., None]).sum(axis=1)

    def rows_in_portions(
        self, mlp_in: Array, indices: Array, experts: GraphExperts, run: RunRows
    ) -> Array:
        """Return the rows ``[N, K, D]`` of tokens ``[N, D]`` through ``indices``.

        Args:
            run: returns the rows ``[P, k, D]`` of ``x`` ``[P, D]`` through the experts
                ``ids`` ``[P, k]`` in ``slots`` ``[P, k]``.
        """
        on_host = isinstance(mlp_in, np.ndarray)

        def rows(x: Array, ids: Array, slots: mx.array) -> mx.array:
            found = to_host(slots) if on_host else slots
            return to_device(run(x, ids, found, experts))

        def part(places: np.ndarray, slots: mx.array) -> mx.array:
            where = places if on_host else mx.array(places)
            ids = indices.reshape(-1)[where][:, None]
            return rows(mlp_in[where // self.k], ids, slots[:, None])[:, 0]

        whole = partial(rows, mlp_in, indices)
        out = in_portions(experts, to_device(indices), whole, part)
        return to_host(out) if on_host else out

    def _gather(
        self, x: Array, _ids: Array, slots: Array, experts: GraphExperts
    ) -> Array:
        shape, k, slots = slots.shape, slots.shape[1], slots.reshape(-1)
        order = argsort(slots)
        rows, chosen, stacks = x[order // k], slots[order], experts.weights
        by_blocks = device.multiplies_by_blocks(self.n_experts_used, self.n_experts)
        n = least = len(chosen)
        if not experts.resident:
            if by_blocks:
                stacks, chosen = stacks.end_to_end(chosen)
            n_blocked = len(stacks.gate.w) if by_blocks else 0
            least = least_rows(self.n_experts_used, n_blocked)
        if n < least:
            every = filled(n, least)
            rows, chosen = rows[every], chosen[every]
        by_slot = experts_by_slot(
            rows,
            chosen[:, None],
            stacks,
            activation=self.activation,
            in_order=by_blocks or device.on_cpu(),
        )[:n]
        return by_slot[argsort(order)].reshape(*shape, self.dim)


class MoeBatchedPermuteFuse(RoutedExperts, Op):
    """Run expert after expert over the tokens that chose it, adding to ``out_sum``.

    Tokens are sorted by expert on the host, so each expert is visited once, however few
    slots there are. A token's sum runs over its experts by increasing id, so the result
    does not depend on the order in which experts arrived.
    """

    reads_back: ClassVar[bool] = True
    out_sum: InOut[MoeOutSumBuf]

    def reference(
        self,
        mlp_in: Array,
        indices: Array,
        weights: Array,
        experts: GraphExperts,
        out_sum: Array,
    ) -> Array:
        order, used, starts = by_expert(to_host(indices).reshape(-1))
        position, rising = self.rising(order)
        if self.shared:
            rows = self.by_expert_of_all_ranks(mlp_in, indices, experts, self._rows)
            # Rows of all ranks are in the order of ``indices``.
            position = order[position]
        else:
            rows = self._rows(mlp_in, order // self.k, used, starts, experts)
        if isinstance(rows, np.ndarray):
            return self._combined(rows, position, rising, weights, to_host(out_sum))
        weights = take_columns(weights, mx.array(rising))
        per_token = rows[mx.array(position)]
        return out_sum + (per_token * weights[..., None]).sum(axis=1)

    def by_expert_of_all_ranks(
        self, mlp_in: Array, indices: Array, experts: GraphExperts, make: RowsByExpert
    ) -> Array:
        """Return the rows ``[N * K, D]`` of experts that ranks share.

        Args:
            make: returns rows in the order of this rank's experts.
        """
        assert isinstance(experts, RankExperts)
        own = experts.source

        def in_place(x: Array, tokens: np.ndarray, ids: np.ndarray) -> Array:
            order, used, starts = by_expert(ids)
            rows = make(x, tokens[order], used, starts, own)
            places = np.argsort(order)
            return rows[places if isinstance(rows, np.ndarray) else mx.array(places)]

        found = experts.by_expert(mlp_in, indices, in_place)
        return found.reshape(-1, self.dim)

    def _rows(
        self,
        mlp_in: Array,
        tokens: np.ndarray,
        used: list[int],
        starts: Ranges,
        experts: GraphExperts,
    ) -> Array:
        """Return the rows of ``tokens`` through the experts in ``used``, in order."""
        if isinstance(mlp_in, np.ndarray):
            return self._on_host(mlp_in, tokens, used, starts, experts)
        rows, stacks = mlp_in[mx.array(tokens)], experts.weights
        outs: dict[int, Array] = {}
        for wave in experts.waves(used):
            for expert, slot in wave:
                start, stop = starts[expert]
                part = rows[start:stop]
                outs[expert] = expert_mlp(part, stacks, slot, self.activation)
            guard(experts, [outs[expert] for expert, _ in wave])
        return mx.concatenate([outs[expert] for expert in used])

    def _on_host(
        self,
        mlp_in: np.ndarray,
        tokens: np.ndarray,
        used: list[int],
        starts: Ranges,
        experts: GraphExperts,
    ) -> np.ndarray:
        """Return the rows of ``_rows`` without another copy of all of them."""
        out = np.empty((tokens.size, self.dim), np.float32)
        for wave in experts.waves(used):
            few: list[int] = []
            few_slots: list[int] = []
            for expert, slot in wave:
                rows = range(*starts[expert])
                if len(rows) < device.UNPACK_MIN_ROWS and _is_packed(experts.weights):
                    few += rows
                    few_slots += [slot] * len(rows)
                    continue
                part = mlp_in[tokens[rows.start : rows.stop]]
                done = expert_mlp(part, experts.weights, slot, self.activation)
                out[rows.start : rows.stop] = done
            # Rows for which no matrix is unpacked share products across experts: one
            # product for each expert costs several times as much. The bits are equal.
            for start in range(0, len(few), SHARED_ROWS):
                chosen = few[start : start + SHARED_ROWS]
                slots = np.array(few_slots[start : start + SHARED_ROWS])[:, None]
                by_slot = experts_by_slot(
                    mlp_in[tokens[chosen]],
                    slots,
                    experts.weights,
                    activation=self.activation,
                )
                out[chosen] = by_slot[:, 0]
        return out

    def _combined(
        self,
        rows: np.ndarray,
        position: np.ndarray,
        rising: np.ndarray,
        weights: Array,
        out_sum: np.ndarray,
    ) -> np.ndarray:
        """Add each token's rows, in blocks of tokens that fit the cache."""
        weights = take_columns(weights, rising)
        step = max(1, device.HOST_BLOCK_VALUES // (self.k * self.dim))
        total = np.empty((self.n_tokens, self.dim), np.float32)
        for start in range(0, self.n_tokens, step):
            part = slice(start, start + step)
            weighted = rows[position[part]] * weights[part, :, None]
            np.add(out_sum[part], weighted.sum(axis=1), out=total[part])
        return total

    def rising(self, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the place of each token's rows by increasing expert, and the order."""
        position = np.empty_like(order)
        position[order] = np.arange(order.size)
        position = position.reshape(self.n_tokens, self.k)
        rising = np.argsort(position, axis=1)
        return np.take_along_axis(position, rising, axis=1), rising


def _is_packed(experts: ExpertWeights) -> bool:
    """Return whether all matrices are quantised."""
    return all(w.quantization for w in (experts.gate, experts.up, experts.down))


def by_expert(
    ids: np.ndarray,
) -> tuple[np.ndarray, list[int], Ranges]:
    """Return the order that sorts ``ids``, the experts used, and their row ranges."""
    order = np.argsort(ids, kind="stable")
    used, first = np.unique(ids[order], return_index=True)
    bounds = zip(first.tolist(), [*first[1:].tolist(), ids.size], strict=True)
    return order, used.tolist(), dict(zip(used.tolist(), bounds, strict=True))


def guard(experts: GraphExperts, outputs: list[Array]) -> None:
    """Keep the slots until lazy ``outputs`` are evaluated; host arrays already are."""
    lazy = [x for x in outputs if isinstance(x, mx.array)]
    if lazy:
        experts.guard(*lazy)


class MoeCombineResidualNTokens(Op):
    """Return ``h_mid + moe_sum + sigmoid(shared_gate) * shared_out``, ``[N, D]``.

    Without a shared expert it is the sum of the first two; without a gate the factor of
    the shared expert is 1.
    """

    h_mid: In[ResidualBuf]
    moe_sum: In[MoeOutSumBuf]
    shared_out: In[SharedFfnDownBuf] | None = None
    shared_gate: In[SharedGateBuf] | None = None
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
        h_mid: Array,
        moe_sum: Array,
        shared_out: Array | None,
        shared_gate: Array | None,
    ) -> Array:
        return combined(h_mid, moe_sum, shared_out, shared_gate)


def combined(
    h: Array, moe_sum: Array, shared: Array | None, gate: Array | None
) -> Array:
    """Return ``h + moe_sum + sigmoid(gate) * shared``; the last two may be None."""
    out = h + moe_sum
    if shared is not None:
        out = out + (1 if gate is None else sigmoid(gate)) * shared
    return out.astype(h.dtype)
