"""A routed block with streamed experts: mlx-lm's own block, run on slots.

mlx-lm's block indexes its matrices with expert ids. Here its matrices are the slots,
and it indexes them with slot numbers. The rest of the block is unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ... import device
from ...errors import ModelError
from ...system.commands import is_to_be_saved
from ...system.uncopied import Uncopied
from ..files.layout import GLOBAL_SCALE
from ..files.modules import RoutedBlock
from ..weights import ExpertWeights, Quantization, has_values
from .blank import BlankSource
from .exchange import Exchange, OtherChoiceError
from .resident import ResidentExperts
from .slot_block import SORTED_FROM, SlotBlock
from .source import ExpertSource, filled, in_portions

PLAIN_FIRST = (
    "load a plain checkpoint without a bound on memory, which 'moeflux unpack PACK "
    "DIR' makes of a pack, and go on with that"
)


class RoutedWeightsError(ModelError, AttributeError):
    """Code reads the weights of a streamed block, which has none of its own."""


class Token(Protocol):
    """A call of the model that decides how its blocks get their experts."""

    def block(
        self,
        source: Any,
        indices: mx.array,
        build: Callable[[ExpertSource], mx.array],
    ) -> mx.array:
        """Return a block's output: a known one, or a new one from ``build``."""


class StreamedProjection(nn.Module):
    """The placeholder of a streamed matrix, which takes no adapter.

    ``form`` is the quantisation with which to save the matrix; None: dense.
    """

    def __init__(self, form: Quantization | None):
        super().__init__()
        self.__dict__["form"] = form
        # MLX skips empty modules, so put something in.
        self["is_streamed"] = True


class DenseProjection(StreamedProjection):
    """The placeholder of a dense streamed matrix, which ``nn.quantize`` can find."""

    def __init__(self, path: str, shape: tuple[int, ...]):
        super().__init__(None)
        self.__dict__.update(path=path, shape=shape)

    @property
    def weight(self) -> mx.array:
        """Zeros of the matrices' shape, for callers that need only the shape."""
        shape: tuple[int, ...] = self.__dict__["shape"]
        return mx.zeros(shape)

    def to_quantized(
        self,
        group_size: int = 64,
        bits: int = 4,
        mode: str = "affine",
        global_scale: bool = False,
    ) -> StreamedProjection:
        """Return the placeholder of matrices to be saved quantised.

        Raises:
            ModelError: the model is not only to be saved. Calls would still use the
                matrices in the files.
        """
        if global_scale or not is_to_be_saved():
            raise ModelError(
                f"[quantize] {self.__dict__['path']}: expected experts in memory but "
                f"they are streamed from files: {PLAIN_FIRST}"
            )
        return StreamedProjection(Quantization(bits, group_size, mode))


class StreamedSwitch(Uncopied, nn.Module):
    """The replacement of a routed block, without the experts' parameters.

    Args:
        source: returns the block's current source of experts.
        alone: calls a function while no other thread requests slots, then begins its
            lazy results, so that any thread can wait for them.
        token: returns the model's current call if it needs values only (no gradient or
            compilation); else None.
        exchange: exchanges rows with other ranks, if each has a share of the experts.
    """

    def __init__(
        self,
        block: RoutedBlock,
        source: Callable[[], ExpertSource],
        alone: Callable[..., mx.array],
        token: Callable[[], Token | None] = lambda: None,
        exchange: Exchange | None = None,
    ):
        super().__init__()
        forms, parts = block.quantization, block.parts
        self.path, self.slot_block = block.path, SlotBlock(block)
        # The type in which to save floating-point parameters; None: their own.
        self.saved_dtype: mx.Dtype | None = None
        self._source, self._alone, self._token = source, alone, token
        self._exchange = exchange
        # A projection that MLX multiplies on GPUs only. A list would be among the
        # module's parameters, where each call would search for it.
        scaled = (name for name, part in parts if part == GLOBAL_SCALE)
        self._for_gpus: str | None = next(scaled, None)
        # An output row's length and type, by the type of the block's input.
        self._rows_like: dict[mx.Dtype, tuple[int, mx.Dtype]] = {}
        # Keep the activation and every other child of mlx-lm's block.
        for name, child in block.module.items():
            if name not in block.projections:
                self[name] = child
            elif forms[name] is None:
                shape = tuple(parts[name, "weight"].shape)
                self[name] = DenseProjection(f"{block.path}.{name}", shape)
            else:
                self[name] = StreamedProjection(forms[name])

    @property
    def saved_forms(self) -> dict[str, Quantization | None]:
        """The quantisation with which to save each projection; None: dense."""
        return {name: self[name].form for name in self.slot_block.projections}

    def show_matrices(self, shown: bool) -> None:
        """Show or hide this block's matrices from a walk over the model's modules."""
        for name in self.slot_block.projections:
            if shown:
                self[name]["is_streamed"] = True
            else:
                del self[name]["is_streamed"]

    def dequantize(self) -> None:
        """Save all matrices dense."""
        for name in self.slot_block.projections:
            self[name] = StreamedProjection(None)

    def __getattr__(self, name: str) -> Any:
        if (block := self.__dict__.get("slot_block")) and name in block.projections:
            raise RoutedWeightsError(
                f"[stream] {self.path}.{name}: expected weights in memory but they are "
                "streamed: load the model without a bound on memory to train, change "
                "or save them"
            )
        return super().__getattr__(name)

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """Run rows ``[..., D]`` through experts ``[..., K]`` to ``[..., K, D]``."""
        return self._alone(self._called, x, indices)

    def _called(self, x: mx.array, indices: mx.array) -> mx.array:
        if self._for_gpus is not None and device.on_cpu():
            raise ModelError(
                f"[stream] {self.path}.{self._for_gpus}: expected a GPU for a "
                "global_scale but got a CPU: use a release of the model with "
                "experts in another quantisation"
            )
        source = self._source()
        if self._exchange is not None and not isinstance(source, BlankSource):
            return self._exchanged(self._exchange, source, x, indices)
        if isinstance(source, ResidentExperts):
            source.count(indices.size)
            return self.slot_block(source.weights, x, indices, resident=True)
        if source.resident is not None:
            return self._run(source, x, indices)
        if (token := self._token()) is not None:
            build = partial(self._run, x=x, indices=indices)
            return token.block(source, indices, build)
        return self._streamed(source, x, indices)

    def _streamed(
        self, source: ExpertSource, x: mx.array, indices: mx.array
    ) -> mx.array:
        """Do as ``_run``, with a gradient that requests the experts again."""
        self._check_values(x, indices)

        @mx.custom_function  # type: ignore[untyped-decorator]
        def run(x: mx.array, indices: mx.array) -> mx.array:
            return self._run(source, x, indices)

        @run.vjp
        def gradient(primals, cotangent, _):  # type: ignore[no-untyped-def]
            x, indices = primals
            return first(x, indices, cotangent), mx.zeros_like(indices)

        @mx.custom_function  # type: ignore[untyped-decorator]
        def first(x: mx.array, indices: mx.array, cotangent: mx.array) -> mx.array:
            return self._alone(self._gradient, source, x, indices, cotangent)

        @first.vjp
        def second(*_):  # type: ignore[no-untyped-def]
            # Other experts are in the slots by then.
            raise ModelError(
                f"[stream] {self.path}: expected a first derivative but got one of a "
                f"derivative, through experts that are read from files: {PLAIN_FIRST}"
            )

        return cast(mx.array, run(x, indices))

    def _check_values(self, x: mx.array, indices: mx.array) -> None:
        if not has_values(x, indices):
            raise ModelError(
                f"[stream] {self.path}: expected rows with values but got none: "
                "call a model with streamed experts outside mx.compile and mx.vmap, "
                "or call model.train() before training"
            )

    def _exchanged(
        self, exchange: Exchange, source: ExpertSource, x: mx.array, indices: mx.array
    ) -> mx.array:
        """Do as ``_run`` with the experts of all ranks; there is no gradient."""
        few = indices.size < SORTED_FROM
        if exchange.defers and few and isinstance(source, ResidentExperts):
            return self._masked(exchange, source, x, indices)
        self._check_values(x, indices)

        @mx.custom_function  # type: ignore[untyped-decorator]
        def run(x: mx.array, indices: mx.array) -> mx.array:
            return self._run_own(exchange, source, x, indices)

        @run.vjp
        def gradient(*_):  # type: ignore[no-untyped-def]
            raise ModelError(
                f"[group] {self.path}: expected no gradient but one is needed: "
                "train in one process, without group="
            )

        return cast(mx.array, run(x, indices))

    def _masked(
        self,
        exchange: Exchange,
        experts: ResidentExperts,
        x: mx.array,
        indices: mx.array,
    ) -> mx.array:
        """Run all rows here, then take the rows of other ranks' experts from them.

        A row of another rank's expert runs through any own expert and is discarded.
        The device does more work, but the host reads nothing back.
        """
        own = exchange.own(self.slot_block.n_experts)
        ids = indices.flatten().astype(mx.int32)
        slots = mx.clip(indices.astype(mx.int32) - own.start, 0, len(own) - 1)
        out = self.slot_block(experts.weights, x, slots.astype(mx.uint32))
        rows = out.reshape(ids.size, -1)
        given = exchange.masked(self.path, ids, own, rows, experts.count)
        return given.reshape(out.shape)

    def _run_own(
        self, exchange: Exchange, source: ExpertSource, x: mx.array, indices: mx.array
    ) -> mx.array:
        """Run this rank's experts, and take the other rows from the other ranks."""
        try:
            return self._run_chosen(exchange, source, x, indices)
        except OtherChoiceError:
            if exchange.defers:
                raise
            return self._run_chosen(exchange, source, *exchange.follow(x, indices))

    def _run_chosen(
        self, exchange: Exchange, source: ExpertSource, x: mx.array, indices: mx.array
    ) -> mx.array:
        own = exchange.own(self.slot_block.n_experts)
        ids = np.array(indices).ravel()

        def make(places: np.ndarray) -> mx.array:
            rows, found = _rows_of(x, indices, places), []
            for where, slots in source.portions(mx.array(ids[places] - own.start)):
                chosen = rows if where is None else rows[mx.array(where)]
                out = self._portion(source.weights, chosen, slots, indices)
                source.guard(out)
                found.append((np.arange(len(places)) if where is None else where, out))
            order = np.argsort(np.concatenate([where for where, _ in found]))
            return mx.concatenate([out for _, out in found])[mx.array(order)]

        if x.dtype not in self._rows_like:
            # Only its shape and type are used, so it is never computed.
            row = _rows_of(x, indices, np.zeros(1, int))
            out = self._portion(source.weights, row, mx.zeros(1, mx.uint32), indices)
            self._rows_like[x.dtype] = out.shape[-1], out.dtype
        like = self._rows_like[x.dtype]
        rows = exchange.rows(self.path, ids, own, like, make)
        return rows.reshape(*indices.shape, -1)

    def _run(self, source: ExpertSource, x: mx.array, indices: mx.array) -> mx.array:
        def part(where: np.ndarray, slots: mx.array) -> mx.array:
            rows = _rows_of(x, indices, where)
            return self._portion(source.weights, rows, slots, indices)

        whole = partial(self.slot_block, source.weights, x)
        return in_portions(source, indices, whole, part)

    def _portion(
        self, weights: ExpertWeights, rows: mx.array, slots: mx.array, indices: mx.array
    ) -> mx.array:
        """Run rows ``[P, D]``, one slot each: a portion of ``indices``."""
        n, n_ids = len(rows), indices.size
        # Repeat rows until MLX chooses the kernel of the whole call: see ``SlotBlock``.
        least = self.slot_block.least_rows(slots, n_ids)
        if n < least:
            every = filled(n, least)
            rows, slots = rows[every], slots[every]
        return self.slot_block(weights, rows, slots[:, None], n_ids)[:n, 0]

    def _gradient(
        self, source: ExpertSource, x: mx.array, indices: mx.array, out: mx.array
    ) -> mx.array:
        """Return the gradient of ``x`` from the gradient ``out`` of the outputs."""
        weights = source.weights
        total = mx.zeros((x.size // x.shape[-1], x.shape[-1]), x.dtype)
        for where, slots in source.portions(indices):
            if where is None:
                whole = partial(self.slot_block, weights, slots=slots)
                gradient = mx.vjp(whole, [x], [out])[1][0]
                source.guard(gradient)
                return gradient
            portion = partial(self._portion, weights, slots=slots, indices=indices)
            rows = _rows_of(x, indices, where)
            wanted = out.reshape(-1, out.shape[-1])[mx.array(where)]
            gradient = mx.vjp(portion, [rows], [wanted])[1][0]
            total = total.at[mx.array(where // indices.shape[-1])].add(gradient)
            source.guard(total)
        return total.reshape(x.shape)


def _rows_of(x: mx.array, indices: mx.array, where: np.ndarray) -> mx.array:
    """Return the row ``[D]`` of each place's token."""
    if x.shape[:-1] != indices.shape[:-1]:
        raise ModelError(
            f"[stream] expected a row for each of {list(indices.shape[:-1])} tokens "
            f"but got {list(x.shape[:-1])}: give the experts more memory"
        )
    rows = x.reshape(-1, x.shape[-1])
    return rows[mx.array(where // indices.shape[-1])]
