"""Packing: the files it writes, the sources it refuses, and recovery after a crash."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from commands import moeflux
from synthetic import expert_bytes, record_bytes, write_checkpoint
from tiny import make_checkpoint

from moeflux_mlx.errors import ConfigError, ExpertStoreError, ModelError
from moeflux_mlx.experts.files.pack import pack
from moeflux_mlx.experts.files.packed import PackedExperts, is_packed, verify
from moeflux_mlx.experts.files.safetensors import read_header
from moeflux_mlx.experts.weights import Quantization
from moeflux_mlx.system.volume import lock

ROOT = Path(__file__).parent.parent

# Pack, and wait to be killed once half of the bytes are written.
KILLED = """
import sys, time
from moeflux_mlx.experts.files.pack import pack
def progress(what, done, total):
    if 2 * done > total:
        print(what, flush=True)
        time.sleep(600)
pack(sys.argv[1], sys.argv[2], progress=progress)
"""

PEAK = """
import resource, sys
from moeflux_mlx.experts.files.pack import pack
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
pack(sys.argv[1], sys.argv[2])
print(peak() - before)
"""


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def run_script(script: str, *args: object, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", script, *map(str, args)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, **options
    )


@pytest.fixture
def plain(tmp_path):
    return write_checkpoint(tmp_path / "plain")


@contextlib.contextmanager
def tmpfs(path: Path, n_bytes: int):
    """Mount a small disk at ``path``."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={n_bytes}", "tmpfs", str(path)]
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root on Linux")
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("this machine does not let its root mount a small disk")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize(
    "form",
    [
        Quantization(4, 32),
        Quantization(4, 32, "mxfp4"),
        None,
        {"gate_proj": None, "up_proj": Quantization(3, 64), "down_proj": None},
        [Quantization(4, 32), Quantization(8, 32), Quantization(4, 32)],
    ],
    ids=["affine", "mxfp4", "dense", "mixed", "by-layer"],
)
def test_every_record_holds_the_bytes_of_its_expert(form, tmp_path):
    plain = write_checkpoint(tmp_path / "plain", quantization=form, inner=64)
    pack(plain, tmp_path / "packed")
    with PackedExperts.open(tmp_path / "packed") as store:
        assert store.layers == (0, 1, 2)
        for layer in store.layers:
            for expert in range(store.n_experts):
                expected = expert_bytes(plain, layer, expert)
                assert record_bytes(store, layer, expert) == expected


def test_bfloat16_scales_stay_bfloat16(tmp_path):
    plain = write_checkpoint(tmp_path / "plain", dtype=mx.bfloat16)
    pack(plain, tmp_path / "packed")
    with PackedExperts.open(tmp_path / "packed") as store:
        assert {t.dtype for t in store.layout(1).tensors} == {"U32", "BF16"}


def test_everything_but_experts_is_copied_byte_by_byte(tmp_path):
    plain, packed = make_checkpoint(tmp_path / "plain"), tmp_path / "packed"
    pack(plain, packed)
    source, copy = plain / "model.safetensors", packed / "model.safetensors"
    before, after = mx.load(str(source)), mx.load(str(copy))
    assert set(after) == {name for name in before if ".switch_mlp." not in name}
    assert len(after) > 20
    for name, array in after.items():
        assert array.dtype == before[name].dtype
        assert mx.array_equal(array, before[name]), name
    assert mx.load(str(copy), return_metadata=True)[1] == {"format": "mlx"}
    assert list(read_header(copy)) == [n for n in read_header(source) if n in after]


def test_a_pack_is_a_model_directory_that_names_its_model_file(tmp_path):
    plain, packed = make_checkpoint(tmp_path / "plain"), tmp_path / "packed"
    for name in ("README.md", "chat_template.jinja", "generation_config.json"):
        (plain / name).write_text(f"{{}}  {name}")
    pack(plain, packed)
    config = json.loads((packed / "config.json").read_text())
    assert config.pop("model_file") == "moeflux_model.py"
    assert config == json.loads((plain / "config.json").read_text())
    kept = {p.name for p in plain.iterdir()} - {"model.safetensors.index.json"}
    added = {f"experts-{layer:03d}.bin" for layer in range(4)}
    added |= {"moeflux.json", "moeflux_model.py"}
    assert {p.name for p in packed.iterdir()} == kept | added
    for name in kept - {"config.json", "model.safetensors"}:
        assert (packed / name).read_bytes() == (plain / name).read_bytes()
    shim = (packed / "moeflux_model.py").read_text()
    assert "Model, ModelArgs = pack_classes(__file__)\n" in shim
    assert is_packed(packed) and not is_packed(plain)


def test_shards_make_the_same_experts_as_one_file(tmp_path, plain):
    shards = write_checkpoint(tmp_path / "shards", n_shards=3)
    pack(plain, tmp_path / "one")
    pack(shards, tmp_path / "three")
    one, three = contents(tmp_path / "one"), contents(tmp_path / "three")
    assert one.keys() == three.keys()
    for name in one.keys() - {"moeflux.json"}:
        assert one[name] == three[name]


def hub_cache(path: Path, model: Path) -> Path:
    """Arrange a model as a hub's cache does; return the folder of links."""
    links = path / "models--a--b" / "snapshots" / "0123abcd"
    links.mkdir(parents=True)
    (path / "models--a--b" / "blobs").mkdir()
    for i, file in enumerate(p for p in model.rglob("*") if p.is_file()):
        file.rename(path / "models--a--b" / "blobs" / f"{i:040x}")
        link = links / file.relative_to(model)
        link.parent.mkdir(exist_ok=True)
        up = "../" * len(file.relative_to(model).parts)
        link.symlink_to(f"{up}../blobs/{i:040x}")
    return links


def test_symbolic_links_of_a_download_cache_become_files(tmp_path, plain):
    (plain / "additional_chat_templates").mkdir()
    (plain / "additional_chat_templates" / "tool.jinja").write_text("tool")
    links = hub_cache(tmp_path / "hub", plain)
    pack(links, tmp_path / "packed", verify=True)
    shutil.rmtree(tmp_path / "hub")
    assert verify(tmp_path / "packed").damaged == []
    inside = tmp_path / "packed" / "additional_chat_templates"
    assert (inside / "tool.jinja").read_text() == "tool"
    assert not any(path.is_symlink() for path in (tmp_path / "packed").rglob("*"))


@pytest.mark.parametrize("alignment", [16, 4096, 65536])
def test_records_are_padded_to_the_alignment(alignment, tmp_path, plain):
    pack(plain, tmp_path / "packed", alignment=alignment)
    with PackedExperts.open(tmp_path / "packed") as store:
        stride = store.offset(2, 1)
        assert stride % alignment == 0
        assert store.path(2).stat().st_size == 5 * stride
    assert verify(tmp_path / "packed").damaged == []


def test_an_alignment_that_is_no_power_of_two_is_refused(tmp_path, plain):
    with pytest.raises(ConfigError, match="alignment"):
        pack(plain, tmp_path / "packed", alignment=1000)
    assert list(tmp_path.iterdir()) == [plain]


def test_progress_rises_to_the_total(tmp_path, plain):
    seen = []
    pack(plain, tmp_path / "packed", progress=lambda *step: seen.append(step))
    done = [bytes_done for _, bytes_done, _ in seen]
    assert done == sorted(done)
    assert {total for *_, total in seen} == {done[-1]}
    assert seen[0][0] == "layer 0"


@pytest.mark.slow
def test_memory_stays_at_one_expert_whatever_the_size_of_a_stack(tmp_path):
    plain = write_checkpoint(
        tmp_path / "plain",
        n_layers=1,
        n_experts=67,
        hidden=256,
        inner=512,
        quantization=None,
    )
    assert (plain / "model.safetensors").stat().st_size > 100e6
    with run_script(PEAK, plain, tmp_path / "packed") as process:
        grown_kib = int(process.stdout.read())
    unit = 1 if sys.platform == "darwin" else 1024
    assert grown_kib * unit < 32e6


@pytest.mark.parametrize("exists", ["file", "empty", "pack", "broken link"])
def test_an_existing_target_is_never_overwritten(exists, tmp_path, plain):
    packed = tmp_path / "packed"
    if exists == "file":
        packed.write_text("precious")
    elif exists == "broken link":
        packed.symlink_to(tmp_path / "nowhere")
    else:
        packed.mkdir()
        (packed / "moeflux.json").write_text("{}") if exists == "pack" else None
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ExpertStoreError, match="it exists"):
        pack(plain, packed)
    assert sorted(tmp_path.rglob("*")) == before


def no_directory(path):
    shutil.rmtree(path)


def no_config(path):
    (path / "config.json").unlink()


def config_is_a_list(path):
    (path / "config.json").write_text("[]")


def no_weights(path):
    (path / "model.safetensors").unlink()


def truncated_weights(path):
    os.truncate(path / "model.safetensors", 10_001)


def a_dense_model(path):
    mx.save_safetensors(str(path / "model.safetensors"), {"a.weight": mx.zeros((3, 5))})


def experts_in_part(path):
    names = [f"model.layers.0.mlp.experts.{e}.up_proj.weight" for e in range(3)]
    names.append("model.layers.0.mlp.experts.1.gate_proj.weight")
    tensors = {name: mx.zeros((3, 5)) for name in names}
    mx.save_safetensors(str(path / "model.safetensors"), tensors)


def other_number_of_experts(path):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_experts": 6}))


def no_top_k(path):
    config = json.loads((path / "config.json").read_text())
    del config["num_experts_per_tok"]
    (path / "config.json").write_text(json.dumps(config))


def a_shard_is_missing(path):
    config = json.loads((path / "config.json").read_text())
    config["num_hidden_layers"] += 1
    (path / "config.json").write_text(json.dumps(config))
    weight_map = {"weight_map": {"a": "model-00002-of-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(weight_map))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_directory, "expected a directory"),
        (no_config, r"has no config\.json"),
        (config_is_a_list, "expected a JSON object"),
        (no_weights, r"no model\*\.safetensors"),
        (truncated_weights, "truncated"),
        (a_dense_model, "found none"),
        (experts_in_part, r"experts\.0\.gate_proj\.weight is missing"),
        (other_number_of_experts, "expected 6 experts"),
        (no_top_k, "num_experts_per_tok"),
        (a_shard_is_missing, r"model-00002-of-00002\.safetensors"),
    ],
)
def test_an_unusable_source_is_refused(spoil, message, tmp_path, plain):
    spoil(plain)
    with pytest.raises(ModelError, match=message):
        pack(plain, tmp_path / "packed")
    assert not list(tmp_path.glob("packed*"))


def test_a_pack_is_not_packed_again(tmp_path, plain):
    pack(plain, tmp_path / "packed")
    with pytest.raises(ModelError, match="packed"):
        pack(tmp_path / "packed", tmp_path / "again")


def test_a_disk_that_is_too_small_is_found_before_writing(tmp_path, plain):
    with tmpfs(tmp_path / "disk", 128 * 1024) as disk:
        with pytest.raises(ExpertStoreError) as caught:
            pack(plain, disk / "packed")
        needed, available = re.findall(r"(\d+) bytes", str(caught.value))
        assert int(available) <= 128 * 1024 < int(needed)
        assert not list(disk.rglob("experts-*"))
        assert not (disk / "packed").exists()


def test_a_full_disk_loses_nothing_and_packing_continues(tmp_path, plain):
    pack(plain, tmp_path / "whole")
    with tmpfs(tmp_path / "disk", 1024 * 1024) as disk:

        def fill(what, done_bytes, total_bytes):
            if what == "layer 1" and not (disk / "filler").exists():
                with contextlib.suppress(OSError), open(disk / "filler", "wb", 0) as f:
                    while True:
                        f.write(bytes(4096))

        with pytest.raises(ExpertStoreError, match=r"experts-001\.bin") as caught:
            pack(plain, disk / "packed", progress=fill)
        assert os.strerror(errno.ENOSPC) in str(caught.value)
        assert not (disk / "packed").exists()
        (disk / "filler").unlink()
        pack(plain, disk / "packed")
        assert contents(disk / "packed") == contents(tmp_path / "whole")


@pytest.fixture
def killed(tmp_path, plain):
    """``packed.partial`` as ``kill -9`` leaves it halfway."""
    with run_script(KILLED, plain, tmp_path / "packed") as process:
        assert process.stdout.readline().startswith("layer")
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    return tmp_path / "packed.partial"


@pytest.mark.slow
def test_a_killed_pack_continues_where_it_stopped(killed, tmp_path, plain):
    assert not (tmp_path / "packed").exists()
    finished = killed / "experts-000.bin"
    before = finished.stat()
    pack(plain, tmp_path / "whole")
    seen = []
    pack(plain, tmp_path / "packed", progress=lambda what, *_: seen.append(what))
    assert contents(tmp_path / "packed") == contents(tmp_path / "whole")
    after = (tmp_path / "packed" / "experts-000.bin").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert "layer 0 kept" in seen and "layer 0" not in seen and "layer 2" in seen
    assert not killed.exists()


@pytest.mark.slow
def test_a_finished_layer_that_was_damaged_is_written_again(killed, tmp_path, plain):
    with open(killed / "experts-000.bin", "r+b") as file:
        file.seek(777)
        file.write(b"damage")
    pack(plain, tmp_path / "packed")
    assert verify(tmp_path / "packed").damaged == []


@pytest.mark.slow
def test_a_pack_begun_from_another_source_is_not_continued(killed, tmp_path):
    other = write_checkpoint(tmp_path / "other", seed=1)
    before = contents(killed)
    with pytest.raises(ExpertStoreError, match="another source"):
        pack(other, tmp_path / "packed")
    assert contents(killed) == before


def test_two_processes_do_not_pack_into_one_directory(tmp_path, plain):
    partial = tmp_path / "packed.partial"
    partial.mkdir()
    held = os.open(partial, os.O_RDONLY)
    lock(held, partial)
    with pytest.raises(ExpertStoreError, match="another process"):
        pack(plain, tmp_path / "packed")
    os.close(held)
    pack(plain, tmp_path / "packed")
    assert is_packed(tmp_path / "packed")


@pytest.mark.parametrize("name", ["experts-001.bin", "model.safetensors"])
def test_verify_finds_one_flipped_bit(name, tmp_path, plain):
    packed = tmp_path / "packed"
    pack(plain, packed, verify=True)
    path = packed / name
    data = bytearray(path.read_bytes())
    # The last byte of a record, before its padding; the last tensor byte.
    with PackedExperts.open(packed) as store:
        record_end = store.offset(1, 3) + store.layout(1).record_bytes
    data[record_end - 1 if name.endswith(".bin") else -1] ^= 4
    path.write_bytes(data)
    if name == "model.safetensors":
        with pytest.raises(ExpertStoreError, match=name):
            verify(packed)
    else:
        assert verify(packed).damaged == [(path, 1, 3)]


def test_the_commands_pack_and_verify_report_their_work(tmp_path, checkpoint):
    packed = tmp_path / "packed"
    done = moeflux("pack", checkpoint, packed, "--verify", "--alignment", 4096)
    assert done.returncode == 0, done.stderr
    assert "8 experts in each of 4 layers" in done.stdout
    done = moeflux("verify", packed)
    assert done.returncode == 0, done.stderr
    assert all(f"experts-00{layer}.bin" in done.stdout for layer in range(4))


def test_the_command_verify_fails_on_damage_and_says_where(tmp_path, plain):
    packed = tmp_path / "packed"
    pack(plain, packed)
    with open(packed / "experts-002.bin", "r+b") as file:
        file.seek(16384 * 4 + 5)
        file.write(b"?")
    done = moeflux("verify", packed)
    assert done.returncode == 1
    for part in (str(packed / "experts-002.bin"), "expert", "layer 2"):
        assert part in done.stderr
    os.truncate(packed / "experts-000.bin", 63)
    done = moeflux("verify", packed)
    assert done.returncode == 1
    assert str(packed / "experts-000.bin") in done.stderr
