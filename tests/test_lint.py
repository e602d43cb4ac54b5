"""The lint of Metal source: a bad text and a similar good one for every rule."""

from __future__ import annotations

from pathlib import Path

import pytest

from moeflux_mlx.engine.metal.library import metal_files
from moeflux_mlx.proof import lint

# Rule, a bad text with the line of its finding, and a similar good text.
CASES = [
    (
        "lambda",
        3,
        """
        void f(thread float* x) {
          auto twice = [&](float v) { return v + v; };
          x[0] = twice(x[1]);
        }""",
        """
        [[kernel]] void f(device float* x [[buffer(0)]], uint i [[user(a)]]) {
          x[i] = (x[i + 1]) * x[int(x[i])];
        }""",
    ),
    (
        "recursion",
        2,
        """
        int f(int n) { return n > 0 ? f(n - 1) : 0; }""",
        """
        float f(float x, float y) { return x; }
        float f(float x) { return f(x, metal::f(x)); }
        bool g(bool x) { return g(uint(x)); }
        uint g(uint x) { return x; }""",
    ),
    (
        "recursion",
        3,
        """
        int g(int n);
        int f(int n) { return g(n); }
        int h(int n) { return f(n); }
        int g(int n) { return n > 0 ? f(n - 1) : 0; }""",
        """
        int g(int n) { return n; }
        int f(int n) { return g(n) + g(n); }""",
    ),
    (
        "member",
        4,
        """
        struct Tile {
          float v[4];
          thread float& at(short i) { return v[i]; }
        };""",
        """
        struct Tile {
          float v[4];
          thread float& at(short i) thread { return v[i]; }
          float first() const device { return v[0]; }
          static int n() { return 4; }
        };
        inline float sum(thread Tile& t) { return t.at(0) + t.at(1); }""",
    ),
    (
        "member",
        6,
        """
        namespace a {
        template <typename T>
        class Tile {
         public:
          Tile() : v(0) {}
          T v;
        };
        }""",
        """
        template <typename T>
        class Tile {
         public:
          Tile() thread : v(0) {}
          T operator()(int i) const thread { return v + i; }
          T v;
        };""",
    ),
    (
        "goto",
        3,
        """
        void f() {
          goto end;
        end:
          return;
        }""",
        """
        // goto is only mentioned
        void f(int goto_end) {}""",
    ),
    (
        "double",
        3,
        """
        float f(float x) {
          double y = x;
          return float(y);
        }""",
        """
        // A literal without suffix is a float in Metal.
        float f(float doubled) { return 2.0 * doubled + 1e5f; }""",
    ),
    (
        "double",
        2,
        """
        float f(float x) { return float(1.5L); }""",
        """
        long f(long x) { return x + 15L; }""",
    ),
    (
        "double",
        2,
        """
        ulong f(long long x) { return ulong(x); }""",
        """
        ulong f(long x, long y) { return ulong(x); }""",
    ),
    (
        "static",
        3,
        """
        int f() {
          static int n = 0;
          return n;
        }""",
        """
        static int f() {
          static constexpr constant int N = 3;
          return N;
        }""",
    ),
    (
        "global",
        3,
        """
        constant int A = 1;
        constexpr int B = 2;
        int f() { return A + B; }""",
        """
        #define LIMIT 4
        constexpr constant int A = 1;
        constant float TABLE[2] = {0.0f, 1.0f};
        constant bool FLAG [[function_constant(0)]];
        using Row = float4;
        typedef uint Word;
        struct Pair { float a; float b; };
        enum Kind { First = 1 };
        template <typename T> T f(T x);
        static_assert(A == 1, "one");""",
    ),
    (
        "global",
        3,
        """
        struct S {
          static constexpr int N = 4;
          float x;
        };""",
        """
        struct S {
          static constexpr constant int N = 4;
          static float f(float x) { return x; }
          float x = 0.0f;
        };""",
    ),
    (
        "threadgroup",
        3,
        """
        void f(threadgroup float* x) {
          threadgroup float shared[32];
          shared[0] = x[0];
        }""",
        """
        void f(threadgroup float* x) {
          threadgroup float* row = x + 1;
          threadgroup float& first = x[0];
          threadgroup vec<float, 2>* pairs = (threadgroup vec<float, 2>*)x;
          threadgroup_barrier(mem_flags::mem_threadgroup);
        }
        [[kernel]] void k(device float* y) {
          threadgroup float shared[32];
          f(shared);
        }""",
    ),
    (
        "initialiser",
        3,
        """
        kernel void k(device float* y) {
          threadgroup float shared[2] = {0.0f, 1.0f};
        }""",
        """
        kernel void k(device float* y) {
          threadgroup float shared[2];
          threadgroup float* row = shared;
          threadgroup_barrier(mem_flags::mem_threadgroup);
        }""",
    ),
    (
        "32KiB",
        3,
        """
        constant int N = 4096;
        kernel void k(device float* y) {
          constexpr int M = 2 * N;
          threadgroup float a[M], b[1];
        }""",
        """
        constant int N = 4096;
        template <int M>
        kernel void k(device float* y) {
          threadgroup float a[N];
          threadgroup half3 b[2048];
          threadgroup float c[M];
        }""",
    ),
    (
        "pointer",
        2,
        """
        kernel void k(device const float* x, const float* w, device float* y) {}""",
        """
        kernel void k(const device float* x, constant uint& n, device float* y) {}""",
    ),
    (
        "pointer",
        2,
        """
        void f(float& x) { x = 1.0f; }""",
        """
        template <typename P> float f(P p, int n = 2 * 3) { return p[n]; }
        void g(thread float& x, texture2d<float> t, bool both = true && true) {}""",
    ),
    (
        "pointer",
        3,
        """
        void f(thread float* x) {
          const float* row = x;
        }""",
        """
        void f(thread float* x, int a, int b) {
          thread float* row = x;
          auto* other = x;
          *row = a > b ? a * b : b * a;
          int c = a * b;
        }""",
    ),
    (
        "function-pointer",
        2,
        """
        using Step = void (*)(int);""",
        """
        void f(thread float* x) {
          device float (*rows)[4] = nullptr;
          float y = (*x) * (*x);
          return (*x > y) ? void() : void();
        }""",
    ),
    (
        "function-pointer",
        2,
        """
        float f(float (*g)(float), float x) { return g(x); }""",
        """
        float f(float g, float x) { return (g) * (x); }""",
    ),
    *(
        ("host-c++", 3, f"\nvoid f() {{\n  {line}\n}}", good)
        for line, good in {
            "auto x = new (y) z;": "\nvoid f(int new_value) {}",
            "delete x;": "\nstruct S { S(int) = delete; };",
            "try { g(); } catch (...) {}": "\nvoid f(int tries) { /* try */ }",
            "auto t = typeid(int).name();": "\nvoid f(int type_id) {}",
            "thread_local int n;": "\nvoid f(int n_local) {}",
        }.items()
    ),
    (
        "host-c++",
        3,
        """
        struct S {
          virtual float f() { return 1.0f; }
        };""",
        """
        struct S {
          float virtual_f() thread { return 1.0f; }
        };""",
    ),
    (
        "std",
        2,
        """
        float f(float x) { return std::max(x, 0.0f); }""",
        """
        float f(float x) { return metal::max(x, 0.0f); }""",
    ),
    (
        "string",
        3,
        """
        void f() {
          constant char* name = "rows";
        }""",
        """
        void f(device const char* bytes) {
          static_assert(sizeof(char) == 1, "one byte");
          char c = 'c';
        }
        template [[host_name("f_1")]] [[kernel]] decltype(f<1>) f<1>;""",
    ),
    (
        "array",
        3,
        """
        void f(int n) {
          float x[n];
        }""",
        """
        constant int WIDE = 4;
        template <int N> void f(int n) {
          constexpr int HALF = N / 2;
          float a[N], b[HALF + 1];
          float c[WIDE];
          c[n] = a[n];
          for (int i = 0; i < n; ++i) c[0] += b[i];
        }""",
    ),
    (
        "array",
        4,
        """
        void f() {
          uint n = 4;
          uint keys[2 * n];
        }""",
        """
        void f() {
          const uint n = 4;
          uint keys[2 * n];
        }""",
    ),
    (
        "buffer",
        2,
        """
        kernel void k(device float* y [[buffer(31)]]) {}""",
        """
        kernel void k(device float* y [[buffer(30)]]) {}""",
    ),
    (
        "buffer",
        4,
        """
        kernel void k(
            device const float* x [[buffer(1)]],
            device float* y [[buffer(1)]]) {}""",
        """
        kernel void k(device float* y [[buffer(1)]]) {}
        kernel void l(device float* y [[buffer(1)]]) {}""",
    ),
    (
        "31-buffers",
        2,
        "\nkernel void k("
        + ", ".join(f"device float* x{i}" for i in range(32))
        + ") {}",
        "\nkernel void k("
        + ", ".join(f"constant float& x{i}" for i in range(31))
        + ", threadgroup float* s, uint i [[thread_position_in_grid]]) {}",
    ),
    (
        "bfloat",
        5,
        """
        template <typename T>
        kernel void k(device const T* x, device T* y, uint i) {
          float sum = float(x[i]);
          y[i] = sum * 2.0f;
        }""",
        """
        template <typename T>
        kernel void k(device const T* x, device T* y, device float* z, uint i) {
          float sum = float(x[i]);
          y[i] = T(sum * 2.0f);
          y[i + 1] = static_cast<T>(sum);
          y[i + 2] = x[uint(sum)];
          y[i + 3] = sum > 0.0f ? x[i] : T(0.0f);
          z[i] = sum;
        }""",
    ),
    (
        "bfloat",
        3,
        """
        bfloat f(float x) {
          return x > 0.0f ? x : 0.0f;
        }""",
        """
        bfloat f(float x) {
          return bfloat(x > 0.0f ? x : 0.0f);
        }
        half g(float x) { return x; }""",
    ),
    (
        "bfloat",
        4,
        """
        void f(device const bfloat* x, device bfloat* y) {
          y[0] = x[1];
          bfloat4 row = float4(x[0]);
        }""",
        """
        void f(device const bfloat* x, device bfloat* y) {
          float first = x[0];
          bfloat4 row = bfloat4(float4(first));
          y[0] = row.x;
        }""",
    ),
    (
        "bfloat",
        3,
        """
        template <typename T> void f(device T* y, float x) {
          if (x > 0.0f) *y += x;
        }""",
        """
        template <typename T> void f(device T* y, float x) {
          *y = T(float(*y) + x);
        }""",
    ),
    (
        "cast",
        2,
        """
        float4 f(uint4 x) { return (float4)x; }""",
        """
        float4 g(float4);
        float4 f(device const uint4* x, float4 y) {
          device const float4* z = (device const float4*)x;
          return float4(x[0]) + (y) + sizeof(float4) * z[0] + (float)x[0].x;
        }""",
    ),
    (
        "attribute",
        2,
        """
        kernel void k(device float* y, uint i [[thread_position_in_gird]]) {}""",
        """
        [[max_total_threads_per_threadgroup(64)]]
        kernel void k(device float* y, uint i [[thread_position_in_grid]]) {
          y[y[i] > 0.0f ? 1 : 0] = 1.0f;
        }""",
    ),
    (
        "library",
        2,
        """
        float f(float x) { return log1p(x) + exp(x); }""",
        """
        inline float log1p(float x) { return log(1.0f + x); }
        float f(float x) { return log1p(x) + rsqrt(x) + precise::exp(x); }""",
    ),
    (
        "library",
        3,
        """
        void f(float x) {
          printf("%f", x);
        }""",
        """
        void f(float printf_x) {}""",
    ),
]
IDS = [f"{case[0]}-{i}" for i, case in enumerate(CASES)]


@pytest.mark.parametrize(("rule", "line", "bad", "good"), CASES, ids=IDS)
def test_a_rule_names_the_line_and_passes_similar_text(rule, line, bad, good):
    found = [(f.line, f.rule) for f in lint.check(bad) if f.rule == rule]
    assert found[:1] == [(line, rule)]
    assert [str(f) for f in lint.check(good)] == []


def test_every_rule_has_a_case():
    assert {rule.name for rule in lint.RULES} == {case[0] for case in CASES}


@pytest.mark.parametrize("path", metal_files(), ids=lambda path: path.name)
def test_our_kernels_have_no_finding(path):
    assert [str(f) for f in lint.check(path)] == []


def test_a_good_text_has_no_finding_at_all():
    text = """
    #include <metal_stdlib>
    using namespace metal;
    template <typename T> [[kernel]] void k(
        device const T* x, constant uint& n, device T* y,
        uint i [[thread_position_in_grid]]) {
      threadgroup float s[32];
      if (i < n) { s[i % 32] = 2.0f * float(x[i]); y[i] = T(s[i % 32]); }
    }"""
    assert lint.check(text) == []


def test_findings_come_by_line_with_the_name_they_were_given():
    found = lint.check("void f() {\n  goto end;\n  double x;\n}", "k.metal")
    assert [str(f).split(": ")[:2] for f in found] == [
        ["k.metal:2", "goto"],
        ["k.metal:3", "double"],
    ]


def test_text_other_than_metal_is_read_without_an_error():
    for text in (
        "",
        "}}})",
        "template <",
        "kernel void k(",
        "#if A\n{\n#else\n{\n",
        "[",
    ):
        lint.check(text)


def test_only_the_first_branch_of_an_if_is_read_and_lines_stay():
    text = "#if A\nint f() {\n#else\ndouble f() {\n#endif\n  goto x;\n}\nvoid g() {}"
    assert [(f.line, f.rule) for f in lint.check(text)] == [(6, "goto")]
    text = "#if 0\ndouble a;\n#elif B\nvoid f() { goto x; }\n#else\ndouble b;\n#endif"
    assert [(f.line, f.rule) for f in lint.check(text)] == [(4, "goto")]


def test_a_header_beside_the_file_adds_its_declarations(tmp_path: Path):
    (tmp_path / "a.h").write_text('#include "b.h"\nconstant int N = 9000;')
    (tmp_path / "b.h").write_text("inline float erf(float x) { return x; }")
    file = tmp_path / "k.metal"
    file.write_text(
        '#include "a.h"\nkernel void k(device float* y) {\n'
        "  threadgroup float s[N];\n  y[0] = erf(s[0]);\n}\n"
    )
    assert [(f.line, f.rule) for f in lint.check(file)] == [(2, "32KiB")]


def test_the_command_prints_findings_and_fails(tmp_path: Path, capsys):
    bad, good = tmp_path / "bad.metal", tmp_path / "good.metal"
    bad.write_text("void f() {\n  goto end;\n}\n")
    good.write_text("void f() {}\n")
    assert lint.main([str(good)]) == 0
    assert lint.main([str(good), str(bad)]) == 1
    assert capsys.readouterr().out == f"{bad}:2: goto: there is no goto: goto\n"
