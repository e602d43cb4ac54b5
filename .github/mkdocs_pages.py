"""Put pages that lie beside docs/ into the site, and lead links between them there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
# From the names of this repository to the site's.
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "kernels/README.md": "kernels.md",
}
LINK = re.compile(r"\]\((?:\.\./)?([\w./-]+)((?:#[\w-]+)?)\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages to the site's files."""
    for name, page in PAGES.items():
        text = (ROOT / name).read_text()
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Write the site's names into links to other pages of the repository."""

    def moved(match: re.Match[str]) -> str:
        name = match[1].removeprefix("docs/")
        return f"]({PAGES.get(name, name)}{match[2]})"

    return LINK.sub(moved, markdown)
