"""Decode and prefill of a published geometry with random 4-bit weights, all resident.

This is a part of ``scripts/bench_decode``. Both models hold the same arrays, created on
the device. Decoding starts from caches of noise, because stock mlx-lm takes minutes for
a prompt of a few hundred tokens on CUDA.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import real_sizes
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import QuantizedSwitchLinear
from mlx_lm.utils import _get_classes
from rich.console import Console
from rich.table import Table

from moeflux_mlx.cli.profile import print_profile
from moeflux_mlx.device import machine_name
from moeflux_mlx.engine.executors import gpu_executor
from moeflux_mlx.engine.runtime import RunOptions
from moeflux_mlx.experts.compute.slot_block import divide_large_stacks
from moeflux_mlx.measure import check_plot, profile, save_plot, write_csv

GROUP_SIZE, BITS, ROUTER_BITS = 64, 4, 8
# As published in the model's config.json.
GEOMETRIES: dict[str, dict[str, Any]] = {
    "qwen3.6-35b-a3b": dict(
        model_type="qwen3_5_moe",
        hidden_size=2048,
        num_hidden_layers=40,
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=256,
        linear_num_value_heads=32,
        linear_num_key_heads=16,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_conv_kernel_dim=4,
        full_attention_interval=4,
        num_experts=256,
        num_experts_per_tok=8,
        moe_intermediate_size=512,
        shared_expert_intermediate_size=512,
        norm_topk_prob=True,
        rms_norm_eps=1e-6,
        vocab_size=248320,
        max_position_embeddings=262144,
        tie_word_embeddings=False,
        rope_parameters={
            "type": "default",
            "rope_theta": 10_000_000.0,
            "partial_rotary_factor": 0.25,
        },
    ),
}
# Geometries that only this mode has.
MORE_GEOMETRIES = {name.lower(): shape for name, shape in real_sizes.MODELS.items()}
# With random layers rounding differences grow without bound. So ours must be about as
# close to float32 as stock.
COMPARED_LAYERS, COMPARED_TOKENS, MAX_RATIO = 4, 8, 1.5
# How much larger compared tokens' logits of chosen experts become, in standard
# deviations: much more than rounding changes them.
LEAD = 1.0
# The name of stock with products in parts that MLX can index.
IN_PARTS = "stock in parts"
# Seconds after which a prompt is not repeated. Stock on CUDA may take a minute for one.
PREFILL_S = 30.0
# MLX's random numbers and quantisation take arrays of fewer than 2^32 values.
MAX_VALUES = 1 << 31


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this mode."""
    group = parser.add_argument_group("random weights of a published geometry")
    names = {**GEOMETRIES, **MORE_GEOMETRIES}
    group.add_argument("--geometry", choices=names, nargs="+", metavar="NAME")
    group.add_argument("--layers", type=int, help="fewer than published")
    group.add_argument("--context", type=int, default=512, help="tokens before decode")
    group.add_argument("--prefill", type=int, default=2048, help="prompt of prefill")
    group.add_argument("--stock-prefill", type=int, default=0, help="stock's prompt")
    group.add_argument("--executor", help="executor of our side (default: the GPU's)")
    group.add_argument(
        "--host",
        action="store_true",
        help="only count launches and measure the host's work; needs no GPU",
    )
    group.add_argument(
        "--operations",
        action="store_true",
        help="with --host: also print every operation of our token in order",
    )
    group.add_argument("--csv", help="also write the rows to this file")
    group.add_argument(
        "--profile", type=Path, help="also profile our decode step into this .csv"
    )
    group.add_argument(
        "--plot", type=Path, help="also plot the profile as .png or .svg"
    )


def main(args: argparse.Namespace) -> int:
    """Measure one geometry after another; return 1 if one has no speeds.

    One process measures all of them, because CUDA takes a minute to compile stock's
    products of experts.
    """
    if args.plot:
        check_plot(args.plot)
    if args.host:
        return host_work(args)
    executor = args.executor or gpu_executor()
    if executor is None:
        print("bench_decode: --geometry needs a GPU or --executor", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    failed = 0
    for name in args.geometry:
        failed |= measure(name, args, executor, rows)
        mx.clear_cache()
        if args.csv and rows:
            save(rows, args.csv)
    return failed


def host_work(args: argparse.Namespace) -> int:
    """Print and save the host's work for a token of each geometry."""
    # It measures with this module's models.
    import bench_host

    mx.set_default_device(mx.cpu)
    rows: list[dict[str, Any]] = []
    for name in args.geometry:
        config = (GEOMETRIES | MORE_GEOMETRIES)[name]
        config = cut(config, args.layers or config["num_hidden_layers"])
        given = name, config, args.context, args.repeats
        rows += bench_host.measure(*given, shows=args.operations)
    bench_host.print_rows(rows)
    if args.csv:
        save(rows, args.csv)
    return 0


def measure(
    geometry: str,
    args: argparse.Namespace,
    executor: str,
    rows: list[dict[str, Any]],
) -> int:
    """Build both models, compare them, measure in turns, print and add rows."""
    config = (GEOMETRIES | MORE_GEOMETRIES)[geometry]
    config = cut(config, args.layers or config["num_hidden_layers"])
    few = cut(config, min(COMPARED_LAYERS, config["num_hidden_layers"]))
    off = errors(build(few, executor, clear=True), few)
    each = ", ".join(f"{name} {error:.1e}" for name, error in off.items())
    n = few["num_hidden_layers"]
    print(f"relative RMS of logits from float32, {n} layers: {each}", flush=True)
    if IN_PARTS in off:
        print(
            "stock is wrong here: MLX's products cannot index such large stacks of "
            "experts, except for a few rows",
            flush=True,
        )
    if not off[executor] <= MAX_RATIO * off.get(IN_PARTS, off["stock"]):
        print("bench_decode: no speeds, our logits are worse", file=sys.stderr)
        return 1
    models = build(config, executor)
    decodes: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(args.repeats):
        for name, model in models.items():
            step_s = decode(model, args.context, args.decode_tokens)
            decodes[name].append(step_s)
    prefills = {
        name: prefill(models[name], config, n_tokens)
        for name, n_tokens in (("stock", args.stock_prefill), (executor, args.prefill))
        if n_tokens
    }
    rows += report(geometry, config, args, decodes, prefills)
    if args.profile or args.plot:
        profile_ours(models[executor], args)
    return 0


def cut(config: dict[str, Any], n_layers: int) -> dict[str, Any]:
    """Return the configuration of the first layers, with at least one of each kind."""
    n_layers = max(n_layers, config.get("full_attention_interval", 1))
    found = {**config, "num_hidden_layers": n_layers}
    if "layer_types" in config:
        found["layer_types"] = config["layer_types"][:n_layers]
    if "first_k_dense_replace" in config:
        n_dense = min(config["first_k_dense_replace"], n_layers - 1)
        found["first_k_dense_replace"] = n_dense
    return found


def profile_ours(model: nn.Module, args: argparse.Namespace) -> None:
    """Profile our decode step; print, write and plot the result."""
    found = profile(model, context=args.context)
    print_profile(found, Console(width=160))
    if args.profile:
        write_csv(found, args.profile)
    if args.plot:
        save_plot(found, args.plot)


def build(
    config: dict[str, Any], executor: str, *, clear: bool = False
) -> dict[str, nn.Module]:
    """Return stock and ours with the same random quantised arrays.

    Args:
        clear: give the experts of the compared tokens a lead.
    """
    mx.random.seed(0)
    fill = partial(randomise_clearly, config=config) if clear else randomise
    return built(config, executor, fill)


def built(
    config: dict[str, Any], executor: str, fill: Callable[[nn.Module], None]
) -> dict[str, nn.Module]:
    """Return stock and ours with the same quantised arrays.

    Args:
        fill: gives stock's model values.
    """
    ours = importlib.import_module(f"moeflux_mlx.models.{config['model_type']}")
    theirs = stock_model(config)
    theirs.set_dtype(mx.bfloat16)
    quantize(theirs, config)
    fill(theirs)

    class Chosen(ours.Model):
        options = RunOptions(executor=executor)

    mine = Chosen(ours.ModelArgs.from_dict(dict(config)))
    quantize(mine, config, theirs)
    mine.update(theirs.parameters())
    theirs.eval()
    mine.eval()
    return {"stock": theirs, executor: mine}


def randomise(model: nn.Module) -> None:
    """Make a model's random parameters, and routers that have no ties only."""
    divide_large(model)
    for layer in model.layers:
        mx.eval(layer.parameters())
    for name, x in tree_flatten(model.parameters()):
        if name.endswith("mlp.gate.weight") and not x.any():
            noise = like(x, x.shape[0]) * x.shape[-1] ** -0.5
            model.load_weights([(name, noise.astype(x.dtype))], strict=False)
    mx.eval(model.parameters())


def randomise_clearly(model: nn.Module, config: dict[str, Any]) -> None:
    """Do as ``randomise``, with a lead for the experts of the compared tokens.

    Quantised routers of many experts have near ties, and rounding would choose other
    experts. So each router gets the smallest change that raises the logits of the
    experts it chooses in float32.
    """
    randomise(model)
    exact = in_float32(model, config)
    k = config["num_experts_per_tok"]
    for own, router in zip(routers(model), routers(exact), strict=True):
        inputs = router_inputs(exact, router, config)
        rows = mx.dequantize(router.weight, router.scales, router.biases, **form(own))
        matrix = np.array(rows, np.float64)
        logits = inputs @ matrix.T
        chosen = np.argpartition(-logits, k - 1, axis=-1)[:, :k]
        raised = np.zeros_like(logits)
        np.put_along_axis(raised, chosen, LEAD * logits.std(), axis=-1)
        matrix += raised.T @ np.linalg.solve(inputs @ inputs.T, inputs)
        changed = mx.array(matrix.astype(np.float32)).astype(own.scales.dtype)
        own.weight, own.scales, own.biases = mx.quantize(changed, **form(own))
        router.weight = own.weight
        router.scales, router.biases = (
            x.astype(mx.float32) for x in (own.scales, own.biases)
        )
        mx.eval(own.parameters(), router.parameters())


def routers(model: nn.Module) -> list[nn.QuantizedLinear]:
    """Return the quantised routers of a model's layers; other kinds are left out."""
    found = (getattr(getattr(x, "mlp", None), "gate", None) for x in model.layers)
    return [router for router in found if isinstance(router, nn.QuantizedLinear)]


def router_inputs(
    model: nn.Module, router: nn.QuantizedLinear, config: dict[str, Any]
) -> np.ndarray:
    """Return a router's inputs ``[COMPARED_TOKENS, D]`` for the compared tokens."""
    seen: list[np.ndarray] = []
    original = nn.QuantizedLinear.__call__

    def observe(self: nn.QuantizedLinear, x: mx.array) -> mx.array:
        if self is router:
            seen.append(np.array(x.astype(mx.float32), np.float64).ravel())
        return original(self, x)

    nn.QuantizedLinear.__call__ = observe
    try:
        _logits(model, config)
    finally:
        nn.QuantizedLinear.__call__ = original
    return np.stack(seen)


def form(module: nn.QuantizedLinear) -> dict[str, int]:
    """Return a module's quantisation, as MLX's functions take it."""
    return {"group_size": module.group_size, "bits": module.bits}


def quantize(
    model: nn.Module, config: dict[str, Any], stock: nn.Module | None = None
) -> None:
    """Quantise as published, or else as mlx-lm's converter does."""
    form = config.get("quantization", real_sizes.AFFINE)
    real_sizes.quantize(model, form, stock or model)


def divide_large(model: nn.Module) -> None:
    """Make expert matrices that are too large for one MLX operation piece by piece."""
    for module in model.modules():
        if not isinstance(module, QuantizedSwitchLinear):
            continue
        n_experts, n_out, n_words = module.weight.shape
        n_in = n_words * 32 // module.bits
        n_pieces = -(-n_experts * n_out * n_in // MAX_VALUES)
        if n_pieces == 1:
            continue
        each = -(-n_experts // n_pieces)
        pieces = []
        for first in range(0, n_experts, each):
            shape = (min(each, n_experts - first), n_out, n_in)
            noise = mx.random.uniform(-1.0, 1.0, shape) * n_in**-0.5
            pieces.append(mx.quantize(noise.astype(mx.bfloat16), **form(module)))
            mx.eval(pieces[-1])
        parts = (mx.concatenate(part) for part in zip(*pieces, strict=True))
        module.weight, module.scales, module.biases = parts


def errors(models: dict[str, nn.Module], config: dict[str, Any]) -> dict[str, float]:
    """Return the error of each model's logits against stock in float32.

    It is the median over single tokens of the relative RMS error. Where MLX cannot
    index a layer's experts, the reference multiplies in parts, and another entry has
    the error of stock if it does so too.
    """
    exact = in_float32(models["stock"], config)
    with in_parts(exact):
        wanted = _logits(exact, config)

    def error(model: nn.Module) -> float:
        difference = mx.linalg.norm(_logits(model, config) - wanted, axis=-1)
        relative = difference / mx.linalg.norm(wanted, axis=-1)
        return float(np.median(np.array(relative)))

    found = {name: error(model) for name, model in models.items()}
    with in_parts(models["stock"]) as n_divided:
        if n_divided:
            found[IN_PARTS] = error(models["stock"])
    return found


def in_float32(model: nn.Module, config: dict[str, Any]) -> nn.Module:
    """Return stock with a model's arrays that computes in float32."""
    exact = stock_model(config)
    quantize(exact, config)
    exact.update(model.parameters())
    exact.set_dtype(mx.float32)
    exact.eval()
    return exact


@contextlib.contextmanager
def in_parts(model: nn.Module) -> Iterator[int]:
    """Divide the products that MLX cannot index; give their number."""
    divided = divide_large_stacks(model)
    try:
        yield len(divided)
    finally:
        for module, kind in divided:
            module.__class__ = kind


def _logits(model: nn.Module, config: dict[str, Any]) -> mx.array:
    """Return float32 logits ``[1, COMPARED_TOKENS, V]``, token by token."""
    shape = (1, COMPARED_TOKENS)
    tokens = mx.random.randint(0, config["vocab_size"], shape, key=mx.random.key(1))
    cache = make_prompt_cache(model)
    rows = [model(token, cache=cache) for token in mx.split(tokens, shape[1], axis=1)]
    logits = mx.concatenate(rows, axis=1).astype(mx.float32)
    mx.eval(logits)
    return logits


def stock_model(config: dict[str, Any]) -> nn.Module:
    """Build mlx-lm's model of a configuration."""
    model_class, arguments = _get_classes(config)
    return model_class(arguments.from_dict(dict(config)))


def primed(model: nn.Module, context: int) -> list[Any]:
    """Return caches of noise with the shapes that ``context`` tokens leave."""
    caches = make_prompt_cache(model)
    mx.eval(model(mx.array([[1]]), cache=caches))
    for cache in caches:
        if getattr(cache, "keys", None) is not None:
            parts = [like(x, context - 1) for x in (cache.keys, cache.values)]
            cache.update_and_fetch(*parts)
        else:
            cache.cache = [0.1 * like(x, x.shape[-2]) for x in cache.cache]
    mx.eval([cache.state for cache in caches])
    return caches


def like(x: mx.array, n_rows: int) -> mx.array:
    """Return ``n_rows`` rows of noise in the form of an array."""
    shape = (*x.shape[:-2], n_rows, x.shape[-1])
    return mx.random.normal(shape).astype(x.dtype)


def decode(model: nn.Module, context: int, n_tokens: int) -> float:
    """Return seconds per greedy token, preparing the next step while one runs."""
    caches = primed(model, context)

    def step(token: mx.array) -> mx.array:
        return mx.argmax(model(token, cache=caches)[:, -1], axis=-1)[None]

    token = mx.array([[1]])
    for _ in range(3):
        token = step(token)
        mx.eval(token)
    start = time.perf_counter()
    for _ in range(n_tokens):
        following = step(token)
        mx.async_eval(following)
        mx.eval(token)
        token = following
    mx.eval(token)
    return (time.perf_counter() - start) / n_tokens


def prefill(model: nn.Module, config: dict[str, Any], n_tokens: int) -> float:
    """Return prompt tokens per second, the best of three runs or of PREFILL_S."""
    tokens = mx.random.randint(0, config["vocab_size"], (1, n_tokens))

    def run() -> None:
        caches = make_prompt_cache(model)
        logits = model(tokens, cache=caches)
        mx.eval(logits[:, -1], [cache.state for cache in caches])

    taken = [_seconds(run)]
    while len(taken) < 3 and sum(taken) < PREFILL_S:
        taken.append(_seconds(run))
    return n_tokens / min(taken)


def _seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def report(
    geometry: str,
    config: dict[str, Any],
    args: argparse.Namespace,
    decodes: dict[str, list[float]],
    prefills: dict[str, float],
) -> list[dict[str, Any]]:
    """Print medians and ratios, and return them as rows."""
    layers = config["num_hidden_layers"]
    medians = {name: statistics.median(times) for name, times in decodes.items()}
    rows = [
        {
            "machine": machine_name(),
            "date": datetime.now(timezone.utc).date().isoformat(),
            "mlx": version("mlx"),
            "mlx_lm": version("mlx-lm"),
            "geometry": geometry,
            "layers": layers,
            "context": args.context,
            "side": name,
            "decode_tokens_per_s": round(1 / median, 1),
            "decode_ratio": round(medians["stock"] / median, 2),
            "decode_ms_spread": round(1e3 * (max(times) - min(times)), 3),
            "prefill_tokens_per_s": round(prefills.get(name, 0), 1) or "",
        }
        for (name, times), median in zip(decodes.items(), medians.values(), strict=True)
    ]
    title = f"{geometry}, {layers} layers, {rows[0]['machine']}"
    table = Table(title=title)
    names = [n for n in rows[0] if n not in ("machine", "date", "geometry", "layers")]
    for name in names:
        table.add_column(name)
    for row in rows:
        table.add_row(*(str(row[name]) for name in names))
    Console(width=160).print(table)
    return rows


def save(rows: list[dict[str, Any]], path: str) -> None:
    """Write rows to a file."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
