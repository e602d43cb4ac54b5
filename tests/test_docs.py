"""Pages name files that exist."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT.glob("*.md")),
    *(ROOT / "docs").glob("*.md"),
    ROOT / "kernels" / "README.md",
]
# A changelog names files as they were.
PAGES = [page for page in PAGES if page.name != "CHANGELOG.md"]
NAMED = re.compile(r"`([\w./-]+\.(?:py|metal|h|md|cpp|json|csv))(?:::\w+)?`")
# GitHub leads ../../actions from the page to this repository's own runs.
LINKED = re.compile(r"\]\((?!https?:|#|mailto:|\.\./\.\./actions/)([^)#]+)")
# Files of users, not of this repository.
OF_USERS = {
    *("config.json", "moeflux.json", "moeflux_model.py", "doctor.json"),
    *("bench_mac.json", "tokenizer_config.json", "models/FAMILY.py"),
}


def files() -> list[str]:
    """Return the paths of this repository's files, in a checkout or an archive."""
    folders = ("moeflux_mlx", "models", "kernels", "scripts", "tests", "docs")
    found = [p for f in folders for p in (ROOT / f).rglob("*") if p.is_file()]
    return [p.relative_to(ROOT).as_posix() for p in [*found, *ROOT.glob("*")]]


def misnamed(text: str, known: list[str]) -> list[str]:
    """Return the file names in a page that match no path of the repository."""
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


def test_a_name_without_a_file_is_found():
    known = ["moeflux_mlx/engine/forward.py"]
    assert misnamed("`forward.py`, `engine/forward.py`", known) == []
    wrong = "`ward.py` and `graph/forward.py`"
    assert misnamed(wrong, known) == ["ward.py", "graph/forward.py"]


def test_pages_name_classes_that_exist():
    """A renamed class keeps its old name in a page unless somebody looks."""
    folders = ("moeflux_mlx", "models", "scripts", "tests")
    files = [path for f in folders for path in (ROOT / f).rglob("*.py")]
    code = "\n".join(path.read_text() for path in files if path != Path(__file__))
    pages = "\n".join(page.read_text() for page in PAGES)
    name = r"[A-Z][a-z]+[A-Z]\w*"
    named = set(re.findall(rf"`({name})", pages))
    assert len(named) > 20 and "ReadWorkers" in named
    assert named - set(re.findall(rf"\b{name}", code)) == set()


def test_the_graph_made_by_hand_runs(capsys):
    """The example of the API's page uploads, executes and downloads."""
    (code,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/api.md").read_text(), re.S
    )
    exec(code, {})
    assert capsys.readouterr().out == "[2. 3. 4. 5.]\n"


def mac_rows() -> dict[str, str]:
    """Return README's rows of models that fit Macs, by model."""
    readme = (ROOT / "README.md").read_text()
    block = readme.split("<!-- scripts/real_sizes.py --macs -->\n")[1]
    head, _, *rows = block.split("<!-- end -->")[0].splitlines()
    return {"": head, **{row.split("|")[1].strip(): row for row in rows}}


def test_the_table_of_macs_has_every_model_and_every_mac(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import real_sizes

    rows = mac_rows()
    assert set(rows) == {"", *real_sizes.MODELS}
    assert rows[""].endswith("".join(f" {n} GB |" for n in real_sizes.MACS))


@pytest.mark.slow
def test_the_table_of_macs_equals_the_planners_figures(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import real_sizes

    made = real_sizes.mac_table(["Qwen3-30B-A3B"]).splitlines()[-1]
    assert made == mac_rows()["Qwen3-30B-A3B"]


SITE = ROOT / ".github" / "mkdocs.yml"
HOOK = SITE.with_name("mkdocs_pages.py")


def pages_of(nav: object) -> list[str]:
    """Return the files that a site's navigation names."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in pages_of(part)]


def test_the_site_has_every_page_once():
    nav = pages_of(yaml.safe_load(SITE.read_text())["nav"])
    beside = re.findall(
        r'^    "([\w./]+)": "([\w.]+)",$', HOOK.read_text(), re.MULTILINE
    )
    assert len(beside) == 4 and all((ROOT / name).is_file() for name, _ in beside)
    pages = {page.name for page in (ROOT / "docs").glob("*.md")}
    assert sorted(nav) == sorted(pages | {page for _, page in beside})


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("mkdocstrings") is None,
    reason="needs the dependency group docs",
)
def test_the_site_is_built_without_warnings(tmp_path):
    flags = ["--strict", "--quiet", "-f", SITE, "-d", tmp_path / "site"]
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", *flags],
        capture_output=True,
        text=True,
        env={"PATH": "", "NO_MKDOCS_2_WARNING": "1"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    page = (tmp_path / "site" / "reference" / "index.html").read_text()
    assert "expert_memory" in page and "BudgetError" in page
    loaded = re.findall(r'(?:src|href)="(https?:[^"]+\.(?:js|css|woff2?))"', page)
    assert loaded == [], "pages load nothing from elsewhere"
