"""The signature of a kernel, parsed from its ``.metal`` file: its only registration.

Inputs are ``device const T* name`` or, for one value, ``constant uint& name``. Outputs
``device T* name`` follow, then thread attributes. Anything else is an error.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import mlx.core as mx

from ...errors import KernelError
from .expression import evaluate
from .source import Declaration, Place, matching, split_commas, without_template

# The types of parameters besides the template's, and MLX's type for each.
DTYPES: Mapping[str, mx.Dtype] = {
    "float": mx.float32,
    "half": mx.float16,
    "bfloat": mx.bfloat16,
    "uint": mx.uint32,
    "int": mx.int32,
    "ushort": mx.uint16,
    "uchar": mx.uint8,
    "ulong": mx.uint64,
    "long": mx.int64,
    "bool": mx.bool_,
}
# Thread attributes that MLX passes, and the number of components of each.
ATTRIBUTES: Mapping[str, int] = {
    "thread_position_in_grid": 3,
    "thread_position_in_threadgroup": 3,
    "threadgroup_position_in_grid": 3,
    "threads_per_threadgroup": 3,
    "threads_per_grid": 3,
    "threadgroups_per_grid": 3,
    "thread_index_in_threadgroup": 1,
    "thread_index_in_simdgroup": 1,
    "simdgroup_index_in_threadgroup": 1,
    "threads_per_simdgroup": 1,
    "simdgroups_per_threadgroup": 1,
}
_SPACE = r"\s*"
_INPUT = re.compile(r"(?:device\s+const|const\s+device)\s+(\w+)\s*\*\s*(\w+)")
_OUTPUT = re.compile(r"device\s+(\w+)\s*\*\s*(\w+)")
_SCALAR = re.compile(
    r"(?:constant\s+(?:const\s+)?|const\s+constant\s+)(\w+)\s*&\s*(\w+)"
)
_ATTRIBUTE = re.compile(r"(uint[23]?)\s+(\w+)\s*\[\[\s*(\w+)\s*\]\]")
_THREADGROUP = re.compile(r"\bthreadgroup\s+(?:alignas\(\d+\)\s*)?([^;]*)")
_EXTENTS = r"(?:\[[^\]]*\]\s*)*"
_ARRAYS = re.compile(rf"(\w+)\s+(\w+\s*{_EXTENTS}(?:,\s*\w+\s*{_EXTENTS})*)")
_CONSTEXPR = re.compile(r"\bconstexpr\s+(?:constant\s+)?(?:\w+)\s+(\w+)\s*=\s*([^;]+);")
_SIZES = {"float": 4, "half": 2, "bfloat": 2, "uint": 4, "int": 4, "ushort": 2}
_SIZES |= {"uchar": 1, "char": 1, "bool": 1, "ulong": 8, "long": 8}
_SIZES |= {
    f"{t}{n}": s * (n + n % 2) for t, s in tuple(_SIZES.items()) for n in (2, 3, 4)
}
_SIZES |= {"atomic_uint": 4, "atomic_int": 4}


@dataclass(frozen=True)
class TemplateParameter:
    """``typename T``, ``int N`` or ``bool B``."""

    kind: str
    name: str


@dataclass(frozen=True)
class Input:
    """``device const type* name``."""

    type: str
    name: str


@dataclass(frozen=True)
class Scalar:
    """``constant type& name``: one number, passed as a zero-dimensional array."""

    type: str
    name: str


@dataclass(frozen=True)
class Output:
    """``device type* name``."""

    type: str
    name: str


@dataclass(frozen=True)
class Attribute:
    """``uint name [[attribute]]``, with ``width`` components."""

    width: int
    name: str
    attribute: str

    @property
    def type_name(self) -> str:
        """``uint``, ``uint2`` or ``uint3``."""
        return "uint" if self.width == 1 else f"uint{self.width}"

    @property
    def part(self) -> str:
        """The swizzle of the components used: ``.x``, ``.xy`` or "" for all."""
        given = ATTRIBUTES[self.attribute]
        return {1: ".x", 2: ".xy", 3: ""}[self.width] if given == 3 else ""

    @property
    def binding(self) -> str:
        """The statement that defines our name by MLX's; "" if they are the same."""
        if self.name == self.attribute and not self.part:
            return ""
        return f"const {self.type_name} {self.name} = {self.attribute}{self.part};"


Parameter = Input | Scalar | Output | Attribute


@dataclass(frozen=True)
class MetalKernel:
    """One parsed ``[[kernel]]`` function."""

    name: str
    place: Place
    template: tuple[TemplateParameter, ...]
    parameters: tuple[Parameter, ...]
    body: str
    body_line: int
    declaration: Declaration
    constants: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def inputs(self) -> tuple[Input | Scalar, ...]:
        """Arrays and scalars read, in order."""
        return tuple(p for p in self.parameters if isinstance(p, Input | Scalar))

    @cached_property
    def outputs(self) -> tuple[Output, ...]:
        """Arrays written, in order."""
        return tuple(p for p in self.parameters if isinstance(p, Output))

    @cached_property
    def attributes(self) -> tuple[Attribute, ...]:
        """Thread attributes in the signature."""
        return tuple(p for p in self.parameters if isinstance(p, Attribute))

    @cached_property
    def type_parameters(self) -> tuple[str, ...]:
        """Names of the template's type parameters."""
        return tuple(p.name for p in self.template if p.kind == "typename")

    @cached_property
    def values(self) -> Mapping[str, str]:
        """The template's other parameters: ``int`` or ``bool`` by name."""
        return {p.name: p.kind for p in self.template if p.kind != "typename"}

    def place_in_body(self, at: int) -> Place:
        """Return the place of a character of the body."""
        return Place(self.place.file, self.body_line + self.body.count("\n", 0, at))

    def threadgroup_bytes(
        self, template: Mapping[str, int], types: Mapping[str, mx.Dtype]
    ) -> int:
        """Return the static threadgroup memory of one instance.

        Raises:
            KernelError: a size has more than template and constexpr numbers.
        """
        known = self._known(template)
        total = 0
        for found in _THREADGROUP.finditer(self.body):
            if re.search(r"[*&]", re.split(r"[\[=();]", found[1])[0]):
                continue
            place = self.place_in_body(found.start())
            arrays = _ARRAYS.fullmatch(found[1].strip())
            if arrays is None:
                raise place.error(f"expected threadgroup arrays but got {found[1]!r}")
            total += _array_bytes(arrays[1], arrays[2], known, types, place)
        return total

    def _known(self, template: Mapping[str, int]) -> dict[str, int]:
        """Return the numbers of the template, the file and the body by name."""
        known = {**self.constants, **template}
        return known | constants(self.body, known)


def _array_bytes(
    element: str,
    declarators: str,
    known: Mapping[str, int],
    types: Mapping[str, mx.Dtype],
    place: Place,
) -> int:
    size = types[element].size if element in types else _SIZES.get(element)
    if size is None:
        raise place.error(f"expected a scalar or vector type but got {element!r}")
    total = 0
    for declarator in split_commas(declarators):
        count = 1
        for extent in re.findall(r"\[([^\]]*)\]", declarator):
            try:
                count *= evaluate(extent, known)
            except ValueError as error:
                raise place.error(
                    f"cannot compute the size [{extent}]: {error}"
                ) from None
        total += count * size
    return total


def constants(text: str, known: Mapping[str, int]) -> dict[str, int]:
    """Return the ``constexpr`` integers that a text defines, given those known."""
    found: dict[str, int] = {}
    for name, value in _CONSTEXPR.findall(text):
        # Sizes may not need an integer whose expression is unknown.
        with contextlib.suppress(ValueError):
            found[name] = evaluate(value, {**known, **found})
    return found


def parse(
    declaration: Declaration, constants: Mapping[str, int] | None = None
) -> MetalKernel:
    """Parse a kernel's signature.

    Args:
        declaration: the kernel's text.
        constants: integers defined before it, for the sizes of its arrays.

    Raises:
        KernelError: it cannot be parsed; names file and line.
    """
    text, place = declaration.text, declaration.place
    head = without_template(text)
    first = len(text) - len(head)
    template = _template(text[:first], place)
    types = {p.name for p in template if p.kind == "typename"}
    opening = head.index("(")
    closing = matching(head, opening, "()")

    def place_of(at: int) -> Place:
        return Place(place.file, place.line + text.count("\n", 0, first + at))

    parameters, at = [], opening + 1
    for part in split_commas(head[opening + 1 : closing]):
        at = head.index(part, at) + len(part) - len(part.lstrip())
        parameters.append(_parameter(" ".join(part.split()), types, place_of(at)))
        at += len(part.strip())
    _check_commas(head[opening + 1 : closing], len(parameters), place)
    _check_order(parameters, place)
    _check_names([p.name for p in (*template, *parameters)], parameters, place)
    body_at = head.find("{", closing) + 1
    between = head[closing + 1 : body_at - 1] if body_at else head[closing + 1 :]
    if between.strip():
        got = between.strip()
        raise place_of(closing).error(f"expected '{{' after the parameters: {got!r}")
    kernel = MetalKernel(
        declaration.name,
        place,
        template,
        tuple(parameters),
        head[body_at : head.rindex("}")],
        place_of(body_at).line,
        declaration,
        constants or {},
    )
    _check_body(kernel)
    return kernel


def _check_commas(text: str, n_parameters: int, place: Place) -> None:
    """Refuse extra commas, which splitting ignores; no parameter contains one."""
    if text.count(",") > max(0, n_parameters - 1):
        raise place.error("expected a parameter between every two commas")


def _template(text: str, place: Place) -> tuple[TemplateParameter, ...]:
    if not text:
        return ()
    found = []
    for part in split_commas(text[text.index("<") + 1 : text.rindex(">")]):
        words = re.fullmatch(r"\s*(typename|int|bool)\s+(\w+)\s*", part)
        if words is None:
            raise place.error(
                f"expected typename, int or bool and a name but got {part.strip()!r}"
            )
        found.append(TemplateParameter(words[1], words[2]))
    return tuple(found)


def _parameter(text: str, types: set[str], place: Place) -> Parameter:
    rules: tuple[tuple[re.Pattern[str], type[Input] | type[Output] | type[Scalar]], ...]
    rules = ((_INPUT, Input), (_OUTPUT, Output), (_SCALAR, Scalar))
    for rule, make in rules:
        found = rule.fullmatch(text)
        if found:
            # A scalar is a Python number, from which MLX could not infer a template's
            # type.
            known = DTYPES if make is Scalar else {*DTYPES, *types}
            if found[1] not in known:
                raise place.error(f"expected a known type but got {found[1]!r}")
            return make(found[1], found[2])
    found = _ATTRIBUTE.fullmatch(text)
    if found:
        width = int(found[1][4:] or 1)
        if found[3] not in ATTRIBUTES:
            raise place.error(f"expected a thread attribute but got {found[3]!r}")
        if width > ATTRIBUTES[found[3]]:
            raise place.error(f"{found[3]} is one number but got {found[1]}")
        return Attribute(width, found[2], found[3])
    raise place.error(f"expected an input, output or attribute but got {text!r}")


def _check_order(parameters: list[Parameter], place: Place) -> None:
    order = [Input, Scalar, Output, Attribute]
    ranks = [max(1, order.index(type(p))) for p in parameters]
    if ranks != sorted(ranks):
        raise place.error("expected inputs, then outputs, then thread attributes")
    if not any(isinstance(p, Output) for p in parameters):
        raise place.error("expected at least one output")


def _check_names(names: list[str], parameters: list[Parameter], place: Place) -> None:
    """Refuse duplicate names, and the names of MLX's own parameters."""
    if len(set(names)) != len(names):
        raise place.error(f"expected distinct parameter names but got {names}")
    for p in parameters:
        is_own = isinstance(p, Attribute) and not p.binding
        if p.name in ATTRIBUTES and not is_own:
            raise place.error(f"{p.name} is MLX's name of a thread attribute")


def _check_body(kernel: MetalKernel) -> None:
    """Refuse names that have another meaning in the signature that MLX writes."""
    names = "|".join(p.name for p in kernel.inputs)
    found = re.search(rf"\b(?:{names})_(?:shape|strides|ndim)\b", kernel.body)
    if names and found:
        raise kernel.place_in_body(found.start()).error(
            f"{found[0]} is a name that MLX defines: choose another"
        )
    found = re.search(r"\b(device\s+const|const\s+device)\b", kernel.body)
    if found:
        raise kernel.place_in_body(found.start()).error(
            "inputs of fewer than 8 elements are in constant memory: expected 'auto' "
            f"but got {' '.join(found[0].split())!r}"
        )


__all__ = ["DTYPES", "KernelError", "MetalKernel", "evaluate", "parse"]
