"""Debug information of a compiled kernel: lines and threadgroup arrays.

The package that reads it is optional, and so imported where it is used.
"""

from __future__ import annotations

import bisect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# PF_W of the ELF format.
_WRITEABLE = 2


@dataclass(frozen=True)
class Shared:
    """A threadgroup array: its kernel, name, address and size."""

    kernel: str
    name: str
    address: int
    n_bytes: int


@dataclass(frozen=True)
class Layout:
    """Where a library's parts are, as offsets from the place where it is loaded.

    Attributes:
        functions: addresses of exported functions.
        constant: begin and end of the memory that nobody writes: code and constants.
        shared: threadgroup arrays, in the order of their addresses.
    """

    functions: dict[str, int]
    constant: tuple[int, int]
    shared: list[Shared]

    @classmethod
    def of(cls, path: Path) -> Layout:
        """Read the layout of a library's file."""
        from elftools.elf.elffile import ELFFile
        from elftools.elf.sections import SymbolTableSection

        functions: dict[str, int] = {}
        arrays: dict[int, Shared] = {}
        with path.open("rb") as file:
            elf = ELFFile(file)
            loaded = [s.header for s in elf.iter_segments("PT_LOAD")]
            table = elf.get_section_by_name(".symtab")
            assert isinstance(table, SymbolTableSection)
            for symbol in table.iter_symbols():
                kind, at = symbol["st_info"]["type"], symbol["st_value"]
                if kind == "STT_FUNC" and symbol["st_shndx"] != "SHN_UNDEF":
                    functions[symbol.name] = at
                elif kind == "STT_OBJECT" and symbol["st_size"]:
                    array = _threadgroup_array(symbol.name, at, symbol["st_size"])
                    if array:
                        arrays[at] = array
        constant = [h for h in loaded if not h["p_flags"] & _WRITEABLE]
        begin = min(h["p_vaddr"] for h in constant)
        end = max(h["p_vaddr"] + h["p_memsz"] for h in constant)
        return cls(functions, (begin, end), [arrays[at] for at in sorted(arrays)])


def _threadgroup_array(mangled: str, at: int, n_bytes: int) -> Shared | None:
    """Return the threadgroup array of a symbol: a static of a function."""
    match = re.match(r"_ZZ(?:N)?(\d+)", mangled)
    if not match:
        return None
    kernel = mangled[match.end() : match.end() + int(match[1])]
    return Shared(kernel, _last_name(mangled), at, n_bytes)


def _last_name(mangled: str) -> str:
    """Return a local variable's name from ``_ZZ<function>E<length><name>``."""
    for match in reversed(list(re.finditer(r"E(\d+)", mangled))):
        name = mangled[match.end() : match.end() + int(match[1])]
        if len(name) == int(match[1]):
            return name
    return mangled


class Lines:
    """Finds the file and line of an address in a library."""

    def __init__(self, path: Path):
        from elftools.elf.elffile import ELFFile

        self._rows: list[tuple[int, str, int]] = []
        with path.open("rb") as file:
            elf = ELFFile(file)
            if elf.has_dwarf_info():
                self._read(elf.get_dwarf_info())
        self._rows.sort()
        self._addresses = [row[0] for row in self._rows]

    def _read(self, dwarf: Any) -> None:
        for unit in dwarf.iter_CUs():
            program = dwarf.line_program_for_CU(unit)
            if program is None:
                continue
            files = program["file_entry"]
            first = 0 if program["version"] >= 5 else 1
            for entry in program.get_entries():
                state = entry.state
                if state is None:
                    continue
                name = ""
                if not state.end_sequence:
                    name = files[state.file - first].name.decode()
                self._rows.append((state.address, name, state.line))

    def find(self, address: int) -> tuple[str, int] | None:
        """Return file and line of the instruction at or before ``address``.

        An access inside the standard library has the line of its caller.
        """
        at = bisect.bisect_right(self._addresses, address) - 1
        while at >= 0 and (self._rows[at][2] == 0 or self._is_ours(at)):
            at -= 1
        if at < 0 or not self._rows[at][1]:
            return None
        return Path(self._rows[at][1]).name, self._rows[at][2]

    def _is_ours(self, at: int) -> bool:
        return Path(self._rows[at][1]).name in ("metal_stdlib", "entry", "kernel.cpp")
