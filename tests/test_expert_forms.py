"""Every form of stored experts gives the same logits: streamed, packed and resident."""

from __future__ import annotations

import itertools
import json
import re

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from forms import Raw, read_raw, reform, write_raw
from op_cases import relative_rms
from synthetic import PROJECTIONS, quantize
from test_checkpoint_model import logits, memory_for
from test_pool import DTYPE_NAMES, fill
from tiny import make_checkpoint

import moeflux_mlx
from moeflux_mlx.cli.inspect import summarize
from moeflux_mlx.engine.lowering.moe import all_known
from moeflux_mlx.engine.ops.functions import expert_mlp, experts_by_slot
from moeflux_mlx.engine.ops.host import unpack, widen
from moeflux_mlx.errors import ModelError
from moeflux_mlx.experts.files.layout import PARTS, ExpertLayout
from moeflux_mlx.experts.files.pack import pack
from moeflux_mlx.experts.files.packed import verify
from moeflux_mlx.experts.files.store import open_store
from moeflux_mlx.experts.files.unpack import unpack as unpack_pack
from moeflux_mlx.experts.pool.pool import SlotPool
from moeflux_mlx.experts.weights import ExpertWeights, Quantization, Weight

QUANTIZED = {
    **{
        f"{bits}bit-g{group}": Quantization(bits, group)
        for bits in (1, 2, 3, 4, 5, 6, 8)
        for group in (32, 64, 128)
    },
    "mxfp4": Quantization(4, 32, "mxfp4"),
    "mxfp8": Quantization(8, 32, "mxfp8"),
    "nvfp4": Quantization(4, 16, "nvfp4"),
}
DENSE = {"f32": mx.float32, "f16": mx.float16, "bf16": mx.bfloat16}
FORMS = {**QUANTIZED, **DENSE}
N_LAYERS = 5
SIZES = dict(hidden_size=128, moe_intermediate_size=128, num_hidden_layers=N_LAYERS)


PLACES = [(layer, p) for layer in range(N_LAYERS) for p in PROJECTIONS]


def dealt(first: int) -> dict[tuple[int, str], Quantization | mx.Dtype]:
    """Give each projection of each layer another form, beginning with one."""
    dealt = itertools.cycle(FORMS.values())
    return dict(zip(PLACES, itertools.islice(dealt, first, None), strict=False))


# Together these have all forms, beside others in the same layer.
MIXES = {"low": dealt(0), "high": dealt(len(PLACES))}


def test_the_mixes_hold_every_form():
    assert {f for mix in MIXES.values() for f in mix.values()} == set(FORMS.values())


@pytest.fixture(scope="module", params=MIXES)
def mixed(request, tmp_path_factory):
    """A checkpoint in which every projection of experts has another form."""
    path = tmp_path_factory.mktemp("mixed") / "plain"
    return make_checkpoint(path, experts=MIXES[request.param], **SIZES)


@pytest.mark.slow
def test_logits_are_the_same_at_every_budget_and_those_of_stock(mixed, tmp_path):
    stock, _ = mlx_lm.load(str(mixed))
    resident, _ = moeflux_mlx.load(mixed)
    expected = logits(resident, 9)
    assert relative_rms(expected, logits(stock, 9)) < 1e-5
    packed = tmp_path / "packed"
    pack(mixed, packed)
    assert not verify(packed).damaged
    n_records = N_LAYERS * 8
    for path in (mixed, packed):
        for n_slots in (2, 7, n_records):
            memory = memory_for(mixed, n_slots)
            model, _ = moeflux_mlx.load(path, expert_memory=memory, expert_io="pread")
            assert model.runtime.streams == (n_slots < n_records)
            assert mx.array_equal(logits(model, 9), expected), (path, n_slots)
    mapped, _ = moeflux_mlx.load(packed, expert_io="mmap")
    assert mx.array_equal(logits(mapped, 9), expected)


def test_inspect_counts_the_bytes_of_mixed_experts(mixed, tmp_path):
    pack(mixed, tmp_path / "packed")
    plain, packed = summarize(mixed), summarize(tmp_path / "packed")
    files = (tmp_path / "packed").glob("experts-*.bin")
    assert packed.expert_bytes == plain.expert_bytes
    assert packed.expert_bytes == sum(file.stat().st_size for file in files)
    assert sum(packed.forms.values()) == len(PLACES) == len(packed.forms)
    with open_store(mixed) as store:
        records = [store.layout(layer).record_bytes for layer in store.layers]
    assert plain.token_bytes == packed.token_bytes == 2 * sum(records)
    assert packed.token_reads == 2 * N_LAYERS < plain.token_reads


# Run Op by Op, so that an error names the form.
N_SLOTS, DIM, WIDTH = 5, 256, 128


def stored(form: Quantization | mx.Dtype, shape: tuple[int, int]) -> Weight:
    q = form if isinstance(form, Quantization) else None
    matrices = 0.1 * mx.random.normal((N_SLOTS, *shape))
    parts = quantize(matrices.astype(mx.bfloat16 if q else form), q)
    return Weight(*(parts.get(part) for part in PARTS), q)


def in_pool(experts: ExpertWeights) -> ExpertWeights:
    """Return the same experts as views of slots."""
    by_name = zip(PROJECTIONS, (experts.gate, experts.up, experts.down), strict=True)
    weights = dict(by_name)
    arrays = {
        (name, part): array
        for name, w in weights.items()
        for part, array in zip(PARTS, (w.w, w.scales, w.biases), strict=True)
        if array is not None
    }
    shapes = {key: (DTYPE_NAMES[a.dtype], a.shape[1:]) for key, a in arrays.items()}
    layout = ExpertLayout.build(shapes, {n: w.quantization for n, w in weights.items()})
    pool = SlotPool([layout], N_SLOTS)
    for slot in range(N_SLOTS):
        fill(pool, slot, layout, arrays, slot)
    return pool.weights(layout)


def unpacked(weight: Weight) -> np.ndarray:
    on_host = weight.on_host
    return widen(on_host.w) if weight.quantization is None else unpack(on_host)


def by_hand(x: np.ndarray, slot: int, experts: ExpertWeights) -> np.ndarray:
    gate, up, down = map(unpacked, (experts.gate, experts.up, experts.down))
    opened, act = x @ gate[slot].T, x @ up[slot].T
    return (opened / (1 + np.exp(-opened)) * act) @ down[slot].T


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_numpy_and_mlx_multiply_slots_of_any_form(form):
    mx.random.seed(3)
    shapes = (WIDTH, DIM), (WIDTH, DIM), (DIM, WIDTH)
    experts = in_pool(ExpertWeights(*(stored(form, shape) for shape in shapes)))
    assert experts.gate.strided
    rows = np.random.default_rng(0).standard_normal((7, DIM)).astype(np.float32)
    slots = np.array([[4, 0, 3]], np.uint32)
    expected = np.stack([by_hand(rows[:1], slot, experts)[0] for slot in slots[0]])
    for to in (np.asarray, mx.array):
        got = experts_by_slot(to(rows[:1]), to(slots), experts)
        assert relative_rms(np.array(got)[0], expected) < 1e-5, to
        for n_rows in (2, 7):
            got = expert_mlp(to(rows[:n_rows]), experts, 3)
            wanted = by_hand(rows[:n_rows], 3, experts)
            assert relative_rms(np.array(got), wanted) < 1e-5, (to, n_rows)


@pytest.mark.parametrize("to", [np.asarray, mx.array], ids=["numpy", "mlx"])
def test_scales_of_two_types_are_not_mixed_up(to):
    """NumPy sees bfloat16 as bits, which must not be mixed with float32 values."""
    mx.random.seed(4)
    gate, up = (stored(Quantization(4, 32), (WIDTH, DIM)) for _ in range(2))
    exact = mx.float32, mx.bfloat16
    gate, up = (
        Weight(w.w, w.scales.astype(t), w.biases.astype(t), w.quantization)
        for w, t in zip((gate, up), exact, strict=True)
    )
    experts = ExpertWeights(gate, up, stored(mx.float16, (DIM, WIDTH)))
    x = np.random.default_rng(0).standard_normal((1, DIM)).astype(np.float32)
    got = experts_by_slot(to(x), to(np.array([[2]], np.uint32)), experts)
    assert relative_rms(np.array(got)[0], by_hand(x, 2, experts)) < 1e-5
    assert not all_known(experts)


@pytest.mark.parametrize(
    ("gate", "up", "down", "known"),
    [
        ("4bit-g64", "4bit-g64", "4bit-g64", True),
        ("4bit-g64", "4bit-g64", "8bit-g32", True),
        ("4bit-g64", "8bit-g64", "8bit-g64", False),
        ("4bit-g64", "4bit-g64", "6bit-g64", False),
        ("3bit-g32", "3bit-g32", "3bit-g32", False),
        ("mxfp4", "mxfp4", "mxfp4", True),
        ("nvfp4", "nvfp4", "4bit-g64", True),
        ("mxfp4", "4bit-g32", "mxfp4", False),
        ("mxfp8", "mxfp8", "mxfp8", False),
        ("bf16", "bf16", "bf16", False),
    ],
)
def test_our_kernels_run_experts_of_the_forms_they_know(gate, up, down, known):
    shapes = (WIDTH, DIM), (WIDTH, DIM), (DIM, WIDTH)
    forms = zip((gate, up, down), shapes, strict=True)
    weights = [stored(FORMS[form], shape) for form, shape in forms]
    assert all_known(ExpertWeights(*weights)) == known


def test_a_scale_of_the_whole_matrix_needs_mlx_lms_class(tmp_path):
    """mlx-lm can write one beside nvfp4: without it, the model would differ."""
    form = dict.fromkeys(PLACES, Quantization(4, 16, "nvfp4"))
    path = make_checkpoint(tmp_path / "plain", experts=form, **SIZES)
    name = "language_model.model.layers.1.mlp.switch_mlp.up_proj"
    tensors = read_raw(path)
    ones = np.ones(8, np.float32)
    tensors[f"{name}.global_scale"] = Raw("F32", (8,), ones.tobytes())
    write_raw(path, tensors)
    config = json.loads((path / "config.json").read_text())
    for memory in ("4GB", None):
        with pytest.raises(ModelError, match=r"up_proj\.global_scale"):
            moeflux_mlx.load(path, expert_memory=memory)
    config["quantization"][name]["global_scale"] = True
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="our own class does not support a global_s"):
        moeflux_mlx.load(path, native=True)
    pack(path, tmp_path / "packed")
    for source in (path, tmp_path / "packed"):
        model, _ = moeflux_mlx.load(source, expert_memory="4GB")
        own = model.streamer.source(1).weights.by_name["up_proj"].global_scale
        assert np.array_equal(np.array(own), ones)
        with pytest.raises(
            ModelError, match=r"layers\.1\.mlp.*up_proj: expected a GPU"
        ):
            model(mx.array([[1]]))
    unpack_pack(tmp_path / "packed", tmp_path / "back")
    assert read_raw(tmp_path / "back").keys() == tensors.keys()


# Unsupported forms are refused.
def test_biases_of_another_type_than_their_scales_are_refused_by_name(
    checkpoint, tmp_path
):
    path = reform(checkpoint, tmp_path / "other", "stacked")
    tensors = read_raw(path)
    name = "language_model.model.layers.1.mlp.switch_mlp.up_proj.biases"
    raw = tensors[name]
    tensors[name] = Raw("F16", raw.shape, raw.data[: len(raw.data) // 2])
    write_raw(path, tensors)
    with pytest.raises(ModelError, match=rf"{re.escape(name)}.*F32 as of its scales"):
        moeflux_mlx.load(path, expert_memory="1GB")
