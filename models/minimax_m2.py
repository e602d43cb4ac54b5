"""MiniMax-M2 under the name that its publisher gives it."""

from .minimax import Model, ModelArgs, check, lacks, layers

__all__ = ["Model", "ModelArgs", "check", "lacks", "layers"]
