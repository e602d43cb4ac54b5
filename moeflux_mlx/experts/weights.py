"""Weights: the arrays of a matrix and its quantisation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from .records import Copier
from .records import Records as Records

# MLX's default bits and group size for each mode.
OWN_FORM = {"affine": (4, 64), "mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}


MLX_DTYPES = {
    "U8": mx.uint8,
    "I8": mx.int8,
    "F8_E4M3": mx.uint8,
    "F8_E8M0": mx.uint8,
    "U16": mx.uint16,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "I32": mx.int32,
    "F32": mx.float32,
}
# MLX itself writes the first of several names, so the reversal lets that one win.
DTYPE_NAMES = {dtype: name for name, dtype in reversed(MLX_DTYPES.items())}
# From this many ids on, matrices are copied once each, whatever the wait for the ids.
READ_BACK_FROM = 64
# The fields of a Weight that are arrays.
ARRAYS = ("w", "scales", "biases", "bias", "global_scale")


@dataclass(frozen=True)
class Quantization:
    """A matrix's quantisation: ``bits`` per value, groups of ``group_size`` values.

    ``mode`` is one of MLX's quantisation modes (``affine``, ``mxfp4``, ...).
    """

    bits: int
    group_size: int
    mode: str = "affine"

    @classmethod
    def of(cls, bits: int | None, group_size: int | None, mode: str) -> Quantization:
        """Return a quantisation; None, as in mixed recipes, means MLX's default."""
        own_bits, own_group_size = OWN_FORM.get(mode, (4, 64))
        return cls(bits or own_bits, group_size or own_group_size, mode)


@dataclass(frozen=True)
class Weight:
    """One matrix ``[..., O, I]`` in MLX (or NumPy) arrays; dense without quantization.

    Quantised, ``w`` is uint32 ``[..., O, I * bits / 32]`` with ``scales`` (and, for
    affine, ``biases``) ``[..., O, I / group_size]``. A leading axis counts experts or
    slots. If these are not contiguous, ``in_pool`` locates each of ``ARRAYS``.
    ``bias`` ``[..., O]`` is added to products. ``global_scale`` ``[...]`` is for
    mlx-lm's modules; no Op takes it.
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
        """Whether the slots are views into records, and not contiguous."""
        return self.in_pool is not None

    @property
    def arrays(self) -> list[mx.array]:
        """The MLX arrays among ``w``, ``scales``, ``biases`` and ``bias``."""
        parts = (self.w, self.scales, self.biases, self.bias)
        return [x for x in parts if isinstance(x, mx.array)]

    @functools.cached_property
    def records(self) -> tuple[Records | None, ...]:
        """``w``, ``scales``, ``biases`` and ``bias`` of all slots, never copied."""
        if self.in_pool is not None:
            return self.in_pool[:4]
        parts = (self.w, self.scales, self.biases, self.bias)
        rows = [None if x is None else x.reshape(x.shape[0], -1) for x in parts]
        has_values(*(x for x in rows if x is not None))
        return tuple(None if x is None else Records(x, 0) for x in rows)

    def located(self) -> dict[str, tuple[Records, mx.array]]:
        """Return the place and the view of each array that is in records, by field."""
        places = self.in_pool or [None] * len(ARRAYS)
        found = zip(ARRAYS, places, strict=True)
        return {f: (r, getattr(self, f)) for f, r in found if r is not None}

    def bias_of(self, slots: mx.array) -> mx.array:
        """Return the biases ``[*slots.shape, O]`` of the matrices in ``slots``."""
        if self.in_pool is None:
            return self.on_device.bias[slots]
        copied = self._bias_copier(slots.flatten())["bias"]
        return mx.unflatten(copied, 0, slots.shape)

    @functools.cached_property
    def _bias_copier(self) -> Copier[str]:
        return Copier({"bias": self.located()["bias"]})

    @property
    def on_host(self) -> Weight:
        """The same memory as NumPy arrays; bfloat16 as its bits in uint16."""
        # Do not cache ``self`` on itself: such a cycle would keep the memory until the
        # garbage collector runs.
        return self if isinstance(self.w, np.ndarray) else self._viewed

    @functools.cached_property
    def _viewed(self) -> Weight:
        return self.mapped(_host_view)

    @property
    def on_device(self) -> Weight:
        """The same values as MLX arrays; NumPy arrays are copied."""
        return self if isinstance(self.w, mx.array) else self._copied

    @functools.cached_property
    def _copied(self) -> Weight:
        copied = self.mapped(_device_copy)
        has_values(*copied.arrays)
        return copied

    def __getitem__(self, index: int | slice | None) -> Weight:
        """Return one expert's matrix, with a slice some, uncopied.

        None gives a stack of one matrix. The result has no ``in_pool``.
        """
        return self.mapped(lambda x: None if x is None else _pick(x, index))

    def mapped(self, change: Callable[[Any], Any]) -> Weight:
        """Return the weight with each of ``ARRAYS`` changed, None included.

        The result has no ``in_pool``.
        """
        parts = {field: change(getattr(self, field)) for field in ARRAYS}
        return Weight(**parts, quantization=self.quantization)


class ExpertWeights:
    """The projections of a layer's experts, with a leading axis ``n_slots``.

    ``by_name`` maps the names of mlx-lm's modules to them.
    """

    def __init__(self, gate: Weight, up: Weight, down: Weight):
        self.by_name = {"gate_proj": gate, "up_proj": up, "down_proj": down}

    @classmethod
    def named(cls, projections: Mapping[str, Weight]) -> ExpertWeights:
        """Return weights of any projections, not only gate, up and down."""
        weights = cls.__new__(cls)
        weights.by_name = dict(projections)
        return weights

    @property
    def gate(self) -> Weight:
        """The projection that the activation is applied to."""
        return self.by_name["gate_proj"]

    @property
    def up(self) -> Weight:
        """The projection that is multiplied by the activation."""
        return self.by_name["up_proj"]

    @property
    def down(self) -> Weight:
        """The projection back to the model's width."""
        return self.by_name["down_proj"]

    def copied(self, slots: mx.array) -> ExpertWeights:
        """Return contiguous copies of the matrices in ``slots`` ``[n]``."""
        copies = self._copier(slots)

        def own(name: str, weight: Weight) -> Weight:
            arrays: dict[str, Any] = {}
            for field in ARRAYS:
                if (x := getattr(weight, field)) is not None:
                    is_view = weight.strided
                    arrays[field] = copies[name, field] if is_view else x[slots]
            return Weight(**arrays, quantization=weight.quantization)

        return self.named({n: own(n, weight) for n, weight in self.by_name.items()})

    def end_to_end(
        self, slots: mx.array, most: int | None = None
    ) -> tuple[ExpertWeights, mx.array]:
        """Return contiguous copies of the matrices in ``slots``, and their indices.

        Many ids are read back, so that each matrix is copied once. Few ids hardly
        repeat, and the host may not know them yet.

        Args:
            most: number of distinct slots that there can be; there are no more copies.
        """
        if slots.size < READ_BACK_FROM or not has_values(slots):
            if most is not None and slots.size > most:
                take, found = _distinct(slots, most)
                return self.copied(take), found
            found = mx.arange(slots.size, dtype=mx.uint32).reshape(slots.shape)
            return self.copied(slots.flatten()), found
        chosen, places = np.unique(np.array(slots), return_inverse=True)
        found = mx.array(places.reshape(slots.shape).astype(np.uint32))
        return self.copied(mx.array(chosen)), found

    @functools.cached_property
    def _copier(self) -> Copier[tuple[str, str]]:
        return Copier(
            {
                (name, field): tensor
                for name, weight in self.by_name.items()
                for field, tensor in weight.located().items()
            }
        )

    @functools.cached_property
    def on_host(self) -> ExpertWeights:
        """The same slots as NumPy views."""
        return ExpertWeights(self.gate.on_host, self.up.on_host, self.down.on_host)


def _distinct(slots: mx.array, n: int) -> tuple[mx.array, mx.array]:
    """Return ``n`` slots, among them all in ``slots``, and the place of each there.

    Nothing is read back.
    """
    flat = slots.flatten()
    order = mx.argsort(flat)
    rising = flat[order]
    is_other = mx.concatenate([mx.array([False]), rising[1:] != rising[:-1]])
    places = mx.cumsum(is_other.astype(mx.uint32))
    take, found = mx.zeros(n, mx.uint32), mx.zeros(slots.size, mx.uint32)
    take[places], found[order] = rising, places
    return take, found.reshape(slots.shape)


def _pick(x: Any, index: Any) -> Any:
    """Index the first axis; MLX copies for ``x[index]`` but not for a slice."""
    if index is None or isinstance(index, slice) or isinstance(x, np.ndarray):
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
    """Evaluate ``arrays``; return False inside ``mx.compile`` and other transforms."""
    try:
        mx.eval(arrays)
    except ValueError:
        return False
    return True


def leaves(tree: Any) -> list[mx.array]:
    """Return the distinct MLX arrays in nested lists, tuples and dicts."""
    flat = dict(tree_flatten(tree)).values()
    return [*{id(x): x for x in flat if isinstance(x, mx.array)}.values()]


def kept_arrays(model: nn.Module) -> list[mx.array]:
    """Return the modules' arrays that are not parameters, such as RoPE frequencies."""
    return [
        value
        for module in model.modules()
        for name, value in module.items()
        if name.startswith("_") and isinstance(value, mx.array)
    ]
