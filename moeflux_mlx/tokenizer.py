"""Load a model's tokenizer without running what the model brings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_lm.utils import load_tokenizer

from .errors import ModelError


def open_tokenizer(
    directory: Path,
    settings: Mapping[str, Any] | None = None,
    eos_token_ids: Any = None,
) -> Any:
    """Return a model's tokenizer as mlx-lm wraps it.

    Args:
        directory: the model's.
        settings: as ``tokenizer_config`` of ``mlx_lm.load``. Code of the model runs
            only with ``trust_remote_code=True`` in them.
        eos_token_ids: the ends of text that ``config.json`` names.

    Raises:
        ModelError: there is no tokenizer, it is damaged, or it needs code of its own.
    """
    # Without a value transformers asks on standard input, which may be the prompt.
    settings = {**(settings or {})}
    settings["trust_remote_code"] = settings.get("trust_remote_code") is True
    try:
        return load_tokenizer(directory, settings, eos_token_ids=eos_token_ids)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(
            f"[tokenizer] {directory}: expected a tokenizer that loads but got "
            f"{type(error).__name__}: {reason}"
        ) from error
