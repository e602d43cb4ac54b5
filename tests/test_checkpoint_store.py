"""Streaming from plain checkpoints gives a pack's records, in any layout of files."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import open_files
import pytest
from forms import FORMS, Raw, in_form, read_raw, reform, write_raw
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from synthetic import write_checkpoint

from moeflux_mlx.errors import ExpertStoreError, ModelError
from moeflux_mlx.experts.files.checkpoint_store import CheckpointExperts
from moeflux_mlx.experts.files.pack import pack
from moeflux_mlx.experts.files.packed import PackedExperts
from moeflux_mlx.experts.files.spans import Piece, merge
from moeflux_mlx.experts.files.store import ExpertStore, open_store
from moeflux_mlx.experts.pool.pool import POOL_ALIGNMENT
from moeflux_mlx.experts.streaming.streamer import ExpertStreamer
from moeflux_mlx.experts.weights import Quantization

AFFINE = Quantization(4, 32)
QUANTIZATIONS = {
    "affine": AFFINE,
    "mxfp4": Quantization(4, 32, "mxfp4"),
    "dense": None,
    "by-layer": [AFFINE, Quantization(8, 32), None],
}
# Reads per affine expert, whose tensors a file holds sorted by name.
N_SPANS = {"stacked": 9, "each": 1, "fused": 6, "each-fused": 1}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "plain")


@pytest.fixture(scope="module")
def tensors(plain):
    return read_raw(plain)


@pytest.fixture
def broken(plain, tmp_path):
    """A checkpoint to be damaged."""
    return Path(shutil.copytree(plain, tmp_path / "broken"))


def record(store: ExpertStore, layer: int, expert: int) -> bytes:
    buffer = memoryview(bytearray(store.layout(layer).record_bytes))
    for span in store.spans(layer, expert):
        span.read(buffer)
    return bytes(buffer)


def records(store: ExpertStore) -> dict[tuple[int, int], bytes]:
    pairs = [(layer, e) for layer in store.layers for e in range(store.n_experts)]
    return {pair: record(store, *pair) for pair in pairs}


def refused(directory: Path) -> str:
    """Open a checkpoint that must be refused; return the error's message."""
    with open_files.none_left(), pytest.raises(ModelError) as caught:
        CheckpointExperts.open(directory)
    return str(caught.value)


def edit(directory: Path, change, n_shards: int = 1) -> None:
    tensors = read_raw(directory)
    change(tensors)
    write_raw(directory, tensors, n_shards)


@pytest.mark.sampled
@pytest.mark.parametrize("n_shards", [1, 3])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_records_of_a_pack(form, quantization, n_shards, tmp_path):
    source = write_checkpoint(
        tmp_path / "plain", quantization=QUANTIZATIONS[quantization]
    )
    pack(source, tmp_path / "packed")
    path = reform(source, tmp_path / "other", form, n_shards)
    pack(path, tmp_path / "other-packed", verify=True)
    with (
        PackedExperts.open(tmp_path / "packed") as expected,
        PackedExperts.open(tmp_path / "other-packed") as packed,
        open_store(path) as found,
    ):
        assert isinstance(found, CheckpointExperts)
        assert (found.layers, found.n_experts, found.top_k) == ((0, 1, 2), 5, 2)
        for layer in expected.layers:
            assert found.layout(layer) == expected.layout(layer)
        assert records(found) == records(packed) == records(expected)
        names = {name for name in read_raw(path) if ".mlp." in name}
        assert found.tensor_names == names


@pytest.mark.parametrize("form", FORMS)
def test_adjacent_tensors_are_one_read(form, plain, tmp_path):
    path = reform(plain, tmp_path / "other", form)
    with CheckpointExperts.open(path) as store:
        spans = {len(store.spans(layer, e)) for layer in range(3) for e in range(5)}
    assert spans == {N_SPANS[form]}


def test_bfloat16_experts_stay_bfloat16(tmp_path):
    path = write_checkpoint(tmp_path / "plain", dtype=mx.bfloat16, quantization=None)
    with CheckpointExperts.open(path) as store:
        assert {t.dtype for t in store.layout(1).tensors} == {"BF16"}


@pytest.fixture(scope="module")
def expected(plain):
    pack(plain, plain.with_name("packed"))
    with PackedExperts.open(plain.with_name("packed")) as store:
        return records(store)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(
    forms=st.tuples(*[st.sampled_from(FORMS)] * 3),
    seed=st.integers(0, 2**32),
    n_shards=st.integers(1, 7),
    n_slots=st.integers(2, 15),
)
def test_any_order_in_any_shards_streams_the_same(
    plain, tensors, expected, tmp_path_factory, forms, seed, n_shards, n_slots
):
    mixed: dict[str, Raw] = {}
    for layer, form in enumerate(forms):
        for name, raw in in_form(tensors, form).items():
            if f".layers.{layer}." in name or ".layers." not in name:
                mixed[name] = raw
    names = list(mixed)
    random.Random(seed).shuffle(names)
    path = tmp_path_factory.mktemp("mixed")
    shutil.copyfile(plain / "config.json", path / "config.json")
    write_raw(path, {name: mixed[name] for name in names}, n_shards)
    with CheckpointExperts.open(path) as store:
        assert records(store) == expected
        stride = store.layout(0).stride
        memory = n_slots * stride + POOL_ALIGNMENT
        with ExpertStreamer(store, memory, inline_bytes=0) as streamer:
            for layer in store.layers:
                n_bytes = store.layout(layer).record_bytes
                for wave in streamer.source(layer).waves([4, 0, 3, 1, 2]):
                    for expert, slot in wave:
                        # With all experts in memory, each layer counts its own slots.
                        row = 5 * layer + slot if streamer.resident else slot
                        found = bytes(streamer.pools[0].buffer(row, n_bytes))
                        assert found == expected[layer, expert]


@given(st.lists(st.tuples(*[st.integers(0, 1)] * 2, st.integers(1, 4)), max_size=12))
def test_merged_pieces_are_the_pieces_in_the_order_of_the_file(gaps):
    pieces, offset, start = [], 0, 0
    for gap, gap_in_record, n_bytes in gaps:
        offset, start = offset + gap, start + gap_in_record
        pieces.append(Piece(3, offset, start, n_bytes))
        offset, start = offset + n_bytes, start + n_bytes
    runs = merge(random.Random(len(gaps)).sample(pieces, len(pieces)))
    moved = {
        (piece.offset + i, piece.start + i)
        for run in runs
        for piece in run
        for i in range(piece.n_bytes)
    }
    assert moved == {
        (p.offset + i, p.start + i) for p in pieces for i in range(p.n_bytes)
    }
    n_gaps = sum(gap for gap, *_ in gaps[1:])
    assert len(runs) == (n_gaps + 1 if gaps else 0)
    for run in runs:
        ends = [piece.offset + piece.n_bytes for piece in run]
        assert ends[:-1] == [piece.offset for piece in run[1:]]
        places = [piece.start + piece.n_bytes for piece in run]
        joint = zip(places, run[1:], strict=False)
        assert all(place != piece.start for place, piece in joint)


def test_heads_that_predict_several_tokens_are_not_experts_of_layer_0(broken):
    def add(tensors):
        raw = tensors["model.layers.0.mlp.switch_mlp.up_proj.weight"]
        tensors["mtp.layers.0.mlp.experts.0.up_proj.weight"] = raw

    edit(broken, add)
    with CheckpointExperts.open(broken) as store:
        assert not any("mtp." in name for name in store.tensor_names)


STEM = "model.layers.1.mlp.switch_mlp"


def drop(name):
    return lambda tensors: tensors.pop(name)


def rename(name, other):
    return lambda tensors: tensors.update({other: tensors.pop(name)})


def reshape(name, *shape, dtype=None):
    def change(tensors):
        raw = tensors[name]
        tensors[name] = Raw(dtype or raw.dtype, shape, raw.data)

    return change


def cut(name, n_rows, axis=1):
    """Drop the last rows of a tensor (experts when the axis is 0)."""

    def change(tensors):
        parts = [tensors[name]] if axis == 0 else tensors[name].experts()
        kept = []
        for raw in parts:
            n = raw.shape[0] - n_rows
            data = raw.data[: len(raw.data) * n // raw.shape[0]]
            kept.append(Raw(raw.dtype, (n, *raw.shape[1:]), data))
        shape = kept[0].shape if axis == 0 else (len(kept), *kept[0].shape)
        tensors[name] = Raw(kept[0].dtype, shape, b"".join(k.data for k in kept))

    return change


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop(f"{STEM}.up_proj.weight"), [f"{STEM}.up_proj.weight is missing"]),
        (drop(f"{STEM}.up_proj.scales"), [f"{STEM}.up_proj.weight", "columns"]),
        (drop(f"{STEM}.up_proj.biases"), [f"{STEM}.up_proj.weight", "biases"]),
        (cut(f"{STEM}.up_proj.weight", 2), [f"{STEM}.up_proj", "94"]),
        (cut(f"{STEM}.down_proj.scales", 2), [f"{STEM}.down_proj.scales", "64 rows"]),
        (cut(f"{STEM}.up_proj.scales", 1, 0), [f"{STEM}.up_proj.scales", "5 experts"]),
        (
            reshape(f"{STEM}.up_proj.weight", 5, 96 * 8),
            [f"{STEM}.up_proj.weight", "[experts, rows, columns]"],
        ),
        (
            reshape(f"{STEM}.up_proj.weight", 5, 96, 8, dtype="F32"),
            [f"{STEM}.up_proj.weight", "packed rows"],
        ),
        (
            rename(f"{STEM}.up_proj.weight", f"{STEM}.up_proj.qweight"),
            [f"{STEM}.up_proj.qweight", "weight"],
        ),
        (
            rename(f"{STEM}.up_proj.scales", f"{STEM}.up_proj.weight_scale_inv"),
            [f"{STEM}.up_proj.weight_scale_inv", "scales"],
        ),
        (
            reshape(f"{STEM}.up_proj.scales", 5, 96, 8, dtype="U8"),
            [f"{STEM}.up_proj.scales", "a known quantisation"],
        ),
        (
            rename("model.norm.weight", "model.layers.1.mlp.experts.up_proj"),
            ["model.layers.1.mlp.experts.up_proj", "one stack of experts in layer 1"],
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named_with_their_file(change, words, broken):
    edit(broken, change)
    message = refused(broken)
    assert all(word in message for word in words), message
    assert "missing" in message or str(broken / "model.safetensors") in message


EACH = "model.layers.1.mlp.experts"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop(f"{EACH}.3.up_proj.scales"), [f"{EACH}.3.up_proj.scales is missing"]),
        (drop(f"{EACH}.4.up_proj.scales"), [f"{EACH}.4.up_proj.scales is missing"]),
        (
            reshape(f"{EACH}.3.up_proj.weight", 48, 16),
            [f"{EACH}.3.up_proj.weight", "as of other experts"],
        ),
        (
            rename(f"{EACH}.3.up_proj.weight", f"{EACH}.up_proj.weight"),
            [f"{EACH}.", "one shape"],
        ),
    ],
)
def test_an_expert_that_does_not_fit_the_others_is_named(change, words, broken):
    write_raw(broken, in_form(read_raw(broken), "each"))
    edit(broken, change)
    message = refused(broken)
    assert all(word in message for word in words), message


def test_fused_rows_that_cannot_be_halved_are_refused(broken):
    write_raw(broken, in_form(read_raw(broken), "fused"))
    name = "model.layers.2.mlp.experts.gate_up_proj"
    edit(broken, cut(name, 1))
    message = refused(broken)
    assert name in message and "an even number of rows" in message


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_experts": 6}, ["layers.0", "expected 6 experts", "got 5"]),
        ({"num_experts": 4}, ["layers.0", "expected 4 experts", "got 5"]),
        ({"num_hidden_layers": 2}, ["layers.2", "layer below 2"]),
        ({"num_experts_per_tok": 6}, ["at most 5 experts per token"]),
        ({"moe_intermediate_size": 97}, ["gate_proj.weight", "97 rows", "got 96"]),
        ({"hidden_size": 65}, ["down_proj.weight", "65 rows", "got 64"]),
        ({"quantization": {"mode": "int3"}}, ["scales", "known quantisation", "int3"]),
        (
            {"quantization": {f"{STEM}.up_proj": {"mode": "mxfp4"}}},
            [f"{STEM}.up_proj.scales", "mxfp4", "affine"],
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_experts_that_do_not_fit_the_configuration_are_refused(fields, words, broken):
    path = broken / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **fields}))
    message = refused(broken)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("n_bytes", [0, 7, 100, -1])
def test_a_truncated_shard_is_named(n_bytes, plain, tmp_path):
    path = reform(plain, tmp_path / "shards", "stacked", 3)
    shard = path / "model-00002-of-00003.safetensors"
    size = shard.stat().st_size
    os.truncate(shard, size - 1 if n_bytes < 0 else n_bytes)
    assert str(shard) in refused(path)


def test_a_missing_shard_is_named(plain, tmp_path):
    path = reform(plain, tmp_path / "shards", "stacked", 3)
    shard = path / "model-00003-of-00003.safetensors"
    shard.unlink()
    assert str(shard) in refused(path)


def test_a_missing_shard_is_named_without_an_index_too(plain, tmp_path):
    path = reform(plain, tmp_path / "shards", "stacked", 3)
    (path / "model.safetensors.index.json").unlink()
    for number in (2, 3):
        shard = path / f"model-0000{number}-of-00003.safetensors"
        data = shard.read_bytes()
        shard.unlink()
        assert f"{shard} missing" in refused(path)
        shard.write_bytes(data)


def test_a_git_lfs_pointer_is_named(plain, tmp_path):
    path = reform(plain, tmp_path / "shards", "stacked", 3)
    shard = path / "model-00002-of-00003.safetensors"
    shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    message = refused(path)
    assert str(shard) in message and "Git LFS" in message


@pytest.mark.parametrize(
    "index",
    [
        {"weight_map": {"mtp.fc.weight": "mtp.safetensors"}},
        {"weight_map": {"old.name": "model-00001-of-00009.safetensors"}},
        {"weight_map": {"model.norm.weight": "../../etc/passwd"}},
        {"weight_map": ["model.norm.weight"]},
        {"weight_map": None},
        [],
        "[" * 100_000,
        "{",
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_index_is_a_hint(index, plain, tmp_path):
    path = Path(shutil.copytree(plain, tmp_path / "other"))
    text = index if isinstance(index, str) else json.dumps(index)
    (path / "model.safetensors.index.json").write_text(text)
    with CheckpointExperts.open(plain) as one, CheckpointExperts.open(path) as other:
        assert records(one) == records(other)


@pytest.mark.parametrize("wrong", ["model.safetensors", "model-0.safetensors"])
def test_the_index_decides_between_files_with_the_same_tensor(wrong, plain, tmp_path):
    right = {"model.safetensors", "model-0.safetensors"} - {wrong}
    path = Path(shutil.copytree(plain, tmp_path / "other"))
    name = f"{STEM}.up_proj.weight"
    raws = read_raw(plain)
    raw = raws[name]
    zeros = {name: Raw(raw.dtype, raw.shape, bytes(len(raw.data)))}
    whole = (path / "model.safetensors").read_bytes()
    write_raw(path, zeros)
    (path / "model.safetensors").rename(path / wrong)
    (path / right.copy().pop()).write_bytes(whole)
    for file in (None, "model-7.safetensors"):
        index = {"weight_map": {} if file is None else {name: file}}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
        message = refused(path)
        assert all(str(path / f) in message for f in (wrong, *right)), message
    index = {"weight_map": dict.fromkeys(raws, right.pop())}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with CheckpointExperts.open(plain) as one, CheckpointExperts.open(path) as other:
        assert records(one) == records(other)


def test_an_offset_out_of_the_file_names_file_and_tensor(broken):
    path = broken / "model.safetensors"
    data = path.read_bytes()
    n_header = int.from_bytes(data[:8], "little")
    fields = json.loads(data[8 : 8 + n_header])
    name = f"{STEM}.up_proj.weight"
    begin, end = fields[name]["data_offsets"]
    fields[name]["data_offsets"] = [begin + 10**6, end + 10**6]
    header = json.dumps(fields).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + n_header :])
    message = refused(broken)
    assert name in message and str(path) in message and "inside" in message


@pytest.mark.parametrize("inline_bytes", [0, 10**9], ids=["threads", "inline"])
def test_a_file_truncated_after_opening_is_an_error_not_a_wrong_expert(
    broken, expected, inline_bytes
):
    path = broken / "model.safetensors"
    data = path.read_bytes()
    with CheckpointExperts.open(broken) as store:
        memory = 4 * store.layout(0).stride + POOL_ALIGNMENT
        with ExpertStreamer(store, memory, inline_bytes=inline_bytes) as streamer:
            source = streamer.source(1)
            ids = mx.array([[0, 3]], dtype=mx.uint32)
            offset = max(span.offset for span in store.spans(1, 3))
            os.truncate(path, offset + 1)
            with pytest.raises(ExpertStoreError) as caught:
                source.slots(ids)
            for word in (str(path), "expert", "layer 1", "the file ends after"):
                assert word in str(caught.value)
            with pytest.raises(ExpertStoreError, match="the file ends after"):
                list(source.waves(range(5)))
            path.write_bytes(data)
            for expert, slot in zip(
                [0, 3], np.array(source.slots(ids))[0], strict=True
            ):
                found = streamer.pools[0].buffer(
                    int(slot), store.layout(1).record_bytes
                )
                assert bytes(found) == expected[1, expert]


@pytest.mark.parametrize("is_packed", [False, True])
def test_files_of_an_unclosed_store_are_closed(plain, tmp_path, is_packed):
    path = plain
    if is_packed:
        path = tmp_path / "packed"
        pack(plain, path)
    before = open_files.count()
    store = open_store(path)
    assert open_files.count() > before
    del store
    assert open_files.count() == before
