"""Models of mlx-lm that stream experts on a GPU give stock's bits at every share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from tiny import halved

from moeflux_mlx import products
from moeflux_mlx.experts.pool.pool import POOL_ALIGNMENT
from moeflux_mlx.experts.streaming.streamer import ExpertStreamer
from moeflux_mlx.streaming import stream

ROOT = Path(__file__).resolve().parents[1]
N_EXPERTS, N_LAYERS = 8, 4
on_gpu = pytest.mark.parametrize(
    "device",
    [
        pytest.param("metal", marks=pytest.mark.metal),
        pytest.param("cuda", marks=pytest.mark.cuda),
    ],
)
# Widths for the kernels of large models, and widths that those do not divide.
WIDE = {"hidden_size": 256, "moe_intermediate_size": 128, "intermediate_size": 128}
NARROW = {"hidden_size": 192}
CASES = [
    ("qwen3_moe", 4, WIDE),
    ("qwen3_moe", 4, NARROW),
    # At a width of 64, one group, MLX's own product for the router is wrong on an H200.
    ("qwen3_moe", 4, {}),
    ("qwen3_moe", None, {}),
    ("gpt_oss", 4, WIDE),
    ("gpt_oss", None, {}),
]


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """Make the scripts' modules importable."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


def write(path: Path, family: str, bits: int | None, changes: dict) -> Path:
    """Write a tiny model in bfloat16."""
    import families
    import family_trials

    config = {**families.configuration(family), **changes}
    config["num_hidden_layers"] = N_LAYERS
    if "layer_types" in config:
        config["layer_types"] = families.BOTH_KINDS * (N_LAYERS // 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "configuration", lambda _: config)
        path.mkdir()
        family_trials.write_model(path, family, bits)
    return halved(path)


def ids(n_seqs: int, n: int, seed: int) -> mx.array:
    return mx.random.randint(1, 128, (n_seqs, n), key=mx.random.key(seed))


def run(model: Any) -> list[mx.array]:
    """Return logits of prompts, with sorted ids or not, and of single tokens."""
    logits = []
    for n_seqs, n_tokens in ((1, 3), (1, 40), (1, 200), (3, 5)):
        cache = make_prompt_cache(model)
        for i, n in enumerate([n_tokens, *[1] * 6]):
            logits.append(model(ids(n_seqs, n, 10 * n_seqs + i), cache=cache))
            mx.eval(logits[-1])
    return logits


def streamed(path: Path, share: float, **options: Any) -> Any:
    with_all = stream(load_model(path, lazy=True)[0], path, expert_memory="1GB")
    stride, n_records = with_all.streamer.slot_bytes, len(with_all.streamer.experts)
    memory = POOL_ALIGNMENT + round(n_records * share) * stride
    model, _ = load_model(path, lazy=True)
    return stream(model, path, expert_memory=memory, **options)


@on_gpu
@pytest.mark.parametrize(("family", "bits", "changes"), CASES)
def test_every_share_gives_stocks_bits(device, tmp_path, family, bits, changes):
    path = write(tmp_path / "model", family, bits, changes)
    products.mend()
    wanted = run(load_model(path)[0])
    assert all(mx.isfinite(x).all() for x in wanted)
    wrong = []
    for share in (1, 0.5, 0.25):
        for optimistic in ("on", "off")[: 1 if share == 1 else 2]:
            ours = streamed(path, share, optimistic=optimistic, read_ahead="on")
            assert ours.streamer.resident == (share == 1)
            same = [*map(mx.array_equal, wanted, run(ours))]
            if not all(x.item() for x in same):
                wrong.append((share, optimistic, [x.item() for x in same]))
    assert not wrong


@on_gpu
def test_a_token_that_finds_its_experts_is_read_back_once(
    device, tmp_path, monkeypatch
):
    ours = streamed(write(tmp_path / "model", "qwen3_moe", 4, WIDE), 0.9)
    cache = make_prompt_cache(ours)
    found: list[int] = []
    original = ExpertStreamer._read_back

    def note(self: ExpertStreamer, chosen: Any) -> Any:
        found.append(len(chosen))
        return original(self, chosen)

    monkeypatch.setattr(ExpertStreamer, "_read_back", note)
    for _ in range(30):
        found.clear()
        mx.eval(ours(ids(1, 1, 0), cache=cache))
    assert found == [N_LAYERS]


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_sorted_products_of_dense_experts_are_right(dtype):
    x = mx.random.normal((100, 1, 64), key=mx.random.key(1)).astype(dtype)
    w = mx.random.normal((N_EXPERTS, 64, 96), key=mx.random.key(2)).astype(dtype)
    chosen = mx.sort(mx.random.randint(0, N_EXPERTS, (100,), key=mx.random.key(3)))
    want = (x.astype(mx.float32) @ w[chosen].astype(mx.float32)).astype(mx.float32)
    got = mx.gather_mm(x, w, rhs_indices=chosen, sorted_indices=True)
    assert mx.allclose(got.astype(mx.float32), want, rtol=2e-2, atol=1e-1)
