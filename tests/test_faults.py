"""Disks that fail while experts stream: an error names the place, then recovery.

No fault may hang, give a wrong token or damage the model for the next request.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import mlx.core as mx
import pytest
from synthetic import write_checkpoint

import moeflux_mlx
from moeflux_mlx.errors import ExpertStoreError, MoefluxError
from moeflux_mlx.experts.files.pack import pack
from moeflux_mlx.experts.files.packed import PackedExperts
from moeflux_mlx.experts.files.store import open_store
from moeflux_mlx.experts.pool.pool import POOL_ALIGNMENT
from moeflux_mlx.experts.streaming.streamer import ExpertStreamer
from moeflux_mlx.measure.compare.measurement import greedy

PROMPT, N_TOKENS = [5, 99, 300, 7, 31], 12
LIMIT_SECONDS = 120


@pytest.fixture(autouse=True)
def no_hang():
    """If a test hangs, print each thread's stack and end the process."""
    faulthandler.dump_traceback_later(LIMIT_SECONDS, exit=True, file=sys.__stderr__)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(params=["packed", "plain"])
def directory(request, checkpoint, packed, tmp_path):
    """A copy of the model, for tests to damage."""
    source = packed if request.param == "packed" else checkpoint
    return Path(shutil.copytree(source, tmp_path / "model"))


@pytest.fixture(params=[0, 10**9], ids=["threads", "inline"])
def model(request, directory, budget):
    loaded, _ = moeflux_mlx.load(directory, expert_memory=budget)
    loaded.streamer._in_flight.reader.inline_bytes = request.param
    assert not loaded.streamer.resident
    yield loaded
    loaded.streamer.close()
    loaded.runtime.store.close()


@pytest.fixture(scope="module")
def expected(checkpoint):
    """The model's tokens with all experts in memory."""
    return generated(moeflux_mlx.load(checkpoint)[0])


def generated(model) -> list[int]:
    return greedy(model, PROMPT, N_TOKENS)[0]


def expert_files(directory: Path) -> list[Path]:
    packed = sorted(directory.glob("experts-*.bin"))
    return packed or sorted(directory.glob("model*.safetensors"))


def check_named(error: BaseException, files: list[Path], *words: str) -> None:
    """Check that a message names a file, the layer, the expert and the cause."""
    text = str(error)
    assert any(str(file) in text for file in files), text
    assert re.search(r"expert \d+ of layer \d+", text), text
    for word in words:
        assert word in text


@contextlib.contextmanager
def preadv_of(monkeypatch, function):
    """Replace ``os.preadv`` by ``function(preadv, fd, buffers, offset)``."""
    preadv = os.preadv
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", lambda *args: function(preadv, *args))
        yield


@pytest.mark.sampled
def test_files_cut_while_open_are_an_error_until_they_are_whole_again(
    model, directory, expected
):
    files = expert_files(directory)
    whole = [file.read_bytes() for file in files]
    for share in (0, 3, 7):
        for file, data in zip(files, whole, strict=True):
            os.truncate(file, len(data) * share // 8)
        with pytest.raises(ExpertStoreError) as caught:
            generated(model)
        check_named(caught.value, files, "the file ends after")
        for file, data in zip(files, whole, strict=True):
            file.write_bytes(data)
        assert generated(model) == expected


@pytest.mark.sampled
def test_a_file_cut_during_a_read_is_an_error(model, directory, expected, monkeypatch):
    """The size is checked after the read, whose bytes may be zeros."""
    files = expert_files(directory)
    whole = [file.read_bytes() for file in files]

    def cut(preadv, *args):
        n_bytes = preadv(*args)
        for file in files:
            os.truncate(file, 0)
        return n_bytes

    with preadv_of(monkeypatch, cut), pytest.raises(ExpertStoreError) as caught:
        generated(model)
    check_named(caught.value, files)
    # Another thread that begins after the cut may raise the second error.
    seen = "cut to 0 bytes during the read", "the file ends after"
    assert any(words in str(caught.value) for words in seen)
    for file, data in zip(files, whole, strict=True):
        file.write_bytes(data)
    assert generated(model) == expected


@pytest.mark.sampled
def test_files_deleted_while_open_are_still_read(model, directory, budget, expected):
    """Their bytes exist while the files are open; opening them again is an error."""
    for file in expert_files(directory):
        file.unlink()
    assert generated(model) == expected
    with pytest.raises(MoefluxError, match=re.escape(str(directory))):
        moeflux_mlx.load(directory, expert_memory=budget)


@pytest.mark.sampled
def test_replaced_files_are_read_with_their_old_contents(model, directory, expected):
    for file in expert_files(directory):
        other = file.with_name("other")
        other.write_bytes(bytes(file.stat().st_size))
        other.replace(file)
    assert generated(model) == expected


@pytest.mark.sampled
def test_an_input_error_is_an_error_until_it_is_gone(model, directory, expected):
    """Reads of unmapped process memory fail with EIO, as a broken disk does."""
    if not os.path.exists("/proc/self/mem"):
        pytest.skip("no file here whose reads fail with EIO")
    files = expert_files(directory)
    store = model.runtime.store
    spans = [span for layer in store.layers for span in store.spans(layer, 0)]
    kept = {fd: os.dup(fd) for fd in {span.fd for span in spans}}
    broken = os.open("/proc/self/mem", os.O_RDONLY)
    try:
        for fd in kept:
            os.dup2(broken, fd)
        for _ in range(3):
            with pytest.raises(ExpertStoreError) as caught:
                generated(model)
            check_named(caught.value, files, os.strerror(errno.EIO))
    finally:
        os.close(broken)
        for fd, copy in kept.items():
            os.dup2(copy, fd)
            os.close(copy)
    assert generated(model) == expected


@pytest.mark.sampled
@pytest.mark.parametrize("n_good", [0, 1, 7, 20])
def test_an_error_after_some_reads_harms_none_of_them(
    n_good, model, directory, expected, monkeypatch
):
    n_read = 0

    def fail(preadv, *args):
        nonlocal n_read
        n_read += 1
        if n_read > n_good:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(*args)

    with preadv_of(monkeypatch, fail), pytest.raises(ExpertStoreError) as caught:
        generated(model)
    check_named(caught.value, expert_files(directory), os.strerror(errno.EIO))
    assert generated(model) == expected


TRANSIENT = (errno.EIO, errno.EINTR, errno.EAGAIN, errno.ESTALE, None)


@pytest.mark.sampled
@pytest.mark.parametrize("code", TRANSIENT, ids=lambda c: errno.errorcode.get(c, "end"))
def test_a_read_that_fails_once_is_tried_again_and_counted(
    code, model, expected, monkeypatch
):
    """Every other read fails; None means a file that seems to end."""
    tried: set[tuple[int, int]] = set()
    failures = []

    def fail_first(preadv, fd, buffers, offset):
        if (fd, offset) in tried:
            tried.remove((fd, offset))
            return preadv(fd, buffers, offset)
        tried.add((fd, offset))
        failures.append(offset)
        if code is None:
            return 0
        raise OSError(code, os.strerror(code))

    before = model.streamer.stats.total.second_tries
    with preadv_of(monkeypatch, fail_first):
        assert generated(model) == expected
    assert model.streamer.stats.total.second_tries - before == len(failures) > 20


def test_an_error_that_no_second_try_mends_is_not_tried_again(
    model, directory, monkeypatch
):
    tries: list[tuple[int, int]] = []

    def refuse(preadv, fd, buffers, offset):
        tries.append((fd, offset))
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    with preadv_of(monkeypatch, refuse), pytest.raises(ExpertStoreError) as caught:
        generated(model)
    check_named(caught.value, expert_files(directory), os.strerror(errno.EACCES))
    assert len(tries) == len(set(tries)) > 0


@pytest.mark.sampled
def test_short_reads_are_continued(model, expected, monkeypatch):
    def short(preadv, fd, buffers, offset):
        return preadv(fd, [buffers[0][:1_009]], offset)

    with preadv_of(monkeypatch, short):
        assert generated(model) == expected


@pytest.mark.sampled
def test_a_slow_disk_changes_no_token(model, expected, monkeypatch):
    n_read = 0

    def slow(preadv, *args):
        nonlocal n_read
        n_read += 1
        time.sleep(2e-4 * (n_read % 7))
        return preadv(*args)

    with preadv_of(monkeypatch, slow):
        assert generated(model) == expected


@pytest.mark.sampled
@pytest.mark.parametrize("n_good", [0, 7])
def test_an_interrupt_in_the_middle_of_a_read_gets_through(
    n_good, model, expected, monkeypatch
):
    """Ctrl-C ends only the request, even if the disk does not answer."""
    reading, go_on = threading.Event(), threading.Event()
    n_read = 0

    def held(preadv, *args):
        nonlocal n_read
        n_read += 1
        if n_read > n_good:
            reading.set()
            assert go_on.wait(timeout=LIMIT_SECONDS)
        return preadv(*args)

    def press():
        assert reading.wait(timeout=LIMIT_SECONDS)
        # Interrupt once the other thread waits for the read, or is in it.
        time.sleep(0.02)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    presser = threading.Thread(target=press)
    presser.start()
    try:
        with preadv_of(monkeypatch, held), pytest.raises(KeyboardInterrupt):
            generated(model)
    finally:
        go_on.set()
        presser.join()
    assert generated(model) == expected


@pytest.mark.parametrize("n_bytes", [0, 1_000, -1])
def test_a_file_cut_before_it_is_opened_is_refused(n_bytes, directory, budget):
    file = expert_files(directory)[-1]
    size = file.stat().st_size
    os.truncate(file, size - 1 if n_bytes < 0 else n_bytes)
    with pytest.raises(MoefluxError, match=re.escape(str(file))):
        moeflux_mlx.load(directory, expert_memory=budget)


def test_records_are_checked_again_after_their_file_failed(tmp_path):
    """A repaired file may be damaged elsewhere."""
    pack(write_checkpoint(tmp_path / "plain"), tmp_path / "packed")
    with PackedExperts.open(tmp_path / "packed") as store:
        memory = 2 * store.layout(1).stride + POOL_ALIGNMENT
        path, offset = store.path(1), store.offset(1, 3)
        whole = path.read_bytes()
        with ExpertStreamer(store, memory) as streamer:
            source = streamer.source(1)
            for experts in ([2, 3], [0, 1]):
                source.slots(mx.array([experts], dtype=mx.uint32))
            os.truncate(path, offset)
            ask = mx.array([[3, 0]], dtype=mx.uint32)
            with pytest.raises(ExpertStoreError, match="ends after 0"):
                source.slots(ask)
            path.write_bytes(whole[:offset] + b"\xff" + whole[offset + 1 :])
            with pytest.raises(ExpertStoreError, match=r"expert 3 .*checksum"):
                source.slots(ask)
            path.write_bytes(whole)
            slot = source.slots(ask)[0, 0].item()
            n_bytes = store.layout(1).record_bytes
            found = bytes(streamer.pools[0].buffer(slot, n_bytes))
            assert found == whole[offset:][:n_bytes]


@contextlib.contextmanager
def loop_device(image: Path, mount_point: Path):
    """Mount a new file system from a file; skip where mounting is not allowed."""
    mount_point.mkdir()
    with open(image, "wb") as file:
        file.truncate(16 << 20)
    try:
        run("mkfs.ext4", "-q", image)
        device = run("losetup", "-f", "--show", image).strip()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no loop devices here: {error}")
    try:
        run("mount", device, mount_point)
        yield device
    except subprocess.CalledProcessError as error:
        pytest.skip(f"may not mount here: {error.stderr}")
    finally:
        subprocess.run(["umount", mount_point], capture_output=True)
        run("losetup", "-d", device)


def run(*command: str | Path) -> str:
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=LIMIT_SECONDS
    )
    return done.stdout


@pytest.mark.parametrize("form", ["packed", "plain"])
def test_a_disk_that_ends_too_early_is_an_input_error(form, tmp_path):
    image, mount_point = tmp_path / "disk", tmp_path / "mounted"
    plain = write_checkpoint(tmp_path / "plain", n_layers=1, n_experts=64)
    pack(plain, tmp_path / "packed")
    with loop_device(image, mount_point) as device:
        directory = mount_point / form
        shutil.copytree(tmp_path / form, directory)
        # After a new mount, the page cache holds none of the file.
        run("umount", mount_point)
        run("mount", device, mount_point)
        with open_store(directory) as store:
            memory = 2 * store.layout(0).stride + POOL_ALIGNMENT
            with ExpertStreamer(store, memory, inline_bytes=0) as streamer:
                whole = image.read_bytes()
                # The file system's own tables lie at the beginning.
                os.truncate(image, 1 << 20)
                with pytest.raises(ExpertStoreError) as caught:
                    list(streamer.source(0).waves(range(64)))
                image.write_bytes(whole)
                words = os.strerror(errno.EIO), "layer 0"
                check_named(caught.value, expert_files(directory), *words)
                visits = streamer.source(0).waves(range(64))
                assert sum(len(wave) for wave in visits) == 64
