"""In a batch where some requests fail, the others get the answers they get alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from tiny import make_checkpoint

import moeflux_mlx
from moeflux_mlx import serving
from moeflux_mlx.errors import BudgetError, ExpertStoreError, ModelError
from moeflux_mlx.experts.files.packed import PackedExperts
from moeflux_mlx.measure.compare.measurement import greedy

N_TOKENS = 8
PROMPTS = [[5, 99, 300], [31], [7, 7, 7, 7, 250], [110, 12], [64, 65, 66, 67]]


def batches(model) -> serving.GuardedBatches:
    return serving.GuardedBatches(
        model, max_tokens=N_TOKENS, stream=mx.default_stream(mx.default_device())
    )


def serve(model, prompts) -> list[tuple[list[int], Exception | None]]:
    """Return each prompt's tokens and error as the server's loop sees them."""
    running = batches(model)
    uids = running.insert(prompts)
    tokens: dict[int, list[int]] = {uid: [] for uid in uids}
    errors: dict[int, Exception] = {}
    left = set(uids)
    while left:
        told, generated = running.next()
        assert told or generated
        for response in told:
            if isinstance(response.progress, Exception):
                errors[response.uid] = response.progress
        for response in generated:
            if response.uid not in errors:
                tokens[response.uid].append(response.token)
            if response.finish_reason is not None:
                left.remove(response.uid)
    assert running.next() == ([], [])
    return [(tokens[uid], errors.get(uid)) for uid in uids]


@pytest.fixture(scope="module")
def expected(checkpoint) -> list[list[int]]:
    """Each prompt's tokens with all experts in memory."""
    model, _ = moeflux_mlx.load(checkpoint)
    return [greedy(model, prompt, N_TOKENS)[0] for prompt in PROMPTS]


def damage(directory: Path, layer: int, expert: int) -> None:
    """Change a byte of one expert's record."""
    with PackedExperts.open(directory) as store:
        path, offset = store.path(layer), store.offset(layer, expert)
    with open(path, "r+b") as file:
        file.seek(offset + 5)
        byte = file.read(1)[0]
        file.seek(offset + 5)
        file.write(bytes([byte ^ 0xFF]))


def test_batches_of_streamed_experts_get_the_resident_models_tokens(
    packed, budget, expected
):
    model, _ = moeflux_mlx.load(packed, expert_memory=budget)
    assert serve(model, PROMPTS) == [(tokens, None) for tokens in expected]


@pytest.mark.sampled
@pytest.mark.parametrize("layer, expert", [(0, 7), (2, 0), (3, 0)])
def test_a_damaged_expert_ends_only_the_requests_that_need_it(
    layer, expert, packed, budget, expected, tmp_path
):
    path = Path(shutil.copytree(packed, tmp_path / "model"))
    damage(path, layer, expert)
    model, _ = moeflux_mlx.load(path, expert_memory=budget)
    alone = [serve(model, [prompt])[0] for prompt in PROMPTS]
    together = serve(model, PROMPTS)
    for (tokens, error), (own, own_error), right in zip(
        together, alone, expected, strict=True
    ):
        assert (tokens, str(error)) == (own, str(own_error))
        assert tokens == right[: len(tokens)]
        assert (error is None) == (len(tokens) == N_TOKENS)
        if error is not None:
            assert isinstance(error, ExpertStoreError)
            assert f"expert {expert} of layer {layer}" in str(error)
    failed = [error is not None for _, error in together]
    assert any(failed) and not all(failed)
    # The model still works for the next request.
    again = serve(model, PROMPTS)
    assert [(tokens, str(error)) for tokens, error in again] == [
        (tokens, str(error)) for tokens, error in together
    ]


def test_tokens_outside_the_vocabulary_end_their_own_request(packed, budget, expected):
    model, _ = moeflux_mlx.load(packed, expert_memory=budget)
    found = serve(model, [PROMPTS[0], [5, 10**6], PROMPTS[2]])
    assert isinstance(found[1][1], ModelError)
    assert [found[0], found[2]] == [(expected[0], None), (expected[2], None)]


def test_a_sampler_that_raises_harms_no_request_that_comes_later(
    packed, budget, expected
):
    model, _ = moeflux_mlx.load(packed, expert_memory=budget)
    running = batches(model)

    def broken(logprobs):
        raise TypeError("no sampler")

    (uid,) = running.insert([PROMPTS[0]], samplers=[broken])
    told = [r for _ in range(3) for r in running.next()[0] if r.uid == uid]
    assert any(isinstance(r.progress, TypeError) for r in told)
    running.remove([uid])
    running.insert([PROMPTS[2]])
    tokens = []
    while len(tokens) < N_TOKENS:
        tokens += [r.token for r in running.next()[1]]
    assert tokens == expected[2]


def test_caches_that_do_not_fit_end_the_longest_and_make_room_for_the_others(
    packed, budget, expected
):
    class Full:
        """Allow three sequences at a time."""

        scratch_bytes = 1 << 20

        def make_room(self, cache, n_seqs, t, *, logits=False, spares=False):
            if n_seqs > 3:
                raise BudgetError("[memory] full")
            return n_seqs * t

    model, _ = moeflux_mlx.load(packed, expert_memory=budget)
    model.runtime.keeper = Full()
    found = serve(model, PROMPTS)
    failed = [i for i, (_, error) in enumerate(found) if error is not None]
    assert failed and len(failed) <= 2
    for i, (tokens, error) in enumerate(found):
        assert tokens == expected[i][: len(tokens)]
        assert isinstance(error, BudgetError) if i in failed else error is None


def test_dropping_kept_prompts_lets_a_call_continue(tmp_path, monkeypatch):
    """Kept prompts are dropped one by one, oldest first, until a new one fits."""
    path = make_checkpoint(
        tmp_path / "model", num_key_value_heads=4, head_dim=256, vocab_size=320
    )
    model, _ = moeflux_mlx.load(path, memory="2GB")
    kept = serving.KeptPrompts(10)
    monkeypatch.setattr(serving.prompts, "_kept", {kept})
    for i in range(3):
        kept.insert_cache("model", [i, 1], make_prompt_cache(model))
    model.runtime.options = moeflux_mlx.engine.runtime.RunOptions(
        give_way=serving.release_oldest_prompt
    )

    class Until:
        """Allow the call once only one prompt is kept."""

        def make_room(self, cache, n_seqs, t, *, spares):
            if len(kept) > 1:
                raise BudgetError("[memory] full")
            return 64

    model.runtime.keeper = Until()
    assert model.runtime.make_room([None], 1, 1) == 64 and len(kept) == 1
    assert kept.fetch_nearest_cache("model", [2, 1, 5])[1] == [5]
    model.runtime.keeper.make_room = None
    assert serving.release_oldest_prompt() and not serving.release_oldest_prompt()


def test_a_prompt_that_is_kept_whole_is_read_again(packed, budget):
    """mlx-lm's batches need at least one token; without it the server would die."""
    model, _ = moeflux_mlx.load(packed, expert_memory=budget)
    kept = serving.KeptPrompts(10)
    kept.insert_cache("model", [1, 2, 3], make_prompt_cache(model))
    assert kept.fetch_nearest_cache("model", [1, 2, 3]) == (None, [1, 2, 3])
    kept.insert_cache("model", [9], None)
    assert len(kept) == 1
