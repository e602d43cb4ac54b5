"""Every check between a kernel's arguments and its launch, on every kernel."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from moeflux_mlx.engine.launch import KERNELS, Kernel, Launch, base, prepare, prepared
from moeflux_mlx.engine.launch.base import ceil_div, dims, expect, kernel, require
from moeflux_mlx.engine.metal import Library
from moeflux_mlx.engine.metal.library import HEADER
from moeflux_mlx.errors import KernelError

X, W = mx.ones((3, 8), mx.float16), mx.ones((8,), mx.bfloat16)
# A kernel whose launch has every kind of part.
METAL = """
template <typename T, typename W, typename U, int N, bool B>
[[kernel]] void every(
    device const T* x, device const W* w, device const uint* where,
    constant uint& n, constant int& offset, constant float& eps,
    device T* y, device U* sums, uint i [[thread_position_in_grid]]) {
  threadgroup T tile[N];
}
"""
EVERY = Launch(
    "every",
    {
        "x": X,
        "w": W,
        "where": mx.array([1, 2], mx.uint32),
        "n": 3,
        "offset": -4,
        "eps": 1e-5,
    },
    {"y": (3, 8), "sums": (3,)},
    (96, 3, 1),
    (32, 1, 1),
    {"N": 64, "B": True},
    {"U": mx.float32},
)


@pytest.fixture
def use(tmp_path, monkeypatch) -> Callable[[str], None]:
    """Check launches against the kernels of a source text."""

    def write(metal: str) -> None:
        (tmp_path / HEADER).write_text("")
        (tmp_path / "some.metal").write_text(metal)
        found = Library(tmp_path)
        monkeypatch.setattr(prepared, "library", lambda: found)

    write(METAL)
    return write


def changed(part: str, **values: Any) -> Launch:
    """Return the launch with entries of one part changed, or removed if None."""
    entries = {**getattr(EVERY, part), **values}
    kept = {name: value for name, value in entries.items() if value is not None}
    return dataclasses.replace(EVERY, **{part: kept})


# Valid launches.
def test_a_launch_is_put_into_the_order_of_the_signature(use):
    shuffled = dataclasses.replace(
        EVERY,
        inputs=dict(reversed(EVERY.inputs.items())),
        outputs=dict(reversed(EVERY.outputs.items())),
        template=dict(reversed(EVERY.template.items())),
    )
    for launch in (EVERY, shuffled):
        ready = prepare(launch)
        assert ready.kernel.name == "every"
        assert [x.shape for x in ready.inputs] == [(3, 8), (8,), (2,), (), (), ()]
        assert [x.item() for x in ready.inputs[3:5]] == [3, -4]
        kinds = [x.dtype for x in ready.inputs]
        assert kinds == [
            mx.float16,
            mx.bfloat16,
            mx.uint32,
            mx.uint32,
            mx.int32,
            mx.float32,
        ]
        assert list(ready.instance.values.items()) == [
            ("T", mx.float16),
            ("W", mx.bfloat16),
            ("U", mx.float32),
            ("N", 64),
            ("B", True),
        ]
        assert type(ready.instance.values["B"]) is bool
        assert (ready.grid, ready.threadgroup) == ((96, 3, 1), (32, 1, 1))
        assert ready.output_shapes == [(3, 8), (3,)]
        assert ready.output_dtypes == [mx.float16, mx.float32]


def test_a_number_may_be_an_array_of_one_value(use):
    for value in (mx.array(7, mx.uint32), mx.array([7], mx.uint32), np.int64(7), 7):
        found = prepare(changed("inputs", n=value)).inputs[3]
        assert (found.shape, found.item()) == ((), 7)


def test_a_number_becomes_an_array_once(use):
    assert prepare(EVERY).inputs[3] is prepare(EVERY).inputs[3]


def test_a_launch_like_an_earlier_one_has_arrays_and_numbers_of_its_own(use):
    prepare(EVERY)
    other = X + 1
    found = prepare(changed("inputs", x=other, n=5))
    assert found.inputs[0] is other
    assert (found.inputs[3].item(), found.numbers["n"]) == (5, 5)
    with pytest.raises(KernelError, match="n: expected a number that fits"):
        prepare(changed("inputs", x=other, n=-1))


# Compiled-in values.
def test_numbers_that_do_not_vary_are_compiled_in_and_not_bound(use, monkeypatch):
    monkeypatch.setitem(prepared.FIXED, "every", frozenset({"n", "eps"}))
    found = prepare(EVERY)
    names = [p.name for p in found.instance.inputs]
    assert names == ["x", "w", "where", "offset"]
    assert [x.item() for x in found.inputs[3:]] == [-4]
    assert list(found.instance.values.items())[5:] == [("n", 3), ("eps", 1e-5)]
    assert prepare(changed("inputs", offset=7)).instance is found.instance
    assert prepare(changed("inputs", n=np.int64(3))).instance is found.instance
    assert prepare(changed("inputs", n=4)).instance is not found.instance
    for n, message in ((-1, "a number that fits"), ([3], "a whole number")):
        with pytest.raises(KernelError, match=rf"^\[every\] n: expected {message}"):
            prepare(changed("inputs", n=n))
    as_array = prepare(changed("inputs", n=mx.array(3, mx.uint32)))
    assert "n" in [p.name for p in as_array.instance.inputs]


def test_an_input_is_absent_exactly_where_the_template_says_so(use):
    use(METAL.replace("bool B", "bool HAS_WHERE"))

    def launch(has: bool, where: Any) -> Launch:
        template = {"N": 64, "HAS_WHERE": has}
        return dataclasses.replace(
            EVERY, template=template, inputs={**EVERY.inputs, "where": where}
        )

    absent = prepare(launch(False, None))
    assert "where" not in [p.name for p in absent.instance.inputs]
    assert [x.shape for x in absent.inputs] == [(3, 8), (8,), (), (), ()]
    assert prepare(launch(True, EVERY.inputs["where"])).inputs[2].shape == (2,)
    with pytest.raises(KernelError, match=r"where: expected an mx\.array"):
        prepare(launch(True, None))
    with pytest.raises(KernelError, match="where: expected None, HAS_WHERE being fals"):
        prepare(launch(False, EVERY.inputs["where"]))
    with pytest.raises(KernelError, match="n: expected a whole number but got None"):
        inputs = {**EVERY.inputs, "where": None, "n": None}
        prepare(dataclasses.replace(launch(False, None), inputs=inputs))


# Letters of a family's sizes that change while a model runs: sequences, tokens, rows,
# parts of a cache, tokens of an expert.
CHANGING = {
    "attention": "btsrp",
    "elementwise": "tn",
    "embed": "t",
    "linear_attention": "btn",
    "mla": "ts",
    "moe": "tm",
    "norm": "t",
    "quant": "t",
}
# In these kernels the letter means something else, or there is only one token.
OTHERWISE = {("attention_inputs", "s"), ("gated_delta_net_step", "t")}
LONGER = [
    pytest.param(kernel, letter, id=f"{kernel.name}-{letter}")
    for kernel in KERNELS.values()
    for letter in CHANGING.get(kernel.family, "")
    if letter in kernel.sizes[0] and (kernel.name, letter) not in OTHERWISE
]


@pytest.mark.parametrize(("kernel", "letter"), LONGER)
def test_a_kernel_is_compiled_once_for_any_number_of_tokens(kernel, letter):
    # More rows than tokens, and more tokens than one expert has.
    roomy = {"t": "s", "m": "t"}.get(letter)
    sizes = dict(kernel.sizes[0])
    if roomy in sizes and roomy in CHANGING[kernel.family]:
        sizes[roomy] = 8

    def instance(n: int) -> Any:
        arguments = kernel.arguments(kernel.dtypes[0], **{**sizes, letter: n})
        return prepare(kernel(*arguments)).instance

    # Enough rows that the cache's splits grow with them.
    n = 1500 if letter == "s" else sizes[letter]
    assert instance(n) is instance(4 * n)


def test_the_limits_themselves_are_allowed(use):
    most = dataclasses.replace(
        EVERY, threadgroup=(1024, 1, 1), grid=(2**31 - 1024, 1, 1)
    )
    assert prepare(most).threadgroup == (1024, 1, 1)
    assert prepare(changed("template", N=16 << 10))
    assert prepare(changed("inputs", n=2**32 - 1, offset=-(2**31)))


# Invalid launches.
@pytest.mark.parametrize(
    ("launch", "message"),
    [
        (changed("inputs", w=None), r"inputs: expected .* but got"),
        (changed("inputs", more=W), r"inputs: expected .* but got .*'more'"),
        (changed("outputs", y=None), r"outputs: expected \['sums', 'y'\] .*\['sums'\]"),
        (changed("outputs", z=(1,)), r"outputs: expected .* but got .*'z'"),
        (changed("template", N=None), r"template: expected \['B', 'N'\] .*\['B'\]"),
        (changed("template", T=1), r"template: expected .* but got .*'T'"),
        (changed("types", U=None), "U: expected a type given by an input"),
        (changed("types", V=mx.float32), r"types: expected .*'U'.* but got \['V'\]"),
    ],
)
def test_names_are_those_of_the_signature(use, launch, message):
    with pytest.raises(KernelError, match=rf"^\[every\] {message}"):
        prepare(launch)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", 3, "an mx.array but got int"),
        ("x", np.ones((3, 8), np.float16), "an mx.array but got ndarray"),
        ("x", [1.0], "an mx.array but got list"),
        ("x", mx.zeros((3, 0), mx.float16), r"an array with elements .*\(3, 0\)"),
        ("x", mx.array(1.0, mx.float16), r"an array with elements .*\(\)"),
        ("where", mx.array([1, 2], mx.int32), ".*uint32 but got .*int32"),
        ("where", mx.array([1.0]), ".*uint32 but got .*float32"),
        ("n", mx.array(3, mx.int32), "one .*uint32 value but got .*int32"),
        ("n", mx.array([3, 4], mx.uint32), r"one .*uint32 value but got .*\(2,\)"),
        ("n", -1, "a number that fits .*uint32 but got -1"),
        ("n", 2**32, "a number that fits .*uint32 but got 4294967296"),
        ("offset", 2**31, "a number that fits .*int32"),
        ("offset", -(2**31) - 1, "a number that fits .*int32"),
    ],
)
def test_an_input_has_the_type_and_range_of_its_parameter(use, name, value, message):
    with pytest.raises(KernelError, match=rf"^\[every\] {name}: expected {message}"):
        prepare(changed("inputs", **{name: value}))


def test_inputs_of_one_template_type_agree(use):
    use(METAL.replace("typename W, ", "").replace("const W*", "const T*"))
    with pytest.raises(KernelError, match=r"^\[every\] w: expected .*float16 but got"):
        prepare(EVERY)


@pytest.mark.parametrize("value", [2.5, math.nan, "3", None.__class__, object()])
def test_a_whole_number_is_not_rounded(use, value):
    with pytest.raises(KernelError, match=r"^\[every\] n: expected a whole number"):
        prepare(changed("inputs", n=value))
    with pytest.raises(KernelError, match=r"^\[every\] N: expected a whole number"):
        prepare(changed("template", N=value))


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1, 2**64])
def test_a_template_number_fits_int(use, value):
    with pytest.raises(KernelError, match=r"^\[every\] N: expected a number that fits"):
        prepare(changed("template", N=value))


def test_a_number_is_a_number(use):
    with pytest.raises(KernelError, match=r"^\[every\] eps: expected a number"):
        prepare(changed("inputs", eps="small"))


def test_a_truth_value_is_true_or_false(use):
    with pytest.raises(KernelError, match=r"^\[every\] B: expected 0 or 1 but got 2"):
        prepare(changed("template", B=2))


@pytest.mark.parametrize("dtype", [mx.int32, mx.uint8, mx.bool_, mx.complex64])
def test_a_type_of_the_template_is_a_float(use, dtype):
    with pytest.raises(
        KernelError, match=r"^\[every\] x: expected .*float32 or .*float"
    ):
        prepare(changed("inputs", x=X.astype(dtype)))
    with pytest.raises(
        KernelError, match=r"^\[every\] U: expected .*float32 or .*float"
    ):
        prepare(changed("types", U=dtype))


@pytest.mark.parametrize(
    "shape", [(3, 0), (-1,), (3, -8), (2.5,), (3, None), "38", 3, (np.float32(2),)]
)
def test_an_output_has_a_shape_of_positive_whole_sizes(use, shape):
    wanted = r"^\[every\] y: expected a shape of positive sizes"
    with pytest.raises(KernelError, match=wanted):
        prepare(changed("outputs", y=shape))


@pytest.mark.parametrize("part", ["grid", "threadgroup"])
@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((32, 1), "three positive numbers"),
        ((32, 1, 1, 1), "three positive numbers"),
        ((0, 1, 1), "three positive numbers"),
        ((32, -1, 1), "three positive numbers"),
        ((32.0, 1, 1), "three positive numbers"),
        (("32", 1, 1), "three positive numbers"),
        ((1, 1, 2**31), r"numbers below 2\^31"),
    ],
)
def test_threads_are_counted_in_three_positive_numbers(use, part, size, message):
    with pytest.raises(KernelError, match=rf"^\[every\] {part}: expected {message}"):
        prepare(dataclasses.replace(EVERY, **{part: size}))


@pytest.mark.parametrize("size", [(1025, 1, 1), (32, 33, 1), (8, 8, 17)])
def test_a_threadgroup_has_at_most_1024_threads(use, size):
    wanted = r"^\[every\] threadgroup: expected at most 1024 threads but got \d+"
    with pytest.raises(KernelError, match=wanted):
        prepare(dataclasses.replace(EVERY, grid=size, threadgroup=size))


@pytest.mark.parametrize("grid", [(31, 1, 1), (32, 3, 1), (33, 1, 1)])
def test_a_grid_is_whole_threadgroups(use, grid):
    wanted = r"^\[every\] grid: expected whole threadgroups of \(32, 2, 1\) but got"
    with pytest.raises(KernelError, match=wanted):
        prepare(dataclasses.replace(EVERY, grid=grid, threadgroup=(32, 2, 1)))


def test_threadgroup_memory_is_32_kib_for_these_types_and_numbers(use):
    wanted = r"^\[every\] threadgroup memory: expected at most 32768 .* but got 32770"
    with pytest.raises(KernelError, match=wanted):
        prepare(changed("template", N=(16 << 10) + 1))
    wide = changed("template", N=16 << 10)
    wide = dataclasses.replace(wide, inputs={**wide.inputs, "x": mx.ones((3, 8))})
    with pytest.raises(KernelError, match=r"threadgroup memory: .* but got 65536"):
        prepare(wide)


def test_a_kernel_has_at_most_31_buffers(use):
    def launch(n: int) -> Launch:
        inputs = ", ".join(f"device const float* x{i}" for i in range(n))
        use(f"[[kernel]] void many({inputs}, device float* y) {{}}")
        arrays = {f"x{i}": mx.ones((1,)) for i in range(n)}
        return Launch("many", arrays, {"y": (1,)}, (1, 1, 1), (1, 1, 1))

    assert len(prepare(launch(30)).inputs) == 30
    wanted = r"^\[many\] parameters: expected at most 31 buffers but got 32"
    with pytest.raises(KernelError, match=wanted):
        prepare(launch(31))


def test_a_kernel_that_does_not_exist_is_named(use):
    with pytest.raises(KernelError, match=r"^\[no_such\] expected a kernel"):
        prepare(dataclasses.replace(EVERY, kernel="no_such"))


# Helpers that launch functions use for checks.
def test_dims_returns_a_shape_of_the_rank_and_refuses_any_other():
    assert dims("x", X, 2) == (3, 8)
    for value in (X[0], X[None], mx.zeros((0, 8)), 3, None, np.ones((3, 8))):
        with pytest.raises(KernelError, match=r"^x: expected .* but got"):
            dims("x", value, 2)


def test_expect_refuses_any_other_shape():
    expect("x", X, [3, 8])
    for value in (X.T, X[None], X[:, :1], "x"):
        with pytest.raises(KernelError, match=r"^x: expected .* but got"):
            expect("x", value, (3, 8))


def test_require_states_the_expected_and_the_given_value():
    require("n", True, "anything", 3)
    with pytest.raises(KernelError, match=r"^n: expected a prime but got 4$"):
        require("n", False, "a prime", 4)


@given(st.integers(0, 10**9), st.integers(1, 10**5))
def test_groups_cover_exactly(n, per_group):
    found = ceil_div(n, per_group)
    assert (found - 1) * per_group < n <= found * per_group or n == found == 0


# Registration.
def register(build: Callable[..., Launch], **options: Any) -> Kernel:
    wanted: dict[str, Any] = {
        "reference": lambda x: x,
        "sample": lambda case: (mx.ones((1,)),),
        "sizes": [{}],
        "large": {},
        "varying": (),
    }
    return kernel(**{**wanted, **options})(build)


def test_a_kernel_is_registered_once_whole_and_documented():
    def residual_add(x: mx.array) -> Launch:
        """Add."""

    def undocumented(x: mx.array) -> Launch: ...

    def other(x: mx.array) -> Launch:
        """Do something."""

    for build, options, message in (
        (residual_add, {}, r"\[residual_add\] there is a kernel of that name"),
        (undocumented, {}, r"\[undocumented\] kernel lacks a docstring"),
        (other, {"reference": lambda x, y: x}, r"\[other\] reference expected one par"),
        (
            other,
            {"sample": lambda rng, dtype: ()},
            r"\[other\] sample expected one par",
        ),
        (other, {"sizes": []}, r"\[other\] kernel lacks sizes"),
    ):
        with pytest.raises(TypeError, match=message):
            register(build, **options)
    assert not {"undocumented", "other"} & set(KERNELS)


def test_a_sample_has_exactly_the_given_sizes():
    kernel = KERNELS["residual_add"]
    assert [x.shape for x in kernel.arguments(mx.float32, n=3)] == [(3,), (3,)]
    with pytest.raises(TypeError, match=r"\[residual_add\] .* knows no sizes \['m'\]"):
        kernel.arguments(mx.float32, n=3, m=4)
    with pytest.raises(AttributeError, match=r"expected a size 'n' but got \{\}"):
        kernel.arguments(mx.float32)


def test_a_reference_is_given_defaults_by_name():
    x = mx.array([[1.0, 2.0]])
    by_order, by_name = (
        KERNELS["moe_softmax_topk"].expected(*args, **options)
        for args, options in (((x, 1), {}), ((x,), {"k": 1, "normalize": False}))
    )
    assert [a.tolist() for a in by_order] == [a.tolist() for a in by_name]
    assert by_order[0].item() == 1 and abs(by_order[1].item() - 0.7310586) < 1e-6


def test_scalars_that_vary_are_named_and_are_the_signature_s(use, monkeypatch):
    use(METAL.replace("constant int& offset", "constant half& offset"))
    monkeypatch.setattr(base, "library", prepared.library)
    monkeypatch.setattr(base, "KERNELS", {})
    monkeypatch.setattr(base, "FIXED", {})

    def every(x: mx.array) -> Launch:
        """Do something."""

    for varying, message in (
        (("n_tokens",), r"varying expected some of \['n', 'offset', 'eps'\] but got"),
        (("x",), "varying expected some of"),
        (("n", "n"), "varying expected some of .* but got .*'n', 'n'"),
        (("n",), "offset expected float, or to be varying"),
    ):
        with pytest.raises(TypeError, match=rf"^\[every\] {message}"):
            register(every, varying=varying)
    assert not base.KERNELS and not base.FIXED
    with pytest.raises(TypeError, match="varying"):
        kernel(reference=every, sample=None, sizes=[{}], large={})(every)
    assert register(every, varying=("n", "offset")).fixed == {"eps"}
    assert dict(base.FIXED) == {"every": {"eps"}}


def test_an_argument_of_none_is_named_with_its_kernel():
    add = KERNELS["residual_add"]
    with pytest.raises(KernelError, match=r"^\[residual_add\] b: expected an mx.array"):
        add(mx.ones((3,)), 3)
    with pytest.raises(KernelError, match=r"^\[split_q_gate\] num_heads: expected int"):
        KERNELS["split_q_gate"](X, "2")
    with pytest.raises(KernelError, match=r"^\[residual_add\] .*'b'"):
        add(mx.ones((3,)))


# Every kernel, damaged.
DTYPES = (
    mx.float32,
    mx.float16,
    mx.bfloat16,
    mx.int32,
    mx.uint32,
    mx.uint8,
    mx.int64,
    mx.bool_,
    mx.complex64,
)
OBJECTS = (None, "x", object(), [1, 2], {}, np.ones((2, 3), np.float32), mx.ones((7,)))
Leaf = tuple[Any, Callable[[Any], Any]]


def leaves(value: Any) -> Iterator[Leaf]:
    """Yield arrays and numbers within an argument, each with how to replace it."""
    if isinstance(value, mx.array | int | float):
        yield value, lambda new: new
    elif isinstance(value, tuple):
        for i, part in enumerate(value):
            for leaf, put in leaves(part):

                def put_part(new: Any, i=i, put=put) -> tuple:
                    return (*value[:i], put(new), *value[i + 1 :])

                yield leaf, put_part
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            for leaf, put in leaves(getattr(value, field.name)):

                def put_field(new: Any, name=field.name, put=put) -> Any:
                    return dataclasses.replace(value, **{name: put(new)})

                yield leaf, put_field


def strided(x: mx.array) -> mx.array:
    """Return the same values as a strided view of a wider array."""
    return mx.repeat(x, 2, axis=-1)[..., ::2]


@st.composite
def damaged_arrays(draw, x: mx.array) -> tuple[str, Any]:
    """Return a change's name, and the changed array."""
    how = draw(
        st.sampled_from(("rank", "dtype", "longer", "shorter", "empty", "object"))
    )
    axis = draw(st.integers(0, max(0, x.ndim - 1)))
    if how == "rank":
        return how, draw(
            st.sampled_from((x[None], x[..., None], x.flatten()[None], x[0]))
        )
    if how == "dtype":
        others = [dtype for dtype in DTYPES if dtype != x.dtype]
        return how, x.astype(draw(st.sampled_from(others)))
    if how == "longer":
        return how, mx.concatenate([x, mx.take(x, mx.array([0]), axis=axis)], axis=axis)
    if how == "shorter":
        return how, mx.take(x, mx.arange(x.shape[axis] - 1), axis=axis)
    if how == "empty":
        shape = [0 if i == axis else n for i, n in enumerate(x.shape)]
        return how, mx.zeros(shape, x.dtype)
    return how, draw(st.sampled_from(OBJECTS))


@st.composite
def damaged_numbers(draw, n: float) -> tuple[str, Any]:
    """Return a change's name, and the changed number."""
    near = [-n, -1, 0, n + 1, n - 1, 2 * n + 1, n + 0.5]
    huge = [1 << 31, 1 << 32, 1 << 64, -(1 << 40), 1e30, math.inf, -math.inf, math.nan]
    how = draw(st.sampled_from(("near", "huge", "object")))
    if how == "object":
        return how, draw(st.sampled_from(OBJECTS))
    new = draw(st.sampled_from(near if how == "near" else huge))
    return how, float(new) if isinstance(n, float) else new


@functools.cache
def arguments(name: str, dtype: mx.Dtype, i: int) -> tuple[Any, ...]:
    """Return valid arguments of a kernel at its i-th size."""
    found = KERNELS[name]
    return found.arguments(dtype, **found.sizes[i])


def shapes(outputs: Mapping[str, Any] | tuple[mx.array, ...]) -> list[tuple[int, ...]]:
    return [tuple(x.shape) for x in outputs]


@pytest.mark.sampled
@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=40)
@given(data=st.data())
def test_damaged_arguments_are_refused_by_name_or_are_still_consistent(name, data):
    found = KERNELS[name]
    dtype = data.draw(st.sampled_from(found.dtypes), "dtype")
    i = data.draw(st.integers(0, (len(found.sizes) - 1) // 2), "size")
    args = arguments(name, dtype, i)
    choices = list(leaves(args))
    leaf, put = choices[data.draw(st.integers(0, len(choices) - 1), "argument")]
    damage = damaged_arrays if isinstance(leaf, mx.array) else damaged_numbers
    how, new = data.draw(damage(leaf), "damage")
    damaged = put(new)
    try:
        ready = prepare(found(*damaged))
    except KernelError as error:
        assert str(error).startswith(f"[{name}] "), error
        event(f"{how} refused")
        return
    event(f"{how} accepted")
    assert ready.output_shapes == shapes(found.expected(*damaged))


@pytest.mark.parametrize("name", KERNELS)
def test_a_view_with_strides_is_accepted_as_it_is(name):
    found = KERNELS[name]
    for i in range(len(found.sizes)):
        args = arguments(name, found.dtypes[0], i)
        wanted = prepare(found(*args))
        for leaf, put in leaves(args):
            if isinstance(leaf, mx.array):
                ready = prepare(found(*put(strided(leaf))))
                assert ready.output_shapes == wanted.output_shapes
                assert [x.shape for x in ready.inputs] == [
                    x.shape for x in wanted.inputs
                ]


@pytest.mark.parametrize("name", KERNELS)
def test_samples_launch_the_outputs_of_the_reference(name):
    found = KERNELS[name]
    for dtype in found.dtypes:
        for i in range(len(found.sizes)):
            args = arguments(name, dtype, i)
            launch = found(*args)
            ready, expected = prepare(launch), found.expected(*args)
            assert launch.kernel == name == ready.kernel.name
            assert ready.output_shapes == shapes(expected)
            assert ready.output_dtypes == [x.dtype for x in expected]
