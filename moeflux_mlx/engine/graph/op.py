"""The base of every Op: typed fields, access, shapes, cost and reference.

``Op.__init_subclass__`` makes each subclass a frozen dataclass, derives from its
annotations which buffers it reads and writes, and raises TypeError if a part is
missing. So an incomplete Op fails at import.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Flag, auto
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import mlx.core as mx

if sys.version_info >= (3, 11):
    from typing import dataclass_transform
else:
    from typing_extensions import dataclass_transform

from ...experts.weights import Quantization, Weight
from .buffers import B_co, BufId, Shape
from .roles import Buf


class Access(Flag):
    """Whether an Op reads a buffer, writes it, or both."""

    READ = auto()
    WRITE = auto()


In = Annotated[BufId[B_co], Access.READ]
Out = Annotated[BufId[B_co], Access.WRITE]
InOut = Annotated[BufId[B_co], Access.READ | Access.WRITE]


@dataclass(frozen=True)
class JointRows:
    """A matrix's place in a joint matrix: its rows from ``first`` on, of ``n_rows``.

    A joint matrix holds several that multiply the same row. ``name`` is its name among
    the layer's weights. Joint biases are laid out likewise.
    """

    name: str
    first: int
    n_rows: int


@dataclass(frozen=True)
class WeightRef:
    """A matrix or vector of the model, named by its path below the layer.

    ``shape`` is the unpacked one, ``[O, I]``. ``quantization`` is None for a dense one.
    ``joint`` says which rows of a joint matrix it occupies, if any.
    """

    name: str
    shape: tuple[int, ...]
    quantization: Quantization | None = None
    dtype: mx.Dtype = mx.bfloat16
    joint: JointRows | None = None

    @classmethod
    def of(cls, name: str, weight: Weight, joint: JointRows | None = None) -> WeightRef:
        """Return the reference of a weight."""
        q = weight.quantization
        if q is None or weight.scales is None:
            return cls(name, tuple(weight.w.shape), None, weight.w.dtype, joint)
        shape = (*weight.w.shape[:-1], weight.w.shape[-1] * 32 // q.bits)
        return cls(name, shape, q, weight.scales.dtype, joint)

    @property
    def n_bytes(self) -> int:
        """Stored bytes, with scales and biases."""
        n_values = 1
        for d in self.shape:
            n_values *= d
        q = self.quantization
        if q is None:
            return n_values * self.dtype.size
        # An affine group has a scale and a bias; a float mode has one byte of scale.
        per_group = 2 * self.dtype.size if q.mode == "affine" else 1
        return n_values * q.bits // 8 + n_values // q.group_size * per_group


@dataclass(frozen=True)
class Cost:
    """Work of an Op: floating-point operations, bytes moved, bytes read from SSD."""

    flops: int = 0
    bytes: int = 0
    ssd_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.ssd_bytes + other.ssd_bytes,
        )


@dataclass(frozen=True)
class BufferField:
    """A buffer field of an Op class: the roles it accepts, and its access."""

    name: str
    role: type[Buf]
    access: Access
    optional: bool


REGISTRY: dict[str, type[Op]] = {}


@dataclass_transform(kw_only_default=True, frozen_default=True, eq_default=False)
class OpFields:
    """Makes each subclass a frozen dataclass: an Op, or fields that Ops share."""

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, kw_only=True, eq=False)(cls)


class Op(OpFields):
    """One dispatch: the buffers, weights and scalar dimensions of one kernel call.

    Subclasses annotate buffers with ``In``, ``Out`` or ``InOut`` and weights with
    ``WeightRef``, and define:

    - ``shapes()``: field name → shape of every buffer and weight;
    - ``cost()``: a ``Cost``;
    - ``reference(reads..., weights...)``: the Op in plain MLX operations. It takes the
      values of the fields read, then those of the weights. It returns the value, or
      the tuple of values, of the fields written. All are in field order.
    """

    label: str

    # Whether it reads values on the host, which a function being compiled lacks.
    reads_back: ClassVar[bool] = False
    buffer_fields: ClassVar[tuple[BufferField, ...]] = ()
    weight_fields: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.buffer_fields, cls.weight_fields = _typed_fields(cls)
        _check_complete(cls)
        REGISTRY[cls.__name__] = cls

    @property
    def variant_name(self) -> str:
        """The Op's name as printed by ``Graph.dump``."""
        return type(self).__name__

    @property
    def n_experts_used(self) -> int:
        """Number of experts that one run requests from its ``GraphExperts``."""
        return 0

    @property
    def reads(self) -> tuple[BufId[Any], ...]:
        """Buffers read, in field order, without absent optional ones."""
        return self._buffers(Access.READ)

    @property
    def writes(self) -> tuple[BufId[Any], ...]:
        """Buffers written, in field order."""
        return self._buffers(Access.WRITE)

    @property
    def weight_refs(self) -> tuple[WeightRef, ...]:
        """Weights used, in field order."""
        found = (getattr(self, name) for name in self.weight_fields)
        return tuple(ref for ref in found if ref is not None)

    def _buffers(self, access: Access) -> tuple[BufId[Any], ...]:
        found = (getattr(self, f.name) for f in self.buffer_fields if f.access & access)
        return tuple(buf for buf in found if buf is not None)

    def shapes(self) -> Mapping[str, Shape]:
        """Return the shape every buffer and weight field must have."""
        raise NotImplementedError

    def index_ranges(
        self, shapes: Mapping[str, tuple[int, ...]]
    ) -> Mapping[str, range]:
        """Return the valid values of each buffer of indices or positions, by field.

        Kernels do not check indices, so whoever takes them from users must.

        Args:
            shapes: shapes of the arrays read, by field; declared shapes leave lengths
                open.
        """
        return {}

    def cost(self) -> Cost:
        """Return the work of one run."""
        raise NotImplementedError

    def scratch_bytes(self, itemsize: int) -> int:
        """Return the bytes that the reference holds besides its inputs and outputs.

        Args:
            itemsize: bytes of one activation value.
        """
        return 0


def _typed_fields(cls: type[Op]) -> tuple[tuple[BufferField, ...], tuple[str, ...]]:
    hints = get_type_hints(cls, include_extras=True)
    buffers, weights = [], []
    for field in fields(cls):  # type: ignore[arg-type]
        hint = hints[field.name]
        optional = get_origin(hint) in (Union, UnionType) and NoneType in get_args(hint)
        if optional:
            hint = next(a for a in get_args(hint) if a is not NoneType)
        if get_origin(hint) is Annotated:
            buf_type, access = get_args(hint)[:2]
            (role,) = get_args(buf_type)
            buffers.append(BufferField(field.name, role, access, optional))
        elif hint is WeightRef:
            weights.append(field.name)
    return tuple(buffers), tuple(weights)


def _check_complete(cls: type[Op]) -> None:
    if cls.__name__ in REGISTRY:
        raise TypeError(f"[{cls.__name__}] there is an Op of that name already")
    for part in ("shapes", "cost", "reference"):
        if getattr(cls, part, None) is getattr(Op, part, None):
            raise TypeError(f"[{cls.__name__}] Op lacks {part}()")
    if not cls.__doc__ or cls.__doc__.startswith(cls.__name__ + "("):
        raise TypeError(f"[{cls.__name__}] Op lacks a docstring")
    if not any(f.access & Access.WRITE for f in cls.buffer_fields):
        raise TypeError(f"[{cls.__name__}] Op writes no buffer")
    reads = [f.name for f in cls.buffer_fields if f.access & Access.READ]
    expected = ["self", *reads, *cls.weight_fields]
    got = list(inspect.signature(cls.reference).parameters)  # type: ignore[attr-defined]
    if got != expected:
        raise TypeError(
            f"[{cls.__name__}] reference() expected parameters {expected} but got {got}"
        )
