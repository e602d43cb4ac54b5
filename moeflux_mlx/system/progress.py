"""Standard error: decisions, and on terminals progress while something takes long."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from ..errors import one_line

# Called with the name of the work, the bytes done and the bytes in all.
Report = Callable[[str, int, int], None]
# Prompts of fewer tokens are done before anyone could read a bar.
SHOWN_TOKENS = 64


# Whether this process prints: of several that share a model only the first does.
_is_told = True
# Whether whoever prints text here knows of the bar that prompts may show before it.
_prompts_are_shown = False


def notice(text: str) -> None:
    """Print a line about a decision on standard error."""
    if _is_told:
        print(f"moeflux: {one_line(text)}", file=sys.stderr)


@contextlib.contextmanager
def untold() -> Iterator[None]:
    """Print nothing but errors while inside: another process says the same."""
    global _is_told
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        _is_told = False
        try:
            yield
        finally:
            _is_told = True


def byte_progress() -> contextlib.AbstractContextManager[Report]:
    """Show a bar of bytes while inside; yields the function that moves it on."""
    return _bar(DownloadColumn(), TransferSpeedColumn())


@contextlib.contextmanager
def showing_prompts() -> Iterator[None]:
    """Let long prompts show a bar while inside; elsewhere it would cut others' output.

    mlx-lm's commands and scripts may be in the middle of a line.
    """
    global _prompts_are_shown
    before, _prompts_are_shown = _prompts_are_shown, True
    try:
        yield
    finally:
        _prompts_are_shown = before


@contextlib.contextmanager
def prompt_progress(n_tokens: int, n_layers: int) -> Iterator[Callable[[int], None]]:
    """Show a bar of layers while a prompt of some length goes through, if it may.

    Yields a function to be called with the number of each layer once it is done.
    """
    if n_tokens < SHOWN_TOKENS or not _prompts_are_shown:
        yield lambda layer: None
        return
    with _bar(MofNCompleteColumn()) as report:
        what = f"prompt, {n_tokens} tokens"
        yield lambda layer: report(what, layer + 1, n_layers)


@contextlib.contextmanager
def _bar(*amounts: ProgressColumn) -> Iterator[Report]:
    text = TextColumn("{task.description:<24}")
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda what, done, total: None
        return
    # Transient: only the outcome is left on the screen.
    bar = Progress(
        text,
        BarColumn(),
        *amounts,
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    with bar:
        task = bar.add_task("")

        def report(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield report
