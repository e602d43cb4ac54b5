"""Checks of a request before any work on it.

mlx-lm's server checks types. A request that passes and still cannot be answered would
fail in the middle of a batch, and harm the other requests in it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from ..errors import RequestError
from ..system.files import parse_json, short

# Even long contexts are only a few megabytes of text.
BODY_BYTES = 32 << 20
MOST_INTEGER = 2**31 - 1
# Beyond these, quotients and products of logits leave float32's range.
LEAST_NUMBER, MOST_NUMBER = 1e-6, 1e6

INTEGERS = {
    "max_tokens": (1, MOST_INTEGER),
    "max_completion_tokens": (1, MOST_INTEGER),
    "top_k": (0, MOST_INTEGER),
    "top_logprobs": (-1, 11),
    "num_draft_tokens": (1, 1024),
    "repetition_context_size": (0, MOST_INTEGER),
    "presence_context_size": (0, MOST_INTEGER),
    "frequency_context_size": (0, MOST_INTEGER),
    "seed": (0, 2**64 - 1),
}
NUMBERS = {
    "temperature": (0.0, MOST_NUMBER),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "xtc_probability": (0.0, 1.0),
    "xtc_threshold": (0.0, 1.0),
    "repetition_penalty": (0.0, MOST_NUMBER),
    "presence_penalty": (-MOST_NUMBER, MOST_NUMBER),
    "frequency_penalty": (-MOST_NUMBER, MOST_NUMBER),
}
# Arguments of a chat template that mlx-lm's server sets itself, or that replace it.
TEMPLATE_FORM = {
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "messages",
    "tokenize",
    "tokenizer_kwargs",
    "tools",
}
TEMPLATE_FORM |= {"max_length", "padding", "truncation"}
TEMPLATE_FORM |= {"return_assistant_tokens_mask", "return_dict", "return_tensors"}
# Fields that clients may set to null for the server's default; mlx-lm refuses null.
MAY_BE_NULL = (
    *INTEGERS,
    *NUMBERS,
    *("stream", "logprobs", "model", "draft_model", "stop", "logit_bias"),
)


def parse_body(data: bytes) -> dict[str, Any]:
    """Return a request's body after all checks that need no model.

    Raises:
        RequestError: it is not a JSON object, or a field, which it names, is unusable.
    """
    try:
        body = parse_json(data)
    except ValueError as error:
        raise RequestError(f"[body] cannot read it as JSON: {error}") from error
    if not isinstance(body, dict):
        _refuse("body", "a JSON object", body)
    body = {k: v for k, v in body.items() if v is not None or k not in MAY_BE_NULL}
    for name, bounds in {**INTEGERS, **NUMBERS}.items():
        if name in body:
            _check_number(name, body[name], *bounds)
    for name in ("xtc_probability", "xtc_threshold"):
        if name in body:
            # mlx-lm does not accept an integer here.
            body[name] = float(body[name])
    _check_bias(body.get("logit_bias", {}))
    options = body.get("stream_options") or {}
    if not _is_flag(options, "include_usage"):
        _refuse("stream_options", '{"include_usage": true or false}', options)
    if body.get("stream_options") is not None:
        body["stream_options"] = {"include_usage": False, **options}
    stop = body.get("stop", [])
    words = [stop] if isinstance(stop, str) and stop else stop or []
    if not isinstance(words, list) or not all(isinstance(w, str) and w for w in words):
        _refuse("stop", "a string or a list of strings, none of them empty", stop)
    settings = body.get("chat_template_kwargs") or {}
    if not isinstance(settings, dict) or settings.keys() & TEMPLATE_FORM:
        _refuse("chat_template_kwargs", "an object of a template's settings", settings)
    return body


def check_chat(body: dict[str, Any]) -> None:
    """Raise RequestError unless a body has messages for a chat template."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        _refuse("messages", "a list of one message or more", messages)
    for i, message in enumerate(messages):
        _check_message(f"messages[{i}]", message)
    for name, kind in (("tools", list), ("role_mapping", dict)):
        value = body.get(name)
        values = value.values() if isinstance(value, dict) else value or []
        each = dict if kind is list else str
        if not isinstance(value, kind | None) or not all(
            isinstance(v, each) for v in values
        ):
            _refuse(name, f"a {kind.__name__} of {each.__name__}", value)


def check_text(body: dict[str, Any]) -> None:
    """Raise RequestError unless a body has a prompt."""
    if not isinstance(prompt := body.get("prompt"), str):
        _refuse("prompt", "text", prompt)


def check_names(
    body: dict[str, Any], served: Mapping[str, Collection[str | None]]
) -> None:
    """Raise RequestError unless a body names the served model.

    Args:
        served: the known names, by field.
    """
    for name, known in served.items():
        value = body.get(name)
        if value is not None and value not in known:
            names = " or ".join(short(n) for n in sorted(filter(None, known)))
            wanted = names or "none"
            raise RequestError(
                f"[{name}] expected {wanted} but got {short(value)}: this server "
                "has loaded no other",
                404,
            )


def check_arguments(args: Any, n_prompt: int, vocab_size: int, most: int) -> None:
    """Raise RequestError unless the model can answer a request.

    Args:
        args: mlx-lm's ``GenerationArguments``.
        n_prompt: number of tokens in the prompt.
        vocab_size, most: the model's vocabulary and maximum sequence length.
    """
    if not n_prompt:
        raise RequestError("[prompt] expected at least one token but it is empty")
    if n_prompt > most:
        _refuse("prompt", f"at most {most} tokens", n_prompt)
    if args.max_tokens > most:
        _refuse("max_tokens", f"at most {most}", args.max_tokens)
    if args.sampling.top_k >= vocab_size:
        _refuse("top_k", f"less than {vocab_size}", args.sampling.top_k)
    for token in args.logits.logit_bias or {}:
        if not 0 <= token < vocab_size:
            _refuse("logit_bias", f"tokens from 0 to {vocab_size - 1}", token)


def _check_message(where: str, message: Any) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        _refuse(where, "an object with a role", message)
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            is_text = isinstance(part, dict) and part.get("type") == "text"
            if not is_text or not isinstance(part.get("text"), str):
                _refuse(f"{where}.content", "text", part)
    elif not isinstance(content, str | None):
        _refuse(f"{where}.content", "text", content)
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list) or not all(map(_is_call, calls)):
        _refuse(f"{where}.tool_calls", "a list of calls of functions", calls)


def _is_call(call: Any) -> bool:
    function = call.get("function", {}) if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return False
    text = function.get("arguments")
    if not isinstance(text, str) or not text:
        return isinstance(text, str | dict | None)
    try:
        parse_json(text, exact=False)
    except ValueError:
        return False
    return True


def _check_number(name: str, value: Any, least: float, most: float) -> None:
    whole = name in INTEGERS
    fits = type(value) is int or (type(value) is float and not whole)
    if not fits or not least <= value <= most:
        kind = "an integer" if whole else "a number"
        _refuse(name, f"{kind} from {least:.12g} to {most:.12g}", value)
    if not whole and 0 < abs(value) < LEAST_NUMBER:
        _refuse(name, f"0, or {LEAST_NUMBER} or more", value)


def _check_bias(bias: Any) -> None:
    if not isinstance(bias, dict):
        _refuse("logit_bias", "an object of numbers by token", bias)
    for token, value in bias.items():
        number = type(value) in (int, float) and math.isfinite(value)
        if not token.isdecimal() or len(token) > 10 or not number:
            _refuse("logit_bias", "numbers by token", {token: value})
        if abs(value) > MOST_NUMBER:
            _refuse("logit_bias", f"at most {MOST_NUMBER:g}", value)


def _is_flag(options: Any, name: str) -> bool:
    return isinstance(options, dict) and isinstance(options.get(name, False), bool)


def _refuse(name: str, wanted: str, found: Any) -> NoReturn:
    raise RequestError(f"[{name}] expected {wanted} but got {short(found)}")
