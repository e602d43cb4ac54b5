"""The second half of a layer in numbers: routed experts or an MLP.

Their parameters are those of mlx-lm's module, by their paths below the layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from . import ops

# mlx-lm's name for the stacked experts of a layer's MoE block.
ROUTED = "switch_mlp"
# Where mlx-lm keeps the second half of a layer.
MLP = "mlp"
# Matrices that multiply the same row one after the other, by path.
SameInput = tuple[tuple[str, ...], ...]
# The unpacked shapes of tensors, by name.
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Call:
    """The facts of a call that shape its graphs: sequences, tokens, masks, experts.

    ``requests_early``: reading starts when experts are chosen; see ``requesting``.
    ``traced``: MLX traces the call, and no object of mlx-lm keeps its caches.
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
    traced: bool = False

    @property
    def n(self) -> int:
        """Tokens of all sequences."""
        return self.n_seqs * self.t


@dataclass(frozen=True)
class RoutedShape:
    """Width of the model and of an expert, and the stored bytes of one expert.

    ``shared``: several ranks of a process group share the experts.
    """

    dim: int
    expert_dim: int
    expert_bytes: int
    shared: bool = False


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
