"""Unpacking restores the checkpoint that a pack was made from, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from commands import moeflux
from mlx_lm.utils import load, load_model, save_model
from synthetic import write_checkpoint
from test_door_pack import ORIGINAL, PLAIN_NAMES, rewrite, unstacked, write
from tiny import make_checkpoint

from moeflux_mlx.errors import ExpertStoreError, ModelError
from moeflux_mlx.experts.files.manifest import MANIFEST_NAME, Manifest, checksum_of
from moeflux_mlx.experts.files.pack import pack
from moeflux_mlx.experts.files.safetensors import read_header
from moeflux_mlx.experts.files.unpack import unpack
from moeflux_mlx.experts.weights import Quantization

ROOT = Path(__file__).resolve().parents[1]
TOKENS = mx.array([[5, 6, 7, 9]])


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """Make the scripts' modules importable."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


def tensors(path: Path) -> dict[str, tuple]:
    """Return type, shape and bytes of each tensor of a directory, by name."""
    found = {}
    for file in path.glob("model*.safetensors"):
        data = file.read_bytes()
        for name, entry in read_header(file).items():
            assert name not in found
            own = data[entry.offset : entry.offset + entry.n_bytes]
            found[name] = entry.dtype, entry.shape, own
    return found


def there_and_back(path: Path, **options) -> Path:
    """Pack a checkpoint and unpack it again."""
    packed, back = path.with_name("packed"), path.with_name("back")
    pack(path, packed)
    unpack(packed, back, **options)
    return back


def logits(path: Path) -> mx.array:
    return load_model(path)[0](TOKENS)


def test_a_pack_of_our_own_class_is_restored(checkpoint, packed, tmp_path):
    back = tmp_path / "back"
    done = moeflux("unpack", packed, back)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{back}: a plain checkpoint with its weights in 1 file\n"
    assert tensors(back) == tensors(checkpoint)
    names = {file.name for file in checkpoint.iterdir()}
    assert {file.name for file in back.iterdir()} == names
    for name in names - {"config.json", "model.safetensors"}:
        if not name.endswith("index.json"):
            assert (back / name).read_bytes() == (checkpoint / name).read_bytes()
    configs = [json.loads((p / "config.json").read_text()) for p in (back, checkpoint)]
    assert configs[0] == configs[1]
    model, tokenizer = load(str(back))
    assert mx.array_equal(model(TOKENS), logits(checkpoint))
    assert tokenizer.decode(tokenizer.encode("abc")) == "abc"


FORMS = {
    "mixed": Quantization(8, 32),
    "dense": None,
    "mxfp4": Quantization(4, 32, "mxfp4"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_forms_and_types_are_restored_in_shards_with_an_index(form, dtype, tmp_path):
    forms = [Quantization(4, 32), FORMS[form], FORMS[form]]
    path = write_checkpoint(
        tmp_path / "plain", quantization=forms, dtype=dtype, n_shards=3
    )
    back = there_and_back(path, shard_bytes=30_000)
    assert tensors(back) == tensors(path)
    files = sorted(back.glob("model-*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        entries = read_header(file)
        assert len(entries) == 1 or sum(e.n_bytes for e in entries.values()) <= 30_000
    index = json.loads((back / "model.safetensors.index.json").read_text())
    places = {n: file.name for file in files for n in read_header(file)}
    assert index["weight_map"] == places
    sizes = (len(own) for *_, own in tensors(path).values())
    assert index["metadata"]["total_size"] == sum(sizes)


def fused(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Store all experts' gate and up as rows of one tensor, as releases do."""
    made = {}
    for name, array in weights.items():
        if ".switch_mlp.up_proj." in name:
            continue
        new = name.replace(".switch_mlp.", ".experts.").removesuffix(".weight")
        if ".switch_mlp.gate_proj." in name:
            up = weights[name.replace("gate_proj", "up_proj")]
            array = mx.concatenate([array, up], axis=1)
            new = new.replace("gate_proj", "gate_up_proj")
        made[new if ".switch_mlp." in name else name] = array
    return made


@pytest.mark.parametrize("change", ["an expert each", "fused"])
def test_other_forms_are_restored_under_their_names(change, tmp_path):
    path = make_checkpoint(tmp_path / "plain", bits=None)
    each = unstacked("switch_mlp", "experts", PLAIN_NAMES)
    rewrite(path, fused if change == "fused" else each)
    back = there_and_back(path)
    assert tensors(back) == tensors(path)
    wanted = "layers.3.mlp.experts." + ("gate_up_proj" if change == "fused" else "7.up")
    assert any(wanted in name for name in tensors(back))


@pytest.mark.parametrize(("family", "bits"), [("gpt_oss", 4), ("gemma4_text", None)])
def test_a_pack_of_mlx_lms_class_is_restored(family, bits, tmp_path):
    path = write(tmp_path / "plain", family, bits)
    back = there_and_back(path)
    assert tensors(back) == tensors(path)
    assert mx.array_equal(logits(back), logits(path))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_tensors_that_sanitize_changed_equal_those_of_mlx_lms_converter(
    family, tmp_path
):
    path = rewrite(write(tmp_path / "plain", family), ORIGINAL[family])
    back = there_and_back(path)
    converted = tmp_path / "converted"
    stock = load_model(path, lazy=True)[0]
    save_model(converted, stock)
    assert tensors(back) == tensors(converted)
    assert mx.array_equal(logits(back), logits(path))


def copied(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "pack"))


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("file", "place", "message"),
    [
        ("experts-003.bin", 100, "expert 0 of layer 3 at 0: expected checksum"),
        ("model.safetensors", -100, "model.safetensors: expected the weights"),
        ("tokenizer.json", 100, "tokenizer.json was changed after packing"),
    ],
)
def test_a_damaged_pack_leaves_no_output(packed, tmp_path, file, place, message):
    pack_dir = copied(packed, tmp_path)
    flip(pack_dir / file, place)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ExpertStoreError, match=message):
        unpack(pack_dir, tmp_path / "back")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left")])
def test_an_interrupted_unpack_leaves_nothing(packed, tmp_path, error):
    def stop(what: str, done: int, total: int) -> None:
        if done > total // 2:
            raise error

    with pytest.raises((KeyboardInterrupt, ExpertStoreError)):
        unpack(packed, tmp_path / "back", progress=stop)
    assert [*tmp_path.iterdir()] == []


def test_leftovers_of_a_crash_are_overwritten(checkpoint, packed, tmp_path):
    left = tmp_path / "back.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    (left / "config.json.tmp").write_bytes(b"{")
    unpack(packed, tmp_path / "back")
    assert tensors(tmp_path / "back") == tensors(checkpoint)
    assert not left.exists()


def test_foreign_files_stay_untouched(packed, tmp_path):
    left = tmp_path / "back.partial"
    left.mkdir()
    (left / "thesis.txt").write_text("mine")
    with pytest.raises(ExpertStoreError, match=r"\[unpack\] .*thesis\.txt"):
        unpack(packed, tmp_path / "back")
    assert (left / "thesis.txt").read_text() == "mine"
    (tmp_path / "back").mkdir()
    with pytest.raises(ExpertStoreError, match="it exists"):
        unpack(packed, tmp_path / "back")


def test_a_plain_checkpoint_is_not_unpacked(checkpoint, tmp_path):
    with pytest.raises(ModelError, match=r"\[unpack\] expected a directory that moefl"):
        unpack(checkpoint, tmp_path / "back")
    assert [*tmp_path.iterdir()] == []


def edited(packed: Path, tmp_path: Path, change, part: str = "layers") -> Path:
    """Copy a pack; change its manifest's layers or another part, and its checksum."""
    path = copied(packed, tmp_path)
    fields = json.loads((path / MANIFEST_NAME).read_text())
    for one in fields[part] if part == "layers" else [fields[part]]:
        change(one)
    fields["checksum"] = checksum_of(fields)
    (path / MANIFEST_NAME).write_text(json.dumps(fields))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layer: layer.pop("names"), "the pack has none: use mlx_lm.conv"),
        (lambda layer: layer["names"].pop(), "expected names to be 9 names"),
        (lambda layer: layer.update(names=[1] * 9), "names to be a list of names"),
        (lambda layer: layer.update(names="a" * 9), "names to be a list of names"),
        (lambda layer: layer.update(names=["a"] * 9), "rows of one length and type"),
        (
            lambda layer: layer.update(names=[*"abcdefghi"]),
            "a different name for each tensor but got two of 'a'",
        ),
    ],
)
def test_impossible_names_are_refused(packed, tmp_path, change, message):
    path = edited(packed, tmp_path, change)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ExpertStoreError, match=message):
        unpack(path, tmp_path / "back")
    assert sorted(tmp_path.iterdir()) == before


def test_weights_are_checked_against_their_checksum(packed, tmp_path):
    path = edited(packed, tmp_path, lambda r: r.update(checksum="0" * 16), "resident")
    with pytest.raises(ExpertStoreError, match="safetensors does not match its check"):
        unpack(path, tmp_path / "back")
    assert not (tmp_path / "back.partial").exists()


def test_a_pack_without_names_runs_as_before(packed, tmp_path):
    path = edited(packed, tmp_path, lambda layer: layer.pop("names"))
    names = {entry.names for entry in Manifest.read(path / MANIFEST_NAME).layers}
    assert names == {()}
    wanted = load_model(packed, trust_remote_code=True)[0](TOKENS)
    assert mx.array_equal(load_model(path, trust_remote_code=True)[0](TOKENS), wanted)


PEAK = """
import resource, sys
from moeflux_mlx.experts.files.unpack import unpack
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
unpack(sys.argv[1], sys.argv[2])
print(1024 * (peak() - before))
"""


@pytest.mark.slow
def test_unpacking_holds_one_record(tmp_path):
    size = {"n_layers": 4, "n_experts": 16, "hidden": 512, "inner": 1024}
    path = write_checkpoint(tmp_path / "plain", quantization=None, **size)
    pack(path, tmp_path / "packed")
    command = [sys.executable, "-c", PEAK, tmp_path / "packed", tmp_path / "back"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    n_bytes = os.path.getsize(path / "model.safetensors")
    assert int(done.stdout) < 40 << 20 < n_bytes // 8
    assert tensors(tmp_path / "back") == tensors(path)
