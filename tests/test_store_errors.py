"""Opening a faulty pack raises a typed error that names the place."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from pathlib import Path

import open_files
import pytest
import xxhash
from commands import python
from synthetic import write_checkpoint

from moeflux_mlx.errors import ExpertStoreError, ModelError
from moeflux_mlx.experts.files.layout import ExpertLayout
from moeflux_mlx.experts.files.manifest import MANIFEST_NAME, Manifest, checksum_of
from moeflux_mlx.experts.files.pack import pack
from moeflux_mlx.experts.files.packed import PackedExperts, verify

ROOT = Path(__file__).parent.parent

# Root reads every file, so the process becomes nobody once it has started.
OPEN = """
import os, sys
from moeflux_mlx.errors import ExpertStoreError
from moeflux_mlx.experts.files.packed import PackedExperts
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
    """Open a pack that must be refused; return the error's message."""
    with open_files.none_left(), pytest.raises(ExpertStoreError) as caught:
        PackedExperts.open(directory)
    return str(caught.value)


def edit_manifest(directory: Path, edit) -> None:
    path = directory / MANIFEST_NAME
    fields = json.loads(path.read_text())
    edit(fields)
    # The change is deliberate: the checksum is right.
    path.write_text(json.dumps({**fields, "checksum": checksum_of(fields)}))


def edit_config(directory: Path, edit) -> None:
    """Change a pack's configuration as its maker would have."""
    path = directory / "config.json"
    fields = json.loads(path.read_text())
    edit(fields)
    path.write_text(json.dumps(fields))
    data = path.read_bytes()

    def list_it(manifest):
        (entry,) = [f for f in manifest["files"] if f["file"] == "config.json"]
        digest = xxhash.xxh3_64_hexdigest(data)
        entry.update(n_bytes=len(data), checksum=digest)

    edit_manifest(directory, list_it)


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


def test_another_thing_in_place_of_a_file_is_refused(packed):
    path = packed / "experts-000.bin"
    path.unlink()
    path.mkdir()
    assert f"{path} of layer 0: expected a regular file" in refused(packed)
    path.rmdir()
    os.mkfifo(path)
    assert "expected a regular file but got a FIFO" in refused(packed)


@pytest.mark.slow
def test_a_file_that_may_not_be_read_is_refused():
    # Only its owner may enter tmp_path, so use another folder.
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        plain = write_checkpoint(Path(root) / "plain")
        packed = Path(root) / "packed"
        pack(plain, packed)
        os.chmod(packed / "experts-001.bin", 0)
        done = python("-c", OPEN, packed)
    assert done.returncode == 0, done.stderr
    assert f"{packed / 'experts-001.bin'} of layer 1" in done.stdout
    assert "Permission denied" in done.stdout


@pytest.mark.parametrize("version", [0, 1, 3, "2", None, True])
def test_a_manifest_of_another_version_is_refused(packed, version):
    edit_manifest(packed, lambda f: f.update(version=version))
    message = refused(packed)
    assert str(packed / MANIFEST_NAME) in message
    assert f"version to be {'2, so pack' if type(version) is int else 'int'}" in message


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
        lambda f: f["resident"].update(file="experts-000.bin"),
        lambda f: f["resident"].update(file="moeflux.json"),
        lambda f: f["layers"][0].update(file="experts-001.bin"),
        lambda f: f["model"].update(top_k=6),
        lambda f: f["files"].append(f["files"][0]),
        lambda f: f["files"].append({}),
        lambda f: f["files"][0].update(file="../config.json"),
        lambda f: f["files"][0].update(file="a/../../config.json"),
        lambda f: f["files"][0].update(file="/etc/hostname"),
        lambda f: f["files"][0].update(n_bytes="1"),
        lambda f: f.pop("files"),
        lambda f: f["layouts"][0].update(alignment=32),
        lambda f: f.update(alignment=2**62),
        lambda f: f["layouts"][0].update(tensors=[]),
        lambda f: f["layouts"][0]["tensors"][0].update(shape=[2**62] * 10**5),
        lambda f: f["layouts"][0]["tensors"][0].update(dtype=["U32"]),
        lambda f: f["layouts"][0]["tensors"][0].update(projection={}),
        lambda f: f["layouts"][0]["quantization"].update(gate_proj=[4, 32]),
        lambda f: f["layouts"][0]["quantization"].update(gate_proj={"bits": 0}),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(packed, edit):
    edit_manifest(packed, edit)
    assert refused(packed).startswith("[")


# Every field of a record's layout with wrong values.
Q = {"bits": 4, "group_size": 32, "mode": "affine"}
LAYOUTS = [
    *[("quantization", "gate_proj", {**Q, "bits": bits}) for bits in (0, 1, 2, 8, "4")],
    *[("quantization", "up_proj", {**Q, "group_size": n}) for n in (0, 64, -32, None)],
    *[("quantization", "down_proj", {**Q, "mode": m}) for m in ("mxfp4", "", None, 4)],
    *[("quantization", name, None) for name in ("gate_proj", "up_proj", "down_proj")],
    *[("tensors", i, {"dtype": "F16"}) for i in range(9)],
    *[("tensors", i, {"dtype": "I32"}) for i in range(9)],
    *[("tensors", i, {"dtype": "U8"}) for i in (1, 4, 7)],
    *[("tensors", i, {"projection": "gate_proj"}) for i in range(3, 9)],
    *[("tensors", i, {"part": "biases"}) for i in (0, 1, 3, 4, 6, 7)],
]


@pytest.mark.parametrize(("table", "key", "value"), LAYOUTS)
@pytest.mark.parametrize("as_made", [False, True])
def test_a_layout_that_no_expert_has_is_refused(packed, table, key, value, as_made):
    """This holds even if offsets, sizes and checksums fit such a layout."""

    def edit(fields):
        layout = fields["layouts"][0]
        if table == "tensors":
            layout["tensors"][key].update(value)
        else:
            layout["quantization"][key] = value
        if as_made:
            lay_out(layout)
            stride = ExpertLayout.from_json(layout).stride
            for entry in fields["layers"]:
                entry["n_bytes"] = stride * 5
                os.truncate(packed / entry["file"], stride * 5)

    try:
        edit_manifest(packed, edit)
    except ExpertStoreError as error:
        # No layout is possible with these values.
        assert as_made and str(error).startswith("[layout] expected")
    else:
        assert str(packed / MANIFEST_NAME) in refused(packed)


def lay_out(layout):
    """Give tensors the offsets that follow from their types and shapes."""
    end = 0
    for tensor in layout["tensors"]:
        tensor["offset"] = -(-end // 16) * 16
        size = {"F16": 2, "U8": 1}.get(tensor["dtype"], 4)
        end = tensor["offset"] + math.prod(tensor["shape"]) * size


@pytest.mark.parametrize(
    "edit",
    [
        lambda f: f.update(hidden_size=65),
        lambda f: f.update(moe_intermediate_size=64),
        lambda f: f["quantization"].update(mode="mxfp4x"),
        lambda f: f["quantization"]["model.layers.1.mlp.switch_mlp.up_proj"].update(
            mode="mxfp4"
        ),
    ],
)
def test_layouts_are_checked_against_the_configuration(packed, edit):
    edit_config(packed, edit)
    assert "[experts]" in refused(packed)


def test_every_single_change_of_a_manifest_is_noticed(packed):
    path = packed / MANIFEST_NAME
    whole = json.loads(path.read_text())
    n_changes = 0
    for place, value in leaves(whole):
        fields = json.loads(json.dumps(whole))
        inner = fields
        for key in place[:-1]:
            inner = inner[key]
        for other in (None, 0, 10**30, "x", [], "F16"):
            if type(other) is type(value) and other == value:
                continue
            inner[place[-1]] = other
            path.write_text(json.dumps(fields))
            with pytest.raises(ExpertStoreError):
                Manifest.read(path)
            n_changes += 1
    assert n_changes > 600
    path.write_text(json.dumps(whole))
    PackedExperts.open(packed).close()


def leaves(value, place=()):
    """Yield the path and value of every leaf in JSON."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in inner:
        if isinstance(part, dict | list):
            yield from leaves(part, (*place, key))
        else:
            yield (*place, key), part


def test_weights_laid_beside_a_pack_are_noticed(packed):
    shutil.copyfile(packed / "model.safetensors", packed / "model-2.safetensors")
    assert f"{packed / 'model-2.safetensors'} does not belong to this" in refused(
        packed
    )
    report = verify(packed)
    assert report.problems == report.changes and len(report.changes) == 1


@pytest.mark.parametrize(
    "name",
    ["model-2.safetensors", "more.py", "chat_template.jinja", "chat_templates/a.jinja"],
)
def test_a_file_too_many_is_noticed_if_it_may_be_read(packed, name):
    (packed / name).parent.mkdir(exist_ok=True)
    (packed / name).write_text("x")
    assert f"{packed / name} does not belong to this pack" in refused(packed)


def test_unused_files_may_be_added_and_removed(packed):
    for name in ("README.md", "notes", ".DS_Store", "trace.npz"):
        (packed / name).write_text("x")
    for name in ("__pycache__", ".cache"):
        (packed / name).mkdir()
        (packed / name / "more.py").write_text("x")
    PackedExperts.open(packed).close()
    assert verify(packed).problems == []


@pytest.mark.parametrize("name", ["moeflux_model.py", "config.json"])
@pytest.mark.parametrize("change", ["appended", "changed", "missing", "fifo"])
def test_a_changed_small_file_is_noticed(packed, name, change):
    path = packed / name
    data = path.read_bytes()
    path.unlink()
    if change == "appended":
        path.write_bytes(data + b"\n")
    elif change == "changed":
        path.write_bytes(data.replace(b"moeflux_", b"noeflux_"))
    elif change == "fifo":
        os.mkfifo(path)
    if name == "config.json" and change in ("missing", "fifo"):
        with pytest.raises(ModelError, match=str(path.parent)):
            PackedExperts.open(packed)
        return
    assert str(path) in refused(packed)
    assert [str(path) in line for line in verify(packed).changes] == [True]


def test_a_pack_whose_files_are_links_opens(packed, tmp_path):
    # A hub's cache consists of such links.
    links = tmp_path / "snapshot"
    links.mkdir()
    for path in packed.iterdir():
        (links / path.name).symlink_to(path)
    PackedExperts.open(links).close()
    assert verify(links).problems == []


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


def test_a_file_of_a_name_that_no_disk_has_is_refused_in_a_short_line(packed):
    path = packed / "moeflux.json"
    fields = json.loads(path.read_text())
    fields["layers"][0]["file"] = "x" * 3000
    path.write_text(json.dumps(fields))
    with pytest.raises(ExpertStoreError) as caught:
        PackedExperts.open(packed)
    assert len(str(caught.value)) < 1000


def test_values_of_a_manifest_are_shortened_in_errors(packed):
    edit_manifest(
        packed, lambda fields: fields["resident"].update(fingerprint="x" * 9000)
    )
    with pytest.raises(ExpertStoreError, match="damaged or belong to") as caught:
        PackedExperts.open(packed)
    assert len(str(caught.value)) < 3000 and "model.safetensors" in str(caught.value)
