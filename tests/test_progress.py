"""Progress shows on terminals only, and leaves nothing behind."""

from __future__ import annotations

import os
import pty
import sys
import threading

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

import moeflux_mlx
from moeflux_mlx.system.progress import byte_progress, showing_prompts


class Terminal:
    """A pseudo-terminal as standard error, with the text written to it."""

    def __init__(self, monkeypatch):
        self._main, end = pty.openpty()
        self._file = os.fdopen(end, "w")
        self._parts: list[bytes] = []
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(sys, "stderr", self._file)
        # A full pseudo-terminal would block its writer.
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        try:
            while part := os.read(self._main, 65536):
                self._parts.append(part)
        except OSError:
            pass

    def text(self) -> str:
        """Close the terminal and return all that was shown."""
        self._file.close()
        self._reader.join()
        os.close(self._main)
        return b"".join(self._parts).decode()


def run(packed, budget, n_tokens):
    model, _ = moeflux_mlx.load(packed, expert_memory=budget)
    tokens = mx.array([[i % 300 for i in range(n_tokens)]])
    mx.eval(model(tokens, cache=make_prompt_cache(model)))


def test_loading_and_long_prompts_show_progress_on_a_terminal(
    packed, budget, monkeypatch
):
    terminal = Terminal(monkeypatch)
    with showing_prompts():
        run(packed, budget, 70)
    shown = terminal.text()
    assert "reading weights" in shown and "prompt, 70 tokens" in shown


def test_short_prompts_show_none(packed, budget, monkeypatch):
    terminal = Terminal(monkeypatch)
    with showing_prompts():
        run(packed, budget, 20)
    assert "tokens" not in terminal.text()


def test_the_output_of_others_is_not_cut_by_a_prompts_bar(packed, budget, monkeypatch):
    """mlx-lm's commands may be in the middle of a line."""
    model, _ = moeflux_mlx.load(packed, expert_memory=budget)
    terminal = Terminal(monkeypatch)
    tokens = mx.array([[i % 300 for i in range(70)]])
    mx.eval(model(tokens, cache=make_prompt_cache(model)))
    assert terminal.text() == ""


def test_reading_all_experts_shows_progress(packed, monkeypatch):
    terminal = Terminal(monkeypatch)
    moeflux_mlx.load(packed, lazy=True)
    assert "reading experts" in terminal.text()


def test_nothing_is_shown_without_a_terminal(packed, budget, capfd):
    run(packed, budget, 70)
    shown = capfd.readouterr()
    assert shown.out == ""
    # The decision is printed, but no moving bar.
    assert shown.err.splitlines() and "\x1b" not in shown.err
    assert all(line.startswith("moeflux: ") for line in shown.err.splitlines())


def test_progress_is_wiped_away_at_its_end(monkeypatch):
    terminal = Terminal(monkeypatch)
    with byte_progress() as report:
        report("reading", 5, 10)
        report("reading", 10, 10)
    # The cursor goes up and the line is cleared.
    assert terminal.text().rstrip().endswith("\x1b[1A\x1b[2K")
