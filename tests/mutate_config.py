"""Change one value of config.json at a time, load the model, and print the result.

    python tests/mutate_config.py DIRECTORY EXPERT_MEMORY EVERY

This is a process of its own, because a division by zero in MLX ends it. It prints a
line for each change: its name, a tab, and the error or ``=`` with the largest
difference between its logits and mlx-lm's.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
from mlx_lm.utils import load_model

import moeflux_mlx
from moeflux_mlx.errors import MoefluxError

GONE = "gone"
NUMBERS = [0, 1, -1, 10**9, 10**400, 2.5, float("nan"), True, "4", None, [1], GONE]
SIZES = [
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "linear_num_value_heads",
    "linear_num_key_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
    "full_attention_interval",
    "num_experts",
    "num_experts_per_tok",
    "shared_expert_intermediate_size",
    "moe_intermediate_size",
]
OTHERS = ["rms_norm_eps", "intermediate_size", "layer_types", "rope_parameters"]
GATE = "language_model.model.layers.3.mlp.gate"


def changes() -> Iterator[tuple[str, ...]]:
    yield from (("text_config", name) for name in (*SIZES, *OTHERS))
    yield from (("quantization", name) for name in ("bits", "group_size"))
    yield from (("quantization", GATE, name) for name in ("bits", "group_size"))
    rope = ("rope_theta", "partial_rotary_factor", "type")
    yield from (("text_config", "rope_parameters", name) for name in rope)
    yield from (("text_config",), ("quantization",), ("model_type",))


def changed(config: dict, path: tuple[str, ...], value: object) -> dict:
    config = copy.deepcopy(config)
    place = config
    for name in path[:-1]:
        place = place[name]
    if value == GONE:
        place.pop(path[-1], None)
    else:
        place[path[-1]] = value
    if path[0] == "quantization":
        config["quantization_config"] = config.get("quantization")
    return config


def logits(model) -> mx.array:
    out = model(mx.array([[5, 9, 17, 200, 3]])).astype(mx.float32)
    mx.eval(out)
    return out


def outcome(directory: Path, memory: str | None) -> str:
    try:
        got = logits(moeflux_mlx.load(directory, expert_memory=memory)[0])
    except MoefluxError as error:
        return str(error)
    if (directory / "moeflux.json").exists():
        return "="
    expected = logits(load_model(directory)[0])
    return f"={float(mx.abs(got - expected).max() / mx.abs(expected).max())}"


def main() -> None:
    directory, memory, every = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    mx.set_default_device(mx.cpu)
    file = directory / "config.json"
    config = json.loads(file.read_text())
    cases = [(path, value) for path in changes() for value in NUMBERS]
    for path, value in cases[::every]:
        file.write_text(json.dumps(changed(config, path, value)))
        print(f"{'.'.join(path)}={value!r:.20}", end="\t", flush=True)
        print(repr(outcome(directory, memory or None)), flush=True)


if __name__ == "__main__":
    main()
