"""Print untrusted text on terminals without interpreting it."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from ..errors import printable

# Width of tables that would be unreadable in 80 columns.
WIDE = 140


class PlainConsole(Console):
    """A rich console that interprets no markup, emoji or control codes.

    Names of files and models are untrusted.
    """

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return text to print, without control characters."""
        return super().render_str(printable(text), **options)


def wide_console() -> PlainConsole:
    """Return a console for wide tables."""
    return PlainConsole(width=max(WIDE, PlainConsole().width))
