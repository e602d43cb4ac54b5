"""Packing stays in its folder, in its source and on its disk, and never blocks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import stat
from dataclasses import replace

import mlx.core as mx
import pytest
from mlx_lm.utils import load_tokenizer
from synthetic import write_checkpoint
from test_pack import contents, hub_cache, tmpfs
from tiny import make_checkpoint

import moeflux_mlx
from moeflux_mlx.cli import main
from moeflux_mlx.errors import ExpertStoreError, ModelError
from moeflux_mlx.experts.files.manifest import MANIFEST_NAME, Manifest
from moeflux_mlx.experts.files.model_file import MODEL_FILE, SHIM
from moeflux_mlx.experts.files.pack import JOURNAL_NAME, pack
from moeflux_mlx.experts.files.pack_files import list_files
from moeflux_mlx.experts.files.packed import PackedExperts, verify
from moeflux_mlx.experts.files.sidecars import source_files
from moeflux_mlx.system import volume


@pytest.fixture
def plain(tmp_path):
    path = write_checkpoint(tmp_path / "plain")
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture
def whole(plain, tmp_path):
    """The files of an undisturbed pack."""
    pack(plain, tmp_path / "whole")
    return contents(tmp_path / "whole")


@pytest.fixture
def outside(tmp_path):
    """A file outside, which packing must not touch."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("secret")
    return tmp_path / "outside" / "secret"


def stop_after(layer: int):
    """A progress callback that ends packing once a layer is written."""

    def progress(what, done, total):
        if what == f"layer {layer + 1}":
            raise KeyboardInterrupt

    return progress


@pytest.fixture
def begun(plain, tmp_path):
    """A folder that an earlier run left halfway."""
    with pytest.raises(KeyboardInterrupt):
        pack(plain, tmp_path / "packed", progress=stop_after(1))
    return tmp_path / "packed.partial"


WRITTEN = ["experts-002.bin", "model.safetensors", "config.json", "tokenizer.json"]
WRITTEN += [MODEL_FILE, "moeflux.json", f"{JOURNAL_NAME}.tmp", "config.json.tmp"]


@pytest.mark.sampled
@pytest.mark.parametrize("kind", ["link", "broken link", "second name", "pipe"])
@pytest.mark.parametrize("name", WRITTEN)
def test_nothing_is_written_through_files_in_a_partial_folder(
    name, kind, begun, plain, tmp_path, outside
):
    path = begun / name
    path.unlink(missing_ok=True)
    made = outside.with_name("made")
    if kind == "link":
        path.symlink_to(outside)
    elif kind == "broken link":
        path.symlink_to(made)
    elif kind == "second name":
        path.hardlink_to(outside)
    else:
        os.mkfifo(path)
    with pytest.raises(ExpertStoreError, match=name.replace(".", r"\.")):
        pack(plain, tmp_path / "packed")
    assert outside.read_text() == "secret"
    assert not made.exists()
    assert not (tmp_path / "packed").exists()


def test_a_partial_folder_that_is_a_link_is_not_entered(plain, tmp_path, outside):
    (tmp_path / "packed.partial").symlink_to(outside.parent)
    with pytest.raises(ExpertStoreError, match=r"packed\.partial: .*link"):
        pack(plain, tmp_path / "packed")
    assert [p.name for p in outside.parent.iterdir()] == ["secret"]


def test_a_folder_of_templates_that_is_a_link_is_not_entered(
    begun, plain, tmp_path, outside
):
    (plain / "additional_chat_templates").mkdir()
    (plain / "additional_chat_templates" / "secret").write_text("a file")
    (plain / "additional_chat_templates" / "a.jinja").write_text("a")
    (begun / "additional_chat_templates").symlink_to(outside.parent)
    with pytest.raises(ExpertStoreError, match="additional_chat_templates"):
        pack(plain, tmp_path / "packed")
    assert {p.name for p in outside.parent.iterdir()} == {"secret"}


@pytest.mark.parametrize("name", ["model-2.safetensors", "evil.py", ".hidden"])
def test_files_that_no_run_wrote_are_neither_packed_nor_removed(
    name, begun, plain, tmp_path
):
    (begun / name).write_text("laid beside")
    with pytest.raises(ExpertStoreError, match=name.replace(".", r"\.")):
        pack(plain, tmp_path / "packed")
    assert (begun / name).read_text() == "laid beside"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives folders away")
def test_a_partial_folder_of_another_user_is_not_used(begun, plain, tmp_path):
    os.chown(begun, 65534, 65534)
    with pytest.raises(ExpertStoreError, match="another user"):
        pack(plain, tmp_path / "packed")


def test_a_folder_that_is_replaced_during_packing_does_not_get_the_name(
    plain, tmp_path, outside
):
    partial = tmp_path / "packed.partial"

    def swap(what, done, total):
        if what == "layer 2" and not partial.is_symlink():
            partial.rename(tmp_path / "aside")
            partial.symlink_to(outside.parent)

    with pytest.raises((ExpertStoreError, ModelError)):
        pack(plain, tmp_path / "packed", progress=swap)
    assert {p.name for p in outside.parent.iterdir()} == {"secret"}
    assert not (tmp_path / "packed").exists()


READ = ["config.json", "model.safetensors", "tokenizer.json", "README.md"]


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("kind", ["link", "broken link", "pipe", "socket", "device"])
def test_a_source_with_anything_but_files_of_its_own_is_refused(
    name, kind, plain, tmp_path, outside
):
    path = plain / name
    path.unlink(missing_ok=True)
    if kind == "link":
        path.symlink_to(outside)
    elif kind == "broken link":
        path.symlink_to(plain / "nowhere")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        # The path of a socket must be short.
        here = os.open(plain, os.O_RDONLY)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f"/proc/self/fd/{here}/{name}")
        os.close(here)
    elif os.geteuid() == 0:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 5))
    else:
        pytest.skip("only root makes devices")
    with pytest.raises(ModelError, match=f"{path}: expected a file"):
        pack(plain, tmp_path / "packed")
    assert not list(tmp_path.glob("packed*"))


def test_links_inside_the_source_and_to_its_own_blobs_are_followed(plain, tmp_path):
    links = hub_cache(tmp_path / "hub", plain)
    (links / "vocab.json").symlink_to("tokenizer.json")
    pack(links, tmp_path / "packed")
    assert (tmp_path / "packed" / "vocab.json").read_text() == "{}"
    assert not (tmp_path / "packed" / "vocab.json").is_symlink()


def test_blobs_of_another_repository_are_outside(plain, tmp_path):
    links = hub_cache(tmp_path / "hub", plain)
    other = tmp_path / "hub" / "models--c--d" / "blobs"
    other.mkdir(parents=True)
    (other / "f").write_text("secret")
    (links / "README.md").symlink_to("../../../models--c--d/blobs/f")
    with pytest.raises(ModelError, match=r"README\.md.*models--c--d"):
        pack(links, tmp_path / "packed")


def test_a_folder_of_blobs_that_is_a_link_is_outside(plain, tmp_path):
    links = hub_cache(tmp_path / "hub", plain)
    blobs = links.parent.parent / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="outside of the model"):
        pack(links, tmp_path / "packed")


def test_a_pack_in_a_hub_cache_is_verified_and_run(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "copy")
    links = hub_cache(tmp_path / "hub", tmp_path / "copy")
    assert verify(links).damaged == []
    model, _ = moeflux_mlx.load(links)
    same, _ = moeflux_mlx.load(packed)
    tokens = mx.array([[5, 99, 300]])
    assert mx.array_equal(model(tokens), same(tokens))


SIDECARS = {
    "chat_template.jinja": "{{ messages[0]['content'] }} of a file",
    "additional_chat_templates/tool_use.jinja": "{{ 'tools' }}",
    "additional_chat_templates/rag.jinja": "{{ 'documents' }}",
    "special_tokens_map.json": '{"eos_token": "<|endoftext|>"}',
    "added_tokens.json": '{"<|more|>": 300}',
    "generation_config.json": '{"eos_token_id": [0, 1]}',
    "preprocessor_config.json": "{}",
    "merges.txt": "#version: 0.2\n",
    "vocab.json": "{}",
    "LICENSE": "MIT",
    "README.md": "---\nlicense: mit\n---\n",
}


def test_the_tokenizer_and_all_its_templates_are_those_of_the_original(tmp_path):
    plain = make_checkpoint(tmp_path / "plain")
    for name, text in SIDECARS.items():
        (plain / name).parent.mkdir(exist_ok=True)
        (plain / name).write_text(text)
    pack(plain, tmp_path / "packed")
    for name, text in SIDECARS.items():
        assert (tmp_path / "packed" / name).read_text() == text
    before, after = (load_tokenizer(p) for p in (plain, tmp_path / "packed"))
    assert set(before.chat_template) == {"default", "tool_use", "rag"}
    assert after.chat_template == before.chat_template
    assert after.get_vocab() == before.get_vocab()
    assert after.special_tokens_map == before.special_tokens_map
    assert after.eos_token_ids == before.eos_token_ids
    message = [{"role": "user", "content": "hello"}]
    for name in before.chat_template:
        one, other = (
            t.apply_chat_template(message, chat_template=name, tokenize=False)
            for t in (before, after)
        )
        assert one == other != ""


def test_the_command_lists_omitted_files_and_copied_code(tmp_path, capsys):
    plain = make_checkpoint(tmp_path / "plain")
    (plain / "mtp.safetensors").write_bytes(b"unused")
    (plain / "pytorch_model.bin").write_bytes(b"unused")
    (plain / "tokenization_mine.py").write_text("")
    (plain / "onnx").mkdir()
    assert main(["pack", str(plain), str(tmp_path / "packed")]) == 0
    said = capsys.readouterr().err
    assert "not copied: mtp.safetensors, onnx/, pytorch_model.bin" in said
    assert "tokenization_mine.py: code of the model" in said
    assert not list((tmp_path / "packed").glob("mtp*"))
    assert (tmp_path / "packed" / "tokenization_mine.py").exists()


def no_class(config):
    return {**config, "model_type": "llama"}


def other_width(config):
    return {**config, "text_config": {**config["text_config"], "hidden_size": 128}}


def more_layers(config):
    return {**config, "text_config": {**config["text_config"], "num_hidden_layers": 5}}


@pytest.mark.parametrize("spoil", [no_class, other_width, more_layers])
def test_the_command_refuses_at_once_a_model_that_nothing_can_load(
    spoil, tmp_path, capsys
):
    plain = make_checkpoint(tmp_path / "plain")
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(spoil(config)))
    assert main(["pack", str(plain), str(tmp_path / "packed")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not list(tmp_path.glob("packed*"))


def test_a_run_needs_exactly_the_disk_space_of_the_pack(plain, whole, tmp_path):
    blocks = sum(-(-len(data) // 4096) for data in whole.values())
    # The journal briefly exists beside the manifest, and the folder takes a page.
    with tmpfs(tmp_path / "disk", 4096 * (blocks + 4)) as disk:
        for layer in (0, 1):
            with pytest.raises(KeyboardInterrupt):
                pack(plain, disk / "packed", progress=stop_after(layer))
        pack(plain, disk / "packed")
        assert contents(disk / "packed") == whole


def test_files_to_rewrite_count_as_free_and_kept_files_as_done(
    begun, plain, whole, tmp_path, monkeypatch
):
    kept = sum(len(whole[f"experts-00{n}.bin"]) for n in (0, 1))
    again = 512 * (begun / "experts-002.bin").stat().st_blocks
    # The manifest and the header of the single weight file are not counted.
    needed = sum(len(data) for name, data in whole.items() if name != "moeflux.json")
    header = int.from_bytes(whole["model.safetensors"][:8], "little") + 8
    least = needed - header - kept - again
    before = contents(begun)
    monkeypatch.setattr(
        "moeflux_mlx.experts.files.writer.free_bytes", lambda fd: least - 1
    )
    with pytest.raises(ExpertStoreError, match=f"expected {least} bytes free"):
        pack(plain, tmp_path / "packed")
    assert contents(begun) == before
    monkeypatch.setattr("moeflux_mlx.experts.files.writer.free_bytes", lambda fd: least)
    pack(plain, tmp_path / "packed")
    assert contents(tmp_path / "packed") == whole


LACKING = sorted(volume.LACKING)


@pytest.mark.parametrize("number", LACKING, ids=errno.errorcode.get)
def test_a_volume_without_locks_or_syncing_is_packed_onto(
    number, plain, whole, tmp_path, monkeypatch
):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(os, "fstatvfs", refuse)
    with pytest.warns(UserWarning, match="has no locks"):
        pack(plain, tmp_path / "packed")
    assert contents(tmp_path / "packed") == whole


def test_bytes_that_did_not_reach_the_disk_are_an_error(plain, tmp_path, monkeypatch):
    def fail(fd):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ExpertStoreError, match="Input/output error"):
        pack(plain, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


@pytest.mark.skipif(not os.path.exists("/proc/version"), reason="needs /proc")
def test_a_volume_of_unknown_free_space_is_not_full():
    with open("/proc/version") as file:
        assert volume.free_bytes(file.fileno()) is None


CHANGED = {
    "code added": SHIM + "import os\n",
    "code before": "import os\n" + SHIM,
    "empty": "",
    "one letter": SHIM.replace("load", "Load"),
}


@pytest.mark.parametrize("change", [*CHANGED, "missing", "pipe", "other name"])
def test_a_changed_model_file_is_seen_by_verify_and_by_loading(
    change, packed, tmp_path, capsys
):
    copy = tmp_path / "copy"
    shutil.copytree(packed, copy)
    path = copy / MODEL_FILE
    if change in CHANGED:
        path.write_text(CHANGED[change])
    elif change == "other name":
        config = json.loads((copy / "config.json").read_text())
        config["model_file"] = "evil.py"
        (copy / "config.json").write_text(json.dumps(config))
        path = copy / "config.json"
    else:
        path.unlink()
        if change == "pipe":
            os.mkfifo(path)
    assert [str(path) in line for line in verify(copy).problems] == [True]
    for action in (PackedExperts.open, moeflux_mlx.load):
        with pytest.raises(ExpertStoreError, match=str(path)):
            action(copy)
    assert main(["verify", str(copy)]) == 1
    assert str(path) in "".join(capsys.readouterr())
    if change in ("missing", "pipe"):
        return
    # A user who can write the file can write the manifest too.
    manifest = Manifest.read(copy / MANIFEST_NAME)
    files = list_files(copy, MANIFEST_NAME, manifest.resident.file)
    text = replace(manifest, files=files).to_json()
    (copy / MANIFEST_NAME).write_text(text)
    for action in (verify, PackedExperts.open, moeflux_mlx.load):
        with pytest.raises(ExpertStoreError, match=str(path)):
            action(copy)


def test_files_that_packing_writes_and_hidden_files_are_not_copied(tmp_path):
    plain = make_checkpoint(tmp_path / "plain")
    (plain / ".cache").mkdir()
    for name in (".gitattributes", JOURNAL_NAME, MODEL_FILE):
        (plain / name).write_text("")
    files = source_files(plain)
    copied = set(files.copied) - {"README.md"}
    assert copied == {"tokenizer.json", "tokenizer_config.json"}
    assert files.left_out == ()
    pack(plain, tmp_path / "packed")
    assert (tmp_path / "packed" / MODEL_FILE).read_text() == SHIM
