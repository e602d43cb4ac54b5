"""Checks of the arguments of all functions of this package.

A function's annotations give the types of its arguments. Its Op's declarations give the
shapes and types of arrays, and the ranges of indices. MLX itself checks few of these.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, ParamSpec, TypeVar

import mlx.core as mx
import numpy as np

from ..calls.arguments import FLOATS, got, sizes
from ..engine.graph.buffers import fits
from ..engine.graph.experts import GraphExperts
from ..engine.graph.op import Access, BufferField, Op
from ..engine.graph.roles import (
    ConvStateBuf,
    ExpertBaseBuf,
    KvCacheKBuf,
    KvCacheVBuf,
    RouterIdxBuf,
)
from ..errors import GraphError
from ..experts.files.routed import AFFINE_BITS, AFFINE_GROUPS, BYTE_SCALED
from ..experts.weights import ExpertWeights, Quantization, Weight, has_values

P = ParamSpec("P")
R = TypeVar("R")

# The states that an Op updates may have another type than the activations.
STATES = (ConvStateBuf, KvCacheKBuf, KvCacheVBuf)
MAX_WHOLE = (1 << 31) - 1
SOURCE_METHODS = ("guard", "parts", "portions", "slots", "waves")


class Misfit(GraphError):
    """An unusable value of an argument; ``checked`` adds the function's name."""

    def __init__(self, name: str, wanted: Any, got: Any):
        self.name, self.wanted, self.got = name, wanted, got
        super().__init__(f"{name}: expected {wanted} but got {got}")


def checked(**arguments: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Check a function's arguments by their annotations, and name them in errors.

    Args:
        arguments: the argument's name by the Op's field, if the two differ.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature, name = inspect.signature(function), function.__name__
        hints = typing.get_type_hints(function)

        @functools.wraps(function)
        def call(*args: P.args, **options: P.kwargs) -> R:
            try:
                given = signature.bind(*args, **options)
            except TypeError as error:
                raise GraphError(f"[ops.{name}] {error}") from None
            try:
                for key, value in given.arguments.items():
                    given.arguments[key] = _argument(key, hints[key], value)
                return function(*given.args, **given.kwargs)
            except Misfit as misfit:
                field, dot, attribute = misfit.name.partition(".")
                at = arguments.get(field, field) + dot + attribute
                why = f"expected {misfit.wanted} but got {misfit.got}"
                raise GraphError(f"[ops.{name}] {at}: {why}") from None

        return call

    return decorate


def _argument(name: str, kind: Any, value: Any) -> Any:
    """Check a value against its annotation, and return it in that type."""
    kinds = typing.get_args(kind) or (kind,)
    if value is None and type(None) in kinds:
        return None
    if ExpertWeights in kinds:
        return experts(name, value)
    if Weight in kinds:
        return weight(name, Weight(value) if isinstance(value, mx.array) else value)
    if bool in kinds:
        return flag(name, value)
    if int in kinds:
        return whole(name, value)
    if float in kinds:
        return finite(name, value)
    return array(name, value)


def flag(name: str, value: Any) -> bool:
    """Return a bool, or raise Misfit."""
    if not isinstance(value, bool):
        raise Misfit(name, "True or False", got(value))
    return value


def whole(name: str, value: Any) -> int:
    """Return a positive int that fits a kernel's argument, or raise Misfit."""
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_whole or not 1 <= value <= MAX_WHOLE:
        raise Misfit(name, f"a whole number from 1 to {MAX_WHOLE}", got(value))
    return int(value)


def finite(name: str, value: Any) -> float:
    """Return a number in float32's range, or raise; an ``eps`` is at least 0."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    largest = float(np.finfo(np.float32).max)
    low = 0.0 if name == "eps" else -largest
    if not is_number or not low <= value <= largest:
        wanted = "a finite number" + (" of at least 0" if name == "eps" else "")
        raise Misfit(name, wanted, got(value))
    return float(value)


def array(name: str, value: Any) -> mx.array:
    """Return an MLX array that is not empty, or raise Misfit."""
    if not isinstance(value, mx.array):
        raise Misfit(name, "an mx.array", got(value))
    if value.size == 0:
        raise Misfit(name, "a non-empty array", got(value))
    return value


def rows(name: str, x: mx.array, rank: int = 2) -> tuple[int, ...]:
    """Return an array's shape, or raise unless it has ``rank`` dimensions."""
    if x.ndim != rank:
        raise Misfit(name, f"{rank} dimensions", got(x))
    return tuple(x.shape)


def quotient(name: str, total: int, divisor: int) -> int:
    """Return ``total / divisor``, or raise unless it divides ``total``."""
    if total % divisor:
        raise Misfit(name, f"a divisor of {total}", divisor)
    return total // divisor


def at_most(name: str, things: str, value: int, limit: int) -> None:
    """Raise Misfit for a number of ``things`` above its limit."""
    if value > limit:
        raise Misfit(name, f"at most {limit} {things}", value)


def weight(name: str, value: Any, *, with_bias: bool = False) -> Weight:
    """Return a weight, or raise unless its arrays fit together.

    MLX's kernels do not check this, and would ignore arrays that an Op does not take.

    Args:
        with_bias: whether the weight may have a bias of its own.
    """
    if not isinstance(value, Weight):
        raise Misfit(name, "a Weight or an mx.array", got(value))
    array(f"{name}.w" if value.quantization else name, value.w)
    if value.global_scale is not None:
        raise Misfit(f"{name}.global_scale", "None", got(value.global_scale))
    if value.bias is not None:
        if not with_bias:
            wanted = "None, as a matrix has its bias as an argument,"
            raise Misfit(f"{name}.bias", wanted, got(value.bias))
        like(f"{name}.bias", value.bias, value.w.shape[:-1], FLOATS)
    if value.quantization is not None:
        _packed(name, value, quantization(f"{name}.", value.quantization))
        return value
    if value.scales is not None or value.biases is not None:
        raise Misfit(f"{name}.quantization", "a Quantization beside scales", None)
    typed(name, value.w, FLOATS)
    return value


def quantization(prefix: str, q: Any) -> Quantization:
    """Return a quantisation, or raise unless MLX and our host kernels have it."""
    if not isinstance(q, Quantization):
        raise Misfit(f"{prefix}quantization", "a Quantization", got(q))
    modes = ("affine", *BYTE_SCALED)
    if not isinstance(q.mode, str) or q.mode not in modes:
        raise Misfit(f"{prefix}mode", f"one of {', '.join(modes)}", got(q.mode))
    byte_scaled = BYTE_SCALED.get(q.mode, (0, 0))
    for key, own, affine in (
        ("bits", byte_scaled[0], AFFINE_BITS),
        ("group_size", byte_scaled[1], AFFINE_GROUPS),
    ):
        found, known = getattr(q, key), (own,) if own else affine
        if isinstance(found, bool) or not isinstance(found, int) or found not in known:
            wanted = ", ".join(map(str, known))
            raise Misfit(f"{prefix}{key}", f"{wanted} in mode {q.mode}", got(found))
    return q


def packable(name: str, w: mx.array, q: Quantization) -> None:
    """Check that a dense matrix can be quantised."""
    typed(name, w, FLOATS)
    if w.ndim < 2 or w.shape[-1] % q.group_size:
        raise Misfit(name, f"rows in groups of {q.group_size}", got(w))


def _packed(name: str, value: Weight, q: Quantization) -> None:
    """Check the arrays of a quantised matrix against each other."""
    w, affine = value.w, q.mode == "affine"
    typed(f"{name}.w", w, (mx.uint32,))
    n_bits = w.shape[-1] * 32 if w.ndim > 1 else 1
    if n_bits % (q.bits * q.group_size):
        wanted = f"rows in groups of {q.group_size} values of {q.bits} bits"
        raise Misfit(f"{name}.w", wanted, got(w))
    shape = (*w.shape[:-1], n_bits // q.bits // q.group_size)
    like(f"{name}.scales", value.scales, shape, FLOATS if affine else (mx.uint8,))
    if affine:
        like(f"{name}.biases", value.biases, shape, (value.scales.dtype,))
    elif value.biases is not None:
        raise Misfit(f"{name}.biases", f"None in mode {q.mode}", got(value.biases))


def like(
    name: str,
    x: Any,
    shape: Sequence[int | None],
    dtypes: Sequence[mx.Dtype] | None = None,
) -> None:
    """Check an array's shape, and its type if ``dtypes`` are given."""
    if not fits(shape, array(name, x).shape):
        raise Misfit(name, f"shape {sizes(shape)}", sizes(x.shape))
    if dtypes is not None:
        typed(name, x, dtypes)


def typed(name: str, x: mx.array, dtypes: Sequence[mx.Dtype]) -> None:
    """Check an array's type."""
    if x.dtype not in dtypes:
        wanted = " or ".join(_type(dtype) for dtype in dtypes)
        raise Misfit(name, wanted, _type(x.dtype))


def _type(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def experts(name: str, value: Any) -> ExpertWeights | GraphExperts:
    """Return experts, or raise unless gate, up and down fit together."""
    stacks = value if isinstance(value, ExpertWeights) else _stacks(name, value)
    gate, up, down = (
        weight(f"{name}.{stack}", getattr(stacks, stack), with_bias=True)
        for stack in ("gate", "up", "down")
    )
    for stack, found in (("gate", gate), ("up", up), ("down", down)):
        rows(f"{name}.{stack}", found.w, 3)
    n_experts, expert_dim, dim = unpacked(gate)
    wanted = {"up": (n_experts, expert_dim, dim), "down": (n_experts, dim, expert_dim)}
    for stack, found in (("up", up), ("down", down)):
        if unpacked(found) != wanted[stack]:
            shape = f"shape {sizes(wanted[stack])}"
            raise Misfit(f"{name}.{stack}", shape, sizes(unpacked(found)))
    return value  # type: ignore[no-any-return]


def _stacks(name: str, source: Any) -> ExpertWeights:
    """Return the weights of a source of experts."""
    is_source = all(callable(getattr(source, m, None)) for m in SOURCE_METHODS)
    stacks = getattr(source, "weights", None) if is_source else None
    if not isinstance(stacks, ExpertWeights):
        raise Misfit(name, "ExpertWeights or GraphExperts", got(source))
    return stacks


def unpacked(value: Weight) -> tuple[int, ...]:
    """Return the unpacked shape of a checked weight."""
    *outer, columns = value.w.shape
    q = value.quantization
    return (*outer, columns if q is None else columns * 32 // q.bits)


def check(op: Op, given: Mapping[str, Any]) -> None:
    """Check an Op's inputs against its declared shapes and types."""
    shapes = op.shapes()
    plain: list[BufferField] = []
    for field in op.buffer_fields:
        value = given.get(field.name)
        if not field.access & Access.READ or field.role is ExpertBaseBuf:
            continue
        if value is None and field.optional:
            continue
        wanted = field.role.dtype
        like(field.name, value, shapes[field.name], (wanted,) if wanted else FLOATS)
        if wanted is None:
            plain.append(field)
    _check_alike(plain, given)
    for name in op.weight_fields:
        ref = getattr(op, name)
        if ref is not None and not fits(shapes[name], ref.shape):
            raise Misfit(name, f"shape {sizes(shapes[name])}", sizes(ref.shape))


def _check_alike(fields: Sequence[BufferField], given: Mapping[str, Any]) -> None:
    """Check that all activations have one type, and all updated states have one."""
    own = [f for f in fields if f.role in STATES and f.access & Access.WRITE]
    for alike in (own, [f for f in fields if f not in own]):
        for field in alike[1:]:
            typed(field.name, given[field.name], (given[alike[0].name].dtype,))


Bounded = tuple[dict[str, Any], "mx.array | None"]


def bound(op: Op, given: Mapping[str, Any]) -> Bounded:
    """Raise for indices out of range; inside ``mx.compile`` clamp them instead.

    Returns:
        The values to run on. Inside ``mx.compile``, also an array that tells whether
        all indices are in range; else None.

    Raises:
        Misfit: an index is out of range, an expert occurs twice in a row of indices,
            or the Op reads indices back inside ``mx.compile``.
    """
    bounded, inside = dict(given), None
    shapes = {k: tuple(x.shape) for k, x in given.items() if isinstance(x, mx.array)}
    ranges = op.index_ranges(shapes)
    for field in op.buffer_fields:
        x = given.get(field.name)
        if field.name not in ranges or x is None:
            continue
        known, distinct = ranges[field.name], field.role is RouterIdxBuf
        if has_values(x):
            _refuse_outside(field.name, np.array(x), known, distinct)
            continue
        if op.reads_back:
            refuse_compiled(field.name)
        found = _all_inside(x, known, distinct)
        inside = found if inside is None else inside & found
        bounded[field.name] = mx.clip(x, known[0], known[-1])
    return bounded, inside


def refuse_compiled(name: str) -> NoReturn:
    """Raise Misfit for indices that an Op must read back but that have no values."""
    raise Misfit(name, "indices with values", "none: call this outside mx.compile")


def _refuse_outside(
    name: str, indices: np.ndarray, known: range, distinct: bool
) -> None:
    wrong = indices[(indices < known[0]) | (indices > known[-1])]
    if wrong.size:
        raise Misfit(name, f"values from {known[0]} to {known[-1]}", wrong[0])
    if distinct:
        ordered = np.sort(indices, axis=-1)
        twice = ordered[..., 1:][ordered[..., 1:] == ordered[..., :-1]]
        if twice.size:
            raise Misfit(name, "distinct experts in each row", f"{twice[0]} twice")


def _all_inside(x: mx.array, known: range, distinct: bool) -> mx.array:
    inside = ((x >= known[0]) & (x <= known[-1])).all()
    if distinct:
        ordered = mx.sort(x, axis=-1)
        inside = inside & (ordered[..., 1:] != ordered[..., :-1]).all()
    return inside


def nan_unless(inside: mx.array | None, values: Any) -> Any:
    """Return outputs with NaN for all numbers unless ``inside`` is None or true."""
    if inside is None:
        return values
    if isinstance(values, tuple | list):
        return tuple(nan_unless(inside, x) for x in values)
    nan = mx.array(math.nan, values.dtype)
    return mx.where(inside, values, nan) if values.dtype in FLOATS else values
