"""The project's sentences name things: the vague words in them are counted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# The most occurrences of "what" in 1,000 words.
MOST = {"docstring": 1.0, "comment": 1.0, "page": 0.7, "tests": 1.0}


@pytest.fixture(scope="module")
def texts():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import words
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    return list(words.texts(ROOT))


def test_no_sentence_begins_with_of(texts):
    found = [(t.path, t.line, s) for t in texts for s in t.begins_with_of]
    assert found == []


def test_texts_name_things_rather_than_say_what(texts):
    for kind, most in MOST.items():
        chosen = [t for t in texts if kind_of(t) == kind]
        n_words, n_what = (sum(n) for n in zip(*map(counts, chosen), strict=True))
        assert n_words > 1000 and 1000 * n_what / n_words <= most, kind


def kind_of(text) -> str:
    return "tests" if text.path.startswith("tests/") else text.kind


def counts(text) -> tuple[int, int]:
    return text.n_words, text.n_what


def test_both_faults_are_found_with_their_line(tmp_path):
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import words
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    package = tmp_path / "moeflux_mlx"
    package.mkdir()
    (package / "a.py").write_text(
        '"""What it is. Of two, one."""\n\n# Of three:\n# what?\n'
    )
    (tmp_path / "README.md").write_text("One of two.\n\n| Of four | what |\n")
    found = list(words.texts(tmp_path))
    assert [(t.path, t.line, t.kind) for t in found] == [
        ("README.md", 1, "page"),
        ("README.md", 3, "page"),
        ("moeflux_mlx/a.py", 1, "docstring"),
        ("moeflux_mlx/a.py", 3, "comment"),
    ]
    assert [len(t.begins_with_of) for t in found] == [0, 1, 1, 1]
    assert [t.n_what for t in found] == [0, 1, 1, 1]
