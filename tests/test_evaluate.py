"""mlx-lm's own scoring and batching, on our model."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.generate import batch_generate, generate_step
from mlx_lm.models.cache import ArraysCache, BatchKVCache
from mlx_lm.perplexity import eval_ppl

import moeflux_mlx
from moeflux_mlx.measure.compare import log_likelihood, perplexity

PROMPTS = [[7], [1, 2, 3], [9, 8, 7, 6, 5, 4, 3], list(range(20, 83))]
N_TOKENS = 12
REQUESTS = [
    ("def add(a, b):", " return a + b"),
    ("def add(a, b):", " x"),
    ("import", " os\n"),
    ("one two three", "!"),
]


@pytest.fixture(scope="module")
def stock(checkpoint: Path):
    """Stock mlx-lm's model and tokenizer."""
    return mlx_lm.load(str(checkpoint))


@pytest.fixture(scope="module", params=["plain", "packed", "streamed"])
def ours(request, checkpoint: Path, packed: Path, budget: str):
    """Our model: experts as parameters, all in the pool, or a quarter in the pool."""
    if request.param == "plain":
        return moeflux_mlx.load(checkpoint)[0]
    memory = budget if request.param == "streamed" else None
    return moeflux_mlx.load(packed, expert_memory=memory)[0]


def greedy(model, prompt: list[int]) -> list[int]:
    steps = generate_step(mx.array(prompt), model, max_tokens=N_TOKENS)
    return [int(token) for token, _ in steps]


def until_end(tokens: list[int], tokenizer) -> list[int]:
    ends = tokenizer.eos_token_ids
    return list(itertools.takewhile(lambda token: token not in ends, tokens))


@pytest.mark.sampled
def test_mlx_lm_perplexity_scores_a_batch_as_stock(stock, ours):
    mx.random.seed(3)
    rows = mx.random.randint(0, 320, (5, 33))
    expected = eval_ppl(stock[0], rows, batch_size=3)
    assert eval_ppl(ours, rows, batch_size=3) == pytest.approx(expected, rel=1e-4)


def test_our_perplexity_is_mlx_lms_whatever_the_pieces(stock):
    mx.random.seed(4)
    tokens = mx.random.randint(0, 320, (300,)).tolist()
    expected = eval_ppl(stock[0], mx.array([tokens]))[0]
    assert perplexity(stock[0], tokens) == pytest.approx(expected, rel=1e-4)


def test_continuations_have_stock_log_likelihoods(stock, ours):
    for prompt in PROMPTS[1:]:
        expected = log_likelihood(stock[0], prompt)
        assert log_likelihood(ours, prompt) == pytest.approx(expected, rel=1e-4)


def test_mlx_lm_evaluate_scores_a_packed_directory_as_stock(checkpoint, packed):
    evaluate = pytest.importorskip("mlx_lm.evaluate", reason="needs lm_eval")
    requests = [SimpleNamespace(args=pair) for pair in REQUESTS]
    texts = [SimpleNamespace(args=("".join(pair),)) for pair in REQUESTS]
    expected = evaluate.MLXLM(str(checkpoint))
    found = evaluate.MLXLM(str(packed), trust_remote_code=True)
    for (score, is_greedy), (stock_score, stock_is_greedy) in zip(
        found.loglikelihood(requests), expected.loglikelihood(requests), strict=True
    ):
        assert score == pytest.approx(stock_score, rel=1e-4)
        assert is_greedy == stock_is_greedy
    assert found.loglikelihood_rolling(texts) == pytest.approx(
        expected.loglikelihood_rolling(texts), rel=1e-4
    )


@pytest.mark.sampled
def test_a_batch_of_unequal_prompts_generates_the_tokens_of_each_alone(stock, ours):
    tokenizer = stock[1]
    alone = [until_end(greedy(ours, prompt), tokenizer) for prompt in PROMPTS]
    batch = batch_generate(
        ours, tokenizer, PROMPTS, max_tokens=N_TOKENS, return_token_ids=True
    )
    assert batch.token_ids == alone
    assert alone == [until_end(greedy(stock[0], p), tokenizer) for p in PROMPTS]


@pytest.mark.sampled
def test_a_batch_has_stock_log_probabilities(stock, ours):
    options = {"max_tokens": N_TOKENS, "return_logprobs": True}
    expected = batch_generate(*stock, PROMPTS, **options).logprobs
    found = batch_generate(ours, stock[1], PROMPTS, **options).logprobs
    for ours_row, stock_row in zip(found, expected, strict=True):
        assert ours_row == pytest.approx(stock_row, rel=1e-4, abs=1e-4)


@pytest.mark.sampled
def test_prompts_that_join_later_generate_their_tokens_alone(stock, ours):
    tokenizer = stock[1]
    options = {"max_tokens": [4, 12, 7, 9], "return_token_ids": True}
    batch = batch_generate(
        ours,
        tokenizer,
        PROMPTS,
        completion_batch_size=2,
        prefill_batch_size=1,
        **options,
    )
    alone = [
        until_end(greedy(ours, prompt)[:n_tokens], tokenizer)
        for prompt, n_tokens in zip(PROMPTS, options["max_tokens"], strict=True)
    ]
    assert batch.token_ids == alone


@pytest.mark.parametrize("n_left", [1, 5])
def test_left_padding_changes_no_logit(stock, ours, n_left):
    short, long = PROMPTS[1], PROMPTS[3][: n_left + 3]
    tokens = mx.array([[0] * n_left + short, long])
    found = ours(tokens, cache=left_padded_cache(ours, [n_left, 0]))
    expected = stock[0](tokens, cache=left_padded_cache(stock[0], [n_left, 0]))
    for logits in (expected[0, n_left:], ours(mx.array([short]))[0]):
        assert relative_rms(found[0, n_left:], logits) < 1e-4
    for logits in (expected[1], ours(mx.array([long]))[0]):
        assert relative_rms(found[1], logits) < 1e-4


def left_padded_cache(model, left_padding: list[int]) -> list:
    return [
        ArraysCache(2, left_padding)
        if isinstance(cache, ArraysCache)
        else BatchKVCache(left_padding)
        for cache in model.make_cache()
    ]


def relative_rms(found: mx.array, expected: mx.array) -> float:
    error = mx.square(found - expected).sum() / mx.square(expected).sum()
    return float(mx.sqrt(error))
