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
        directory: the model's.
        settings: as ``tokenizer_config`` of ``mlx_lm.load``. Code of the model runs
            only with ``trust_remote_code=True`` in them.
        eos_token_ids: the ends of text that ``config.json`` names.

    Raises:
        ModelError: there is no tokenizer, it is damaged or needs code of its own, or
            ``eos_token_ids`` is no token or tokens.
    """
    ids = eos_token_ids if isinstance(eos_token_ids, list) else [eos_token_ids]
    if any(type(i) is not int for i in ids) and eos_token_ids is not None:
        raise ModelError(
            f"[load] {directory}: expected eos_token_id to be a token or a list of "
            f"them but got {eos_token_ids!r}: mend config.json or "
            "generation_config.json"
        )
    if not any(any(directory.glob(pattern)) for pattern in VOCABULARIES):
        # Without one the tokenizer would come up empty.
        raise ModelError(
            f"[tokenizer] {directory}: expected one of {', '.join(VOCABULARIES)} but "
            "got none: download the tokenizer too"
        )
    # Without a value transformers asks on standard input, which may be the prompt.
    settings = {**(settings or {})}
    settings["trust_remote_code"] = settings.get("trust_remote_code") is True
    with one_line_errors(f"[tokenizer] {directory}"):
        return load_tokenizer(directory, settings, eos_token_ids=eos_token_ids)
