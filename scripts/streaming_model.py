"""A large checkpoint of random weights whose tokens choose the experts of a trace.

Part of ``scripts/bench_streaming decode``. The layers have a published geometry. The
model's own routers make the choices of a given trace, so no engine needs to know the
trace. Token t stands for step t of the trace. Its embedding dominates the residual
stream, because layers add little. The rows of each router are solved for from the
embeddings, so that token t gives the trace's experts the highest scores.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import real_sizes
from bench_geometry import BITS, GEOMETRIES, GROUP_SIZE, ROUTER_BITS
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3_5_moe, qwen3_moe
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import SwitchGLU
from mlx_lm.utils import load_tokenizer, quantize_model, save_config

import moeflux_mlx
from moeflux_mlx.engine.graph.lower import LoweredCall
from moeflux_mlx.experts.files.pack import pack
from moeflux_mlx.experts.files.packed import is_packed
from moeflux_mlx.ops import MoeSoftmaxTopK

# Geometries that run in mlx-lm's class.
DOOR_GEOMETRIES = {"qwen3-30b-a3b": real_sizes.MODELS["Qwen3-30B-A3B"]}

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "models" / "demo"
# Standard deviation and mean of uniform 4-bit values. A matrix's scale is its wanted
# deviation divided by the former.
DEVIATION, MIDDLE = 4.61, 7.5
# Size of the rows that matrices add to the residual stream, relative to the stream.
ADDED = 0.1
WRITERS = ("o_proj", "out_proj", "down_proj")
# Difference of router logits: between chosen and other experts, and between ranks.
LEAD, RANK_STEP = 8.0, 0.2
TRACE_NAME = "routing.npz"


@dataclass(frozen=True)
class TracedModel:
    """Where the checkpoint and its pack are, and the experts that tokens choose.

    ``routing`` has ``[N, layers, K]`` expert ids for each trace. ``native``: a class of
    our own runs the model, else mlx-lm's.
    """

    plain: Path
    packed: Path
    routing: dict[str, np.ndarray]
    native: bool = True

    def tokens(self, trace: str) -> list[int]:
        """Return the N tokens that stand for the steps of a trace."""
        names = list(self.routing)
        n = len(self.routing[trace])
        first = names.index(trace) * n
        return list(range(first, first + n))


def make_model(
    directory: Path, geometry: str, n_layers: int, dtype: mx.Dtype, n_steps: int
) -> TracedModel:
    """Write the checkpoint and its pack below ``directory`` unless they are there."""
    kind = str(dtype).removeprefix("mlx.core.")
    home = directory / f"{geometry}-{n_layers}-layers-{kind}-{n_steps}-steps"
    plain, packed = home / "plain", home / "packed"
    # The traces are written last, so without them the checkpoint is incomplete.
    if not (plain / TRACE_NAME).is_file():
        shutil.rmtree(plain, ignore_errors=True)
        config = geometry_config(geometry, n_layers)
        routing = make_traces(config, n_steps)
        write_checkpoint(plain, config, dtype, routing)
    if not is_packed(packed):
        pack(plain, packed)
    with np.load(plain / TRACE_NAME) as arrays:
        routing = {name: arrays[name] for name in arrays}
        return TracedModel(plain, packed, routing, geometry in GEOMETRIES)


def geometry_config(geometry: str, n_layers: int) -> dict[str, Any]:
    """Return a geometry's text configuration with fewer layers and a small vocabulary.

    The vocabulary is the demo model's, because on a CPU an output matrix of 248,000
    rows takes longer than all layers.
    """
    cut = dict(num_hidden_layers=n_layers, vocab_size=load_tokenizer(DEMO).vocab_size)
    if geometry in DOOR_GEOMETRIES:
        return DOOR_GEOMETRIES[geometry] | cut
    published = GEOMETRIES[geometry]
    return dict(
        published | cut,
        model_type="qwen3_5_moe_text",
        # The published value. Without images only mlx-vlm's loader reads it.
        rope_parameters={**published["rope_parameters"], "mrope_section": [11, 11, 10]},
    )


def make_traces(config: dict[str, Any], n_steps: int) -> dict[str, np.ndarray]:
    """Return the Zipf-like and the recorded trace, ``[n_steps, layers, K]`` each."""
    shape = (n_steps, config["num_hidden_layers"])
    n_experts, k = config["num_experts"], config["num_experts_per_tok"]
    # On the CPU, so that every device follows the same trace.
    with mx.stream(mx.cpu):
        recorded = recorded_trace(*shape, n_experts, k)
    return {
        "zipf": zipf_trace(*shape, n_experts, k),
        "recorded": recorded,
    }


def zipf_trace(n_steps: int, n_layers: int, n_experts: int, k: int) -> np.ndarray:
    """Draw K distinct experts per step; a layer's r-th favourite has the weight 1/r.

    Steps are independent, so an expert returns only because it is popular.
    """
    rng = np.random.default_rng(0)
    weights = -np.log(np.arange(1, n_experts + 1))
    # The K largest sums of log-weight and Gumbel noise are K draws without replacement.
    noisy = weights + rng.gumbel(size=(n_steps, n_layers, n_experts))
    favourites = np.argsort(-noisy, axis=-1)[..., :k]
    orders = np.stack([rng.permutation(n_experts) for _ in range(n_layers)])
    return np.stack([orders[i][favourites[:, i]] for i in range(n_layers)], axis=1)


def recorded_trace(n_steps: int, n_layers: int, n_experts: int, k: int) -> np.ndarray:
    """Return choices that the demo model made in K texts, combined into one trace.

    Text i gives expert i of each step's K, out of ``n_experts / K`` experts of its own.
    So a token uses the published share of experts, and choices keep their recorded
    order. The ranks and layers of the demo model are used in turn.
    """
    model, tokenizer = moeflux_mlx.load(DEMO, executor="ops")
    texts = sorted(
        (ROOT / "moeflux_mlx").rglob("*.py"), key=lambda p: -p.stat().st_size
    )
    columns = []
    for i, path in enumerate(texts[:k]):
        tokens = tokenizer.encode(path.read_text()[: 8 * n_steps])[:n_steps]
        choices = record_routing(model, tokens)
        _, n_recorded, n_ranks = choices.shape
        own = n_experts // k
        layers = np.arange(n_layers) % n_recorded
        columns.append(choices[:, layers, i % n_ranks] % own + i * own)
    return np.stack(columns, axis=-1)


def record_routing(model: nn.Module, tokens: list[int]) -> np.ndarray:
    """Run tokens as one prompt and return the experts chosen, ``[N, layers, K]``."""
    chosen: list[np.ndarray] = []

    def observe(calls: list[LoweredCall], encoding: Any) -> None:
        for call in calls:
            call.run(encoding.values, encoding.weights, encoding.host)
            if isinstance(op := call.ops[0], MoeSoftmaxTopK):
                chosen.append(np.array(encoding.value(op.indices_out)))

    executor = model.runtime.executor
    executor.observer = observe
    try:
        mx.eval(model(mx.array([tokens]), cache=make_prompt_cache(model)))
    finally:
        executor.observer = None
    return np.stack(chosen, axis=1)


def write_checkpoint(
    path: Path,
    config: dict[str, Any],
    dtype: mx.Dtype,
    routing: dict[str, np.ndarray],
) -> None:
    """Write an mlx-lm checkpoint with 4 bits (routers 8), one layer at a time."""
    model, full_config = _skeleton(config, dtype)
    rng = np.random.default_rng(0)
    path.mkdir(parents=True)
    shards = _by_shard(tree_flatten(model.parameters()), config["num_hidden_layers"])
    scores = np.concatenate(
        [_scores(t, config["num_experts"]) for t in routing.values()]
    )
    inputs = None
    for i, names in enumerate(shards):
        tensors = dict(_tensors(names, rng, dtype))
        if inputs is None:
            # The first shard holds the embedding.
            inputs = _normed_embeddings(tensors, len(scores))
            solved = np.linalg.solve(inputs @ inputs.T, inputs)
        else:
            rows = scores[:, i - 1].T @ solved
            tensors.update(_router(_prefix(names), rows, dtype))
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        mx.save_safetensors(str(path / name), tensors, {"format": "mlx"})
    save_config(full_config, path / "config.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / name, path / name)
    np.savez(path / TRACE_NAME, **routing)


def _skeleton(
    config: dict[str, Any], dtype: mx.Dtype
) -> tuple[nn.Module, dict[str, Any]]:
    """Return mlx-lm's model, quantised but not evaluated, and its configuration."""
    if config["model_type"] == "qwen3_moe":
        own = qwen3_moe.Model(qwen3_moe.ModelArgs.from_dict(config))
        own.set_dtype(dtype)
        with redirect_stdout(StringIO()):
            return quantize_model(
                own, dict(config), GROUP_SIZE, BITS, quant_predicate=_routers_apart
            )
    full = {
        "model_type": "qwen3_5_moe",
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "text_config": config,
        "eos_token_id": 0,
    }
    args = qwen3_5_moe.ModelArgs.from_dict(copy.deepcopy(full))
    model = qwen3_5_moe.Model(args)
    model.set_dtype(dtype)
    with redirect_stdout(StringIO()):
        return quantize_model(
            model, full, GROUP_SIZE, BITS, quant_predicate=model.quant_predicate
        )


def _routers_apart(path: str, _: nn.Module) -> bool | dict[str, int]:
    """Give routers the 8 bits that they have in our own classes, all else 4 bits."""
    if path.endswith("mlp.gate"):
        return {"group_size": GROUP_SIZE, "bits": ROUTER_BITS}
    return True


def record_choices(model: nn.Module, tokens: list[int]) -> np.ndarray:
    """Do as ``record_routing`` for a model of mlx-lm's class with all its experts."""
    chosen: list[np.ndarray] = []
    original = SwitchGLU.__call__

    def observe(self: SwitchGLU, x: mx.array, indices: mx.array) -> mx.array:
        chosen.append(np.array(indices)[0])
        return original(self, x, indices)

    SwitchGLU.__call__ = observe
    try:
        mx.eval(model(mx.array([tokens]), cache=make_prompt_cache(model)))
    finally:
        SwitchGLU.__call__ = original
    return np.stack(chosen, axis=1)


def _by_shard(
    parameters: list[tuple[str, mx.array]], n_layers: int
) -> list[dict[str, mx.array]]:
    """Return parameters by shard: those outside of layers, then those of each layer."""
    shards: list[dict[str, mx.array]] = [{} for _ in range(n_layers + 1)]
    for name, value in parameters:
        after = name.partition(".layers.")[2]
        shards[int(after.split(".")[0]) + 1 if after else 0][name] = value
    return shards


def _tensors(
    names: dict[str, mx.array], rng: np.random.Generator, dtype: mx.Dtype
) -> Iterator[tuple[str, mx.array]]:
    """Yield each parameter; packed matrices are random, others unchanged."""
    for name, value in names.items():
        stem, _, part = name.rpartition(".")
        if f"{stem}.scales" not in names:
            yield name, value
        elif part == "weight":
            words = rng.integers(0, 2**32, value.shape, dtype=np.uint32)
            yield name, mx.array(words)
            scales = _scale(stem, names) * rng.uniform(
                0.5, 1.5, names[f"{stem}.scales"].shape
            ).astype(np.float32)
            yield f"{stem}.scales", mx.array(scales).astype(dtype)
            yield f"{stem}.biases", (-MIDDLE * mx.array(scales)).astype(dtype)


def _scale(stem: str, names: dict[str, mx.array]) -> float:
    """Return the scale at which outputs are as large as inputs, or as ``ADDED``."""
    if stem.endswith("embed_tokens"):
        return 1 / DEVIATION
    n_inputs = names[f"{stem}.scales"].shape[-1] * GROUP_SIZE
    gain = ADDED if stem.endswith(WRITERS) else 1.0
    return gain / DEVIATION / n_inputs**0.5


def _normed_embeddings(tensors: dict[str, mx.array], n_tokens: int) -> np.ndarray:
    """Return the first embeddings after a norm of weight 1, ``[N, D]``."""
    stem = next(name for name in tensors if name.endswith("embed_tokens.weight"))[:-7]
    parts = [tensors[f"{stem}.{p}"][:n_tokens] for p in ("weight", "scales", "biases")]
    rows = np.array(mx.dequantize(*parts, GROUP_SIZE, BITS).astype(mx.float32))
    return rows / np.sqrt((rows**2).mean(axis=-1, keepdims=True))


def _scores(trace: np.ndarray, n_experts: int) -> np.ndarray:
    """Return router logits ``[N, layers, E]``, highest for chosen experts by rank."""
    k = trace.shape[-1]
    scores = np.zeros((*trace.shape[:-1], n_experts))
    leads = LEAD + RANK_STEP * np.arange(k, 0, -1)
    np.put_along_axis(scores, trace, np.broadcast_to(leads, trace.shape), axis=-1)
    return scores


def _prefix(names: dict[str, mx.array]) -> str:
    return next(name for name in names if name.endswith(".mlp.gate.weight"))[:-7]


def _router(
    stem: str, rows: np.ndarray, dtype: mx.Dtype
) -> Iterator[tuple[str, mx.array]]:
    rows = mx.array(rows.astype(np.float32))
    w, scales, biases = mx.quantize(rows, GROUP_SIZE, ROUTER_BITS)
    yield f"{stem}.weight", w
    yield f"{stem}.scales", scales.astype(dtype)
    yield f"{stem}.biases", biases.astype(dtype)
