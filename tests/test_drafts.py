"""Drafts for, and by, models whose caches cannot be trimmed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from commands import moeflux
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache
from native_models import least, load, relative_rms, tokens
from test_steps import Lazy, Traced
from tiny import make_checkpoint, make_gpt_oss, make_qwen3_moe, make_qwen3_next

import moeflux_mlx
from moeflux_mlx.drafts import GoesBack
from moeflux_mlx.engine.executors import EXECUTORS
from moeflux_mlx.errors import ModelError
from moeflux_mlx.experts.files.pack import pack

# States of linear attention, windows of eight tokens, and caches that mlx-lm trims.
FAMILIES = {
    "qwen3_5_moe": partial(
        make_checkpoint, num_hidden_layers=2, full_attention_interval=2
    ),
    "qwen3_next": partial(make_qwen3_next, num_hidden_layers=2),
    "gpt_oss": partial(make_gpt_oss, num_hidden_layers=2, layer_types=None),
    "qwen3_moe": partial(make_qwen3_moe, num_hidden_layers=2),
}
HELPED = ["qwen3_5_moe", "qwen3_next", "gpt_oss"]
PROMPT = tokens(13, seed=2)[0]
N_TOKENS = 12


@pytest.fixture(scope="module", params=HELPED)
def plain(request, tmp_path_factory):
    return FAMILIES[request.param](tmp_path_factory.mktemp("drafts") / "plain")


def few(path, **options):
    """Load a model with memory for few experts."""
    return load(path, expert_memory=least(path, 1), **options)


def alone(model, cache=None) -> list[int]:
    """Return greedy tokens without a draft."""
    steps = generate_step(PROMPT, model, max_tokens=N_TOKENS, prompt_cache=cache)
    return [int(token) for token, _ in steps]


def drafted(model, draft, n: int, cache=None) -> list[tuple[int, bool]]:
    """Return greedy tokens with a draft, and which of them it guessed."""
    options = {"num_draft_tokens": n, "max_tokens": N_TOKENS, "prompt_cache": cache}
    steps = speculative_generate_step(PROMPT, model, draft, **options)
    return [(int(token), by_draft) for token, _, by_draft in steps]


class Guesses:
    """A model that repeats another one's tokens, except for some.

    Args:
        period: every ``period``-th token is changed.
    """

    def __init__(self, model, period: int):
        self._model, self._period, self._n = model, period, 0
        self.layers = model.layers

    def make_cache(self) -> list:
        return make_prompt_cache(self._model)

    def __call__(self, tokens, cache):
        logits = self._model(tokens, cache=cache)
        self._n += 1
        return -logits if self._n % self._period == 0 else logits


@pytest.mark.sampled
@pytest.mark.parametrize("n", [3, 1])
def test_tokens_are_those_without_a_draft(plain, n):
    """The draft is always, sometimes or never right."""
    expected = alone(few(plain))
    guessed = []
    for period in (10**6, 2, 1):
        found = drafted(few(plain), Guesses(few(plain), period), n)
        assert [token for token, _ in found] == expected, period
        guessed.append(sum(by_draft for _, by_draft in found))
    right, sometimes, never = guessed
    # All but one after n tokens are guessed, as the draft's caches go back exactly too.
    assert right == N_TOKENS - -(-N_TOKENS // (n + 1)) > sometimes > never == 0


@pytest.mark.sampled
def test_given_caches_hold_all_tokens_afterwards(plain):
    """Generation continues from them as it would without a draft."""
    model, draft = few(plain), Guesses(few(plain), 2)
    own, other = make_prompt_cache(model), make_prompt_cache(draft)
    expected = alone(model, cache := make_prompt_cache(model))
    # mlx-lm puts the last token into the cache only when it computes another one.
    wanted = model(mx.array([[7]]), cache=cache)
    found = [token for token, _ in drafted(model, draft, 3, [*own, *other])]
    assert found == expected
    offsets = {c.offset for c in (*own, *other) if hasattr(c, "offset")}
    assert offsets == {len(PROMPT) + N_TOKENS - 1}, offsets
    for each in (model, draft._model):
        again = own if each is model else other
        each(mx.array([[expected[-1]]]), cache=again)
    got = model(mx.array([[7]]), cache=own)
    assert relative_rms(got, wanted) < 1e-5


def calls_and_returns() -> Iterator[tuple[str, int]]:
    """Yield the number of tokens in a call, and how many are taken back after it."""
    rng = np.random.RandomState(1)
    for _ in range(8):
        added = 0
        for _ in range(rng.randint(1, 4)):
            n = int(rng.randint(1, 4))
            added += n
            yield "call", n
        yield "back", int(rng.randint(0, min(3, added) + 1))


@pytest.mark.sampled
def test_logits_follow_only_the_remaining_tokens(plain):
    """Tokens that were taken back leave no effect, however often that happens."""
    hold_to_logits(few(plain))


@pytest.mark.slow
@pytest.mark.parametrize("executor", [Lazy, Traced])
def test_logits_of_tokens_that_run_ahead_follow_only_the_remaining_tokens(
    plain, executor, monkeypatch
):
    monkeypatch.setitem(EXECUTORS, executor.name, executor)
    options = {"executor": executor.name, "optimistic": "on"}
    model = load(plain, expert_memory=least(plain, 9), **options)
    hold_to_logits(model)


@pytest.mark.slow
def test_logits_of_mlx_lms_classes_follow_only_the_remaining_tokens(plain):
    budget = {"expert_memory": least(plain, 1)}
    hold_to_logits(moeflux_mlx.load(plain, native=False, **budget)[0])


def hold_to_logits(model) -> None:
    """Take tokens back at random; compare logits with a call of the other tokens."""
    rng = np.random.RandomState(0)
    back = GoesBack(model, make_prompt_cache(model), 3)
    stay = [3, 4, 5, 6, 7]
    back(mx.array([stay], mx.uint32), back.layers)
    for kind, n in calls_and_returns():
        if kind == "back":
            back.layers[0].trim(n)
            stay = stay[: len(stay) - n]
            continue
        new = rng.randint(1, 320, n).tolist()
        stay += new
        got = back(mx.array([new], mx.uint32), back.layers)
        expected = model(mx.array([stay]))[:, -n:]
        assert relative_rms(got, expected) < 1e-5
    back.settle()
    assert {c.offset for c in back._caches if hasattr(c, "offset")} == {len(stay)}
    with pytest.raises(ModelError, match=r"\[draft\] expected at most 3 tokens"):
        back.go_back(len(stay) + 1)


@pytest.mark.sampled
def test_a_failed_call_ends_drafting_with_its_own_error(plain, monkeypatch):
    model = few(plain)
    steps = speculative_generate_step(PROMPT, model, few(plain), max_tokens=9)
    next(steps)
    monkeypatch.setattr(type(model), "__call__", fail)
    with pytest.raises(KeyboardInterrupt):
        list(steps)


def fail(*_arguments, **_options):
    raise KeyboardInterrupt


@pytest.mark.parametrize("plain", ["qwen3_5_moe"], indirect=True)
def test_a_cache_that_cannot_be_rewound_is_refused(plain):
    class Other(RotatingKVCache):
        """A user's own cache."""

    model = few(plain)
    given = [Other(8) for _ in model.layers] + make_prompt_cache(model)
    with pytest.raises(ModelError, match=r"can go back but got Other"):
        drafted(model, model, 2, given)
    with pytest.raises(ModelError, match=r"caches of both models, 2 more .* got 0"):
        drafted(model, model, 2, make_prompt_cache(model))
    steps = speculative_generate_step(PROMPT, model, model, kv_bits=4)
    with pytest.raises(ModelError, match=r"\[draft\].*kv_bits: leave it out"):
        next(steps)


def test_models_of_mlx_lm_alone_are_left_unchanged(tmp_path):
    model, _ = mlx_lm.load(str(make_checkpoint(tmp_path / "plain")))
    steps = speculative_generate_step(PROMPT, model, model, max_tokens=3)
    with pytest.raises(ValueError, match="requires a trimmable prompt cache"):
        next(steps)


def test_caches_that_mlx_lm_can_trim_are_left_to_mlx_lm(tmp_path, monkeypatch):
    plain = FAMILIES["qwen3_moe"](tmp_path / "plain")
    monkeypatch.setattr(GoesBack, "__init__", fail)
    expected = alone(few(plain))
    found = drafted(few(plain), Guesses(few(plain), 2), 3)
    assert [token for token, _ in found] == expected


@pytest.mark.slow
@pytest.mark.parametrize("plain", ["qwen3_5_moe"], indirect=True)
def test_commands_take_a_draft(plain, tmp_path):
    """The draft is a pack too; the text is the same as without a draft."""
    pack(plain, packed := tmp_path / "packed")
    flags = ["generate", "--model", packed, "--prompt", "ab", "-m", 8]
    flags += ["--verbose", "False"]
    expected = moeflux(*flags)
    done = moeflux(*flags, "--draft-model", packed, "--num-draft-tokens", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected.stdout
