"""Add the pages outside of docs/ to the site, and adapt the links between pages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
# Names of pages in this repository, and in the site.
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
    """Replace names of the repository by the site's in links to other pages."""

    def moved(match: re.Match[str]) -> str:
        name = match[1].removeprefix("docs/")
        return f"]({PAGES.get(name, name)}{match[2]})"

    return LINK.sub(moved, markdown)
