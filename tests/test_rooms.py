"""The package's rooms: each lists its imports, and data goes one way."""

from __future__ import annotations

import ast
import functools
import re
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

import moeflux_mlx

FOLDER = Path(__file__).resolve().parents[1] / "moeflux_mlx"
FILES = [
    path
    for path in FOLDER.rglob("*.py")
    if "models" not in path.relative_to(FOLDER).parts and path.parent != FOLDER
]
TOP = [path for path in FOLDER.glob("*.py") if path.name != "__init__.py"]
# A room is a folder that lists its imports; other folders belong to the one above.
SAYS = re.compile(r"^Imports: ([\w., \n]+)\.$", re.MULTILINE)


def says(folder: Path) -> re.Match[str] | None:
    """Find the line of a folder's docstring that lists its imports."""
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    return SAYS.search(text)


FOLDERS = {path.parent for path in FILES}
ROOMS = sorted(".".join(f.relative_to(FOLDER).parts) for f in FOLDERS if says(f))
UNITS = {*ROOMS, *(path.stem for path in TOP)}


def unit_of(name: str) -> str:
    """Return the room, or the module beside the rooms, that a dotted name is in."""
    parts = name.split(".")
    names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((n for n in names if n in UNITS), "")


@functools.cache
def imported(path: Path) -> set[str]:
    """Return the units that a file imports from, wherever the import stands."""
    package = ["moeflux_mlx", *path.parent.relative_to(FOLDER).parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *filter(None, [node.module])])
            names = [f"{start}.{alias.name}" for alias in node.names]
        else:
            continue
        ours = (n.partition(".")[2] for n in names if n.startswith("moeflux_mlx."))
        found |= {unit_of(name) for name in ours}
    return found - {""}


def imports_of(unit: str) -> set[str]:
    """Return the other units that a unit's files import from."""
    files = [path for path in FILES if unit_of(dotted(path)) == unit]
    files += [path for path in TOP if path.stem == unit]
    return set().union(*map(imported, files)) - {unit}


def dotted(path: Path) -> str:
    """Return a file's folder as a dotted name."""
    return ".".join(path.parent.relative_to(FOLDER).parts)


def said(room: str) -> set[str]:
    """Return the imports that a room's docstring lists."""
    found = says(FOLDER.joinpath(*room.split(".")))
    names = re.split(r",\s+", found[1]) if found else []
    return set() if names == ["nothing of ours"] else set(names)


# Read by the class of mlx-lm from which ours inherits.
OF_MLX_LM = {"_current_tokens"}


def unread(sources: list[str]) -> list[str]:
    """Return the private attributes that code sets on ``self`` but never reads."""
    text = "\n".join(sources)
    uses = Counter(re.findall(r"\.(_[a-z]\w*)", text))
    stores = Counter(re.findall(r"self\.(_[a-z]\w*)(?:: [^=\n]+)? = ", text))
    return [n for n, k in stores.items() if uses[n] == k and n not in OF_MLX_LM]


def test_an_attribute_that_is_set_is_read():
    """After a rename, a place with the old name would set an attribute in vain."""
    assert unread(["self._a = 1\nself._b: int = self._a", "self._b = 2"]) == ["_b"]
    assert unread([path.read_text() for path in [*FILES, *TOP]]) == []


def test_every_folder_of_the_package_is_a_room():
    top = {path.relative_to(FOLDER).parts[0] for path in FILES}
    assert top <= set(ROOMS)


def test_an_import_is_found_wherever_it_stands(tmp_path):
    path = FOLDER / "engine" / "imagined.py"
    source = (
        "def f():\n    from ..memory.plan import x\n    import moeflux_mlx.loading\n"
    )
    source += "from . import graph\nfrom .. import config\nfrom ..errors import E\n"

    class Source:
        parent = path.parent

        @staticmethod
        def read_text():
            return source

    wanted = {"memory", "loading", "engine.graph", "config", "errors"}
    assert imported(Source) == wanted


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_the_rooms_it_lists(room):
    assert said(room) == imports_of(room)


def test_imports_of_rooms_have_no_cycle():
    graph = {unit: imports_of(unit) for unit in UNITS}
    try:
        order = [*TopologicalSorter(graph).static_order()]
    except CycleError as error:
        pytest.fail(f"imports go round: {' -> '.join(error.args[1])}")
    assert order.index("experts.files") < order.index("engine") < order.index("cli")


@pytest.mark.parametrize("room", [room for room in ROOMS if "experts" in room[:7]])
def test_experts_know_nothing_of_the_engine(room):
    known = {"errors", "config", "device", "system"}
    assert {unit for unit in imports_of(room) if "experts" not in unit} <= known


def test_the_top_level_holds_the_ground_and_the_doors():
    ground = {"errors", "config", "device", "products"}
    doors = {"loading", "streaming", "state", "training", "adapters", "drafts"}
    assert {path.stem for path in TOP} == ground | doors


def test_models_are_found_in_a_checkout_that_is_not_installed_in_place():
    # Without the finder of an editable installation only paths tell where they are.
    found = PathFinder.find_spec("moeflux_mlx.models", moeflux_mlx.__path__)
    assert found is not None and found.origin is not None
    assert (Path(found.origin).parent / "qwen3_moe.py").is_file()
