"""Check pages in a real browser, at the widths of a phone and of a desk."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--disable-quic", "--virtual-time-budget=5000"),
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")

# Puts the page into frames of each width and reports the result of ``look`` in each.
OUTER = """<!DOCTYPE html><body>{frames}<pre id="found"></pre><script>
onload = () => {{
  const look = (d, w) => {{ {look} }};
  const frames = [...document.querySelectorAll("iframe")];
  const found = frames.map(f => look(f.contentDocument, f.contentWindow));
  document.getElementById("found").textContent = JSON.stringify(found);
}};
</script>"""


def seen(page: str, widths: tuple[int, ...], look: str, folder: Path) -> list[Any]:
    """Run JavaScript in a page at each width in pixels; return the results.

    Args:
        look: the body of a function of a document ``d`` and its window ``w``.
        folder: where the browser may keep its files.
    """
    source = html.escape(page, quote=True)
    frames = "".join(
        f'<iframe width="{width}" height="900" style="border:0" srcdoc="{source}">'
        "</iframe>"
        for width in widths
    )
    outer = folder / "outer.html"
    outer.write_text(OUTER.format(frames=frames, look=look))
    own = f"--user-data-dir={folder / 'browser'}"
    assert BROWSER is not None
    done = subprocess.run(
        [BROWSER, *FLAGS, own, "--dump-dom", outer.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    told = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert told is not None and told[1], done.stderr[-2000:]
    found = json.loads(html.unescape(told[1]))
    assert isinstance(found, list)
    return found
