"""Run the command ``moeflux`` as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mlx_lm
import pytest
from commands import moeflux, python

import moeflux_mlx

PROMPT = "def add(a, b):"
N_TOKENS = 40
COMMANDS = ["generate", "pack", "unpack", "verify", "inspect", "compare", "profile"]
COMMANDS += ["tune", "trace", "cachesim", "chat", "serve"]


def one_line_error(done: subprocess.CompletedProcess[str]) -> str:
    """Check that a run was refused; return its error message."""
    assert done.returncode == 2, done.stderr
    *decisions, line = done.stderr.splitlines()
    told = ("moeflux: experts ", "moeflux: before loading ")
    assert all(text.startswith(told) for text in decisions)
    assert line.startswith("moeflux: [")
    return line


@pytest.fixture(scope="module")
def stock_text(checkpoint: Path) -> str:
    """The text that stock mlx-lm generates greedily from the plain checkpoint."""
    model, tokenizer = mlx_lm.load(str(checkpoint))
    return mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=N_TOKENS)


def generate(model: Path, *args: object) -> subprocess.CompletedProcess[str]:
    prompt = ("--prompt", PROMPT, "--ignore-chat-template", "-m", N_TOKENS)
    return moeflux("generate", "--model", model, *prompt, *args)


def test_version_is_the_package_version():
    assert moeflux("--version").stdout == f"moeflux-mlx {moeflux_mlx.__version__}\n"


@pytest.mark.slow
def test_the_installed_command_is_this_version():
    script = Path(sys.executable).with_name("moeflux")
    if not script.exists():
        pytest.skip("the package is not installed in this environment")
    done = subprocess.run([script, "--version"], capture_output=True, text=True)
    assert done.stdout == f"moeflux-mlx {moeflux_mlx.__version__}\n"


def test_help_names_every_command():
    text = moeflux("--help").stdout
    assert [name for name in COMMANDS if f"    {name} " in text] == COMMANDS


def test_no_command_is_an_error_that_names_the_help():
    assert "COMMAND: see moeflux --help" in one_line_error(moeflux())


def test_generate_prints_stock_text_then_the_table(packed, budget, stock_text):
    done = generate(packed, "--expert-memory", budget)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(stock_text + "\n")
    table = done.stdout[len(stock_text) :]
    for row in ("prompt", "generation", "expert cache hits", "bytes read", "peak"):
        assert row in table
    assert "100.0%" not in table


def test_generate_without_verbose_prints_only_the_text(packed, stock_text):
    done = generate(packed, "--verbose", "False")
    assert done.stdout == stock_text + "\n"


@pytest.mark.parametrize("io", ["mmap", "pread", "direct"])
def test_generate_gives_the_same_text_however_experts_are_read(packed, io, stock_text):
    done = generate(packed, "--expert-io", io)
    assert done.stdout.startswith(stock_text + "\n"), done.stderr
    assert ("experts mapped" in done.stderr) == (io == "mmap")


def test_generate_runs_a_plain_checkpoint_all_in_memory(checkpoint, stock_text):
    done = generate(checkpoint)
    assert done.stdout.startswith(stock_text + "\n")
    assert "all in memory" in done.stdout


@pytest.mark.slow
def test_generate_reads_the_prompt_from_stdin(packed, stock_text):
    flags = ["--prompt", "-", "--ignore-chat-template", "-m", N_TOKENS]
    flags += ["--verbose", "False", "--model", packed]
    command = [sys.executable, "-m", "moeflux_mlx.cli", "generate", *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, input=PROMPT)
    assert done.stdout == stock_text + "\n"


@pytest.mark.slow
def test_generate_applies_the_chat_template_as_mlx_lm_does(packed, checkpoint):
    flags = ["--system-prompt", "be brief", "--prefill-response", "so", "-m", "12"]
    flags += ["--prompt", "hello\\nyou", "--verbose", "False"]
    stock = ["-m", "mlx_lm", "generate", "--model", checkpoint]
    expected = python(*stock, *flags).stdout
    assert expected.strip()
    assert moeflux("generate", "--model", packed, *flags).stdout == expected


def test_stock_mlx_lm_generate_runs_a_packed_directory(packed, budget, stock_text):
    command = ["-m", "mlx_lm", "generate", "--trust-remote-code"]
    command += ["--model", packed, "--prompt", PROMPT, "-m", N_TOKENS]
    command += ["--ignore-chat-template", "--verbose", "False"]
    done = python(*command, MOEFLUX_EXPERT_MEMORY=budget)
    assert done.stdout == stock_text + "\n", done.stderr


@pytest.mark.slow
def test_a_seed_gives_the_text_of_mlx_lms_own_command(packed, checkpoint, budget):
    flags = ["--temp", "0.9", "--top-p", "0.95", "--seed", "7", "--verbose", "False"]
    stock = ["-m", "mlx_lm", "generate", "--model", checkpoint]
    fixed = ["--prompt", PROMPT, "-m", N_TOKENS, "--ignore-chat-template"]
    done = python(*stock, *fixed, *flags)
    assert done.stdout.strip(), done.stderr
    few = ["--expert-memory", budget]
    for model, more in (
        (packed, few),
        (checkpoint, []),
        (checkpoint, [*few, "--no-native"]),
    ):
        assert generate(model, *flags, *more).stdout == done.stdout


@pytest.mark.slow
def test_a_saved_prompt_cache_continues_where_it_ended(packed, tmp_path):
    cache = tmp_path / "cache.safetensors"
    stock = ["-m", "mlx_lm"]
    flags = ["--model", str(packed), "--trust-remote-code"]
    flags += ["--prompt-cache-file", str(cache)]
    save = [*stock, "cache_prompt", *flags, "--prompt", "be brief"]
    assert python(*save).returncode == 0
    flags += ["--prompt", "hello", "--verbose", "False", "-m", "12"]
    expected = python(*stock, "generate", *flags)
    assert expected.stdout.strip()
    assert moeflux("generate", *flags).stdout == expected.stdout


@pytest.mark.parametrize(
    "flags",
    [
        ["--image", "x.png"],
        ["--adapter-path", "none"],
        ["--max-tokens", "0"],
        ["--draft-model", "draft"],
        ["--prompt-cache-file", "none.safetensors"],
        ["--memory", "lots"],
        ["--policy", "newest"],
        ["--executor", "abacus"],
    ],
    ids=lambda flags: flags[0].lstrip("-"),
)
def test_an_unusable_flag_ends_in_one_clear_line(packed, flags):
    one_line_error(moeflux("generate", "--model", packed, *flags))


def test_a_directory_without_a_model_ends_in_one_clear_line(tmp_path):
    for command in (["generate", "--model"], ["inspect"]):
        assert str(tmp_path) in one_line_error(moeflux(*command, tmp_path))


def test_a_missing_model_ends_in_one_clear_line(tmp_path):
    path = tmp_path / "nowhere"
    assert str(path) in one_line_error(moeflux("generate", "--model", path))


def test_generate_without_a_model_ends_in_one_clear_line():
    assert "--model" in one_line_error(moeflux("generate"))


def test_a_budget_that_holds_no_token_states_the_minimum(packed):
    summary = json.loads(moeflux("inspect", packed, "--json").stdout)
    line = one_line_error(generate(packed, "--expert-memory", "1KB"))
    assert str(summary["minimum_bytes"]) in line


def test_the_minimum_that_inspect_states_is_enough(packed, stock_text):
    summary = json.loads(moeflux("inspect", packed, "--json").stdout)
    done = generate(packed, "--expert-memory", summary["minimum_bytes"])
    assert done.stdout.startswith(stock_text + "\n"), done.stderr
