"""Rewrite a checkpoint with its experts in another form, byte by byte."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from moeflux_mlx.experts.files.safetensors import TensorEntry, header_bytes, read_header

STACKED = re.compile(r"(.*)\.switch_mlp\.(\w+)\.(\w+)")
# Stacked tensors [E, ...]; a tensor per expert; gate and up fused; both.
FORMS = ("stacked", "each", "fused", "each-fused")


class Raw(NamedTuple):
    """A tensor as it is stored in a file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def experts(self) -> list[Raw]:
        """Split the tensor along its first axis."""
        n, *shape = self.shape
        size = len(self.data) // n
        parts = [self.data[e * size : (e + 1) * size] for e in range(n)]
        return [Raw(self.dtype, tuple(shape), part) for part in parts]


def concatenated(a: Raw, b: Raw) -> Raw:
    return Raw(a.dtype, (a.shape[0] + b.shape[0], *a.shape[1:]), a.data + b.data)


def stacked(parts: list[Raw]) -> Raw:
    shape = (len(parts), *parts[0].shape)
    return Raw(parts[0].dtype, shape, b"".join(part.data for part in parts))


def read_raw(directory: Path) -> dict[str, Raw]:
    found = {}
    for path in directory.glob("model*.safetensors"):
        data = path.read_bytes()
        for name, entry in read_header(path).items():
            part = data[entry.offset : entry.offset + entry.n_bytes]
            found[name] = Raw(entry.dtype, entry.shape, part)
    return found


def write_raw(directory: Path, tensors: dict[str, Raw], n_shards: int = 1) -> None:
    """Write tensors in order, end to end, with a run of them in each shard."""
    for old in directory.glob("model*"):
        old.unlink()
    names, weight_map = list(tensors), {}
    for shard in range(n_shards):
        part = names[
            shard * len(names) // n_shards : (shard + 1) * len(names) // n_shards
        ]
        file = f"model-{shard + 1:05d}-of-{n_shards:05d}.safetensors"
        file = "model.safetensors" if n_shards == 1 else file
        raws = [tensors[name] for name in part]
        entries = [
            TensorEntry(directory / file, name, raw.dtype, raw.shape, 0, len(raw.data))
            for name, raw in zip(part, raws, strict=True)
        ]
        data = b"".join(raw.data for raw in raws)
        (directory / file).write_bytes(header_bytes(entries) + data)
        weight_map.update(dict.fromkeys(part, file))
    if n_shards > 1:
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (directory / "model.safetensors.index.json").write_text(index)


def in_form(tensors: dict[str, Raw], form: str) -> dict[str, Raw]:
    """Rename and split stacked experts; the tensors are sorted by name."""
    found = {n: raw for n, raw in tensors.items() if not STACKED.fullmatch(n)}
    for name, raw in tensors.items():
        if (match := STACKED.fullmatch(name)) is None:
            continue
        stem, projection, part = match.groups()
        if form == "stacked":
            found[name] = raw
            continue
        if form.endswith("fused"):
            if projection == "up_proj":
                continue
            if projection == "gate_proj":
                up = tensors[f"{stem}.switch_mlp.up_proj.{part}"]
                pairs = zip(raw.experts(), up.experts(), strict=True)
                raw = stacked([concatenated(*pair) for pair in pairs])
                projection = "gate_up_proj"
        if form == "fused":
            suffix = "" if part == "weight" else f".{part}"
            found[f"{stem}.experts.{projection}{suffix}"] = raw
        else:
            for e, own in enumerate(raw.experts()):
                found[f"{stem}.experts.{e}.{projection}.{part}"] = own
    return dict(sorted(found.items()))


def reform(plain: Path, target: Path, form: str, n_shards: int = 1) -> Path:
    """Copy a checkpoint with its experts in another form."""
    shutil.copytree(plain, target)
    write_raw(target, in_form(read_raw(plain), form), n_shards)
    return target
