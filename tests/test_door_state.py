"""Runs of mlx-lm's classes continue from saved states with the same bits."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache
from mlx_lm.utils import load_model
from test_state import rewrite
from tiny import write_tokenizer

import moeflux_mlx
from moeflux_mlx import load_state, save_state
from moeflux_mlx.cli import main as moeflux
from moeflux_mlx.errors import StateError
from moeflux_mlx.experts.files.pack import pack
from moeflux_mlx.state import check_keeps_state

ROOT = Path(__file__).resolve().parents[1]
VOCAB = 128
PROMPT, LONG = [7, 31, 100, 5, 90], [*range(1, 71)]


@pytest.fixture(scope="module", autouse=True)
def scripts():
    """Make the scripts' modules importable."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Callable[..., Path]:
    """Tiny models on disk, by family, plain or packed."""
    import family_trials

    @functools.cache
    def write(family: str, packed: bool = False) -> Path:
        if packed:
            plain = write(family)
            pack(plain, plain.with_name("packed"))
            return plain.with_name("packed")
        path = tmp_path_factory.mktemp("door-state") / "plain"
        path.mkdir()
        family_trials.write_model(path, family, 4)
        write_tokenizer(path, VOCAB)
        return path

    return write


def opened(path: Path, **bound: Any) -> Any:
    return moeflux_mlx.load(path, native=False, **(bound or {"memory": "4GB"}))[0]


def run(model: Any, cache: list[Any], tokens: list[int], n: int) -> list[mx.array]:
    """Return logits of ``tokens`` and of ``n`` greedy tokens; all go into the cache."""
    found = [model(mx.array([tokens]), cache=cache)]
    for _ in range(n):
        tokens.append(int(found[-1][0, -1].argmax()))
        found.append(model(mx.array([tokens[-1:]]), cache=cache))
    return found


# Windows, states of linear attention, lists of caches, chunks; packed or plain.
FORMS = {
    "qwen3_moe": (False, {"memory": "4GB"}),
    "gpt_oss": (True, {"memory": "4GB"}),
    "qwen3_next": (False, {"expert_memory": "3MB"}),
    "deepseek_v32": (True, {"expert_memory": "3MB"}),
    "llama4": (False, {"expert_memory": "3MB"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FORMS)
def test_a_run_continues_with_the_same_bits(written, family, tmp_path):
    packed, bound = FORMS[family]
    path = written(family, packed)
    model, again = opened(path, **bound), opened(path, **bound)
    stock = load_model(written(family))[0]
    for prompt in (PROMPT, LONG):
        tokens, held = [*prompt], make_prompt_cache(model)
        run(model, held, tokens, 40)
        save_state(tmp_path / "state", model, held, tokens)
        experts = model.streamer.held
        state = load_state(tmp_path / "state", again)
        assert state.tokens == tokens and again.streamer.held == experts
        assert [type(c) for c in state.cache] == [type(c) for c in held]
        theirs = make_prompt_cache(stock)
        run(stock, theirs, [*prompt], 40)
        # Meanwhile a window wraps, a prompt puts it in order, and it wraps again.
        for more in ([3], [44, 3, 101] * 4, [5]):
            wanted = run(model, held, [*more], 3)
            for each, own in ((again, state.cache), (stock, theirs)):
                got = run(each, own, [*more], 3)
                assert all(map(mx.array_equal, got, wanted))


def test_a_state_of_the_plain_checkpoint_serves_its_pack(written, tmp_path):
    plain, packed = opened(written("gpt_oss")), opened(written("gpt_oss", True))
    tokens, held = [*LONG], make_prompt_cache(plain)
    run(plain, held, tokens, 3)
    save_state(tmp_path / "state", plain, held, tokens)
    state = load_state(tmp_path / "state", packed)
    wanted, got = run(plain, held, [9], 3), run(packed, state.cache, [9], 3)
    assert all(map(mx.array_equal, got, wanted))


# Two layers that compress 4 tokens into one, and one that reads the first's cache.
COMPRESSED = {
    "num_hidden_layers": 3,
    "compress_ratios": [4, 4, 4],
    "kv_source_layer_ids": [0, 2],
    "index_source_layer_ids": [0, 2],
    "index_topk": 4,
    "sliding_window": 16,
}


@pytest.fixture(scope="module")
def compressed(tmp_path_factory) -> tuple[Path, Path]:
    """A model with its own class of caches, plain and packed."""
    import family_trials

    path = tmp_path_factory.mktemp("compressed") / "plain"
    path.mkdir()
    family_trials.write_model(path, "deepseek_v41", 4, **COMPRESSED)
    write_tokenizer(path, VOCAB)
    pack(path, path.with_name("packed"))
    return path, path.with_name("packed")


@pytest.mark.sampled
@pytest.mark.parametrize("prompt", [PROMPT, LONG], ids=len)
def test_caches_of_a_models_own_class_are_kept_too(compressed, prompt, tmp_path):
    plain, packed = (opened(path, expert_memory="3MB") for path in compressed)
    stock = load_model(compressed[0])[0]
    tokens, held = [*prompt], make_prompt_cache(plain)
    run(plain, held, tokens, 6)
    save_state(tmp_path / "state", plain, held, tokens)
    state = load_state(tmp_path / "state", packed)
    assert [vars(c).keys() for c in state.cache] == [vars(c).keys() for c in held]
    assert held[0].compress_kv.shape[1] == len(tokens) // 4
    theirs = make_prompt_cache(stock)
    run(stock, theirs, [*prompt], 6)
    for more in ([3], [44, 3, 101] * 4, [5]):
        wanted = run(stock, theirs, [*more], 3)
        for model, own in ((plain, held), (packed, state.cache)):
            assert all(map(mx.array_equal, run(model, own, [*more], 3), wanted))


def test_impossible_caches_of_a_models_own_class_are_refused(compressed, tmp_path):
    model = opened(compressed[0], expert_memory="3MB")
    tokens, held = [*LONG], make_prompt_cache(model)
    run(model, held, tokens, 3)
    for wrong, error in (
        (tokens[2:], r"expected compress_kv \(\(1, 17, 16\), .* got \(\(1, 18, 16\)"),
        ([*tokens, 1], "layer 0: expected offset 74 but got 73"),
    ):
        with pytest.raises(StateError, match=error):
            save_state(tmp_path / "state", model, held, wrong)
    save_state(tmp_path / "state", model, held, tokens)
    for fields, error in (
        ({"kind": "KVCache"}, "layer 0: kind LayerCache but got KVCache"),
        ({"offset": 4}, "layer 0: fields"),
    ):
        changed = rewrite(
            tmp_path / "state", lambda _, about, f=fields: change_first(about, f)
        )
        with pytest.raises(StateError, match=error):
            load_state(changed, model)
    held[0].window = held[0].window[:, 1:]
    with pytest.raises(StateError, match=r"layer 0: expected window .* but got"):
        save_state(tmp_path / "state", model, held, tokens)


def test_a_window_added_by_a_user_is_saved_too(written, tmp_path):
    model = opened(written("qwen3_moe"))
    tokens, held = [*LONG], [RotatingKVCache(32, keep=4) for _ in model.layers]
    run(model, held, tokens, 40)
    save_state(tmp_path / "state", model, held, tokens)
    state = load_state(tmp_path / "state", model)
    assert (state.cache[0].max_size, state.cache[0].keep) == (32, 4)
    wanted, got = run(model, held, [9], 40), run(model, state.cache, [9], 40)
    assert all(map(mx.array_equal, got, wanted))


def test_quantised_caches_are_kept_too(tmp_path, monkeypatch):
    import families
    import family_trials

    own = {**families.FAMILIES["qwen3_moe"], "head_dim": 32}
    monkeypatch.setitem(families.FAMILIES, "qwen3_moe", own)
    family_trials.write_model(tmp_path, "qwen3_moe", 4)
    write_tokenizer(tmp_path, VOCAB)
    model = opened(tmp_path)
    tokens, held = [*LONG], make_prompt_cache(model)
    run(model, held, tokens, 3)
    held = [c.to_quantized(32, 8) for c in held]
    save_state(tmp_path / "state", model, held, tokens)
    state = load_state(tmp_path / "state", model)
    wanted, got = run(model, held, [9], 3), run(model, state.cache, [9], 3)
    assert all(map(mx.array_equal, got, wanted))


@pytest.fixture(scope="module")
def window(written, tmp_path_factory) -> tuple[Any, Path]:
    """A model with a window of 32 rows, and a state of 91 tokens, so it has wrapped."""
    model = opened(written("gpt_oss"))
    path = tmp_path_factory.mktemp("window") / "state"
    tokens, held = [*LONG], make_prompt_cache(model)
    run(model, held, tokens, 21)
    save_state(path, model, held, tokens)
    assert held[0]._idx == 21 and held[0].offset == 91
    return model, path


def change_first(about: dict[str, str], fields: dict[str, Any]) -> None:
    found = json.loads(about["layers"])
    found[0].update(fields)
    about["layers"] = json.dumps(found)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"max_size": 64}, "layer 0: max_size 32 but got 64"),
        ({"max_size": 0}, "layer 0: max_size an integer from"),
        ({"max_size": True}, "layer 0: max_size an integer from"),
        ({"keep": 4}, "layer 0: keep 0 but got 4"),
        ({"keep": -1}, "layer 0: keep an integer from 0"),
        ({"index": 0}, "layer 0: index an integer from 1 to 32"),
        ({"index": 33}, "layer 0: index an integer from 1 to 32"),
        ({"index": 1.0}, "layer 0: index an integer from 1 to 32"),
        ({"rows": 31}, "layer 0: rows an integer from 32 to 91"),
        ({"rows": 92}, "layer 0: rows an integer from 32 to 91"),
        ({"rows": 40, "index": 40}, r"shape of layers.0.0 \(1, 2, 40, 16\)"),
        ({"kind": "KVCache"}, r"layer 0: kind one of \['RotatingKVCache'\]"),
        ({"kind": "CacheList"}, "layer 0: kind one of"),
        ({"more": 1}, "layer 0: fields"),
    ],
)
def test_an_impossible_window_is_refused(window, fields, error):
    model, path = window
    held = model.streamer.held
    changed = rewrite(path, lambda _, about: change_first(about, fields))
    with pytest.raises(StateError, match=error):
        load_state(changed, model)
    assert model.streamer.held == held


@pytest.mark.parametrize(
    ("family", "wrong"),
    [
        (
            "llama4",
            [
                ({"start_position": 75}, "start_position an integer from 0 to 74"),
                ({"start_position": -1}, "start_position an integer from 0 to 74"),
                ({"chunk_size": 1}, "chunk_size 64 but got 1"),
            ],
        ),
        (
            "deepseek_v32",
            [
                ({"caches": {}}, "layer 0: caches a list"),
                ({"caches": []}, "layer 0: caches 2 but got 0"),
                ({"caches": [{}, {}]}, "layer 0, cache 0: kind one of"),
            ],
        ),
    ],
)
def test_impossible_lists_and_chunks_are_refused(written, family, wrong, tmp_path):
    model = opened(written(family), expert_memory="3MB")
    tokens, held = [*LONG], make_prompt_cache(model)
    run(model, held, tokens, 5)
    save_state(tmp_path / "state", model, held, tokens)
    for fields, error in wrong:
        changed = rewrite(
            tmp_path / "state", lambda _, about, f=fields: change_first(about, f)
        )
        with pytest.raises(StateError, match=error):
            load_state(changed, model)


def test_a_state_of_another_model_or_of_other_tokens_is_refused(
    written, window, tmp_path
):
    other = opened(written("qwen3_moe"))
    with pytest.raises(StateError, match=r"expected model \w+ but got \w+"):
        load_state(window[1], other)
    tokens, held = [*PROMPT], make_prompt_cache(other)
    run(other, held, tokens, 3)
    for own, ids, error in (
        (held[:1], tokens, "number of layers 2 but got 1"),
        (held, tokens[1:], "layer 0: expected tokens 7 but got 8"),
        (held, [*tokens[1:], VOCAB], "ids from 0 to 127"),
        (make_prompt_cache(other), tokens, "expected a cache with tokens"),
    ):
        with pytest.raises(StateError, match=error):
            save_state(tmp_path / "state", other, own, ids)
    batch = make_prompt_cache(other)
    mx.eval(other(mx.array([PROMPT, PROMPT]), cache=batch))
    with pytest.raises(StateError, match=r"shape of layers.0.0 \(1, .* but got \(2"):
        save_state(tmp_path / "state", other, batch, PROMPT)
    assert not (tmp_path / "state").exists()


def test_unsavable_caches_are_reported_before_generation(written):
    check_keeps_state(opened(written("qwen3_moe")))
    with pytest.raises(StateError, match="load it with a bound on memory"):
        check_keeps_state(moeflux_mlx.load(written("qwen3_moe"))[0])


@pytest.mark.slow
def test_generate_continues_from_a_file(written, tmp_path, capsys):
    path, file = written("gpt_oss", True), tmp_path / "state"
    model, tokenizer = moeflux_mlx.load(path, memory="4GB")

    def generate(prompt: str, *flags: object) -> str:
        command = ["generate", "--model", path, "--memory", "4GB", "-m", 8]
        more = ["--ignore-chat-template", "--verbose", "False", "--prompt", prompt]
        assert moeflux([*map(str, [*command, *more, *flags])]) == 0
        return capsys.readouterr().out

    generate("def f", "--save-state", file)
    second = generate("(x):", "--load-state", file)
    state = load_state(file, model)
    prompt = tokenizer.encode("def f")
    assert state.tokens[: len(prompt)] == prompt
    assert len(state.tokens) == len(prompt) + 8
    options = {"max_tokens": 8, "prompt_cache": state.cache}
    assert second == moeflux_mlx.generate(model, tokenizer, "(x):", **options) + "\n"
