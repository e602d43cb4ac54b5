"""``moeflux doctor`` and ``moeflux kernels``, and what they remember."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import mlx.core as mx
import pytest

from moeflux_mlx import executors, simulator
from moeflux_mlx.cli import doctor, main
from moeflux_mlx.executors import default_executor, verified
from moeflux_mlx.executors.capture import CaptureWindow
from moeflux_mlx.executors.sim import SimExecutor
from moeflux_mlx.launch import KERNELS

simulated = pytest.mark.skipif(
    not simulator.available(), reason="the simulator needs ziglang and pyelftools"
)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Keep what doctor remembers out of this machine's own cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    verified.is_verified.cache_clear()
    yield tmp_path / "moeflux-mlx"
    verified.is_verified.cache_clear()


def damaged(name: str):
    """The kernel of that name with a reference it does not agree with."""
    kernel = KERNELS[name]

    def reference(*args):
        return tuple(x + 1 for x in kernel.expected(*args))

    return dataclasses.replace(kernel, reference=reference)


@simulated
def test_doctor_checks_a_kernel_and_says_what_it_is_worth(capsys):
    assert main(["doctor", "--executor", "sim", "--only", "residual_add"]) == 0
    out = capsys.readouterr().out
    assert "1 of 1 kernels agree" in out
    assert "evidence for Metal, not proof" in out


@simulated
def test_a_kernel_that_is_wrong_is_named_and_the_exit_code_is_1(capsys, monkeypatch):
    monkeypatch.setitem(KERNELS, "residual_add", damaged("residual_add"))
    assert main(["doctor", "--executor", "sim", "--only", "residual_add"]) == 1
    captured = capsys.readouterr()
    assert "0 of 1 kernels agree" in captured.out
    assert "FAILED residual_add: residual_add float32" in captured.err


@simulated
def test_the_report_as_json_has_machine_cases_and_errors(capsys):
    pattern = "residual_add*"
    assert main(["doctor", "--executor", "sim", "--only", pattern, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is True
    assert report["executor"] == "sim"
    assert {"mlx", "python", "platform", "device"} <= set(report["environment"])
    assert {k["kernel"] for k in report["kernels"]} >= {"residual_add"}
    for kernel in report["kernels"]:
        assert kernel["n_cases"] >= 3
        assert 0 <= kernel["error"] <= 1


@simulated
def test_what_passed_is_recorded_until_the_kernel_changes(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    command = ["doctor", "--executor", "sim", "--only", "residual_add"]
    assert main([*command, "--record", str(path)]) == 0
    record = verified.Record(**json.loads(path.read_text()))
    assert record.executor == "sim"
    assert record.holds("residual_add")
    assert not record.holds("swiglu_fused")
    monkeypatch.setattr(verified, "fingerprint", lambda *of: "changed")
    assert not record.holds("residual_add")


def test_a_record_keeps_what_it_says_of_kernels_not_examined(tmp_path):
    path = tmp_path / "record.json"
    findings = [
        doctor.Finding(name, "family", 1, 0.0, complaints, 0.0)
        for name, complaints in (("residual_add", []), ("swiglu_fused", []))
    ]
    first = doctor.make_record("sim", findings)
    verified.save(first, path)
    broken = dataclasses.replace(findings[1], complaints=["wrong"])
    now = doctor.make_record("sim", [broken])
    kept = verified.with_earlier(now, path, ["swiglu_fused"])
    assert kept.kernels == {"residual_add": first.kernels["residual_add"]}
    assert verified.with_earlier(now, tmp_path / "none", []) == now
    for other in ({"machine": "another"}, {"mlx": "0.1"}, {"executor": "metal"}):
        verified.save(dataclasses.replace(first, **other), path)
        assert verified.with_earlier(now, path, ["swiglu_fused"]) == now


def test_metal_is_the_default_only_where_every_kernel_was_found_right(monkeypatch):
    monkeypatch.delenv("MOEFLUX_EXECUTOR", raising=False)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    assert default_executor() == "ops"
    findings = [doctor.Finding(name, "family", 1, 0.0, [], 0.0) for name in KERNELS]
    wrong = dataclasses.replace(findings[-1], complaints=["wrong"])
    verified.save(doctor.make_record("metal", [*findings[:-1], wrong]))
    verified.is_verified.cache_clear()
    assert default_executor() == "ops"
    verified.save(doctor.make_record("metal", findings))
    verified.is_verified.cache_clear()
    assert default_executor() == "metal"


def test_a_record_of_another_machine_or_mlx_counts_for_nothing(own_folder):
    findings = [doctor.Finding(n, "family", 1, 0.0, [], 0.0) for n in KERNELS]
    record = doctor.make_record("metal", findings)
    for other in ({"machine": "another"}, {"mlx": "0.1"}):
        verified.save(dataclasses.replace(record, **other))
        verified.is_verified.cache_clear()
        assert not verified.is_verified("metal")
    path = own_folder / "verified-metal.json"
    whole = json.loads(path.read_text())
    nonsense = [{**whole, "date": 1}, {**whole, "kernels": {"a": 1}}, [], {}]
    nonsense += [{**whole, "kernels": 7}, {**whole, "more": ""}]
    for text in ("{", "[" * 100_000, "9" * 5000, *map(json.dumps, nonsense)):
        path.write_text(text)
        verified.is_verified.cache_clear()
        with pytest.warns(UserWarning, match="run moeflux doctor again"):
            assert not verified.is_verified("metal")
    path.unlink()
    os.mkfifo(path)
    verified.is_verified.cache_clear()
    # What is no plain file of ours is passed over, and never waited for.
    assert not verified.is_verified("metal")


def test_doctor_refuses_an_executor_without_kernels(capsys):
    assert main(["doctor", "--executor", "ops"]) == 2
    assert "expected metal, cuda or sim" in capsys.readouterr().err


def test_doctor_refuses_a_pattern_that_names_no_kernel(capsys):
    if not simulator.available():
        pytest.skip("the simulator needs ziglang and pyelftools")
    assert main(["doctor", "--executor", "sim", "--only", "nothing"]) == 2
    assert "expected a kernel's name but got 'nothing'" in capsys.readouterr().err


def test_kernels_lists_each_with_signature_launch_and_verification(capsys):
    assert main(["kernels", "--json"]) == 0
    rows = {row["kernel"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == set(KERNELS)
    row = rows["residual_add"]
    assert row["family"] == "elementwise"
    assert row["inputs"][:2] == ["T a", "T b"]
    assert row["outputs"] == ["T out"]
    assert row["template"] == ["typename T"]
    assert row["threadgroup_bytes"] == 0
    assert "/" in row["launch"]
    used = [row["threadgroup_bytes"] for row in rows.values()]
    assert 0 < max(used) <= 32 << 10


def test_kernels_were_verified_on_the_simulator_as_they_are(capsys):
    """The shipped record must be of these very kernels: doctor --record renews it."""
    main(["kernels", "--json"])
    rows = json.loads(capsys.readouterr().out)
    stale = [
        row["kernel"]
        for row in rows
        if not any(text.startswith("sim:") for text in row["verified"])
    ]
    assert stale == []


def test_lowering_lists_every_ops_ways(capsys):
    assert main(["kernels", "--lowering"]) == 0
    out = capsys.readouterr().out
    assert "MatvecNTokens" in out
    assert "qmm_t" in out
    main(["kernels", "--lowering", "--json"])
    rows = {row["op"]: row["ways"] for row in json.loads(capsys.readouterr().out)}
    assert rows["MatvecNTokens + ResidualAddNTokens"] == ["matvec_residual"]


def test_the_watchdog_is_relaxed_before_mlx_opens_a_device():
    code = "import os, moeflux_mlx; print(os.environ['AGX_RELAX_CDM_CTXSTORE_TIMEOUT'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "1"


# Capture.
def window(first: int, last: int) -> tuple[CaptureWindow, list[str]]:
    log: list[str] = []
    start = lambda path: log.append(f"start {path}")  # noqa: E731
    return CaptureWindow(
        "t.gputrace", first, last, start, lambda: log.append("stop")
    ), log


def test_a_trace_holds_the_layers_asked_for_once():
    trace, log = window(1, 2)
    for token in range(3):
        for layer in range(4):
            log.append(f"{token}.{layer}")
            trace.begin_layer(layer)
    assert log[:6] == ["0.0", "0.1", "start t.gputrace", "0.2", "0.3", "stop"]
    assert log.count("stop") == 1
    assert not trace.waits_for_work


def test_a_trace_that_cannot_start_says_what_metal_needs():
    def refuse(path: str) -> None:
        raise RuntimeError("no Metal")

    trace = CaptureWindow("t.gputrace", 0, 0, refuse, lambda: None)
    with pytest.raises(executors.BackendError, match="MTL_CAPTURE_ENABLED"):
        trace.begin_layer(0)


@simulated
def test_kernels_are_built_on_first_use_and_all_at_once_by_warm_all(monkeypatch):
    few = {name: KERNELS[name] for name in ("residual_add", "moe_normalize_weights")}
    monkeypatch.setattr(executors.kernels, "KERNELS", few)
    executor = SimExecutor()
    assert executor.kernel_count == 0
    kernel = KERNELS["residual_add"]
    executor.run(kernel(*kernel.arguments(mx.float32, n=3)))
    assert executor.built == ("residual_add",)
    assert executor.warm_all() == 2
