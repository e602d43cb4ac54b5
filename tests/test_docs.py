"""Pages name files that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT.glob("*.md")),
    *(ROOT / "docs").glob("*.md"),
    ROOT / "kernels" / "README.md",
]
# A changelog speaks of files as they were.
PAGES = [page for page in PAGES if page.name != "CHANGELOG.md"]
NAMED = re.compile(r"`([\w./-]+\.(?:py|metal|h|md|cpp|json|csv))(?:::\w+)?`")
LINKED = re.compile(r"\]\((?!https?:|#|mailto:)([^)#]+)")
# Files that users have, not this repository.
OF_USERS = {
    *("config.json", "moeflux.json", "moeflux_model.py", "doctor.json"),
    *("bench_mac.json", "tokenizer_config.json", "models/FAMILY.py"),
}


def files() -> list[str]:
    """Return the paths of this repository's files, of a checkout or an archive."""
    folders = ("moeflux_mlx", "models", "kernels", "scripts", "tests", "docs")
    found = [p for f in folders for p in (ROOT / f).rglob("*") if p.is_file()]
    return [p.relative_to(ROOT).as_posix() for p in [*found, *ROOT.glob("*")]]


def misnamed(text: str, known: list[str]) -> list[str]:
    """Return the names of files in a page that end no path of the repository."""
    ends = tuple(f"/{path}" for path in known)
    return [
        name
        for name in NAMED.findall(text)
        if name not in OF_USERS and not any(end.endswith(f"/{name}") for end in ends)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_files_that_exist(page):
    text = page.read_text()
    assert misnamed(text, files()) == []
    targets = [page.parent / target for target in LINKED.findall(text)]
    assert [str(target) for target in targets if not target.exists()] == []


def test_a_name_that_no_file_has_is_found():
    known = ["moeflux_mlx/engine/forward.py"]
    assert misnamed("`forward.py`, `engine/forward.py`", known) == []
    wrong = "`ward.py` and `graph/forward.py`"
    assert misnamed(wrong, known) == ["ward.py", "graph/forward.py"]
