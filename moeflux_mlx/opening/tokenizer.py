"""Load a model's tokenizer without running code of the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_lm.utils import load_tokenizer

from ..errors import ModelError, one_line_errors

VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken")


def open_tokenizer(
    directory: Path,
    settings: Mapping[str, Any] | None = None,
    eos_token_ids: Any = None,
) -> Any:
    """Return a model's tokenizer as mlx-lm wraps it.

    Args:
        directory: the model's directory.
        settings: ``tokenizer_config`` of ``mlx_lm.load``. The model's code runs only
            if they contain ``trust_remote_code=True``.
        eos_token_ids: the end-of-text tokens that ``config.json`` names.

    Raises:
        ModelError: the tokenizer is missing, damaged or needs its own code, or
            ``eos_token_ids`` is neither a token nor a list of tokens.
    """
    ids = eos_token_ids if isinstance(eos_token_ids, list) else [eos_token_ids]
    if any(type(i) is not int for i in ids) and eos_token_ids is not None:
        raise ModelError(
            f"[load] {directory}: expected eos_token_id to be a token or a list of "
            f"them but got {eos_token_ids!r}: correct config.json or "
            "generation_config.json"
        )
    if not any(any(directory.glob(pattern)) for pattern in VOCABULARIES):
        # Without a vocabulary the tokenizer would be empty.
        raise ModelError(
            f"[tokenizer] {directory}: expected one of {', '.join(VOCABULARIES)} but "
            "got none: download the tokenizer too"
        )
    # Without a value transformers would ask on standard input, which may be the prompt.
    settings = {**(settings or {})}
    settings["trust_remote_code"] = settings.get("trust_remote_code") is True
    with one_line_errors(f"[tokenizer] {directory}"):
        return load_tokenizer(directory, settings, eos_token_ids=eos_token_ids)
