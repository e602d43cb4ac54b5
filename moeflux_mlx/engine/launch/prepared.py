"""Launches, and the checks of a launch before it runs."""

from __future__ import annotations

import functools
import math
import operator
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from ...device import MAX_BUFFERS, MAX_THREADGROUP_BYTES, MAX_THREADS_PER_GROUP
from ...errors import KernelError
from ..metal import Input, Instance, Library, MetalKernel, Scalar, library
from ..metal.instance import Value
from ..metal.signature import DTYPES

Size3 = tuple[int, int, int]
FLOATS = (mx.float32, mx.float16, mx.bfloat16)
# Types that a launch may name itself for an input.
NAMED = (*FLOATS, mx.uint8)


@dataclass(frozen=True)
class Launch:
    """One kernel launch, completely decided.

    ``inputs`` holds an array, or a Python number for a scalar, for every input of the
    signature. None stands for an absent input ``x``, whose template parameter ``HAS_X``
    is false: nothing is bound for it. ``outputs`` holds the shape of every output.
    ``template`` holds the values of ``int`` and ``bool`` template parameters, ``types``
    the type parameters that no input determines, or that are bytes. ``grid`` counts
    threads and is a multiple of ``threadgroup``: CUDA would add missing threads.
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

    ``inputs`` are those to bind, in the order of ``instance.inputs``. ``numbers`` holds
    those of them that were given as Python numbers.
    """

    instance: Instance
    inputs: list[mx.array]
    grid: Size3
    threadgroup: Size3
    output_shapes: list[tuple[int, ...]]
    output_dtypes: list[mx.Dtype]
    numbers: Mapping[str, int | float]

    @property
    def kernel(self) -> MetalKernel:
        """The kernel's signature."""
        return self.instance.kernel

    @property
    def options(self) -> dict[str, Any]:
        """The options of MLX's kernel call besides inputs."""
        return {
            "grid": self.grid,
            "threadgroup": self.threadgroup,
            "output_shapes": self.output_shapes,
            "output_dtypes": self.output_dtypes,
        }


# Names of the scalars that are compiled in, by kernel.
FIXED: dict[str, frozenset[str]] = {}
_NONE: frozenset[str] = frozenset()
# Stands for any varying number; it is no number itself.
_VARIES = type
# The type and shape of an array; else the class and, if it is compiled in, the value.
Form = tuple[mx.Dtype, tuple[int, ...]] | tuple[type, Any]


def prepare(launch: Launch) -> Prepared:
    """Check a launch and put it into the signature's order.

    Launches that differ only in varying numbers and in values of arrays share one full
    check: every layer of a prompt runs the same kernels, and a check takes the host
    longer than a launch.

    Raises:
        KernelError: names, types, shapes or limits contradict the signature; names
            kernel and parameter.
    """
    given = launch.inputs
    fixed = FIXED.get(launch.kernel, _NONE)
    form = (
        library(),
        launch.kernel,
        launch.grid,
        launch.threadgroup,
        tuple(launch.template.items()),
        tuple(launch.types.items()),
        tuple(launch.outputs.items()),
        tuple(given),
        # Written without function calls: most of a launch's time on the host is here.
        tuple(
            [
                (value.dtype, value.shape)
                if isinstance(value, mx.array)
                else (type(value), value if name in fixed else _VARIES)
                for name, value in given.items()
            ]
        ),
    )
    try:
        checked = _checked(*form)
    except TypeError:
        # An unhashable value is invalid: the checks raise the error that says why.
        checked = _checked.__wrapped__(*form)
    inputs: list[mx.array] = []
    numbers: dict[str, int | float] = {}
    for name, dtype in checked.bound:
        value = given[name]
        if dtype is None:
            inputs.append(value)
        elif isinstance(value, mx.array):
            inputs.append(value.reshape(()))
        else:
            numbers[name] = value
            inputs.append(_scalar(checked.instance.kernel, name, value, dtype))
    return Prepared(
        checked.instance,
        inputs,
        launch.grid,
        launch.threadgroup,
        checked.output_shapes,
        checked.output_dtypes,
        numbers,
    )


@dataclass(frozen=True)
class Checked:
    """The part of a ``Prepared`` that all launches of one form share."""

    instance: Instance
    # The names of bound inputs, with the types of scalars.
    bound: list[tuple[str, mx.Dtype | None]]
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
    inputs: tuple[str, ...],
    input_forms: tuple[Form, ...],
) -> Checked:
    """Check all of a launch except varying numbers."""
    kernel = kernels[name]
    numbers, shapes = dict(template), dict(outputs)
    forms = dict(zip(inputs, input_forms, strict=True))
    _same_names(kernel, "inputs", forms, [p.name for p in kernel.inputs])
    _same_names(kernel, "outputs", shapes, [p.name for p in kernel.outputs])
    _same_names(kernel, "template", numbers, list(kernel.values))
    known = dict(types)
    for key, dtype in types:
        of_input = any(p.type == key for p in kernel.inputs)
        _check_type(kernel, key, dtype, NAMED if of_input else FLOATS)
    for p in kernel.inputs:
        _check_input(kernel, p, forms[p.name], numbers, known)
    _check_template(kernel, numbers, known)
    _check_limits(kernel, grid, threadgroup, numbers, known)
    values = _compiled_in(kernel, forms, numbers, known)
    instance = _instance(kernels, name, tuple(values.items()))
    return Checked(
        instance,
        [
            (p.name, DTYPES[p.type] if isinstance(p, Scalar) else None)
            for p in instance.inputs
        ],
        [_shape(kernel, p.name, shapes[p.name]) for p in kernel.outputs],
        [_dtype(p.type, known) for p in kernel.outputs],
    )


def _compiled_in(
    kernel: MetalKernel,
    forms: Mapping[str, Form],
    numbers: Mapping[str, int],
    types: Mapping[str, mx.Dtype],
) -> dict[str, Value]:
    """Return the values of the template, of fixed scalars and of absent inputs."""
    values: dict[str, Value] = {}
    for t in kernel.template:
        make = bool if t.kind == "bool" else int
        values[t.name] = types[t.name] if t.name in types else make(numbers[t.name])
    for p in kernel.inputs:
        kind, value = forms[p.name]
        if isinstance(p, Input):
            if kind is type(None):
                values[p.name] = None
        elif not isinstance(kind, mx.Dtype) and value is not _VARIES:
            values[p.name] = _fitting(kernel, p.name, value, DTYPES[p.type])
    return values


@functools.cache
def _instance(
    kernels: Library, name: str, values: tuple[tuple[str, Value], ...]
) -> Instance:
    """Return the one instance of a kernel with these values; models need few."""
    return Instance(kernels[name], dict(values))


def _same_names(
    kernel: MetalKernel, what: str, given: Mapping[str, Any], wanted: list[str]
) -> None:
    if set(given) != set(wanted):
        _fail(kernel, what, sorted(wanted), sorted(given))


def _check_input(
    kernel: MetalKernel,
    parameter: Input | Scalar,
    form: Form,
    template: Mapping[str, int],
    types: dict[str, mx.Dtype],
) -> None:
    """Check an input by its form; record the type that it gives a type parameter."""
    name, has = parameter.name, f"HAS_{parameter.name.upper()}"
    dtype, shape = form
    if isinstance(parameter, Input) and not template.get(has, True):
        if dtype is not type(None):
            _fail(kernel, name, f"None, {has} being false", dtype)
        return
    if not isinstance(dtype, mx.Dtype):
        if not isinstance(parameter, Scalar):
            _fail(kernel, name, "an mx.array", dtype.__name__)
        return
    if isinstance(parameter, Scalar):
        wanted = DTYPES[parameter.type]
        if dtype != wanted or math.prod(shape) != 1:
            _fail(kernel, name, f"one {wanted} value", f"{dtype} {shape}")
        return
    if not shape or 0 in shape:
        _fail(kernel, name, "an array with elements", f"shape {shape}")
    if parameter.type in kernel.type_parameters:
        if parameter.type not in types:
            _check_type(kernel, name, dtype, FLOATS)
        wanted = types.setdefault(parameter.type, dtype)
    else:
        wanted = DTYPES[parameter.type]
    if dtype != wanted:
        _fail(kernel, name, wanted, dtype)


def _scalar(kernel: MetalKernel, name: str, value: Any, dtype: mx.Dtype) -> mx.array:
    try:
        return _number(value, dtype)
    except (TypeError, ValueError):
        # An unhashable value is no number: the check raises the error that says why.
        return mx.array(_fitting(kernel, name, value, dtype), dtype)


@functools.lru_cache(maxsize=4096, typed=True)
def _number(value: Any, dtype: mx.Dtype) -> mx.array:
    """Return a number as a zero-dimensional array.

    Raises:
        ValueError: it does not fit the type; says which number was expected.
    """
    array = mx.array(_fit(value, dtype), dtype)
    mx.eval(array)
    return array


def _fitting(kernel: MetalKernel, name: str, value: Any, dtype: mx.Dtype) -> Any:
    """Return a number as Python's; raise KernelError if it does not fit a type."""
    try:
        return _fit(value, dtype)
    except ValueError as error:
        _fail(kernel, name, error, value)


def _fit(value: Any, dtype: mx.Dtype) -> int | float:
    if mx.issubdtype(dtype, mx.floating):
        if not isinstance(value, int | float | np.number):
            raise ValueError("a number")
        return float(value)
    try:
        value = operator.index(value)
    except TypeError:
        raise ValueError("a whole number") from None
    signed = not mx.issubdtype(dtype, mx.unsignedinteger)
    low = -(1 << 8 * dtype.size - 1) if signed else 0
    if not low <= value < low + (1 << 8 * dtype.size):
        raise ValueError(f"a number that fits {dtype}")
    return value


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


def _check_type(
    kernel: MetalKernel, name: str, dtype: mx.Dtype, known: tuple[mx.Dtype, ...]
) -> None:
    if dtype not in known:
        _fail(kernel, name, " or ".join(map(str, known)), dtype)


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
