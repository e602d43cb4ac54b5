"""Gradients in planned memory: counted beforehand, and equal to stock's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from conftest import OWN_BYTES, hold_own_bytes
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner import trainer
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model
from test_calls_transforms import check_same
from tiny import make_checkpoint, make_qwen3_moe

import moeflux_mlx
from moeflux_mlx import device
from moeflux_mlx.calls import small_calls
from moeflux_mlx.calls.small_calls import SmallCalls, Taken
from moeflux_mlx.errors import BudgetError
from moeflux_mlx.memory.keeper import MemoryKeeper
from moeflux_mlx.streaming import stream

ROOT = Path(__file__).resolve().parents[1]
VOCAB = 128
LORA = {"rank": 4, "scale": 2.0, "dropout": 0.0}


@pytest.fixture(scope="module", autouse=True)
def scripts():
    """Make the scripts' modules importable."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield


@pytest.fixture(autouse=True)
def own_bytes(monkeypatch):
    hold_own_bytes(monkeypatch)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Callable[[str], Path]:
    """Tiny models by family, of mlx-lm's class; "native" is of our class."""
    import family_trials

    @cache
    def write(family: str) -> Path:
        path = tmp_path_factory.mktemp("gradients") / family
        if family == "native":
            return make_qwen3_moe(path, num_hidden_layers=2)
        path.mkdir()
        family_trials.write_model(path, family, 4)
        return path

    return write


def load(path: Path, budget: int | str) -> nn.Module:
    if path.name == "native":
        return moeflux_mlx.load(path, memory=budget)[0]
    return stream(load_model(path, lazy=True)[0], path, memory=budget)


def stock(path: Path) -> nn.Module:
    return mlx_lm.load(path)[0] if path.name == "native" else load_model(path)[0]


def with_adapters(model: nn.Module) -> nn.Module:
    """Freeze a model except for its adapters, whose second factors are nonzero."""
    mx.random.seed(5)
    model.freeze()
    keys = ["self_attn.q_proj", "self_attn.v_proj"]
    linear_to_lora_layers(model, 2, {**LORA, "keys": keys})
    for name, x in tree_flatten(model.trainable_parameters()):
        noise = 0.1 * mx.random.normal(x.shape, key=mx.random.key(len(name)))
        model.load_weights([(name, x + noise)], strict=False)
    return model.train()


def step(model: nn.Module, n_seqs: int, t: int) -> dict[str, np.ndarray]:
    """Return the loss and the gradients of a step, as in mlx-lm's trainer."""
    ids = np.random.RandomState(t).randint(1, VOCAB, (n_seqs, t + 1))
    batch, lengths = mx.array(ids), mx.array([[0, t]] * n_seqs)
    gradient = nn.value_and_grad(model, trainer.default_loss)
    (loss, _), found = gradient(model, batch, lengths)
    mx.eval(loss, found)
    named = {"loss": loss, **dict(tree_flatten(found))}
    return {name: np.array(x, np.float64) for name, x in named.items()}


@pytest.fixture
def held(monkeypatch) -> list[int]:
    """The bytes that were reserved for gradients."""
    found: list[int] = []
    hold = MemoryKeeper.hold

    def noted(keeper, n_bytes, *call):
        found.append(n_bytes)
        hold(keeper, n_bytes, *call)
        # Measure the memory of the step itself from here on.
        mx.reset_peak_memory()

    monkeypatch.setattr(MemoryKeeper, "hold", noted)
    return found


@contextmanager
def checkpointed(model: nn.Module, on: bool) -> Iterator[None]:
    """Recompute layers in the backward pass."""
    kind = type(model.layers[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "__call__", kind.__call__)
        if on:
            trainer.grad_checkpoint(model.layers[0])
        yield


FAMILIES = ["native", "qwen3_moe", "gpt_oss"]


@pytest.mark.sampled
@pytest.mark.parametrize("family", FAMILIES)
def test_the_memory_reserved_for_a_gradient_is_the_memory_it_uses(
    written, held, family
):
    """Steps have shapes that were never measured, also with layers recomputed."""
    model = with_adapters(load(written(family), "4GB"))
    for again, n_seqs, t in ((False, 3, 40), (False, 1, 190), (True, 2, 60)):
        with checkpointed(model, again):
            mx.synchronize()
            before = mx.get_active_memory()
            step(model, n_seqs, t)
            taken = mx.get_peak_memory() - before
        assert taken <= held[-1] <= 1.5 * taken + (1 << 20), (again, n_seqs, t)


def test_layers_without_trained_parameters_need_no_memory_for_gradients(tmp_path, held):
    """MLX follows all arguments of a step, but only the last layer is trained."""
    model = with_adapters(load(make_checkpoint(tmp_path / "native"), "4GB"))
    before = mx.get_active_memory()
    step(model, 1, 40)
    taken = mx.get_peak_memory() - before
    assert taken <= held[-1] <= 1.5 * taken + (1 << 20)


def error_of(model: nn.Module, n_seqs: int, t: int) -> str:
    with pytest.raises(BudgetError, match=r"\[memory\] expected at least") as caught:
        step(model, n_seqs, t)
    return str(caught.value)


def least_of(message: str) -> int:
    return int(re.search(r"at least (\d+) bytes", message)[1])


@pytest.mark.sampled
@pytest.mark.parametrize("family", FAMILIES)
def test_too_little_memory_is_refused_and_the_minimum_gives_stocks_gradients(
    written, family
):
    path = written(family)
    with pytest.raises(BudgetError) as caught:
        load(path, OWN_BYTES + device.PROCESS_GROWTH_BYTES + (11 << 18))
    few = load(path, least_of(str(caught.value)) + (1 << 20))
    before = np.array(few(mx.array([[1, 2, 3]])))
    message = error_of(with_adapters(few), 2, 150)
    assert "gradients" in message and "2 x 150 tokens" in message
    assert "\n" not in message and "grad_checkpoint" in message
    # Nothing is lost: a short step still works, and the model is unchanged.
    wanted = with_adapters(stock(path))
    check_same(step(few, 1, 2), step(wanted, 1, 2))
    mlx_lm.tuner.utils.remove_lora_layers(few)
    assert np.allclose(np.array(few.eval()(mx.array([[1, 2, 3]]))), before, atol=1e-5)

    enough = with_adapters(load(path, least_of(message)))
    for n_seqs, t in ((1, 9), (2, 150)):
        check_same(step(enough, n_seqs, t), step(wanted, n_seqs, t))


@pytest.mark.parametrize("family", ["native", "qwen3_moe"])
def test_resident_experts_are_evicted_and_return(written, family):
    path = written(family)
    whole = load(path, "4GB")
    streamer, most = whole.streamer, whole.streamer.n_slots
    assert streamer.resident
    model, wanted = with_adapters(whole), with_adapters(stock(path))
    keeper = whole.runtime.keeper if family == "native" else whole.keeper
    short, tight = step(model, 1, 20), step(wanted, 1, 20)
    check_same(short, tight)
    # Reduce memory until a longer step must take space from the experts.
    parts = sum(keeper._parts(measured=False).values())
    needed = 0

    def note(n_bytes, *call):
        nonlocal needed
        needed = n_bytes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keeper, "hold", note)
        step(model, 2, 90)
    budget = parts + needed + streamer.slack_bytes + 3 * streamer.slot_bytes
    object.__setattr__(keeper.plan, "budget_bytes", budget)
    check_same(step(model, 2, 90), step(wanted, 2, 90))
    assert streamer.n_slots == 3 < most
    check_same(step(model, 1, 20), short)
    assert streamer.n_slots > 3
    object.__setattr__(keeper.plan, "budget_bytes", 4 * 10**9)
    tokens = mx.array([[5, 6, 7]])
    assert mx.allclose(model.eval()(tokens), wanted.eval()(tokens), atol=1e-5)
    assert streamer.n_slots == most


@pytest.mark.slow
def test_a_prompt_through_adapters_has_memory_for_its_modules(tmp_path):
    """mlx-lm's attention modules keep all their scores, unlike our graphs."""
    sizes = dict(num_attention_heads=16, num_key_value_heads=4, num_hidden_layers=2)
    model = load(make_qwen3_moe(tmp_path / "native", **sizes), "4GB")
    of_graphs = model.needs.scratch_bytes(512, 1536)
    with_adapters(model).eval()
    cache, taken = make_prompt_cache(model), 0
    for _ in range(3):
        mx.eval([one.state for one in cache if not one.empty()])
        before = mx.get_active_memory() - sum(one.nbytes for one in cache)
        rows = model.model(mx.ones((1, 512), mx.int32), cache=cache)
        # Small calls were measured first; the last of the three needs no measurement.
        mx.eval(rows)
        held = before + sum(one.nbytes for one in cache)
        taken = mx.get_peak_memory() - held
        mx.reset_peak_memory()
    assert of_graphs < taken <= model.runtime.keeper.scratch_bytes


def test_no_measured_call_exceeds_its_prediction():
    few, wide, long = 1000, 3900, 5200
    taken = Taken.of(4, few, wide, long)
    for (n_seqs, t), peak in (((1, 4), few), ((4, 4), wide), ((1, 16), long)):
        assert peak <= taken.n_bytes(n_seqs, t, t) <= 1.2 * peak
    # Four times the tokens have sixteen times the scores.
    assert taken.n_bytes(1, 400, 400) - 100 * few > 100 * (long - wide)


def test_bytes_of_scores_do_not_depend_on_how_far_mlx_runs_ahead(monkeypatch):
    """These peaks were measured on a busy machine, where a long call took 61.8 MB."""
    noisy = {(1, 16): 254_100, (4, 16): 1_388_052, (1, 64): 1_123_088}
    peaks = {**noisy, (4, 64): 6_406_996, (1, 256): 9_182_228}
    monkeypatch.setattr(small_calls, "_peak", lambda _, shape: peaks.get(shape, 9000))
    small = SmallCalls(SimpleNamespace())
    while small._is_due(512):
        small._measure_size(small._sizes[0], 1 << 30, lambda _: [])
    assert 61_788_188 < small.taken.n_bytes(1, 512, 1536) < 1.5 * 61_788_188


def test_a_size_without_room_leaves_the_estimate_of_the_one_before(monkeypatch):
    def peak(_call, shape):
        n_seqs, t = shape
        return 1000 * n_seqs * t

    monkeypatch.setattr(small_calls, "_peak", peak)
    few, many = SmallCalls(SimpleNamespace()), SmallCalls(SimpleNamespace())
    while few._is_due(255):
        few._measure_size(few._sizes[0], 100_000, lambda _: [])
    while many._is_due(256):
        many._measure_size(many._sizes[0], 100_000, lambda _: [])
    assert few.taken == many.taken and few._is_due(256) and not many._is_due(1 << 20)


@pytest.mark.parametrize("tokens", [1, 2, 5, 9, 20, 40, 90])
def test_estimates_from_few_tokens_suffice_and_stay_below_twice_the_need(
    tokens, monkeypatch
):
    """Measured calls keep to the room, which is that of a few tokens here."""

    def peak(_call, shape):
        n_seqs, t = shape
        return 3000 + 1000 * n_seqs * t + 2 * n_seqs * t * t

    def noted(call, shape):
        tried.append(peak(call, shape))
        return tried[-1]

    tried: list[int] = []
    monkeypatch.setattr(small_calls, "_peak", noted)
    small, room = SmallCalls(SimpleNamespace()), peak(None, (1, tokens))
    while small._sizes:
        small._measure_size(small._sizes[0], room, lambda _: [])
    assert max(tried) <= room
    for n_seqs, t in ((1, 100), (8, 100), (2, 300)):
        need, found = peak(None, (n_seqs, t)), small.taken.n_bytes(n_seqs, t, t)
        # An estimate from one token counts bytes of every call as bytes of a token.
        assert need <= found <= (8 if len(tried) < 3 else 2) * need
