"""Convert the checkpoint to MLX."""

import argparse
import shutil

from mlx_lm import convert as mlx_lm_convert


def run(arguments: argparse.Namespace) -> None:
    """Quantise the checkpoint to 4 bits in groups of 64 with mlx_lm.convert."""
    if arguments.model.exists():
        shutil.rmtree(arguments.model)
    mlx_lm_convert(
        str(arguments.checkpoint),
        mlx_path=str(arguments.model),
        quantize=True,
        q_bits=4,
        q_group_size=64,
        dtype="bfloat16",
    )
    for name in ("model.safetensors.index.json", "README.md"):
        (arguments.model / name).unlink(missing_ok=True)
