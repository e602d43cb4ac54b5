"""Adapters through mlx-lm's entry points, on our own class: results equal stock's."""

from __future__ import annotations

import gc
import json
import re
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import lora
from mlx_lm.tuner.datasets import load_dataset
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters, remove_lora_layers
from tiny import make_checkpoint

import moeflux_mlx
from moeflux_mlx.cli import main as moeflux
from moeflux_mlx.errors import ModelError, MoefluxError
from moeflux_mlx.experts.files.pack import pack
from moeflux_mlx.experts.files.store import open_store
from moeflux_mlx.experts.pool.pool import POOL_ALIGNMENT

ROOT = Path(__file__).resolve().parents[1]
TOKENS = mx.array(np.random.RandomState(0).randint(1, 320, (2, 7)))
KEYS = [
    "self_attn.q_proj",
    "linear_attn.in_proj_qkv",
    "linear_attn.out_proj",
    "mlp.gate",
    "mlp.shared_expert.down_proj",
]
LORA = {"rank": 4, "scale": 4.0, "dropout": 0.0}
# Settings that change the text within three steps.
RATE = 0.05


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A checkpoint with its pack and training data."""
    path = tmp_path_factory.mktemp("adapters") / "plain"
    make_checkpoint(path, num_hidden_layers=2, full_attention_interval=2)
    pack(path, path.with_name("packed"))
    (data := path.with_name("data")).mkdir()
    for name in ("train", "valid", "test"):
        texts = [f"{name} {i}: " + "ab" * i for i in range(6)]
        lines = [json.dumps({"text": text}) for text in texts]
        (data / f"{name}.jsonl").write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def packed(plain) -> Path:
    return plain.with_name("packed")


@pytest.fixture(scope="module")
def few(plain) -> str:
    """Bytes for five of the sixteen experts."""
    with open_store(plain) as store:
        return str(POOL_ALIGNMENT + 5 * store.layout(0).stride)


@pytest.fixture(scope="module")
def loaders(plain, packed, few) -> dict[str, Any]:
    """Return the function that loads the model, for the way that it runs."""
    load = moeflux_mlx.load
    return {
        "resident": partial(load, plain),
        "budget": partial(load, plain, expert_memory=few),
        "pack": partial(load, packed, expert_memory=few),
        "memory": partial(load, packed, memory="4GB"),
        "no-native": partial(load, plain, expert_memory=few, native=False),
    }


WAYS = ["resident", "budget", "pack", "memory"]


class Losses(lora.TrainingCallback):
    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_loss_report(self, info: dict) -> None:
        self.found.append(info["train_loss"])

    def on_val_loss_report(self, info: dict) -> None:
        self.found.append(info["val_loss"])


def train(plain: Path, loaded: Any, out: Path, kind: str, **options: Any):
    """Train as ``mlx_lm.lora`` does; return losses and adapters."""
    model, tokenizer = loaded
    options = {
        "data": str(plain.with_name("data")),
        "fine_tune_type": kind,
        "optimizer": "sgd",
        "learning_rate": RATE,
        "num_layers": 2,
        "batch_size": 2,
        "iters": 3,
        "val_batches": 1,
        "steps_per_report": 1,
        "adapter_path": str(out),
        "max_seq_length": 32,
        "lora_parameters": {**LORA, "keys": KEYS},
        "train": True,
        **options,
    }
    args = types.SimpleNamespace(**{**lora.CONFIG_DEFAULTS, **options})
    np.random.seed(args.seed)
    train_set, valid_set, _ = load_dataset(args, tokenizer)
    losses = Losses()
    lora.train_model(args, model, train_set, valid_set, losses)
    model.eval()
    return losses.found, mx.load(str(out / "adapters.safetensors"))


@pytest.fixture(scope="module")
def trained(plain, tmp_path_factory) -> dict[str, Any]:
    """Stock's training by kind of adapter: losses, adapters and their folder."""
    found = {}
    # Compiling dozens of functions for a few steps takes most of the time.
    mx.disable_compile()
    try:
        for kind in ("lora", "dora"):
            out = tmp_path_factory.mktemp("stock") / kind
            found[kind] = (*train(plain, mlx_lm.load(str(plain)), out, kind), out)
    finally:
        mx.enable_compile()
    return found


def check_same(got: dict[str, mx.array], wanted: dict[str, mx.array]) -> None:
    assert set(got) == set(wanted)
    for name, x in wanted.items():
        off = mx.linalg.norm(got[name] - x).item()
        assert off <= 1e-5 * mx.linalg.norm(x).item() + 1e-9, name


@pytest.mark.slow
@pytest.mark.parametrize("way", [*WAYS, "no-native"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_training_gives_stocks_losses_and_adapters(
    plain, loaders, trained, kind, way, tmp_path
):
    loaded = loaders[way]()
    losses, adapters = train(plain, loaded, tmp_path, kind)
    assert np.allclose(losses, trained[kind][0], rtol=1e-5) and len(losses) == 5
    assert losses[-1] < losses[1]
    check_same(adapters, trained[kind][1])
    assert {name.split(".", 4)[4].rsplit(".", 1)[0] for name in adapters} == set(KEYS)
    if way in ("budget", "pack", "no-native"):
        assert loaded[0].streamer.n_slots == 5
        assert loaded[0].streamer.stats.total.misses > 20


def gradients(model: nn.Module) -> dict[str, mx.array]:
    """Return the first training step's changes to adapters, and its loss."""
    model.train()
    lengths = mx.array([[0, 6], [0, 4]])
    step = nn.value_and_grad(model, default_loss)
    (loss, _), grads = step(model, TOKENS, lengths)
    model.eval()
    return {"loss": loss, **dict(tree_flatten(grads))}


@pytest.mark.sampled
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_gradients_of_adapters_equal_stocks(plain, loaders, trained, kind, way):
    found = []
    for load in (lambda: mlx_lm.load(str(plain)), loaders[way]):
        model = load()[0].freeze()
        config = {**LORA, "keys": KEYS}
        linear_to_lora_layers(model, 2, config, use_dora=kind == "dora")
        # Nonzero second factors, so that adapters have an effect.
        model.load_weights([*trained[kind][1].items()], strict=False)
        found.append(gradients(model))
    assert len(found[0]) == 1 + len(trained[kind][1])
    check_same(found[1], found[0])


@pytest.mark.slow
@pytest.mark.parametrize("way", ["resident", "pack"])
def test_by_default_all_but_routed_experts_learn(plain, loaders, way, tmp_path):
    found = []
    for name, load in (("stock", lambda: mlx_lm.load(str(plain))), (way, loaders[way])):
        loaded = load()
        options = {"lora_parameters": LORA, "iters": 2, "grad_checkpoint": True}
        kind = type(loaded[0].layers[0])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kind, "__call__", kind.__call__)
            found.append(
                train(plain, loaded, tmp_path / name, "lora", **options),
            )
    (stocks, wanted), (losses, got) = found
    assert any("switch_mlp" in name for name in wanted)
    if way == "resident":
        assert np.allclose(losses, stocks, rtol=1e-5)
        check_same(got, wanted)
    else:
        # Routed experts have no adapters, so losses differ after the first step.
        assert np.allclose(losses[:2], stocks[:2], rtol=1e-5)
        assert set(got) == {name for name in wanted if "switch_mlp" not in name}


@pytest.mark.slow
@pytest.mark.sampled
@pytest.mark.parametrize("way", ["resident", "budget", "pack"])
def test_training_resumes_as_stock_does(plain, loaders, trained, way, tmp_path):
    resume = {"resume_adapter_file": str(trained["lora"][2] / "adapters.safetensors")}
    found = []
    for load in (lambda: mlx_lm.load(str(plain)), loaders[way]):
        found.append(train(plain, load(), tmp_path, "lora", iters=2, **resume))
    (stocks, wanted), (losses, got) = found
    assert np.allclose(losses, stocks, rtol=1e-5) and losses[0] < trained["lora"][0][0]
    check_same(got, wanted)


def command(name: str, *flags: object) -> None:
    """Run one of mlx-lm's commands in this process, as its entry point does."""
    __import__(f"mlx_lm.{name}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"mlx_lm.{name}", *map(str, flags)])
        sys.modules[f"mlx_lm.{name}"].main()


@pytest.mark.slow
def test_the_commands_of_mlx_lm_train_and_test_a_pack(
    plain, packed, few, monkeypatch, capsys, tmp_path
):
    monkeypatch.setenv("MOEFLUX_EXPERT_MEMORY", few)
    settings = {"lora_parameters": {**LORA, "keys": KEYS}, "max_seq_length": 32}
    (tmp_path / "lora.yaml").write_text(json.dumps(settings))
    told: dict[str, list[str]] = {}
    for model in (plain, packed):
        out = tmp_path / model.name
        flags = [
            *("--model", model, "--data", plain.with_name("data")),
            *("--batch-size", 2, "--adapter-path", out, "--trust-remote-code"),
            *("-c", tmp_path / "lora.yaml"),
        ]
        steps = ["--train", "--num-layers", 2, "--iters", 2, "--learning-rate", 0.01]
        command("lora", *flags, *steps, "--test")
        command("lora", *flags, "--test")
        lines = capsys.readouterr().out.splitlines()
        told[model.name] = [line for line in lines if "Test loss" in line]
        gc.collect()
    assert len(told["plain"]) == 2 and told["plain"][0] == told["plain"][1]
    assert told["packed"] == told["plain"]


def test_the_script_in_the_docs_trains(plain, few, monkeypatch, tmp_path):
    text = (ROOT / "docs" / "training.md").read_text()
    script, *_ = re.findall(r"```python\n(.*?)```", text, re.S)
    (tmp_path / "qwen").symlink_to(plain)
    (tmp_path / "data").symlink_to(plain.with_name("data"))
    monkeypatch.chdir(tmp_path)
    for printed, tried in (("6GB", few), ('"iters": 600', '"iters": 2')):
        assert printed in script
        script = script.replace(printed, tried)
    exec(script, {})
    assert mx.load("adapters/adapters.safetensors")


PROMPT = ["--prompt", "ab", "--ignore-chat-template", "-m", 10, "--verbose", "False"]


@pytest.fixture(scope="module")
def text(plain, trained) -> dict[str, str]:
    """Stock's text by kind of adapter, and without adapters."""
    found = {}
    for kind, path in {"none": None, **{k: v[2] for k, v in trained.items()}}.items():
        model, tokenizer = mlx_lm.load(str(plain), adapter_path=path and str(path))
        found[kind] = mlx_lm.generate(model, tokenizer, "ab", max_tokens=10)
    assert len({*found.values()}) == 3
    return found


@pytest.mark.sampled
@pytest.mark.parametrize("way", [*WAYS, "no-native", "no-native-budget"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_generate_with_adapters_writes_stocks_text(
    plain, packed, few, trained, text, kind, way, capsys
):
    flags = {
        "resident": ["--model", plain],
        "budget": ["--model", plain, "--expert-memory", few],
        "pack": ["--model", packed, "--expert-memory", few],
        "memory": ["--model", packed, "--memory", "4GB"],
        "no-native": ["--model", plain, "--no-native"],
        "no-native-budget": ["--model", plain, "--no-native", "--expert-memory", few],
    }[way]
    flags = [*flags, "--adapter-path", trained[kind][2], *PROMPT]
    assert moeflux(["generate", *map(str, flags)]) == 0
    assert capsys.readouterr().out.strip() == text[kind].strip()


@pytest.mark.parametrize("variable", ["MOEFLUX_EXPERT_MEMORY", "MOEFLUX_MEMORY"])
def test_mlx_lm_generates_with_adapters_from_a_pack(
    packed, few, trained, text, variable, monkeypatch, capsys
):
    amounts = {"MOEFLUX_EXPERT_MEMORY": few, "MOEFLUX_MEMORY": "4GB"}
    monkeypatch.setenv(variable, amounts[variable])
    adapters = ["--adapter-path", trained["lora"][2], "--trust-remote-code"]
    command("generate", "--model", packed, *adapters, *PROMPT)
    assert capsys.readouterr().out.strip() == text["lora"].strip()


def test_a_fused_model_writes_stocks_text(plain, few, trained, tmp_path):
    fused = tmp_path / "fused"
    adapters = trained["lora"][2]
    flags = ["--model", plain, "--adapter-path", adapters, "--save-path", fused]
    command("fuse", *flags)
    pack(fused, tmp_path / "packed")
    model, tokenizer = mlx_lm.load(str(fused))
    wanted = mlx_lm.generate(model, tokenizer, "ab", max_tokens=10)
    for path, options in (
        (fused, {}),
        (fused, {"expert_memory": few}),
        (tmp_path / "packed", {"expert_memory": few}),
    ):
        ours, tokenizer = moeflux_mlx.load(path, **options)
        assert mlx_lm.generate(ours, tokenizer, "ab", max_tokens=10) == wanted
        assert mx.allclose(ours(TOKENS), model(TOKENS), atol=1e-4)


def test_adapters_fuse_into_a_model_of_ours(plain, trained):
    found = []
    for load in (mlx_lm.load, moeflux_mlx.load):
        model = load(str(plain), adapter_path=str(trained["lora"][2]))[0]
        model(TOKENS)
        pairs = model.named_modules()
        fused = [(n, m.fuse()) for n, m in pairs if hasattr(m, "fuse")]
        assert len(fused) == 7
        model.update_modules(mlx_lm.utils.tree_unflatten(fused))
        found.append(model(TOKENS))
    assert mx.allclose(*found, atol=1e-4)


@pytest.mark.sampled
@pytest.mark.parametrize("way", WAYS)
def test_adapters_may_come_and_go_between_calls(plain, loaders, trained, way):
    stock, model = mlx_lm.load(str(plain))[0], loaders[way]()[0]
    without = np.array(stock(TOKENS))
    assert np.allclose(np.array(model(TOKENS)), without, atol=1e-4)
    for each in (stock, model):
        load_adapters(each, str(trained["lora"][2]))
    adapted = np.array(stock(TOKENS))
    assert np.abs(adapted - without).max() > 0.1
    assert np.allclose(np.array(model(TOKENS)), adapted, atol=1e-4)
    rows = stock.language_model.model(TOKENS)
    assert mx.allclose(model.language_model.model(TOKENS), rows, atol=1e-4)
    with pytest.raises(ModelError, match="320"):
        model(mx.array([[320]]))
    remove_lora_layers(model)
    assert np.allclose(np.array(model(TOKENS)), without, atol=1e-4)


def test_a_long_call_with_adapters_is_divided(loaders, trained, monkeypatch):
    model = loaders["memory"]()[0]
    load_adapters(model, str(trained["lora"][2]))
    whole, parts = model(TOKENS), []
    rows = model.language_model.forward._modules.rows
    monkeypatch.setattr(model.runtime, "make_room", lambda *_, **__: 4)
    monkeypatch.setattr(
        model.language_model.forward._modules,
        "rows",
        lambda inputs, *more: parts.append(inputs.shape) or rows(inputs, *more),
    )
    assert mx.allclose(model(TOKENS), whole, atol=1e-4)
    assert parts == [(2, 2)] * 3 + [(2, 1)]


class Negated(nn.Module):
    """A user's own layer around one of the model's layers."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.inside = linear

    def __call__(self, x: mx.array) -> mx.array:
        return -self.inside(x)


@pytest.mark.parametrize("way", ["resident", "pack"])
def test_a_module_that_graphs_cannot_represent_is_called(plain, loaders, way):
    found = []
    for load in (lambda: mlx_lm.load(str(plain)), loaders[way]):
        model = load()[0]
        before = model(TOKENS)
        expert = model.layers[1].mlp.shared_expert
        expert.down_proj = Negated(expert.down_proj)
        found.append(model(TOKENS))
        assert not mx.allclose(found[-1], before, atol=1e-2)
    assert mx.allclose(*found, atol=1e-4)


@pytest.fixture(scope="module")
def routed(plain, tmp_path_factory) -> Path:
    """Adapters of all linear layers, routed experts included."""
    path = tmp_path_factory.mktemp("routed") / "adapters"
    options = {"lora_parameters": LORA, "iters": 1}
    train(plain, mlx_lm.load(str(plain)), path, "lora", **options)
    return path


ROUTED = r"layers\.0\.mlp\.switch_mlp\.down_proj"


@pytest.mark.parametrize("native", [None, False])
def test_adapters_of_streamed_experts_are_refused_by_name(packed, few, routed, native):
    options = {"expert_memory": few, "native": native}
    with pytest.raises(ModelError, match=rf"\[adapters\] .*{ROUTED}") as refused:
        moeflux_mlx.load(packed, adapter_path=routed, **options)
    assert "\n" not in str(refused.value)
    model = moeflux_mlx.load(packed, **options)[0]
    before = {name for name, _ in model.named_modules()}
    # As mlx_lm.fuse and mlx_lm.generate do it.
    with pytest.raises(ModelError, match=rf"\[adapters\] .*{ROUTED}") as refused:
        load_adapters(model, str(routed))
    assert "\n" not in str(refused.value)
    assert {name for name, _ in model.named_modules()} == before
    model = moeflux_mlx.load(packed, **options)[0]
    with pytest.raises(ValueError, match="StreamedProjection to LoRA"):
        linear_to_lora_layers(model, 2, {**LORA, "keys": ["mlp.switch_mlp.up_proj"]})
    with pytest.raises(ModelError, match=r"layers\.\d\.mlp\.switch_mlp\.\w+\.lora_"):
        model.load_weights(str(routed / "adapters.safetensors"), strict=False)


def test_adapters_of_resident_experts_equal_stocks(plain, routed):
    models = [
        load(str(plain), adapter_path=str(routed))[0]
        for load in (mlx_lm.load, moeflux_mlx.load)
    ]
    assert mx.allclose(models[1](TOKENS), models[0](TOKENS), atol=1e-4)
    assert any("switch_mlp" in n for n, _ in tree_flatten(models[1].parameters()))


def broken_json(path: Path) -> None:
    (path / "adapter_config.json").write_text("{")


def of_another_model(path: Path) -> None:
    arrays = {"model.layers.0.q_proj.lora_a": mx.ones((2, 2))}
    mx.save_safetensors(str(path / "adapters.safetensors"), arrays)


def without_weights(path: Path) -> None:
    (path / "adapters.safetensors").unlink()


def cut(path: Path) -> None:
    (path / "adapters.safetensors").write_bytes(b"\x08\0\0")


@pytest.mark.parametrize(
    "damage", [broken_json, of_another_model, without_weights, cut]
)
def test_unusable_adapters_end_in_one_line(plain, trained, damage, tmp_path):
    path = tmp_path / "adapters"
    path.mkdir()
    for name in ("adapter_config.json", "adapters.safetensors"):
        (path / name).write_bytes((trained["lora"][2] / name).read_bytes())
    damage(path)
    with pytest.raises(ModelError, match=str(path)) as refused:
        moeflux_mlx.load(plain, adapter_path=path)
    assert "\n" not in str(refused.value)


def test_a_state_is_of_a_model_without_adapters(packed, few, trained, tmp_path):
    adapters = trained["lora"][2]
    model = moeflux_mlx.load(packed, expert_memory=few, adapter_path=adapters)[0]
    cache = mlx_lm.models.cache.make_prompt_cache(model)
    model(TOKENS[:1], cache=cache)
    with pytest.raises(MoefluxError, match=r"\[state\] .* adapters"):
        moeflux_mlx.save_state(tmp_path / "state", model, cache, [])
    assert not (tmp_path / "state").exists()
