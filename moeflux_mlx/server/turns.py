"""Keep a prompt's caches where its turns end, for requests that are served alone.

mlx-lm's batches do so. What it serves one by one, because of a seed or of quantised
caches, it keeps only with the answer: a next turn that writes that answer another way,
or leaves thoughts out, would find nothing where states of linear attention cannot be
taken back to the turn's end.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step, stream_generate
from mlx_lm.models.cache import can_trim_prompt_cache

# The options for generating that reading a prompt takes too.
READING = (
    "stream",
    "prefill_step_size",
    "prompt_progress_callback",
    "kv_bits",
    "kv_group_size",
    "quantized_kv_start",
)

# Called with tokens, caches after them, and the kind of their last segment.
Keep = Callable[[list[int], list[Any], str], None]


def generate_in_turns(
    tokens: list[int],
    segments: list[list[int]],
    kinds: list[str],
    keep: Keep,
    *,
    model: Any,
    prompt: list[int],
    prompt_cache: list[Any],
    draft_model: Any = None,
    **options: Any,
) -> Iterator[Any]:
    """Generate as ``mlx_lm.stream_generate`` does, keeping caches on the way.

    Args:
        tokens: the whole prompt, of which ``prompt`` is the rest that the caches lack.
        segments, kinds: its parts, as mlx-lm's server divides it.
        keep: keeps caches, which are its own from then on.
    """
    # Penalties look at the tokens of one reading.
    whole = draft_model is not None or bool(options.get("logits_processors"))
    whole = whole or options.get("input_embeddings") is not None
    if not whole and not can_trim_prompt_cache(prompt_cache):
        reading = {name: options[name] for name in READING if name in options}
        start, end = len(tokens) - len(prompt), 0
        for segment, kind in zip(segments, kinds, strict=True):
            # One token is left to begin with.
            end = min(end + len(segment), len(tokens) - 1)
            if end > start:
                part = mx.array(tokens[start:end])
                reading |= {"prompt_cache": prompt_cache, "max_tokens": 0}
                for _ in generate_step(part, model, **reading):
                    pass
                keep(tokens[:end], copy.deepcopy(prompt_cache), kind)
                start = end
        prompt = tokens[start:]
    yield from stream_generate(
        model=model,
        prompt=prompt,
        prompt_cache=prompt_cache,
        draft_model=draft_model,
        **options,
    )
