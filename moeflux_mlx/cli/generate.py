"""``moeflux generate``: mlx-lm's flags and behaviour, plus a table of costs."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import mlx.core as mx
from mlx_lm.generate import setup_arg_parser
from mlx_lm.models.cache import (
    load_prompt_cache,
    make_prompt_cache,
)
from mlx_lm.sample_utils import make_sampler

from ..config import EXPERT_IO
from ..drafts import can_go_back
from ..errors import ConfigError, one_line_errors
from ..experts.pool.policy import DEFAULT_POLICY, POLICY_FORMS
from ..loading import load, load_draft
from ..memory.cache_layouts import CACHE_BITS, CACHE_GROUPS
from ..state import check_keeps_state, load_state, save_state
from ..system.files import open_file, parse_json, short
from .arguments import check_number, check_output, integer, number, one_of
from .preflight import announce, check_template
from .report import generate_and_print, prepare

# The usable ranges of mlx-lm's flags, which mlx-lm itself does not check.
NUMBERS = {
    "max_tokens": integer(-1),
    "temp": number(),
    "top_p": number(0, 1),
    "min_p": number(0, 1),
    "top_k": integer(-1),
    "min_tokens_to_keep": integer(0),
    "xtc_probability": number(0, 1),
    "xtc_threshold": number(0, 1),
    "seed": integer(0, 2**64 - 1),
    "max_kv_size": integer(1),
    "prefill_step_size": integer(1),
    "kv_bits": one_of(*CACHE_BITS),
    "kv_group_size": one_of(*CACHE_GROUPS),
    "quantized_kv_start": integer(0),
    "num_draft_tokens": integer(1),
}


def add_parser(subparsers: Any) -> None:
    """Add ``generate`` with every flag of ``mlx_lm.generate`` and ours."""
    parser = subparsers.add_parser(
        "generate",
        parents=[setup_arg_parser()],
        conflict_handler="resolve",
        description="Generate text, with the flags of mlx_lm.generate and those below.",
        help="generate text with a packed or plain model",
    )
    # mlx-lm's default model has no experts to stream.
    parser.add_argument("--model", help="model directory or Hugging Face repository")
    add_streaming_flags(parser)
    add_native_flag(parser)
    add_state_flags(parser)
    parser.add_argument(
        "--pipeline",
        action="store_true",
        help="several processes divide layers, not experts",
    )
    parser.set_defaults(run=run, group=None)


def add_streaming_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for memory, streaming and the executor."""
    ours = parser.add_argument_group("moeflux")
    memory = (
        'bytes for the whole process, for example "8GB"; experts that do not fit are '
        "streamed from disk; auto: find the fastest amount"
    )
    ours.add_argument("--memory", help=memory)
    ours.add_argument("--expert-memory", help="bytes for experts alone")
    ours.add_argument(
        "--scope",
        choices=("global", "layer"),
        default="global",
        help="layers share the memory (global) or get equal shares (layer)",
    )
    ours.add_argument(
        "--policy",
        help=f"eviction policy: {POLICY_FORMS} (default: {DEFAULT_POLICY})",
    )
    ours.add_argument(
        "--read-ahead",
        choices=("auto", "on", "off"),
        default="auto",
        help="read experts that the next layer will probably choose (default: if "
        "measurements show a gain)",
    )
    ours.add_argument(
        "--expert-io",
        choices=EXPERT_IO,
        help="map experts (mmap), read them through the page cache (pread), or bypass "
        "it (direct); default: mmap on Metal for a pack that fits, else pread",
    )
    ours.add_argument(
        "--executor", help="backend that runs the Ops: ops, metal, cuda or sim"
    )


def add_native_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag that selects mlx-lm's own class of a model."""
    parser.add_argument(
        "--no-native",
        dest="native",
        action="store_const",
        const=False,
        help="run mlx-lm's own class of the model, even if there is a native one",
    )


def add_state_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that load and save a state."""
    ours = parser.add_argument_group("state of a run")
    load = "continue after the prompt and text that FILE holds"
    ours.add_argument("--load-state", metavar="FILE", help=load)
    save = "save prompt, text and the list of experts in memory, for --load-state"
    ours.add_argument("--save-state", metavar="FILE", help=save)


def check_division(command: str, args: argparse.Namespace, *alone: str) -> None:
    """Refuse flags that do not go with the number of processes.

    Args:
        alone: names of flags for one process.

    Raises:
        ConfigError: names the flag.
    """
    if args.group is None:
        if args.pipeline:
            raise ConfigError(
                f"[{command}] expected several processes with --pipeline but got one: "
                "start it with mlx.launch"
            )
        return
    for flag in alone:
        if getattr(args, flag) is not None:
            name = flag.replace("_", "-")
            raise ConfigError(
                f"[{command}] expected one process with --{name} but "
                f"{args.group.size()} were started: run it without mlx.launch"
            )


def division(args: argparse.Namespace) -> dict[str, Any]:
    """Return how processes divide a model, as ``load`` takes it."""
    return {"group": args.group, "pipeline": args.pipeline}


def streaming_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the values of the streaming flags as arguments of ``load``."""
    names = ("memory", "expert_memory", "scope", "policy", "read_ahead", "expert_io")
    options = {name: getattr(args, name) for name in (*names, "executor")}
    return {**options, "native": getattr(args, "native", None)}


def run(args: argparse.Namespace) -> int:
    """Generate text, print it as it appears, and then print the table."""
    _refuse_unusable(args)
    check_output("--save-state", args.save_state)
    cache, saved = _prompt_cache(args)
    path = _model_path(args, saved)
    if not args.ignore_chat_template:
        check_template(path)
    announce(path, streaming_options(args))
    # Seed before loading, as mlx_lm.generate does: loading draws random numbers, the
    # same number as stock's, so that the text is the same.
    if args.seed is not None:
        mx.random.seed(args.seed)
    model, tokenizer = _load(args, path, saved)
    # Prepare before loading a state, because the call would evict the state's experts.
    preparation = prepare(model) if args.verbose else None
    if args.save_state is not None:
        check_keeps_state(model)
    tokens: list[int] = []
    if args.load_state is not None:
        state = load_state(args.load_state, model)
        cache, tokens = state.cache, state.tokens
    has_prefix = cache is not None
    if args.save_state is not None and cache is None:
        cache = make_prompt_cache(model)
    prompt = _prompt_tokens(args, tokenizer, has_prefix=has_prefix)
    if not prompt:
        raise ConfigError("[generate] expected a prompt of some tokens but it is empty")
    tokens += prompt
    tokens += generate_and_print(
        model,
        tokenizer,
        prompt,
        preparation=preparation,
        max_tokens=args.max_tokens,
        sampler=_sampler(args, tokenizer),
        prompt_cache=cache,
        **_cache_options(args),
        **_draft_options(args, model, tokenizer),
    )
    if args.save_state is not None:
        assert cache is not None
        save_state(args.save_state, model, cache, tokens)
    return 0


def _refuse_unusable(args: argparse.Namespace) -> None:
    if args.image:
        raise ConfigError("[generate] expected a text prompt but got --image")
    _refuse_in_group(args)
    states = args.load_state is not None or args.save_state is not None
    for flag in ("prompt_cache_file", "draft_model"):
        if states and getattr(args, flag) is not None:
            name = flag.replace("_", "-")
            raise ConfigError(f"[generate] expected --{name} or a state but got both")
    for name, parse in NUMBERS.items():
        if (value := getattr(args, name)) is not None:
            check_number(f"--{name.replace('_', '-')}", value, parse)
    if args.max_tokens == 0:
        raise ConfigError("[generate] expected --max-tokens of 1 or more, or -1")


def _refuse_in_group(args: argparse.Namespace) -> None:
    check_division("generate", args)
    # Under mlx.launch standard input never ends.
    if args.group is not None and args.prompt == "-":
        raise ConfigError(
            "[generate] expected a prompt as text with several processes but got '-': "
            'give it as --prompt "$(cat FILE)"'
        )


def _load(
    args: argparse.Namespace, path: str, saved: dict[str, str]
) -> tuple[Any, Any]:
    model, tokenizer = load(
        path,
        **streaming_options(args),
        **division(args),
        adapter_path=args.adapter_path,
        tokenizer_config={
            **_object("--prompt-cache-file", saved.get("tokenizer_config")),
            "trust_remote_code": args.trust_remote_code,
        },
        model_config={"quantize_activations": args.quantize_activations},
    )
    for token in args.extra_eos_token:
        tokenizer.add_eos_token(token)
    return model, tokenizer


def _prompt_cache(args: argparse.Namespace) -> tuple[list | None, dict[str, str]]:
    if args.prompt_cache_file is None:
        return None, {}
    try:
        # Opening the file first refuses a FIFO, for which MLX would wait.
        open_file(args.prompt_cache_file).close()
        cache, saved = load_prompt_cache(args.prompt_cache_file, return_metadata=True)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise ConfigError(f"[generate] --prompt-cache-file: {error}") from error
    for name in ("bits", "group_size"):
        asked, stored = getattr(args, f"kv_{name}"), getattr(cache[0], name, None)
        if None not in (asked, stored) and asked != stored:
            raise ConfigError(
                f"[generate] {args.prompt_cache_file} has kv {name} {stored} "
                f"but got {asked}"
            )
    return cache, saved


def _model_path(args: argparse.Namespace, saved: dict[str, str]) -> str:
    path = args.model or saved.get("model")
    if path is None:
        raise ConfigError("[generate] expected --model but got none")
    if saved and path != saved["model"]:
        raise ConfigError(
            f"[generate] {args.prompt_cache_file} is of model {saved['model']} "
            f"but got --model {path}"
        )
    return path


def _prompt_tokens(
    args: argparse.Namespace, tokenizer: Any, *, has_prefix: bool
) -> list[int]:
    text = args.prompt.replace("\\n", "\n").replace("\\t", "\t")
    text = sys.stdin.read() if text == "-" else text
    if args.ignore_chat_template or not tokenizer.has_chat_template:
        return tokenizer.encode(text)
    chat = _chat_text(args, tokenizer, text)
    if has_prefix:
        # A saved cache already holds the template's text before the user's message.
        chat = chat[_chat_text(args, tokenizer, "<query>").index("<query>") :]
    return tokenizer.encode(chat, add_special_tokens=False)


def _chat_text(args: argparse.Namespace, tokenizer: Any, text: str) -> str:
    parts = {
        "system": args.system_prompt,
        "user": text,
        "assistant": args.prefill_response,
    }
    prefilled = args.prefill_response is not None
    with one_line_errors(f"[chat template] {args.model}"):
        return tokenizer.apply_chat_template(
            [{"role": k, "content": v} for k, v in parts.items() if v is not None],
            tokenize=False,
            continue_final_message=prefilled,
            add_generation_prompt=not prefilled,
            **_object("--chat-template-config", args.chat_template_config),
        )


def _object(flag: str, text: str | None) -> dict[str, Any]:
    """Return the JSON object in a flag's value."""
    try:
        found = parse_json(text or "{}", exact=False)
        if isinstance(found, dict):
            return found
        why = short(found)
    except ValueError as error:
        why = str(error)
    raise ConfigError(f"[generate] {flag}: expected a JSON object but got {why}")


def _sampler(args: argparse.Namespace, tokenizer: Any) -> Any:
    return make_sampler(
        args.temp,
        args.top_p,
        args.min_p,
        args.min_tokens_to_keep,
        top_k=args.top_k,
        xtc_probability=args.xtc_probability,
        xtc_threshold=args.xtc_threshold,
        xtc_special_tokens=[*tokenizer.encode("\n"), *tokenizer.eos_token_ids],
    )


def _cache_options(args: argparse.Namespace) -> dict[str, Any]:
    names = ("max_kv_size", "prefill_step_size", "kv_bits", "kv_group_size")
    return {name: getattr(args, name) for name in (*names, "quantized_kv_start")}


def _draft_options(
    args: argparse.Namespace, model: Any, tokenizer: Any
) -> dict[str, Any]:
    if args.draft_model is None:
        return {}
    if not can_go_back(make_prompt_cache(model)):
        raise ConfigError(
            "[generate] expected a model that can take tokens back but got "
            f"--draft-model with {model.model_type}, whose layers cannot"
        )
    # Without this, transformers asks on the terminal whether to run the model's code.
    trusted = {"trust_remote_code": args.trust_remote_code}
    draft, draft_tokenizer = load_draft(args.draft_model, trusted)
    if draft_tokenizer.vocab_size != tokenizer.vocab_size:
        raise ConfigError(
            f"[generate] expected a draft model with {tokenizer.vocab_size} tokens "
            f"but {args.draft_model} has {draft_tokenizer.vocab_size}"
        )
    return {"draft_model": draft, "num_draft_tokens": args.num_draft_tokens}
