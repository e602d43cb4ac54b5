"""``moeflux_mlx/engine/metal/`` reads valid Metal source and refuses other source."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeflux_mlx.engine.metal import (
    Attribute,
    Input,
    Library,
    MetalKernel,
    Output,
    Scalar,
    TemplateParameter,
    library,
)
from moeflux_mlx.engine.metal.expression import evaluate
from moeflux_mlx.engine.metal.library import HEADER, kernels_folder
from moeflux_mlx.engine.metal.signature import ATTRIBUTES, DTYPES, parse
from moeflux_mlx.engine.metal.source import (
    Declaration,
    Place,
    declarations,
    without_comments,
)
from moeflux_mlx.errors import KernelError

Make = Callable[..., Library]
NAMES = {"T": mx.float16, "S": mx.bfloat16}


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Write a folder of kernels and read it."""

    def write(metal: str, header: str = "", **more: str) -> Library:
        (tmp_path / HEADER).write_text(header)
        (tmp_path / "some.metal").write_text(metal)
        for name, text in more.items():
            (tmp_path / f"{name}.metal").write_text(text)
        return Library(tmp_path)

    return write


def kernel(parameters: str, body: str = "", template: str = "") -> str:
    return f"{template}[[kernel]] void k({parameters}) {{{body}}}"


def read(parameters: str, body: str = "", template: str = "") -> MetalKernel:
    """Parse a kernel that stands on line 1 of ``some.metal``."""
    text = kernel(parameters, body, template)
    return parse(Declaration("kernel", "k", text, Place("some.metal", 1)))


# Accepted source.
def test_parameters_keep_their_names_order_and_types():
    found = read(
        "device const T* x, constant uint& n, device const half* w, "
        "constant float& eps, device T* y, device int* where, "
        "uint2 at [[thread_position_in_grid]], uint lane [[thread_index_in_simdgroup]]",
        template="template <typename T, int N, bool B>\n",
    )
    assert found.name == "k"
    assert found.template == (
        TemplateParameter("typename", "T"),
        TemplateParameter("int", "N"),
        TemplateParameter("bool", "B"),
    )
    assert found.inputs == (
        Input("T", "x"),
        Scalar("uint", "n"),
        Input("half", "w"),
        Scalar("float", "eps"),
    )
    assert found.outputs == (Output("T", "y"), Output("int", "where"))
    assert found.attributes == (
        Attribute(2, "at", "thread_position_in_grid"),
        Attribute(1, "lane", "thread_index_in_simdgroup"),
    )
    assert found.type_parameters == ("T",)
    assert found.values == {"N": "int", "B": "bool"}


@pytest.mark.parametrize("name", DTYPES)
def test_every_type_may_be_an_input_a_number_and_an_output(name):
    found = read(f"device const {name}* x, constant {name}& n, device {name}* y")
    assert found.parameters == (
        Input(name, "x"),
        Scalar(name, "n"),
        Output(name, "y"),
    )


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("device const float* x", Input("float", "x")),
        ("const device float* x", Input("float", "x")),
        ("device const float *x", Input("float", "x")),
        ("device  const\n\tfloat\n*\nx", Input("float", "x")),
        ("constant uint& x", Scalar("uint", "x")),
        ("constant const uint &x", Scalar("uint", "x")),
        ("const constant uint& x", Scalar("uint", "x")),
    ],
)
def test_an_input_may_be_spelt_in_every_way_that_metal_allows(text, wanted):
    assert read(f"{text}, device float* y").inputs == (wanted,)


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_an_attribute_is_bound_to_our_name_from_mlxs(attribute):
    numbers = ATTRIBUTES[attribute]
    for width in range(1, numbers + 1):
        kind = "uint" if width == 1 else f"uint{width}"
        found = read(f"device float* y, {kind} at [[{attribute}]]").attributes[0]
        assert found == Attribute(width, "at", attribute)
        part = {1: ".x", 2: ".xy", 3: ""}[width] if numbers == 3 else ""
        assert found.binding == f"const {kind} at = {attribute}{part};"
        own = f"{'uint' if numbers == 1 else 'uint3'} {attribute} [[ {attribute} ]]"
        assert read(f"device float* y, {own}").attributes[0].binding == ""


def test_a_signature_may_spread_over_lines_with_comments_between(make):
    found = make(
        """
        /* A kernel of
           many, lines (. */
        template <
            typename T,  // activations, and
            int N>
        [[kernel]] void
        k(device const T* x,  // the {first}, an input
          /* constant float& not_this, */
          constant uint& n,
          device T* y) {  // out
        }
        """
    )["k"]
    assert found.parameters == (Input("T", "x"), Scalar("uint", "n"), Output("T", "y"))
    assert found.place == Place("some.metal", 4)
    assert found.body_line == 11


@pytest.mark.parametrize(
    "head", ["kernel void", "[[kernel]] void", "[[ kernel ]]\nvoid", "[[kernel]]void"]
)
def test_both_spellings_of_a_kernel_are_known(make, head):
    assert list(make(f"{head} k(device float* y) {{}}").kernels) == ["k"]


def test_a_kernel_needs_neither_inputs_nor_attributes_nor_a_template():
    found = read("device float* y")
    assert (found.inputs, found.attributes, found.template) == ((), (), ())


# Refused source, with its line.
@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ("device const float4* x, device float* y", "known type but got 'float4'"),
        ("device const T* x, device float* y", "known type but got 'T'"),
        ("device double* y", "known type but got 'double'"),
        ("device float* y [[buffer(0)]]", r"got 'device float\* y \[\[buffer"),
        ("const float* x, device float* y", r"got 'const float\* x'"),
        ("float* x, device float* y", r"got 'float\* x'"),
        ("constant float* x, device float* y", r"got 'constant float\* x'"),
        ("device const float& x, device float* y", "got 'device const float& x'"),
        ("threadgroup float* s, device float* y", r"got 'threadgroup float\* s'"),
        ("texture2d<float> x, device float* y", "got 'texture2d<float> x'"),
        ("device float* y, device const float* x", "inputs, then outputs"),
        ("device float* y, constant uint& n", "inputs, then outputs"),
        (
            "uint i [[thread_position_in_grid]], device float* y",
            "inputs, then outputs, then thread attributes",
        ),
        ("device const float* x", "at least one output"),
        ("", "at least one output"),
        (
            "device float* y, uint i [[thread_index]]",
            "attribute but got 'thread_index'",
        ),
        ("device float* y, uint i", "attribute but got 'uint i'"),
        (
            "device float* y, ushort i [[thread_position_in_grid]]",
            "got 'ushort i",
        ),
        (
            "device float* y, uint2 i [[thread_index_in_simdgroup]]",
            "thread_index_in_simdgroup is one number but got uint2",
        ),
        ("device const float* x, device float* x", "distinct .* names"),
        ("device const float* x,, device float* y", "between every two commas"),
        ("device float* y,", "between every two commas"),
        (
            "device const uint* thread_position_in_grid, device float* y",
            "MLX's name of a thread attribute",
        ),
        (
            "device float* y, uint thread_position_in_grid [[thread_position_in_grid]]",
            "MLX's name of a thread attribute",
        ),
    ],
)
def test_a_signature_of_another_kind_is_refused_with_its_line(parameters, message):
    with pytest.raises(KernelError, match=rf"^\[some.metal:1\] .*{message}"):
        read(parameters)


def test_an_error_names_the_line_of_the_parameter(make):
    with pytest.raises(KernelError, match=r"^\[some.metal:4\] .*'half3'"):
        make("\n// Why.\n[[kernel]] void k(\n    device half3* y) {}\n")


@pytest.mark.parametrize(
    ("template", "got"),
    [
        ("typename T, uint N", "uint N"),
        ("class T", "class T"),
        ("typename T = float", "typename T = float"),
        ("typename T=float", "typename T=float"),
        ("int N = 4", "int N = 4"),
        ("typename... T", "typename... T"),
        ("float F", "float F"),
    ],
)
def test_template_parameters_of_another_kind_are_refused(template, got):
    wanted = rf"^\[some.metal:1\] expected typename, int or bool .*{re.escape(got)}"
    with pytest.raises(KernelError, match=wanted):
        read("device float* y", template=f"template <{template}>\n")


def test_a_template_parameter_and_a_buffer_cannot_share_a_name():
    with pytest.raises(KernelError, match="distinct parameter names"):
        read("device float* N", template="template <int N>\n")


def test_a_number_has_a_type_of_its_own():
    with pytest.raises(KernelError, match="known type but got 'T'"):
        read(
            "device const T* x, constant T& n, device T* y",
            template="template <typename T>\n",
        )


@pytest.mark.parametrize("suffix", ["shape", "strides", "ndim"])
def test_a_body_cannot_use_names_that_mlx_adds(suffix):
    parameters = "device const float* x, constant uint& n, device float* y"
    for name in "xn":
        wanted = rf"^\[some.metal:2\] {name}_{suffix} is a name that MLX defines"
        with pytest.raises(KernelError, match=wanted):
            read(parameters, f"\n  y[0] = {name}_{suffix}[0];")
    read(parameters, f"float max_{suffix} = 1.0f; float x_{suffix}_2 = 2.0f;")


@pytest.mark.parametrize("space", ["device const", "const device", "device  \n const"])
def test_a_body_cannot_name_the_space_of_an_input(space):
    parameters = "device const float* x, device float* y"
    wanted = r"^\[some.metal:3\] .*expected 'auto'"
    with pytest.raises(KernelError, match=wanted):
        read(parameters, f"\n\n  {space} float* row = x;")
    read(parameters, "\n  auto row = x; device float* to = y;")


def test_a_kernel_without_a_body_is_refused(make):
    for text in (
        "[[kernel]] void k(device float* y);",
        "[[kernel]] void k(device float* y) [[max_total_threads_per_threadgroup(8)]] {}"
        "\nvoid f() {}",
    ):
        with pytest.raises(KernelError, match=r"^\[some.metal:1\] expected '{'"):
            make(text)


def test_two_kernels_of_one_name_are_refused_with_both_places(make):
    text = "\n" + kernel("device float* y")
    with pytest.raises(
        KernelError, match=r"^\[some.metal:2\] .*'k' stands at other.metal:2"
    ):
        make(text, other=text)


def test_two_kernels_of_one_name_in_a_file_are_refused(make):
    text = "\n" + kernel("device float* y")
    with pytest.raises(KernelError, match=r"^\[some.metal:4\] .*at some.metal:2"):
        make(text + "\n" + text)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("#ifdef A", "expected #include, #pragma once or #define but got '#ifdef A'"),
        ("#pragma unroll", "expected #pragma once"),
        ("#pragma", "expected #pragma once"),
        ("#", "expected #include"),
        ("#include", "expected one file to include"),
        ("#include <a> <b>", "expected one file to include"),
        ("#define", "expected a name after #define"),
        ("#define 4", "expected a name after #define"),
        ('#include "other.h"', "expected moeflux.h or a system header"),
        ("void f(float x) {", "ends but reached the end of file"),
        ("float f(float x)", "ends but reached the end of file"),
        ("/* no end", "ends but reached the end of file"),
        ("constant float x[2] = {1.0f, 2.0f}", "ends but reached the end of file"),
        ("template <typename T void f(T x);", "expected a template's parameters"),
        ("x;", "expected a declaration but got 'x;'"),
        ("namespace a { int x; };", "expected a declaration"),
        ("enum { A, B };", "expected a declaration"),
        ("enum Kind { A, B };", "expected a declaration"),
        ("[[kernel]] int k(device float* y) {}", r"expected '\[\[kernel\]\] void name"),
        (
            "[[kernel, visible]] void k(device float* y) {}",
            r"expected '\[\[kernel\]\] void name",
        ),
        ("constant int A = 1, B = 2;", "expected one value a declaration"),
    ],
)
def test_an_unknown_line_is_named(make, line, message):
    wanted = rf"^\[some.metal:3\] .*{message}"
    with pytest.raises(KernelError, match=wanted):
        make(f"// A comment.\n\n{line}")
    with pytest.raises(KernelError, match=wanted.replace("some.metal", HEADER)):
        make("", header=f"// A comment.\n\n{line}")


def test_a_missing_kernel_is_named(make):
    with pytest.raises(KernelError, match=r"\[missing\] expected a kernel of"):
        make(kernel("device float* y"))["missing"]


# Declarations.
def test_a_file_is_cut_into_declarations_of_every_kind(tmp_path):
    path = tmp_path / "all.metal"
    path.write_text(
        """#pragma once
#include <metal_stdlib>
using namespace metal;
#define TWICE(x) \\
  ((x) + (x))  // twice
using Index = uint;
typedef float4 Four;
struct Pair { float a; float b; };
template <typename T> struct Box { T value; };
template <> struct Box<float> { float value; };
enum class Kind : uint { A, B };
constexpr constant int N = 4;
constant float TABLE[2] = {1.0f, 2.0f};
inline float f(float x) { return x; }
template <typename P>
float4 g(P p, float (*unused)[2]) { if (true) { return p[0]; } return 0; }
[[kernel]] void k(device float* y) { y[0] = f(1.0f); }
"""
    )
    found = [(d.kind, d.name, d.place.line) for d in declarations(path)]
    assert found == [
        ("include", "<metal_stdlib>", 2),
        ("using", "metal", 3),
        ("macro", "TWICE", 4),
        ("type", "Index", 6),
        ("type", "Four", 7),
        ("type", "Pair", 8),
        ("type", "Box", 9),
        ("type", "Box", 10),
        ("type", "Kind", 11),
        ("value", "N", 12),
        ("value", "TABLE", 13),
        ("function", "f", 14),
        ("function", "g", 15),
        ("kernel", "k", 17),
    ]


def test_comments_go_and_every_line_and_column_stays():
    text = "a /* b\n c */ d // e\n// f\n/**/g"
    stripped = without_comments(text)
    assert stripped.split() == ["a", "d", "g"]
    lines, were = stripped.split("\n"), text.split("\n")
    assert [len(line) for line in lines] == [len(line) for line in were]
    assert [lines[i].index(c) for i, c in ((0, "a"), (1, "d"), (3, "g"))] == [0, 6, 4]


def test_the_names_of_a_text_leave_out_the_ends_of_numbers():
    found = Declaration("value", "x", "x = 1.0f + 0x1fu + 2e5f + f2(y)", Place("", 1))
    assert found.identifiers == {"x", "f2", "y"}


# Threadgroup memory.
@pytest.mark.parametrize(
    ("body", "n_bytes"),
    [
        ("", 0),
        ("threadgroup float s[32];", 128),
        ("threadgroup float total;", 4),
        ("threadgroup T s[N], t[2][N];", 2 * 3 * 8),
        ("threadgroup float s[N * 4];", 4 * 32),
        ("threadgroup half s[(N + 1) * 4];", 2 * 36),
        ("threadgroup uchar s[B ? 7 : 3];", 7),
        ("threadgroup alignas(16) bfloat4 s[4];", 32),
        ("threadgroup float3 s[2];", 32),
        ("threadgroup atomic_uint s[3];", 12),
        ("constexpr int M = N + 1; threadgroup float s[M][M];", 4 * 81),
        ("constexpr uint M = 4u * SIMD; threadgroup float s[M];", 4 * 128),
        ("threadgroup float s[2];\n if (true) { threadgroup ulong t[N]; }", 8 + 64),
        ("threadgroup float s[4]; threadgroup float* p = s + 1 * 2;", 16),
        ("threadgroup float4 s[4]; auto p = (threadgroup float*)(s);", 64),
        ("threadgroup const float* p = nullptr; threadgroup auto& q = *p;", 0),
        ("threadgroup_barrier(mem_flags::mem_threadgroup);", 0),
    ],
)
def test_threadgroup_memory_is_counted_for_one_instance(make, body, n_bytes):
    text = kernel("device T* y", body, "template <typename T, int N, bool B>")
    found = make(text, "constexpr constant int SIMD = 32;")["k"]
    assert found.threadgroup_bytes({"N": 8, "B": True}, NAMES) == n_bytes


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("threadgroup float s[M];", r"size \[M\]: 'M' is not a known number"),
        ("threadgroup float s[sizeof(T)];", r"size \[sizeof\(T\)\]"),
        ("threadgroup float s[];", r"size \[\]"),
        ("threadgroup float s[4 / 0];", "division by zero"),
        ("threadgroup Pair s[4];", "scalar or vector type but got 'Pair'"),
        ("threadgroup vec<T, 4> s[4];", "expected threadgroup arrays"),
        ("threadgroup float (&s)[4] = t;", "expected threadgroup arrays"),
    ],
)
def test_uncountable_threadgroup_memory_is_an_error(body, message):
    found = read("device float* y", f"\n\n  {body}", "template <typename T>\n")
    with pytest.raises(KernelError, match=rf"^\[some.metal:4\] .*{message}"):
        found.threadgroup_bytes({}, NAMES)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("0x1F", 31),
        ("32u", 32),
        ("N", 8),
        ("2 + 3 * N", 26),
        ("(2 + 3) * N", 40),
        ("17 / 4 + 17 % 4", 5),
        ("-7 / 2", -3),
        ("-7 % 2", -1),
        ("1 << 3 + 1", 16),
        ("N >> 1", 4),
        ("N > 4 ? 1 : 2", 1),
        ("N > 4 ? N == 8 ? 3 : 4 : 5", 3),
        ("N < 4 ? 1 : N < 9 ? 2 : 3", 2),
        ("(N != 8 || !true) + 2", 2),
        ("N >= 8 && N <= 8", 1),
        ("uint(N) * int(2 - 1)", 8),
        ("true + false", 1),
    ],
)
def test_a_constant_expression_has_the_value_it_has_in_c(text, value):
    assert evaluate(text, {"N": 8}) == value


@pytest.mark.parametrize(
    "text", ["", "M", "1 +", "(1", "1)", "1.5f", "f(2)", "1 / 0", "N = 3", "1 2", "a.b"]
)
def test_anything_else_is_not_a_constant_expression(text):
    with pytest.raises(ValueError):
        evaluate(text, {"N": 8})


@given(
    st.recursive(
        st.integers(0, 9).map(str),
        lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner).map(
            lambda parts: f"({' '.join(parts)})"
        ),
        max_leaves=12,
    )
)
def test_sums_and_products_are_python_s(text):
    assert evaluate(text, {}) == eval(text)


# Registered kernels.
SHARED = """
// Used by all.
inline float deep(float x) { return x; /* not this */ }
inline float middle(float x) { return deep(x); }
inline float unused(float x) { return deep(x) + 1.0f; }
#define LIMIT 4  // a macro
struct Pair { float a; };
#include <metal_stdlib>
using namespace metal;
"""
USING = """
#include "moeflux.h"
constant float TABLE[1] = {3.0f};
inline Pair pair(float x) { return {x}; }
inline float pair(int x) { return 0.0f; }
// Why.
[[kernel]] void first(device float* y) {
  // Comment.
  y[0] = middle(1.0f);  // more
}
[[kernel]] void second(device const float* x, device float* y,
                       uint i [[thread_position_in_grid]]) {
  y[i] = i < LIMIT ? pair(x[i]).a : TABLE[0];
}
"""


def test_a_header_holds_only_declarations_that_the_kernel_reaches(make):
    found = make(USING, SHARED)
    assert found.header(found["first"]) == (
        "inline float deep(float x) { return x; }\n"
        "inline float middle(float x) { return deep(x); }\n"
        "#include <metal_stdlib>\n"
    )
    # Both functions of this name are included, and the type that one returns.
    assert found.header(found["second"]) == (
        "#define LIMIT 4\n"
        "struct Pair { float a; };\n"
        "#include <metal_stdlib>\n"
        "constant float TABLE[1] = {3.0f};\n"
        "inline Pair pair(float x) { return {x}; }\n"
        "inline float pair(int x) { return 0.0f; }\n"
    )


def test_helpers_of_another_file_are_not_seen(make):
    other = "inline float middle(float x) { return 2.0f; }"
    found = make(USING, SHARED, other=other)
    assert "2.0f" not in found.header(found["first"])


def test_a_body_has_our_names_of_the_attributes_and_no_comments(make):
    found = make(USING, SHARED)
    assert found.body(found["first"]) == "{\ny[0] = middle(1.0f);\n}"
    assert found.body(found["second"]) == (
        "const uint i = thread_position_in_grid.x;\n"
        "{\ny[i] = i < LIMIT ? pair(x[i]).a : TABLE[0];\n}"
    )


def test_a_fingerprint_changes_only_with_source_that_the_kernel_uses(make):
    before = make(USING, SHARED).fingerprint("first")
    commented = SHARED.replace("Used by all", "Another comment").replace("+ 1.0f", "")
    assert make(USING.replace("Why", "How"), commented).fingerprint("first") == before
    assert make(USING, SHARED.replace("return x;", "return -x;")).fingerprint(
        "first"
    ) not in (before, make(USING, SHARED).fingerprint("first", "more"))


def lines_by_directive(text: str) -> list[tuple[str, int, str]]:
    """Return file, number and text of every line placed by a ``#line`` directive."""
    found, file, number = [], "", 0
    for line in text.split("\n"):
        directive = re.fullmatch(r'#line (\d+) "(.+)"', line)
        if directive:
            number, file = int(directive[1]), directive[2]
        else:
            found.append((file, number, line.strip()))
            number += 1
    return [place for place in found if place[0] and place[2] not in ("", "}")]


def test_line_directives_name_the_line_that_a_text_came_from(make):
    found = make(USING, SHARED)
    second = found["second"]
    assert lines_by_directive(found.header(second, lines=True))[:2] == [
        (HEADER, 6, "#define LIMIT 4"),
        (HEADER, 7, "struct Pair { float a; };"),
    ]
    assert lines_by_directive(found.body(second, lines=True)) == [
        ("some.metal", 13, "y[i] = i < LIMIT ? pair(x[i]).a : TABLE[0];")
    ]


def test_line_directives_of_our_kernels_are_right():
    originals = {
        path.name: without_comments(path.read_text()).split("\n")
        for path in kernels_folder().glob("*.*")
        if path.suffix in (".h", ".metal")
    }
    for found in library():
        texts = (library().header(found, lines=True), library().body(found, lines=True))
        for text in texts:
            assert lines_by_directive(text)
            for file, number, line in lines_by_directive(text):
                assert line in originals[file][number - 1], (file, number)


def test_our_kernels_are_named_as_their_files_declare():
    for found in library():
        text = (kernels_folder() / found.place.file).read_text()
        line = text.split("\n")[found.place.line - 1]
        assert line.startswith(("template <", "[[kernel]] void")), found.place
        assert library()[found.name] is found


# Random signatures.
SPACES = st.lists(
    st.sampled_from([" ", "\n", "\t", " // why, ({<\n", "/* a, b */", "/* (\n */"]),
    max_size=2,
).map("".join)
STEMS = st.from_regex(r"[A-Za-z_][a-z_]{0,5}", fullmatch=True)


@st.composite
def signatures(draw) -> tuple[list[TemplateParameter], list, str]:
    """Return the template, parameters and source of a valid signature."""
    counter = iter(range(100))

    def name() -> str:
        return f"{draw(STEMS)}{next(counter)}"

    kinds = draw(st.lists(st.sampled_from(["typename", "int", "bool"]), max_size=4))
    template = [TemplateParameter(kind, name()) for kind in kinds]
    types = [*DTYPES, *(p.name for p in template if p.kind == "typename")]
    parameters: list = []
    for is_array in draw(st.lists(st.booleans(), max_size=5)):
        kind = draw(st.sampled_from(types if is_array else list(DTYPES)))
        parameters.append((Input if is_array else Scalar)(kind, name()))
    for kind in draw(st.lists(st.sampled_from(types), min_size=1, max_size=3)):
        parameters.append(Output(kind, name()))
    for attribute in draw(st.lists(st.sampled_from([*ATTRIBUTES]), max_size=3)):
        width = draw(st.integers(1, ATTRIBUTES[attribute]))
        parameters.append(Attribute(width, name(), attribute))
    tokens = spelling(template, parameters)
    return template, parameters, "".join(t + draw(SPACES) for t in tokens)


def spelling(template: list[TemplateParameter], parameters: list) -> list[str]:
    """Return tokens; a token includes the space that must follow it."""
    tokens = ["template ", "<"] if template else []
    for p in template:
        tokens += [f"{p.kind} ", p.name, ","]
    if template:
        tokens[-1] = "> "
    tokens += ["[[kernel]] ", "void ", "k", "("]
    for p in parameters:
        tokens += {
            Input: lambda p: ["device ", "const ", f"{p.type} ", "*", p.name],
            Scalar: lambda p: ["constant ", f"{p.type} ", "&", p.name],
            Output: lambda p: ["device ", f"{p.type} ", "*", p.name],
            Attribute: lambda p: [
                "uint " if p.width == 1 else f"uint{p.width} ",
                f"{p.name} ",
                "[[",
                p.attribute,
                "]]",
            ],
        }[type(p)](p)
        tokens.append(",")
    return [*tokens[:-1], ")", "{", "}"]


@pytest.mark.slow
@given(signatures())
def test_any_valid_signature_is_read_correctly(tmp_path_factory, signature):
    template, parameters, text = signature
    path = tmp_path_factory.getbasetemp() / "any.metal"
    path.write_text(text)
    (declaration,) = declarations(path)
    found = parse(declaration)
    assert list(found.template) == template
    assert list(found.parameters) == parameters
    assert found.body.strip() == ""
