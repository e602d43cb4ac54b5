"""Packs of any family are made by the model's own sanitize and run by its class."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import mixtral
from mlx_lm.models.cache import ConcatenateKVCache
from mlx_lm.utils import load_model, save_model
from test_saving import arrays, assert_alike, assert_same, command
from tiny import write_tokenizer

import moeflux_mlx
from moeflux_mlx.cli import main
from moeflux_mlx.cli.inspect import summarize
from moeflux_mlx.errors import ConfigError, ExpertStoreError, ModelError
from moeflux_mlx.experts.files.manifest import MANIFEST_NAME, Manifest, checksum_of
from moeflux_mlx.experts.files.pack import pack
from moeflux_mlx.experts.files.packed import PackedExperts, verify
from moeflux_mlx.experts.files.safetensors import read_header
from moeflux_mlx.experts.files.stock import load_lazily
from moeflux_mlx.experts.pool.routing_trace import RoutingTrace
from moeflux_mlx.streaming import stream

ROOT = Path(__file__).resolve().parents[1]
TOKENS = mx.array([[5, 6, 7, 9, 11, 4]])
LEAST = "2200kB"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """Make the scripts' modules importable."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


def write(path: Path, family: str, bits: int | None = None, **sizes) -> Path:
    import families
    import family_trials

    path.mkdir()
    family_trials.write_model(path, family, bits, **sizes)
    write_tokenizer(path, families.VOCAB)
    return path


def logits(model) -> mx.array:
    return model(TOKENS)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("family", "bits"),
    [("gpt_oss", 4), ("qwen3_next", None), ("nemotron_h", 4), ("gemma4_text", None)],
)
def test_packs_stream_with_stocks_bits_through_one_slot(family, bits):
    import family_trials

    (outcome,) = family_trials.try_family(
        family, bits, forms=(True,), prompts=(8, 40), n_greedy=4
    )
    assert outcome.n_blocks > 0 and outcome.why == ""


def rewrite(path: Path, change) -> Path:
    """Apply ``change`` to the tensors of a model's directory."""
    file = path / "model.safetensors"
    tensors = change(mx.load(str(file)))
    mx.eval(tensors)
    (path / "model.safetensors.index.json").unlink(missing_ok=True)
    mx.save_safetensors(str(file), tensors)
    return path


def unstacked(stack: str, one: str, names: dict[str, str]):
    """Return a change that gives each expert its own tensors, as in releases."""

    def change(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
        made = {}
        for name, array in tensors.items():
            if f".{stack}." not in name:
                made[name] = array
                continue
            front, _, rest = name.partition(f".{stack}.")
            projection, part = rest.split(".")
            for e in range(len(array)):
                made[f"{front}.{one}.{e}.{names[projection]}.{part}"] = array[e]
        return made

    return change


PLAIN_NAMES = {name: name for name in ("gate_proj", "up_proj", "down_proj")}
W_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def eight_bit_floats(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    """Store matrices as published for deepseek_v3: fp8, a scale for each 128 x 128."""
    made = {}
    change = unstacked("switch_mlp", "experts", PLAIN_NAMES)
    for name, array in change(tensors).items():
        if ".experts." in name or ".shared_experts." in name:
            n_rows, n_columns = array.shape
            made[name] = mx.to_fp8(array)
            shape = (-(-n_rows // 128), -(-n_columns // 128))
            made[f"{name}_scale_inv"] = mx.random.uniform(0.5, 1.5, shape)
        else:
            made[name] = array
    return made


def interleaved(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    """Store gpt_oss's experts as published: gate and up in turn, mxfp4 in blocks."""
    made = {}
    for name, array in tensors.items():
        if ".experts." not in name:
            made[name] = array
    for name in [n for n in tensors if n.endswith("experts.gate_proj.weight")]:
        stem = name.removesuffix("gate_proj.weight")
        for part, suffix in (
            ("weight", "_blocks"),
            ("scales", "_scales"),
            ("bias", ""),
        ):
            gate, up, down = (
                tensors[f"{stem}{p}.{part}"]
                for p in ("gate_proj", "up_proj", "down_proj")
            )
            both = mx.stack([gate, up], axis=2).reshape(len(gate), -1, *gate.shape[2:])
            for projection, whole in (("gate_up_proj", both), ("down_proj", down)):
                if part == "bias":
                    made[f"{stem}{projection}_bias"] = whole
                    continue
                if part == "weight":
                    whole = whole.view(mx.uint8).reshape(*whole.shape[:2], -1, 16)
                made[f"{stem}{projection}{suffix}"] = whole
    return made


def write_gpt_oss(path: Path) -> Path:
    """Write a gpt_oss whose experts alone are in mxfp4."""
    import families
    import mlx.nn as nn
    from mlx_lm.models import gpt_oss

    form = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    config = families.configuration("gpt_oss")
    mx.random.seed(5)
    model = gpt_oss.Model(gpt_oss.ModelArgs.from_dict(config))
    nn.quantize(
        model,
        **form,
        class_predicate=lambda p, m: ".experts." in p and hasattr(m, "to_quantized"),
    )
    path.mkdir()
    save_model(path, model)
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (path / "config.json").write_text(json.dumps(config))
    write_tokenizer(path, families.VOCAB)
    return rewrite(path, interleaved)


ORIGINAL = {
    "mixtral": unstacked("switch_mlp", "experts", W_NAMES),
    "qwen3_moe": unstacked("switch_mlp", "experts", PLAIN_NAMES),
    "deepseek_v3": eight_bit_floats,
    "gpt_oss": None,
}


@pytest.fixture(params=[*ORIGINAL])
def original(request, tmp_path) -> Path:
    path = tmp_path / "original"
    if request.param == "gpt_oss":
        return write_gpt_oss(path)
    return rewrite(write(path, request.param), ORIGINAL[request.param])


@pytest.mark.sampled
def test_original_forms_are_packed_to_stocks_bits(original, tmp_path):
    stock, _ = load_model(original)
    wanted = logits(stock)
    # Each of these is computed from others, so it cannot be streamed as it is.
    with pytest.raises(ModelError, match=f"'moeflux pack {original} DST'"):
        stream(load_lazily(original).model, original, expert_memory=LEAST)
    pack(original, tmp_path / "packed", verify=True)
    ours, _ = moeflux_mlx.load(tmp_path / "packed", expert_memory=LEAST)
    assert not ours.streamer.resident
    assert mx.array_equal(logits(ours), wanted)
    stocks_own, _ = load_model(tmp_path / "packed", trust_remote_code=True)
    assert mx.array_equal(logits(stocks_own), wanted)


def test_a_pack_of_an_original_form_has_the_modules_own_names(tmp_path):
    path = rewrite(write(tmp_path / "fp8", "deepseek_v3"), eight_bit_floats)
    stock, _ = load_model(path)
    pack(path, tmp_path / "packed")
    resident = read_header(tmp_path / "packed" / "model.safetensors")
    arrays = dict(tree_flatten(stock.parameters()))
    assert {*resident} == {name for name in arrays if "switch_mlp" not in name}
    found = mx.load(str(tmp_path / "packed" / "model.safetensors"))
    for name, array in found.items():
        assert array.dtype == arrays[name].dtype
        assert mx.array_equal(array, arrays[name])
    manifest = Manifest.read(tmp_path / "packed" / MANIFEST_NAME)
    assert [e.block for e in manifest.layers] == ["model.layers.1.mlp.switch_mlp"]


def test_records_hold_the_tensors_that_sanitize_makes(tmp_path):
    path = rewrite(write(tmp_path / "fp8", "deepseek_v3"), eight_bit_floats)
    block = load_model(path)[0].model.layers[1].mlp.switch_mlp
    pack(path, tmp_path / "packed")
    with PackedExperts.open(tmp_path / "packed") as store:
        layout = store.layout(0)
        data = np.fromfile(store.path(0), np.uint8).reshape(-1, layout.stride)
        assert len(data) == store.count(0) == 8
        for spec in layout.tensors:
            own = data[:, spec.offset : spec.offset + spec.n_bytes]
            whole = np.array(block[spec.projection][spec.part].view(mx.uint8))
            assert np.array_equal(own, whole.reshape(8, -1))


def test_a_pack_is_streamed_with_the_model_of_its_checkpoint(tmp_path):
    path = write(tmp_path / "plain", "qwen3_moe", 4)
    pack(path, tmp_path / "packed")
    wanted = logits(load_model(path)[0])
    model = load_lazily(path).model
    ours = stream(model, tmp_path / "packed", expert_memory=LEAST)
    assert mx.array_equal(logits(ours), wanted)
    other = load_lazily(write(tmp_path / "other", "qwen3_moe")).model
    with pytest.raises(ExpertStoreError, match=r"layers\.0\.mlp\.switch_mlp: expected"):
        stream(other, tmp_path / "packed", expert_memory=LEAST)
    other = load_lazily(write(tmp_path / "mixtral", "mixtral")).model
    with pytest.raises(ExpertStoreError, match="to another model"):
        stream(other, tmp_path / "packed", expert_memory=LEAST)


def test_a_pack_for_our_own_class_runs_through_the_door_too(checkpoint, packed):
    wanted = logits(load_model(checkpoint)[0])
    ours, _ = moeflux_mlx.load(packed, native=False, expert_memory="2500kB")
    assert type(ours).__module__.startswith("mlx_lm.models")
    assert not ours.streamer.resident
    assert mx.array_equal(logits(ours), wanted)


def test_our_own_class_refuses_a_pack_by_path(packed, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(packed, copy)
    edit(copy, lambda layer: layer.update(block=f"layers.{layer['layer']}.mlp"))
    for action in (moeflux_mlx.load, verify, PackedExperts.open):
        with pytest.raises(ExpertStoreError, match="layers by number"):
            action(copy)


def edit(path: Path, change) -> None:
    """Change every layer of a pack's manifest, and its checksum to match."""
    fields = json.loads((path / MANIFEST_NAME).read_text())
    for layer in fields["layers"]:
        change(layer)
    fields["checksum"] = checksum_of(fields)
    (path / MANIFEST_NAME).write_text(json.dumps(fields))


def second(layer: dict) -> None:
    layer["block"] = "model.layers.9.mlp.switch_mlp"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layer: layer.update(block=""), "block to be a path"),
        (lambda layer: layer.update(block=5), "block to be str"),
        (second, "a path of its own everywhere"),
        (lambda layer: layer["checksums"].pop(), "n_bytes"),
        (lambda layer: layer.update(block=f"x.{layer['layer']}"), "to another model"),
    ],
)
def test_a_manifest_of_other_blocks_is_refused(tmp_path, change, message):
    path = write(tmp_path / "plain", "qwen3_moe", 4)
    pack(path, tmp_path / "packed")
    edit(tmp_path / "packed", change)
    with pytest.raises((ExpertStoreError, ModelError), match=message):
        moeflux_mlx.load(tmp_path / "packed", expert_memory=LEAST)


def test_packing_continues_where_it_stopped(tmp_path):
    path = rewrite(write(tmp_path / "plain", "mixtral"), ORIGINAL["mixtral"])
    pack(path, tmp_path / "whole")

    def stop(what: str, done: int, total: int) -> None:
        if what == "layer 1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(path, tmp_path / "packed", progress=stop)
    said: list[str] = []
    pack(path, tmp_path / "packed", progress=lambda what, *_: said.append(what))
    assert said[0] == "layer 0 kept" and "layer 0" not in said
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "packed" / file.name).read_bytes() == file.read_bytes()


PEAK = """
import resource, sys
from moeflux_mlx.experts.files.pack import pack
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
pack(sys.argv[1], sys.argv[2])
print(1024 * (peak() - before))
"""


@pytest.mark.slow
def test_packing_an_original_form_holds_one_tensor_of_a_layer(tmp_path):
    import families
    from mlx_lm.models import mixtral

    config = families.configuration("mixtral")
    n_layers, n_experts, width, dim = 8, 8, 256, 1024
    config |= {"num_hidden_layers": n_layers, "hidden_size": dim}
    config |= {"intermediate_size": width, "num_local_experts": n_experts}
    model = mixtral.Model(mixtral.ModelArgs.from_dict(config))
    path = tmp_path / "plain"
    path.mkdir()
    save_model(path, model)
    (path / "config.json").write_text(json.dumps(config))
    rewrite(path, ORIGINAL["mixtral"])
    command = [sys.executable, "-c", PEAK, str(path), str(tmp_path / "packed")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    tensor = 4 * n_experts * width * dim
    experts = 3 * n_layers * tensor
    # A stack and its sources together, and the code that stacks.
    assert int(done.stdout) < 2 * tensor + (24 << 20) < experts / 4


def test_every_command_takes_a_model_of_mlx_lms_class(tmp_path, capsys):
    path = write(tmp_path / "plain", "qwen3_moe", 4)
    packed, trace = tmp_path / "packed", tmp_path / "trace.npz"
    memory = ["--expert-memory", LEAST]
    prompt = ["--prompt", "abc", "--max-tokens", "3"]

    def run(*args: str | Path) -> str:
        assert main([*map(str, args)]) == 0
        return capsys.readouterr().out

    assert "8 experts in each of 2 routed blocks" in run("pack", path, packed)
    assert "8 in each of 2 layers, 2 per token" in run("inspect", path)
    assert json.loads(run("inspect", packed, "--json"))["reads_per_expert"] == 1
    assert "experts-001.bin" in run("verify", packed)
    run("generate", "--model", packed, *prompt, *memory)
    run("trace", packed, *prompt, "--output", trace, *memory)
    first = RoutingTrace.load(trace)
    run("trace", path, *prompt, "--output", trace)
    both = RoutingTrace.load(trace)
    assert np.array_equal(first.chosen, both.chosen)
    assert first.record_bytes == both.record_bytes
    assert first.chosen.shape[1:] == (2, 2) and first.n_experts == 8
    assert "optimum" in run("cachesim", trace)
    assert main(["inspect", str(packed), "--graph", "0"]) == 2
    assert "a native class" in capsys.readouterr().err


def test_compare_stacks_a_packs_experts_again(tmp_path):
    from moeflux_mlx.measure.compare import load_stock

    path = write(tmp_path / "plain", "gpt_oss", 4)
    pack(path, tmp_path / "packed")
    stock, again = load_model(path)[0], load_stock(tmp_path / "packed")
    assert mx.array_equal(logits(stock), logits(again))


def test_a_damaged_record_names_its_block(tmp_path, capsys):
    path = write(tmp_path / "plain", "qwen3_moe", 4)
    pack(path, tmp_path / "packed")
    file = tmp_path / "packed" / "experts-001.bin"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    assert main(["verify", str(tmp_path / "packed")]) == 1
    assert "expert 0 of layer 1" in capsys.readouterr().err
    name = r"expert 0 of model\.layers\.1\.mlp\.switch_mlp"
    with pytest.raises(ExpertStoreError, match=name):
        moeflux_mlx.load(tmp_path / "packed", expert_memory="100MB")


def test_a_model_without_routed_blocks_needs_no_packing(tmp_path):
    path = write(tmp_path / "plain", "dbrx")
    for action in (lambda: pack(path, tmp_path / "packed"), lambda: summarize(path)):
        with pytest.raises(
            ModelError, match="expected routed experts in mlx-lm's dbrx"
        ):
            action()
    assert not (tmp_path / "packed").exists()


def test_a_tensor_in_two_files_is_refused(tmp_path):
    path = write(tmp_path / "plain", "qwen3_moe", 4)
    name = "model.layers.0.mlp.switch_mlp.up_proj.scales"
    tensors = mx.load(str(path / "model.safetensors"))
    mx.save_safetensors(str(path / "model-2.safetensors"), {name: tensors[name]})
    for action in (
        lambda: pack(path, tmp_path / "packed"),
        lambda: moeflux_mlx.load(path, expert_memory=LEAST),
    ):
        with pytest.raises(ModelError, match=f"{name}.*model-2"):
            action()


@pytest.fixture
def streamed(tmp_path):
    path = write(tmp_path / "plain", "deepseek_v3", 4)
    return moeflux_mlx.load(path, expert_memory=LEAST)[0]


def test_a_streamed_model_is_saved_completely(streamed, tmp_path):
    save_model(tmp_path / "out", streamed)
    streamed.save_weights(str(tmp_path / "w.safetensors"))
    load_model(tmp_path / "plain")[0].save_weights(str(tmp_path / "s.safetensors"))
    wanted = mx.load(str(tmp_path / "s.safetensors"))
    assert_same(arrays(tmp_path / "out"), wanted)
    assert_same(mx.load(str(tmp_path / "w.safetensors")), wanted)


def adapters(path: Path) -> Path:
    """Write adapters as ``mlx_lm.lora`` does, for a matrix of the last layer."""
    path.mkdir()
    lora = {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": lora}
    (path / "adapter_config.json").write_text(json.dumps(config))
    name = "model.layers.1.self_attn.q_proj"
    arrays = {f"{name}.lora_a": mx.ones((64, 2)), f"{name}.lora_b": mx.ones((2, 64))}
    mx.save_safetensors(str(path / "adapters.safetensors"), arrays)
    return path


@pytest.fixture(scope="module")
def plain_and_packed(tmp_path_factory):
    """A model of mlx-lm's class that mlx-lm's commands load, plain and packed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        path = write(tmp_path_factory.mktemp("commands") / "plain", "qwen3_moe", 4)
    pack(path, path.with_name("packed"))
    return path, path.with_name("packed")


@pytest.mark.parametrize("more", [[], ["-q"], ["--dtype", "float16"]], ids=str)
def test_convert_of_a_pack_is_the_checkpoints(plain_and_packed, tmp_path, more):
    for path, name in zip(plain_and_packed, ("stock", "out"), strict=True):
        command("convert", "--hf-path", path, "--mlx-path", tmp_path / name, *more)
    assert_alike(tmp_path / "out", tmp_path / "stock", logits)


@pytest.mark.parametrize("more", [[], ["--dequantize"]], ids=str)
def test_fuse_of_a_pack_is_the_checkpoints(plain_and_packed, tmp_path, more):
    adapter = adapters(tmp_path / "adapters")
    for path, name in zip(plain_and_packed, ("stock", "out"), strict=True):
        flags = ["--adapter-path", adapter, "--save-path", tmp_path / name, *more]
        command("fuse", "--model", path, *flags)
    assert_alike(tmp_path / "out", tmp_path / "stock", logits)


def test_a_fused_checkpoint_is_packed_and_gives_stocks_bits(plain_and_packed, tmp_path):
    out, adapter = tmp_path / "out", adapters(tmp_path / "adapters")
    more = ["--adapter-path", adapter, "--save-path", out]
    command("fuse", "--model", plain_and_packed[0], *more)
    pack(out, tmp_path / "packed")
    stock, before = load_model(out)[0], load_model(plain_and_packed[0])[0]
    assert not mx.allclose(logits(stock), logits(before), atol=0.01)
    model = moeflux_mlx.load(tmp_path / "packed", expert_memory=LEAST)[0]
    assert mx.array_equal(logits(model), logits(stock))


def test_a_state_that_cannot_be_saved_is_refused_before_generation(
    tmp_path, capsys, monkeypatch
):
    path = write(tmp_path / "plain", "mixtral", 4)
    kinds = [ConcatenateKVCache() for _ in range(2)]
    monkeypatch.setattr(mixtral.Model, "make_cache", lambda _: kinds, raising=False)
    command = ["generate", "--model", str(path), "--prompt", "abc", "--save-state"]
    assert main([*command, str(tmp_path / "state"), "--expert-memory", LEAST]) == 2
    told = capsys.readouterr()
    assert "[state] layer 0: expected a cache of KVCache, " in told.err
    assert "but got ConcatenateKVCache: " in told.err
    # Nothing was generated.
    assert "tokens/s" not in told.out
    assert not (tmp_path / "state").exists()


def rename(old: str, new: str):
    def change(layouts: list[dict]) -> None:
        for layout in layouts:
            layout["quantization"][new] = layout["quantization"].pop(old)
            for tensor in layout["tensors"]:
                if tensor["projection"] == old:
                    tensor["projection"] = new

    return change


def drop(layouts: list[dict]) -> None:
    for layout in layouts:
        del layout["quantization"]["down_proj"]
        layout["tensors"] = [
            t for t in layout["tensors"] if t["projection"] != "down_proj"
        ]


def unknown_part(layouts: list[dict]) -> None:
    for layout in layouts:
        for tensor in layout["tensors"]:
            if tensor["part"] == "biases":
                tensor["part"] = "bias"


@pytest.mark.parametrize(
    "change",
    [rename("gate_proj", "fc1"), rename("down_proj", "fc2"), drop, unknown_part],
)
def test_our_own_class_refuses_a_pack_without_its_projections(packed, tmp_path, change):
    copy = tmp_path / "copy"
    shutil.copytree(packed, copy)
    fields = json.loads((copy / MANIFEST_NAME).read_text())
    change(fields["layouts"])
    fields["checksum"] = checksum_of(fields)
    (copy / MANIFEST_NAME).write_text(json.dumps(fields))
    for action in (moeflux_mlx.load, verify):
        with pytest.raises(ExpertStoreError, match=r"moeflux\.json"):
            action(copy)


def test_a_streamed_model_is_not_divided(streamed):
    group, others = mx.distributed.init(), SimpleNamespace(size=lambda: 2)
    before = logits(streamed)
    for divide, by in (streamed.shard, others), (streamed.model.pipeline, group):
        with pytest.raises(ModelError, match=r"load\(group=\)"):
            divide(by)
    streamed.shard(group)
    assert mx.array_equal(logits(streamed), before)


# Billions of parameters, counted from the published shapes.
SIZES = {
    "Qwen3-30B-A3B": (30.53e9, 48, 128, 8),
    "Qwen3-Next-80B-A3B": (79.7e9, 48, 512, 10),
    "gpt-oss-120b": (116.8e9, 36, 128, 4),
    "GLM-4.5-Air": (106.9e9, 45, 128, 8),
    "DeepSeek-V3": (671.0e9, 58, 256, 8),
    "Kimi-K2": (1026.4e9, 60, 384, 8),
    "MiniMax-M2": (228.7e9, 62, 256, 8),
}


@pytest.mark.sampled
@pytest.mark.parametrize("name", SIZES)
def test_published_sizes_are_inspected(name, tmp_path):
    import real_sizes

    n_parameters = real_sizes.write_sparse(tmp_path, name)
    summary = summarize(tmp_path)
    found = (summary.n_moe_layers, summary.n_experts, summary.top_k)
    published, *expected = SIZES[name]
    assert found == (*expected,)
    assert n_parameters == pytest.approx(published, rel=1e-3)
    # 4 bits; a scale and a bias per 64 values, or an 8-bit scale per 32.
    bits = 4.25 if "mxfp4 4 bits/32" in summary.forms else 4.5
    in_experts = 8 * summary.expert_bytes / bits
    assert 0.9 * n_parameters < in_experts < 1.02 * n_parameters


def test_a_loaded_pack_takes_other_weights(tmp_path):
    path = write(tmp_path / "plain", "qwen3_moe")
    pack(path, tmp_path / "packed")
    model, _ = load_model(tmp_path / "packed", trust_remote_code=True)
    norm = mx.full((64,), 2.0)
    model.load_weights([("model.norm.weight", norm)], strict=False)
    assert mx.array_equal(model.model.norm.weight, norm)


def test_options_of_our_own_class_are_refused_for_a_pack(tmp_path):
    path = write(tmp_path / "plain", "qwen3_moe", 4)
    pack(path, tmp_path / "packed")
    with pytest.raises(ConfigError, match=r"\[executor\] expected none"):
        moeflux_mlx.load(tmp_path / "packed", executor="ops")
