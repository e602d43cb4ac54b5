"""Counts for ``moeflux inspect``: experts and other weights, for either class."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten

from ..errors import ModelError
from ..experts.files.checkpoint import (
    Checkpoint,
    experts_per_token,
    is_used,
    model_facts,
    read_config,
    text_config,
)
from ..experts.files.layout import ExpertLayout
from ..experts.files.module_store import ModuleExperts, count_of, layout_of
from ..experts.files.modules import RoutedBlock, find_blocks
from ..experts.files.packed import is_packed
from ..experts.files.packed_blocks import PackedBlocks
from ..experts.files.stock import StockModel
from ..experts.files.store import ExpertStore, open_store
from ..opening.stock_model import load_stock_lazily


@dataclass(frozen=True)
class Experts:
    """The experts of a model by layer or routed block, and the bytes of other parts.

    ``n_least`` is the minimum number of experts in memory. ``reads_per_expert`` is None
    if the model has to be packed before its experts can be read.
    """

    n_layers: int
    layouts: list[ExpertLayout]
    counts: list[int]
    top_k: int | None
    n_least: int
    resident_bytes: int
    reads_per_expert: float | None


def of_own_class(directory: Path) -> Experts:
    """Count the experts of a model with a native class, without reading weights.

    Raises:
        ModelError, ExpertStoreError: see ``open_store``.
    """
    with Checkpoint.open(directory) as checkpoint:
        config, tensors = checkpoint.config, checkpoint.tensors
        facts = model_facts(config)
    with open_store(directory) as store:
        resident = used_tensors(tensors, config) - set(store.tensor_names)
        return Experts(
            facts.n_layers,
            [store.layout(layer) for layer in store.layers],
            [store.count(layer) for layer in store.layers],
            facts.top_k,
            facts.top_k,
            sum(tensors[name].n_bytes for name in resident),
            _reads_per_expert(store),
        )


def of_stock_class(directory: Path) -> Experts:
    """Count the experts of a model of mlx-lm's class, without reading weights.

    Raises:
        ModelError: mlx-lm cannot load it, or it has no routed blocks.
        ExpertStoreError: a pack with a missing or changed file.
    """
    stock = load_stock_lazily(directory)
    blocks = find_blocks(stock.model)
    if not blocks:
        raise ModelError(
            f"[inspect] {directory}: expected routed experts in mlx-lm's "
            f"{stock.config.get('model_type')} but found none"
        )
    counts = [count_of(block) for block in blocks]
    arrays: dict[str, Any] = dict(tree_flatten(stock.model.parameters()))
    all_bytes = sum(array.nbytes for array in arrays.values())
    routed = sum(array.nbytes for block in blocks for array in block.parts.values())
    return Experts(
        len(getattr(stock.model, "layers", blocks)),
        [layout_of(block) for block in blocks],
        counts,
        experts_per_token(read_config(directory), max(counts)),
        1,
        all_bytes - routed,
        _reads_of_blocks(directory, stock, blocks),
    )


def _reads_of_blocks(
    directory: Path, stock: StockModel, blocks: list[RoutedBlock]
) -> float | None:
    if is_packed(directory):
        with PackedBlocks.open_for(directory, blocks) as packed:
            return _reads_per_expert(packed)
    with Checkpoint.open(directory) as checkpoint:
        try:
            store = ModuleExperts(blocks, checkpoint, stock.sources)
        except ModelError:
            return None
        return _reads_per_expert(store)


def used_tensors(tensors: Collection[str], config: dict[str, Any]) -> set[str]:
    """Return the names of the tensors that the model uses.

    This excludes multi-token-prediction layers, vision weights, and an output matrix
    that is tied to the embedding.
    """
    tied = text_config(config).get("tie_word_embeddings")
    return {
        name
        for name in tensors
        if is_used(name) and not (tied and name.endswith("lm_head.weight"))
    }


def _reads_per_expert(store: ExpertStore) -> float:
    spans = [
        len(store.spans(layer, expert))
        for layer in store.layers
        for expert in range(store.count(layer))
    ]
    return sum(spans) / len(spans)
