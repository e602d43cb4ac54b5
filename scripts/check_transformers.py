"""Compare logits with transformers' own implementation, an independent reference.

The 4-bit model is dequantised to float32 and loaded into PyTorch's
Qwen3_5MoeForCausalLM; mlx-lm or moeflux-mlx then run the same weights in float32.
Needs PyTorch and transformers besides this package:

    python scripts/check_transformers.py --against mlx-lm
    python scripts/check_transformers.py --against moeflux

Exits with 1 when the relative RMS error of any prompt exceeds the tolerance.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

PROMPT = '''\
"""Read a table of numbers and print the mean of every column."""

import csv
import sys


def read_table(path, delimiter=","):
    """Return the rows of the file as lists of floats."""
    with open(path, newline="") as file:
        rows = csv.reader(file, delimiter=delimiter)
        return [[float(cell) for cell in row] for row in rows if row]


def column_means(rows):
    """Return one mean for each column."""
    if not rows:
        raise ValueError("no rows")
    return [sum(column) / len(column) for column in zip(*rows)]


if __name__ == "__main__":
    for mean in column_means(read_table(sys.argv[1])):
        print(f"{mean:.3f}")
'''
PROMPT_TOKENS = (1, 17, 130)

# mlx-lm stores these weights with transformers' implicit 1 added.
CENTRED_NORMS = (
    ".input_layernorm.weight",
    ".post_attention_layernorm.weight",
    "model.norm.weight",
    ".q_norm.weight",
    ".k_norm.weight",
)


def dequantised_weights(folder: Path) -> dict[str, np.ndarray]:
    """Read an mlx-lm checkpoint; return every weight in float32, by mlx-lm's name."""
    import mlx.core as mx

    settings = json.loads((folder / "config.json").read_text())["quantization"]
    stored = {}
    for file in sorted(folder.glob("model*.safetensors")):
        stored |= mx.load(str(file))
    weights = {}
    for name, value in stored.items():
        module, _, part = name.rpartition(".")
        if part in ("scales", "biases"):
            continue
        if f"{module}.scales" in stored:
            own = settings.get(module, settings)
            value = mx.dequantize(
                value,
                stored[f"{module}.scales"].astype(mx.float32),
                stored[f"{module}.biases"].astype(mx.float32),
                group_size=own["group_size"],
                bits=own["bits"],
            )
        weights[name] = np.array(value.astype(mx.float32))
    return weights


def transformers_weights(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Undo mlx-lm's `sanitize`: names, joined experts, conv axes, norm offsets."""
    renamed = {}
    for name, value in weights.items():
        name = name.removeprefix("language_model.")
        if name.endswith("conv1d.weight"):
            value = np.moveaxis(value, 1, 2)
        if name.endswith(CENTRED_NORMS):
            value = value - 1.0
        renamed[name] = value
    for name in [
        name for name in renamed if name.endswith("switch_mlp.up_proj.weight")
    ]:
        block = name.removesuffix("switch_mlp.up_proj.weight")
        gate = renamed.pop(f"{block}switch_mlp.gate_proj.weight")
        joined = np.concatenate([gate, renamed.pop(name)], axis=1)
        renamed[f"{block}experts.gate_up_proj"] = joined
        down = renamed.pop(f"{block}switch_mlp.down_proj.weight")
        renamed[f"{block}experts.down_proj"] = down
    return renamed


def load_in_transformers(folder: Path):
    """Build transformers' model in float32 from the dequantised checkpoint."""
    import torch
    from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

    settings = json.loads((folder / "config.json").read_text())["text_config"]
    settings = {k: v for k, v in settings.items() if k not in ("model_type", "dtype")}
    rope = settings["rope_parameters"]
    rope["rope_type"] = rope.pop("type", rope.get("rope_type", "default"))
    model = Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**settings)).float().eval()
    weights = transformers_weights(dequantised_weights(folder))
    state = {name: torch.from_numpy(value.copy()) for name, value in weights.items()}
    model.load_state_dict(state, strict=True)
    return model


def transformers_logits(model, tokens: list[int]) -> np.ndarray:
    """Return (n_tokens, n_vocabulary) logits from transformers."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()


def mlx_logits(model, tokens: list[int]) -> np.ndarray:
    """Return (n_tokens, n_vocabulary) logits from an MLX model, without a cache."""
    import mlx.core as mx

    return np.array(model(mx.array([tokens]))[0].astype(mx.float32))


def load_mlx(against: str, folder: Path):
    """Load the model and its tokenizer with the chosen package, in float32."""
    import mlx.core as mx

    if against == "moeflux":
        import moeflux_mlx as package
    else:
        import mlx_lm as package
    model, tokenizer = package.load(str(folder))
    model.set_dtype(mx.float32)
    return model, tokenizer


def relative_rms_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the RMS of the difference divided by the RMS of the expected values."""
    difference = found.astype(np.float64) - expected
    return float(np.sqrt((difference**2).mean() / (expected.astype(float) ** 2).mean()))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    demo = Path(__file__).resolve().parent.parent / "models" / "demo"
    parser.add_argument("--model", type=Path, default=demo, help="mlx-lm checkpoint")
    parser.add_argument("--against", choices=["mlx-lm", "moeflux"], default="mlx-lm")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    return parser.parse_args()


def main() -> int:
    """Compare every prompt; return the exit status."""
    arguments = parse_arguments()
    reference = load_in_transformers(arguments.model)
    model, tokenizer = load_mlx(arguments.against, arguments.model)
    tokens = tokenizer.encode(PROMPT)
    worst = 0.0
    for n_tokens in PROMPT_TOKENS:
        expected = transformers_logits(reference, tokens[:n_tokens])
        found = mlx_logits(model, tokens[:n_tokens])
        error = relative_rms_error(found, expected)
        agreement = (found.argmax(-1) == expected.argmax(-1)).mean()
        print(
            f"{n_tokens:4d} tokens: relative RMS error {error:.2e},"
            f" top-1 agreement {agreement:.1%}"
        )
        # Written so that NaN fails too.
        worst = error if not error <= worst else worst
    passed = worst <= arguments.tolerance
    print(f"{'passed' if passed else 'FAILED'}: tolerance {arguments.tolerance:.0e}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
