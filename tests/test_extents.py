"""Copies out of slots and products of stacks are right at any size.

MLX's kernels have 32-bit limits, beyond which they return wrong numbers in silence. A
small stand-in for each limit shows here whether our code respects it.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from native_models import relative_rms
from test_switch import SLOT, Two, given, load, saved
from tiny import make_gpt_oss

import moeflux_mlx
from moeflux_mlx import device
from moeflux_mlx.engine.ops.functions import experts_by_slot
from moeflux_mlx.errors import ModelError
from moeflux_mlx.experts import records
from moeflux_mlx.experts.compute.stacks import in_parts
from moeflux_mlx.experts.files import writer
from moeflux_mlx.experts.files.layout import ExpertLayout
from moeflux_mlx.experts.pool.pool import POOL_ALIGNMENT, SlotPool
from moeflux_mlx.experts.weights import ARRAYS, ExpertWeights, Quantization
from moeflux_mlx.streaming import stream

NAMES = ("gate_proj", "up_proj", "down_proj")
N_SLOTS = 6


def pool_of(
    rows: int, columns: int, form: Quantization | None, dtype: str = "F32"
) -> ExpertWeights:
    """Return slots of random bytes, with a bias and a scale of each matrix."""
    shapes: dict[tuple[str, str], tuple[str, tuple[int, ...]]] = {}
    for name in NAMES:
        o, i = (columns, rows) if name == "down_proj" else (rows, columns)
        if form is None:
            shapes[name, "weight"] = dtype, (o, i)
        else:
            groups = dtype, (o, i // form.group_size)
            shapes[name, "weight"] = "U32", (o, i * form.bits // 32)
            shapes[name, "scales"] = shapes[name, "biases"] = groups
        shapes[name, "bias"] = dtype, (o,)
        shapes[name, "global_scale"] = "F32", ()
    layout = ExpertLayout.build(shapes, dict.fromkeys(NAMES, form))
    pool = SlotPool([layout], N_SLOTS)
    noise = np.random.default_rng(1).integers(0, 256, pool.bytes.shape, np.uint8)
    pool.bytes[:] = noise
    return pool.weights(layout)


def bits(x: mx.array) -> np.ndarray:
    """Return the bytes of an array, a view if it is contiguous."""
    return np.array(x.view(mx.uint8) if x.ndim else x[None].view(mx.uint8), copy=False)


def arrays_of(weights: ExpertWeights) -> dict[tuple[str, str], mx.array]:
    return {
        (name, field): array
        for name, weight in weights.by_name.items()
        for field in ARRAYS
        if (array := getattr(weight, field)) is not None
    }


FORMS = {
    "affine": (96, 64, Quantization(4, 32), "BF16"),
    "odd": (32, 160, Quantization(3, 32), "F16"),
    "bytes": (32, 96, Quantization(8, 32), "U8"),
    "dense": (9, 11, None, "BF16"),
}


@pytest.mark.parametrize("axis", [None, N_SLOTS], ids=["rows", "slots and rows"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_copies_have_the_bytes_of_their_slots_and_are_contiguous(
    monkeypatch, form, axis
):
    if axis:
        monkeypatch.setattr(records, "MAX_AXIS", axis)
    weights = pool_of(*form)
    slots = mx.array([5, 0, 0, 3], mx.uint32)
    copies = weights.copied(slots)
    assert not any(weight.strided for weight in copies.by_name.values())
    found, wanted = arrays_of(copies), arrays_of(weights)
    assert found.keys() == wanted.keys()
    for key, copy in found.items():
        own = wanted[key][slots]
        assert (copy.shape, copy.dtype) == (own.shape, own.dtype)
        assert np.array_equal(bits(copy), bits(own)), key
        assert bits(copy).flags.c_contiguous
    weight = weights.down
    found = weight.bias_of(slots.reshape(2, 2))
    assert np.array_equal(bits(found), bits(weight.bias[slots.reshape(2, 2)]))


def test_a_projection_is_copied_with_the_others_of_its_size(monkeypatch):
    """Each operation costs time on the path of every token."""
    weights = pool_of(*FORMS["affine"])
    weights.copied(mx.array([1], mx.uint32))
    n_gathers = []
    original = mx.array.__getitem__
    monkeypatch.setattr(
        mx.array, "__getitem__", lambda x, i: (n_gathers.append(x), original(x, i))[1]
    )
    weights.copied(mx.array([0, 2], mx.uint32))
    # Words, scales with biases, two lengths of bias, scales of whole matrices.
    assert len(n_gathers) == 5


def extent(x: mx.array) -> int:
    """Return how many elements lie between an array's first and last."""
    view = np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x, copy=False)
    steps = zip(view.shape, view.strides, strict=True)
    return 1 + sum((n - 1) * stride for n, stride in steps) // view.itemsize


@pytest.fixture
def sources(monkeypatch):
    """Return a list of all arrays that MLX's gathers read."""
    found: list[mx.array] = []
    item = mx.array.__getitem__

    def note_item(x: mx.array, index: Any) -> mx.array:
        indices = index if isinstance(index, tuple) else (index,)
        if any(isinstance(i, mx.array) for i in indices):
            found.append(x)
        return item(x, index)

    def noted(name: str) -> None:
        original = getattr(mx, name)

        def note(x: mx.array, *args: Any, **options: Any) -> mx.array:
            found.append(x)
            return original(x, *args, **options)

        monkeypatch.setattr(mx, name, note)

    monkeypatch.setattr(mx.array, "__getitem__", note_item)
    noted("take")
    noted("take_along_axis")
    return found


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("form", [4, None], ids=["quantised", "dense"])
def test_no_gather_reads_further_than_its_source_has_elements(
    tmp_path, monkeypatch, sources, form, in_place
):
    """MLX decides by the number of elements whether 32 bits are enough."""
    monkeypatch.setattr(device, "gathers_strided", lambda: in_place)
    n_slots = 4 if form else 40
    path = saved(Two(form), tmp_path / "model")
    for number in (n_slots, 10 * n_slots):
        ours = load(path, number, bits=form)
        for n in (1, 7, 60):
            mx.eval(ours(*given(n)))
        weights = ours.streamer.source(0).weights
        rows, slots = mx.ones((3, 128)), mx.array([[0, 1]] * 3, mx.uint32)
        mx.eval(experts_by_slot(rows, slots, weights))
    assert sources
    assert all(extent(x) <= x.size for x in sources)


@pytest.fixture
def told(monkeypatch):
    """Return a list of the number of matrices in each product's stack."""
    found: list[int] = []

    def noted(name: str) -> None:
        original = getattr(mx, name)

        def note(x: mx.array, w: mx.array, *args: Any, **options: Any) -> mx.array:
            found.append(len(w))
            return original(x, w, *args, **options)

        monkeypatch.setattr(mx, name, note)

    noted("gather_qmm")
    noted("gather_mm")
    return found


@pytest.mark.parametrize("form", [4, None], ids=["quantised", "dense"])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("resident", [False, True])
def test_a_block_multiplies_in_parts_with_the_same_bits(
    tmp_path, monkeypatch, told, form, in_place, resident
):
    monkeypatch.setattr(device, "gathers_strided", lambda: in_place)
    n_slots = (4, 10)[resident] * (1 if form else 6)
    path = saved(Two(form), tmp_path / "model")
    few, many = given(1), given(35)

    def run() -> list[mx.array]:
        told.clear()
        ours = load(path, n_slots, bits=form)
        gradient = mx.grad(lambda x: ours(x, few[1]).sum())(few[0])
        found = [ours(*few), ours(*many), gradient]
        mx.eval(found)
        assert ours.streamer.resident == resident
        return found

    wanted = run()
    assert max(told) > 2
    monkeypatch.setattr(device, "most_matrices", lambda *_: 2)
    *found, gradient = run()
    assert all(map(mx.array_equal, found, wanted))
    # Parts of a gradient may be added in another order.
    assert relative_rms(gradient, wanted[-1]) < 1e-6
    assert max(told) == 2


@pytest.mark.parametrize("form", [Quantization(4, 32), None], ids=["4bit", "dense"])
def test_an_op_multiplies_in_parts_with_the_same_bits(monkeypatch, form):
    weights = pool_of(64, 64, form)
    for weight in weights.by_name.values():
        floats = (weight.w,) if form is None else (weight.scales, weight.biases)
        for array in (*floats, weight.bias):
            np.array(array, copy=False)[:] = 0.01
    whole = weights.copied(mx.arange(N_SLOTS, dtype=mx.uint32))
    x = mx.random.normal((4, 64), key=mx.random.key(0))
    slots = mx.array([[0, 5], [1, 3], [2, 2], [4, 1]], mx.uint32)
    cases = [(slots, False), (mx.sort(slots.flatten())[:4, None], True)]
    wanted = [experts_by_slot(x, s, whole, in_order=o) for s, o in cases]
    assert all(mx.isfinite(out).all() for out in wanted)
    monkeypatch.setattr(device, "most_matrices", lambda *_: 2)
    for stacks in (whole, weights):
        found = [experts_by_slot(x, s, stacks, in_order=o) for s, o in cases]
        assert all(map(mx.array_equal, found, wanted))


def test_a_stack_that_a_cpu_cannot_index_is_multiplied_rightly():
    """The matrices are one, repeated without memory: MLX's own product would read
    before the array's first word.
    """
    n, rows, words = (1 << 31) // 24 + 7, 3, 8
    one = mx.random.normal((1, rows, 8 * words), key=mx.random.key(2))
    parts = mx.quantize(one, 32, 4)
    assert rows * words == 24 and device.most_matrices(parts[0], 4) < n
    stack = [mx.broadcast_to(part, (n, *part.shape[1:])) for part in parts]
    x = mx.random.normal((1, 1, 8 * words), key=mx.random.key(3))
    form: dict[str, Any] = dict(transpose=True, group_size=32, bits=4)

    def product(part: slice | None, ids: mx.array) -> mx.array:
        own = stack if part is None else [array[part] for array in stack]
        return mx.gather_qmm(x, *own, rhs_indices=ids, **form)

    found = in_parts(product, stack[0], 4, mx.array([0, 5, n - 1], mx.uint32))
    wanted = mx.quantized_matmul(x[0], *(part[0] for part in parts), **form)
    assert mx.array_equal(found, mx.broadcast_to(wanted, found.shape))


@pytest.mark.parametrize("form", [Quantization(4, 32, "mxfp4"), None], ids=str)
def test_a_resident_model_of_mlx_lms_class_multiplies_in_parts(
    tmp_path, monkeypatch, told, form
):
    path = make_gpt_oss(tmp_path / "model", experts=form)

    def run() -> list[mx.array]:
        told.clear()
        model, _ = moeflux_mlx.load(path, native=False)
        ids = mx.random.randint(1, 300, (1, 40), key=mx.random.key(5))
        found = [model(ids), model(ids[:, :1])]
        mx.eval(found)
        return found

    wanted = run()
    assert max(told) > 2
    monkeypatch.setattr(device, "most_matrices", lambda *_: 2)
    assert all(map(mx.array_equal, run(), wanted))
    assert max(told) == 2


def test_values_are_compared_with_their_file_some_at_a_time(tmp_path, monkeypatch):
    """MLX on a CPU compares no more than 2^31 bytes."""
    path = saved(Two(), tmp_path / "model")
    monkeypatch.setattr(writer, "CHUNK_BYTES", 1 << 10)
    found = []
    original = np.array_equal
    monkeypatch.setattr(
        np, "array_equal", lambda *pair: found.append(len(pair[0])) or original(*pair)
    )
    model = Two().load_weights(str(path / "model.safetensors"))
    mx.eval(model.parameters())
    stream(model, path, expert_memory=POOL_ALIGNMENT + 4 * SLOT)
    assert 1 << 10 < max(found) < 1 << 15
    model = Two().load_weights(str(path / "model.safetensors"))
    words = np.array(model.blocks[1].down_proj.weight)
    words[-1, -1, -1] ^= 1
    model.blocks[1].down_proj.weight = mx.array(words)
    with pytest.raises(ModelError, match="expected the values of"):
        stream(model, path, expert_memory=POOL_ALIGNMENT + 4 * SLOT)


def test_limits_are_those_of_the_device(monkeypatch):
    """Kimi-K2 has 384 experts of 2048 x 7168 values."""
    packed, dense = (
        mx.zeros((1, 2048, 896), mx.uint32),
        mx.zeros((1, 2048, 7168), mx.int8),
    )

    def limits() -> tuple[int, int]:
        return device.most_matrices(packed, 4), device.most_matrices(dense, None)

    monkeypatch.setattr(device, "on_cpu", lambda: True)
    assert limits()[0] == 1170 and limits()[1] > 1 << 40
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    assert limits() == (292, 146)
    assert device.most_matrices(dense, None, in_order=False) == 292
    monkeypatch.setattr(mx.cuda, "is_available", lambda: False)
    assert min(limits()) > 1 << 40


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.parametrize("gib", [5, 17], ids="{}GiB".format)
def test_a_gpu_copies_from_the_last_of_many_slots(gib):
    """Offsets pass 2^31 elements of bfloat16 at 4 GiB, and of 8 bytes at 16 GiB."""
    shapes = {(name, "weight"): ("BF16", (32, 96)) for name in NAMES}
    layout = ExpertLayout.build(shapes, dict.fromkeys(NAMES))
    n = (gib << 30) // layout.stride
    pool = SlotPool([layout], n)
    chosen = [n - 1, 0, n - 2]
    noise = np.random.default_rng(0).integers(0, 256, (3, layout.stride), np.uint8)
    for slot, row in zip(chosen, noise, strict=True):
        pool.bytes[slot] = row
    copies = pool.weights(layout).copied(mx.array(chosen, mx.uint32))
    for spec in layout.tensors:
        found = bits(copies.by_name[spec.projection].w).reshape(3, -1)
        assert np.array_equal(found, noise[:, spec.offset : spec.offset + spec.n_bytes])


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.parametrize("form", [4, None], ids=["quantised", "dense"])
def test_a_gpu_multiplies_by_the_last_of_a_large_stack(form):
    """The stacks pass 2^32 packed values, and 2^31 bytes of dense ones."""
    n, side = (1100, 2048) if form else (300, 2048)
    last = mx.random.normal((1, side, side), key=mx.random.key(1)).astype(mx.bfloat16)
    parts = mx.quantize(last, 64, form) if form else [last]
    blank = [mx.zeros((n - 1, *part.shape[1:]), part.dtype) for part in parts]
    stack = [mx.concatenate(pair) for pair in zip(blank, parts, strict=True)]
    x = mx.random.normal((16, 1, side), key=mx.random.key(2)).astype(mx.bfloat16)
    assert device.most_matrices(stack[0], form) < n

    def product(own: list[mx.array], ids: mx.array) -> mx.array:
        if form is None:
            w = own[0].swapaxes(-1, -2)
            return mx.gather_mm(x, w, rhs_indices=ids, sorted_indices=True)
        options: dict[str, Any] = dict(transpose=True, group_size=64, bits=form)
        return mx.gather_qmm(x, *own, rhs_indices=ids, **options)

    def part_of(part: slice | None, ids: mx.array) -> mx.array:
        return product(stack if part is None else [a[part] for a in stack], ids)

    ids = mx.full(16, n - 1, mx.uint32)
    found = in_parts(part_of, stack[0], form, ids, in_order=True)
    assert mx.array_equal(found, product([*parts], mx.zeros(16, mx.uint32)))
