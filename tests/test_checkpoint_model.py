"""Streaming experts from a plain checkpoint gives the same bits in less memory."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys

import mlx.core as mx
import mlx_lm
import numpy as np
import open_files
import pytest
from forms import FORMS, read_raw, reform, write_raw
from mlx_lm.models.cache import make_prompt_cache
from test_cli import N_TOKENS, PROMPT, generate, moeflux, one_line_error
from tiny import make_checkpoint

import moeflux_mlx
from moeflux_mlx.cli.inspect import summarize
from moeflux_mlx.errors import BudgetError, ExpertStoreError, ModelError
from moeflux_mlx.experts.files.checkpoint_store import CheckpointExperts
from moeflux_mlx.experts.pool.pool import POOL_ALIGNMENT, pool_stride


def tokens(n: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.RandomState(seed).randint(1, 320, (1, n)))


def logits(model, n_tokens: int) -> mx.array:
    """Return the logits of a prompt and of three single tokens after it."""
    cache = make_prompt_cache(model)
    parts = [model(tokens(n_tokens), cache=cache)]
    parts += [model(tokens(1, seed=s), cache=cache) for s in range(3)]
    joined = mx.concatenate(parts, axis=1)
    mx.eval(joined)
    return joined


def memory_for(path, n_slots: int) -> int:
    with CheckpointExperts.open(path) as store:
        stride = pool_stride([store.layout(layer) for layer in store.layers])
    return n_slots * stride + POOL_ALIGNMENT


@pytest.mark.sampled
@pytest.mark.parametrize("n_tokens", [1, 2, 65])
def test_logits_equal_those_of_the_pack_and_of_all_in_memory(
    checkpoint, packed, n_tokens
):
    resident, _ = moeflux_mlx.load(checkpoint)
    assert resident.streamer is None
    expected = logits(resident, n_tokens)
    for n_slots in (2, 3, 7, 19, 32):
        memory = memory_for(checkpoint, n_slots)
        streamed, _ = moeflux_mlx.load(checkpoint, expert_memory=memory)
        assert streamed.streamer.n_slots == n_slots
        assert mx.array_equal(logits(streamed, n_tokens), expected), n_slots
        from_pack, _ = moeflux_mlx.load(packed, expert_memory=memory)
        assert mx.array_equal(logits(from_pack, n_tokens), expected), n_slots
        counts, others = streamed.streamer.stats.total, from_pack.streamer.stats.total
        assert (counts.hits, counts.misses) == (others.hits, others.misses)
        assert counts.read_bytes == others.read_bytes > 0


@pytest.mark.sampled
@pytest.mark.parametrize("n_shards", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_logits(form, n_shards, checkpoint, packed, tmp_path):
    path = reform(checkpoint, tmp_path / "other", form, n_shards)
    memory = memory_for(path, 5)
    expected, _ = moeflux_mlx.load(packed, expert_memory=memory)
    streamed, _ = moeflux_mlx.load(path, expert_memory=memory)
    assert mx.array_equal(logits(streamed, 19), logits(expected, 19))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_fused_dense_experts_equal_those_of_mlx_lm(dtype, tmp_path):
    plain = make_checkpoint(tmp_path / "plain", bits=None, dtype=dtype)
    path = reform(plain, tmp_path / "fused", "fused", 2)
    resident, _ = moeflux_mlx.load(path)
    assert resident.streamer is None
    streamed, _ = moeflux_mlx.load(path, expert_memory=memory_for(path, 5))
    assert streamed.streamer is not None
    for n_tokens in (1, 37):
        got, expected = logits(streamed, n_tokens), logits(resident, n_tokens)
        assert mx.array_equal(got, expected)


def test_loading_and_running_never_holds_the_experts(tmp_path):
    sizes = dict(num_experts=32, moe_intermediate_size=512)
    path = make_checkpoint(tmp_path / "plain", **sizes)
    summary = summarize(path)
    memory = memory_for(path, 4)
    assert summary.expert_bytes > 3 * (memory + summary.resident_bytes)
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model, _ = moeflux_mlx.load(path, expert_memory=memory)
    loading = mx.get_peak_memory() - before
    # MLX rounds each parameter up to whole pages.
    n_parameters = len(read_raw(path))
    most = memory + summary.resident_bytes + n_parameters * os.sysconf("SC_PAGE_SIZE")
    assert loading <= most < summary.expert_bytes
    logits(model, 9)
    assert mx.get_peak_memory() - before < summary.expert_bytes


def test_the_environment_asks_for_streaming_too(checkpoint, monkeypatch):
    memory = memory_for(checkpoint, 5)
    monkeypatch.setenv("MOEFLUX_EXPERT_MEMORY", str(memory))
    model, _ = moeflux_mlx.load(checkpoint)
    assert model.streamer.n_slots == 5


def test_a_budget_that_holds_no_token_leaves_no_file_open(checkpoint):
    # Lazy weights keep their file open until they are collected.
    with open_files.none_left(), pytest.raises(BudgetError, match="at least"):
        moeflux_mlx.load(checkpoint, expert_memory="1KB")


def test_a_layer_without_experts_is_named(checkpoint, tmp_path):
    path = tmp_path / "broken"
    shutil.copytree(checkpoint, path)
    kept = {
        n: raw for n, raw in read_raw(path).items() if ".layers.2.mlp.switch" not in n
    }
    write_raw(path, kept)
    with pytest.raises(ModelError, match="experts of layer 2"):
        moeflux_mlx.load(path, expert_memory="1GB")


def test_a_truncated_checkpoint_is_a_typed_error_before_and_after_loading(
    checkpoint, tmp_path
):
    path = tmp_path / "broken"
    shutil.copytree(checkpoint, path)
    file = path / "model.safetensors"
    model, _ = moeflux_mlx.load(path, expert_memory=memory_for(path, 2))
    os.truncate(file, 10_001)
    with pytest.raises(ExpertStoreError, match="the file ends after") as caught:
        model(tokens(9))
    assert str(file) in str(caught.value)
    with pytest.raises(ModelError, match="truncated") as refused:
        moeflux_mlx.load(path, expert_memory=memory_for(checkpoint, 2))
    assert str(file) in str(refused.value)


def test_generate_streams_a_plain_checkpoint_and_prints_stock_text(checkpoint):
    model, tokenizer = mlx_lm.load(str(checkpoint))
    expected = mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=N_TOKENS)
    done = generate(checkpoint, "--expert-memory", memory_for(checkpoint, 5))
    assert done.stdout.startswith(expected + "\n"), done.stderr
    assert "expert cache hits" in done.stdout and "all in memory" not in done.stdout
    assert "[expert_memory]" in one_line_error(
        generate(checkpoint, "--expert-memory", "1KB")
    )


@pytest.mark.parametrize(("form", "reads"), [("stacked", 9), ("fused", 6), ("each", 1)])
def test_inspect_shows_the_cost_of_streaming(form, reads, checkpoint, packed, tmp_path):
    path = reform(checkpoint, tmp_path / "other", form)
    plain, pack = summarize(path), summarize(packed)
    assert (plain.reads_per_expert, pack.reads_per_expert) == (reads, 1)
    assert plain.bytes_per_expert == pack.bytes_per_expert
    assert plain.minimum_bytes == pack.minimum_bytes
    assert plain.resident_bytes == pack.resident_bytes
    shown = moeflux("inspect", path).stdout
    assert f"{reads} (1 once packed)" in shown
    assert f"{8 * reads} reads" in shown and "once packed:" in shown
    assert "affine 4 bits/32 (12 x)" in shown
    found = json.loads(moeflux("inspect", path, "--json").stdout)
    assert found.pop("forecast")["token_seconds"] > 0
    assert found == vars(plain)


@pytest.mark.slow
def test_a_name_on_the_hub_is_streamed_from_the_download_cache(checkpoint, tmp_path):
    """No hub is contacted: the cache has the links that huggingface_hub makes."""
    repo, revision = tmp_path / "models--owner--name", "0" * 40
    snapshot = repo / "snapshots" / revision
    for folder in (snapshot, repo / "blobs", repo / "refs"):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(revision)
    for i, file in enumerate(sorted(checkpoint.iterdir())):
        shutil.copyfile(file, repo / "blobs" / f"{i:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{i:040x}")
    offline = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    flags = ["--prompt", PROMPT, "--ignore-chat-template", "-m", "5"]
    flags += ["--expert-memory", memory_for(checkpoint, 5)]
    # huggingface_hub reads the cache's path when it is imported.
    command = [sys.executable, "-m", "moeflux_mlx.cli", "generate"]
    command += ["--model", "owner/name", *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, env=offline)
    assert done.returncode == 0, done.stderr
    assert "expert cache hits" in done.stdout
    local = moeflux("generate", "--model", checkpoint, *flags)
    assert done.stdout.splitlines()[0] == local.stdout.splitlines()[0]
