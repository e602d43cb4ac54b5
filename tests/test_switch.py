"""A streamed block uses the same kernels as mlx-lm's block, on every device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map
from mlx_lm.models.switch_layers import SwitchGLU
from mlx_lm.utils import save_model

from moeflux_mlx import device
from moeflux_mlx.experts.files.checkpoint import Checkpoint
from moeflux_mlx.experts.files.module_store import ModuleExperts, unchanged
from moeflux_mlx.experts.files.modules import find_blocks
from moeflux_mlx.experts.pool.pool import POOL_ALIGNMENT
from moeflux_mlx.experts.streaming.streamer import ExpertStreamer
from moeflux_mlx.experts.weights import ExpertWeights
from moeflux_mlx.streaming import stream

DIM, N_EXPERTS, SLOT = 128, 5, 80 << 10


class Two(nn.Module):
    """Two blocks, the first wider than the second; ids come from outside."""

    def __init__(self, bits: int | None = 4, dtype: mx.Dtype = mx.float32):
        super().__init__()
        mx.random.seed(3)
        self.blocks = [SwitchGLU(DIM, n, N_EXPERTS, bias=True) for n in (256, DIM)]
        self.update(
            tree_map(lambda x: 0.3 * mx.random.normal(x.shape), self.parameters())
        )
        self.set_dtype(dtype)
        if bits:
            nn.quantize(self, 32, bits)
        self.eval()

    def __call__(self, x: mx.array, ids: mx.array) -> mx.array:
        for block in self.blocks:
            x = block(x, ids).mean(axis=-2)
        return x


def saved(model: nn.Module, path: Path) -> Path:
    path.mkdir()
    save_model(path, model)
    (path / "model.safetensors.index.json").unlink()
    (path / "config.json").write_text('{"model_type": "two"}')
    return path


def load(path: Path, n_slots: int, **options: Any) -> Any:
    model = Two(**options).load_weights(str(path / "model.safetensors"))
    return stream(model, path, expert_memory=POOL_ALIGNMENT + n_slots * SLOT)


def given(n: int, k: int = 2) -> tuple[mx.array, mx.array]:
    x = mx.random.normal((n, DIM), key=mx.random.key(n))
    return x, mx.random.randint(0, N_EXPERTS, (n, k), key=mx.random.key(n + 1))


@pytest.fixture
def told(monkeypatch) -> list[tuple[int, int, bool]]:
    """Return a list of each product's ids, matrices, and whether ids are sorted."""
    found: list[tuple[int, int, bool]] = []
    original = mx.gather_qmm

    def note(x: mx.array, w: mx.array, *args: Any, **options: Any) -> mx.array:
        ids = options["rhs_indices"]
        found.append((ids.size, len(w), options["sorted_indices"]))
        return original(x, w, *args, **options)

    monkeypatch.setattr(mx, "gather_qmm", note)
    return found


def takes_blocks(n_rows: int, n_matrices: int, is_sorted: bool) -> bool:
    """Return the properties by which MLX chooses its Metal kernels."""
    return is_sorted and n_rows >= 16 and n_rows // n_matrices >= 4


@pytest.fixture
def metal(monkeypatch):
    """Choose kernels as on Metal; on a CPU all compute the same."""
    monkeypatch.setattr(device, "multiplies_by_blocks", lambda rows, n: rows // n >= 4)
    monkeypatch.setattr(device, "multiplies_row_by_row", lambda: False)


@pytest.mark.sampled
@pytest.mark.parametrize("n_slots", [1, 2, 4, 7, 2 * N_EXPERTS])
@pytest.mark.parametrize("n_tokens", [1, 7, 9, 33, 60])
def test_kernels_are_those_of_the_block_with_all_experts(
    tmp_path, told, metal, n_slots, n_tokens
):
    stock = Two()
    ours = load(saved(stock, tmp_path / "model"), n_slots)
    x, ids = given(n_tokens)
    wanted = stock(x, ids)
    (want,) = {takes_blocks(*call) for call in told}
    told.clear()
    got = ours(x, ids)
    assert mx.array_equal(wanted, got)
    assert told and {takes_blocks(*call) for call in told} == {want}
    # On CUDA, fewer than eight rows use another kernel.
    assert all((rows < 8) == (ids.size < 8) for rows, _, _ in told)


@pytest.mark.parametrize("bits", [4, None])
def test_contiguous_matrices_stay_contiguous_with_all_in_memory(
    tmp_path, monkeypatch, bits
):
    stock = Two(bits)
    path = saved(stock, tmp_path / "model")
    monkeypatch.setattr(device, "gathers_strided", lambda: False)
    ours = load(path, 10 if bits else 100, bits=bits)
    assert ours.streamer.resident
    for number, block in enumerate(stock.blocks):
        weights = ours.streamer.source(number).weights
        for name in ("gate_proj", "up_proj", "down_proj"):
            found, own = weights.by_name[name], block[name]
            assert not found.strided
            assert mx.array_equal(found.w, own.weight)
            assert mx.array_equal(found.bias, own.bias)

    def fail(*_: Any) -> None:
        raise AssertionError("copied")

    monkeypatch.setattr(ExpertWeights, "end_to_end", fail)
    for n in (1, 60):
        assert mx.array_equal(stock(*given(n)), ours(*given(n)))


def test_shrunk_it_is_streamed_from_slots_again(tmp_path, monkeypatch):
    stock = Two()
    path = saved(stock, tmp_path / "model")
    monkeypatch.setattr(device, "gathers_strided", lambda: False)
    ours = load(path, 2 * N_EXPERTS)
    mx.eval(ours(*given(9)))
    ours.streamer.resize(4)
    assert not ours.streamer.resident
    for n in (1, 3, 40):
        assert mx.array_equal(stock(*given(n)), ours(*given(n)))


def test_scales_of_another_type_are_not_copied_where_all_is_in_memory(
    tmp_path, monkeypatch
):
    stock = Two(dtype=mx.bfloat16)
    path = saved(stock, tmp_path / "model")
    ours, few = (load(path, n, dtype=mx.bfloat16) for n in (2 * N_EXPERTS, 4))
    copied: list[int] = []
    original = ExpertWeights.end_to_end

    def note(*args: Any) -> Any:
        copied.append(1)
        return original(*args)

    monkeypatch.setattr(ExpertWeights, "end_to_end", note)
    for n in (1, 40):
        wanted = stock(*given(n))
        assert mx.array_equal(wanted, ours(*given(n))) and not copied
        assert mx.array_equal(wanted, few(*given(n))) and copied
        copied.clear()


def test_stacked_and_back_no_byte_is_lost(tmp_path):
    model = Two()
    path = saved(model, tmp_path / "model")
    lazy = Two().load_weights(str(path / "model.safetensors"))
    checkpoint = Checkpoint.open(path)
    blocks = find_blocks(lazy)
    with ModuleExperts(blocks, checkpoint, unchanged(checkpoint, None)) as store:
        plain, stacked = (
            ExpertStreamer(store, 1 << 24, stacks=stacks) for stacks in (False, True)
        )
        before = plain.pools[0].bytes.copy()
        for layer in store.layers:
            stacked.source(layer)
        assert not np.array_equal(stacked.pools[0].bytes, before)
        stacked.resize(stacked.n_slots - 1)
        used = store.layout(1).record_bytes
        assert np.array_equal(stacked.pools[0].bytes[5:9, :used], before[5:9, :used])
