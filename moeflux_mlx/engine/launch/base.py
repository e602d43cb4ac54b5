"""The registration of kernels.

A kernel's ``.metal`` signature says names, order and types. A registration adds the
rest: the shapes, template numbers, grid and outputs for given arrays (a ``Launch``),
the reference in plain MLX operations, and the samples that tests and the doctor run.
The launch function's signature is the only list of its arguments: the reference gets
them by name (``Given``), and the sample returns them in that order.
"""

from __future__ import annotations

import inspect
import numbers
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np

from ...errors import KernelError
from ..metal import MetalKernel, Scalar, library
from .prepared import FIXED, FLOATS, Launch

# Relative root-mean-square error allowed against the reference, by activation type.
TOLERANCE: Mapping[mx.Dtype, float] = {
    mx.float32: 1e-5,
    mx.float16: 1e-3,
    mx.bfloat16: 6e-3,
}


class ShapeError(KernelError):
    """An argument of a kernel has an invalid shape or value."""


def dims(name: str, array: mx.array, rank: int) -> tuple[int, ...]:
    """Return the shape of an array; require ``rank`` dimensions and no empty one."""
    if not isinstance(array, mx.array):
        raise ShapeError(f"{name}: expected an mx.array but got {type(array).__name__}")
    if array.ndim != rank or array.size == 0:
        shape = tuple(array.shape)
        raise ShapeError(
            f"{name}: expected {rank} non-empty dimensions but got {shape}"
        )
    return tuple(array.shape)


def one_row(name: str, array: mx.array, width: int | None = None) -> int:
    """Return the width of ``[n]`` or ``[1, n]``; kernels take both as they are."""
    rank = 2 if isinstance(array, mx.array) and array.ndim == 2 else 1
    *rows, n = dims(name, array, rank)
    require(name, rows in ([], [1]), "one row", tuple(array.shape))
    require(name, width in (None, n), f"{width} values", n)
    return n


def expect(name: str, array: mx.array, shape: Sequence[int]) -> None:
    """Raise ShapeError unless an array has exactly this shape."""
    if not isinstance(array, mx.array):
        raise ShapeError(f"{name}: expected an mx.array but got {type(array).__name__}")
    if tuple(array.shape) != tuple(shape):
        got = tuple(array.shape)
        raise ShapeError(f"{name}: expected shape {tuple(shape)} but got {got}")


def require(name: str, condition: bool, wanted: str, got: Any) -> None:
    """Raise ShapeError unless a condition on an argument holds."""
    if not condition:
        raise ShapeError(f"{name}: expected {wanted} but got {got}")


def require_part(name: str, at: Any, size: int, width: int) -> None:
    """Raise ShapeError unless ``size`` values from ``at`` on lie within a row."""
    inside = isinstance(at, int) and 0 <= at <= width - size
    require(name, inside, f"{size} values of a row of {width}", at)


def _misfit(build: Callable[..., Launch], args: Any, options: Any) -> str:
    """Return a message about the argument of the wrong type; "" if all types fit."""
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


class Given(SimpleNamespace):
    """The arguments of a launch, by the names in its signature."""

    @property
    def wide(self) -> Given:
        """The same arguments with floating arrays in float32."""
        wide = {name: _in_float32(value) for name, value in vars(self).items()}
        return Given(**wide)


def _in_float32(value: Any) -> Any:
    is_float = isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating)
    return value.astype(mx.float32) if is_float else value


class Case:
    """One case for a kernel's sample: a type, sizes, and a random generator.

    ``case.t`` is the size ``t``; ``case.get`` reads optional sizes.
    """

    def __init__(
        self, rng: np.random.Generator, dtype: mx.Dtype, sizes: Mapping[str, Any]
    ):
        self.rng, self.dtype, self.sizes = rng, dtype, sizes
        self.read: set[str] = set()

    def __getattr__(self, letter: str) -> Any:
        if letter not in self.sizes:
            raise AttributeError(f"expected a size {letter!r} but got {self.sizes}")
        return self.get(letter)

    def get(self, letter: str, default: Any = 0) -> Any:
        """Return a size, or the default if it is not given."""
        self.read.add(letter)
        return self.sizes.get(letter, default)

    def but(self, **sizes: Any) -> Case:
        """Return this case with some sizes changed, on the same generator."""
        self.read |= set(sizes)
        changed = Case(self.rng, self.dtype, {**self.sizes, **sizes})
        # Samples use other samples, so sizes that the changed case reads count here.
        changed.read = self.read
        return changed

    def normal(self, *shape: int, scale: float = 1.0) -> mx.array:
        """Return normal noise in the activations' type."""
        return normal(self.rng, self.dtype, *shape, scale=scale)

    @property
    def other(self) -> mx.Dtype:
        """The weights' type: that of activations, or bfloat16 if size ``s`` is set."""
        return mx.bfloat16 if self.s else self.dtype


Reference = Callable[[Given], Any]
Sample = Callable[[Case], tuple[Any, ...]]


def in_float32(mathematics: Callable[..., Any]) -> Reference:
    """Return a reference that calls an Op's function with the launch's arguments.

    It computes in float32 and returns results in the type of the first argument.
    """

    def reference(given: Given) -> Any:
        out = mathematics(**vars(given.wide))
        dtype = next(iter(vars(given).values())).dtype
        outs = tuple(
            x.astype(dtype) for x in (out if isinstance(out, tuple) else [out])
        )
        return outs if isinstance(out, tuple) else outs[0]

    return reference


@dataclass(frozen=True)
class Kernel:
    """A registered kernel: its launch function, its reference and its samples.

    ``build`` maps arguments to a ``Launch``. ``reference`` takes them by name and
    returns the right outputs. ``sample`` makes the arguments of a case. ``fixed`` names
    the scalars that are compiled in.
    """

    name: str
    family: str
    build: Callable[..., Launch]
    reference: Reference
    sample: Sample
    sizes: tuple[Mapping[str, Any], ...]
    large: Mapping[str, Any]
    fixed: frozenset[str]
    dtypes: tuple[mx.Dtype, ...] = FLOATS
    tolerance: Mapping[mx.Dtype, float] = field(default_factory=lambda: TOLERANCE)

    def __call__(self, *args: Any, **options: Any) -> Launch:
        """Return the launch for these arguments.

        Raises:
            KernelError: the kernel cannot take an argument; names both.
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

    def arguments(self, dtype: mx.Dtype, seed: int = 0, **sizes: Any) -> tuple:
        """Make seeded arguments of one size.

        Raises:
            TypeError: the sample never reads a size, which would change nothing.
        """
        case = Case(np.random.default_rng(seed), dtype, sizes)
        arguments = self.sample(case)
        if unknown := set(sizes) - case.read:
            raise TypeError(f"[{self.name}] sample knows no sizes {sorted(unknown)}")
        return arguments

    def expected(self, *args: Any, **options: Any) -> tuple[mx.array, ...]:
        """Return the reference's outputs for the same arguments.

        It runs on the CPU: GPUs multiply float32 with reduced precision.
        """
        bound = inspect.signature(self.build).bind(*args, **options)
        bound.apply_defaults()
        # Damaged arguments may give infinities; the caller judges them.
        with mx.stream(mx.cpu), np.errstate(all="ignore"):
            out = self.reference(Given(**bound.arguments))
        return out if isinstance(out, tuple) else (out,)


KERNELS: dict[str, Kernel] = {}


def kernel(
    *,
    reference: Reference,
    sample: Sample,
    sizes: Sequence[Mapping[str, Any]],
    large: Mapping[str, Any],
    varying: tuple[str, ...],
    dtypes: tuple[mx.Dtype, ...] = FLOATS,
    tolerance: Mapping[mx.Dtype, float] = TOLERANCE,
) -> Callable[[Callable[..., Launch]], Kernel]:
    """Register the decorated function as the launch of the kernel of its name.

    Args:
        reference: the same mathematics in plain MLX operations, by its Op's function if
            there is one.
        sample: returns the arguments of a case, in the launch's order.
        sizes: odd and ragged sizes for tests, small ones first.
        large: a size worth timing.
        varying: scalars that stay data, such as numbers of tokens; () if there are
            none. All others follow from a model's geometry and are compiled in. It has
            no default: a forgotten number of tokens would be compiled anew at every
            length.
        dtypes: activation types to try.
        tolerance: relative RMS error allowed for each; integers must be equal.
    """

    def register(build: Callable[..., Launch]) -> Kernel:
        name = build.__name__
        if name in KERNELS:
            raise TypeError(f"[{name}] there is a kernel of that name already")
        if not build.__doc__:
            raise TypeError(f"[{name}] kernel lacks a docstring")
        for role, function in (("reference", reference), ("sample", sample)):
            if len(inspect.signature(function).parameters) != 1:
                raise TypeError(f"[{name}] {role} expected one parameter")
        if not sizes:
            raise TypeError(f"[{name}] kernel lacks sizes to test")
        family = build.__module__.rsplit(".", 1)[-1]
        fixed = FIXED[name] = _fixed(name, varying)
        made = Kernel(
            name,
            family,
            build,
            reference,
            sample,
            tuple(sizes),
            large,
            fixed,
            dtypes,
            tolerance,
        )
        KERNELS[name] = made
        return made

    return register


def _fixed(name: str, varying: tuple[str, ...]) -> frozenset[str]:
    """Return the scalars of a signature that do not vary."""
    scalars = {p.name: p.type for p in library()[name].inputs if isinstance(p, Scalar)}
    if not set(varying) <= set(scalars) or len(set(varying)) < len(varying):
        raise TypeError(
            f"[{name}] varying expected some of {[*scalars]} but got {varying}"
        )
    fixed = frozenset(scalars) - frozenset(varying)
    for scalar in fixed:
        # Only float32 bits and integers can be written as literals.
        if scalars[scalar] in ("half", "bfloat"):
            raise TypeError(f"[{name}] {scalar} expected float, or to be varying")
    return fixed


def ceil_div(n: int, size: int) -> int:
    """Return how many parts of ``size`` cover ``n``: the quotient, rounded up."""
    return -(-n // size)


def normal(
    rng: np.random.Generator, dtype: mx.Dtype, *shape: int, scale: float = 1.0
) -> mx.array:
    """Return seeded normal noise, for samples."""
    return mx.array(scale * rng.standard_normal(shape, np.float32)).astype(dtype)
