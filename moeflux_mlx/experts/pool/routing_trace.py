"""Routing traces: which experts each router chose, token by token, in a file.

The file is a compressed NumPy archive (``.npz``) of these arrays:

========== =========================================================================
``header`` JSON: ``format`` and ``version``; ``model_type``; ``layers``, the numbers of
           the L layers with routed experts; ``n_experts`` of each; ``record_bytes``,
           the bytes of one expert in each layer; ``n_prompt_tokens``
``passes`` ``[S]`` uint32: the number of tokens in each pass through the model, in
           order; a prompt passes in chunks, generated tokens pass one by one
``chosen`` ``[N, L, K]`` uint8 (uint16 from 257 experts on): the experts of each token
           in each layer, by descending weight
``likely`` ``[S1, L - 1, K]`` for the S1 passes of one token: the experts predicted for
           each layer but the first, one layer earlier; optional
========== =========================================================================
"""

from __future__ import annotations

import json
import math
import os
import struct
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from ...errors import TraceError
from ...system.files import brief, open_file, parse_json, replacing, short

FORMAT, VERSION = "moeflux routing trace", 1
MEMBERS = ("header", "passes", "chosen", "likely")
# Unpacked size of 500,000 tokens of a large model. A limit is needed because a small
# zip file may claim to unpack to any size.
MOST_BYTES = 256 << 20
# More than any model has.
MOST_LAYERS, MOST_EXPERTS, MOST_RECORD_BYTES = 4096, 1 << 16, 1 << 40
# The end of a zip file without a comment: magic, number of members, directory bytes.
ZIP_END = struct.Struct("<4s6xHI6x")
DIRECTORY_BYTES, HEADER_BYTES = 4096, 1 << 20


@dataclass(frozen=True)
class RoutingTrace:
    """The routing of one run: all its tokens, in all layers with routed experts.

    ``passes``, ``chosen`` and ``likely`` are the file's arrays. ``record_bytes`` has
    one number for each of ``layers``.
    """

    model_type: str
    layers: tuple[int, ...]
    n_experts: int
    record_bytes: tuple[int, ...]
    n_prompt_tokens: int
    passes: np.ndarray
    chosen: np.ndarray
    likely: np.ndarray | None = None

    @property
    def n_tokens(self) -> int:
        """Number of recorded tokens, with those of the prompt."""
        return len(self.chosen)

    @property
    def top_k(self) -> int:
        """Number of experts that one token uses in one layer."""
        return self.chosen.shape[2]

    def needed(self) -> Iterator[tuple[int, list[list[int]]]]:
        """Yield each pass: its number of tokens and each layer's distinct experts."""
        first = 0
        for n_tokens in self.passes.tolist():
            chosen = self.chosen[first : first + n_tokens]
            layers = range(len(self.layers))
            yield n_tokens, [sorted({*chosen[:, r].ravel().tolist()}) for r in layers]
            first += n_tokens

    def predicted(self) -> Iterator[list[list[int]] | None]:
        """Yield each layer's predicted experts for each pass of one token, else None.

        The experts are distinct and ascending; the first layer has none.
        """
        left = iter(() if self.likely is None else self.likely)
        for n_tokens in self.passes.tolist():
            rows = next(left, None) if n_tokens == 1 else None
            yield None if rows is None else [[], *(sorted({*r}) for r in rows.tolist())]

    def counts(self) -> np.ndarray:
        """Return the number of tokens that chose each expert: ``[L, E]``."""
        counts = [
            np.bincount(self.chosen[:, layer].ravel(), minlength=self.n_experts)
            for layer in range(len(self.layers))
        ]
        return np.stack(counts)

    def save(self, path: str | os.PathLike) -> None:
        """Write the file, replacing an existing one.

        Raises:
            TraceError: the file would be too large for ``load``, or cannot be written.
        """
        header = {
            "format": FORMAT,
            "version": VERSION,
            "model_type": self.model_type,
            "layers": self.layers,
            "n_experts": self.n_experts,
            "record_bytes": self.record_bytes,
            "n_prompt_tokens": self.n_prompt_tokens,
        }
        dtype = np.dtype(np.uint8 if self.n_experts <= 256 else np.uint16)
        ids = [self.chosen] if self.likely is None else [self.chosen, self.likely]
        n_bytes = sum(array.size for array in ids) * dtype.itemsize
        n_bytes += 4 * self.passes.size + HEADER_BYTES
        if n_bytes > MOST_BYTES:
            raise TraceError(
                f"[trace] {path}: expected at most {MOST_BYTES} bytes but got "
                f"{n_bytes}: record fewer tokens"
            )
        arrays: dict[str, Any] = {
            "header": np.array(json.dumps(header)),
            "passes": self.passes.astype(np.uint32),
            "chosen": self.chosen.astype(dtype),
        }
        if self.likely is not None:
            arrays["likely"] = self.likely.astype(dtype)
        try:
            with replacing(Path(path), 0o666) as file:
                np.savez_compressed(file, allow_pickle=False, **arrays)
        except OSError as error:
            raise TraceError(f"[trace] cannot write {path}: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike) -> RoutingTrace:
        """Read a file that ``save`` wrote.

        Raises:
            TraceError: the file is not a trace, has another version, or is damaged.
        """
        header, arrays = _read(Path(path))
        try:
            found = cls(
                model_type=str(header["model_type"]),
                layers=tuple(map(_count, header["layers"])),
                n_experts=_count(header["n_experts"]),
                record_bytes=tuple(map(_count, header["record_bytes"])),
                n_prompt_tokens=_count(header["n_prompt_tokens"]),
                **arrays,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise TraceError(
                f"[trace] {path}: expected a complete header but got {short(header)}"
            ) from error
        found._check(Path(path))
        return found

    def _check(self, path: Path) -> None:
        """Raise TraceError unless the header and the arrays are consistent."""
        conditions = {
            "layers, each once": 0 < len(self.layers) == len(self.record_bytes)
            and len({*self.layers}) == len(self.layers)
            and max(self.layers) < MOST_LAYERS,
            f"up to {MOST_EXPERTS} experts": 0 < self.n_experts <= MOST_EXPERTS,
            "bytes of every record": all(
                0 < n < MOST_RECORD_BYTES for n in self.record_bytes
            ),
            "experts as [N, L, K] integers": self.chosen.ndim == 3
            and self.chosen.dtype in (np.uint8, np.uint16)
            and self.chosen.shape[1] == len(self.layers)
            and self.chosen.size > 0
            and self.chosen.shape[2] <= self.n_experts,
            "expert ids below n_experts": self.chosen.max(initial=0) < self.n_experts,
            "passes that add up to all tokens": self.passes.ndim == 1
            and self.passes.dtype == np.uint32
            and self.passes.min(initial=1) > 0
            and int(self.passes.sum()) == len(self.chosen),
            "likely experts as [S1, L - 1, K] of these": self._is_likely_valid(),
            "a prompt within the tokens": 0 <= self.n_prompt_tokens <= len(self.chosen),
        }
        for expected, holds in conditions.items():
            if not holds:
                raise TraceError(
                    f"[trace] {path}: expected {expected} but got {len(self.layers)} "
                    f"layers, {self.n_experts} experts, passes {self.passes.dtype} "
                    f"{self.passes.shape}, "
                    f"chosen {self.chosen.dtype} {self.chosen.shape}"
                )

    def _is_likely_valid(self) -> bool:
        if self.likely is None:
            return True
        n_single, n_layers = int((self.passes == 1).sum()), len(self.layers)
        return (
            self.likely.shape == (n_single, n_layers - 1, *self.chosen.shape[2:])
            and self.likely.dtype == self.chosen.dtype
            and self.likely.max(initial=0) < self.n_experts
        )


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{short(value)} is not a count")
    return value


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    try:
        with open_file(path) as file, zipfile.ZipFile(_plain(file)) as archive:
            arrays = _arrays(archive)
        header = parse_json(str(arrays.pop("header")[()]))
    except TraceError as error:
        raise TraceError(f"[trace] {path}: {error}") from error
    # zipfile and NumPy raise nearly any exception for damaged bytes.
    except Exception as error:
        raise TraceError(
            f"[trace] {path}: expected a file of moeflux trace: {brief(error)}"
        ) from error
    named = header if isinstance(header, dict) else {}
    if named.get("format") != FORMAT or named.get("version") != VERSION:
        raise TraceError(
            f"[trace] {path}: expected {FORMAT!r} version {VERSION} but got "
            f"{short(named.get('format'))} version {short(named.get('version'))}"
        )
    return named, arrays


def _plain(file: BinaryIO) -> BinaryIO:
    """Return the file if it ends like a zip file of at most a trace's members."""
    file.seek(max(0, os.fstat(file.fileno()).st_size - ZIP_END.size))
    end = file.read(ZIP_END.size)
    if len(end) < ZIP_END.size or not end.startswith(b"PK\5\6"):
        raise ValueError("it does not end as a zip file")
    _, n_members, directory_bytes = ZIP_END.unpack(end)
    if n_members > len(MEMBERS) or directory_bytes > DIRECTORY_BYTES:
        raise TraceError(f"expected at most {len(MEMBERS)} members but got {n_members}")
    return file


def _arrays(archive: zipfile.ZipFile) -> dict[str, np.ndarray]:
    """Read the members of a trace; check their sizes before allocating memory."""
    found: dict[str, np.ndarray] = {}
    members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    unknown = members.keys() - MEMBERS
    if unknown or len(members) < len(archive.infolist()):
        raise TraceError(f"expected {MEMBERS}, each once, but got {short(unknown)}")
    n_bytes = sum(info.file_size for info in members.values())
    if n_bytes > MOST_BYTES or members["header"].file_size > HEADER_BYTES:
        raise TraceError(
            f"expected at most {MOST_BYTES} bytes, {HEADER_BYTES} of them the "
            f"header's, but got {n_bytes}"
        )
    for name, info in members.items():
        # Other compression methods may unpack more bytes than requested.
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise TraceError(f"expected {name} deflated")
        with archive.open(info) as member:
            found[name] = _array(member, info.file_size, name)
    return found


def _array(member: IO[bytes], n_bytes: int, name: str) -> np.ndarray:
    """Read an array in NumPy's format; its size must match the member's."""
    version = np.lib.format.read_magic(member)
    if version != (1, 0):
        raise ValueError(f"an array of version {version}")
    with warnings.catch_warnings():
        # NumPy parses the header as Python, and a warning about a damaged one would
        # look for a source file.
        warnings.simplefilter("ignore")
        shape, by_column, dtype = np.lib.format.read_array_header_1_0(member)
    n_values, left = math.prod(shape), n_bytes - member.tell()
    # Accept strings and unsigned ints only: an object array would be unpickled.
    kind = "U" if name == "header" else "u"
    if by_column or dtype.kind != kind or n_values * dtype.itemsize != left:
        raise ValueError(f"an array of {dtype} {short(shape)} in {left} bytes")
    data = member.read()
    if len(data) != left:
        raise ValueError(f"expected {left} bytes of an array but got {len(data)}")
    return np.frombuffer(data, dtype, n_values).reshape(shape)
