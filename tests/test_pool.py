"""Memory for experts is aligned, shared by its views, and allocated once."""

from __future__ import annotations

import gc

import mlx.core as mx
import numpy as np
import pytest
from synthetic import PROJECTIONS, quantize

from moeflux_mlx.errors import ConfigError
from moeflux_mlx.experts.files.layout import PARTS, ExpertLayout
from moeflux_mlx.experts.pool.budget import parse_bytes
from moeflux_mlx.experts.pool.pool import POOL_ALIGNMENT, SlotPool, aligned_bytes
from moeflux_mlx.experts.weights import ExpertWeights, Quantization, Weight

FORMS = {
    "affine-4-64": Quantization(4, 64),
    "affine-3-32": Quantization(3, 32),
    "mxfp4": Quantization(4, 32, "mxfp4"),
    "dense": None,
}
DTYPE_NAMES = {
    mx.float32: "F32",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.uint32: "U32",
    mx.uint8: "U8",
}


def stacks(q, n_experts=7, rows=24, columns=192, dtype=mx.float32):
    """Return random stacks of experts by projection and part, and one's layout."""
    mx.random.seed(5)
    arrays = {
        (projection, part): array
        for projection in PROJECTIONS
        for part, array in quantize(
            mx.random.normal((n_experts, rows, columns)).astype(dtype), q
        ).items()
    }
    shapes = {k: (DTYPE_NAMES[a.dtype], a.shape[1:]) for k, a in arrays.items()}
    return arrays, ExpertLayout.build(shapes, dict.fromkeys(PROJECTIONS, q))


def fill(pool: SlotPool, slot: int, layout: ExpertLayout, arrays, expert: int) -> None:
    for t in layout.tensors:
        array = arrays[t.projection, t.part][expert].flatten().view(mx.uint8)
        buffer = pool.buffer(slot, layout.record_bytes)
        buffer[t.offset : t.offset + t.n_bytes] = np.array(array).tobytes()


def weight_arrays(weights: ExpertWeights) -> dict[tuple[str, str], mx.array]:
    triples = zip(PROJECTIONS, (weights.gate, weights.up, weights.down), strict=True)
    return {
        (projection, part): array
        for projection, weight in triples
        for part, array in zip(
            PARTS, (weight.w, weight.scales, weight.biases), strict=True
        )
        if array is not None
    }


def address(array: mx.array) -> int:
    return np.array(array, copy=False).ctypes.data


@pytest.mark.parametrize("n_bytes", [1, 4097, 3 * 2**20 + 5])
@pytest.mark.parametrize("alignment", [4096, 2**21])
def test_aligned_bytes_begin_at_the_alignment_and_are_writable(n_bytes, alignment):
    array = aligned_bytes(n_bytes, alignment)
    assert array.shape == (n_bytes,) and array.dtype == mx.uint8
    assert address(array) % alignment == 0
    np.array(array, copy=False)[:] = 63
    assert mx.sum(array.astype(mx.int32)).item() == 63 * n_bytes


@pytest.mark.parametrize("q", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["f32", "bf16"])
def test_bytes_written_into_a_slot_show_in_its_tensors(q, dtype):
    arrays, layout = stacks(q, dtype=dtype)
    pool = SlotPool([layout], 5)
    views = weight_arrays(pool.weights(layout))
    assert views.keys() == arrays.keys()
    pool.bytes[:] = 0xA5
    for slot, expert in enumerate([6, 0, 3, 3, 1]):
        fill(pool, slot, layout, arrays, expert)
    for key, view in views.items():
        expected = arrays[key][mx.array([6, 0, 3, 3, 1])]
        assert view.dtype == expected.dtype and view.shape == expected.shape
        assert mx.array_equal(view.view(mx.uint8), expected.view(mx.uint8)), key


def test_tensors_are_views_that_take_no_memory():
    _, layout = stacks(FORMS["affine-4-64"])
    mx.synchronize()
    gc.collect()
    before = mx.get_active_memory()
    pool = SlotPool([layout], 63)
    assert pool.n_bytes - 64 <= mx.get_active_memory() - before <= pool.n_bytes + 64
    held = mx.get_active_memory()
    views = weight_arrays(pool.weights(layout))
    assert mx.get_active_memory() == held
    for t in layout.tensors:
        expected = address(pool.array) + t.offset
        assert address(views[t.projection, t.part]) == expected


def test_tensors_are_made_once_for_each_layout_and_range():
    _, layout = stacks(None)
    pool = SlotPool([layout], 9)
    assert pool.weights(layout) is pool.weights(layout)
    part = pool.weights(layout, 4, 3)
    assert part is pool.weights(layout, 4, 3)
    assert part.up.w.shape[0] == 3
    assert address(part.gate.w) == address(pool.array) + 4 * pool.stride


def test_a_pool_takes_layouts_of_different_sizes():
    small_arrays, small = stacks(Quantization(4, 32))
    large_arrays, large = stacks(None, columns=320)
    pool = SlotPool([small, large], 3)
    assert pool.stride == large.stride > small.stride
    fill(pool, 0, large, large_arrays, 4)
    fill(pool, 1, small, small_arrays, 2)
    fill(pool, 2, large, large_arrays, 6)
    key = "down_proj", "weight"
    views = weight_arrays(pool.weights(large))[key]
    assert mx.array_equal(views[0], large_arrays[key][4])
    assert mx.array_equal(views[2], large_arrays[key][6])
    views = weight_arrays(pool.weights(small))[key]
    assert mx.array_equal(views[1], small_arrays[key][2])


def test_the_pool_begins_at_two_mebibytes():
    _, layout = stacks(None)
    assert address(SlotPool([layout], 1).array) % (2 * 2**20) == 0
    assert POOL_ALIGNMENT == 2 * 2**20


def test_a_product_with_slots_equals_one_with_the_stack_and_copies_nothing():
    q = FORMS["affine-4-64"]
    arrays, layout = stacks(q, n_experts=33, rows=256, columns=512)
    pool = SlotPool([layout], 33)
    for expert in range(33):
        fill(pool, expert, layout, arrays, expert)
    x = mx.random.normal((3, 1, 1, 512))
    ids = mx.array([[1, 32], [5, 5], [0, 17]], dtype=mx.uint32)
    mx.eval(x, ids, list(arrays.values()))

    def product(weight: Weight) -> mx.array:
        return mx.gather_qmm(
            x,
            weight.w,
            weight.scales,
            weight.biases,
            rhs_indices=ids,
            transpose=True,
            group_size=q.group_size,
            bits=q.bits,
        )

    stack = Weight(*(arrays["up_proj", part] for part in PARTS))
    expected = product(stack)
    mx.eval(expected)
    view = pool.weights(layout).up
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    found = product(view)
    mx.eval(found)
    if not mx.cuda.is_available():
        assert mx.get_peak_memory() - before < arrays["up_proj", "weight"].nbytes / 4
    assert mx.array_equal(found, expected)


@pytest.mark.parametrize(
    ("memory", "n_bytes"),
    [
        (63, 63),
        ("63", 63),
        ("8GB", 8 * 10**9),
        ("8 gb", 8 * 10**9),
        ("512MiB", 512 * 2**20),
        ("1.5GiB", 3 * 2**29),
        ("1.5e9", 1_500_000_000),
        ("2e3KB", 2_000_000),
        (1.5e9, 1_500_000_000),
        ("7B", 7),
    ],
)
def test_amounts_of_memory_are_read(memory, n_bytes):
    assert parse_bytes(memory) == n_bytes


NOT_AMOUNTS = [
    "8G",
    "8GBs",
    "GB",
    "-8GB",
    "0",
    "0.2",
    "1e999",
    "1_000",
    "nan",
    "٨GB",
    "0x10",
    "1,5GB",
]
NOT_AMOUNTS += ["", "8GB 2", 0, -5, True, None, [], float("nan"), float("inf")]


@pytest.mark.parametrize("memory", NOT_AMOUNTS)
def test_any_other_amount_is_refused_with_the_name_of_the_argument(memory):
    with pytest.raises(ConfigError, match=r"\[memory\] expected bytes") as caught:
        parse_bytes(memory)
    assert repr(memory) in str(caught.value)
