"""The files of a commit, for scripts that compare it with the working tree."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location, spec_from_loader
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def unpacked(commit: str) -> Iterator[Path]:
    """Yield a folder with a commit's files, or the folder that ``commit`` is.

    Raises:
        SystemExit: git has no such commit.
    """
    if Path(commit).is_dir():
        yield Path(commit).resolve()
        return
    command = ["git", "archive", "--format=tar", commit]
    packed = subprocess.run(command, cwd=ROOT, capture_output=True)
    if packed.returncode:
        raise SystemExit(f"git has no files of {commit}: {packed.stderr.decode()}")
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=BytesIO(packed.stdout)) as archive:
            archive.extractall(folder, filter="data")
        yield Path(folder).resolve()


@contextlib.contextmanager
def asked(file: str, *arguments: str) -> Iterator[Callable[[str], Any]]:
    """Yield a function that sends a line to a script's process and returns its answer.

    The answer is a line of JSON. If the process ends, SystemExit follows its messages.
    """
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile("w+") as messages,
        subprocess.Popen(
            [sys.executable, file, *arguments],
            stdin=pipe,
            stdout=pipe,
            stderr=messages,
            text=True,
        ) as process,
    ):
        assert process.stdin and process.stdout

        def ask(request: str) -> Any:
            print(request, file=process.stdin, flush=True)
            line = process.stdout.readline()
            if not line:
                messages.seek(0)
                print(messages.read(), file=sys.stderr)
                name = Path(file).name
                raise SystemExit(f"{name}: {request!r} failed for {arguments}")
            return json.loads(line)

        # Leaving the block closes the input, which ends the process.
        yield ask


def import_from(tree: Path) -> None:
    """Let this process import the package, the models and the scripts of a tree.

    Call it before anything of the package is imported.
    """
    # An editable installation leads to the working tree, whichever tree is asked for.
    installed = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
    sys.meta_path[:] = [_Models(tree), *installed]
    sys.path[:0] = [str(tree), str(tree / "scripts")]


def script(path: Path) -> ModuleType:
    """Import a script whose name has no ending."""
    loader = SourceFileLoader(path.name, str(path))
    spec = spec_from_loader(path.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    # Dataclasses look up their module here.
    sys.modules[path.name] = module
    loader.exec_module(module)
    return module


class _Models:
    """Finds a tree's models where an installed package has them."""

    def __init__(self, tree: Path):
        self._folder = tree / "models"

    def find_spec(
        self, name: str, path: Any = None, target: Any = None
    ) -> ModuleSpec | None:
        """Return the specification of ``moeflux_mlx.models``; None of all else."""
        if name != "moeflux_mlx.models":
            return None
        file = self._folder / "__init__.py"
        places = [str(self._folder)]
        return spec_from_file_location(name, file, submodule_search_locations=places)
