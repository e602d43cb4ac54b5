"""Our Metal source as CUDA C++, behind the header ``kernels/msl_cuda.h``."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import mlx.core as mx

from .instance import Instance, Value, float_bits, literal
from .library import Library
from .signature import (
    Attribute,
    Input,
    MetalKernel,
    Output,
    Parameter,
    Scalar,
    TemplateParameter,
)
from .source import compact, without_comments

DIALECT = "msl_cuda.h"
_ROWS = ("fragments_cuda.h", "staged_cuda.h", "rows_cuda.h")
# Helpers with a CUDA twin for types that tensor cores take, and the files it needs. The
# twin overloads the helper and is in the last file.
TWINS = {
    "multiply_tile": ("fragments_cuda.h", "tiles_cuda.h"),
    "dense_sums": ("fragments_cuda.h", "dense_cuda.h"),
    "attend": ("fragments_cuda.h", "latent_cuda.h"),
    "attend_part": ("fragments_cuda.h", "attention_cuda.h"),
    "rows_of_matrices": _ROWS,
    "combined_rows": (*_ROWS, "experts_cuda.h"),
}
# ``threadgroup T x[n], y[m];`` declares storage. Any other address space qualifies the
# target of a pointer, for which CUDA has no keyword.
_SHARED = re.compile(r"\bthreadgroup(?=\s+(?:alignas\(\d+\)\s*)?\w+\s+\w+\s*\[)")
_SPACE = re.compile(r"\b(?:device|constant|thread|threadgroup)\b\s*")


# The names of MLX's types in the dialect.
TYPES = {
    mx.float32: "float",
    mx.float16: "msl::half",
    mx.bfloat16: "msl::bfloat",
    mx.uint32: "msl::uint",
    mx.int32: "int",
    mx.uint16: "msl::ushort",
    mx.uint8: "msl::uchar",
    mx.bool_: "bool",
}


def header(library: Library, kernel: MetalKernel) -> str:
    """Return the dialect, a kernel's helpers, and the kernel as a device function."""
    # A twin directly follows its helper, so that callers see both.
    texts: dict[str, None] = {}
    for helper in (d for d in library.used(kernel) if d.kind != "include"):
        texts[helper.text] = None
        for file in TWINS.get(helper.name, ()):
            texts[_text(library.folder / file)] = None
    helpers = "\n".join(texts)
    template = ", ".join(f"{p.kind} {p.name}" for p in kernel.template)
    parameters = ", ".join(_parameter(p) for p in kernel.parameters)
    function = (
        f"{f'template <{template}>' if template else ''}\n"
        f"inline void {kernel.name}({parameters}) {{{kernel.body}}}\n"
    )
    code = _SPACE.sub("", _SHARED.sub("MSL_SHARED", f"{helpers}\n{function}"))
    return compact(f"{_text(library.folder / DIALECT)}\nnamespace msl {{\n{code}}}")


def body(instance: Instance) -> str:
    """Return the body to register: one call of the device function."""
    kernel = instance.kernel
    template = ", ".join(_argument(p, instance) for p in kernel.template)
    arguments = ", ".join(_argument(p, instance) for p in kernel.parameters)
    return f"msl::{kernel.name}{f'<{template}>' if template else ''}({arguments});"


@functools.cache
def _text(path: Path) -> str:
    """Return a CUDA file without comments and indentation."""
    return compact(without_comments(path.read_text()))


def _parameter(p: Parameter) -> str:
    match p:
        case Input():
            return f"const {p.type}* {p.name}"
        case Scalar():
            return f"const {p.type} {p.name}"
        case Output():
            return f"{p.type}* {p.name}"
        case Attribute():
            return f"const {p.type_name} {p.name}"


def _argument(p: Parameter | TemplateParameter, instance: Instance) -> str:
    if p.name in instance.values:
        return _compiled_in(p, instance.values[p.name])
    match p:
        case Scalar():
            return f"*{p.name}"
        case Attribute():
            return f"msl::{p.attribute}(){p.part}"
    return p.name


def _compiled_in(p: Parameter | TemplateParameter, value: Value) -> str:
    match p:
        case Input():
            return "nullptr"
        case Scalar(type="float"):
            return f"msl::as_type<float>({float_bits(value)})"
        case Scalar():
            return f"msl::{p.type}({literal(value)})"
    return TYPES[value] if isinstance(value, mx.Dtype) else literal(value)
