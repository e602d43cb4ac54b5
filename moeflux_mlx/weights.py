"""What Ops see of a model's weights: arrays and the way they are quantised."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np


@dataclass(frozen=True)
class Quantization:
    """How a matrix is stored: ``bits`` per value in groups of ``group_size``.

    ``mode`` is one of MLX's quantisation modes (``affine``, ``mxfp4``, ...).
    """

    bits: int
    group_size: int
    mode: str = "affine"


@dataclass(frozen=True)
class Records:
    """One tensor of every slot: row ``slot`` of ``array``, from element ``base`` on.

    ``array`` is ``[n_slots, row]`` of the tensor's type and lies end to end, so kernels
    take it as it is.
    """

    array: mx.array
    base: int


@dataclass(frozen=True)
class Weight:
    """One matrix ``[..., O, I]`` in MLX (or NumPy) arrays; dense without quantization.

    Quantised, ``w`` is uint32 ``[..., O, I * bits / 32]`` with ``scales`` (and, for
    affine, ``biases``) ``[..., O, I / group_size]``. A leading axis, if there is one,
    counts experts or slots; where they do not lie end to end, ``in_pool`` says how
    the parts lie in their records. ``bias`` ``[..., O]`` and ``global_scale`` ``[...]``
    are for mlx-lm's modules: no Op has either.
    """

    w: Any
    scales: Any = None
    biases: Any = None
    quantization: Quantization | None = None
    in_pool: tuple[Records | None, ...] | None = None
    bias: Any = None
    global_scale: Any = None

    @property
    def strided(self) -> bool:
        """Tell whether slots do not lie end to end."""
        return self.in_pool is not None

    @functools.cached_property
    def records(self) -> tuple[Records | None, ...]:
        """``w``, ``scales`` and ``biases`` of all slots for kernels, never copied."""
        if self.in_pool is not None:
            return self.in_pool
        parts = (self.w, self.scales, self.biases)
        return tuple(
            None if x is None else Records(x.reshape(x.shape[0], -1), 0) for x in parts
        )

    @functools.cached_property
    def on_host(self) -> Weight:
        """The same memory as NumPy arrays; bfloat16 as its bits in uint16."""
        if isinstance(self.w, np.ndarray):
            return self
        w, scales, biases = map(_host_view, (self.w, self.scales, self.biases))
        return Weight(w, scales, biases, self.quantization)

    @functools.cached_property
    def on_device(self) -> Weight:
        """The same values as MLX arrays: copies where they are NumPy's."""
        if isinstance(self.w, mx.array):
            return self
        w, scales, biases = map(_device_copy, (self.w, self.scales, self.biases))
        return Weight(w, scales, biases, self.quantization)

    def __getitem__(self, index: int | slice | None) -> Weight:
        """Return one expert's matrix, or with None a stack of one, without a copy.

        A slice of the first axis is for NumPy arrays only.
        """
        parts = (self.w, self.scales, self.biases)
        w, scales, biases = (None if x is None else _pick(x, index) for x in parts)
        return Weight(w, scales, biases, self.quantization)


class ExpertWeights:
    """The projections of the experts at hand, leading axis ``n_slots``.

    ``by_name`` has them under the names of mlx-lm's modules.
    """

    def __init__(self, gate: Weight, up: Weight, down: Weight):
        self.by_name = {"gate_proj": gate, "up_proj": up, "down_proj": down}

    @classmethod
    def named(cls, projections: Mapping[str, Weight]) -> ExpertWeights:
        """Put together what may be other projections than gate, up and down."""
        weights = cls.__new__(cls)
        weights.by_name = dict(projections)
        return weights

    @property
    def gate(self) -> Weight:
        """What the activation is applied to."""
        return self.by_name["gate_proj"]

    @property
    def up(self) -> Weight:
        """What is multiplied by the activation."""
        return self.by_name["up_proj"]

    @property
    def down(self) -> Weight:
        """What leads back to the model's width."""
        return self.by_name["down_proj"]

    @functools.cached_property
    def on_host(self) -> ExpertWeights:
        """The same slots as NumPy views."""
        return ExpertWeights(self.gate.on_host, self.up.on_host, self.down.on_host)


def _pick(x: Any, index: Any) -> Any:
    """Index the first axis; MLX copies for ``x[index]`` but not for a slice of one."""
    if index is None or isinstance(x, np.ndarray):
        return x[index]
    return x[index : index + 1].squeeze(0)


def _host_view(x: mx.array | None) -> Any:
    if x is None:
        return None
    return np.asarray(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x)


def _device_copy(x: np.ndarray | None) -> mx.array | None:
    if x is None:
        return None
    return mx.array(x).view(mx.bfloat16) if x.dtype == np.uint16 else mx.array(x)


def has_values(*arrays: mx.array) -> bool:
    """Evaluate ``arrays`` if they can be: ``mx.compile`` and others trace without."""
    try:
        mx.eval(arrays)
    except ValueError:
        return False
    return True


class ExpertSource(Protocol):
    """One MoE layer's experts, wherever they are: MoE Ops read them through this.

    Slots handed out stay as they are until the arrays given to ``guard`` have been
    evaluated, so a lazy graph never reads an overwritten slot.
    """

    @property
    def weights(self) -> ExpertWeights:
        """All slots of the layer's pool as arrays with a leading slot axis."""

    @property
    def settled(self) -> ExpertSource | None:
        """These experts, if none is ever read again and each is its own slot.

        It counts nothing: who keeps it tells ``asked`` how many experts a run used.
        """

    def assumed(self, slots: mx.array | None) -> ExpertSource:
        """Return these experts for a trace: nothing read, nothing counted.

        Args:
            slots: uint32 ``[n_layers, n_experts]``: where to look up those that are
                not ``settled``, by the layers of their streamer.
        """

    def asked(self, n: int) -> None:
        """Hear that a run asked for ``n`` experts without calling ``slots``."""

    def ask(self, indices: mx.array) -> None:
        """Begin to read what ``slots`` or ``parts`` will be called for next.

        Args:
            indices: ``[1, K]`` expert ids of one token.
        """

    def slots(self, indices: mx.array) -> mx.array:
        """Map expert ids to slots that hold them, reading what is missing.

        Args:
            indices: ``[N, K]`` int32 or uint32 expert ids of one step whose distinct
                experts fit into the pool together (``N = 1`` always does).

        Returns:
            ``[N, K]`` uint32 slots.
        """

    def batches(self, indices: mx.array) -> Iterator[tuple[slice, mx.array]]:
        """Yield which rows of ``indices``, in order, and the slots of their experts.

        The caller builds whatever reads them and passes it to ``guard`` before it asks
        for the next: each batch's experts fit into the pool together.

        Args:
            indices: ``[N, K]`` expert ids.
        """

    def parts(self, indices: mx.array) -> Iterator[tuple[list[int], list[int]]]:
        """Yield columns of ``indices`` and the slots of their experts, as they come.

        While the caller computes with those in memory the others are being read.

        Args:
            indices: ``[1, K]`` expert ids of one token.
        """

    def waves(self, experts: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
        """Yield ``(expert, slot)`` lists that together visit each expert once.

        The caller builds whatever reads a wave's slots and passes it to ``guard``
        before it asks for the next wave.
        """

    def guard(self, *outputs: mx.array) -> None:
        """Evaluate ``outputs`` before any slot handed out so far is overwritten."""
