"""``moeflux chat`` beside mlx-lm's own chat, with the same typed input."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from commands import moeflux, python
from test_serving import damage

from moeflux_mlx.cli.inspect import summarize

TYPED = "hello\nand then\nr\nhello\nh\nq\n"


def said(text: str) -> str:
    """Return a chat's output without colours, speeds and the frame's width."""
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]|[\x01\x02]", "", text)
    text = re.sub(r"[─╭╮╰╯]+|\d+\.\d+ (?:tok/s|GB)", "", text)
    return re.sub(r"[^\S\n]+", " ", text)


@pytest.fixture(scope="module", autouse=True)
def wide():
    """Make lines so long that no model's name breaks one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "500")
        yield


@pytest.fixture(scope="module")
def stock(checkpoint: Path) -> str:
    """The output of mlx-lm's own chat on the plain model."""
    command = ["-m", "mlx_lm", "chat", "--model", checkpoint]
    done = python(*command, "-m", 12, text=TYPED)
    assert done.returncode == 0, done.stderr
    return said(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "packed"])
def test_a_chat_prints_the_text_of_stocks(name, checkpoint, packed, stock):
    model = {"plain": checkpoint, "packed": packed}[name]
    memory = summarize(packed).minimum_bytes
    flags = "-m", 12, "--expert-memory", memory
    done = moeflux("chat", "--model", model, *flags, text=TYPED)
    assert done.returncode == 0, done.stderr
    assert said(done.stdout).replace(str(packed), str(checkpoint)) == stock


def test_a_failed_question_is_forgotten_and_the_chat_continues(packed, tmp_path):
    """An answer that fails at a damaged expert leaves nothing in the cache."""
    model = Path(shutil.copytree(packed, tmp_path / "model"))
    memory = summarize(packed).minimum_bytes
    flags = "--model", model, "-m", 4, "--expert-memory", memory
    for expert in range(8):
        damage(model, 2, expert)
    done = moeflux("chat", *flags, text="one\ntwo\nq\n")
    assert done.returncode == 0
    lines = [line for line in done.stderr.splitlines() if "expert " in line]
    assert len(lines) == 2 and "bye" in done.stdout
    assert all("the question is forgotten" in line for line in lines)


def test_the_end_of_input_ends_a_chat_without_error(packed):
    done = moeflux("chat", "--model", packed, "-m", 2, text="hello\n")
    assert done.returncode == 0 and "Error" not in done.stderr


@pytest.mark.parametrize(
    "args",
    [
        ["--model", "{none}"],
        ["--model", "{packed}", "--temp", "nan"],
        ["--model", "{packed}", "--max-kv-size", "0"],
        ["--model", "{packed}", "--pipeline"],
        ["--model", "{packed}", "--memory", "1KB"],
        [],
    ],
)
def test_a_chat_that_cannot_start_says_why_in_one_line(args, packed, tmp_path):
    places = {"none": tmp_path / "none", "packed": packed}
    done = moeflux("chat", *(arg.format(**places) for arg in args))
    *_, line = done.stderr.splitlines()
    assert done.returncode == 2 and re.match(r"moeflux: \[[-\w]+\] ", line), done.stderr
