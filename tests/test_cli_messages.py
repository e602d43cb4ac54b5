"""Tables and errors of commands, at a terminal of 80 columns."""

from __future__ import annotations

import pytest

from moeflux_mlx.cli import main
from moeflux_mlx.engine.executors import gpu_executor
from moeflux_mlx.engine.launch import KERNELS


@pytest.mark.parametrize("columns", [80, 200])
def test_every_kernel_is_named_in_full(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["kernels"]) == 0
    lines = capsys.readouterr().out.splitlines()
    words = {word for line in lines for word in line.replace("\u2502", " ").split()}
    assert set(KERNELS) <= words
    assert max(map(len, lines)) <= columns
    assert ("--json, show signatures too" in " ".join(lines)) == (columns == 80)


@pytest.mark.parametrize(
    "pattern, there",
    [
        ("rms_norm", [name for name in KERNELS if "rms_norm" in name]),
        ("rope", ["rope_n_tokens"]),
        ("rope_n_token", ["rope_n_tokens"]),
        ("rope_m_tokens", ["rope_n_tokens"]),
        ("zzz", [*KERNELS]),
    ],
)
def test_the_doctor_suggests_kernels_of_similar_names(pattern, there, capsys):
    assert main(["doctor", "--executor", "sim", "--only", pattern]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"but got {pattern!r}: there are " in line
    named = line.partition("there are ")[2].partition(", and patterns")[0].split(", ")
    assert (
        named[: len(there)] == there
        if pattern != "rope_m_tokens"
        else there[0] in named
    )


@pytest.mark.skipif(gpu_executor() is not None, reason="here is something to tune")
def test_tuning_without_a_gpu_is_refused_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("MOEFLUX_EXECUTOR", raising=False)
    assert main(["tune", str(tmp_path / "not even a model")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line.startswith("moeflux: [tune] nothing to tune or to keep: ")
        and "--executor sim" in line
    )


def test_the_line_on_experts_is_in_words(packed, budget, capfd):
    flags = ["--prompt", "hi", "-m", "1", "--expert-memory", budget]
    assert main(["generate", "--model", str(packed), *flags]) == 0
    said = capfd.readouterr().err
    assert "unbounded they may take " in said and "gate" not in said
