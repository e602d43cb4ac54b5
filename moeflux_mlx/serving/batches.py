"""mlx-lm's continuous batching, with errors limited to as few requests as possible."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import mlx.core as mx
from mlx_lm.generate import (
    BatchGenerator,
    GenerationBatch,
    PromptProcessingBatch,
)

from ..errors import BudgetError, MoefluxError


def n_waiting() -> int:
    """Return the number of accepted requests whose prompts have not started."""
    batches = None if GuardedBatches.latest is None else GuardedBatches.latest()
    return 0 if batches is None else len(batches._unprocessed_sequences)


class _Guarded:
    """The errors of requests by uid, which both stages of a batch share."""

    failed: dict[int, Exception]
    uids: list[int]

    def _fail(self, error: Exception) -> None:
        self.failed.update(dict.fromkeys(self.uids, error))


class GuardedPrompts(_Guarded, PromptProcessingBatch):
    """The stage that reads prompts; failed ones stay until they are removed."""

    def prompt(self, tokens: list[list[int]]) -> None:
        """Read tokens; an error belongs to every sequence."""
        try:
            super().prompt(tokens)
        except Exception as error:
            self._fail(error)

    def generate(self, tokens: list[list[int]]) -> GenerationBatch:
        """Start generating; after an error return a batch without data."""
        uids = list(self.uids)
        try:
            return super().generate(tokens)
        except Exception as error:
            self.failed.update(dict.fromkeys(uids, error))
            broken = GenerationBatch.empty(self.model, self.fallback_sampler)
            broken.uids = uids
            return broken

    def _copy(self) -> GuardedPrompts:
        other = super()._copy()
        other.failed = self.failed
        return other


class GuardedTokens(_Guarded, GenerationBatch):
    """The stage that generates tokens, with errors limited to few sequences."""

    def next(self) -> list[Any]:
        """Return the next token of each sequence that has not failed."""
        while self.uids:
            try:
                return super().next()
            except BudgetError as error:
                # Ending the longest sequence frees the most memory for the others.
                longest = max(range(len(self.uids)), key=lambda i: len(self.tokens[i]))
                self.failed[self.uids[longest]] = error
                self.filter([i for i in range(len(self.uids)) if i != longest])
            except MoefluxError as error:
                if len(self.uids) > 1:
                    return self._one_by_one()
                self._fail(error)
                return []
            except Exception as error:
                # Samplers may have run for some sequences, so none can continue.
                self._fail(error)
                return []
        return []

    def _one_by_one(self) -> list[Any]:
        """Generate each sequence's token alone; continue with the successful ones."""
        alone = [self._alone(i) for i in range(len(self.uids))]
        self.filter([])
        self._current_tokens = None
        responses = []
        for batch in alone:
            responses += batch.next()
            if batch.uids and batch.uids[0] not in self.failed:
                self.extend(batch)
        return responses

    def _alone(self, i: int) -> GuardedTokens:
        """Return sequence ``i`` as a batch of its own."""
        batch = copy.copy(self)
        batch.prompt_cache = []
        batch.filter([i])
        batch.prompt_cache = [
            type(single).merge([single])
            for single in (cache.extract(i) for cache in self.prompt_cache)
        ]
        return batch


class GuardedBatches(BatchGenerator):
    """mlx-lm's continuous batching, which reports failed requests and continues.

    Prompts are read one at a time, so that an error belongs to one of them. A server
    has one instance at a time, the ``latest``.
    """

    latest: weakref.ref[GuardedBatches] | None = None

    def __init__(self, model: Any, **options: Any):
        options["prefill_batch_size"] = 1
        super().__init__(model, **options)
        self._failed: dict[int, Exception] = {}
        self._prompt_batch = GuardedPrompts.empty(
            model, self.sampler, prefill_step_size=self.prefill_step_size
        )
        self._generation_batch = GuardedTokens.empty(model, self.sampler)
        self._prompt_batch.failed = self._generation_batch.failed = self._failed
        GuardedBatches.latest = weakref.ref(self)

    def _next(self) -> tuple[list[Any], list[Any]]:
        before = self._uids()
        try:
            prompts, generated = super()._next()
        except Exception as error:
            # Between two stages no sequence is certain to be intact.
            self._failed.update(dict.fromkeys(before, error))
            prompts, generated = [], []
        if not self._failed:
            return prompts, generated
        failed, errors = set(self._failed), dict(self._failed)
        self._failed.clear()
        self.remove(failed)
        mx.clear_cache()
        prompts = [r for r in prompts if r.uid not in failed]
        generated = [r for r in generated if r.uid not in failed]
        for uid, reason in errors.items():
            told, ended = _report(uid, reason)
            prompts.append(told)
            generated.append(ended)
        return prompts, generated

    def _uids(self) -> list[int]:
        waiting = [sequence[0] for sequence in self._unprocessed_sequences]
        return [*waiting, *self._prompt_batch.uids, *self._generation_batch.uids]


def _report(uid: int, error: Exception) -> tuple[Any, Any]:
    """Return responses that make the server report a request's error and drop it.

    The server passes progress on unchanged, and the waiting request raises it if it is
    an exception. A response without caches leaves none to be kept.
    """
    told = PromptProcessingBatch.Response(uid, (0, 0), False, False)
    told.progress = error  # type: ignore[assignment]
    ended = GenerationBatch.Response(uid, 0, mx.zeros(1), "stop", None, [])
    return told, ended
