"""Records, safetensors headers, and bits and group sizes derived from shapes."""

from __future__ import annotations

import json
import math
import struct

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import AFFINE, PROJECTIONS, write_checkpoint

from moeflux_mlx.errors import ConfigError, ExpertStoreError, ModelError
from moeflux_mlx.experts.files.checkpoint import Checkpoint
from moeflux_mlx.experts.files.layout import PARTS, ExpertLayout
from moeflux_mlx.experts.files.routed import routed_layers
from moeflux_mlx.experts.files.safetensors import DTYPE_BYTES, fingerprint, read_header
from moeflux_mlx.experts.weights import Quantization

UNPACKED = dict.fromkeys(PROJECTIONS)
MXFP4 = Quantization(4, 32, "mxfp4")
FORMS = {
    "affine-4-32": AFFINE,
    "affine-3-64": Quantization(3, 64),
    "affine-8-32": Quantization(8, 32),
    "mxfp4": MXFP4,
    "mxfp8": Quantization(8, 32, "mxfp8"),
    "dense": None,
    "mixed": {"gate_proj": AFFINE, "up_proj": MXFP4, "down_proj": Quantization(6, 64)},
    "half-dense": {"gate_proj": None, "up_proj": AFFINE, "down_proj": AFFINE},
}


def layout_of(directory, layer=0, alignment=16384):
    with Checkpoint.open(directory) as checkpoint:
        routed = routed_layers(checkpoint.tensors)[layer]
        return routed.layout(checkpoint.config, alignment)


shapes = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)
tensors = st.tuples(st.sampled_from(sorted(DTYPE_BYTES)), shapes)
optional = [(p, part) for p in PROJECTIONS for part in PARTS if part != "weight"]
parts_of_experts = st.fixed_dictionaries(
    {(p, "weight"): tensors for p in PROJECTIONS},
    optional=dict.fromkeys(optional, tensors),
)


@given(parts_of_experts, st.sampled_from([16, 64, 4096, 16384, 2**21]))
def test_tensors_of_a_record_are_aligned_ordered_and_apart(parts, alignment):
    layout = ExpertLayout.build(parts, UNPACKED, alignment)
    order = [(p, part) for p in PROJECTIONS for part in PARTS if (p, part) in parts]
    assert [(t.projection, t.part) for t in layout.tensors] == order
    end = 0
    for t in layout.tensors:
        assert t.offset % 16 == 0 and t.offset >= end
        assert t.n_bytes == math.prod(t.shape) * DTYPE_BYTES[t.dtype]
        end = t.offset + t.n_bytes
    assert layout.record_bytes == end
    assert layout.stride % alignment == 0
    assert 0 <= layout.stride - layout.record_bytes < alignment


@given(parts_of_experts)
def test_a_layout_survives_json(parts):
    layout = ExpertLayout.build(parts, {**UNPACKED, "up_proj": AFFINE})
    assert ExpertLayout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: f.pop("tensors"),
        lambda f: f["tensors"][1].update(offset=0),
        lambda f: f["tensors"][0].update(dtype="F31"),
        lambda f: f["tensors"][0].update(shape=[-3, 5]),
        lambda f: f["tensors"].pop(0),
        lambda f: f["quantization"].update(gate_proj={"bits": 4}),
        lambda f: f.update(alignment=100),
    ],
)
def test_a_layout_that_contradicts_itself_is_refused(damage):
    parts = {(p, "weight"): ("F32", (3, 5)) for p in PROJECTIONS}
    fields = ExpertLayout.build(parts, UNPACKED).to_json()
    damage(fields)
    with pytest.raises(ExpertStoreError, match=r"\[layout\]"):
        ExpertLayout.from_json(fields)


@pytest.mark.parametrize("alignment", [0, -16, 8, 48, 16384.0, True])
def test_an_alignment_that_is_no_power_of_two_is_refused(alignment):
    with pytest.raises(ConfigError, match="alignment"):
        ExpertLayout.build({}, UNPACKED, alignment)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_bits_and_group_follow_from_shapes(form, tmp_path):
    path = write_checkpoint(tmp_path / "m", hidden=128, inner=192, quantization=form)
    given_forms = form if isinstance(form, dict) else dict.fromkeys(PROJECTIONS, form)
    assert layout_of(path).quantization == tuple(given_forms[p] for p in PROJECTIONS)


def test_layers_may_differ_in_bits(tmp_path):
    forms = [AFFINE, Quantization(8, 32), None]
    path = write_checkpoint(tmp_path / "m", quantization=forms)
    assert [layout_of(path, layer).quantization[1] for layer in range(3)] == forms


def test_affine_scales_without_biases_are_refused(tmp_path):
    path = write_checkpoint(tmp_path / "m", quantization=AFFINE)
    tensors = mx.load(str(path / "model.safetensors"))
    kept = {n: t for n, t in tensors.items() if not n.endswith("gate_proj.biases")}
    mx.eval(kept)
    mx.save_safetensors(str(path / "model.safetensors"), kept)
    with pytest.raises(ModelError, match=r"gate_proj\.weight.*expected biases"):
        layout_of(path)


def test_parts_that_a_record_has_no_place_for_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    mx.save_safetensors(
        str(path), {"model.layers.0.mlp.switch_mlp.up_proj.zeros": mx.zeros((3, 5))}
    )
    with pytest.raises(ModelError, match=r"up_proj\.zeros.*weight.*scales.*biases"):
        routed_layers(read_header(path))


def write_safetensors(path, fields, data=b"", n_header=None):
    header = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    prefix = struct.pack("<Q", len(header) if n_header is None else n_header)
    path.write_bytes(prefix + header + data)
    return path


def tensor(dtype="F32", shape=(3, 5), offsets=(0, 60)):
    return {"a.b": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    ("fields", "n_header", "message"),
    [
        (b"{}", 2**62, "a header inside"),
        (b"{}", 200, "a header inside"),
        (b"not json", None, "a JSON header"),
        (b"[1]", None, "a JSON object"),
        (tensor(offsets=(8, 68)), None, "'a.b' to end inside"),
        (tensor(offsets=(0, 64)), None, "60 bytes of 'a.b'"),
        (tensor(offsets=(-60, 0)), None, "dtype, shape and offsets of 'a.b'"),
        (tensor(shape=(-3, -5)), None, "dtype, shape and offsets of 'a.b'"),
        (tensor(dtype="F31"), None, "a known type of 'a.b'"),
        ({"a.b": 7}, None, "dtype, shape and offsets of 'a.b'"),
    ],
)
def test_a_malformed_header_names_file_and_tensor(fields, n_header, message, tmp_path):
    path = write_safetensors(tmp_path / "bad.safetensors", fields, b"x" * 60, n_header)
    with pytest.raises(ModelError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


@settings(max_examples=300)
@given(st.data())
def test_a_header_with_any_bytes_changed_is_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "m.safetensors"
    write_safetensors(path, tensor(), b"x" * 60)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        entries = read_header(path)
    except ModelError:
        return
    for entry in entries.values():
        assert entry.offset + entry.n_bytes <= path.stat().st_size


def test_a_fingerprint_changes_with_header_size_and_weights(tmp_path):
    path = write_safetensors(tmp_path / "m", tensor(), b"x" * 60)
    seen = {fingerprint(path)}
    write_safetensors(path, tensor(shape=(5, 3)), b"x" * 60)
    seen.add(fingerprint(path))
    write_safetensors(path, tensor(), b"x" * 61)
    seen.add(fingerprint(path))
    write_safetensors(path, tensor(), b"x" * 59 + b"y")
    seen.add(fingerprint(path))
    assert len(seen) == 4
