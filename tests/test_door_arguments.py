"""Models of mlx-lm's classes refuse bad arguments as our own class does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from test_calls_arguments import (
    CACHES_REFUSED,
    ROWS_REFUSED,
    TOKENS,
    TOKENS_REFUSED,
    caches,
    plain,
    refuses,
)
from test_calls_transforms import stock_of

import moeflux_mlx
from moeflux_mlx import device
from moeflux_mlx.errors import ModelError

ROOT = Path(__file__).resolve().parents[1]
# Where the width is unknown, the model itself refuses a wrong one.
ROWS = ROWS_REFUSED.keys() - {"wider", "narrower", "rank-2", "empty"}
__all__ = ["plain"]


KINDS = ["experts", "memory", "pack"]


def bounded(kind: str, plain: Path) -> Any:
    bound = {"expert_memory": "4MB"}
    path = plain.with_name("packed") if kind == "pack" else plain
    if kind == "memory":
        bound = {"memory": "3GB"}
    return moeflux_mlx.load(path, native=False, **bound)[0]


@pytest.fixture(scope="module", params=KINDS)
def model(request, plain) -> Any:
    return bounded(request.param, plain)


@pytest.mark.sampled
@pytest.mark.parametrize("case", TOKENS_REFUSED)
def test_invalid_tokens_are_refused(model, case):
    bad, why = TOKENS_REFUSED[case]
    for call in (model, model.language_model, model.language_model.model):
        with refuses("tokens", why):
            mx.eval(call(bad))
    held = caches(model)
    with refuses("tokens", why):
        mx.eval(model(bad, cache=held))
    assert held[1].offset == 2
    assert model(TOKENS, cache=held).shape == (1, 3, 320)


@pytest.mark.parametrize("case", sorted(ROWS))
def test_invalid_embeddings_are_refused(model, plain, case):
    change, why = ROWS_REFUSED[case]
    rows = stock_of(plain).language_model.model.embed_tokens(TOKENS)
    for held in (None, caches(model)):
        with refuses("input_embeddings", why):
            model(TOKENS, cache=held, input_embeddings=change(rows))


@pytest.mark.parametrize("case", CACHES_REFUSED)
def test_invalid_caches_are_refused(model, case):
    make, name, why = CACHES_REFUSED[case]
    why = why.replace("an ArraysCache of 2", "a cache like ArraysCache")
    why = why.replace("an ArraysCache", "a cache like ArraysCache")
    why = why.replace("of 2", "a cache like ArraysCache") if case == "small" else why
    for tokens in (TOKENS, TOKENS[:, :1]):
        with refuses(name, why):
            model(tokens, cache=make(model))


@pytest.mark.parametrize(
    "same", [[[5, 6, 7]], ((5, 6, 7),), np.array([[5, 6, 7]]), TOKENS.astype(mx.uint8)]
)
def test_every_form_of_tokens_is_accepted(model, same):
    assert mx.array_equal(model(same), model(TOKENS))


def test_a_gradient_at_an_id_outside_is_refused(model):
    def loss(model: nn.Module, bad: int) -> mx.array:
        return model(mx.array([[bad, 1]])).sum()

    for bad in (-1, 320):
        with refuses("tokens", f"but got {bad}"):
            nn.value_and_grad(model, loss)(model, bad)


@pytest.mark.parametrize("kind", KINDS)
def test_an_id_that_is_never_read_back_gives_nan(kind, plain, monkeypatch):
    """On a GPU with all experts in memory, a token is never read back to the host."""
    # A new model: after gradients, a planned model streams its experts.
    model, stock = bounded(kind, plain), stock_of(plain)
    assert model.streamer.resident
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    for bad in (-1, 320, 1 << 40):
        logits = model(mx.array([[bad]], mx.int64), cache=make_prompt_cache(model))
        assert np.isnan(np.array(logits)).all()
        assert mx.array_equal(model(TOKENS[:, :1]), stock(TOKENS[:, :1]))


@pytest.mark.sampled
@pytest.mark.parametrize(
    "family", ["gpt_oss", "gemma4", "longcat_flash_ngram", "deepseek_v32", "phixtral"]
)
def test_every_family_refuses_them_alike(family, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import family_trials

    family_trials.write_model(tmp_path, family, 4)
    model = family_trials.stream_least(tmp_path)
    wanted = np.array(model(mx.array([[5, 6]])))
    for bad in ([[128]], [[5, -1]], [[1 << 40]], [5, 6], [[]], None, [[0.5]]):
        tokens = bad if bad is None else mx.array(np.array(bad))
        with pytest.raises(ModelError, match=r"\[tokens\] expected"):
            model(tokens)
    held = make_prompt_cache(model)
    with pytest.raises(ModelError, match=r"\[cache\] expected a list of"):
        model(mx.array([[5]]), cache=held[:-1])
    model(mx.array([[5, 6], [7, 8]]), cache=held)
    with pytest.raises(ModelError, match=r"\[cache\] expected caches of 1 sequences"):
        model(mx.array([[5]]), cache=held)
    assert np.array_equal(np.array(model([[5, 6]])), wanted)
