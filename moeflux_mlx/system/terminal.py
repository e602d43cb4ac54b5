"""Terminals: text that anybody may have chosen is shown as it is, and does nothing."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from ..errors import printable

# Tables that would be unreadable in 80 columns have as many.
WIDE = 140


class PlainConsole(Console):
    """Prints as rich does, but takes no text for markup, emoji or control codes.

    Names of files and of models are anybody's choice.
    """

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return text to print, without letters that a terminal would obey."""
        return super().render_str(printable(text), **options)


def wide_console() -> PlainConsole:
    """Return a console for wide tables."""
    return PlainConsole(width=max(WIDE, PlainConsole().width))
