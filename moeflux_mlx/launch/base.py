"""What a launch is, how a kernel is registered, and what is checked before one.

A kernel's ``.metal`` signature says names, order and types. Here stands the rest: for
given arrays the shapes, template numbers, grid and outputs (a ``Launch``), the
reference in plain MLX operations, and the samples that tests and the doctor run.
"""

from __future__ import annotations

import functools
import inspect
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
from ..metal import Input, MetalKernel, Scalar, library
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

    Raises:
        KernelError: names, types, shapes or limits are not the signature's; the message
            names kernel and parameter.
    """
    kernel = library()[launch.kernel]
    _same_names(kernel, "inputs", launch.inputs, [p.name for p in kernel.inputs])
    _same_names(kernel, "outputs", launch.outputs, [p.name for p in kernel.outputs])
    _same_names(kernel, "template", launch.template, list(kernel.values))
    types = dict(launch.types)
    for name, dtype in types.items():
        _check_float(kernel, name, dtype)
    inputs = [_input(kernel, p, launch.inputs[p.name], types) for p in kernel.inputs]
    _check_template(kernel, launch.template, types)
    _check_limits(kernel, launch, types)
    template: list[tuple[str, Any]] = [
        (p.name, types[p.name])
        if p.kind == "typename"
        else (p.name, (bool if p.kind == "bool" else int)(launch.template[p.name]))
        for p in kernel.template
    ]
    shapes = [_shape(kernel, p.name, launch.outputs[p.name]) for p in kernel.outputs]
    dtypes = [_dtype(p.type, types) for p in kernel.outputs]
    numbers = {
        name: x for name, x in launch.inputs.items() if not isinstance(x, mx.array)
    }
    return Prepared(
        kernel,
        inputs,
        template,
        launch.grid,
        launch.threadgroup,
        shapes,
        dtypes,
        numbers,
    )


def _same_names(
    kernel: MetalKernel, what: str, given: Mapping[str, Any], wanted: list[str]
) -> None:
    if set(given) != set(wanted):
        _fail(kernel, what, sorted(wanted), sorted(given))


def _input(
    kernel: MetalKernel, parameter: Input | Scalar, value: Any, types: dict
) -> mx.array:
    name = parameter.name
    if isinstance(parameter, Scalar):
        dtype = DTYPES[parameter.type]
        if isinstance(value, mx.array):
            if value.dtype != dtype or value.size != 1:
                got = f"{value.dtype} {value.shape}"
                _fail(kernel, name, f"one {dtype} value", got)
            return value.reshape(())
        return _scalar(kernel, name, value, dtype)
    if not isinstance(value, mx.array):
        _fail(kernel, name, "an mx.array", type(value).__name__)
    if value.size == 0 or value.ndim == 0:
        _fail(kernel, name, "an array with elements", f"shape {value.shape}")
    if parameter.type in kernel.type_parameters:
        wanted = types.setdefault(parameter.type, value.dtype)
        _check_float(kernel, name, wanted)
    else:
        wanted = DTYPES[parameter.type]
    if value.dtype != wanted:
        _fail(kernel, name, wanted, value.dtype)
    return value


def _scalar(kernel: MetalKernel, name: str, value: Any, dtype: mx.Dtype) -> mx.array:
    if mx.issubdtype(dtype, mx.floating):
        if not isinstance(value, int | float | np.number):
            _fail(kernel, name, "a number", value)
        return constant(float(value), dtype)
    value = _whole(kernel, name, value)
    low = 0 if mx.issubdtype(dtype, mx.unsignedinteger) else -(1 << 8 * dtype.size - 1)
    high = low + (1 << 8 * dtype.size)
    if not low <= value < high:
        _fail(kernel, name, f"a number that fits {dtype}", value)
    return constant(value, dtype)


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


@functools.lru_cache(maxsize=4096)
def constant(value: float, dtype: mx.Dtype) -> mx.array:
    """Return a number as an array without dimensions, made once."""
    array = mx.array(value, dtype)
    mx.eval(array)
    return array


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
    kernel: MetalKernel, launch: Launch, types: Mapping[str, mx.Dtype]
) -> None:
    for name, size in (("grid", launch.grid), ("threadgroup", launch.threadgroup)):
        if len(size) != 3 or not all(isinstance(n, int) and n > 0 for n in size):
            _fail(kernel, name, "three positive numbers of threads", size)
        if any(n >= 1 << 31 for n in size):
            _fail(kernel, name, "numbers below 2^31", size)
    if any(n % m for n, m in zip(launch.grid, launch.threadgroup, strict=True)):
        _fail(
            kernel, "grid", f"whole threadgroups of {launch.threadgroup}", launch.grid
        )
    x, y, z = launch.threadgroup
    if x * y * z > MAX_THREADS_PER_GROUP:
        _fail(
            kernel, "threadgroup", f"at most {MAX_THREADS_PER_GROUP} threads", x * y * z
        )
    n_buffers = len(kernel.inputs) + len(kernel.outputs)
    if n_buffers > MAX_BUFFERS:
        _fail(kernel, "parameters", f"at most {MAX_BUFFERS} buffers", n_buffers)
    n_bytes = kernel.threadgroup_bytes(launch.template, types)
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
