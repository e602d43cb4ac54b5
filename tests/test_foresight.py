"""Reading the next block's likely experts ahead of time changes no bit."""

from __future__ import annotations

import threading
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from test_ahead import N_EXPERTS, N_LAYERS, TOP_K, ids, run, streamed, write

from moeflux_mlx.calls.foresight import Choosers, WaitingCall, takes_input_alone


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny qwen3_moe of five layers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "scripts"))
        path = tmp_path_factory.mktemp("foresight") / "qwen3_moe"
        return write(path, "qwen3_moe", num_hidden_layers=N_LAYERS, head_dim=32)


@pytest.fixture(scope="module")
def wanted(checkpoint) -> mx.array:
    stock, _ = load_model(checkpoint)
    return run(stock, make_prompt_cache(stock), 6)


@pytest.mark.sampled
@pytest.mark.parametrize("n_slots", [1, TOP_K, 2 * TOP_K, 9, N_LAYERS * N_EXPERTS - 1])
def test_reading_ahead_changes_neither_bits_nor_counts(checkpoint, wanted, n_slots):
    totals = []
    for choice in ("off", "on"):
        ours = streamed(checkpoint, n_slots, "off", read_ahead=choice)
        assert mx.array_equal(wanted, run(ours, make_prompt_cache(ours), 6))
        totals.append(ours.streamer.stats.total)
    waiting, ahead = totals
    assert waiting.hits + waiting.misses == ahead.hits + ahead.misses
    assert waiting.read_ahead == 0
    # One slot is not enough for a token: its experts come in waves.
    assert bool(ahead.read_ahead) == (n_slots > TOP_K)
    assert ahead.read_ahead_used <= ahead.read_ahead


def test_a_guess_is_the_next_routers_choice_for_the_last_input(checkpoint, monkeypatch):
    stock, _ = load_model(checkpoint)
    ours = streamed(checkpoint, 9, "off", read_ahead="on")
    guesses: dict[int, list[int]] = {}
    inputs: dict[int, mx.array] = {}
    ask, mlp = Choosers.ask, type(stock.layers[0].mlp)

    def note(self: Choosers, number: int, x: mx.array) -> mx.array | None:
        found = ask(self, number, x)
        assert found is not None
        guesses[number] = sorted(found.flatten().tolist())
        return found

    def note_input(self: nn.Module, x: mx.array) -> mx.array:
        inputs[len(inputs)] = x
        return call(self, x)

    monkeypatch.setattr(Choosers, "ask", note)
    ours(ids(1), cache=make_prompt_cache(ours))
    call = mlp.__call__
    monkeypatch.setattr(mlp, "__call__", note_input)
    stock(ids(1), cache=make_prompt_cache(stock))
    assert list(guesses) == [*range(1, N_LAYERS)]
    for number, guess in guesses.items():
        scores = stock.layers[number].mlp.gate(inputs[number - 1]).flatten()
        assert guess == sorted(mx.argsort(scores)[-TOP_K:].tolist())


@pytest.mark.parametrize("family", ["gemma4_text", "deepseek_v41"])
def test_ids_passed_into_a_module_are_predicted_too(tmp_path, monkeypatch, family):
    """A block's module may receive ids that other modules chose."""
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "scripts"))
        path = write(tmp_path / family, family)
    stock, _ = load_model(path)
    wanted = run(stock, make_prompt_cache(stock), 4)
    ours = streamed(path, 3 * TOP_K, "off", read_ahead="on")
    assert mx.array_equal(wanted, run(ours, make_prompt_cache(ours), 4))
    guesses: list[list[int]] = []
    inputs: list[mx.array] = []
    ask, name = Choosers.ask, ".router" if family == "gemma4_text" else ".gate"
    routers = [
        module for path, module in sorted(stock.named_modules()) if path.endswith(name)
    ]

    def note(self: Choosers, number: int, x: mx.array) -> mx.array | None:
        found = ask(self, number, x)
        assert found is not None and number == 1
        guesses.append(sorted(found.flatten().tolist()))
        return found

    def note_input(self: nn.Module, x: mx.array) -> tuple[mx.array, mx.array]:
        inputs.append(x)
        return call(self, x)

    monkeypatch.setattr(Choosers, "ask", note)
    ours(ids(1), cache=make_prompt_cache(ours))
    call = type(routers[0]).__call__
    monkeypatch.setattr(type(routers[0]), "__call__", note_input)
    stock(ids(1), cache=make_prompt_cache(stock))
    assert guesses == [sorted(call(routers[1], inputs[0])[0].flatten().tolist())]


def test_several_sequences_are_predicted_together(checkpoint):
    stock, _ = load_model(checkpoint)
    wanted = run(stock, make_prompt_cache(stock), 4, n_seqs=3)
    ours = streamed(checkpoint, 5 * TOP_K, "off", read_ahead="on")
    assert mx.array_equal(wanted, run(ours, make_prompt_cache(ours), 4, n_seqs=3))
    assert ours.streamer.stats.total.read_ahead_used


def test_a_prompt_reads_each_expert_once_a_layer(checkpoint):
    # All experts of a layer are requested, in waves where not all have a slot.
    for n_slots in (3, N_EXPERTS, 2 * N_EXPERTS):
        ours = streamed(checkpoint, n_slots, "off", read_ahead="on")
        ours(ids(60), cache=make_prompt_cache(ours))
        for counters in ours.streamer.stats.snapshot().layers.values():
            assert counters.misses + counters.hits == counters.misses <= N_EXPERTS


class Refuses(nn.Module):
    """A chooser that cannot make a guess."""

    def __init__(self) -> None:
        super().__init__()
        self.n_asked = 0

    def __call__(self, x: mx.array) -> mx.array:
        self.n_asked += 1
        raise ValueError("another input")


def test_a_chooser_that_cannot_guess_is_asked_once():
    refuses, gives = Refuses(), nn.Identity()
    choosers = Choosers({0: refuses, 1: gives})
    assert choosers.ask(0, mx.ones(3)) is None and refuses.n_asked == 1
    # It ended without calling a block.
    assert choosers.ask(1, mx.ones(3)) is None
    assert 0 not in choosers and 1 not in choosers
    choosers.add(2, refuses, 0)
    assert choosers.ask(2, mx.ones(3)) is None and refuses.n_asked == 2
    # A module that hands ids to a block is found anew for every token.
    choosers.add(2, refuses, 0)
    assert 2 not in choosers


def test_only_a_chooser_of_one_array_is_asked():
    class TakesTwo(nn.Module):
        def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
            return x + mask

    class TakesAny(nn.Module):
        def __call__(self, *args: mx.array) -> mx.array:
            return args[0]

    assert takes_input_alone(nn.RMSNorm(4))
    assert not takes_input_alone(TakesTwo()) and not takes_input_alone(TakesAny())


def test_an_error_of_the_model_is_no_guess(checkpoint):
    ours = streamed(checkpoint, 9, "off", read_ahead="on")
    ours(ids(1), cache=make_prompt_cache(ours))
    with pytest.raises(ValueError, match=r"matmul|shape|dimension"):
        ours.layers[0].mlp(mx.ones((1, 1, 3)))
    assert ours(ids(1), cache=make_prompt_cache(ours)).shape == (1, 1, 128)


def test_a_block_called_by_another_thread_is_not_part_of_the_call(checkpoint):
    ours = streamed(checkpoint, 9, "off", read_ahead="on")
    ways = ours.__dict__["calls"].ways
    found: list[object] = []
    original = WaitingCall.block

    def note(self: WaitingCall, *args: object) -> mx.array:
        found.append(ways.token)
        other = threading.Thread(target=lambda: found.append(ways.token))
        other.start()
        other.join()
        return original(self, *args)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WaitingCall, "block", note)
        ours(ids(1), cache=make_prompt_cache(ours))
    assert len(found) > 2 * N_LAYERS and found[1::2] == [None] * (len(found) // 2)
    assert all(isinstance(token, WaitingCall) for token in found[::2])
    assert ways.token is None


def test_an_unfinished_call_is_not_part_of_the_next(checkpoint, wanted):
    ours = streamed(checkpoint, 9, "off", read_ahead="on")
    ways = ours.__dict__["calls"].ways
    ways._token, ways._thread = WaitingCall(None), threading.get_ident()
    ways._token._asks = True
    assert mx.array_equal(wanted, run(ours, make_prompt_cache(ours), 6))
    assert ways.token is None
