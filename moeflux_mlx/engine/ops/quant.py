"""Products of token rows with a quantised or dense matrix."""

from __future__ import annotations

from ...experts.weights import Weight
from ..graph.buffers import Shape
from ..graph.op import Cost, In, Op, Out, WeightRef
from ..graph.roles import MatvecIn, MatvecOut
from .functions import Array, linear


class MatvecNTokens(Op):
    """Multiply ``[N, I]`` rows by the transpose of ``weight`` ``[O, I]``, plus bias."""

    weight: WeightRef
    input: In[MatvecIn]
    output: Out[MatvecOut]
    in_dim: int
    out_dim: int
    n_tokens: int
    bias: WeightRef | None = None

    def shapes(self) -> dict[str, Shape]:
        return {
            "weight": (self.out_dim, self.in_dim),
            "input": (self.n_tokens, self.in_dim),
            "output": (self.n_tokens, self.out_dim),
            "bias": (self.out_dim,),
        }

    def cost(self) -> Cost:
        rows = self.n_tokens * (self.in_dim + self.out_dim)
        return Cost(
            flops=2 * self.n_tokens * self.in_dim * self.out_dim,
            bytes=4 * rows + sum(ref.n_bytes for ref in self.weight_refs),
        )

    def reference(self, input: Array, weight: Weight, bias: Weight | None) -> Array:
        out = linear(input, weight)
        return out if bias is None else out + bias.w
