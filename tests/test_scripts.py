"""The scripts that set a machine up, run as a user runs them."""

from __future__ import annotations

import argparse
import csv
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

ROOT = Path(__file__).resolve().parent.parent
OLD_PYTHONS = ["python3.10", "python3.9", "python3.8", "python3.7", "python3.6"]


def run(*command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
    )


def test_a_geometry_is_measured_and_written(tmp_path, monkeypatch):
    """On the CPU, tiny: stock's bfloat16 is imprecise there, so the gate is opened."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    bench = importlib.import_module("bench_geometry")
    tiny = dict(
        bench.GEOMETRIES["qwen3.6-35b-a3b"],
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        head_dim=64,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        num_experts=16,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        vocab_size=512,
    )
    monkeypatch.setitem(bench.GEOMETRIES, "tiny", tiny)
    parser = argparse.ArgumentParser()
    for name in ("--repeats", "--decode-tokens"):
        parser.add_argument(name, type=int, default=2)
    bench.add_arguments(parser)
    rows = tmp_path / "rows.csv"
    flags = ["--geometry", "tiny", "--executor", "ops", "--context", "9"]
    profile = tmp_path / "profile.csv"
    flags += ["--prefill", "5", "--profile", str(profile)]
    args = parser.parse_args([*flags, "--csv", str(rows)])
    monkeypatch.setattr(bench, "MAX_RATIO", 0)
    assert bench.main(args) == 1 and not rows.exists()
    monkeypatch.setattr(bench, "MAX_RATIO", 1.5)
    assert bench.main(args) == 0
    stock, ours = csv.DictReader(rows.read_text().splitlines())
    assert (stock["side"], ours["side"]) == ("stock", "ops")
    assert float(stock["decode_ratio"]) == 1
    assert float(ours["decode_tokens_per_s"]) > 0
    assert float(ours["prefill_tokens_per_s"]) > 0
    assert stock["prefill_tokens_per_s"] == ""
    graphs = [row["graph"] for row in csv.DictReader(profile.read_text().splitlines())]
    assert graphs[0] == "embed" and graphs[-1] == "remainder"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of what the set-up needs, with no environment made yet."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def old_python() -> str | None:
    """Find a Python older than the package supports that really starts."""
    found = filter(None, map(shutil.which, OLD_PYTHONS))
    return next((p for p in found if run(p, "-c", "").returncode == 0), None)


def test_an_old_python_is_told_which_one_is_needed(clone):
    python = old_python()
    if python is None:
        pytest.skip("no Python older than 3.11 on this machine")
    python = run(python, "-c", "import sys; print(sys.executable)").stdout.strip()
    done = run(python, clone / "scripts" / "test", PATH=str(clone))
    assert done.returncode == 1
    assert done.stderr.startswith("Python 3.11 or newer is needed, but this is 3.")
    assert not (clone / ".venv").exists()


def test_a_python_without_ensurepip_is_told_the_package_to_install(clone):
    missing = clone / "missing"
    missing.mkdir()
    (missing / "ensurepip.py").write_text("raise ImportError('not packaged')")
    done = run(sys.executable, clone / "scripts" / "demo", PYTHONPATH=str(missing))
    assert done.returncode == 1
    assert "sudo apt install python3." in done.stderr
    assert "Traceback" not in done.stderr
    assert not (clone / ".venv").exists()


def test_an_environment_of_the_same_project_is_used_again(clone):
    code = """
import json, setup_env
mlx = setup_env._mlx_extra()
stamp = {"fingerprint": setup_env._fingerprint(mlx), "extras": ["test", *mlx]}
setup_env.VENV.mkdir()
setup_env.STAMP.write_text(json.dumps(stamp))
print(setup_env.ensure_environment(["test"]))
"""
    done = run(sys.executable, "-c", code, PYTHONPATH=str(clone / "scripts"))
    assert done.stdout.splitlines() == [str(clone / ".venv" / "bin" / "python")]


def test_a_failed_install_is_not_taken_for_a_finished_one(clone):
    (clone / "pyproject.toml").write_text("not a project")
    done = run(sys.executable, clone / "scripts" / "demo")
    assert done.returncode == 1
    assert "Failed with exit code" in done.stderr
    assert (clone / ".venv" / "bin" / "python").exists()
    assert not (clone / ".venv" / "installed.json").exists()


def test_the_demo_packs_once_and_again_when_the_model_changes(
    checkpoint, budget, tmp_path
):
    model = tmp_path / "models" / "demo"
    shutil.copytree(checkpoint, model)
    command = [sys.executable, "-m", "moeflux_mlx.cli.demo", "--max-tokens", "5"]
    command += ["--prompt", "def sum", "--memory", budget]

    def demo() -> tuple[str, set[str]]:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout, {pack.name for pack in (tmp_path / "build").iterdir()}

    text, packs = demo()
    assert "def sum" in text
    assert "expert cache hits" in text
    assert len(packs) == 1
    assert demo()[1] == packs
    (model / "generation_config.json").write_text("{}")
    assert len(demo()[1]) == 2


def copy_mlx_without_library(target: Path) -> None:
    """Lay out what plain ``pip install mlx`` leaves on Linux: no ``libmlx``."""
    source = Path(mx.__file__).parent
    shutil.copytree(source, target / "mlx", ignore=shutil.ignore_patterns("lib"))


def test_import_without_an_mlx_library_names_the_extra_to_install(tmp_path):
    copy_mlx_without_library(tmp_path)
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = run(sys.executable, "-c", "import moeflux_mlx", PYTHONPATH=paths)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("moeflux_mlx.errors.BackendError: [backend] expected an MLX")
    if sys.platform == "linux":
        assert "pip install 'moeflux-mlx[cpu]'" in last
        assert "pip install 'moeflux-mlx[cuda]'" in last


def test_a_test_for_a_device_that_is_not_here_skips_with_a_reason(tmp_path):
    for name in ("conftest.py", "tiny.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path)
    (tmp_path / "test_device.py").write_text(
        "import pytest\n"
        "@pytest.mark.metal\ndef test_on_metal(): pass\n"
        "@pytest.mark.cuda\ndef test_on_cuda(): pass\n"
    )
    report = run(sys.executable, "-m", "pytest", "-rs", tmp_path).stdout
    metal, cuda = mx.metal.is_available(), mx.cuda.is_available()
    assert ("needs Apple silicon with Metal" in report) != metal
    assert ("needs an NVIDIA GPU with MLX's CUDA backend" in report) != cuda
