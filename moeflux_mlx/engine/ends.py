"""The ends of a model as graphs: tokens to rows, the last norm, rows to logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import device
from ..calls.arguments import as_int32, bounded, check_ids
from ..calls.module_call import is_tied
from ..experts.weights import Weight, has_values
from . import ops
from .graph import BufId
from .graph import roles as b
from .model import GraphBuilder, GraphRunner, LayerGraph
from .ops.functions import Array, to_device, to_host
from .parameters import LayerWeights
from .runtime import Runtime


class Ends:
    """Runs the embedding, the last norm and the head of a text model.

    Calls that take ``traced`` are part of a function that MLX compiles if it is True.

    Args:
        text: mlx-lm's module, with its ``model`` of ``layers`` between embedding and
            norm.
        args: the arguments of that module.
    """

    def __init__(self, text: nn.Module, args: Any, runtime: Runtime):
        self._text, self._args, self._runtime = text, args, runtime
        self._weights = LayerWeights(text, skip="layers")
        # It need not be among the runtime's holders: its graphs have no experts.
        self._runner = GraphRunner(runtime.executor)

    def prepare(self, unpack: bool) -> None:
        """Decide whether quantised matrices are kept dense."""
        self._weights = LayerWeights(self._text, skip="layers", unpack=unpack)

    @property
    def dtype(self) -> mx.Dtype:
        """The type of activations."""
        return device.activation_dtype(self._text.model.norm.weight.dtype)

    def weights(self, *, host: bool = False) -> Mapping[str, Weight]:
        """Return the weights that the ends read."""
        return self._weights.bind(self.dtype, host=host)

    def embed(
        self,
        inputs: mx.array,
        embeddings: mx.array | None,
        *,
        host: bool,
        traced: bool = False,
    ) -> tuple[Array, int, int]:
        """Return rows ``[B * T, D]``, the number of sequences, and tokens of each.

        Args:
            inputs: tokens ``[B, T]``.
            embeddings: ``[B, T, D]``, which replace those of the tokens.
            host: return NumPy's arrays.
        """
        move = to_host if host else to_device
        if embeddings is not None:
            n_seqs, t, dim = embeddings.shape
            rows = embeddings.astype(self.dtype).reshape(-1, dim)
            return move(rows), n_seqs, t
        n_seqs, t = inputs.shape
        # The caller of a compiled function has checked the ids.
        look = self._looks_at if traced else self.check_tokens
        build = self._build_embed if look(inputs) else self._build_embed_any
        # A column of single tokens needs no other shape.
        column = inputs if t == 1 else inputs.reshape(-1)
        ids = move(as_int32(column, self._args.vocab_size))
        rows = self._run("embed", ids, build, traced)
        return (rows if host else rows.astype(self.dtype)), n_seqs, t

    def norm(self, rows: Array, *, traced: bool = False) -> Array:
        """Return normalised rows ``[N, D]``."""
        return self._run("norm", rows, self._build_norm, traced)

    def logits(self, rows: Array, *, traced: bool = False) -> mx.array:
        """Return logits ``[N, V]`` of normalised rows."""
        return to_device(self._run("logits", rows, self._build_logits, traced))

    def last_logits(self, rows: Array, *, traced: bool = False) -> mx.array:
        """Return logits ``[N, V]`` of rows that the last norm has not seen."""
        return to_device(self._run("logits", rows, self._build_last, traced))

    def bounded(self, inputs: mx.array) -> tuple[mx.array, mx.array | None]:
        """Return ids bounded to the vocabulary, and which were in it; None: all."""
        if self.check_tokens(inputs):
            return inputs, None
        return bounded(inputs, self._args.vocab_size)

    def check_tokens(self, inputs: mx.array) -> bool:
        """Refuse ids outside the vocabulary if a check costs no extra wait.

        Returns:
            Whether it checked.
        """
        if not self._looks_at(inputs) or not has_values(inputs):
            return False
        check_ids(inputs, self._args.vocab_size)
        return True

    def _looks_at(self, inputs: mx.array) -> bool:
        """Return whether to check ids that have values."""
        return device.on_cpu() or self._runtime.streams or inputs.size > 1

    def _run(
        self,
        name: str,
        x: Array,
        build: Callable[[GraphBuilder, Array], LayerGraph],
        traced: bool,
    ) -> Array:
        weights = self.weights(host=isinstance(x, np.ndarray))
        graph = self._runtime.graphs.get(
            (build.__name__, x.shape, self._weights.signature),
            lambda: build(GraphBuilder(name, self.dtype, self._weights.refs), x),
        )
        recurs = len(x) == 1 and not traced
        done = self._runner.run(graph, weights, {"x": x}, recurs=recurs)
        return done.value(graph.outputs["out"])

    def _build_embed_any(self, g: GraphBuilder, x: Array) -> LayerGraph:
        return self._build_embed(g, x, any_ids=True)

    def _build_embed(
        self, g: GraphBuilder, x: Array, *, any_ids: bool = False
    ) -> LayerGraph:
        weight = g.ref("model.embed_tokens")
        ids = g.input("x", b.TokenIdsBuf, (x.size,))
        out = g.new("embedding", b.EmbedOutBuf, (x.size, weight.shape[1]))
        g.push(
            ops.EmbedGatherNTokens(
                label="embed",
                token_ids=ids,
                weight=weight,
                hidden_out=out,
                vocab_size=weight.shape[0],
                hidden_dim=weight.shape[1],
                n_tokens=x.size,
                any_ids=any_ids,
            )
        )
        return g.finish(self._runtime.executor, out=out)

    def _build_norm(self, g: GraphBuilder, x: Array) -> LayerGraph:
        hidden = g.input("x", b.HiddenBuf, x.shape)
        out = g.norm("model.norm", hidden, b.FinalNormBuf, self._args.rms_norm_eps)
        return g.finish(self._runtime.executor, out=out)

    def _build_last(self, g: GraphBuilder, x: Array) -> LayerGraph:
        hidden = g.input("x", b.HiddenBuf, x.shape)
        eps = self._args.rms_norm_eps
        return self._head(g, g.norm("model.norm", hidden, b.FinalNormBuf, eps))

    def _build_logits(self, g: GraphBuilder, x: Array) -> LayerGraph:
        return self._head(g, g.input("x", b.FinalNormBuf, x.shape))

    def _head(self, g: GraphBuilder, normed: BufId[b.FinalNormBuf]) -> LayerGraph:
        name = "model.embed_tokens" if is_tied(self._args) else "lm_head"
        out = g.matvec(name, normed, b.LogitsBuf, label="logits")
        return g.finish(self._runtime.executor, out=out)
