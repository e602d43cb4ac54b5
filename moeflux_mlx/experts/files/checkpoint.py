"""A plain mlx-lm checkpoint directory: its configuration and tensors by position."""

from __future__ import annotations

import contextlib
import json
import os
import re
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from ...errors import ModelError
from ...system.files import CONFIG_BYTES, INDEX_BYTES, open_file, read_json, short
from .safetensors import TensorEntry, fingerprint, read_header
from .spans import close_files, read_fully

N_EXPERTS_KEYS = ("num_experts", "n_routed_experts", "num_local_experts")
TOP_K_KEYS = ("num_experts_per_tok", "moe_top_k", "moe_topk", "moe_k", "top_k")
# Without "top_k": with many models that is how tokens are drawn.
EVERY_TOP_K_KEY = (*TOP_K_KEYS[:-1], "num_experts_per_token", "top_k_experts")

INDEX_NAME = "model.safetensors.index.json"
NUMBERED = re.compile(
    r"(?P<stem>model.*)-(?P<number>\d+)-of-(?P<all>\d+)\.safetensors", re.ASCII
)
LAYER = re.compile(r"(?:.*\.)?layers\.(?P<layer>\d{1,9})\.", re.ASCII)
# More files than any model has: numbers in names are not to be trusted.
MOST_SHARDS = 1000
LFS_POINTER = b"version https://git-lfs"
# Beginnings, or parts, of names that the text model does not use.
UNUSED_STARTS = ("vision_tower", "model.visual")
# As mlx-lm names layers that predict several tokens, and leaves them out.
UNUSED_PART = "mtp."


def is_used(name: str) -> bool:
    """Tell whether a text model has a place for a tensor of this name."""
    return not name.startswith(UNUSED_STARTS) and UNUSED_PART not in name


@dataclass(frozen=True)
class ModelFacts:
    """A configuration's numbers of the model's shape."""

    model_type: str
    n_layers: int
    n_experts: int
    top_k: int


def read_config(directory: Path) -> dict:
    """Return ``config.json`` of a model directory.

    Raises:
        ModelError: no such directory, no such file, or not a JSON object.
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
        raise ModelError(f"[model] expected a JSON object in {path}")
    return config


def model_facts(config: dict) -> ModelFacts:
    """Read layers, experts and experts per token from a model's configuration.

    Raises:
        ModelError: the configuration is not that of a Mixture-of-Experts model.
    """
    text = text_config(config)
    return ModelFacts(
        str(config.get("model_type")),
        _count(text, ("num_hidden_layers", "num_layers", "n_layers")),
        _count(text, N_EXPERTS_KEYS),
        _count(text, TOP_K_KEYS),
    )


def experts_per_token(config: dict, n_experts: int) -> int | None:
    """Return how many experts a token takes in a block, if a configuration says so."""
    text = text_config(config)
    found = (text.get(key) for key in EVERY_TOP_K_KEY)
    usable = (k for k in found if type(k) is int and 1 <= k <= n_experts)
    return next(usable, None)


def text_config(config: dict) -> dict:
    """Return the configuration of the language model, with its surroundings."""
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

    ``index`` says which file holds a tensor: it decides where several do, as they do
    those in ``twice``.
    """

    def __init__(self, directory: Path, config: dict, shards: list[Path]):
        self.directory, self.config, self.shards = directory, config, shards
        self.tensors: dict[str, TensorEntry] = {}
        self.index = read_index(directory)
        self.twice: dict[str, list[TensorEntry]] = {}
        self._fds: dict[Path, int] = {}
        # For who never closes: models are dropped, not closed.
        weakref.finalize(self, close_files, self._fds)
        for shard in shards:
            _refuse_pointer(shard)
            for name, entry in read_header(shard).items():
                first = self.tensors.setdefault(name, entry)
                if first is not entry:
                    self.twice.setdefault(name, [first]).append(entry)
        for name, entries in self.twice.items():
            self.tensors[name] = self._chosen(name, entries)

    def _chosen(self, name: str, entries: list[TensorEntry]) -> TensorEntry:
        """Return the tensor that the index means; refuse to guess without it."""
        for entry in entries:
            if entry.file.name == self.index.get(name) or not is_used(name):
                return entry
        files = " and in ".join(str(entry.file) for entry in entries)
        raise ModelError(
            f"[checkpoint] {name!r} is in {files}, and {INDEX_NAME} names neither: "
            "remove the file that is not of this model"
        )

    @classmethod
    def open(cls, directory: str | os.PathLike) -> Checkpoint:
        """Open every ``model*.safetensors`` of a directory and check their headers.

        These are the files that mlx-lm reads. Whether all that a model needs is in them
        is for ``missing`` to tell.

        Raises:
            ModelError: not a model directory, or a file is malformed or cut.
        """
        directory = Path(directory)
        config = read_config(directory)
        shards = sorted(directory.glob("model*.safetensors"))
        if not shards:
            raise ModelError(
                f"[checkpoint] no model*.safetensors in {directory}: download the "
                "weights too"
            )
        checkpoint = cls(directory, config, shards)
        try:
            for shard in shards:
                checkpoint._fds[shard] = os.open(shard, os.O_RDONLY)
        except OSError as error:
            checkpoint.close()
            raise ModelError(f"[checkpoint] cannot read {shard}: {error}") from error
        return checkpoint

    @classmethod
    @contextlib.contextmanager
    def kept(cls, directory: str | os.PathLike) -> Iterator[Checkpoint]:
        """Open as ``open`` for who goes on with it; an error in here closes it.

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
        """Numbers of the layers that tensors of the text model name."""
        matches = (LAYER.match(name) for name in self.tensors if is_used(name))
        return {int(match["layer"]) for match in matches if match}

    @property
    def absent(self) -> list[Path]:
        """Files that the index or the numbers of others name, and that are not there.

        That matters only where a tensor is missing too.
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
        # An index may say anything.
        plain = {n for n in names - there if n == os.path.basename(n)}
        return [
            self.directory / name
            for name in sorted(plain)
            if not (self.directory / name).exists()
        ]

    def missing(self, what: str) -> ModelError:
        """Return the error that something is in none of the files; says which lack."""
        absent = self.absent
        if not absent:
            return ModelError(f"[checkpoint] {self.directory}: {what}")
        more = f" and {len(absent) - 1} other files" if len(absent) > 1 else ""
        return ModelError(
            f"[checkpoint] {absent[0]}{more} missing: {what}; download the model again"
        )

    @property
    def identity(self) -> str:
        """A hash that tells this checkpoint from any other; reads a few blocks."""
        digest = xxhash.xxh3_64(json.dumps(self.config, sort_keys=True).encode())
        for shard in self.shards:
            digest.update(f"{shard.name} {fingerprint(shard)}\n".encode())
        return digest.hexdigest()

    def fd(self, shard: Path) -> int:
        """Return the open file descriptor of one of the files."""
        return self._fds[shard]

    def read_into(self, entry: TensorEntry, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes of a tensor from ``start`` on.

        Raises:
            ModelError: the file cannot be read or ends early.
        """
        n_bytes = len(buffer)
        if start + n_bytes > entry.n_bytes:
            raise ModelError(
                f"[checkpoint] {entry.name!r} has {entry.n_bytes} bytes but "
                f"{start + n_bytes} were asked for"
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


def _refuse_pointer(shard: Path) -> None:
    try:
        with open_file(shard) as file:
            is_pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError as error:
        raise ModelError(f"[checkpoint] cannot read {shard}: {error}") from error
    if is_pointer:
        raise ModelError(
            f"[checkpoint] {shard}: expected weights but got a Git LFS pointer to "
            "them: run 'git lfs pull' there, or download the model with hf"
        )


def read_index(directory: Path) -> dict[str, str]:
    """Return the file of each tensor as the index says; empty without a usable one.

    No model needs an index, so a broken one is none.
    """
    try:
        weight_map = read_json(directory / INDEX_NAME, INDEX_BYTES)["weight_map"]
        return {str(name): str(shard) for name, shard in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
