"""Nonsense in configurations and directories ends in one typed line or stock's text."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from commands import python
from forms import FORMS, reform
from mlx.utils import tree_flatten
from test_checkpoint_model import logits, memory_for
from test_cli import moeflux, one_line_error
from tiny import make_checkpoint

import moeflux_mlx
from moeflux_mlx.cli.inspect import summarize
from moeflux_mlx.errors import ConfigError, ModelError, MoefluxError
from moeflux_mlx.loading import plan_load
from moeflux_mlx.measure import profile

TESTS = Path(__file__).parent


@pytest.fixture
def broken(checkpoint, tmp_path):
    """A copy of the checkpoint, for tests to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "broken"))


def edit(path: Path, **fields) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def refused(path: Path, **options) -> str:
    with pytest.raises(MoefluxError) as caught:
        moeflux_mlx.load(path, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000, message
    return message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "every"), [("plain", 2), ("streamed", 11), ("packed", 13)]
)
def test_every_changed_value_ends_in_one_line_or_in_stock_logits(
    form, every, checkpoint, packed, budget, tmp_path
):
    source = packed if form == "packed" else checkpoint
    path = shutil.copytree(source, tmp_path / "model")
    memory = "" if form == "plain" else budget
    done = python(TESTS / "mutate_config.py", path, memory, every)
    lines = dict(line.split("\t") for line in done.stdout.splitlines())
    assert done.returncode == 0, (list(lines)[-1:], done.stderr[-2000:])
    outcomes = {name: ast.literal_eval(text) for name, text in lines.items()}
    assert len(outcomes) > 300 // every
    loaded = {n: text for n, text in outcomes.items() if text.startswith("=")}
    for name, text in outcomes.items():
        if name in loaded:
            assert text == "=" or float(text[1:]) < 1e-5, (name, text)
        else:
            assert text.startswith("[") and "\n" not in text, (name, text)
    if form == "plain":
        assert len(loaded) > 5 and "quantization.bits=0" not in loaded


def test_null_and_absent_fields_mean_the_same_as_in_mlx_lm(broken):
    expected = logits(moeflux_mlx.load(broken)[0], 5)
    config = json.loads((broken / "config.json").read_text())
    text, table = config["text_config"], config["quantization"]
    for name in ("intermediate_size", "rms_norm_eps", "tie_word_embeddings"):
        text.pop(name, None)
    edit(
        broken,
        text_config={**text, "rope_scaling": None, "layer_types": None},
        quantization={**table, "mode": None, "group_size": None},
        quantization_config=None,
        eos_token_id=None,
    )
    assert mx.array_equal(logits(moeflux_mlx.load(broken)[0], 5), expected)
    flat = {**config, **text}
    del flat["text_config"]
    flat["model_type"] = "qwen3_5_moe"
    (broken / "config.json").write_text(json.dumps(flat))
    assert mx.array_equal(logits(moeflux_mlx.load(broken)[0], 5), expected)


@pytest.mark.parametrize(
    ("file", "text", "word"),
    [
        ("tokenizer.json", "{", "tokenizer"),
        ("tokenizer.json", "", "tokenizer"),
        ("tokenizer.json", None, "tokenizer"),
        ("tokenizer_config.json", "[]", "tokenizer"),
        ("tokenizer_config.json", "[" * 100_000, "tokenizer"),
        ("generation_config.json", "[]", "[load]"),
        ("generation_config.json", "[" * 100_000, "[load]"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id"),
    ],
)
def test_broken_files_beside_the_weights_end_in_one_line(file, text, word, broken):
    if text is None:
        (broken / file).unlink()
    else:
        (broken / file).write_text(text)
    message = refused(broken)
    assert word in message and str(broken) in message, message


def test_a_list_of_end_tokens_or_none_is_accepted(broken):
    edit(broken, eos_token_id=[0, 7])
    assert moeflux_mlx.load(broken)[1].eos_token_ids == {0, 7}
    edit(broken, eos_token_id=None)
    assert moeflux_mlx.load(broken)[1].eos_token_ids == {0}


@pytest.mark.sampled
@pytest.mark.parametrize("form", FORMS[1:])
def test_every_form_loads_without_a_budget_too(form, checkpoint, tmp_path):
    path = reform(checkpoint, tmp_path / "other", form, 2)
    expected, _ = moeflux_mlx.load(checkpoint)
    resident, _ = moeflux_mlx.load(path)
    assert resident.streamer is None
    assert mx.array_equal(logits(resident, 19), logits(expected, 19))


def test_separate_dense_experts_load_without_a_budget(tmp_path):
    plain = make_checkpoint(tmp_path / "plain", bits=None, dtype=mx.bfloat16)
    path = reform(plain, tmp_path / "each", "each", 2)
    expected, got = moeflux_mlx.load(plain)[0], moeflux_mlx.load(path)[0]
    assert mx.array_equal(logits(got, 9), logits(expected, 9))


@pytest.mark.parametrize("streams", [False, True])
def test_the_index_chooses_resident_weights_too(streams, checkpoint, tmp_path):
    path = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    right = mx.load(str(path / "model.safetensors"))
    wrong = {n: mx.zeros_like(w) for n, w in right.items()}
    mx.save_safetensors(str(path / "model-0.safetensors"), wrong)
    mx.save_safetensors(str(path / "model-9.safetensors"), wrong)
    memory = memory_for(checkpoint, 5) if streams else None
    expected = logits(moeflux_mlx.load(checkpoint, expert_memory=memory)[0], 5)
    got = logits(moeflux_mlx.load(path, expert_memory=memory)[0], 5)
    assert mx.array_equal(got, expected) and np.abs(np.array(expected)).max() > 0


@pytest.mark.parametrize("n_bytes", [0, 7, 10_000])
def test_truncated_weights_are_named_without_a_budget(n_bytes, broken):
    os.truncate(broken / "model.safetensors", n_bytes)
    assert str(broken / "model.safetensors") in refused(broken)


def test_reports_count_only_used_weights(broken):
    before = counted(broken)
    extra = {
        "mtp.fc.weight": mx.zeros((64, 128)),
        "vision_tower.blocks.0.attn.qkv.weight": mx.zeros((96, 32)),
        "model.visual.merger.weight": mx.zeros((5, 7)),
    }
    mx.save_safetensors(str(broken / "model-9.safetensors"), extra)
    assert counted(broken) == before


def counted(path: Path) -> list[int]:
    """Return the bytes of weights that inspect, plan, model and profile count."""
    model, _ = moeflux_mlx.load(path)
    held = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    moved = profile(model, context=4, repeats=1).n_bytes
    plan = plan_load(path, "1GB")
    return [summarize(path).resident_bytes, plan.resident_bytes, held, moved]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("memory", 10**400),
        ("memory", True),
        ("memory", [1]),
        ("memory", "1e999"),
        ("expert_memory", 10**400),
        ("expert_memory", 0),
        ("expert_memory", -1),
        ("scope", 5),
        ("scope", []),
        ("policy", 5),
        ("policy", ""),
        ("executor", 5),
        ("optimistic", 1),
        ("read_ahead", 5),
        ("read_ahead", None),
        ("expert_io", ["pread"]),
        ("model_config", 5),
        ("tokenizer_config", 5),
        ("revision", 5),
        ("adapter_path", 5),
        ("native", "yes"),
    ],
)
def test_arguments_with_unusable_values_are_named(name, value, checkpoint, budget):
    options = {"expert_memory": budget, name: value}
    if name == "memory":
        del options["expert_memory"]
    with pytest.raises(ConfigError) as caught:
        moeflux_mlx.load(checkpoint, **options)
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("path", [5, None, "", "no/such/model/at/all", "a\0b"])
def test_an_invalid_path_ends_in_one_line(path):
    assert "[load]" in refused(path)


def test_arguments_of_plans_and_streamers_are_named(checkpoint, budget):
    for options in ({"memory": 10**400}, {"memory": "1GB", "scope": 5}):
        with pytest.raises(ConfigError):
            plan_load(checkpoint, **options)
    streamer = moeflux_mlx.load(checkpoint, expert_memory=budget)[0].streamer
    for n_slots in ("x", 2.5, None, True):
        with pytest.raises(ConfigError, match="n_slots"):
            streamer.resize(n_slots)
    for experts in ([(99, 0)], [(0, 99)], [(0, -1)], ["x"], [(0,)], 5, [(0, "1")]):
        with pytest.raises(ConfigError, match="experts"):
            streamer.preload(experts)
    streamer.preload([(0, 1)])
    assert (0, 1) in streamer.held


def test_a_model_of_another_type_is_named(broken):
    for model_type in ("llama", "qwen3_5_tensors", "../x", 5, None):
        edit(broken, model_type=model_type)
        with pytest.raises(ModelError, match=re.escape(f"type {model_type!r}")):
            moeflux_mlx.load(broken)


@pytest.mark.parametrize("template", ["{% for %}", "{{ raise_exception('no') }}"])
def test_a_broken_chat_template_ends_in_one_line(template, broken):
    file = broken / "tokenizer_config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({**fields, "chat_template": template}))
    done = moeflux("generate", "--model", broken, "--prompt", "hi", "-m", "1")
    assert "chat template" in one_line_error(done)


def test_packing_refuses_a_model_that_cannot_be_loaded(broken, tmp_path):
    edit(broken, quantization={"bits": 0, "group_size": 64})
    done = moeflux("pack", broken, tmp_path / "packed")
    assert "bits" in one_line_error(done)
    assert not list(tmp_path.glob("packed*"))
