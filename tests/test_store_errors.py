"""Opening a pack: whatever is wrong with it has a type and names the place."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import open_files
import pytest
from synthetic import write_checkpoint

from moeflux_mlx.errors import ExpertStoreError, ModelError
from moeflux_mlx.experts.manifest import MANIFEST_NAME
from moeflux_mlx.experts.pack import pack
from moeflux_mlx.experts.packed import PackedExperts, verify

ROOT = Path(__file__).parent.parent

# Root reads every file, so the process becomes nobody once it has started.
OPEN = """
import os, sys
from moeflux_mlx.errors import ExpertStoreError
from moeflux_mlx.experts.packed import PackedExperts
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
try:
    PackedExperts.open(sys.argv[1])
except ExpertStoreError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    plain = write_checkpoint(tmp_path_factory.mktemp("store") / "plain")
    pack(plain, plain.with_name("packed"))
    return plain.with_name("packed")


@pytest.fixture
def packed(model, tmp_path):
    shutil.copytree(model, tmp_path / "packed")
    return tmp_path / "packed"


def refused(directory: Path) -> str:
    """Open a pack that cannot be opened, and return why."""
    with open_files.none_left(), pytest.raises(ExpertStoreError) as caught:
        PackedExperts.open(directory)
    return str(caught.value)


def edit_manifest(directory: Path, edit) -> None:
    path = directory / MANIFEST_NAME
    fields = json.loads(path.read_text())
    edit(fields)
    path.write_text(json.dumps(fields))


def test_a_whole_pack_opens_and_closes(packed):
    n_open = open_files.count()
    with PackedExperts.open(packed) as store:
        assert store.layers == (0, 1, 2)
        assert (store.n_experts, store.top_k) == (5, 2)
        assert open_files.count() == n_open + 3
    assert open_files.count() == n_open


@pytest.mark.parametrize("n_bytes", [0, 1, 16384 * 5 - 1, 16384 * 5 + 1, 10**9])
def test_an_expert_file_of_another_size_is_refused(packed, n_bytes):
    path = packed / "experts-001.bin"
    expected_bytes = path.stat().st_size
    os.truncate(path, n_bytes)
    message = refused(packed)
    assert f"{path} of layer 1" in message
    assert f"expected {expected_bytes} bytes but got {n_bytes}" in message


def test_a_missing_layer_file_is_refused(packed):
    (packed / "experts-002.bin").unlink()
    message = refused(packed)
    assert str(packed / "experts-002.bin") in message and "layer 2" in message


def test_something_else_in_the_place_of_a_file_is_refused(packed):
    path = packed / "experts-000.bin"
    path.unlink()
    path.mkdir()
    assert f"{path} of layer 0: expected a file" in refused(packed)


def test_a_file_that_may_not_be_read_is_refused():
    # Not under tmp_path, which only its owner may enter.
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        plain = write_checkpoint(Path(root) / "plain")
        packed = Path(root) / "packed"
        pack(plain, packed)
        os.chmod(packed / "experts-001.bin", 0)
        command = [sys.executable, "-c", OPEN, str(packed)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert f"{packed / 'experts-001.bin'} of layer 1" in done.stdout
    assert "Permission denied" in done.stdout


@pytest.mark.parametrize("version", [0, 2, "1", None, True])
def test_a_manifest_of_another_version_is_refused(packed, version):
    edit_manifest(packed, lambda f: f.update(version=version))
    message = refused(packed)
    assert str(packed / MANIFEST_NAME) in message
    assert f"version to be {'1' if type(version) is int else 'int'}" in message


@pytest.mark.parametrize(
    "name",
    [
        "../experts-000.bin",
        "/etc/hostname",
        "sub/experts-000.bin",
        "..",
        ".",
        "",
        "experts\0.bin",
        "..\\experts",
        7,
    ],
)
def test_a_name_that_leaves_the_directory_is_refused(packed, name):
    edit_manifest(packed, lambda f: f["layers"][1].update(file=name))
    assert "file to be" in refused(packed)
    shutil.copyfile(packed / "model.safetensors", packed.parent / "outside")
    edit_manifest(packed, lambda f: f["layers"][1].update(file="experts-001.bin"))
    edit_manifest(packed, lambda f: f["resident"].update(file="../outside"))
    assert "'../outside'" in refused(packed)


@pytest.mark.parametrize(
    "edit",
    [
        lambda f: f.update(format="other"),
        lambda f: f.pop("layers"),
        lambda f: f["layers"].append(f["layers"][0]),
        lambda f: f["layers"][0].update(layer=3),
        lambda f: f["layers"][0].update(layer=-1),
        lambda f: f["layers"][0].update(layout=7),
        lambda f: f["layers"][0].update(layout=-1),
        lambda f: f["layers"][0].update(n_bytes=16384),
        lambda f: f["layers"][0]["checksums"].pop(),
        lambda f: f["layers"][0].update(checksums=["zz"] * 5),
        lambda f: f["layouts"][0]["tensors"][2].update(offset=0),
        lambda f: f["model"].update(n_experts=-5),
        lambda f: f["model"].update(top_k=2.0),
        lambda f: f.update(resident=None),
        lambda f: f["resident"].update(fingerprint=12),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(packed, edit):
    edit_manifest(packed, edit)
    assert refused(packed).startswith("[")


def test_a_manifest_that_is_no_json_is_refused(packed):
    (packed / MANIFEST_NAME).write_text('{"format": ')
    assert str(packed / MANIFEST_NAME) in refused(packed)


def test_weights_of_another_model_are_refused(packed, tmp_path):
    other = write_checkpoint(tmp_path / "other", seed=1)
    pack(other, tmp_path / "other-packed")
    name = "model.safetensors"
    shutil.copyfile(tmp_path / "other-packed" / name, packed / name)
    message = refused(packed)
    assert str(packed / name) in message and "another model" in message


@pytest.mark.parametrize(
    "key", ["num_hidden_layers", "num_experts", "num_experts_per_tok", "model_type"]
)
def test_the_configuration_of_another_model_is_refused(packed, key):
    path = packed / "config.json"
    config = json.loads(path.read_text())
    config[key] = "other" if key == "model_type" else config[key] + 1
    path.write_text(json.dumps(config))
    assert "another model" in refused(packed)


def test_the_manifest_of_another_model_is_refused(packed, tmp_path):
    other = write_checkpoint(tmp_path / "other", seed=1)
    pack(other, tmp_path / "other-packed")
    shutil.copyfile(tmp_path / "other-packed" / MANIFEST_NAME, packed / MANIFEST_NAME)
    assert "another model" in refused(packed)


@pytest.mark.parametrize("n_bytes", [0, 5, 200])
def test_truncated_resident_weights_are_refused(packed, n_bytes):
    os.truncate(packed / "model.safetensors", n_bytes)
    assert str(packed / "model.safetensors") in refused(packed)


def test_a_missing_resident_file_is_refused(packed):
    (packed / "model.safetensors").unlink()
    assert str(packed / "model.safetensors") in refused(packed)


@pytest.mark.parametrize("spoil", ["nothing there", "empty", "no config"])
def test_a_directory_that_is_not_a_model_is_refused(packed, tmp_path, spoil):
    path = tmp_path / "empty"
    if spoil == "empty":
        path.mkdir()
    if spoil == "no config":
        path = packed
        (packed / "config.json").unlink()
    for function in (PackedExperts.open, verify):
        with pytest.raises(ModelError, match=str(path)):
            function(path)


def test_a_plain_checkpoint_is_not_a_pack(tmp_path):
    plain = write_checkpoint(tmp_path / "plain")
    assert str(plain / MANIFEST_NAME) in refused(plain)
