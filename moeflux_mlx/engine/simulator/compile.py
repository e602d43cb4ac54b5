"""Compile Metal source to a shared library with clang of the package ``ziglang``."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import SimulatorError
from ...system import children, private
from ..metal.source import matching, split_commas

HERE = Path(__file__).resolve().parent
INCLUDE = HERE / "include"
RUNTIME = HERE / "runtime.cpp"
_MACHINE = platform.machine()
_CPU = ["-mavx2", "-mfma", "-mf16c"] if _MACHINE == "x86_64" else []
FLAGS = [
    *("-std=c++17", "-O2", "-g1", "-fPIC", *_CPU),
    # A compiled kernel runs a few times only, one lane at a time.
    *("-fno-vectorize", "-fno-slp-vectorize", "-fno-unroll-loops"),
    *("-Xclang", "-ffloat16-excess-precision=none"),
    *("-Xclang", "-cl-single-precision-constant", "-fno-math-errno"),
    *("-fno-sanitize=all", "-fno-exceptions", "-fno-rtti", "-nostdinc"),
    # A read of an absent input must be a fault, not code that clang removes.
    *("-Xclang", "-fno-delete-null-pointer-checks"),
    *("-Wno-unknown-attributes", "-Wno-user-defined-literals", "-Wno-macro-redefined"),
    *("-Wno-unused-value", "-Wno-ignored-attributes", "-Wno-unknown-pragmas"),
    *("-Wno-deprecated-volatile", "-Wno-reserved-user-defined-literal"),
]
# How numbers are computed: as the source says; with a * b + c contracted to one
# rounding wherever clang likes; or contracted, with functions as inexact as Apple's
# fast ones may be. Apple's compiler does the last.
NUMBERS = {
    "plain": ["-ffp-contract=off"],
    "contracted": ["-ffp-contract=fast"],
    "fast": ["-ffp-contract=fast", "-D__MSL_FAST"],
}
CHECKED_FLAGS = [
    # Passed to the compiler only: the driver would link its own runtime.
    *("-Xclang", "-fsanitize=thread,array-bounds,integer-divide-by-zero"),
    *("-Xclang", "-fsanitize-trap=array-bounds,integer-divide-by-zero"),
    *("-Xclang", "-fno-sanitize-merge=array-bounds,integer-divide-by-zero"),
    *("-mllvm", "-tsan-instrument-func-entry-exit=0"),
    *("-mllvm", "-tsan-instrument-read-before-write=1"),
]


def available() -> bool:
    """Return whether kernels can be simulated on this machine."""
    known = sys.platform == "linux" and _MACHINE in ("x86_64", "aarch64")
    found = all(importlib.util.find_spec(name) for name in ("ziglang", "elftools"))
    return known and found


@dataclass(frozen=True)
class Parameter:
    """A parameter: of kind ``buffer``, ``reference``, ``threadgroup`` or ``ids``.

    ``writable``: a kernel may write to the buffer, as it is not declared constant.
    """

    kind: str
    type: str
    name: str
    index: int
    writable: bool


@dataclass(frozen=True)
class Function:
    """A kernel that can be run: its name for callers and its spelling in C++."""

    name: str
    spelling: str
    parameters: tuple[Parameter, ...]

    @property
    def n_buffers(self) -> int:
        """Number of buffers that a launch binds."""
        return 1 + max((p.index for p in self.parameters if p.index >= 0), default=-1)


_KERNEL = re.compile(
    r"(?:\[\[\s*kernel\s*\]\]|\bkernel\b)(?:\s*\[\[[^\]]*\]\])*\s+void\s+(\w+)\s*\("
)
_INSTANCE = re.compile(
    r"template\s*\[\[\s*host_name\(\"([^\"]+)\"\)\s*\]\]\s*(?:\[\[kernel\]\]|kernel)\s*"
    r"(?:decltype\((.*?)\)\s*\w+<.*?>|void\s+(\w+(?:<[^;(]*>)?)\s*\(.*?\))\s*;",
    re.S,
)
_ARRAYS = r"\w+(?:\s*\[[^\]]*\])*"
_SHARED = re.compile(
    r"^(\s*|.*[;{]\s*)(threadgroup\s+(?:alignas\([^)]*\)\s*)?[\w:<>,\s]*?\w[\w:<>]*\s+"
    rf"{_ARRAYS}(?:\s*,\s*{_ARRAYS})*\s*;)",
    re.M,
)
_ATTRIBUTES = {
    "thread_position_in_grid": "position",
    "thread_position_in_threadgroup": "in_group",
    "threadgroup_position_in_grid": "group",
    "threads_per_threadgroup": "group_size",
    "dispatch_threads_per_threadgroup": "group_size",
    "threads_per_grid": "grid",
    "threadgroups_per_grid": "n_groups",
    "thread_index_in_threadgroup": "index",
    "thread_index_in_simdgroup": "lane",
    "simdgroup_index_in_threadgroup": "simdgroup",
    "simdgroups_per_threadgroup": "n_simdgroups",
    "dispatch_simdgroups_per_threadgroup": "n_simdgroups",
    "threads_per_simdgroup": "width",
}


def with_includes(path: Path, seen: set[Path] | None = None) -> str:
    """Return a file's text with the quoted files that it includes inserted."""
    seen = set() if seen is None else seen
    seen.add(path.resolve())
    lines = []
    for number, line in enumerate(path.read_text().split("\n"), 1):
        found = re.match(r'\s*#\s*include\s+"([^"]+)"', line)
        if not found:
            lines.append(line)
            continue
        inner = path.parent / found[1]
        if inner.resolve() not in seen:
            text = with_includes(inner, seen)
            lines.append(f'#line 1 "{inner.name}"\n{text}')
        lines.append(f'#line {number + 1} "{path.name}"')
    return "\n".join(lines)


def blank(text: str) -> str:
    """Return as many empty lines."""
    return "\n" * text.count("\n")


def without_comments(text: str) -> str:
    """Remove comments and keep the lines."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", lambda m: blank(m[0]) or " ", text, flags=re.S)


def functions(source: str) -> list[Function]:
    """Return the kernels of a source that can be run: plain ones and instances."""
    signatures: dict[str, tuple[Parameter, ...]] = {}
    plain = []
    for found in _KERNEL.finditer(source):
        close = matching(source, found.end() - 1, "()")
        if source[close + 1 :].lstrip()[:1] != "{":
            continue
        signatures[found[1]] = _parameters(source[found.end() : close])
        before = source[: found.start()].rstrip()
        if not re.search(r"template\s*<[^;{}]*>$", before):
            plain.append(Function(found[1], found[1], signatures[found[1]]))
    made = []
    for found in _INSTANCE.finditer(source):
        spelling = (found[2] or found[3]).strip()
        name = spelling.split("<")[0].strip()
        if name in signatures:
            made.append(Function(found[1], spelling, signatures[name]))
    return plain + made


def _parameters(text: str) -> tuple[Parameter, ...]:
    found, next_buffer = [], 0
    for part in split_commas(text):
        attribute = re.search(r"\[\[\s*(\w+)\s*(?:\(([^)]*)\))?\s*\]\]", part)
        head = re.sub(r"\[\[.*?\]\]", " ", part).strip()
        name = re.findall(r"\w+", head)[-1]
        kind, index = "ids", -1
        if attribute and attribute[1] == "threadgroup":
            kind = "threadgroup"
        elif "*" in head or "&" in head:
            kind = "reference" if "&" in head else "buffer"
            given = attribute and attribute[1] == "buffer" and attribute[2].isdigit()
            index = int(attribute[2]) if attribute and given else next_buffer
            next_buffer = index + 1
        type_name = attribute[1] if attribute and kind == "ids" else ""
        if kind == "ids" and type_name not in _ATTRIBUTES:
            raise SimulatorError(f"[simulator] cannot bind parameter {part.strip()!r}")
        declared = head.split()[-2] if kind == "ids" else ""
        target = re.split(r"[*&]", head)[0]
        writable = index >= 0 and not re.search(r"\b(const|constant)\b", target)
        found.append(Parameter(kind, declared, type_name or name, index, writable))
    return tuple(found)


def translate(source: str, name: str) -> tuple[str, list[Function]]:
    """Translate Metal source to C++ with an entry point for each kernel."""
    text, found = translated(source, name)
    entries = [_entry(i, function) for i, function in enumerate(found)]
    return text + '#line 1 "entry"\n' + PROXIES + "\n".join(entries) + "\n", found


def translated(source: str, name: str) -> tuple[str, list[Function]]:
    """Translate Metal source to C++; return its kernels too."""
    text = without_comments(source)
    found = functions(text)
    text = _INSTANCE.sub(lambda m: blank(m[0]), text)
    text = re.sub(r"\[\[\s*kernel\s*\]\]|#\s*pragma\s+once", "", text)
    text = _static_threadgroup(text)
    head = f'#include <metal_stdlib>\nusing namespace metal;\n#line 1 "{name}"\n'
    return head + text + "\n", found


def _static_threadgroup(text: str) -> str:
    """Make threadgroup arrays of kernels static, as clang requires."""

    def add(match: re.Match[str]) -> str:
        return f"{match[1]}static {match[2]}"

    return _SHARED.sub(add, text)


PROXIES = """
#undef kernel
namespace __msl {
struct Pointer {
  unsigned long at;
  template <typename T> operator T*() const { return (T*)at; }
};
struct Reference {
  unsigned long at;
  template <typename T> operator T&() const { return *(T*)at; }
};
}
"""


def _entry(i: int, function: Function) -> str:
    joined = ", ".join(arguments(function, "b[{}]", "t->"))
    return (
        f'extern "C" void __run_{i}(const unsigned long* b, const __msl::Ids* t) '
        f"{{ {function.spelling}({joined}); }}"
    )


def arguments(function: Function, buffer: str, ids: str) -> list[str]:
    """Return a kernel's arguments in C++.

    Args:
        buffer: the text of a buffer's address, with ``{}`` for its number.
        ids: the prefix of the members of ``Ids``.
    """
    found = []
    for p in function.parameters:
        if p.kind == "buffer":
            found.append(f"__msl::Pointer{{{buffer.format(p.index)}}}")
        elif p.kind == "reference":
            found.append(f"__msl::Reference{{{buffer.format(p.index)}}}")
        elif p.kind == "threadgroup":
            found.append("nullptr")
        else:
            found.append(_id(p, ids))
    return found


def _id(p: Parameter, ids: str) -> str:
    part = _ATTRIBUTES[p.name]
    if part == "width":
        return "32u"
    if part in ("index", "lane", "simdgroup", "n_simdgroups"):
        return f"{ids}{part}"
    width = int(p.type[-1]) if p.type[-1] in "23" else 1
    values = ", ".join(f"{ids}{part}[{d}]" for d in range(width))
    return f"{p.type}({values})"


def zig() -> Path:
    """Return the compiler's program, which its Python module would only start."""
    found = importlib.util.find_spec("ziglang")
    if found is None or found.origin is None:
        raise SimulatorError(
            "[simulator] expected the package ziglang but found none: "
            "pip install 'moeflux-mlx[sim]'"
        )
    return Path(found.origin).with_name("zig")


@functools.cache
def base_digest() -> bytes:
    """Return a digest of all that every result of the compiler depends on."""
    from importlib.metadata import version

    parts = [version("ziglang"), platform.machine(), *FLAGS, *CHECKED_FLAGS]
    files = [RUNTIME, *sorted(p for p in INCLUDE.rglob("*") if p.is_file())]
    digest = hashlib.sha256("\0".join(parts).encode())
    for path in files:
        digest.update(path.read_bytes())
    return digest.digest()


def cached(name: str, key: Sequence[str], make: Callable[[Path], object]) -> Path:
    """Return a private file of the cache; make it if it is missing.

    Args:
        name: its name, to which a digest is added.
        key: the texts that its content depends on, besides ``base_digest``.
        make: writes the content to a path in an empty folder.
    """
    parts = "\0".join(key).encode()
    digest = hashlib.sha256(base_digest() + parts).hexdigest()[:32]
    stem, suffix = os.path.splitext(name)
    path = private.made("simulator") / f"{stem}-{digest}{suffix}"
    if not private.is_private(path):
        with private.workplace(path.parent) as folder:
            out = folder / name
            make(out)
            out.chmod(0o600)
            # Another process may make the same file: the last one wins whole.
            os.replace(out, path)
    return path


def built(
    key: str,
    text: str,
    flags: list[str],
    libraries: list[str],
    *,
    program: str = "clang",
    precompiled: bool = False,
) -> Path:
    """Return the library of a C++ text; compile it unless it is cached.

    Args:
        key: the kind of library, part of its name.
        program: the compiler, a program of ziglang.
        precompiled: whether the text includes the Metal standard library.

    Raises:
        SimulatorError: it does not compile; has the compiler's message.
    """

    def make(out: Path) -> None:
        source = out.with_name("kernel.cpp")
        source.write_text(text)
        code = str(source.with_suffix(".o"))
        known = _precompiled(tuple(flags)) if precompiled else []
        _run(program, [*flags, *known, "-c", "-o", code, str(source)], source)
        _run("ld.lld", ["-shared", "-o", str(out), code, *libraries], source)

    return cached(f"{key}.so", [key, text, *flags], make)


@functools.cache
def _precompiled(flags: tuple[str, ...]) -> list[str]:
    """Return the flags that include the standard library, compiled once for these."""

    def make(out: Path) -> None:
        header = ["-x", "c++-header", str(INCLUDE / "metal_stdlib")]
        own = ["-Wno-pragma-once-outside-header", "-o", str(out)]
        _run("clang", [*flags, *own, *header], out)

    # Clang refuses a precompiled header if the times of its sources changed.
    files = ((p, p.stat().st_mtime_ns) for p in sorted(INCLUDE.rglob("*")))
    path = cached("library.pch", [*flags, *map(str, files)], make)
    return ["-include-pch", str(path)]


def runtime() -> Path:
    """Return the runtime's library in the current cache.

    Libraries record its path, so it must not come from an earlier cache folder.
    """
    flags = ["-std=c++17", "-O2", "-g1", "-fPIC", *_CPU, "-fno-sanitize=all"]
    flags += ["-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics"]
    # Only the runtime uses the C library, whose headers ``clang`` would not find.
    return built("runtime", RUNTIME.read_text(), flags, [], program="c++")


def examine(source: str, name: str = "kernel.metal") -> None:
    """Check that Metal source compiles, without generating code.

    Raises:
        SimulatorError: it does not compile; has the compiler's message.
    """
    text, _ = translate(source, name)
    with private.workplace(private.made("simulator")) as folder:
        path = folder / "kernel.cpp"
        path.write_text(text)
        flags = _flags("plain", False)
        flags += _precompiled(tuple(flags))
        _run("clang", [*flags, "-fsyntax-only", str(path)], path)


def _run(program: str, arguments: list[str], source: Path) -> None:
    """Run a program of the package ziglang in the folder of a source file."""
    folder = str(source.parent)
    caches = {"ZIG_GLOBAL_CACHE_DIR": folder, "ZIG_LOCAL_CACHE_DIR": folder}
    done = children.run([str(zig()), program, *arguments], source.parent, caches)
    if done.returncode:
        message = done.stderr.replace(str(source), "kernel").strip()
        raise SimulatorError(f"[simulator] {message}")


def _flags(numbers: str, checked: bool) -> list[str]:
    flags = [*FLAGS, *NUMBERS[numbers], "-isystem", str(INCLUDE)]
    return flags + CHECKED_FLAGS if checked else flags


def library(text: str, checked: bool, numbers: str = "plain") -> Path:
    """Return the compiled library of a translated source.

    Args:
        numbers: one of ``NUMBERS``.
    """
    name, flags = "checked" if checked else "fast", _flags(numbers, checked)
    return built(name, text, flags, [str(runtime())], precompiled=True)
