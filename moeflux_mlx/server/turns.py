"""Keep a prompt's caches at the ends of its turns, for requests outside batches.

mlx-lm's batches do so. For requests outside batches (with a seed or quantised caches)
mlx-lm keeps only the caches after the answer. If the next turn repeats the answer in
other words, or omits its reasoning, these caches do not match, and states of linear
attention and full windows cannot be trimmed back to the end of the turn.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step, stream_generate

from ..memory.caches import always_trim

# The options of generating that also apply to reading a prompt.
READING = (
    "stream",
    "prefill_step_size",
    "prompt_progress_callback",
    "kv_bits",
    "kv_group_size",
    "quantized_kv_start",
)

# Called with tokens, the caches after them, and the kind of their last segment.
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
    """Generate like ``mlx_lm.stream_generate``, and keep caches after each turn.

    Args:
        tokens: the whole prompt; ``prompt`` is its end, which the caches lack.
        segments, kinds: the prompt's parts and their kinds, from mlx-lm's server.
        keep: stores the caches, which it then owns.
    """
    # Logits processors need the whole prompt in one call.
    whole = draft_model is not None or bool(options.get("logits_processors"))
    whole = whole or options.get("input_embeddings") is not None
    if not whole and not always_trim(prompt_cache):
        reading = {name: options[name] for name in READING if name in options}
        start, end = len(tokens) - len(prompt), 0
        for segment, kind in zip(segments, kinds, strict=True):
            # Generation needs one remaining token to begin with.
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
