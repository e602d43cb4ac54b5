"""Token embedding."""

from __future__ import annotations

from collections.abc import Mapping

from ...experts.weights import Weight
from ..graph.buffers import Shape
from ..graph.op import Cost, In, Op, Out, WeightRef
from ..graph.roles import EmbedOutBuf, TokenIdsBuf
from .functions import Array, embed, inside_rows


class EmbedGatherNTokens(Op):
    """Unpack row ``token_ids[t]`` of the embedding for each of N tokens.

    Ids are those of the vocabulary, unless ``any_ids``: the rows of others are NaN.
    Kernels always give NaN for them. ``token_ids`` may be a column ``[N, 1]``.
    """

    token_ids: In[TokenIdsBuf]
    weight: WeightRef
    hidden_out: Out[EmbedOutBuf]
    vocab_size: int
    hidden_dim: int
    n_tokens: int
    any_ids: bool = False

    def shapes(self) -> dict[str, Shape]:
        return {
            "token_ids": (self.n_tokens,),
            "weight": (self.vocab_size, self.hidden_dim),
            "hidden_out": (self.n_tokens, self.hidden_dim),
        }

    def index_ranges(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, range]:
        return {"token_ids": range(self.vocab_size)}

    def cost(self) -> Cost:
        n = self.n_tokens * self.hidden_dim
        row_bytes = self.weight.n_bytes // self.vocab_size
        return Cost(flops=2 * n, bytes=4 * n + self.n_tokens * row_bytes)

    def reference(self, token_ids: Array, weight: Weight) -> Array:
        ids = token_ids.reshape(-1)
        return (inside_rows if self.any_ids else embed)(ids, weight)
