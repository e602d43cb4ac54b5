"""A kernel with the values compiled into it: one source for MLX.

The values are those of its template, the numbers that a model's geometry fixes, and
which optional inputs are absent. In the source they need no buffer and no reads, and
loops have known ends.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np

from .signature import Input, MetalKernel, Scalar

# None stands for an absent input.
Value = int | float | bool | mx.Dtype | None
Values = Mapping[str, Value]
# MLX's names of types, as it writes them for inputs and outputs.
TYPES = {
    mx.float32: "float",
    mx.float16: "float16_t",
    mx.bfloat16: "bfloat16_t",
    mx.uint8: "uint8_t",
}


@dataclass(frozen=True, eq=False)
class Instance:
    """A kernel and the values compiled into it.

    Compared by identity: ``prepare`` makes one object for the same values.
    """

    kernel: MetalKernel
    values: Values

    @cached_property
    def inputs(self) -> tuple[Input | Scalar, ...]:
        """The inputs that a launch binds, in order."""
        return tuple(p for p in self.kernel.inputs if p.name not in self.values)


def definitions(kernel: MetalKernel, values: Values) -> str:
    """Return a line of Metal for every value of the template and the signature."""
    lines = [
        _template(p.kind, p.name, values[p.name])
        for p in kernel.template
        if p.name in values
    ]
    lines += [_parameter(p, values[p.name]) for p in kernel.inputs if p.name in values]
    return "".join(f"{line}\n" for line in lines)


def literal(value: Value) -> str:
    """Return an integer or a boolean as a literal of Metal and CUDA."""
    assert isinstance(value, int)
    return str(value).lower() if isinstance(value, bool) else str(value)


def float_bits(value: Value) -> str:
    """Return the bits of a float32, so that no decimal rounds it."""
    assert isinstance(value, int | float)
    (bits,) = struct.unpack("<I", struct.pack("<f", np.float32(value)))
    return f"{bits:#x}u"


def _template(kind: str, name: str, value: Value) -> str:
    if isinstance(value, mx.Dtype):
        return f"using {name} = {TYPES[value]};"
    return f"constexpr {kind} {name} = {literal(value)};"


def _parameter(p: Input | Scalar, value: Value) -> str:
    if isinstance(p, Input):
        # Null, so that the simulator finds a read: an absent input has no memory.
        return f"const device {p.type}* {p.name} = nullptr;"
    if p.type == "float":
        return f"const float {p.name} = as_type<float>({float_bits(value)});"
    return f"constexpr {p.type} {p.name} = {literal(value)};"
