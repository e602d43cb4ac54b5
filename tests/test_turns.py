"""A server keeps caches at the ends of turns if it could not trim them later."""

from __future__ import annotations

import time

import pytest
from commands import running
from mlx_lm.generate import stream_generate
from mlx_lm.models.cache import make_prompt_cache
from serving_client import until
from tiny import make_glm4_moe, make_gpt_oss, make_qwen3_next

import moeflux_mlx
from moeflux_mlx.server.turns import generate_in_turns

MAKERS = {"gpt_oss": make_gpt_oss, "qwen3_next": make_qwen3_next}


@pytest.mark.parametrize("family", [*MAKERS, "glm4_moe"])
def test_caches_are_kept_where_they_cannot_be_trimmed(family, tmp_path):
    """gpt_oss's windows can be trimmed only until they are full."""
    make = MAKERS.get(family, make_glm4_moe)
    model, tokenizer = moeflux_mlx.load(make(tmp_path / "model"))
    tokens = [*range(3, 33)]
    segments, kinds = [tokens[:12], tokens[12:]], ["system", "user"]
    kept = {}

    def keep(tokens, cache, kind):
        kept[len(tokens)] = cache, kind

    def texts(generate, **options):
        return [r.token for r in generate(max_tokens=6, **options)]

    alone = texts(stream_generate, model=model, tokenizer=tokenizer, prompt=tokens)
    options = {"model": model, "tokenizer": tokenizer}
    found = texts(
        lambda **more: generate_in_turns(tokens, segments, kinds, keep, **more),
        **options,
        prompt=tokens,
        prompt_cache=make_prompt_cache(model),
    )
    assert found == alone
    assert [*kept] == ([12, 29] if family in MAKERS else [])
    for n_tokens, (cache, _) in kept.items():
        rest = {"prompt": tokens[n_tokens:], "prompt_cache": cache}
        assert texts(stream_generate, **options, **rest) == alone


@pytest.mark.slow
def test_a_server_that_is_told_to_end_several_times_ends_once(packed, tmp_path):
    log = tmp_path / "log"
    log.touch()
    with running(log, "serve", "--model", packed, "--port", 0) as process:
        until(lambda: "moeflux: serving " in log.read_text() or None)
        while process.is_alive():
            process.terminate()
            time.sleep(0.01)
    assert process.exitcode == 0, log.read_text()
    assert "interrupted" not in log.read_text()
