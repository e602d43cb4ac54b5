"""Streaming any model of mlx-lm gives the same bits, or a typed error."""

from __future__ import annotations

import ast
import contextlib
import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.switch_layers import (
    QuantizedSwitchLinear,
    SwitchGLU,
    SwitchLinear,
    SwitchMLP,
)
from mlx_lm.tuner.lora import LoRASwitchLinear
from mlx_lm.utils import load_model, save_model

import moeflux_mlx
from moeflux_mlx.errors import BudgetError, ConfigError, ExpertStoreError, ModelError
from moeflux_mlx.experts.files.checkpoint import Checkpoint
from moeflux_mlx.experts.files.module_store import ModuleExperts, unchanged
from moeflux_mlx.experts.files.modules import find_blocks
from moeflux_mlx.experts.weights import Quantization
from moeflux_mlx.streaming import stream

ROOT = Path(__file__).resolve().parents[1]
SLACK, SLOT = 2 << 20, 16 << 10
DIM = 128


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """Make the scripts' modules importable."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


# Each differs from the others in its activation, its routing or its other layers.
FAMILIES = {
    "qwen3_moe": 4,
    "mixtral": None,
    "deepseek_v3": 4,
    "deepseek_v41": 4,
    "gpt_oss": None,
    "gemma4_text": 4,
    "glm4_moe": None,
    "llama4": 4,
    "kimi_vl": None,
    "nemotron_h": 4,
    "phixtral": None,
    "minimax_m3_vl": 4,
    "qwen3_next": None,
}


@pytest.mark.sampled
@pytest.mark.parametrize(("family", "bits"), FAMILIES.items())
def test_families_stream_with_stocks_bits_through_one_slot(family, bits):
    import family_trials

    (outcome,) = family_trials.try_family(
        family, bits, forms=(False,), prompts=(8, 40), n_greedy=4
    )
    assert outcome.n_blocks > 0 and outcome.why == ""


class Layers(nn.Module):
    """Routed blocks in sequence; each token takes ``k`` experts in turn."""

    def __init__(self, *blocks: nn.Module, k: int = 2):
        super().__init__()
        self.layers = [{"mlp": {"switch": block}} for block in blocks]
        self.k = k

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            order = mx.arange(x.shape[0] * self.k).reshape(-1, self.k)
            x = layer["mlp"]["switch"](x, order * 3 % 5).mean(axis=-2)
        return x


def random(module: nn.Module, seed: int = 1) -> nn.Module:
    """Fill a module with seeded noise."""
    mx.random.seed(seed)
    module.update(
        tree_map(lambda x: 0.3 * mx.random.normal(x.shape), module.parameters())
    )
    return module


def saved(model: nn.Module, path: Path) -> Path:
    """Write a model's weights with an empty configuration."""
    path.mkdir()
    save_model(path, model)
    # Tests change names.
    (path / "model.safetensors.index.json").unlink()
    (path / "config.json").write_text(json.dumps({"model_type": "layers"}))
    return path


def lazily(model: nn.Module, path: Path) -> nn.Module:
    """Give a model a directory's weights without reading them."""
    return model.load_weights(str(path / "model.safetensors"))


AFFINE = [Quantization(bits, size) for bits in (1, 2, 3, 5, 6, 8) for size in (32, 128)]
FORMS = [
    None,
    Quantization(4, 64),
    *AFFINE,
    Quantization(4, 32, "mxfp4"),
    Quantization(8, 32, "mxfp8"),
    Quantization(4, 16, "nvfp4"),
]


def quantized(block: nn.Module, forms: dict[str, Quantization | None]) -> nn.Module:
    """Quantise a block's projections in place."""
    for name, form in forms.items():
        if form is not None:
            block[name] = block[name].to_quantized(
                form.group_size, form.bits, form.mode
            )
    return block


def make(forms: list[dict[str, Quantization | None]]) -> nn.Module:
    """Build two gated blocks of different widths and one with two projections."""
    blocks = [
        SwitchGLU(DIM, DIM, 5, bias=True),
        SwitchGLU(DIM, 2 * DIM, 5),
        SwitchMLP(DIM, DIM, 5, bias=True),
    ]
    model = random(Layers(*blocks))
    for block, form in zip(blocks, forms, strict=True):
        quantized(block, form)
    return model


GATED, PLAIN = ("gate_proj", "up_proj", "down_proj"), ("fc1", "fc2")


@pytest.mark.sampled
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_gives_the_bits_of_all_in_memory(tmp_path, form):
    forms = [dict.fromkeys(names, form) for names in (GATED, GATED, PLAIN)]
    check_same(tmp_path, forms, 3)


@pytest.mark.parametrize("n_slots", [1, 2, 7, 15])
def test_every_number_of_slots_gives_the_bits_of_all_in_memory(tmp_path, n_slots):
    forms = [dict.fromkeys(names, FORMS[1]) for names in (GATED, GATED, PLAIN)]
    check_same(tmp_path, forms, n_slots)


def test_forms_may_be_mixed_by_projection_and_by_block(tmp_path):
    gate = dict(zip(GATED, FORMS[:3], strict=True))
    other = {"gate_proj": FORMS[-1], "up_proj": None, "down_proj": FORMS[-3]}
    check_same(tmp_path, [gate, other, {"fc1": FORMS[-2], "fc2": None}], 2)


class TwoBlocks(nn.Module):
    """Layers of two routed blocks, one between latent projections, and one without.

    The number of experts and their widths differ in each layer and block.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = [
            {
                "text": SwitchGLU(DIM, 32 * i, 4 + i, bias=i > 1),
                "latent": [
                    nn.Linear(DIM, 32),
                    SwitchMLP(32, 64, 3),
                    nn.Linear(32, DIM),
                ],
            }
            for i in (1, 2, 3)
        ]
        self.layers.insert(1, {"dense": nn.Linear(DIM, DIM)})

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            if "dense" in layer:
                x = layer["dense"](x)
                continue
            order = mx.arange(2 * len(x)).reshape(-1, 2)
            x = x + layer["text"](x, order * 3 % 5).mean(axis=-2)
            down, latent, up = layer["latent"]
            x = x + up(latent(down(x), order[:, :1] % 3).mean(axis=-2))
        return x


@pytest.mark.parametrize("n_slots", [1, 4, 27])
def test_a_layer_may_have_several_blocks_of_different_widths(tmp_path, n_slots):
    stock, ours = random(TwoBlocks()), random(TwoBlocks())
    path = saved(stock, tmp_path / "model")
    largest = slot_bytes(lazily(TwoBlocks(), path), path)
    ours = stream(lazily(ours, path), path, expert_memory=SLACK + n_slots * largest)
    assert len(ours.streamer.experts) == 5 + 6 + 7 + 3 * 3
    assert ours.streamer.n_slots == n_slots
    assert not any("_proj" in n for n, _ in tree_flatten(ours.parameters()))
    for n_tokens in (1, 40):
        x = mx.random.normal((n_tokens, DIM), key=mx.random.key(n_tokens))
        assert mx.array_equal(stock(x), ours(x))


def check_same(tmp_path: Path, forms: list[dict], n_slots: int) -> None:
    stock, other = make(forms), make(forms)
    path = saved(stock, tmp_path / "model")
    largest = slot_bytes(lazily(make(forms), path), path)
    ours = stream(lazily(other, path), path, expert_memory=SLACK + n_slots * largest)
    assert ours.streamer.n_slots == n_slots
    for n_tokens in (1, 40):
        x = mx.random.normal((n_tokens, DIM), key=mx.random.key(n_tokens))
        assert mx.array_equal(stock(x), ours(x))


def slot_bytes(model: nn.Module, path: Path) -> int:
    """Return a slot's bytes from the error that states the minimum."""
    with opened(model, path) as store:
        return max(store.layout(layer).stride for layer in store.layers)


def opened(model: nn.Module, path: Path) -> ModuleExperts:
    checkpoint = Checkpoint.open(path)
    return ModuleExperts(find_blocks(model), checkpoint, unchanged(checkpoint, None))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_matrices_that_a_cpu_cannot_multiply_are_stored_in_slots(tmp_path, dtype):
    def build() -> nn.Module:
        model = random(Layers(SwitchGLU(DIM, DIM, 5, bias=True)))
        model.set_dtype(dtype)
        block = model.layers[0]["mlp"]["switch"]
        block.up_proj = block.up_proj.to_quantized(16, 4, "nvfp4", global_scale=True)
        return model

    stock, path = build(), tmp_path / "model"
    saved(stock, path)
    ours = stream(lazily(build(), path), path, expert_memory="100MB")
    weights = ours.streamer.source(0).weights.by_name
    block = stock.layers[0]["mlp"]["switch"]
    for name in GATED:
        own = block[name]
        assert mx.array_equal(weights[name].w, own.weight)
        assert mx.array_equal(weights[name].bias, own.bias)
    assert mx.array_equal(weights["up_proj"].global_scale, block.up_proj.global_scale)
    assert weights["up_proj"].global_scale.shape == (5,)


class OwnCall(SwitchGLU):
    """A block with a call of its own."""

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        return super().__call__(x, indices) * indices[..., None]


class OwnBlock(nn.Module):
    """A block of a class of its own."""

    def __init__(self):
        super().__init__()
        self.one = SwitchLinear(DIM, DIM, 5)
        self.two = SwitchLinear(DIM, DIM, 5)


class OwnProjection(SwitchLinear):
    """A projection with a call of its own, to which slots are not ids."""

    def __call__(self, x: mx.array, indices: mx.array, *args, **kwargs) -> mx.array:
        return super().__call__(x, indices, *args, **kwargs) + indices[..., None, None]


class OwnQuantized(QuantizedSwitchLinear):
    """A quantised projection with a call of its own."""

    __call__ = OwnProjection.__call__


@pytest.mark.parametrize("kind", [OwnProjection, OwnQuantized])
def test_an_unknown_call_of_a_projection_is_refused_by_name(kind):
    block = SwitchGLU(DIM, DIM, 5)
    block.up_proj = kind(DIM, DIM, 5)
    with pytest.raises(ModelError, match=rf"switch\.up_proj: .*{kind.__name__}"):
        find_blocks(Layers(block))


def test_a_block_at_two_paths_is_refused_by_name():
    block = SwitchGLU(DIM, DIM, 5)
    with pytest.raises(ModelError, match=r"layers\.0\..*that of layers\.1\."):
        find_blocks(Layers(block, block))


@pytest.mark.parametrize("kind", [OwnCall, OwnBlock])
def test_an_unknown_call_is_refused_by_name(kind):
    block = OwnBlock() if kind is OwnBlock else kind(DIM, DIM, 5)
    name = rf"layers\.0\.mlp\.switch: .*{kind.__name__} with a call of its own"
    with pytest.raises(ModelError, match=name):
        find_blocks(Layers(block))


def test_an_expert_matrix_among_other_weights_is_no_block():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.o = nn.Linear(4, 4), SwitchLinear(4, 4, 2)

    assert find_blocks(Layers(Attention())) == []


def test_a_block_with_adapters_is_refused():
    block = SwitchGLU(DIM, DIM, 5)
    block.up_proj = LoRASwitchLinear.from_base(block.up_proj)
    with pytest.raises(ModelError, match=r"switch\.up_proj.*LoRASwitchLinear"):
        find_blocks(Layers(block))


def test_modules_that_a_model_adds_to_a_block_stay_there(tmp_path):
    def build() -> nn.Module:
        model = Layers(SwitchGLU(DIM, DIM, 5))
        model.layers[0]["mlp"]["switch"].after = nn.RMSNorm(DIM)
        return random(model)

    path = saved(build(), tmp_path / "model")
    ours = stream(lazily(build(), path), path, expert_memory=SLACK + 64 * SLOT)
    assert [*dict(tree_flatten(ours.parameters()))] == [
        "layers.0.mlp.switch.after.weight"
    ]


def small(seed: int = 1) -> nn.Module:
    return random(Layers(SwitchGLU(DIM, DIM, 5)), seed)


@pytest.fixture
def plain(tmp_path) -> Path:
    return saved(small(), tmp_path / "plain")


def test_reading_routed_weights_is_refused(plain, tmp_path):
    ours = stream(lazily(small(), plain), plain, expert_memory=SLACK + 20 * SLOT)
    block = ours.layers[0]["mlp"]["switch"]
    with pytest.raises(ModelError, match=r"switch\.gate_proj.*streamed"):
        block.gate_proj  # noqa: B018
    assert not hasattr(block, "down_proj")
    ours.save_weights(str(tmp_path / "copy.safetensors"))
    copied = mx.load(str(tmp_path / "copy.safetensors"))
    stocks = dict(tree_flatten(small().parameters()))
    assert copied.keys() == stocks.keys()
    assert all(mx.array_equal(copied[name], stocks[name]) for name in stocks)
    assert not tree_flatten(ours.trainable_parameters())
    with pytest.raises(ModelError, match="not streamed yet"):
        stream(ours, plain)


def test_gradients_equal_stocks(plain):
    x = mx.random.normal((40, DIM))
    ours = stream(lazily(small(), plain), plain, expert_memory=SLACK + 20 * SLOT)
    assert ours.streamer.n_slots < 5

    def loss(x, model):
        return model(x).square().sum()

    want, got = (mx.grad(loss)(x, model) for model in (small(), ours))
    assert mx.allclose(want, got, rtol=1e-5, atol=1e-5)


def test_tracing_a_call_without_values_of_ids_is_refused(plain):
    ours = stream(lazily(small(), plain), plain, expert_memory=SLACK + 20 * SLOT)
    with pytest.raises(ModelError, match=r"outside mx\.compile"):
        mx.compile(ours)(mx.ones((2, DIM)))
    assert ours(mx.ones((2, DIM))).shape == (2, DIM)


@pytest.mark.parametrize("evaluated", [False, True])
def test_weights_changed_after_loading_are_refused_by_name(plain, evaluated):
    model = lazily(small(), plain)
    up = model.layers[0]["mlp"]["switch"].up_proj
    # A sum with zeros changes no value, so it is not refused.
    for change, is_refused in ((mx.zeros(1), False), (mx.ones(1), True)):
        up.weight = up.weight + change
        if evaluated:
            mx.eval(up.weight)
        wrong = pytest.raises(ModelError, match=r"switch\.up_proj\.weight.* others")
        with wrong if is_refused else contextlib.nullcontext():
            opened(model, plain).close()


@pytest.mark.parametrize("dtype", [mx.float32, mx.bool_])
def test_ids_that_are_no_integers_are_refused_by_any_number_of_slots(plain, dtype):
    for n_slots in (1, 4, 20):
        memory = SLACK + n_slots * slot_bytes(lazily(small(), plain), plain)
        ours = stream(lazily(small(), plain), plain, expert_memory=memory)
        block = ours.layers[0]["mlp"]["switch"]
        with pytest.raises((ExpertStoreError, ValueError), match="integ"):
            mx.eval(block(mx.ones((2, DIM)), mx.array([[0, 1], [1, 0]], dtype)))


def test_an_id_without_an_expert_names_the_block(plain):
    ours = stream(lazily(small(), plain), plain, expert_memory=SLACK + 20 * SLOT)
    block = ours.layers[0]["mlp"]["switch"]
    with pytest.raises(ExpertStoreError, match=r"layers\.0\.mlp\.switch: .* 0 to 4"):
        block(mx.ones((1, DIM)), mx.array([[1, 5]]))


def test_a_failed_read_names_block_and_expert(plain):
    ours = stream(lazily(small(), plain), plain, expert_memory=SLACK + 20 * SLOT)
    file = plain / "model.safetensors"
    with open(file, "r+b") as cut:
        cut.truncate(2000)
    with pytest.raises(
        ExpertStoreError, match=r"expert \d of layers\.0\.mlp\.switch at"
    ):
        ours(mx.ones((2, DIM)))


def test_threads_take_turns(plain):
    stock = small()
    ours = stream(lazily(small(), plain), plain, expert_memory=SLACK + 20 * SLOT)
    inputs = [mx.random.normal((n, DIM), key=mx.random.key(n)) for n in range(1, 9)]
    wanted = [stock(x) for x in inputs]
    mx.eval(inputs, wanted)
    same: list[bool] = []

    def work(x: mx.array, want: mx.array) -> None:
        for _ in range(5):
            same.append(mx.array_equal(ours(x + 0), want).item())

    pairs = zip(inputs, wanted, strict=True)
    threads = [threading.Thread(target=work, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * 40


def test_tensors_that_sanitize_makes_are_refused_by_name(tmp_path):
    model = small()
    path = saved(model, tmp_path / "model")
    tensors = mx.load(str(path / "model.safetensors"))
    changed = {
        name: x.swapaxes(1, 2) if "gate" in name else x for name, x in tensors.items()
    }
    mx.save_safetensors(str(path / "model.safetensors"), changed)

    class Sanitized(Layers):
        def sanitize(self, weights):
            return {
                name: x.swapaxes(1, 2) if "gate" in name else x
                for name, x in weights.items()
            }

    model = Sanitized(SwitchGLU(DIM, DIM, 5))
    with pytest.raises(ModelError, match=r"switch\.gate_proj\.weight.*moeflux pack"):
        stream(model, path)


def test_tensors_that_sanitize_renames_are_streamed(tmp_path):
    stock = small()
    path = saved(stock, tmp_path / "model")
    file = str(path / "model.safetensors")
    tensors = mx.load(file)
    mx.save_safetensors(file, {f"old.{name}": x for name, x in tensors.items()})

    class Renamed(Layers):
        def sanitize(self, weights):
            return {name.removeprefix("old."): x for name, x in weights.items()}

    model = Renamed(SwitchGLU(DIM, DIM, 5))
    model.load_weights([*model.sanitize(mx.load(file)).items()])
    ours = stream(model, path, expert_memory=SLACK + 20 * SLOT)
    x = mx.random.normal((3, DIM))
    assert mx.array_equal(stock(x), ours(x))


def test_too_little_memory_states_the_minimum(plain):
    with pytest.raises(BudgetError, match=r"at least \d+ bytes"):
        stream(lazily(small(), plain), plain, expert_memory=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Iterator[Path]:
    """A tiny qwen3_moe with a tokenizer, at 4 bits."""
    import sys

    from tiny import write_tokenizer

    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import families
        import family_trials
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    path = tmp_path_factory.mktemp("door") / "qwen3_moe"
    path.mkdir()
    family_trials.write_model(path, "qwen3_moe", 4)
    write_tokenizer(path, families.VOCAB)
    yield path


def test_load_uses_mlx_lms_class_where_ours_steps_aside(checkpoint, capsys):
    stock, _ = load_model(checkpoint)
    ours, tokenizer = moeflux_mlx.load(checkpoint, expert_memory=SLACK + 4 * SLOT)
    said = capsys.readouterr().err
    why = "our own class does not support use_sliding_window"
    assert said.count(f"model class: mlx-lm's qwen3_moe, {why}") == 1
    assert ours.streamer.n_slots == 4 and tokenizer.vocab_size
    tokens = mx.array([[1, 2, 3]])
    assert mx.array_equal(stock(tokens), ours(tokens))


def test_load_without_a_bound_is_mlx_lms_own_model(checkpoint):
    model, _ = moeflux_mlx.load(checkpoint)
    assert type(model.model.layers[0].mlp.switch_mlp) is SwitchGLU


# Their modules hold arrays that are no parameters: positions, slopes, a scaled norm.
@pytest.mark.sampled
@pytest.mark.parametrize("family", ["deepseek_v2", "bailing_moe_linear", "kimi_k3"])
@pytest.mark.parametrize("expert_memory", [None, "3MB"], ids=["whole", "streamed"])
def test_the_first_call_may_be_another_threads(family, expert_memory, tmp_path):
    import families
    import family_trials
    from tiny import write_tokenizer

    family_trials.write_model(tmp_path, family, None)
    write_tokenizer(tmp_path, families.VOCAB)
    tokens = mx.array([[1, 2, 3]])
    wanted = load_model(tmp_path)[0](tokens)
    mx.eval(wanted)
    model, _ = moeflux_mlx.load(tmp_path, expert_memory=expert_memory)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(lambda: mx.array_equal(model(tokens), wanted).item())
        assert call.result()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"executor": "ops"}, r"\[executor\] expected none"),
        ({"optimistic": "maybe"}, r"\[optimistic\] expected one of"),
    ],
)
def test_load_refuses_options_that_mlx_lms_class_lacks(checkpoint, options, message):
    with pytest.raises(ConfigError, match=message):
        moeflux_mlx.load(checkpoint, **options)


@pytest.mark.parametrize("expert_memory", [None, "3MB"], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    "changes",
    [
        {"moe_intermediate_size": 1},
        {"head_dim": 1, "num_attention_heads": 1},
        {"quantization": {"group_size": 32, "bits": 4, "lm_head": {"group_size": 0}}},
    ],
    ids=["experts", "attention", "table"],
)
def test_a_group_size_that_mlx_would_divide_by_is_refused(
    changes, expert_memory, copied
):
    edit_config(copied, **changes)
    with pytest.raises(ModelError, match=r"(proj|lm_head) to have a group_size of 16"):
        moeflux_mlx.load(copied, expert_memory=expert_memory)


def test_load_uses_mlx_lms_class_if_we_have_none(copied, capsys):
    edit_config(copied, model_type="olmoe")
    with pytest.raises(ModelError, match="olmoe"):
        moeflux_mlx.load(copied)
    said = capsys.readouterr().err
    assert said.count("model class: mlx-lm's olmoe, there is none of our own") == 1


def test_requesting_a_missing_class_of_ours_is_an_error(copied):
    with pytest.raises(
        ModelError, match="our own class does not support use_sliding_window"
    ):
        moeflux_mlx.load(copied, native=True)
    edit_config(copied, model_type="olmoe")
    with pytest.raises(ModelError, match="expected a supported model type"):
        moeflux_mlx.load(copied, native=True)


@pytest.fixture
def copied(checkpoint, tmp_path) -> Path:
    """A copy of the checkpoint, for tests to change."""
    return shutil.copytree(checkpoint, tmp_path / "copy")


def edit_config(path: Path, **changes: object) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


ENGINE = ("graph", "ops", "lowering", "launch", "executors", "metal", "simulator")


def test_experts_and_the_door_import_nothing_of_the_engine():
    package = ROOT / "moeflux_mlx"
    left = [*sorted((package / "experts").rglob("*.py")), package / "streaming.py"]
    seen: set[Path] = set()
    while left:
        path = left.pop()
        if path in seen:
            continue
        seen.add(path)
        assert not any((package / name) in path.parents for name in ENGINE), path
        left += imported(path, package)
    assert {p.name for p in seen} >= {"weights.py", "streamer.py", "switch.py"}


def imported(path: Path, package: Path) -> list[Path]:
    """Return the package's modules that a module imports, directly or not."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1]
            names = [node.module] if node.module else [a.name for a in node.names]
            for name in names:
                place = base / name.replace(".", "/")
                nested = [place / f"{alias.name}.py" for alias in node.names]
                found += [place.with_suffix(".py"), *nested]
        elif isinstance(node, ast.Import):
            assert not any(a.name.startswith(package.name) for a in node.names)
    return [module for module in found if module.is_file()]


def test_a_block_shows_the_form_of_its_matrices():
    model = make([dict.fromkeys(GATED, FORMS[1]), dict.fromkeys(GATED), {"fc1": None}])
    blocks = find_blocks(model)
    assert [b.path for b in blocks] == [f"layers.{i}.mlp.switch" for i in range(3)]
    assert blocks[0].quantization == dict.fromkeys(GATED, Quantization(4, 64))
    assert isinstance(blocks[0].projections["up_proj"], QuantizedSwitchLinear)
    assert blocks[2].quantization == {"fc1": None, "fc2": None}
    assert ("fc1", "bias") in blocks[2].parts and ("fc1", "scales") not in blocks[
        2
    ].parts
