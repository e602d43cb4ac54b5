"""A plain mlx-lm checkpoint directory: its configuration and tensors by position."""

from __future__ import annotations

import json
import os
import weakref
from dataclasses import dataclass
from pathlib import Path

import xxhash

from ..errors import ModelError
from ..files import CONFIG_BYTES, INDEX_BYTES, read_json, short
from .safetensors import TensorEntry, fingerprint, read_header
from .spans import close_files, read_fully

N_EXPERTS_KEYS = ("num_experts", "n_routed_experts", "num_local_experts")
TOP_K_KEYS = ("num_experts_per_tok", "moe_top_k", "moe_topk", "moe_k", "top_k")


@dataclass(frozen=True)
class ModelFacts:
    """What a configuration says about the model's shape."""

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


def text_config(config: dict) -> dict:
    """Return the configuration of the language model, what is around it included."""
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
    """The open safetensors files of a model directory; a context manager."""

    def __init__(self, directory: Path, config: dict, shards: list[Path]):
        self.directory, self.config, self.shards = directory, config, shards
        self.tensors: dict[str, TensorEntry] = {}
        self._fds: dict[Path, int] = {}
        # For who never closes: models are dropped, not closed.
        weakref.finalize(self, close_files, self._fds)
        for shard in shards:
            for name, entry in read_header(shard).items():
                if name in self.tensors:
                    raise ModelError(
                        f"[checkpoint] {name!r} is both in {shard} and in "
                        f"{self.tensors[name].file}"
                    )
                self.tensors[name] = entry

    @classmethod
    def open(cls, directory: str | os.PathLike) -> Checkpoint:
        """Open every ``model*.safetensors`` of a directory and check their headers.

        Raises:
            ModelError: not a model directory, or a shard is missing or malformed.
        """
        directory = Path(directory)
        config = read_config(directory)
        shards = sorted(directory.glob("model*.safetensors"))
        weight_map = _weight_map(directory)
        missing = set(weight_map.values()) - {shard.name for shard in shards}
        if missing:
            path = short(str(directory / min(missing)))[1:-1]
            raise ModelError(
                f"[checkpoint] {path} is named by "
                "model.safetensors.index.json but missing"
            )
        if not shards:
            raise ModelError(f"[checkpoint] no model*.safetensors in {directory}")
        checkpoint = cls(directory, config, shards)
        for name, shard_name in weight_map.items():
            if name not in checkpoint.tensors:
                raise ModelError(
                    f"[checkpoint] {short(name)} is named by "
                    "model.safetensors.index.json "
                    f"but missing from {directory / shard_name}"
                )
        try:
            for shard in shards:
                checkpoint._fds[shard] = os.open(shard, os.O_RDONLY)
        except OSError as error:
            checkpoint.close()
            raise ModelError(f"[checkpoint] cannot read {shard}: {error}") from error
        return checkpoint

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


def _weight_map(directory: Path) -> dict[str, str]:
    """Return the file of each tensor as the index says, empty without an index."""
    path = directory / "model.safetensors.index.json"
    if not path.is_file():
        return {}
    try:
        weight_map = read_json(path, INDEX_BYTES)["weight_map"]
        return {str(name): str(shard) for name, shard in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"[checkpoint] cannot read {path}: {error!r}") from error
