"""``moeflux doctor`` and ``moeflux kernels``, and the record that they keep."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import os
import re
import subprocess
import sys

import mlx.core as mx
import pytest

from moeflux_mlx.cli import doctor, main
from moeflux_mlx.cli.kernels import LIBRARY
from moeflux_mlx.engine import executors, simulator
from moeflux_mlx.engine.executors import default_executor, verified
from moeflux_mlx.engine.executors.capture import CaptureWindow
from moeflux_mlx.engine.executors.sim import SimExecutor
from moeflux_mlx.engine.launch import KERNELS
from moeflux_mlx.engine.lowering import launched_by
from moeflux_mlx.proof import examination

simulated = pytest.mark.skipif(
    not simulator.available(), reason="the simulator needs ziglang and pyelftools"
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Share a cache for the simulator's compiled objects among tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_folder(cache, monkeypatch):
    """Keep the doctor's record out of this machine's own cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    folder = cache / "moeflux-mlx"
    for path in folder.glob("verified-*"):
        path.unlink()
    verified.verified_kernels.cache_clear()
    yield folder
    verified.verified_kernels.cache_clear()


ONE_CASE_EACH = """
import dataclasses, os
from moeflux_mlx.engine.launch import KERNELS
for name, kernel in KERNELS.items():
    few = {"sizes": kernel.sizes[:1], "dtypes": kernel.dtypes[:1]}
    KERNELS[name] = dataclasses.replace(kernel, **few)
"""


@pytest.fixture
def damage(tmp_path, monkeypatch):
    """Make the examining processes find damaged kernels."""

    def write(text: str) -> None:
        folder = tmp_path / "damage"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(ONE_CASE_EACH + text)
        monkeypatch.setenv("PYTHONPATH", str(folder))

    return write


def report_of(capsys, pattern: str, status: int, *more: str) -> dict:
    """Return the report as JSON."""
    command = ["doctor", "--executor", "sim", "--only", pattern, "--json"]
    assert main([*command, *more]) == status
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
@simulated
def test_doctor_checks_a_kernel_and_states_the_weight_of_the_evidence(capsys):
    assert main(["doctor", "--executor", "sim", "--only", "residual_add"]) == 0
    out = capsys.readouterr().out
    assert "1 of 1 kernels agree" in out
    assert "evidence for Metal, not proof" in out


@pytest.mark.slow
@simulated
def test_the_report_as_json_has_machine_cases_and_errors(capsys, tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    report = report_of(capsys, "residual_add*", 0, "--record", str(path))
    assert report["passed"] is True
    assert report["not_remembered"] == ""
    assert report["executor"] == "sim"
    environment = report["environment"]
    assert {"mlx-metal", "python", "platform", "device"} <= set(environment)
    assert environment["mlx"] == verified.mlx_version()
    for name, value in mx.device_info().items():
        assert environment[f"device {name}"] == value
    assert "MTL_SHADER_VALIDATION=1" in report["validation"]
    assert {k["kernel"] for k in report["kernels"]} >= {"residual_add"}
    for kernel in report["kernels"]:
        assert kernel["n_cases"] >= 3
        assert 0 <= kernel["error"] <= 1
    record = verified.Record(**json.loads(path.read_text()))
    assert record.executor == "sim"
    assert record.holds("residual_add")
    assert not record.holds("swiglu_fused")
    monkeypatch.setattr(verified, "fingerprint", lambda *of: "changed")
    assert not record.holds("residual_add")


# A kernel's outcome, the code that causes it, and the start of its complaint.
FATES = {
    "residual_add": (
        """
import re
from moeflux_mlx.engine.simulator import compile
whole = compile.translate
def translate(source, name):
    found = re.search("moeflux_residual_add_[0-9a-f]{16}_", source)
    bad = "int x = nothing_of_that_name;" if found else ""
    text, found = whole(source, name)
    return text + bad, found
compile.translate = translate
""",
        r".*: SimulatorError: .*use of undeclared identifier.*\n.*int x = ",
    ),
    "residual_add_n_tokens": (
        """
def sample(*args, **sizes):
    raise KeyError("no such size")
kernel = KERNELS["residual_add_n_tokens"]
KERNELS["residual_add_n_tokens"] = dataclasses.replace(kernel, sample=sample)
""",
        r"mlx.core.float32 {.*}: KeyError: 'no such size'",
    ),
    "rms_norm_apply": (
        """
from moeflux_mlx import device
from moeflux_mlx.engine.launch import check
device.on_cpu = lambda: False
def measure(kernel, run):
    if kernel.name == "rms_norm_apply":
        raise ValueError("at most 448 threads fit")
    return check.Timing(1e-6, 1)
check.measure = measure
""",
        r"timing at {.*}: ValueError: at most 448 threads fit",
    ),
    "rms_norm_sum_sq": (
        """
kernel = KERNELS["rms_norm_sum_sq"]
def reference(given, own=kernel.reference):
    return own(given) + 1
KERNELS["rms_norm_sum_sq"] = dataclasses.replace(kernel, reference=reference)
""",
        r"rms_norm_sum_sq float32 .*error",
    ),
    "rms_norm_apply_bf16": (
        """
from moeflux_mlx.engine import launch
class Deadly(dict):
    def __getitem__(self, name):
        if name == "rms_norm_apply_bf16":
            os.write(2, b"command buffer failed")
            os.abort()
        return super().__getitem__(name)
launch.KERNELS = Deadly(KERNELS)
""",
        r"the process ended with -6 while it examined this: command buffer failed",
    ),
}

# Replaces the process that examines kernels: two of them hang.
STAND_IN = """
import json, sys, time
for name in sys.argv[1:]:
    print("now", name, file=sys.stderr, flush=True)
    if name in ("residual_add", "rms_norm_apply"):
        # An incomplete line is no finding.
        sys.stdout.write('{"kernel"')
        sys.stdout.flush()
        time.sleep(3600)
    finding = {"kernel": name, "family": "norm", "n_cases": 7, "build_ms": 1.5}
    print(json.dumps(finding), flush=True)
"""


@pytest.mark.slow
@simulated
def test_the_doctor_reports_on_all_kernels_whatever_happens_to_some(capsys, damage):
    damage("".join(text for text, _ in FATES.values()))
    report = report_of(capsys, "r[em]*", 1)
    assert report["passed"] is False
    found = {k["kernel"]: k for k in report["kernels"]}
    assert {name for name, k in found.items() if not k["passed"]} == set(FATES)
    for name, (_, complaint) in FATES.items():
        assert re.match(complaint, found[name]["complaints"][0]), name
    # Kernels that agreed may serve from now on; the others may not.
    good = set(found) - set(FATES)
    assert "rms_norm_per_head_n_tokens" in good
    assert verified.verified_kernels("sim") == good


@pytest.mark.slow
@simulated
def test_a_kernel_that_hangs_is_named_and_the_others_are_examined(capsys, monkeypatch):
    started = []

    def start(module, executor, *names, stderr):
        command = [sys.executable, "-c", STAND_IN, *names]
        piped = {"stdout": subprocess.PIPE, "stderr": stderr, "text": True}
        started.append(subprocess.Popen(command, **piped))
        return started[-1]

    monkeypatch.setattr(examination.children, "start_module", start)
    report = report_of(capsys, "r[em]*", 1, "--timeout", "4")
    names = fnmatch.filter(KERNELS, "r[em]*")
    assert [kernel["kernel"] for kernel in report["kernels"]] == names
    for kernel in report["kernels"]:
        hung = kernel["kernel"] in ("residual_add", "rms_norm_apply")
        assert kernel["passed"] != hung
        if hung:
            (said,) = kernel["complaints"]
            assert "was stopped: it gave no result in 4 seconds" in said
            assert said.endswith(f"now {kernel['kernel']}")
        else:
            assert kernel["n_cases"] == 7
    assert len(started) == 3
    assert all(process.returncode is not None for process in started)


def test_a_kernel_that_is_wrong_is_named_and_the_exit_code_is_1(capsys, monkeypatch):
    wrong = examination.Finding("residual_add", "elementwise", complaints=["so\nbad"])
    right = examination.Finding("swiglu_fused", "elementwise")
    monkeypatch.setattr(doctor, "examine_apart", lambda *of: iter([wrong, right]))
    monkeypatch.setattr(doctor, "open_kernels", lambda name: SimExecutor())
    assert main(["doctor"]) == 1
    captured = capsys.readouterr()
    assert "1 of 2 kernels agree" in captured.out
    assert "FAILED residual_add: so\nbad" in captured.err

    def full(path, mode):
        raise OSError(28, "No space left on device", str(path))

    # A report that cannot be saved is printed nevertheless.
    monkeypatch.setattr(verified, "replacing", full)
    assert main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert "No space left on device" in report["not_remembered"]


@pytest.mark.parametrize(
    ("complaints", "failure", "conclusion"),
    [
        ([], "", "Models on this machine now use them"),
        (["wrong"], "", "MLX's own operations replace the rest."),
        (["wrong"], "", "MTL_DEBUG_LAYER=1 MTL_SHADER_VALIDATION=1 moeflux doctor"),
        ([], "disk full", "models use none of them: disk full"),
    ],
)
def test_the_report_ends_with_its_consequence_for_models(
    complaints, failure, conclusion
):
    findings = [examination.Finding("residual_add", "family", complaints=complaints)]
    assert conclusion in doctor._conclusion("metal", findings, failure)


def test_a_record_keeps_its_findings_on_kernels_not_examined(tmp_path):
    path = tmp_path / "record.json"
    first = found_right("sim", "residual_add", "swiglu_fused")
    broken = examination.Finding("swiglu_fused", "family", complaints=["wrong"])
    now = doctor.make_record("sim", [broken])
    verified.save(first, path, KERNELS)
    verified.save(now, path, ["swiglu_fused"])
    kept = {"residual_add": first.kernels["residual_add"]}
    assert verified._read(path) == dataclasses.replace(now, kernels=kept)
    for other in ({"machine": "another"}, {"mlx": "0.1"}, {"executor": "metal"}):
        verified.save(dataclasses.replace(first, **other), path, KERNELS)
        verified.save(now, path, ["swiglu_fused"])
        assert verified._read(path) == now


@simulated
def test_entries_of_another_machine_are_not_lost(tmp_path, capsys):
    path = tmp_path / "record.json"
    record = found_right("sim", "residual_add", "swiglu_fused")
    verified.save(dataclasses.replace(record, machine="another"), path, KERNELS)
    before = path.read_text()
    flags = ["--executor", "sim", "--record", str(path)]
    assert main(["doctor", *flags, "--only", "swiglu_fused"]) == 2
    message = capsys.readouterr().err
    assert "sim on another with MLX" in message and "leave --only out" in message
    assert path.read_text() == before
    # A record of the examined kernels alone has nothing to lose.
    assert verified.lost(record, path, ["residual_add", "swiglu_fused"]) is None


def found_right(executor: str, *names: str) -> verified.Record:
    """Return the record of a doctor that found these kernels right."""
    findings = [examination.Finding(name, "family") for name in names]
    return doctor.make_record(executor, findings)


def test_metal_is_the_default_where_kernels_were_found_right(monkeypatch):
    monkeypatch.delenv("MOEFLUX_EXECUTOR", raising=False)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    assert default_executor() == "ops"
    first, *others = KERNELS
    verified.remember(found_right("metal", *others), KERNELS)
    assert default_executor() == "metal"
    executor = executors.open_executor()
    assert [name for name in KERNELS if not executor.usable(name)] == [first]
    # A user who names the executor gets all of its kernels.
    assert all(map(executors.open_executor("metal").usable, KERNELS))
    verified.remember(found_right("metal", first), [first])
    assert all(map(executors.open_executor().usable, KERNELS))


def test_a_record_of_another_machine_or_mlx_is_ignored(own_folder):
    record = found_right("metal", *KERNELS)
    for other in ({"machine": "another"}, {"mlx": "0.1"}):
        verified.remember(dataclasses.replace(record, **other), KERNELS)
        verified.verified_kernels.cache_clear()
        assert not verified.verified_kernels("metal")
    path = own_folder / "verified-metal.json"
    whole = json.loads(path.read_text())
    nonsense = [{**whole, "date": 1}, {**whole, "kernels": {"a": 1}}, [], {}]
    nonsense += [{**whole, "kernels": 7}, {**whole, "more": ""}]
    for text in ("{", "[" * 100_000, "9" * 5000, *map(json.dumps, nonsense)):
        path.write_text(text)
        verified.verified_kernels.cache_clear()
        with pytest.warns(UserWarning, match="run moeflux doctor again"):
            assert not verified.verified_kernels("metal")
    path.unlink()
    os.mkfifo(path)
    verified.verified_kernels.cache_clear()
    # Anything but a plain file of ours is ignored, and never blocks.
    assert not verified.verified_kernels("metal")


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
    assert row["launched_by"] == [LIBRARY]
    used_by = rows["dequant_matvec_4bit_v4"]["launched_by"]
    assert used_by == ["MatvecNTokens"]
    assert rows["norm_matvecs"]["launched_by"] == ["norm_matvecs"]
    used = [row["threadgroup_bytes"] for row in rows.values()]
    assert 0 < max(used) <= 32 << 10


def test_kernels_were_verified_on_the_simulator_as_they_are(capsys):
    """The shipped record must match these kernels: doctor --record renews it."""
    main(["kernels", "--json"])
    rows = json.loads(capsys.readouterr().out)
    stale = [
        row["kernel"]
        for row in rows
        if not any(text.startswith("sim:") for text in row["verified"])
    ]
    assert stale == []


# Scripts call these kernels by name, so no Op needs to launch them.
FOR_SCRIPTS = {
    "dequant_matvec_4bit",
    "dequant_matvec_4bit_batched",
    "dequant_matvec_4bit_v3_experts",
    "dequant_matvec_4bit_v5",
    "dequant_matvec_8bit_v3",
    "fused_gate_up_swiglu",
    "moe_combine_residual",
    "moe_combine_residual_flat",
    "residual_add",
    "swiglu_fused",
    "swiglu_fused_vec4",
    "weighted_sum",
}


def test_an_op_launches_every_kernel_but_those_for_scripts():
    assert {name for name in KERNELS if not launched_by(name)} == FOR_SCRIPTS


def test_lowering_lists_every_ops_ways(capsys):
    assert main(["kernels", "--lowering"]) == 0
    out = capsys.readouterr().out
    assert "MatvecNTokens" in out
    assert "qmm_t" in out
    main(["kernels", "--lowering", "--json"])
    rows = {row["op"]: row["ways"] for row in json.loads(capsys.readouterr().out)}
    assert rows["MatvecNTokens + ResidualAddNTokens"] == ["matvec_residual"]


@pytest.mark.slow
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


def test_a_capture_holds_the_requested_layers_once():
    trace, log = window(1, 2)
    for token in range(3):
        for layer in range(4):
            log.append(f"{token}.{layer}")
            trace.begin_layer(layer)
    assert log[:6] == ["0.0", "0.1", "start t.gputrace", "0.2", "0.3", "stop"]
    assert log.count("stop") == 1
    assert not trace.waits_for_work


def test_a_capture_that_cannot_start_names_metals_requirement():
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
