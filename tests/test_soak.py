"""scripts/soak passes if and only if the tokens are right."""

from __future__ import annotations

import importlib
import os
import random
import signal
import time
from pathlib import Path
from types import ModuleType

import pytest
from commands import python

ROOT = Path(__file__).resolve().parent.parent
WAYS = [{"optimistic": "off"}, {"optimistic": "on", "read_ahead": "on"}]


@pytest.fixture
def soaking(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("soaking")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["checkpoint", "packed"])
def test_every_hardship_leaves_the_resident_models_tokens(soaking, form, request):
    soak = soaking.Soak(request.getfixturevalue(form), WAYS, n_tokens=12, seed=5)
    for model in soak.models:
        soak.round(model, soaking.Hardship(True, True, True, n_threads=3))
        soak.round(model, soaking.Hardship(True, True, True, n_threads=1))
    counts = soak.tally.counts
    assert counts["tokens"] == 12 * 4 * len(WAYS)
    assert min(counts["budgets"], counts["states"]) > 0
    assert len(soak.tally.memory) == 2 * len(WAYS)


def test_a_wrong_token_ends_the_soak_and_is_named(soaking, packed):
    soak = soaking.Soak(packed, WAYS, n_tokens=6, seed=0)
    for tokens in soak.expected.values():
        tokens[4] += 1
    with pytest.raises(soaking.WrongToken, match=r"token 4 after .* expected"):
        soak.run(0)


def test_faults_fail_and_shorten_reads_at_their_shares(soaking, tmp_path):
    (tmp_path / "file").write_bytes(bytes(range(100)))
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    tally, preadv, buffer = soaking.Tally(), os.preadv, bytearray(100)
    with soaking.failing_reads(True, random.Random(1), tally):
        for _ in range(5000):
            try:
                n_bytes = os.preadv(fd, [buffer], 0)
            except OSError as error:
                assert error.errno in (5, 4)
            else:
                assert n_bytes in (50, 100) and buffer[:50] == bytes(range(50))
    assert os.preadv is preadv
    assert 2 <= tally.counts["failed reads"] <= 30
    assert 25 <= tally.counts["short reads"] <= 90
    os.close(fd)


def test_the_bell_rings_in_calls_only_and_again_and_again(soaking):
    bell, caught = soaking.Bell(), 0
    before = signal.getsignal(signal.SIGALRM)
    with bell.ringing(True):
        time.sleep(0.01)
        while caught < 2:
            try:
                with bell.during_call(0):
                    time.sleep(5)
            except KeyboardInterrupt:
                caught += 1
    assert signal.getsignal(signal.SIGALRM) is before


def test_growth_is_the_slope_after_settling(soaking):
    steady = [900, 500, 700, *(100 + 30 * i for i in range(6))]
    assert soaking.growth(steady) == pytest.approx(30)
    assert soaking.growth([100]) == 0
    assert soaking.process_bytes() > 1e6


@pytest.mark.slow
def test_the_command_reports_its_outcome(packed):
    flags = ["--model", packed, "--seconds", "0", "--tokens", "4", "--growth", "1e12"]
    command = [ROOT / "scripts" / "soak", *flags]
    done = python(*command)
    assert done.returncode == 0, done.stderr
    assert "packed: " in done.stdout and "every token as resident" in done.stdout
    grown = python(*command, "--growth=-1e12")
    assert grown.returncode == 1 and "soak: expected growth" in grown.stderr
