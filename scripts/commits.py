"""The files and the code of a commit, for scripts that compare it with this tree."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location, spec_from_loader
from io import BytesIO
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def unpacked(commit: str) -> Iterator[Path]:
    """Yield a folder with a commit's files; ``commit`` may be such a folder itself."""
    if Path(commit).is_dir():
        yield Path(commit).resolve()
        return
    command = ["git", "archive", "--format=tar", commit]
    packed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=BytesIO(packed.stdout)) as archive:
            archive.extractall(folder, filter="data")
        yield Path(folder).resolve()


class _Models:
    """Finds a tree's models, which an installed package has in another place."""

    def __init__(self, tree: Path):
        self._folder = tree / "models"

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Return the specification of ``moeflux_mlx.models``; None of all else."""
        if name != "moeflux_mlx.models":
            return None
        places = [str(self._folder)]
        file = self._folder / "__init__.py"
        return spec_from_file_location(name, file, submodule_search_locations=places)


def use(tree: Path) -> None:
    """Let this process import a tree's package and scripts, in that folder.

    An installed package is passed over. Call it before the first import of ours.
    """
    installed = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
    sys.meta_path[:] = [_Models(tree), *installed]
    sys.path[:0] = [str(tree), str(tree / "scripts")]
    os.chdir(tree)


def imported(script: Path) -> Any:
    """Import a script by its path, and return it as a module."""
    loader = SourceFileLoader(script.name, str(script))
    spec: ModuleSpec | None = spec_from_loader(script.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    # Dataclasses look up their module here.
    sys.modules[script.name] = module
    loader.exec_module(module)
    return module
