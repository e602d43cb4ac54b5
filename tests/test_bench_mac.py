"""scripts/bench_mac: the row that a Mac's owner reports, and the reasons to void it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import random
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import python

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "bench_mac"


@pytest.fixture
def bench(monkeypatch):
    """Return scripts/bench_mac as a module."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    loader = SourceFileLoader("bench_mac", str(SCRIPT))
    module = importlib.util.module_from_spec(
        importlib.util.spec_from_loader(loader.name, loader)
    )
    loader.exec_module(module)
    return module


def noise(n: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(5000), k=n)


PHRASE = noise(9, 1)
LOOPING = {
    "one-token": [7] * 40,
    "two-tokens": [7, 8] * 20,
    "a-phrase": PHRASE * 8,
    "a-phrase-to-the-end": noise(100) + PHRASE * 5,
    "the-end-in-mid-phrase": noise(100) + (PHRASE * 7)[:-4],
    "a-short-tail": noise(100) + [7] * 32,
    "a-loop-that-was-left": PHRASE * 12 + noise(40),
    "with-a-counter": [x for i in range(12) for x in (*PHRASE, 9000 + i)],
}
OTHERS = {
    "noise": noise(128),
    "a-phrase-four-times": noise(100) + PHRASE * 4,
    "a-phrase-here-and-there": [x for i in range(9) for x in (*noise(12, i), *PHRASE)],
    "a-line-of-blanks": noise(100) + [7] * 31,
    "short": [1, 2, 3],
    "empty": [],
}


@pytest.mark.parametrize("text", LOOPING)
def test_a_text_that_repeats_itself_is_found(bench, text):
    assert bench.mac_way.loops(LOOPING[text])


@pytest.mark.parametrize("text", OTHERS)
def test_other_texts_pass(bench, text):
    assert bench.mac_way.loops(OTHERS[text]) is None


@pytest.mark.parametrize("name", ["README.md", "docs/architecture.md"])
def test_prose_and_code_do_not_loop(bench, name):
    words = (ROOT / name).read_text().split()
    for start in range(0, len(words) - 128, 128):
        assert bench.mac_way.loops(words[start : start + 128]) is None


def way(tokens: list[int], **more) -> dict:
    run = {
        "tokens": tokens,
        "first_token_seconds": 0.5,
        "tokens_per_second": 20.0,
        "hits": 3,
        "misses": 1,
        "read_bytes": 0,
    }
    return {"runs": [run], "peak_process_bytes": 2e9, "peak_mlx_bytes": 1e9, **more}


@pytest.fixture
def found(bench):
    """Results of all ways: the same text, except for stock's second half."""
    text = noise(64)
    ways = {name: way([*text], executor="metal") for name in bench.NAMES}
    ways["stock"] = way(text[:40] + noise(24, 3), executor="mlx-lm")
    return ways


def test_texts_that_agree_and_do_not_loop_make_a_row(bench, found):
    assert bench.why_void(found) == []
    assert bench.in_common(found) == [40]
    assert bench.cell(found["1/2"]) == "20.0/s, 0.50 s, 75%, 2.0 GB"


def test_a_row_is_void_where_a_text_loops(bench, found):
    for name in ("stock", "1/4"):
        found[name]["runs"][0]["tokens"][16:] = PHRASE * 5 + PHRASE[:3]
    reasons = bench.why_void(found)
    assert [r.partition(":")[0] for r in reasons[:2]] == [
        "text 1 of stock loops",
        "text 1 of 1/4 loops",
    ]


def test_a_row_is_void_where_budgets_give_different_texts(bench, found):
    found["1/2"]["runs"][0]["tokens"][50] += 1
    assert bench.why_void(found) == ["text 1 of 1/2 is not that of resident"]
    # A text cut short by the time limit is no difference.
    del found["1/2"]["runs"][0]["tokens"][50:]
    assert bench.why_void(found) == []


def test_a_row_without_our_text_is_void(bench, found):
    for name in bench.NAMES[1:]:
        found[name] = {"failure": "ended with 1: no memory"}
    (reason,) = bench.why_void(found)
    assert "no text of ours" in reason
    assert bench.cell(found["1/4"]) == "ended with 1"


def test_budgets_are_shares_of_the_experts_that_fit(bench, checkpoint, monkeypatch):
    summary = bench.summarize(checkpoint)
    full, least = summary.full_bytes, summary.minimum_bytes
    whole = bench.budgets(summary)
    slots = {name: memory - bench.POOL_ALIGNMENT for name, memory in whole.items()}
    n_slots = {name: n // summary.bytes_per_expert for name, n in slots.items()}
    assert n_slots == {"3/4": 24, "1/2": 16, "1/4": 8}
    room = summary.resident_bytes + full - (full - least) // 2
    monkeypatch.setattr(
        bench.device, "physical_memory_bytes", lambda: int(room / bench.MACHINE_SHARE)
    )
    scarce = dataclasses.replace(summary, all_fit=False)
    smaller = bench.budgets(scarce)
    assert least <= smaller["1/4"] <= smaller["1/2"] <= smaller["3/4"]
    assert smaller["3/4"] < whole["3/4"]


@pytest.mark.slow
def test_every_way_runs_in_its_own_process_and_the_row_fits_the_table(
    bench, checkpoint, tmp_path, monkeypatch, capsys
):
    def forked(command, **_):
        return python(*command[1:], MOEFLUX_EXECUTOR="ops")

    apart = SimpleNamespace(run=forked, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(bench, "subprocess", apart)
    path = tmp_path / "found.json"
    flags = f"--tokens 32 --prompt-tokens 8 --repeats 1 --model {checkpoint}"
    words = [str(SCRIPT), *flags.split(), "--json", str(path)]
    monkeypatch.setattr(sys, "argv", words)
    assert bench.main() == 0
    report = json.loads(path.read_text())
    assert report["void"] == [] and report["environment"]["mlx"]
    ways = report["ways"]
    assert list(ways) == ["stock", "resident", "3/4", "1/2", "1/4"]
    for name, found in ways.items():
        (run,) = found["runs"]
        assert len(run["tokens"]) == 32 and run["tokens_per_second"] > 0
        assert found["peak_process_bytes"] > 1 << 26
        streams = name not in ("stock", "resident")
        assert (run["misses"] > 0) == (run["read_bytes"] > 0) == streams
    assert ways["1/4"]["experts_held"] < ways["1/2"]["experts_held"]
    assert ways["resident"]["runs"][0]["tokens"] == ways["1/4"]["runs"][0]["tokens"]
    (row,) = capsys.readouterr().out.splitlines()
    header, rule = (
        line for line in (ROOT / "docs/macs.md").read_text().splitlines() if "|" in line
    )
    assert row.count("|") == header.count("|") == rule.count("|")
    assert "ops" in row and "VOID" not in row


@pytest.mark.slow
def test_a_way_that_takes_too_long_or_fails_is_a_cell(bench, tmp_path):
    nowhere = bench.Way("1/4", str(tmp_path), False, None, [[1]], 32, 60.0)
    (said,) = bench.run_apart(nowhere).values()
    assert said.startswith("ended with 1: bench_mac: ") and "config.json" in said
    hurried = dataclasses.replace(nowhere, seconds=0.01)
    assert bench.run_apart(hurried) == {"failure": "stopped after 0 s"}


def test_the_form_asks_for_the_output_of_the_commands():
    yaml = pytest.importorskip("yaml")
    path = ROOT / ".github" / "ISSUE_TEMPLATE" / "mac.yml"
    form = yaml.safe_load(path.read_text())
    fields = {f["id"]: f for f in form["body"] if f["type"] != "markdown"}
    wanted = {name for name, f in fields.items() if f.get("validations")}
    assert wanted >= {"row", "json", "doctor"}
    assert "scripts/bench_mac" in fields["row"]["attributes"]["description"]
    assert "moeflux doctor --json" in fields["doctor"]["attributes"]["description"]
