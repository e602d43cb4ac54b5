"""State that threads share, and files that processes share."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import mlx.nn as nn
import pytest
from synthetic import write_checkpoint
from threadpoolctl import threadpool_info
from tiny import make_checkpoint

import moeflux_mlx
from moeflux_mlx import device, training
from moeflux_mlx.calls import transforms
from moeflux_mlx.engine import parameters
from moeflux_mlx.engine.executors import verified
from moeflux_mlx.engine.lowering import tuned
from moeflux_mlx.errors import ExpertStoreError, ModelError
from moeflux_mlx.experts.files import checkpoint as checkpoints
from moeflux_mlx.experts.files.pack import pack
from moeflux_mlx.experts.files.unpack import unpack
from moeflux_mlx.saving import whole
from moeflux_mlx.system import files, private

N_WRITERS = 8


def record_one(path, i):
    record = verified.Record("sim", "m", "d", "1", {f"kernel {i}": "digest"})
    verified.save(record, path, [f"kernel {i}"])


def tune_one(path, i):
    entry = tuned.Entry("Op", f"shape {i}", 1, "way", "way", {"way": 1.0})
    tuned.add(tuned.Tuning("m", "sim", "1", "d", (entry,)), path)


@pytest.mark.parametrize(
    ("add", "count"),
    [
        (record_one, lambda path: len(verified._read(path).kernels)),
        (tune_one, lambda path: len(tuned.read(path).entries)),
    ],
)
def test_writers_of_one_file_keep_the_entries_of_each_other(add, count, tmp_path):
    path = tmp_path / "file.json"
    with ThreadPoolExecutor(N_WRITERS) as threads:
        list(threads.map(lambda i: add(path, i), range(2 * N_WRITERS)))
    assert count(path) == 2 * N_WRITERS
    assert [*tmp_path.iterdir()] == [path]


def test_a_file_taken_for_a_leftover_is_made_again(tmp_path, monkeypatch):
    path, flock = tmp_path / "state", fcntl.flock

    def late(fd, how):
        monkeypatch.undo()
        # Another process looks for leftovers before this one has locked its file.
        files._remove_parts(path)
        flock(fd, how)

    monkeypatch.setattr(files.fcntl, "flock", late)
    with files.replacing(path) as file:
        file.write(b"whole")
    assert path.read_bytes() == b"whole" and [*tmp_path.iterdir()] == [path]


def test_the_folder_of_a_killed_process_is_removed_by_the_next(tmp_path):
    if not (child := os.fork()):
        with private.workplace(tmp_path) as folder:
            (folder / "half").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (left,) = tmp_path.iterdir()
    with private.workplace(tmp_path) as first, private.workplace(tmp_path) as second:
        assert {*tmp_path.iterdir()} == {first, second} and left not in (first, second)
    assert not [*tmp_path.iterdir()]


def test_a_second_program_that_saves_to_a_directory_is_refused(tmp_path, monkeypatch):
    model, _ = moeflux_mlx.load(
        make_checkpoint(tmp_path / "plain"), expert_memory="2300000"
    )
    write, seen = whole.Plan.write, []

    def write_twice(*args):
        monkeypatch.undo()
        with pytest.raises(ExpertStoreError, match="another process writes there"):
            whole.save_shards(model, tmp_path / "saved")
        seen.append(sorted(p.name for p in (tmp_path / "saved").iterdir()))
        write(*args)

    monkeypatch.setattr(whole.Plan, "write", write_twice)
    whole.save_shards(model, tmp_path / "saved")
    assert seen == [[whole.UNFINISHED]]
    names = {p.name for p in (tmp_path / "saved").iterdir()}
    assert names == {"model.safetensors.index.json", "model.safetensors"}


def test_experts_come_from_the_file_whose_header_was_read(tmp_path, monkeypatch):
    plain, other = (write_checkpoint(tmp_path / name) for name in ("plain", "other"))
    parse = checkpoints.parse_header

    def replaced(shard, file, *most):
        os.replace(other / shard.name, shard)
        return parse(shard, file, *most)

    expected = os.stat(next(plain.glob("*.safetensors"))).st_ino
    monkeypatch.setattr(checkpoints, "parse_header", replaced)
    with checkpoints.Checkpoint.open(plain) as checkpoint:
        assert os.fstat(checkpoint.fd(checkpoint.shards[0])).st_ino == expected


@pytest.mark.parametrize("way", ["ours", "stock", "resident", "pack", "unpack"])
def test_a_model_replaced_while_it_is_read_is_an_error(way, tmp_path, monkeypatch):
    source, target = make_checkpoint(tmp_path / "plain"), tmp_path / "new"
    if way == "unpack":
        pack(source, tmp_path / "packed")
        source = tmp_path / "packed"
    file = next(source.glob("model*.safetensors"))
    act = {
        "ours": lambda: moeflux_mlx.load(source, expert_memory="2300000"),
        "stock": lambda: moeflux_mlx.load(
            source, expert_memory="2300000", native=False
        ),
        "resident": lambda: moeflux_mlx.load(source),
        "pack": lambda: pack(source, target),
        "unpack": lambda: unpack(source, target),
    }[way]
    parse, data = checkpoints.read_config, file.read_bytes()

    def replaced(directory):
        found = parse(directory)
        file.with_name("new").write_bytes(data)
        os.replace(file.with_name("new"), file)
        return found

    for module in [m for m in sys.modules.values() if _uses(m, parse)]:
        monkeypatch.setattr(module, "read_config", replaced)
    with pytest.raises(ModelError, match=f"{file.name}: expected the same file"):
        act()
    assert not target.exists()


def _uses(module, function):
    return getattr(module, "read_config", None) is function


def test_threads_leave_the_threads_of_blas_as_they_were():
    before = blas_threads()
    first, second = device.host_threads(1), device.host_threads(1)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert blas_threads() == {1}
    second.__exit__(None, None, None)
    assert blas_threads() == before


def blas_threads():
    return {i["num_threads"] for i in threadpool_info() if i["user_api"] == "blas"}


def test_layers_that_threads_collect_at_once_have_numbers_of_their_own(monkeypatch):
    dense, biased = nn.Linear(8, 4, bias=False), nn.Linear(8, 4)

    class Slow(dict):
        def setdefault(self, key, number):
            monkeypatch.setattr(parameters, "_SIGNATURES", own := dict(self))
            other.refresh()
            self.update(own)
            monkeypatch.setattr(parameters, "_SIGNATURES", self)
            return super().setdefault(key, number)

    one, other = parameters.LayerWeights(dense), parameters.LayerWeights(biased)
    monkeypatch.setattr(parameters, "_SIGNATURES", Slow())
    one.refresh()
    assert one.signature != other.signature


def test_a_model_may_end_while_another_begins_to_train(monkeypatch):
    def ends(_):
        training._end(0)

    monkeypatch.setattr(training, "notice", ends)
    model = nn.Linear(1, 1)
    begin = threading.Thread(target=training._begin, args=(model,), daemon=True)
    begin.start()
    begin.join(10)
    assert not begin.is_alive() and not transforms.compiles()
    training._end(id(model))
    assert transforms.compiles()


def test_threads_take_turns_with_the_switch_for_compilation():
    inside, compiled = threading.Event(), []

    def ask():
        with transforms._compiling():
            inside.set()
            compiled.append(transforms.compiles())

    mx.disable_compile()
    try:
        thread = threading.Thread(target=ask)
        with transforms._compiling():
            thread.start()
            assert not inside.wait(0.05)
        thread.join()
        assert compiled == [True] and not transforms.compiles()
    finally:
        mx.enable_compile()


def test_mlx_forgets_a_thread_before_python_does(monkeypatch):
    cleared = []
    clear = lambda: cleared.append(threading.get_ident())  # noqa: E731
    monkeypatch.setattr(mx, "clear_streams", clear)
    threads = [threading.Thread(target=transforms.in_transformation) for _ in range(3)]
    for thread in threads:
        thread.start()
    identities = [thread.ident for thread in threads]
    for thread in threads:
        thread.join()
    assert sorted(cleared) == sorted(identities)
