"""All kernels of ``kernels/``, and the source that each needs."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

from ...errors import KernelError
from .instance import Values, definitions
from .signature import MetalKernel, constants, parse
from .source import Declaration, compact, declarations

HEADER = "moeflux.h"


def kernels_folder() -> Path:
    """Return the folder of the ``.metal`` files, installed or in a checkout."""
    package = Path(__file__).resolve().parents[2]
    found = package / "kernels"
    return found if found.is_dir() else package.parent / "kernels"


def metal_files() -> list[Path]:
    """Return our Metal files; headers that end in ``_cuda.h`` are CUDA's."""
    files = sorted(kernels_folder().iterdir())
    return [
        file
        for file in files
        if file.suffix in {".metal", ".h"} and not file.name.endswith("_cuda.h")
    ]


class Library:
    """The kernels of a folder's ``.metal`` files, by name.

    Raises:
        KernelError: a file cannot be parsed, or two kernels have one name.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        shared = declarations(folder / HEADER)
        self._helpers: dict[str, list[Declaration]] = {}
        self.kernels: dict[str, MetalKernel] = {}
        for path in sorted(folder.glob("*.metal")):
            every = [*shared, *declarations(path)]
            helpers = [d for d in every if d.kind != "kernel"]
            self._helpers[path.name] = helpers
            numbers: dict[str, int] = {}
            for declaration in every:
                if declaration.kind == "include":
                    _check_include(declaration)
                elif declaration.kind == "value":
                    numbers |= constants(declaration.text, numbers)
                elif declaration.kind == "kernel":
                    self._add(parse(declaration, dict(numbers)))

    def _add(self, kernel: MetalKernel) -> None:
        if kernel.name in self.kernels:
            other = self.kernels[kernel.name].place
            raise kernel.place.error(f"kernel {kernel.name!r} stands at {other} too")
        self.kernels[kernel.name] = kernel

    def __getitem__(self, name: str) -> MetalKernel:
        if name not in self.kernels:
            raise KernelError(f"[{name}] expected a kernel of {self.folder}")
        return self.kernels[name]

    def __iter__(self) -> Iterator[MetalKernel]:
        return iter(self.kernels.values())

    def header(self, kernel: MetalKernel, *, lines: bool = False) -> str:
        """Return the declarations that ``kernel`` needs, without comments.

        Args:
            lines: add ``#line`` to each, for the compiler's messages.
        """
        used = self.used(kernel)
        parts = [_text(d.text, d.place.file, d.place.line, lines) for d in used]
        return "".join(parts)

    def body(
        self, kernel: MetalKernel, values: Values | None = None, *, lines: bool = False
    ) -> str:
        """Return the body to register, with thread attributes under our names.

        Args:
            values: the values compiled in, defined first.
            lines: add ``#line``, for the compiler's messages.
        """
        bindings = definitions(kernel, values or {})
        bindings += "".join(f"{a.binding}\n" for a in kernel.attributes if a.binding)
        text = _text(kernel.body, kernel.place.file, kernel.body_line, lines)
        return f"{bindings}{{\n{text}}}"

    def fingerprint(self, name: str, *more: str) -> str:
        """Return a digest of a kernel, its helpers and ``more`` texts.

        Comments and layout of the Metal text do not change it.
        """
        kernel = self[name]
        parts = (self.header(kernel), compact(kernel.declaration.text), *more)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    def used(self, kernel: MetalKernel) -> list[Declaration]:
        """Return the helpers that the kernel uses, in the order of the files."""
        helpers = self._helpers[kernel.place.file]
        by_name: dict[str, list[Declaration]] = {}
        for helper in helpers:
            by_name.setdefault(helper.name, []).append(helper)
        reached: set[str] = set()
        waiting = set(kernel.declaration.identifiers)
        while waiting:
            name = waiting.pop()
            if name in reached or name not in by_name:
                continue
            reached.add(name)
            for helper in by_name[name]:
                waiting |= helper.identifiers
        kept = (h for h in helpers if h.name in reached or _is_system(h))
        return [h for h in kept if h.kind != "using"]


def _check_include(declaration: Declaration) -> None:
    """Refuse any other header of ours: its helpers would not be found."""
    if not _is_system(declaration) and declaration.name != f'"{HEADER}"':
        raise declaration.place.error(
            f"expected {HEADER} or a system header but got {declaration.name}"
        )


def _is_system(declaration: Declaration) -> bool:
    return declaration.kind == "include" and declaration.name.startswith("<")


def _text(text: str, file: str, line: int, lines: bool) -> str:
    if lines:
        return f'\n#line {line} "{file}"\n{text}\n'
    return compact(text)


@functools.cache
def library() -> Library:
    """Return moeflux-mlx's own kernels."""
    return Library(kernels_folder())
