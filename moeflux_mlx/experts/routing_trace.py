"""Which experts every layer's router chose, token by token: a recording in a file.

The file is a compressed NumPy archive (``.npz``) of these arrays:

========== =========================================================================
``header`` JSON: ``format`` and ``version``; ``model_type``; ``layers``, the numbers of
           the L layers with routed experts; ``n_experts`` of each; ``record_bytes``,
           what one expert of each layer takes; ``n_prompt_tokens``
``passes`` ``[S]`` uint32: tokens of each pass through the model, in order; a prompt
           goes through in chunks, what is generated token by token
``chosen`` ``[N, L, K]`` uint8 (uint16 from 257 experts on): the experts of each token
           in each layer, by falling weight
``likely`` ``[S1, L - 1, K]``, of the S1 passes of one token: what each layer but the
           first was expected to choose one layer before; may be missing
========== =========================================================================
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import TraceError

FORMAT, VERSION = "moeflux routing trace", 1


@dataclass(frozen=True)
class RoutingTrace:
    """The routing of one run: prompt and generated tokens, all routed layers.

    ``passes``, ``chosen`` and ``likely`` are as in the file; ``record_bytes`` has one
    number for each of ``layers``.
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
        """Tokens recorded, those of the prompt included."""
        return len(self.chosen)

    @property
    def top_k(self) -> int:
        """Experts that one token uses in one layer."""
        return self.chosen.shape[2]

    def needed(self) -> Iterator[tuple[int, list[list[int]]]]:
        """Yield each pass: its tokens and, by layer, its distinct experts, rising."""
        first = 0
        for n_tokens in self.passes.tolist():
            chosen = self.chosen[first : first + n_tokens]
            layers = range(len(self.layers))
            yield n_tokens, [sorted({*chosen[:, r].ravel().tolist()}) for r in layers]
            first += n_tokens

    def foreseen(self) -> Iterator[list[list[int]] | None]:
        """Yield for each pass what layers were expected to choose, or None.

        That is, for one token, by layer, distinct experts, rising; none for the first.
        """
        left = iter(() if self.likely is None else self.likely)
        for n_tokens in self.passes.tolist():
            rows = next(left, None) if n_tokens == 1 else None
            yield None if rows is None else [[], *(sorted({*r}) for r in rows.tolist())]

    def counts(self) -> np.ndarray:
        """Return how many tokens chose each expert: ``[L, E]``."""
        n_layers, n_experts = len(self.layers), self.n_experts
        keys = self.chosen + n_experts * np.arange(n_layers)[:, None]
        counts = np.bincount(keys.ravel(), minlength=n_layers * n_experts)
        return counts.reshape(n_layers, n_experts)

    def save(self, path: str | os.PathLike) -> None:
        """Write the file, replacing what is there."""
        header = {
            "format": FORMAT,
            "version": VERSION,
            "model_type": self.model_type,
            "layers": self.layers,
            "n_experts": self.n_experts,
            "record_bytes": self.record_bytes,
            "n_prompt_tokens": self.n_prompt_tokens,
        }
        dtype = np.uint8 if self.n_experts <= 256 else np.uint16
        arrays: dict[str, Any] = {
            "passes": self.passes.astype(np.uint32),
            "chosen": self.chosen.astype(dtype),
        }
        if self.likely is not None:
            arrays["likely"] = self.likely.astype(dtype)
        with open(path, "wb") as file:
            np.savez_compressed(
                file,
                allow_pickle=False,
                header=np.array(json.dumps(header)),
                **arrays,
            )

    @classmethod
    def load(cls, path: str | os.PathLike) -> RoutingTrace:
        """Read a file that ``save`` wrote.

        Raises:
            TraceError: it is no such file, of another version, or damaged.
        """
        header, arrays = _read(Path(path))
        try:
            found = cls(
                model_type=str(header["model_type"]),
                layers=tuple(map(int, header["layers"])),
                n_experts=int(header["n_experts"]),
                record_bytes=tuple(map(int, header["record_bytes"])),
                n_prompt_tokens=int(header["n_prompt_tokens"]),
                **arrays,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise TraceError(
                f"[trace] {path}: expected a whole header but got {header}"
            ) from error
        found._check(Path(path))
        return found

    def _check(self, path: Path) -> None:
        """Raise TraceError unless everything in the file fits together."""
        whole = {
            "one layer or more": 0 < len(self.layers) == len(self.record_bytes),
            "experts as [N, L, K] integers": self.chosen.ndim == 3
            and self.chosen.dtype in (np.uint8, np.uint16)
            and self.chosen.shape[1] == len(self.layers)
            and self.chosen.size > 0,
            "expert ids below n_experts": self.chosen.max(initial=0) < self.n_experts,
            "passes that make up all tokens": self.passes.ndim == 1
            and self.passes.dtype == np.uint32
            and self.passes.min(initial=1) > 0
            and int(self.passes.sum()) == len(self.chosen),
            "likely experts as [S1, L - 1, K] of these": self._are_likely_whole(),
            "a prompt within the tokens": 0 <= self.n_prompt_tokens <= len(self.chosen),
        }
        for expected, holds in whole.items():
            if not holds:
                raise TraceError(
                    f"[trace] {path}: expected {expected} but got {len(self.layers)} "
                    f"layers, {self.n_experts} experts, passes {self.passes.shape}, "
                    f"chosen {self.chosen.dtype} {self.chosen.shape}"
                )

    def _are_likely_whole(self) -> bool:
        if self.likely is None:
            return True
        n_single, n_layers = int((self.passes == 1).sum()), len(self.layers)
        return (
            self.likely.shape == (n_single, n_layers - 1, *self.chosen.shape[2:])
            and self.likely.dtype == self.chosen.dtype
            and self.likely.max(initial=0) < self.n_experts
        )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            header = json.loads(str(archive["header"][()]))
            arrays = {name: archive[name] for name in ("passes", "chosen")}
            if "likely" in archive:
                arrays["likely"] = archive["likely"]
    # zipfile and NumPy raise nearly anything for bytes that are none of theirs.
    except Exception as error:
        raise TraceError(
            f"[trace] {path}: expected a file of moeflux trace: {error}"
        ) from error
    named = header if isinstance(header, dict) else {}
    if named.get("format") != FORMAT or named.get("version") != VERSION:
        raise TraceError(
            f"[trace] {path}: expected {FORMAT!r} version {VERSION} but got "
            f"{named.get('format')!r} version {named.get('version')!r}"
        )
    return named, arrays
