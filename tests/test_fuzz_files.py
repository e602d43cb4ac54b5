"""Wrong files of every kind end in typed errors; ``scripts/fuzz_files`` tries more."""

from __future__ import annotations

import os
import random
import runpy
import sys
from pathlib import Path

import pytest

from moeflux_mlx.errors import ModelError

ROOT = Path(__file__).parent.parent
KINDS = (
    *("header", "index", "config", "manifest"),
    *("state", "trace", "tuning", "verification"),
)
# Cases of each kind: 2,000 in all.
N_CASES = 250


@pytest.fixture(scope="module")
def fuzzing():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import fuzzing

        yield fuzzing
    finally:
        sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def kinds(fuzzing, tmp_path_factory):
    return fuzzing.make_kinds(tmp_path_factory.mktemp("fuzz"))


def test_every_kind_is_tried(kinds):
    assert set(kinds) == set(KINDS)


@pytest.mark.sampled
@pytest.mark.parametrize("name", KINDS)
def test_a_wrong_file_is_a_typed_error(fuzzing, kinds, name):
    kind = kinds[name]
    cases = list(fuzzing.fuzz(name, kind, 0, 0, N_CASES))
    assert len(cases) == N_CASES
    assert [str(fault) for fault in cases if fault] == []


@pytest.mark.sampled
@pytest.mark.parametrize("name", KINDS)
def test_most_cases_are_wrong_and_follow_from_their_numbers(fuzzing, kinds, name):
    kind = kinds[name]
    made = [
        [kind.mutate(kind.samples[0], random.Random(f"{i}")) for i in range(100)]
        for _ in range(2)
    ]
    assert made[0] == made[1]
    assert len({*made[0]} - {kind.samples[0]}) > 80


def raises(error):
    def read(path):
        raise error

    return read


class LoudError(ModelError):
    """An error that shows all of its arguments."""

    __str__ = Exception.__str__


def opens_outside(path):
    open(os.devnull).close()


def hangs(path):
    while True:
        pass


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("read", "what"),
    [
        (raises(ValueError("x")), "ValueError: x"),
        (raises(RecursionError("x")), "RecursionError: x"),
        (raises(AssertionError()), "AssertionError: "),
        (raises(SystemExit(1)), "SystemExit: 1"),
        (raises(LoudError("a\nb")), "not one line: 'a\\nb'"),
        (raises(LoudError("a" * 4000)), "not one line"),
        (opens_outside, "opened ['/dev/null']"),
        (hangs, "TimeoutError: it took 1 seconds"),
    ],
)
def test_the_forbidden_effects_of_a_file_are_reported(
    fuzzing, tmp_path, monkeypatch, read, what
):
    monkeypatch.setattr(fuzzing, "LIMIT_S", 1)
    kind = fuzzing.Kind([b"{}"], fuzzing.mutate_json_file, tmp_path / "file", read)
    (fault,) = fuzzing.fuzz("any", kind, 3, 7, 1)
    assert str(fault).startswith(f"any --seed 3 --first 7: {what}")


def test_the_script_reports_its_attempts(fuzzing, kinds, monkeypatch, capsys):
    monkeypatch.setattr(fuzzing, "make_kinds", lambda folder: kinds)
    monkeypatch.setattr(sys, "argv", ["fuzz_files", "tuning", "-n", "20"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / "fuzz_files"), run_name="__main__")
    assert ended.value.code == 0
    assert "tuning: 20 cases, seed 0, from 0: 0 faults" in capsys.readouterr().out
    monkeypatch.setattr(kinds["tuning"], "read", raises(KeyError("x")))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / "fuzz_files"), run_name="__main__")
    assert ended.value.code == 1
    assert "fault: tuning --seed 0 --first 0: KeyError" in capsys.readouterr().out
