"""Check a model's chat template before the model is loaded."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers.utils.chat_template_utils import render_jinja_template

from ..errors import ModelError, one_line
from ..system.files import CONFIG_BYTES, read_file, read_json

FILE, CONFIG = "chat_template.jinja", "tokenizer_config.json"


def check_chat_template(directory: Path) -> None:
    """Check the template that a model's tokenizer will use, if it has one.

    Raises:
        ModelError: see ``check_syntax``.
    """
    file, text = directory / FILE, None
    # The tokenizer reports a file that cannot be read.
    with contextlib.suppress(OSError, ValueError):
        if file.exists():
            text = read_file(file, CONFIG_BYTES).decode("utf-8")
        else:
            file = directory / CONFIG
            text = _of_config(read_json(file, CONFIG_BYTES, exact=False))
    if isinstance(text, str):
        check_syntax(str(file), text)


def check_syntax(source: str, text: str) -> None:
    """Check only the syntax, because a template may refuse some conversations.

    Args:
        source: a file or flag, for the message.

    Raises:
        ModelError: the text is no Jinja template; the message names the line.
    """
    try:
        render_jinja_template(conversations=[[]], chat_template=text)
    except TemplateSyntaxError as error:
        told = one_line(error.message or "no template")
        raise ModelError(
            f"[chat template] {source}: cannot use it: line {error.lineno}: {told}"
        ) from error
    except Exception:
        return


def _of_config(config: Any) -> Any:
    """Return the default template of a tokenizer's configuration."""
    if not isinstance(config, dict) or config.get("chat_template_type"):
        return None
    found = config.get("chat_template")
    if not isinstance(found, list):
        return found
    named = {one.get("name"): one.get("template") for one in found if type(one) is dict}
    return named.get("default")
