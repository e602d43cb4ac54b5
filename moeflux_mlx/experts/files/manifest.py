"""``moeflux.json``: the versioned list of a packed directory's contents."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from ...errors import ExpertStoreError
from ...system.files import MANIFEST_BYTES, read_json, short
from .checkpoint import ModelFacts
from .layout import ExpertLayout

MANIFEST_NAME = "moeflux.json"
FORMAT, VERSION = "moeflux-experts", 2

# No file system has longer names, and a longer one would blow up error messages.
MOST_NAME = 255
# Names of our own files; a manifest must not point outside its directory.
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")

# Names of other files, which their authors chose; also inside the directory.
INSIDE = re.compile(r"[^./\\\0][^/\\\0]*(/[^./\\\0][^/\\\0]*)*")

T = TypeVar("T")


@dataclass(frozen=True)
class LayerFile:
    """The expert file of one MoE layer; ``checksums`` has each record's xxh3-64.

    If ``block`` is not empty, it is the path of a routed block in mlx-lm's model, and
    ``layer`` counts these blocks. Otherwise ``names`` has the checkpoint's name for
    each tensor of the layout, as ``PlainLayer`` takes them. Old packs have no names.
    """

    layer: int
    file: str
    n_bytes: int
    layout: ExpertLayout
    checksums: tuple[int, ...]
    block: str = ""
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class ResidentFile:
    """The file of all tensors that are not routed experts."""

    file: str
    n_bytes: int
    fingerprint: str
    checksum: int


@dataclass(frozen=True)
class SmallFile:
    """Another file that loading reads; ``file`` may be in a folder of the pack."""

    file: str
    n_bytes: int
    checksum: int


@dataclass(frozen=True)
class Manifest:
    """The contents of a pack; ``resident`` is None until packing has finished.

    A pack for a class of ours has the checkpoint's tensor names, and layers by number.
    Any other pack is for mlx-lm's class. It has the names of that model's parameters,
    and routed blocks by path. Its ``model.n_layers`` then counts these blocks, and
    ``model.n_experts`` is the number of experts of the largest block.
    """

    source_name: str
    source_identity: str
    model: ModelFacts
    alignment: int
    layers: tuple[LayerFile, ...]
    resident: ResidentFile | None = None
    files: tuple[SmallFile, ...] = ()

    @property
    def is_of_blocks(self) -> bool:
        """Whether the pack has the routed blocks of mlx-lm's model, by path."""
        return any(entry.block for entry in self.layers)

    def to_json(self) -> str:
        """Return the manifest as the text of ``moeflux.json``."""
        layouts = list(dict.fromkeys(entry.layout for entry in self.layers))
        resident = self.resident
        fields: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "source": {"name": self.source_name, "identity": self.source_identity},
            "model": vars(self.model),
            "alignment": self.alignment,
            "resident": resident
            and {**vars(resident), "checksum": f"{resident.checksum:016x}"},
            "layouts": [layout.to_json() for layout in layouts],
            "layers": [
                {
                    "layer": entry.layer,
                    "file": entry.file,
                    "n_bytes": entry.n_bytes,
                    "layout": layouts.index(entry.layout),
                    "checksums": [f"{checksum:016x}" for checksum in entry.checksums],
                    **({"block": entry.block} if entry.block else {}),
                    **({"names": entry.names} if entry.names else {}),
                }
                for entry in self.layers
            ],
        }
        fields["files"] = [
            {**vars(file), "checksum": f"{file.checksum:016x}"} for file in self.files
        ]
        return json.dumps({**fields, "checksum": checksum_of(fields)}, indent=1)

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Parse and check a manifest.

        Raises:
            ExpertStoreError: it is unreadable, inconsistent or of another version.
        """
        try:
            fields = read_json(path, MANIFEST_BYTES)
        except (OSError, ValueError) as error:
            raise ExpertStoreError(f"[manifest] cannot read {path}: {error}") from error
        return _Parser(path).manifest(fields)


def checksum_of(fields: Mapping[str, Any]) -> str:
    """Return the checksum of a manifest's other fields."""
    rest = {name: value for name, value in fields.items() if name != "checksum"}
    return xxhash.xxh3_64_hexdigest(json.dumps(rest, sort_keys=True).encode())


class _Parser:
    """Parser of a manifest; its errors name the file and the field."""

    def __init__(self, path: Path):
        self.path = path

    def manifest(self, fields: Any) -> Manifest:
        if self.get(fields, "format", str) != FORMAT:
            raise self.wrong("format", f"{FORMAT!r}", fields["format"])
        if self.get(fields, "version", int) != VERSION:
            raise self.wrong(
                "version", f"{VERSION}, so pack the model again,", fields["version"]
            )
        if self.get(fields, "checksum", str) != checksum_of(fields):
            raise self.wrong("checksum", "that of the other fields", fields["checksum"])
        source = self.get(fields, "source", dict)
        facts = self.get(fields, "model", dict)
        model = ModelFacts(
            self.get(facts, "model_type", str),
            self.count(facts, "n_layers"),
            self.count(facts, "n_experts"),
            self.get(facts, "top_k", int),
        )
        if not 0 <= model.top_k <= model.n_experts:
            raise self.wrong("top_k", f"at most {model.n_experts}", model.top_k)
        alignment = self.count(fields, "alignment")
        layouts = [
            self.layout(entry, alignment) for entry in self.get(fields, "layouts", list)
        ]
        layers = tuple(
            self.layer(entry, layouts, model)
            for entry in self.get(fields, "layers", list)
        )
        if len({entry.layer for entry in layers}) != len(layers):
            raise self.wrong("layers", "every layer once", [e.layer for e in layers])
        self.check_blocks([entry.block for entry in layers], model)
        resident = self.resident(fields.get("resident"))
        files = tuple(self.small(file) for file in self.get(fields, "files", list))
        names = [entry.file for entry in layers] + [file.file for file in files]
        names += [resident.file] if resident else []
        if len({*names, MANIFEST_NAME}) != len(names) + 1:
            raise self.wrong("file", "a name of its own everywhere", sorted(names))
        return Manifest(
            self.get(source, "name", str),
            self.get(source, "identity", str),
            model,
            alignment,
            layers,
            resident,
            files,
        )

    def layout(self, fields: Any, alignment: int) -> ExpertLayout:
        try:
            layout = ExpertLayout.from_json(fields)
        except ExpertStoreError as error:
            raise ExpertStoreError(f"[manifest] {self.path}: {error}") from error
        if layout.alignment != alignment:
            raise self.wrong("alignment", f"{alignment} everywhere", layout.alignment)
        return layout

    def small(self, fields: Any) -> SmallFile:
        name = self.get(fields, "file", str)
        if not INSIDE.fullmatch(name) or len(name) > MOST_NAME:
            raise self.wrong("file", "a name inside the directory", name)
        n_bytes = self.get(fields, "n_bytes", int)
        return SmallFile(name, n_bytes, self.checksum(fields.get("checksum")))

    def layer(
        self, fields: Any, layouts: list[ExpertLayout], model: ModelFacts
    ) -> LayerFile:
        index = self.get(fields, "layout", int)
        if not 0 <= index < len(layouts):
            raise self.wrong("layout", f"one of {len(layouts)} layouts", index)
        checksums = tuple(
            self.checksum(text) for text in self.get(fields, "checksums", list)
        )
        block, n_experts = "", model.n_experts
        if "block" in fields:
            block, n_experts = self.get(fields, "block", str), len(checksums)
            if not block:
                raise self.wrong("block", "a path", block)
        if len(checksums) != n_experts or not 1 <= n_experts <= model.n_experts:
            raise self.wrong("checksums", f"{model.n_experts} of them", len(checksums))
        n_bytes = self.count(fields, "n_bytes")
        if n_bytes != n_experts * layouts[index].stride:
            expected = f"{n_experts} x {layouts[index].stride}"
            raise self.wrong("n_bytes", expected, n_bytes)
        number = self.get(fields, "layer", int)
        if not 0 <= number < model.n_layers:
            raise self.wrong("layer", f"less than {model.n_layers}", number)
        name, layout = self.name(fields), layouts[index]
        names = self.names(fields.get("names", []), layout)
        return LayerFile(number, name, n_bytes, layout, checksums, block, names)

    def names(self, values: Any, layout: ExpertLayout) -> tuple[str, ...]:
        if type(values) is not list or any(type(name) is not str for name in values):
            raise self.wrong("names", "a list of names", values)
        if values and (len(values) != len(layout.tensors) or "" in values):
            raise self.wrong("names", f"{len(layout.tensors)} names", values)
        return tuple(values)

    def check_blocks(self, blocks: list[str], model: ModelFacts) -> None:
        """Raise unless all blocks have different paths, or none has a path."""
        if any(blocks) and not all(blocks):
            raise self.wrong("block", "a path everywhere", "")
        if any(blocks) and len(set(blocks)) < len(blocks):
            raise self.wrong("block", "a path of its own everywhere", sorted(blocks))
        if blocks and not any(blocks) and not model.top_k:
            raise self.wrong("top_k", "a positive number", model.top_k)

    def resident(self, fields: Any) -> ResidentFile | None:
        if fields is None:
            return None
        return ResidentFile(
            self.name(fields),
            self.count(fields, "n_bytes"),
            self.get(fields, "fingerprint", str),
            self.checksum(self.get(fields, "checksum", str)),
        )

    def get(self, fields: Any, key: str, kind: type[T]) -> T:
        value = fields.get(key) if isinstance(fields, dict) else None
        if type(value) is not kind:
            raise self.wrong(key, kind.__name__, value)
        return value

    def count(self, fields: Any, key: str) -> int:
        value = self.get(fields, key, int)
        if value < 1:
            raise self.wrong(key, "a positive number", value)
        return value

    def name(self, fields: Any) -> str:
        name = self.get(fields, "file", str)
        if not PLAIN_NAME.fullmatch(name) or len(name) > MOST_NAME:
            raise self.wrong("file", "a plain name inside the directory", name)
        return name

    def checksum(self, text: object) -> int:
        if not (isinstance(text, str) and re.fullmatch("[0-9a-f]{16}", text)):
            raise self.wrong("checksum", "16 hexadecimal digits", text)
        return int(text, 16)

    def wrong(self, key: str, expected: str, got: object) -> ExpertStoreError:
        return ExpertStoreError(
            f"[manifest] {self.path}: expected {key} to be {expected} but got "
            f"{short(got)}"
        )
