"""A kernel's signature as it stands in the ``.metal`` file: the only registration.

Inputs are ``device const T* name`` or, for one value, ``constant uint& name``; outputs
``device T* name``, after the inputs; then thread attributes. Nothing else is accepted.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx

from ..errors import KernelError
from .source import Declaration, Place, matching, split_commas, without_template

# Types that a parameter may have besides the template's, and MLX's type for each.
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
# Thread attributes that MLX passes, and how many numbers each has there.
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
_SCALAR = re.compile(r"(?:constant\s+(?:const\s+)?|const\s+constant\s+)(\w+)\s*&\s*(\w+)")
_ATTRIBUTE = re.compile(r"(uint[23]?)\s+(\w+)\s*\[\[\s*(\w+)\s*\]\]")
_THREADGROUP = re.compile(r"\bthreadgroup\s+(?:_?alignas\(\d+\)\s+)?(\w+)\s+([^;*&()]+);")
_CONSTEXPR = re.compile(r"\bconstexpr\s+(?:constant\s+)?(?:\w+)\s+(\w+)\s*=\s*([^;]+);")
_SIZES = {"float": 4, "half": 2, "bfloat": 2, "uint": 4, "int": 4, "ushort": 2}
_SIZES |= {"uchar": 1, "char": 1, "bool": 1, "ulong": 8, "long": 8}
_SIZES |= {f"{t}{n}": s * n for t, s in tuple(_SIZES.items()) for n in (2, 4)}


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
    """``constant type& name``: one number, passed as an array without dimensions."""

    type: str
    name: str


@dataclass(frozen=True)
class Output:
    """``device type* name``."""

    type: str
    name: str


@dataclass(frozen=True)
class Attribute:
    """``uint name [[attribute]]``; ``width`` numbers of it are wanted."""

    width: int
    name: str
    attribute: str

    @property
    def binding(self) -> str:
        """Statement that makes our name from MLX's, empty when they are the same."""
        given = ATTRIBUTES[self.attribute]
        if self.width == given and self.name == self.attribute:
            return ""
        type_name = "uint" if self.width == 1 else f"uint{self.width}"
        part = {1: ".x", 2: ".xy", 3: ""}[self.width] if given == 3 else ""
        return f"const {type_name} {self.name} = {self.attribute}{part};"


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
        """Thread attributes asked for."""
        return tuple(p for p in self.parameters if isinstance(p, Attribute))

    @cached_property
    def type_parameters(self) -> tuple[str, ...]:
        """Names of the template's types."""
        return tuple(p.name for p in self.template if p.kind == "typename")

    @cached_property
    def values(self) -> Mapping[str, str]:
        """The template's numbers by name: ``int`` or ``bool``."""
        return {p.name: p.kind for p in self.template if p.kind != "typename"}

    def threadgroup_bytes(
        self, template: Mapping[str, int], types: Mapping[str, mx.Dtype]
    ) -> int:
        """Return the static threadgroup memory of one instantiation.

        Raises:
            KernelError: for a size that is not made of template and constexpr numbers.
        """
        known: dict[str, int] = dict(template)
        for name, value in _CONSTEXPR.findall(self.body):
            try:
                known[name] = evaluate(value, known)
            except (ValueError, KeyError):
                continue
        total = 0
        for found in _THREADGROUP.finditer(self.body):
            line = self.body_line + self.body.count("\n", 0, found.start())
            place = Place(self.place.file, line)
            total += _array_bytes(found[1], found[2], known, types, place)
        return total


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
            except (ValueError, KeyError, SyntaxError) as error:
                raise place.error(f"cannot tell the size [{extent}]: {error}") from None
        total += count * size
    return total


def evaluate(expression: str, known: Mapping[str, int]) -> int:
    """Compute a constant C expression of integers.

    Raises:
        ValueError: for anything but numbers, known names and ``+ - * / % << >> ?:``.
    """
    text = expression.strip()
    ternary = re.fullmatch(r"(.+?)\?(.+):(.+)", text, re.S)
    if ternary:
        chosen = ternary[2] if evaluate(ternary[1], known) else ternary[3]
        return evaluate(chosen, known)
    text = re.sub(r"\b(\d+)u\b", r"\1", text)
    try:
        return _value(ast.parse(text, mode="eval").body, known)
    except SyntaxError:
        raise ValueError(f"cannot read {expression!r}") from None


def _value(node: ast.expr, known: Mapping[str, int]) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return int(node.value)
    if isinstance(node, ast.Name) and node.id in known:
        return int(known[node.id])
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, known), _value(node.right, known)
        operation = _OPERATIONS.get(type(node.op))
        if operation is not None:
            return operation(left, right)
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        left, right = _value(node.left, known), _value(node.comparators[0], known)
        comparison = _COMPARISONS.get(type(node.ops[0]))
        if comparison is not None:
            return int(comparison(left, right))
    raise ValueError(f"cannot compute {ast.unparse(node)!r}")


_OPERATIONS = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a // b,
    ast.Mod: lambda a, b: a % b,
    ast.LShift: lambda a, b: a << b,
    ast.RShift: lambda a, b: a >> b,
}
_COMPARISONS = {
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
    ast.Eq: lambda a, b: a == b,
}


def parse(declaration: Declaration) -> MetalKernel:
    """Read a kernel's signature.

    Raises:
        KernelError: for anything not understood, with file and line.
    """
    text, place = declaration.text, declaration.place
    head = without_template(text)
    template = _template(text[: len(text) - len(head)], place)
    opening = head.index("(")
    closing = matching(head, opening, "()")
    first = len(text) - len(head)
    types = {p.name for p in template if p.kind == "typename"}
    parameters, line_of = [], lambda at: place.line + text.count("\n", 0, first + at)
    at = opening + 1
    for part in split_commas(head[opening + 1 : closing]):
        begin = head.index(part, at)
        at = begin + len(part)
        begin += len(part) - len(part.lstrip())
        where = Place(place.file, line_of(begin))
        parameters.append(_parameter(" ".join(part.split()), types, where))
    _check_order(parameters, place)
    body_at = head.index("{", closing) + 1
    body = head[body_at : head.rindex("}")]
    kernel = MetalKernel(
        declaration.name,
        place,
        template,
        tuple(parameters),
        body,
        line_of(body_at),
        declaration,
    )
    _check_body(kernel)
    return kernel


def _template(text: str, place: Place) -> tuple[TemplateParameter, ...]:
    if not text:
        return ()
    found = []
    for part in split_commas(text[text.index("<") + 1 : text.rindex(">")]):
        words = part.split()
        if len(words) != 2 or words[0] not in ("typename", "int", "bool"):
            raise place.error(
                f"expected typename, int or bool and a name but got {part.strip()!r}"
            )
        found.append(TemplateParameter(*words))
    return tuple(found)


def _parameter(text: str, types: set[str], place: Place) -> Parameter:
    rules: tuple[tuple[re.Pattern[str], type[Input] | type[Output] | type[Scalar]], ...]
    rules = ((_INPUT, Input), (_OUTPUT, Output), (_SCALAR, Scalar))
    for rule, make in rules:
        found = rule.fullmatch(text)
        if found:
            if found[1] not in DTYPES and found[1] not in types:
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
    names = [p.name for p in parameters]
    if len(set(names)) != len(names):
        raise place.error(f"expected distinct parameter names but got {names}")
    if not any(isinstance(p, Output) for p in parameters):
        raise place.error("expected at least one output")


def _check_body(kernel: MetalKernel) -> None:
    """Refuse what would mean something else once MLX has written the signature."""
    for p in kernel.parameters:
        for suffix in ("_shape", "_strides", "_ndim"):
            if re.search(rf"\b{p.name}{suffix}\b", kernel.body):
                raise kernel.place.error(f"{p.name}{suffix} has a meaning to MLX")
    found = re.search(r"\b(device\s+const|const\s+device)\b", kernel.body)
    if found:
        line = kernel.body_line + kernel.body.count("\n", 0, found.start())
        raise Place(kernel.place.file, line).error(
            "inputs of fewer than 8 elements are in constant memory: expected 'auto' "
            f"but got {found[0]!r}"
        )


__all__ = ["DTYPES", "KernelError", "MetalKernel", "evaluate", "parse"]
