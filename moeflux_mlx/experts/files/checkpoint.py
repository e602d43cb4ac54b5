"""A plain mlx-lm checkpoint: its configuration, and where its tensors are."""

from __future__ import annotations

import contextlib
import json
import os
import re
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import xxhash

from ...errors import ModelError
from ...system.files import CONFIG_BYTES, INDEX_BYTES, open_file, read_json, short
from .safetensors import TensorEntry, fingerprint, parse_header
from .spans import close_files, read_fully

N_EXPERTS_KEYS = ("num_experts", "n_routed_experts", "num_local_experts")
TOP_K_KEYS = ("num_experts_per_tok", "moe_top_k", "moe_topk", "moe_k", "top_k")
# "top_k" is left out, because for many models it is a sampling parameter.
EVERY_TOP_K_KEY = (*TOP_K_KEYS[:-1], "num_experts_per_token", "top_k_experts")

INDEX_NAME = "model.safetensors.index.json"
NUMBERED = re.compile(
    r"(?P<stem>model.*)-(?P<number>\d+)-of-(?P<all>\d+)\.safetensors", re.ASCII
)
LAYER = re.compile(r"(?:.*\.)?layers\.(?P<layer>\d{1,9})\.", re.ASCII)
# More files than any model has; a limit, because a file's name may claim any number.
MOST_SHARDS = 1000
LFS_POINTER = b"version https://git-lfs"
# Prefixes of tensor names that the text model does not use.
UNUSED_STARTS = ("vision_tower", "model.visual")
# mlx-lm ignores multi-token prediction layers, whose names contain this.
UNUSED_PART = "mtp."


def is_used(name: str) -> bool:
    """Return whether a text model uses a tensor of this name."""
    return not name.startswith(UNUSED_STARTS) and UNUSED_PART not in name


@dataclass(frozen=True)
class ModelFacts:
    """The numbers that a configuration gives for a model's shape."""

    model_type: str
    n_layers: int
    n_experts: int
    top_k: int


def read_config(directory: Path) -> dict:
    """Return ``config.json`` of a model directory.

    Raises:
        ModelError: the directory or the file is missing, or it is not a JSON object.
    """
    path = Path(directory) / "config.json"
    if not Path(directory).is_dir():
        raise ModelError(f"[model] expected a directory but got {directory}")
    try:
        config = read_json(path, CONFIG_BYTES, exact=False)
    except FileNotFoundError as error:
        raise ModelError(
            f"[model] expected a model directory but {directory} has no config.json"
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(f"[model] cannot read {path}: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(
            f"[model] {path}: expected a JSON object but got {type(config).__name__}"
        )
    return config


def model_facts(config: dict) -> ModelFacts:
    """Read layers, experts and experts per token from a model's configuration.

    Raises:
        ModelError: the model is not a Mixture-of-Experts model.
    """
    text = text_config(config)
    return ModelFacts(
        str(config.get("model_type")),
        _count(text, ("num_hidden_layers", "num_layers", "n_layers")),
        _count(text, N_EXPERTS_KEYS),
        _count(text, TOP_K_KEYS),
    )


def experts_per_token(config: dict, n_experts: int) -> int | None:
    """Return the experts per token of a block, or None if a configuration has none."""
    text = text_config(config)
    found = (text.get(key) for key in EVERY_TOP_K_KEY)
    usable = (k for k in found if type(k) is int and 1 <= k <= n_experts)
    return next(usable, None)


def text_config(config: dict) -> dict:
    """Return the configuration with the keys of ``text_config`` merged in."""
    nested = config.get("text_config")
    return {**config, **(nested if isinstance(nested, dict) else {})}


def _count(config: dict, keys: tuple[str, ...]) -> int:
    value = next((config[k] for k in keys if config.get(k) is not None), None)
    if type(value) is not int or value < 1:
        raise ModelError(
            f"[config.json] expected a positive {' or '.join(keys)} but got "
            f"{short(value)}: not a Mixture-of-Experts model that can be streamed"
        )
    return value


class Checkpoint:
    """The open safetensors files of a model directory; a context manager.

    ``twice`` has the tensors that are in several files; ``index`` decides between them.
    """

    def __init__(self, directory: Path, config: dict, shards: list[Path]):
        """Open the files; after an error all are closed.

        Raises:
            ModelError: see ``open``.
        """
        self.directory, self.config, self.shards = directory, config, shards
        self.tensors: dict[str, TensorEntry] = {}
        self.index = read_index(directory)
        self.twice: dict[str, list[TensorEntry]] = {}
        self._fds: dict[Path, int] = {}
        # Models are usually dropped without a call of ``close``.
        weakref.finalize(self, close_files, self._fds)
        try:
            for shard in shards:
                self._open(shard)
            for name, entries in self.twice.items():
                self.tensors[name] = self._chosen(name, entries)
        except BaseException:
            self.close()
            raise

    def _open(self, shard: Path) -> None:
        """Open a file once, because another program may replace it at any time."""
        try:
            with open_file(shard) as file:
                self._fds[shard] = os.dup(file.fileno())
                _refuse_pointer(shard, file)
                entries, _ = parse_header(shard, file)
        except OSError as error:
            raise ModelError(f"[checkpoint] cannot read {shard}: {error}") from error
        for name, entry in entries.items():
            first = self.tensors.setdefault(name, entry)
            if first is not entry:
                self.twice.setdefault(name, [first]).append(entry)

    def _chosen(self, name: str, entries: list[TensorEntry]) -> TensorEntry:
        """Return the tensor that the index names; raise if it names none."""
        for entry in entries:
            if entry.file.name == self.index.get(name) or not is_used(name):
                return entry
        files = " and in ".join(str(entry.file) for entry in entries)
        raise ModelError(
            f"[checkpoint] {name!r} is in {files}, and {INDEX_NAME} names neither: "
            "remove the file that does not belong to this model"
        )

    @classmethod
    def open(cls, directory: str | os.PathLike) -> Checkpoint:
        """Open every ``model*.safetensors`` of a directory and check their headers.

        mlx-lm reads the same files. This does not check that they are complete.

        Raises:
            ModelError: not a model directory, or a file is malformed or truncated.
        """
        directory = Path(directory)
        config = read_config(directory)
        shards = sorted(directory.glob("model*.safetensors"))
        if not shards:
            raise ModelError(
                f"[checkpoint] no model*.safetensors in {directory}: download the "
                "weights too"
            )
        return cls(directory, config, shards)

    @classmethod
    @contextlib.contextmanager
    def kept(cls, directory: str | os.PathLike) -> Iterator[Checkpoint]:
        """Open as ``open``; close the checkpoint only if an error leaves the block.

        Raises:
            ModelError: as ``open``.
        """
        checkpoint = cls.open(directory)
        try:
            yield checkpoint
        except BaseException:
            checkpoint.close()
            raise

    @property
    def layers(self) -> set[int]:
        """The layer numbers in the names of the text model's tensors."""
        matches = (LAYER.match(name) for name in self.tensors if is_used(name))
        return {int(match["layer"]) for match in matches if match}

    @property
    def absent(self) -> list[Path]:
        """Missing files that the index, or the numbering of the others, calls for.

        A missing file is an error only if a tensor is missing too.
        """
        names = set(self.index.values())
        for shard in self.shards:
            if match := NUMBERED.fullmatch(shard.name):
                numbers = range(1, 1 + min(int(match["all"]), MOST_SHARDS))
                width = len(match["number"])
                names |= {
                    f"{match['stem']}-{i:0{width}d}-of-{match['all']}.safetensors"
                    for i in numbers
                }
        there = {shard.name for shard in self.shards}
        # An index is untrusted: ignore names that lead out of the directory.
        plain = {n for n in names - there if n == os.path.basename(n)}
        return [
            self.directory / name
            for name in sorted(plain)
            if not (self.directory / name).exists()
        ]

    def missing(self, problem: str) -> ModelError:
        """Return the error for tensors in none of the files; name missing files."""
        absent = self.absent
        if not absent:
            return ModelError(f"[checkpoint] {self.directory}: {problem}")
        more = f" and {len(absent) - 1} other files" if len(absent) > 1 else ""
        return ModelError(
            f"[checkpoint] {absent[0]}{more} missing: {problem}; download the model "
            "again"
        )

    @property
    def identity(self) -> str:
        """A hash that identifies this checkpoint; reads a few blocks of each file."""
        digest = xxhash.xxh3_64(json.dumps(self.config, sort_keys=True).encode())
        for shard in self.shards:
            digest.update(f"{shard.name} {fingerprint(shard)}\n".encode())
        return digest.hexdigest()

    def fd(self, shard: Path) -> int:
        """Return a file's open descriptor."""
        return self._fds[shard]

    def read_into(self, entry: TensorEntry, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes of a tensor from ``start`` on.

        Raises:
            ModelError: the file cannot be read or ends early.
        """
        n_bytes = len(buffer)
        if start + n_bytes > entry.n_bytes:
            raise ModelError(
                f"[checkpoint] {entry.name!r} of {entry.file}: expected at least "
                f"{start + n_bytes} bytes but got {entry.n_bytes}"
            )
        try:
            read_fully(self._fds[entry.file], entry.offset + start, buffer)
        except (OSError, EOFError) as error:
            raise ModelError(
                f"[checkpoint] cannot read {entry.name!r} of {entry.file}: {error}"
            ) from error

    def close(self) -> None:
        """Close the files."""
        close_files(self._fds)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _refuse_pointer(shard: Path, file: BinaryIO) -> None:
    is_pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    file.seek(0)
    if is_pointer:
        raise ModelError(
            f"[checkpoint] {shard}: expected weights but got a Git LFS pointer to "
            "them: run 'git lfs pull' there, or download the model with hf"
        )


def read_index(directory: Path) -> dict[str, str]:
    """Return each tensor's file by the index, or an empty dict without a usable one.

    No model needs an index, so a damaged one is ignored.
    """
    try:
        weight_map = read_json(directory / INDEX_NAME, INDEX_BYTES)["weight_map"]
        return {str(name): str(shard) for name, shard in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
