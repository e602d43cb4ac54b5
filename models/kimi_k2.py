"""Kimi-K2: DeepSeek-V3's architecture under another name."""

from .deepseek_v3 import Model, ModelArgs, check, departs, lacks, layers

__all__ = ["Model", "ModelArgs", "check", "departs", "lacks", "layers"]
