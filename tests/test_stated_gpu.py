"""On a stated GPU a budget, a failure or a change of size changes no bit.

A CPU computes here, so these tests show the structure of calls on a GPU: which
matrices are copied, which slots a lazy result reads, which launches are replayed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import QuantizedKVCache, make_prompt_cache
from mlx_lm.utils import load_model
from native_family_table import FAMILIES
from native_family_table import write as write_native
from native_models import least, load, relative_rms, simulated, tokens
from stated_gpu import stated_gpu
from tiny import SIZES, halved, make_qwen3_moe

import moeflux_mlx
from moeflux_mlx import products
from moeflux_mlx.calls import measured_scratch
from moeflux_mlx.errors import ExpertStoreError
from moeflux_mlx.experts.files.pack import pack
from moeflux_mlx.experts.files.store import open_store
from moeflux_mlx.experts.streaming.streamer import ExpertStreamer
from moeflux_mlx.memory import caches
from moeflux_mlx.streaming import stream

ROOT = Path(__file__).resolve().parents[1]
FIRST = {name: next(iter(family.configs)) for name, family in FAMILIES.items()}
each_gpu = pytest.mark.parametrize("kind", ["cuda", "metal"])


def only_first_quick(cases: list[Any]) -> list[Any]:
    """Return parameters of which all but the first are slow."""
    first, *others = (x if isinstance(x, tuple) else (x,) for x in cases)
    slow = (pytest.param(*x, marks=pytest.mark.slow) for x in others)
    return [pytest.param(*first), *slow]


each_family = pytest.mark.parametrize("family", only_first_quick([*FIRST]))
each_door_family = pytest.mark.parametrize(
    "family", only_first_quick(["qwen3_moe", "deepseek_v3", "qwen3_next"])
)


@pytest.fixture(scope="module", autouse=True)
def scripts():
    """Make the scripts' modules importable."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> Callable[[str], Path]:
    """Packs of families with a class of our own."""

    @cache
    def write(family: str) -> Path:
        folder = tmp_path_factory.mktemp("stated-gpu")
        plain = halved(write_native(folder / "plain", family, FIRST[family]))
        pack(plain, folder / "packed")
        return folder / "packed"

    return write


@pytest.fixture(scope="module")
def door(tmp_path_factory) -> Callable[..., Path]:
    """Checkpoints of families that mlx-lm's class runs."""
    import family_trials

    @cache
    def write(family: str, **sizes: int) -> Path:
        path = tmp_path_factory.mktemp("stated-gpu") / family
        path.mkdir()
        family_trials.write_model(path, family, 4, **sizes)
        return halved(path)

    return write


def run(
    model: Any, *shapes: tuple[int, int], n_steps: int = 3, vocab: int = 128
) -> list[mx.array]:
    """Return logits of batches of prompts and of tokens after them, all lazy so far."""
    found = []
    for n_seqs, n_tokens in shapes:
        cache, x = make_prompt_cache(model), tokens(n_tokens, n_tokens, n_seqs) % vocab
        for _ in range(n_steps + 1):
            found.append(model(x, cache=cache))
            x = mx.argmax(found[-1][:, -1:], axis=-1)
    return found


def assert_same(got: list[mx.array], wanted: list[mx.array]) -> None:
    assert all(mx.isfinite(x).all().item() for x in wanted)
    pairs = enumerate(zip(got, wanted, strict=True))
    assert [i for i, (a, b) in pairs if not mx.array_equal(a, b)] == []


def assert_budgets_give_same_bits(
    path: Path, executor: str, *shapes: tuple[int, int], n_steps: int
) -> None:
    """Compare a pack with all experts in memory with other ways to hold them.

    These are the experts of a plain checkpoint, the fewest slots, and some slots whose
    experts are read ahead.

    Args:
        path: the pack, beside its plain checkpoint.
        shapes: numbers of sequences and of their tokens.
    """

    def of(path: Path, **options: Any) -> list[mx.array]:
        model = load(path, executor=executor, **options)
        return run(model, *shapes, n_steps=n_steps, vocab=SIZES["vocab_size"])

    wanted = of(path)
    assert_same(of(path.with_name("plain")), wanted)
    few, some = least(path), least(path, 9)
    for options in (
        {"expert_memory": few},
        {"expert_memory": some, "read_ahead": "on"},
        {"expert_memory": few, "optimistic": "off"},
    ):
        assert_same(of(path, **options), wanted)


@each_gpu
@each_family
def test_lazy_results_are_the_same_at_every_budget(native, family, kind):
    with stated_gpu(kind):
        shapes = (1, 2), (1, 37), (3, 9)
        assert_budgets_give_same_bits(native(family), "ops", *shapes, n_steps=3)


@simulated
@pytest.mark.parametrize(
    ("family", "kind"),
    # On Metal no step is compiled, and only the order of ways differs.
    only_first_quick([*((name, "cuda") for name in FIRST), ("qwen3_moe", "metal")]),
)
def test_kernels_give_the_same_at_every_budget(native, family, kind):
    """On CUDA the steps of single tokens are compiled."""
    with stated_gpu(kind):
        shapes = (1, 3), (2, 1)
        assert_budgets_give_same_bits(native(family), kind, *shapes, n_steps=2)


@each_gpu
@each_door_family
def test_a_streamed_block_gives_stocks_bits_at_every_budget(door, family, kind):
    path = door(family)
    shapes = (1, 2), (1, 9), (1, 37), (5, 3)
    with stated_gpu(kind):
        # Stock's heads would be multiplied wrongly for several sequences on CUDA.
        products.mend()
        wanted = run(load_model(path)[0], *shapes)
        everything = stream(load_model(path, lazy=True)[0], path, expert_memory="1GB")
        assert everything.streamer.resident
        assert_same(run(everything, *shapes), wanted)
        for n_more in (0, 3):
            options = {"expert_memory": least(path, n_more), "optimistic": "on"}
            model = stream(load_model(path, lazy=True)[0], path, **options)
            assert not model.streamer.resident
            assert_same(run(model, *shapes), wanted)


@each_gpu
def test_copies_of_matrices_are_planned_and_freed(door, kind, monkeypatch):
    """CUDA copies chosen matrices; Metal does so once many rows share a matrix."""
    monkeypatch.setattr(measured_scratch, "MOST_ROWS", 256)
    path = door("qwen3_moe", moe_intermediate_size=256)
    with stated_gpu(kind):
        memory = {"memory": "4GB", "expert_memory": least(path, 8)}
        model = stream(load_model(path, lazy=True)[0], path, **memory)
        assert not model.streamer.resident
        needs = model.keeper._needs
        for n_tokens in (20, 60):
            cache, x = make_prompt_cache(model), tokens(n_tokens) % 128
            mx.eval(x)
            base = mx.get_active_memory()
            mx.reset_peak_memory()
            mx.eval(model(x, cache=cache))
            base += sum(c.nbytes for c in caches.single_caches(cache))
            taken = mx.get_peak_memory() - base
            planned = needs.scratch_bytes(n_tokens, n_tokens)
            planned += needs.output_bytes(n_tokens)
            assert taken <= planned <= 2 * taken + (1 << 20)
            assert mx.get_active_memory() - base < model.streamer.slot_bytes


def test_our_own_classes_plan_copies_where_no_kernel_reads_the_slots(native):
    """Without verified kernels CUDA copies the matrices of a prompt."""
    path = native("qwen3_moe")
    with stated_gpu("cuda"), open_store(path) as store:
        layout = store.layout(store.layers[0])
        planned = [
            load(path, executor=executor, expert_memory=least(path)).needs
            for executor in ("ops", "cuda")
        ]
        for n_tokens in (1, 2, 64):
            copied = min(n_tokens * store.top_k, store.n_experts) * layout.stride
            more, less = (needs.scratch_bytes(n_tokens, n_tokens) for needs in planned)
            assert more - less >= copied / 2, n_tokens


@each_gpu
@pytest.mark.parametrize("error", [ExpertStoreError, KeyboardInterrupt])
def test_after_a_failure_and_a_change_of_size_bits_are_the_same(
    native, kind, error, monkeypatch
):
    path = native("qwen3_moe")
    with stated_gpu(kind):
        wanted = run(load(path, executor="ops"), (1, 9), vocab=SIZES["vocab_size"])
        model = load(path, executor="ops", expert_memory=least(path, 9))
        cache, x = make_prompt_cache(model), tokens(9, 9) % SIZES["vocab_size"]
        found = [model(x, cache=cache)]
        original, calls = ExpertStreamer._read_back, []

        def fail(streamer: ExpertStreamer, chosen: Any) -> Any:
            calls.append(1)
            if len(calls) == 2:
                raise error("[test]")
            return original(streamer, chosen)

        for n_slots in (2, 11, 3):
            x = mx.argmax(found[-1][:, -1:], axis=-1)
            calls.clear()
            with monkeypatch.context() as patch:
                patch.setattr(ExpertStreamer, "_read_back", fail)
                with pytest.raises(error):
                    mx.eval(model(x, cache=cache))
            model.streamer.resize(n_slots)
            found.append(model(x, cache=cache))
        assert_same(found, wanted)


@each_gpu
def test_a_state_goes_on_where_it_was_saved(native, kind, tmp_path):
    path, prompt = native("qwen3_moe"), tokens(9, 9)
    with stated_gpu(kind):
        model = load(path, executor="ops", expert_memory=least(path, 3))
        cache = make_prompt_cache(model)
        mx.eval(model(prompt, cache=cache))
        moeflux_mlx.save_state(tmp_path / "state", model, cache, prompt[0].tolist())
        wanted = model(tokens(1), cache=cache)
        again = load(path, executor="ops")
        state = moeflux_mlx.load_state(tmp_path / "state", again)
        assert_same([again(tokens(1), cache=state.cache)], [wanted])


def test_a_gpu_without_verified_kernels_is_told_to_run_the_doctor(native, capsys):
    said = "run moeflux doctor once"
    path = native("qwen3_moe")
    for executor, on_gpu in ((None, True), ("ops", True), (None, False)):
        with stated_gpu("cuda") if on_gpu else contextlib.nullcontext():
            moeflux_mlx.load(path, executor=executor)
        assert (said in capsys.readouterr().err) == (executor is None and on_gpu)


@each_gpu
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_quantised_caches_give_the_same_logits(tmp_path, kind, kv_heads):
    """CUDA's product refuses parts of a cache, and repeats its first head."""
    sizes = {"num_attention_heads": 4, "num_key_value_heads": kv_heads}
    path = make_qwen3_moe(tmp_path / "model", head_dim=64, **sizes)

    def logits(model: Any) -> mx.array:
        cache = [QuantizedKVCache(group_size=32, bits=8) for _ in model.layers]
        found = [model(tokens(n, n, 2) % 128, cache=cache) for n in (5, 1, 1)]
        return mx.concatenate(found, axis=1)

    expected = logits(load_model(path)[0])
    mx.eval(expected)
    with stated_gpu(kind):
        for options in ({"executor": "ops"}, {"native": False}):
            model, _ = moeflux_mlx.load(path, **options)
            assert relative_rms(logits(model), expected) < 1e-4
