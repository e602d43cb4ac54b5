"""Counts of a model's layers, experts and bytes, from its headers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ..experts.files.checkpoint import read_config, text_config
from ..experts.files.layout import ExpertLayout
from ..experts.files.packed import is_packed
from ..experts.files.stock import has_own_class
from ..experts.pool.pool import pool_bytes, pool_stride
from ..experts.pool.segments import full_bytes
from ..experts.streaming.access import slots_fit
from .inspect_experts import of_own_class, of_stock_class


@dataclass(frozen=True)
class ModelSummary:
    """Counts of a model directory.

    - ``layers`` counts layers by kind, ``n_moe_layers`` those with routed experts, or
      the routed blocks of mlx-lm's class. ``n_experts`` is the largest number in one.
    - ``resident_bytes`` is the size of all used weights except routed experts.
      ``minimum_bytes`` is the smallest ``expert_memory`` that serves a token, and
      ``full_bytes`` the smallest that holds every expert.
    - ``reads_per_expert`` is the mean number of spans of an expert: 1 in a pack, None
      if the model has to be packed before its experts can be read.
    - ``token_reads`` and ``token_bytes`` are the reads of a token with no expert in
      memory. They are None if the configuration does not state ``top_k``.
    - ``forms`` counts the experts' projections by storage format. ``all_fit`` tells
      whether all experts fit into the default amount of memory.
    """

    model_type: str
    is_packed: bool
    layers: dict[str, int]
    n_moe_layers: int
    n_experts: int
    top_k: int | None
    resident_bytes: int
    expert_bytes: int
    bytes_per_expert: int
    reads_per_expert: float | None
    token_reads: int | None
    token_bytes: int | None
    forms: dict[str, int]
    all_fit: bool
    minimum_bytes: int
    full_bytes: int
    files: dict[str, int]


def summarize(directory: Path) -> ModelSummary:
    """Count the layers, experts and bytes of a model without reading weights.

    Raises:
        ModelError: the directory holds no Mixture-of-Experts model.
        ExpertStoreError: a pack with missing or changed files.
    """
    config = read_config(directory)
    own = has_own_class(config)
    found = of_own_class(directory) if own else of_stock_class(directory)
    layouts, reads, top_k = found.layouts, found.reads_per_expert, found.top_k
    record_bytes = sum(layout.record_bytes for layout in layouts)
    n_reads = None
    if reads is not None and top_k is not None:
        n_reads = round(top_k * len(layouts) * reads)
    return ModelSummary(
        model_type=str(config.get("model_type")),
        is_packed=is_packed(directory),
        layers=_layer_kinds(config, found.n_layers),
        n_moe_layers=len(layouts),
        n_experts=max(found.counts),
        top_k=top_k,
        resident_bytes=found.resident_bytes,
        reads_per_expert=reads,
        token_reads=n_reads,
        token_bytes=None if top_k is None else top_k * record_bytes,
        forms=dict(Counter(form for layout in layouts for form in _forms(layout))),
        all_fit=slots_fit(layouts, found.counts),
        files=_files(directory),
        expert_bytes=sum(
            n * layout.stride for n, layout in zip(found.counts, layouts, strict=True)
        ),
        bytes_per_expert=pool_stride(layouts),
        minimum_bytes=pool_bytes(layouts, found.n_least),
        full_bytes=full_bytes(found.counts, pool_stride(layouts)),
    )


def _forms(layout: ExpertLayout) -> list[str]:
    """Return the storage format of each projection of a layer's experts."""
    weights = [spec for spec in layout.tensors if spec.part == "weight"]
    return [
        spec.dtype if q is None else f"{q.mode} {q.bits} bits/{q.group_size}"
        for spec, q in zip(weights, layout.quantization, strict=True)
    ]


def _layer_kinds(config: dict, n_layers: int) -> dict[str, int]:
    text = text_config(config)
    kinds, interval = text.get("layer_types"), text.get("full_attention_interval")
    if not isinstance(kinds, list) or len(kinds) != n_layers:
        kinds = ["attention"] * n_layers
        if type(interval) is int and interval > 0:
            kinds = ["linear_attention"] * n_layers
            full = range(interval - 1, n_layers, interval)
            for layer in full:
                kinds[layer] = "full_attention"
    counts = Counter(map(str, kinds))
    return {kind.replace("_", " "): n for kind, n in counts.items()}


def _files(directory: Path) -> dict[str, int]:
    paths = sorted(path for path in directory.iterdir() if path.is_file())
    return {path.name: path.stat().st_size for path in paths}
