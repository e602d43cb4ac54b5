"""Wrong command lines and environments end in one line, without a traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moeflux_mlx import config
from moeflux_mlx.cli import main
from moeflux_mlx.system import private

FIXED = ["--prompt", "hi", "--max-tokens", "2", "--temp", "0"]
COMMAND = [sys.executable, "-m", "moeflux_mlx.cli"]


def spoil(name: str, text: str | None):
    """Return a function that overwrites a model's file, or removes it."""

    def change(model: Path) -> None:
        (model / name).unlink()
        if text is not None:
            (model / name).write_text(text)

    return change


def spoil_config(**values):
    def change(model: Path) -> None:
        found = json.loads((model / "config.json").read_text())
        found["text_config"] |= values
        (model / "config.json").write_text(json.dumps(found))

    return change


def directory_for(name: str):
    def change(model: Path) -> None:
        (model / name).unlink()
        (model / name).mkdir()

    return change


@pytest.mark.parametrize(
    "change",
    {
        "broken-config": spoil("config.json", "{"),
        "list-as-config": spoil("config.json", "[]"),
        "no-config": spoil("config.json", None),
        "text-for-a-width": spoil_config(hidden_size="x"),
        "other-shapes": spoil_config(vocab_size=100),
        "negative-layers": spoil_config(num_hidden_layers=-1),
        "empty-weights": spoil("model.safetensors", ""),
        "no-weights": spoil("model.safetensors", None),
        "directory-for-weights": directory_for("model.safetensors"),
        "broken-tokenizer": spoil("tokenizer.json", "{"),
        "list-as-tokenizer-config": spoil("tokenizer_config.json", "[]"),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_spoilt_model_ends_in_one_line(change, checkpoint, tmp_path, capfd):
    model = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    change[1](model)
    assert main(["generate", "--model", str(model), *FIXED]) in (1, 2)
    check_one_line(capfd)


def check_one_line(capfd) -> str:
    """Check that standard error is one line of ours; return it."""
    lines = capfd.readouterr().err.splitlines()
    ours = [line for line in lines if line.startswith("moeflux: ")]
    assert len(ours) >= 1 and not any("Traceback" in line for line in lines), lines
    return ours[-1]


@pytest.mark.parametrize("name", ["checkpoint", "packed"])
def test_an_empty_prompt_ends_in_one_line(name, request, capfd):
    model = str(request.getfixturevalue(name))
    more = ["--prompt", "", "--ignore-chat-template"]
    assert main(["generate", "--model", model, *more]) == 2
    assert "[generate] expected a prompt" in check_one_line(capfd)


def test_a_traceback_is_shown_on_request(checkpoint, tmp_path, capfd, monkeypatch):
    model = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    spoil_config(hidden_size="x")(model)
    monkeypatch.setenv("MOEFLUX_TRACEBACK", "1")
    assert main(["generate", "--model", str(model), *FIXED]) in (1, 2)
    assert capfd.readouterr().err.strip().splitlines()[-1].startswith("moeflux: ")


VARIABLES = {
    "MOEFLUX_MEMORY": "much",
    "MOEFLUX_EXPERT_MEMORY": "-3GB",
    "MOEFLUX_EXECUTOR": "abacus",
    "MOEFLUX_POLICY": "fifo",
    "MOEFLUX_READ_THREADS": "0",
    "MOEFLUX_OPTIMISTIC": "maybe",
    "MOEFLUX_EXPERT_IO": "telepathy",
    "MOEFLUX_PROFILE_PER_OP": "yes",
    "MOEFLUX_FUSE": "off",
    "MOEFLUX_SIM_CHECKED": "true",
    "MOEFLUX_LOWERING": "NoSuchOp=way",
    "MOEFLUX_CAPTURE": "file",
    "MOEFLUX_TUNING": "/nowhere/at/all",
}


@pytest.mark.parametrize("name", VARIABLES)
def test_every_variable_is_checked_before_anything_is_read(
    name, tmp_path, monkeypatch, capfd
):
    """The model's directory does not exist, so the variable must be checked first."""
    monkeypatch.setenv(name, VARIABLES[name])
    more = ["--memory", "1GB", "--policy", "lru", "--executor", "ops"]
    model = str(tmp_path / "none")
    assert main(["generate", "--model", model, *FIXED, *more]) == 2
    line = check_one_line(capfd)
    assert name in line or (name, "[tuning]") == ("MOEFLUX_TUNING", line.split()[1])


def test_every_listed_variable_is_tested():
    listed = {word.strip("`") for word in config.__doc__.split() if "MOEFLUX_" in word}
    assert listed - {"MOEFLUX_TRACEBACK"} == set(VARIABLES)


def run(*arguments: str | Path, before: str = "", after: str = "", **variables: str):
    line = f'{before} "$@" {after}'
    return subprocess.run(
        ["bash", "-c", line, "bash", *COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, **variables},
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii"])
def test_output_without_utf8_is_degraded(encoding, checkpoint):
    for arguments in (["kernels"], ["generate", "--model", checkpoint, *FIXED]):
        done = run(*arguments, PYTHONIOENCODING=encoding)
        assert (done.returncode, done.stderr.count("Traceback")) == (0, 0), done.stderr
        assert done.stdout


@pytest.mark.slow
def test_a_reader_that_leaves_ends_the_command_in_silence():
    done = run("kernels", after="| head -1; exit ${PIPESTATUS[0]}")
    assert (done.returncode, done.stderr) in ((0, ""), (1, ""))


@pytest.mark.slow
def test_a_closed_output_gives_no_traceback(checkpoint):
    done = run("generate", "--model", checkpoint, *FIXED, after=">&-")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_low_hard_limit_of_open_files_gives_no_traceback(checkpoint, tmp_path):
    done = run("--version", before="ulimit -n 64;")
    assert (done.returncode, done.stderr) == (0, "")
    done = run("pack", checkpoint, tmp_path / "packed", before="ulimit -n 256;")
    assert done.returncode == 0, done.stderr


def test_a_read_only_home_costs_only_the_cache(checkpoint, monkeypatch, capfd):
    monkeypatch.setenv("HOME", "/proc/nowhere")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert main(["inspect", str(checkpoint)]) == 0
    folder = private.made("simulator")
    assert folder == private.made("simulator") and os.access(folder, os.W_OK)
    line = check_one_line(capfd)
    assert "cannot use /proc/nowhere" in line and "compiled kernels" in line
    assert line.count("XDG_CACHE_HOME") == 1
