"""Messages about decisions on standard error, and progress bars on terminals."""

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
# Shorter prompts finish before anyone could read a bar.
SHOWN_TOKENS = 64


# Whether this process prints; in a process group only rank 0 does.
_is_told = True
# Whether a prompt may show a bar, which needs a caller that prints no partial lines.
_prompts_are_shown = False


def notice(text: str) -> None:
    """Print a line about a decision on standard error."""
    if _is_told:
        print(f"moeflux: {one_line(text)}", file=sys.stderr)


@contextlib.contextmanager
def untold() -> Iterator[None]:
    """Print only errors within this context, because rank 0 prints the rest."""
    global _is_told
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        _is_told = False
        try:
            yield
        finally:
            _is_told = True


def byte_progress() -> contextlib.AbstractContextManager[Report]:
    """Show a bar of bytes within this context; yield the function that updates it."""
    return _bar(DownloadColumn(), TransferSpeedColumn())


def count_progress() -> contextlib.AbstractContextManager[Report]:
    """Show a bar of things done within this context, as ``byte_progress`` does."""
    return _bar(MofNCompleteColumn())


@contextlib.contextmanager
def showing_prompts() -> Iterator[None]:
    """Let long prompts show a bar within this context.

    Elsewhere the bar could appear in the middle of a line of mlx-lm or a script.
    """
    global _prompts_are_shown
    before, _prompts_are_shown = _prompts_are_shown, True
    try:
        yield
    finally:
        _prompts_are_shown = before


@contextlib.contextmanager
def prompt_progress(n_tokens: int, n_layers: int) -> Iterator[Callable[[int], None]]:
    """Show a bar of layers for a long prompt, if allowed.

    Yield a function to call with the index of each finished layer.
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
    # A transient bar disappears when it is done.
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
