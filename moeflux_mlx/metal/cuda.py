"""Our Metal as CUDA C++: the same declarations behind ``kernels/msl_cuda.h``."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection
from pathlib import Path

from .library import Library
from .signature import Attribute, Input, MetalKernel, Output, Scalar
from .source import without_comments

DIALECT = "msl_cuda.h"
# Helpers that have a twin of their own in CUDA, for types that tensor cores take. It
# overloads the helper and stands in the last of the files named here.
TWINS = {
    "multiply_tile": ("fragments_cuda.h", "tiles_cuda.h"),
    "block_rows": ("fragments_cuda.h", "rows_cuda.h"),
    "combined_rows": ("fragments_cuda.h", "rows_cuda.h", "experts_cuda.h"),
}
# ``threadgroup T x[n], y[m];`` declares storage; any other address space qualifies what
# a pointer points to, which in CUDA needs no word.
_SHARED = re.compile(r"\bthreadgroup(?=\s+(?:alignas\(\d+\)\s*)?\w+\s+\w+\s*\[)")
_SPACE = re.compile(r"\b(?:device|constant|thread|threadgroup)\b\s*")
_BITS = "_bits"


def baked_name(kernel: MetalKernel, name: str) -> str:
    """Return the template number that holds a baked scalar: of a float, its bits."""
    scalar = next(p for p in kernel.inputs if p.name == name)
    return name + _BITS if scalar.type == "float" else name


def header(library: Library, kernel: MetalKernel) -> str:
    """Return the dialect, all that ``kernel`` uses, and itself as a device function."""
    used = [d for d in library.used(kernel) if d.kind != "include"]
    texts = [d.text for d in used]
    files = dict.fromkeys(file for d in used for file in TWINS.get(d.name, ()))
    texts += [_text(library.folder / file) for file in files]
    helpers = "\n".join(texts)
    template = ", ".join(f"{p.kind} {p.name}" for p in kernel.template)
    parameters = ", ".join(_parameter(p) for p in kernel.parameters)
    function = (
        f"{f'template <{template}>' if template else ''}\n"
        f"inline void {kernel.name}({parameters}) {{{kernel.body}}}\n"
    )
    code = _SPACE.sub("", _SHARED.sub("MSL_SHARED", f"{helpers}\n{function}"))
    return f"{_text(library.folder / DIALECT)}\nnamespace msl {{\n{code}}}\n"


def body(kernel: MetalKernel, baked: Collection[str]) -> str:
    """Return the body to register: one call of the device function.

    Args:
        baked: scalars given as template numbers rather than as inputs.
    """
    template = ", ".join(p.name for p in kernel.template)
    arguments = ", ".join(_argument(kernel, p, baked) for p in kernel.parameters)
    return f"msl::{kernel.name}{f'<{template}>' if template else ''}({arguments});"


@functools.cache
def _text(path: Path) -> str:
    """Return a file of CUDA without comments and indentation."""
    lines = without_comments(path.read_text()).splitlines()
    return "\n".join(line.strip() for line in lines if line.strip())


def _parameter(p: Input | Scalar | Output | Attribute) -> str:
    match p:
        case Input():
            return f"const {p.type}* {p.name}"
        case Scalar():
            return f"const {p.type} {p.name}"
        case Output():
            return f"{p.type}* {p.name}"
        case Attribute():
            return f"const {p.type_name} {p.name}"


def _argument(
    kernel: MetalKernel,
    p: Input | Scalar | Output | Attribute,
    baked: Collection[str],
) -> str:
    match p:
        case Scalar() if p.name in baked and p.type == "float":
            return f"msl::as_type<float>({baked_name(kernel, p.name)})"
        case Scalar() if p.name in baked:
            return f"msl::{p.type}({p.name})"
        case Scalar():
            return f"*{p.name}"
        case Attribute():
            return f"msl::{p.attribute}(){p.part}"
    return p.name
