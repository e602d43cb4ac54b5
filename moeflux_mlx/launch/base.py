"""What a launch is, how a kernel is registered, and what is checked before one.

A kernel's ``.metal`` signature says names, order and types. Here stands the rest: for
given arrays the shapes, template numbers, grid and outputs (a ``Launch``), the
reference in plain MLX operations, and the samples that tests and the doctor run.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import operator
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from ..device import (
    MAX_BUFFERS,
    MAX_THREADGROUP_BYTES,
    MAX_THREADS_PER_GROUP,
)
from ..errors import KernelError
from ..metal import Input, Library, MetalKernel, Scalar, library
from ..metal.signature import DTYPES

Size3 = tuple[int, int, int]
FLOATS = (mx.float32, mx.float16, mx.bfloat16)
# Relative root-mean-square error allowed against the reference, by activation type.
TOLERANCE: Mapping[mx.Dtype, float] = {
    mx.float32: 1e-5,
    mx.float16: 1e-3,
    mx.bfloat16: 6e-3,
}


@dataclass(frozen=True)
class Launch:
    """One kernel launch, ready to run: nothing about it is left to decide.

    ``inputs`` holds an array, or a Python number for a scalar, for every input of the
    signature; ``outputs`` the shape of every output; ``template`` the values of the
    ``int`` and ``bool`` template parameters; ``types`` those type parameters that no
    input has. ``grid`` counts threads, not threadgroups, of
    which it is a whole number: CUDA would add the missing threads.
    """

    kernel: str
    inputs: Mapping[str, Any]
    outputs: Mapping[str, tuple[int, ...]]
    grid: Size3
    threadgroup: Size3
    template: Mapping[str, int] = field(default_factory=dict)
    types: Mapping[str, mx.Dtype] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """A launch checked against its signature, as MLX's kernel call takes it.

    ``numbers`` holds those of the inputs that were given as Python numbers.
    """

    kernel: MetalKernel
    inputs: list[mx.array]
    template: list[tuple[str, Any]]
    grid: Size3
    threadgroup: Size3
    output_shapes: list[tuple[int, ...]]
    output_dtypes: list[mx.Dtype]
    numbers: Mapping[str, int | float]


def prepare(launch: Launch) -> Prepared:
    """Check a launch and put it into the signature's order.

    Of launches alike but for numbers and the values in arrays only the first is looked
    at whole: prompts run every kernel once a layer, and checking takes the host longer
    than launching.

    Raises:
        KernelError: names, types, shapes or limits are not the signature's; the message
            names kernel and parameter.
    """
    given = launch.inputs
    form = (
        library(),
        launch.kernel,
        launch.grid,
        launch.threadgroup,
        tuple(launch.template.items()),
        tuple(launch.types.items()),
        tuple(launch.outputs.items()),
        tuple([(name, *_form(value)) for name, value in given.items()]),
    )
    try:
        checked = _checked(*form)
    except TypeError:
        # What cannot be hashed is no launch either: let the checks say why.
        checked = _checked.__wrapped__(*form)
    kernel = checked.kernel
    inputs: list[mx.array] = []
    numbers: dict[str, int | float] = {}
    for parameter in kernel.inputs:
        name = parameter.name
        value = given[name]
        if not isinstance(value, mx.array):
            numbers[name] = value
            value = _scalar(kernel, name, value, DTYPES[parameter.type])
        elif isinstance(parameter, Scalar):
            value = value.reshape(())
        inputs.append(value)
    return Prepared(
        kernel,
        inputs,
        checked.template,
        launch.grid,
        launch.threadgroup,
        checked.output_shapes,
        checked.output_dtypes,
        numbers,
    )


# Type and shape of an array; for anything else the name of its type.
Form = tuple[mx.Dtype, tuple[int, ...]] | tuple[str]


def _form(value: Any) -> Form:
    if isinstance(value, mx.array):
        return value.dtype, value.shape
    return (type(value).__name__,)


@dataclass(frozen=True)
class Checked:
    """What all launches of one form share, as MLX's kernel call takes it."""

    kernel: MetalKernel
    template: list[tuple[str, Any]]
    output_shapes: list[tuple[int, ...]]
    output_dtypes: list[mx.Dtype]


@functools.lru_cache(maxsize=4096)
def _checked(
    kernels: Library,
    name: str,
    grid: Size3,
    threadgroup: Size3,
    template: tuple[tuple[str, int], ...],
    types: tuple[tuple[str, mx.Dtype], ...],
    outputs: tuple[tuple[str, tuple[int, ...]], ...],
    inputs: tuple[tuple[Any, ...], ...],
) -> Checked:
    """Check all of a launch but its numbers."""
    kernel = kernels[name]
    numbers, shapes = dict(template), dict(outputs)
    forms = {key: form for key, *form in inputs}
    _same_names(kernel, "inputs", forms, [p.name for p in kernel.inputs])
    _same_names(kernel, "outputs", shapes, [p.name for p in kernel.outputs])
    _same_names(kernel, "template", numbers, list(kernel.values))
    known = dict(types)
    for key, dtype in types:
        _check_float(kernel, key, dtype)
    for p in kernel.inputs:
        _check_input(kernel, p, forms[p.name], known)
    _check_template(kernel, numbers, known)
    _check_limits(kernel, grid, threadgroup, numbers, known)
    return Checked(
        kernel,
        [
            (p.name, known[p.name])
            if p.kind == "typename"
            else (p.name, (bool if p.kind == "bool" else int)(numbers[p.name]))
            for p in kernel.template
        ],
        [_shape(kernel, p.name, shapes[p.name]) for p in kernel.outputs],
        [_dtype(p.type, known) for p in kernel.outputs],
    )


def _same_names(
    kernel: MetalKernel, what: str, given: Mapping[str, Any], wanted: list[str]
) -> None:
    if set(given) != set(wanted):
        _fail(kernel, what, sorted(wanted), sorted(given))


def _check_input(
    kernel: MetalKernel,
    parameter: Input | Scalar,
    form: Sequence[Any],
    types: dict[str, mx.Dtype],
) -> None:
    """Check an input by its form, and note the type that it gives a type parameter."""
    name = parameter.name
    if len(form) == 1:
        if not isinstance(parameter, Scalar):
            _fail(kernel, name, "an mx.array", form[0])
        return
    dtype, shape = form
    if isinstance(parameter, Scalar):
        wanted = DTYPES[parameter.type]
        if dtype != wanted or math.prod(shape) != 1:
            _fail(kernel, name, f"one {wanted} value", f"{dtype} {shape}")
        return
    if not shape or 0 in shape:
        _fail(kernel, name, "an array with elements", f"shape {shape}")
    if parameter.type in kernel.type_parameters:
        wanted = types.setdefault(parameter.type, dtype)
        _check_float(kernel, name, wanted)
    else:
        wanted = DTYPES[parameter.type]
    if dtype != wanted:
        _fail(kernel, name, wanted, dtype)


def _scalar(kernel: MetalKernel, name: str, value: Any, dtype: mx.Dtype) -> mx.array:
    try:
        found = _number(value, dtype)
    except TypeError:
        found = "a number"
    if isinstance(found, str):
        _fail(kernel, name, found, value)
    return found


@functools.lru_cache(maxsize=4096, typed=True)
def _number(value: Any, dtype: mx.Dtype) -> mx.array | str:
    """Return a number as an array without dimensions, or what was expected instead."""
    if mx.issubdtype(dtype, mx.floating):
        if not isinstance(value, int | float | np.number):
            return "a number"
        value = float(value)
    else:
        try:
            value = operator.index(value)
        except TypeError:
            return "a whole number"
        signed = not mx.issubdtype(dtype, mx.unsignedinteger)
        low = -(1 << 8 * dtype.size - 1) if signed else 0
        if not low <= value < low + (1 << 8 * dtype.size):
            return f"a number that fits {dtype}"
    array = mx.array(value, dtype)
    mx.eval(array)
    return array


def _whole(kernel: MetalKernel, name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        _fail(kernel, name, "a whole number", value)


def _shape(kernel: MetalKernel, name: str, shape: Any) -> tuple[int, ...]:
    sizes = shape if isinstance(shape, tuple) else (0,)
    if not all(isinstance(n, int) and n > 0 for n in sizes):
        _fail(kernel, name, "a shape of positive sizes", shape)
    return sizes


def _check_float(kernel: MetalKernel, name: str, dtype: mx.Dtype) -> None:
    if dtype not in FLOATS:
        _fail(kernel, name, " or ".join(map(str, FLOATS)), dtype)


def _dtype(name: str, types: Mapping[str, mx.Dtype]) -> mx.Dtype:
    return types[name] if name in types else DTYPES[name]


def _check_template(
    kernel: MetalKernel, values: Mapping[str, int], types: Mapping[str, mx.Dtype]
) -> None:
    for name in kernel.type_parameters:
        if name not in types:
            _fail(kernel, name, "a type given by an input or by the launch", "none")
    unknown = set(types) - set(kernel.type_parameters)
    if unknown:
        _fail(kernel, "types", list(kernel.type_parameters), sorted(unknown))
    for name, value in values.items():
        whole = _whole(kernel, name, value)
        if kernel.values[name] == "bool" and whole not in (0, 1):
            _fail(kernel, name, "0 or 1", value)
        if not -(1 << 31) <= whole < 1 << 31:
            _fail(kernel, name, "a number that fits int", value)


def _check_limits(
    kernel: MetalKernel,
    grid: Size3,
    threadgroup: Size3,
    template: Mapping[str, int],
    types: Mapping[str, mx.Dtype],
) -> None:
    for name, size in (("grid", grid), ("threadgroup", threadgroup)):
        if len(size) != 3 or not all(isinstance(n, int) and n > 0 for n in size):
            _fail(kernel, name, "three positive numbers of threads", size)
        if any(n >= 1 << 31 for n in size):
            _fail(kernel, name, "numbers below 2^31", size)
    if any(n % m for n, m in zip(grid, threadgroup, strict=True)):
        _fail(kernel, "grid", f"whole threadgroups of {threadgroup}", grid)
    n_threads = math.prod(threadgroup)
    if n_threads > MAX_THREADS_PER_GROUP:
        limit = f"at most {MAX_THREADS_PER_GROUP} threads"
        _fail(kernel, "threadgroup", limit, n_threads)
    n_buffers = len(kernel.inputs) + len(kernel.outputs)
    if n_buffers > MAX_BUFFERS:
        _fail(kernel, "parameters", f"at most {MAX_BUFFERS} buffers", n_buffers)
    n_bytes = kernel.threadgroup_bytes(template, types)
    if n_bytes > MAX_THREADGROUP_BYTES:
        limit = f"at most {MAX_THREADGROUP_BYTES} bytes"
        _fail(kernel, "threadgroup memory", limit, n_bytes)


def _fail(kernel: MetalKernel, part: str, wanted: Any, got: Any) -> typing.NoReturn:
    raise KernelError(f"[{kernel.name}] {part}: expected {wanted} but got {got}")


class ShapeError(KernelError):
    """A kernel's argument has a shape or value it cannot have."""


def dims(name: str, array: mx.array, rank: int) -> tuple[int, ...]:
    """Return the shape of an array that must have ``rank`` dimensions, none empty."""
    if not isinstance(array, mx.array):
        raise ShapeError(f"{name}: expected an mx.array but got {type(array).__name__}")
    if array.ndim != rank or array.size == 0:
        shape = tuple(array.shape)
        raise ShapeError(
            f"{name}: expected {rank} non-empty dimensions but got {shape}"
        )
    return tuple(array.shape)


def one_row(name: str, array: mx.array, width: int | None = None) -> int:
    """Return the width of ``[n]`` or ``[1, n]``: neither form needs a reshape."""
    rank = 2 if isinstance(array, mx.array) and array.ndim == 2 else 1
    *rows, n = dims(name, array, rank)
    require(name, rows in ([], [1]), "one row", tuple(array.shape))
    require(name, width in (None, n), f"{width} values", n)
    return n


def expect(name: str, array: mx.array, shape: Sequence[int]) -> None:
    """Check that an array has exactly this shape."""
    if not isinstance(array, mx.array):
        raise ShapeError(f"{name}: expected an mx.array but got {type(array).__name__}")
    if tuple(array.shape) != tuple(shape):
        got = tuple(array.shape)
        raise ShapeError(f"{name}: expected shape {tuple(shape)} but got {got}")


def require(name: str, condition: bool, wanted: str, got: Any) -> None:
    """Check a number or a relation between sizes."""
    if not condition:
        raise ShapeError(f"{name}: expected {wanted} but got {got}")


def require_part(name: str, at: Any, size: int, width: int) -> None:
    """Refuse a part of ``size`` values that does not lie within a row."""
    inside = isinstance(at, int) and 0 <= at <= width - size
    require(name, inside, f"{size} values of a row of {width}", at)


def _misfit(build: Callable[..., Launch], args: Any, options: Any) -> str:
    """Say which argument is not of the type that the launch function asks for."""
    try:
        given = inspect.signature(build).bind(*args, **options).arguments
    except TypeError as error:
        return str(error)
    hints = typing.get_type_hints(build)
    for name, value in given.items():
        wanted = hints[name]
        fits = {int: numbers.Integral, float: numbers.Real}.get(wanted, wanted)
        if isinstance(fits, type) and not isinstance(value, fits):
            got = type(value).__name__
            return f"{name}: expected {wanted.__name__} but got {got}"
    return ""


Sample = Callable[..., tuple[Any, ...]]


@dataclass(frozen=True)
class Kernel:
    """A registered kernel: how to launch it, its reference, and how to try it.

    ``build`` maps arguments to a ``Launch``; ``reference`` takes the same arguments and
    returns what the outputs should be; ``sample(rng, dtype, **sizes)`` makes arguments.
    """

    name: str
    family: str
    build: Callable[..., Launch]
    reference: Callable[..., Any]
    sample: Sample
    sizes: tuple[Mapping[str, Any], ...]
    large: Mapping[str, Any]
    dtypes: tuple[mx.Dtype, ...] = FLOATS
    tolerance: Mapping[mx.Dtype, float] = field(default_factory=lambda: TOLERANCE)

    def __call__(self, *args: Any, **options: Any) -> Launch:
        """Return the launch for these arguments.

        Raises:
            KernelError: an argument the kernel cannot take; names both.
        """
        try:
            return self.build(*args, **options)
        except ShapeError as error:
            raise KernelError(f"[{self.name}] {error}") from None
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            misfit = _misfit(self.build, args, options) or str(error)
            raise KernelError(f"[{self.name}] {misfit}") from error

    @property
    def metal(self) -> MetalKernel:
        """The parsed ``.metal`` function."""
        return library()[self.name]

    @property
    def source(self) -> str:
        """The Python text of the launch."""
        return inspect.getsource(self.build)

    def arguments(self, dtype: mx.Dtype, seed: int = 0, **sizes: Any) -> tuple:
        """Make seeded arguments of one size."""
        return self.sample(np.random.default_rng(seed), dtype, **sizes)

    def expected(self, *args: Any) -> tuple[mx.array, ...]:
        """Return the reference's outputs for the same arguments.

        Computed on the CPU: GPUs multiply float32 with fewer bits than it has.
        """
        with mx.stream(mx.cpu):
            out = self.reference(*args)
        return out if isinstance(out, tuple) else (out,)


KERNELS: dict[str, Kernel] = {}


def kernel(
    *,
    reference: Callable[..., Any],
    sample: Sample,
    sizes: Sequence[Mapping[str, Any]],
    large: Mapping[str, Any],
    dtypes: tuple[mx.Dtype, ...] = FLOATS,
    tolerance: Mapping[mx.Dtype, float] = TOLERANCE,
) -> Callable[[Callable[..., Launch]], Kernel]:
    """Register the decorated function, named as the kernel, as its launch.

    Args:
        reference: the same mathematics in plain MLX operations, same arguments.
        sample: ``sample(rng, dtype, **sizes)`` returns arguments.
        sizes: odd and ragged sizes for tests, small ones first.
        large: a size worth timing.
        dtypes: activation types to try.
        tolerance: relative RMS error allowed for each; integers must be equal.
    """

    def register(build: Callable[..., Launch]) -> Kernel:
        name = build.__name__
        if name in KERNELS:
            raise TypeError(f"[{name}] there is a kernel of that name already")
        if not build.__doc__:
            raise TypeError(f"[{name}] kernel lacks a docstring")
        taken = list(inspect.signature(build).parameters)
        if list(inspect.signature(reference).parameters) != taken:
            raise TypeError(f"[{name}] reference expected parameters {taken}")
        if not sizes:
            raise TypeError(f"[{name}] kernel lacks sizes to test")
        family = build.__module__.rsplit(".", 1)[-1]
        made = Kernel(
            name,
            family,
            build,
            reference,
            sample,
            tuple(sizes),
            large,
            dtypes,
            tolerance,
        )
        KERNELS[name] = made
        return made

    return register


def groups(n: int, per_group: int) -> int:
    """Return how many groups of ``per_group`` cover ``n``."""
    return -(-n // per_group)


def normal(
    rng: np.random.Generator, dtype: mx.Dtype, *shape: int, scale: float = 1.0
) -> mx.array:
    """Return seeded normal noise, for samples."""
    return mx.array(scale * rng.standard_normal(shape, np.float32)).astype(dtype)


def other_dtype(dtype: mx.Dtype, s: int) -> mx.Dtype:
    """Return a sample's second type: the activations', or, if ``s``, bfloat16."""
    return mx.bfloat16 if s else dtype
