"""Train the demo model in models/demo from Python's own standard library.

The stages run in this order. `corpus` needs transformers, `train` transformers and
PyTorch, `convert` mlx-lm, and `evaluate` all three:

    python scripts/train_demo.py corpus
    python scripts/train_demo.py train      # seven minutes on a large GPU
    python scripts/train_demo.py convert
    python scripts/train_demo.py evaluate
    python scripts/train_demo.py card

All files except the finished model are written to the build folder (--build).
"""

import argparse
import importlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "demo"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stages = parser.add_subparsers(dest="stage", required=True)

    def stage(name, summary):
        sub = stages.add_parser(name, help=summary, description=f"{summary}.")
        sub.add_argument("--build", type=Path, default=BUILD, help="build folder")
        sub.add_argument("--checkpoint", type=Path, help="default: BUILD/checkpoint")
        sub.add_argument("--model", type=Path, default=ROOT / "models" / "demo")
        return sub

    sub = stage("corpus", "Build tokenizer and token streams")
    sub.add_argument(
        "--tests",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="train on the standard library's tests too",
    )
    sub = stage("train", "Train and save the best Hugging Face checkpoint")
    sub.add_argument("--max-seconds", type=float, default=1800, help="time budget")
    sub.add_argument("--max-steps", type=int, default=1488, help="step budget")
    sub.add_argument("--rows", type=int, default=32, help="rows of a batch")
    sub.add_argument("--row-tokens", type=int, default=1024, help="tokens of a row")
    sub.add_argument("--learning-rate", type=float, default=3e-3, help="peak")
    sub.add_argument("--warm-up-steps", type=int, default=100)
    sub.add_argument("--weight-decay", type=float, default=0.1)
    sub.add_argument("--dropout", type=float, default=0.2)
    sub.add_argument("--balance-weight", type=float, default=0.01)
    sub.add_argument("--report-seconds", type=float, default=30)
    stage("convert", "Quantise to 4 bits with mlx-lm; replaces the model folder")
    sub = stage("evaluate", "Measure held-out losses and draw samples")
    sub.add_argument(
        "--max-rows",
        type=int,
        default=8,
        help="rows to measure of each held-out part, spread evenly over it; 0: all,"
        " as in the published card (default: 8, a few minutes on two cores)",
    )
    sub = stage("card", "Write the model card")
    sub.add_argument("--machine", default="one GPU", help="for training, in the card")
    arguments = parser.parse_args()
    arguments.checkpoint = arguments.checkpoint or arguments.build / "checkpoint"
    return arguments


def main() -> None:
    """Run one stage; import only its module, so that only its packages are needed."""
    arguments = parse_arguments()
    importlib.import_module(f"demo_model.{arguments.stage}").run(arguments)


if __name__ == "__main__":
    main()
