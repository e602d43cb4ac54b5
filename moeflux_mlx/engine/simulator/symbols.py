"""Debug information of a compiled kernel: lines and threadgroup arrays.

The package that reads it is optional, and so imported where it is used.
"""

from __future__ import annotations

import bisect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Shared:
    """A threadgroup array: its kernel, name, address and size."""

    kernel: str
    name: str
    address: int
    n_bytes: int


def shared_arrays(path: Path) -> list[Shared]:
    """Return the threadgroup arrays of a library: the statics of its functions."""
    from elftools.elf.elffile import ELFFile
    from elftools.elf.sections import SymbolTableSection

    found: dict[int, Shared] = {}
    with path.open("rb") as file:
        table = ELFFile(file).get_section_by_name(".symtab")
        assert isinstance(table, SymbolTableSection)
        for symbol in table.iter_symbols():
            if symbol["st_info"]["type"] != "STT_OBJECT" or not symbol["st_size"]:
                continue
            mangled = re.match(r"_ZZ(?:N)?(\d+)", symbol.name)
            if not mangled:
                continue
            begin = mangled.end()
            kernel = symbol.name[begin : begin + int(mangled[1])]
            name = _last_name(symbol.name)
            at = symbol["st_value"]
            found[at] = Shared(kernel, name, at, symbol["st_size"])
    return sorted(found.values(), key=lambda s: s.address)


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
