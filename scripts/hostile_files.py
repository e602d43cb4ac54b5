"""Seeded damage of valid files, to test their readers."""

from __future__ import annotations

import copy
import io
import json
import random
import struct
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

BIG = 10**30
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 255, 256, 2**31, 2**32, 2**63 - 1, 2**63),
    *(2**64, -(2**63), BIG, -BIG, 0.5, -0.0, 1e300, 1e-300, float("inf"), float("nan")),
    *("", "x", "0", "a\0b", "../x", "/etc/passwd", "\ud800", "e\u0301", "F16", "U8"),
    *("x" * 5000, "{", "[", [], {}, [0], [[]], {"": 0}, [BIG], [-1, 1], [0] * 3000),
)


class Raw:
    """JSON text that is written unchanged."""

    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return self.text


RAW = (
    "9" * 5000,
    "-" + "9" * 4299,
    "1e999999",
    "NaN",
    "-Infinity",
    "[" * 100_000,
    "[" * 70 + "]" * 70,
    '{"a":' * 2000 + "0" + "}" * 2000,
    '"\\ud800"',
    '"\\u0000"',
    "01",
    "",
    '{"a":1,"a":2}',
)


def dumps(value: Any) -> str:
    """Write JSON; objects may be lists of pairs, so that a name can occur twice."""
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, dict):
        return dumps(Pairs(value.items()))
    if isinstance(value, Pairs):
        inner = (f"{json.dumps(name)}:{dumps(part)}" for name, part in value)
        return "{" + ",".join(inner) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dumps, value)) + "]"
    return json.dumps(value)


class Pairs(list):
    """An object of JSON as its pairs."""


def mutate_json(value: Any, rng: random.Random) -> Any:
    """Return JSON with one to three random changes."""
    value = copy.deepcopy(value)
    holder = {"": value}
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(holder))
        parent, key = rng.choice(places)
        old, other = parent[key], rng.choice(places)
        match rng.randrange(10):
            case 0 | 1 | 2:
                parent[key] = copy.deepcopy(rng.choice(VALUES))
            case 3 if type(old) in (int, float):
                parent[key] = _number(old, rng)
            case 4 if isinstance(old, str) and old:
                parent[key] = mutate_text(old, rng)
            case 5 if parent is not holder:
                del parent[key]
            case 6:
                parent[key], other[0][other[1]] = other[0][other[1]], old
                if _is_ring(holder):
                    return None
            case 7:
                parent[key] = Raw(rng.choice(RAW))
            case 8 if isinstance(old, list) and old:
                old.insert(rng.randrange(len(old)), copy.deepcopy(rng.choice(old)))
            case 9 if isinstance(old, dict) and old:
                name = rng.choice(list(old))
                again = copy.deepcopy(rng.choice((old[name], *VALUES)))
                parent[key] = Pairs([*old.items(), (name, again)])
            case _:
                parent[key] = [old] if rng.random() < 0.5 else {"x": old}
    return holder[""]


def _number(old: Any, rng: random.Random) -> Any:
    near = [old + 1, old - 1, old * 2, -old, old * 1.0, str(old)]
    return rng.choice([*near, old ^ 64] if type(old) is int else near)


def _places(value: Any) -> Any:
    if isinstance(value, dict):
        items: Any = list(value.items())
    else:
        items = list(enumerate(value))[:64]
    for key, part in items:
        yield value, key
        if type(part) in (dict, list):
            yield from _places(part)


def _is_ring(value: Any, above: tuple[int, ...] = ()) -> bool:
    if type(value) not in (dict, list):
        return False
    if id(value) in above or len(above) > 40:
        return True
    inner = value.values() if isinstance(value, dict) else value
    return any(_is_ring(part, (*above, id(value))) for part in inner)


def mutate_text(text: str, rng: random.Random) -> str:
    """Change some letters."""
    at = rng.randrange(len(text))
    letter = rng.choice("0aZ./\\-_ \0\n{}[]\"'\u00e9\u0661")
    return rng.choice((text[:at], text[:at] + letter + text[at + 1 :], text + letter))


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, repeat or insert bytes."""
    raw = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(raw)) if raw else 0
        end = at + rng.choice((1, 2, 4, 8, 64))
        match rng.randrange(6):
            case 0 | 1 if raw:
                raw[at] ^= 1 << rng.randrange(8)
            case 2:
                del raw[at : None if rng.random() < 0.3 else end]
            case 3:
                raw[at:at] = raw[at:end]
            case 4:
                raw[at:at] = rng.randbytes(rng.choice((1, 4, 16)))
            case _:
                raw[at:end] = rng.choice((b"\xff", b"\0")) * (min(end, len(raw)) - at)
    return bytes(raw)


def mutate_json_file(data: bytes, rng: random.Random) -> bytes:
    """Change a JSON file in its structure or its bytes."""
    if rng.random() < 0.25:
        return mutate_bytes(data, rng)
    return dumps(mutate_json(json.loads(data), rng)).encode("utf-8", "surrogatepass")


def mutate_safetensors(
    data: bytes, rng: random.Random, seal: Callable[[Any, bytes], None] | None = None
) -> bytes:
    """Change a safetensors file; ``seal`` corrects its checksum."""
    if rng.random() < 0.25:
        return mutate_bytes(data, rng)
    (n_header,) = struct.unpack("<Q", data[:8])
    fields, rest = json.loads(data[8 : 8 + n_header]), data[8 + n_header :]
    about = fields.get("__metadata__", {})
    if "layers" in about and rng.random() < 0.5:
        about["layers"] = dumps(mutate_json(json.loads(about["layers"]), rng))
    else:
        fields = mutate_json(fields, rng)
    if rng.random() < 0.1:
        rest = mutate_bytes(rest, rng)
    if seal is not None and rng.random() < 0.7:
        seal(fields, rest)
    header = dumps(fields).encode("utf-8", "surrogatepass")
    n_bytes = len(header) if rng.random() < 0.95 else rng.choice((0, 1, 2**40, 2**63))
    return struct.pack("<Q", n_bytes) + header + rest


def mutate_npz(data: bytes, rng: random.Random) -> bytes:
    """Change a zip file of arrays: the archive, its directory, a member or JSON."""
    how = rng.random()
    if how < 0.25:
        return mutate_bytes(data, rng)
    if how < 0.4:
        return _mutate_directory(data, rng)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(list(members))
    if how < 0.7 and "header.npy" in members:
        text = members["header.npy"][128:].decode("utf-32-le")
        text = dumps(mutate_json(json.loads(text), rng))
        raw = text.encode("utf-32-le", "surrogatepass")
        members["header.npy"] = _npy(f"<U{len(raw) // 4}", "()") + raw
    elif how < 0.9:
        dtype = rng.choice(("|u1", "<u2", "<u4", "<U9", "|O", "<f4", "|V9", ">u2", "x"))
        shape = f"({rng.choice((0, 1, -1, 19, 2**40, BIG))}, {rng.choice((1, 4))}, 2)"
        members[name] = _npy(dtype, shape) + members[name][128:]
    else:
        members[name] = mutate_bytes(members[name], rng)
    out = io.BytesIO()
    methods = (zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)
    how_packed = rng.choice(methods)
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w") as archive:
        warnings.filterwarnings("ignore", "Duplicate name")
        for name, raw in members.items():
            if rng.random() < 0.98:
                archive.writestr(zipfile.ZipInfo(name), raw, how_packed)
            if rng.random() < 0.02:
                more = rng.choice(("../x.npy", "more.npy", "x" * 900))
                archive.writestr(zipfile.ZipInfo(more), raw, how_packed)
    return out.getvalue()


def _npy(dtype: str, shape: str) -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
    return b"\x93NUMPY\x01\x00v\x00" + text.encode().ljust(117) + b"\n"


def _mutate_directory(data: bytes, rng: random.Random) -> bytes:
    """Change a number of the directory at the end, which states sizes."""
    raw = bytearray(data)
    first = raw.find(b"PK\1\2")
    at = rng.randrange(first, len(raw) - 4)
    struct.pack_into("<I", raw, at, rng.choice((0, 1, 2**31, 2**32 - 1, 2**16, 100)))
    return bytes(raw)
