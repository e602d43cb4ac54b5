"""A cache's files are used only where no other user could have written them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from moeflux_mlx import config
from moeflux_mlx.engine import simulator
from moeflux_mlx.engine.executors import verified
from moeflux_mlx.engine.lowering import tuned
from moeflux_mlx.engine.simulator import compile as compiler
from moeflux_mlx.system import mlx_cache, private

root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
NOBODY = 65534


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of the cache, which does not exist yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(private, "_instead", {})
    return tmp_path / "moeflux-mlx"


def modes(folder: Path) -> set[int]:
    return {path.lstat().st_mode & 0o777 for path in (folder, *folder.rglob("*"))}


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077])
def test_folders_and_files_are_private_whatever_the_umask(umask, cache):
    earlier = os.umask(umask)
    try:
        path = private.made("a", "b") / "record"
        private.write_text(path, "text")
    finally:
        os.umask(earlier)
    assert path == cache / "a" / "b" / "record"
    assert modes(cache) == {0o700, 0o600}
    assert path.read_text() == "text"
    assert private.is_private(path) and private.found("a", "b") == path.parent


def test_a_file_is_replaced_at_once_and_nothing_else_is_left(cache):
    path = private.made() / "record"
    private.write_text(path, "one")
    with open(path) as reader:
        private.write_text(path, "two")
        assert reader.read() == "one"
    assert [p.name for p in cache.iterdir()] == ["record"]
    assert path.read_text() == "two"


def a_link(folder: Path) -> None:
    folder.parent.mkdir(exist_ok=True)
    theirs = folder.with_name("theirs")
    theirs.mkdir()
    folder.symlink_to(theirs)


def writable_by_others(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o777)


def writable_by_a_group(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o770)


def of_another_user(folder: Path) -> None:
    folder.mkdir(parents=True)
    os.chown(folder, NOBODY, NOBODY)


def a_file(folder: Path) -> None:
    folder.parent.mkdir(exist_ok=True)
    folder.write_text("")


BAD = [a_link, writable_by_others, writable_by_a_group, a_file]
BAD += [pytest.param(of_another_user, marks=root)]


@pytest.mark.parametrize("below", ["", "simulator"])
@pytest.mark.parametrize("spoil", BAD)
def test_a_folder_that_others_may_write_is_left_alone(spoil, below, cache, capsys):
    spoil(cache / below)
    before = sorted(cache.parent.rglob("*"))
    for _ in range(2):
        folder = private.made("simulator")
        assert folder.is_relative_to(tempfile.gettempdir())
        assert not folder.is_relative_to(cache)
        assert modes(folder) == {0o700}
        assert private.found("simulator") == folder
    assert sorted(cache.parent.rglob("*")) == before
    said = capsys.readouterr().err
    assert said.count("moeflux: [cache]") == 1
    assert str(cache) in said


@pytest.mark.parametrize("home", ["/proc/nowhere", None])
def test_a_home_that_cannot_be_written_costs_the_cache_alone(
    home, cache, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/passed/over")
    monkeypatch.setenv("HOME", home or "not-absolute")
    assert config.cache_folder().is_absolute()
    assert private.found() is None
    folder = private.made("tuned")
    private.write_text(folder / "record", "text")
    assert private.found("tuned") == folder
    assert "XDG_CACHE_HOME" in capsys.readouterr().err


def planted(path: Path) -> None:
    os.chown(path, NOBODY, NOBODY)


def opened(path: Path) -> None:
    path.chmod(0o666)


def linked(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DOUBTFUL = [opened, linked, piped, pytest.param(planted, marks=root)]


@pytest.mark.parametrize("spoil", DOUBTFUL)
def test_records_that_others_could_have_written_are_ignored(spoil, cache):
    record = verified.Record("metal", "m", "2026-01-01", "1", {})
    verified.remember(record, ())
    path = cache / "verified-metal.json"
    tuning = tuned.default_path("metal")
    tuned.save(tuned.Tuning("m", "metal", "1", "2026-01-01", ()), tuning)
    assert verified.records()[-1] == record
    assert tuned._own_file("metal") == tuning
    spoil(path)
    spoil(tuning)
    assert record not in verified.records()
    assert tuned._own_file("metal") is None


@pytest.mark.skipif(not simulator.available(), reason="needs ziglang and pyelftools")
@pytest.mark.parametrize("spoil", DOUBTFUL)
def test_a_planted_object_is_not_loaded(spoil, cache, monkeypatch):
    path = compiler.built("fast", "int moeflux_one;", ["-nostdinc"], [])
    assert path.parent == cache / "simulator"
    mine = path.read_bytes()
    path.write_bytes(b"planted")
    spoil(path)
    again = compiler.built("fast", "int moeflux_one;", ["-nostdinc"], [])
    assert again == path and private.is_private(path)
    assert path.read_bytes()[:4] == mine[:4] == b"\x7fELF"


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder for temporary files that MLX uses."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    return tmp_path / "tmp"


def test_mlx_keeps_its_own_folder_where_that_is_ours(temporary, cache):
    for _ in range(2):
        mlx_cache.guard()
        assert os.environ["TMPDIR"] == str(temporary)
        assert (temporary / "mlx").is_dir()
    (temporary / "mlx" / "0.32").mkdir()
    (temporary / "mlx" / "0.32" / "lib.so").write_text("")
    mlx_cache.guard()
    assert os.environ["TMPDIR"] == str(temporary)


@pytest.mark.parametrize("place", ["mlx", "mlx/0.32", "mlx/0.32/cpu/lib.so"])
@pytest.mark.parametrize("spoil", [opened, linked, pytest.param(planted, marks=root)])
def test_mlx_gets_another_folder_where_others_could_write(
    spoil, place, temporary, cache, capsys
):
    (temporary / "mlx" / "0.32" / "cpu").mkdir(parents=True)
    (temporary / "mlx" / "0.32" / "cpu" / "lib.so").write_text("")
    spoil(temporary / place)
    mlx_cache.guard()
    assert os.environ["TMPDIR"] == str(cache / "tmp")
    assert modes(cache) == {0o700}
    assert ("is not yours alone" in capsys.readouterr().err) == (spoil is planted)
