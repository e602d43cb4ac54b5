"""Arguments of a call give the right logits, or one line that names the argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import ArraysCache, KVCache, make_prompt_cache
from test_calls_transforms import LAYERS, load, stock_of
from test_steps import Lazy, Traced
from tiny import make_checkpoint

from moeflux_mlx import device
from moeflux_mlx.calls.arguments import INTEGERS, bounded
from moeflux_mlx.engine.executors import EXECUTORS
from moeflux_mlx.errors import ModelError
from moeflux_mlx.experts.files.pack import pack

TOKENS = mx.array([[5, 6, 7]])
MODELS = {
    "eval": {},
    "train": {},
    "lazy": dict(executor="lazy"),
    "traced": dict(executor="traced"),
    "streamed": dict(packed=True, n_slots=5),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = tmp_path_factory.mktemp("arguments") / "plain"
    make_checkpoint(path, bits=4, **LAYERS)
    pack(path, path.with_name("packed"))
    return path


@pytest.fixture(scope="module", params=MODELS)
def model(request, plain):
    with pytest.MonkeyPatch.context() as patch:
        for executor in (Lazy, Traced):
            patch.setitem(EXECUTORS, executor.name, executor)
        model = load(plain, **MODELS[request.param])
        model.train(request.param == "train")
        mx.eval(model(TOKENS))
    return model


def caches(model, n_seqs: int = 1) -> list[Any]:
    """Caches after two tokens of each sequence."""
    made = make_prompt_cache(model)
    mx.eval(model(mx.array([[3, 4]] * n_seqs), cache=made))
    return made


def rows(plain, tokens: mx.array = TOKENS) -> mx.array:
    return stock_of(plain).language_model.model.embed_tokens(tokens)


TOKENS_REFUSED: dict[str, tuple[Any, str]] = {
    "above": (mx.array([[10**6]]), "from 0 to 319 but got 1000000"),
    "above-in-prompt": (mx.array([[1, 320, 2]]), "from 0 to 319 but got 320"),
    "below": (mx.array([[-1]]), "from 0 to 319 but got -1"),
    "beyond-int32": (mx.array([[1 << 40]], mx.int64), f"but got {1 << 40}"),
    "beyond-int64": ([[10**30]], "integer"),
    "list-above": ([[1, 320]], "but got 320"),
    "rank-0": (mx.array(1), r"\[B, T\]"),
    "rank-1": (mx.array([1, 2]), r"\[B, T\].* int32 of shape \[2\]"),
    "rank-3": (mx.array([[[1, 2]]]), r"\[B, T\].*\[1, 1, 2\]"),
    "list-of-rank-1": ([1, 2], r"\[B, T\]"),
    "list-of-no-shape": ([[1, 2], [3]], "rows of one length"),
    "list-of-floats": ([[1.5]], "integer"),
    "list-of-strings": ([["a"]], "integer"),
    "list-of-bools": ([[True]], "integer"),
    "empty-list": ([[]], "integer"),
    "none": (None, "integer .* got None"),
    "string": ("hello", "integer .* got 'hello'"),
    "number": (7, "integer .* got 7"),
    "numpy-floats": (np.array([[1.0]]), "integer .* got float64"),
    "floats": (mx.array([[1.0]]), "integer .* got float32"),
    "bools": (mx.array([[True]]), "integer .* got bool"),
    "no-sequence": (mx.zeros((0, 3), mx.int32), "at least one"),
    "no-token": (mx.zeros((1, 0), mx.int32), "at least one"),
}


def refuses(argument: str, why: str):
    return pytest.raises(ModelError, match=rf"\A\[{argument}\] expected [^\n]*{why}")


@pytest.mark.sampled
@pytest.mark.parametrize("case", TOKENS_REFUSED)
def test_invalid_tokens_are_refused(model, case):
    bad, why = TOKENS_REFUSED[case]
    with refuses("tokens", why):
        mx.eval(model(bad))
    with refuses("tokens", why):
        mx.eval(model.model(bad))
    held = caches(model)
    with refuses("tokens", why):
        mx.eval(model(bad, cache=held))
    assert held[1].offset == 2


@pytest.mark.parametrize("bad", [-1, 320, 10**6])
def test_a_gradient_at_an_id_outside_is_refused(plain, bad):
    model = load(plain)
    for trains in (True, False):
        model.train(trains)
        with refuses("tokens", f"but got {bad}"):
            nn.value_and_grad(model, lambda m: m(mx.array([[bad, 1]])).sum())(model)


@pytest.mark.parametrize(
    "same", [[[5, 6, 7]], ((5, 6, 7),), np.array([[5, 6, 7]]), TOKENS.astype(mx.uint8)]
)
def test_every_form_of_tokens_is_accepted(model, same):
    assert mx.array_equal(model(same), model(TOKENS))


@pytest.mark.sampled
@pytest.mark.parametrize("bad", [-1, 320, 1 << 40])
def test_lazy_ids_outside_the_vocabulary_give_nan(plain, bad):
    """A compiled call cannot check ids: bad sequences give NaN, others are right."""
    model = load(plain)
    call = mx.compile(lambda x: model(x))
    logits = call(mx.array([[5, 6], [bad, 7], [6, bad]], mx.int64))
    assert np.isnan(np.array(logits[1])).all()
    assert np.isnan(np.array(logits[2, 1])).all()
    wanted = stock_of(plain)(mx.array([[5, 6]]))
    assert np.allclose(np.array(logits[:1]), np.array(wanted), atol=1e-4)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_ids_of_every_type_are_moved_into_a_vocabulary(dtype):
    """A vocabulary may be larger than the type's numbers, and these larger than ids."""
    info, n = mx.iinfo(dtype), 300
    given = sorted({int(info.min), 0, 7, min(299, int(info.max)), int(info.max)})
    exact = np.array(given, str(dtype).removeprefix("mlx.core."))
    ids, inside = bounded(mx.array(exact), n)
    assert inside.tolist() == [0 <= number < n for number in given]
    assert all(0 <= number < n for number in ids.tolist())
    kept = [
        number
        for number, right in zip(ids.tolist(), inside.tolist(), strict=True)
        if right
    ]
    assert kept == [number for number in given if 0 <= number < n]


@pytest.mark.sampled
@pytest.mark.parametrize("executor", ["lazy", "traced"])
def test_a_single_id_that_is_never_read_back_gives_nan(plain, executor, monkeypatch):
    """On a GPU the token of a step is never read back to the host."""
    for each in (Lazy, Traced):
        monkeypatch.setitem(EXECUTORS, each.name, each)
    model, stock = load(plain, executor=executor), stock_of(plain)
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    for cached in (True, False):
        for bad in (-1, 320, 1 << 40):
            held = caches(model) if cached else None
            logits = model(mx.array([[bad]], mx.int64), cache=held)
            assert np.isnan(np.array(logits)).all()
        held, theirs = (caches(m) if cached else None for m in (model, stock))
        got, wanted = model(TOKENS[:, :1], cache=held), stock(TOKENS[:, :1], theirs)
        assert np.allclose(np.array(got), np.array(wanted), atol=1e-4)


ROWS_REFUSED: dict[str, tuple[Callable[[mx.array], Any], str]] = {
    "int32": (lambda x: x.astype(mx.int32), "float32, .* got int32"),
    "complex64": (lambda x: x.astype(mx.complex64), "float32, .* got complex64"),
    "longer": (lambda x: mx.concatenate([x, x], 1), r"tokens, \[1, 3\].*\[1, 6, 64\]"),
    "shorter": (lambda x: x[:, :1], r"tokens, \[1, 3\] .*\[1, 1, 64\]"),
    "more-sequences": (lambda x: mx.concatenate([x, x]), r"tokens, .*\[2, 3, 64\]"),
    "wider": (lambda x: mx.concatenate([x, x], -1), r"\[B, T, 64\].*128\]"),
    "narrower": (lambda x: x[..., :7], r"\[B, T, 64\].*\[1, 3, 7\]"),
    "rank-2": (lambda x: x[0], r"\[B, T, 64\].*\[3, 64\]"),
    "empty": (lambda x: x[:, :0], "at least one row"),
    "numpy-ints": (lambda x: np.zeros((1, 3, 64), np.int32), "an array of floats"),
    "string": (lambda x: "x", "an array of floats"),
    "list": (lambda x: x.tolist(), "an array of floats"),
}


@pytest.mark.sampled
@pytest.mark.parametrize("case", ROWS_REFUSED)
def test_invalid_embeddings_are_refused(model, plain, case):
    change, why = ROWS_REFUSED[case]
    for held in (None, caches(model)):
        with refuses("input_embeddings", why):
            model(TOKENS, cache=held, input_embeddings=change(rows(plain)))


def test_embeddings_need_no_tokens(model, plain):
    given = rows(plain)
    wanted = model(TOKENS, input_embeddings=given)
    assert np.allclose(np.array(wanted), np.array(model(TOKENS)), atol=1e-4)
    for tokens in (None, mx.array([])[None], TOKENS.tolist()):
        assert mx.array_equal(model(tokens, input_embeddings=given), wanted)
    on_host = np.array(given.astype(mx.float32))
    assert mx.array_equal(model(TOKENS, input_embeddings=on_host), wanted)


def states_of_two(model) -> list[Any]:
    return [*caches(model, 2)]


CACHES_REFUSED: dict[str, tuple[Callable[[Any], Any], str, str]] = {
    "short": (lambda m: caches(m)[:1], "cache", "2 caches.* got 1: make"),
    "long": (lambda m: [*caches(m), KVCache()], "cache", "2 caches.* got 3: make"),
    "empty": (lambda m: [], "cache", "2 caches.* got 0: make"),
    "string": (lambda m: "ab", "cache", "2 caches.* got 'ab'"),
    "one": (lambda m: KVCache(), "cache", "2 caches.* got KVCache"),
    "swapped": (lambda m: caches(m)[::-1], "cache of layer 0", "an ArraysCache"),
    "ints": (lambda m: [1, 2], "cache of layer 0", "an ArraysCache of 2 .* got 1"),
    "int-last": (lambda m: [ArraysCache(2), 2], "cache of layer 1", "got 2"),
    "small": (lambda m: [ArraysCache(1), KVCache()], "cache of layer 0", "of 2"),
    "two-sequences": (states_of_two, "cache", "of 1 sequences.* got 2 in .* layer 0"),
    "one-of-two": (
        lambda m: [caches(m)[0], caches(m, 2)[1]],
        "cache",
        "of 1 sequences.* got 2 in .* layer 1",
    ),
}


@pytest.mark.sampled
@pytest.mark.parametrize("case", CACHES_REFUSED)
def test_invalid_caches_are_refused(model, case):
    make, name, why = CACHES_REFUSED[case]
    for tokens in (TOKENS, TOKENS[:, :1]):
        held = make(model)
        with refuses(name, why):
            model(tokens, cache=held)
        with refuses(name, why):
            model.model(tokens, cache=held)


def test_caches_that_change_after_a_step_are_checked_again(model):
    held = caches(model)
    model(TOKENS[:, :1], cache=held)
    other = caches(model, 2)
    held[0].cache = other[0].cache
    with refuses("cache", "of 1 sequences"):
        model(TOKENS[:, :1], cache=held)


def test_caches_of_another_model_are_refused(model, plain, tmp_path):
    make_checkpoint(tmp_path / "other", **LAYERS, head_dim=64)
    held = caches(load(tmp_path / "other"))
    for tokens in (TOKENS, TOKENS[:, :1]):
        with refuses("cache of layer 1", r"shape \[any, \d+, any, \d+\].* got shape"):
            model(tokens, cache=held)


def test_a_tuple_of_caches_works_like_a_list(model):
    got = model(TOKENS, cache=tuple(caches(model)))
    assert mx.array_equal(got, model(TOKENS, cache=caches(model)))
