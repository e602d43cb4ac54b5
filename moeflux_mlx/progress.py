"""Standard error: what was decided."""

from __future__ import annotations

import sys


def notice(text: str) -> None:
    """Print a line about a decision on standard error."""
    print(f"moeflux: {text}", file=sys.stderr)
