"""Ranks that share the experts of a native model give one process's tokens and bits.

Where the ranks run our kernels, the kernels of one process add in another order, so
that only the tokens are those of one process.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import native_ranks
import pytest
import ranks
from mlx_lm.models.cache import make_prompt_cache
from native_ranks import LARGE, WAYS
from ranks import SMALL
from tiny import make_checkpoint, make_deepseek_v3, make_gpt_oss, make_qwen3_moe

import moeflux_mlx
from moeflux_mlx.calls.together import Together
from moeflux_mlx.experts.compute.exchange import Exchange
from moeflux_mlx.experts.files.pack import pack
from moeflux_mlx.experts.files.share import share_of

E = 7
NAMES = ("pack", "hybrid", "deepseek", "oss")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with models of seven experts per layer, which no two ranks halve."""
    folder = tmp_path_factory.mktemp("native")
    make_qwen3_moe(folder / "plain", num_experts=E, num_experts_per_tok=3)
    pack(folder / "plain", folder / "pack")
    make_checkpoint(folder / "hybrid", num_experts=E)
    make_deepseek_v3(folder / "deepseek", n_routed_experts=E, n_group=1, topk_group=1)
    make_gpt_oss(folder / "oss", num_local_experts=E)
    make_qwen3_moe(folder / "wide", num_experts=16, num_experts_per_tok=8)
    return folder


def alone(path: Path, *, late: bool = False, executor: str = "ops") -> dict[str, Any]:
    """Return one process's results; ``late``: on MLX's arrays, as on a GPU."""
    memory, optimistic = (LARGE, "on") if late else (SMALL, "off")
    model, _ = moeflux_mlx.load(
        path, expert_memory=memory, executor=executor, optimistic=optimistic
    )
    return native_ranks.texts(model)


def run(models: Path, n: int, work: Any) -> list[dict]:
    folder = models / "found"
    for code, log in (ended := ranks.launch(n, folder, work)):
        assert code == 0, f"{log} {ended}"
    return ranks.found(folder, n)


@pytest.mark.sampled
@pytest.mark.parametrize(("n", "names"), [(2, NAMES[:3]), (3, NAMES[3:])])
def test_ranks_give_one_processs_bits_and_hold_their_own_experts(models, n, names):
    outcomes = run(models, n, partial(native_ranks.generate, names=names))
    for name in names:
        expected = {late: alone(models / name, late=late) for late in (False, True)}
        for way, (memory, waits) in WAYS.items():
            # Streamed layers wait for each other, on NumPy's arrays here.
            late = not waits
            found = [outcome[f"{name} {way}"] for outcome in outcomes]
            shares = [len(share_of(E, rank, n)) for rank in range(n)]
            for share, one in zip(shares, found, strict=True):
                for what, value in expected[late].items():
                    assert one[what] == value, (name, way, what)
                assert one["experts"] % share == 0 and one["steps"] == late
                assert one["requests"] > 0
                assert (one["misses"] > 0) == (memory == SMALL)


@pytest.mark.slow
def test_ranks_that_run_our_kernels_give_one_processs_tokens(models):
    work = partial(native_ranks.generate, names=["pack"], executor="sim")
    outcomes = run(models, 2, work)
    found = [one for outcome in outcomes for one in outcome.values()]
    # Memory and waiting change no bit.
    assert len({one["bits"] for one in found}) == 1
    expected = alone(models / "pack", executor="sim")
    for one in found:
        assert one["tokens"] == expected["tokens"]
        assert one["batch"] == expected["batch"]


@pytest.mark.slow
def test_on_a_stated_gpu_no_bit_depends_on_the_memory_of_the_ranks(models):
    first, second = run(models, 2, native_ranks.on_a_stated_gpu)
    assert first == second
    for executor in "cuda", "ops":
        streamed, resident = (
            first[f"{executor}, streams: {streams}"] for streams in (True, False)
        )
        assert streamed == resident


@pytest.mark.slow
def test_a_token_takes_two_more_launches_in_a_layer_than_in_one_process(models):
    counts = []
    for together in Together(None), Together(Exchange(mx.distributed.init())):
        model, _ = moeflux_mlx.load(
            models / "pack", expert_memory=LARGE, executor="sim", optimistic="on"
        )
        model.runtime.together = together
        cache = make_prompt_cache(model)
        mx.eval(model(mx.array([[1, 2, 3]]), cache=cache))
        if together.exchange is not None:
            together.exchange.waits = False
        launched: list[str] = []
        model.runtime.executor.on_launch = launched.append
        mx.eval(model(mx.array([[5]]), cache=cache))
        counts.append(len(launched))
    n_layers, ends = 3, 2
    assert counts == [8 * n_layers + ends, 10 * n_layers + ends]


def test_ranks_that_choose_other_experts_follow_rank_0(models):
    model, _ = moeflux_mlx.load(models / "pack", expert_memory=SMALL)
    expected = ranks.greedy(model, 3)
    for outcome in run(models, 2, partial(ranks.part, native=True)):
        for how, found in outcome.items():
            assert found == expected, how


def test_a_failed_rank_ends_the_call_on_every_rank_but_no_later_call(models):
    expected = ranks.greedy(moeflux_mlx.load(models / "pack", expert_memory=SMALL)[0])
    first, second = run(models, 2, partial(ranks.fail, native=True))
    for damaged in "damaged", "damaged, not waiting":
        assert second[damaged].startswith("ExpertStoreError: [reader] ")
        assert first[damaged].startswith("PeerError: [group] layers.1.mlp.switch_mlp: ")
    for outcome in first, second:
        for when in "mended", "after", "after all":
            assert outcome[when] == expected
        for other in "tokens", "lengths":
            assert "expected the same tokens on every rank" in outcome[other]
        for name in "mmap", "ahead", "optimistic", "auto", "group":
            assert outcome[name].startswith("ConfigError: ["), name
        assert "the same kind of memory bound" in outcome["bounds"]


def test_ranks_keep_to_their_own_memory_and_divide_a_prompt_alike(models):
    expected = ranks.greedy(moeflux_mlx.load(models / "pack", expert_memory=SMALL)[0])
    first, second = outcomes = run(models, 2, native_ranks.bounded)
    for outcome in outcomes:
        assert outcome["whole"] == outcome["after"] == expected
        assert outcome["divided"] == expected["tokens"][:1]
        assert outcome["chunks"] == [True] * 5
    assert second["too little"] == "BudgetError: [memory] too little"
    assert first["too little"].startswith("PeerBudgetError: [group] call: ")


def test_any_number_of_ranks_continues_from_a_state(models):
    model, _ = moeflux_mlx.load(models / "pack", expert_memory=SMALL)
    for name, tokens in ("other", [1, 2]), ("one", ranks.PROMPT[0]):
        cache = make_prompt_cache(model)
        mx.eval(model(mx.array([tokens]), cache=cache))
        moeflux_mlx.save_state(models / name, model, cache, tokens)
    expected = ranks.follow(model, cache)
    for outcome in run(models, 2, partial(ranks.states, native=True)):
        assert outcome["one"] == outcome["several"] == expected
        assert outcome["held again"] == outcome["held"] > 0
        assert "the same tokens of the state on every rank" in outcome["other"]
    model, _ = moeflux_mlx.load(models / "pack", expert_memory=SMALL)
    assert ranks.continued(model, models / "several") == expected


def test_calls_that_ranks_cannot_make_together_are_refused(models):
    model, _ = moeflux_mlx.load(models / "pack")
    x = mx.random.normal((1, 3, 64), key=mx.random.key(1))
    block = model.layers[0].mlp(x).tolist()
    for outcome in run(models, 2, native_ranks.refused):
        for name in "grad", "compile":
            assert "expected a call outside of transformations" in outcome[name]
        assert "divide the experts between processes" in outcome["layers"]
        assert outcome["shard"] == "no error"
        assert outcome["block"] == block
        assert "expected the model's own modules" in outcome["module"]
