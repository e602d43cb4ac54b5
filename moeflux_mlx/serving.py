"""Keep ``mlx_lm.server`` up: an error ends the request it belongs to and no other.

mlx-lm's server generates in one thread, which an exception ends for good: every later
request then fails. ``install`` puts classes of ours in the places of those that this
thread looks up for each request. It is called where a model of ours is loaded inside
that server, and changes nothing elsewhere.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import signal
import sys
import threading
import weakref
from types import ModuleType
from typing import Any

import mlx.core as mx
from mlx_lm.generate import (
    BatchGenerator,
    GenerationBatch,
    PromptProcessingBatch,
)
from mlx_lm.models.cache import LRUPromptCache

from .errors import BudgetError, MoefluxError

# Time for the interpreter to end after Ctrl-C, which ends the generating thread too.
ENDING_SECONDS = 5.0

_kept: weakref.WeakSet[KeptPrompts] = weakref.WeakSet()


def running_server() -> ModuleType | None:
    """Return the module of ``mlx_lm.server`` if this process has imported it."""
    main = sys.modules.get("__main__")
    if getattr(getattr(main, "__spec__", None), "name", None) == "mlx_lm.server":
        return main
    return sys.modules.get("mlx_lm.server")


def install(server: ModuleType) -> None:
    """Have a server's requests fail one by one, and end a process that cannot serve."""
    if server.BatchGenerator is not GuardedBatches:
        server.BatchGenerator = GuardedBatches  # type: ignore[attr-defined]
        _guard_requests(server)
        _watch(threading.current_thread())


def release_oldest_prompt() -> bool:
    """Drop the oldest prompt that a server keeps; tell whether there was one."""
    for prompts in _kept:
        if len(prompts):
            prompts.trim_to(n_sequences=len(prompts) - 1)
            mx.clear_cache()
            return True
    return False


class KeptPrompts(LRUPromptCache):
    """mlx-lm's prompt caches, where those of failed requests are not kept."""

    def insert_cache(
        self, model: Any, tokens: list[int], prompt_cache: Any, **options: Any
    ) -> None:
        """Keep a request's caches, unless it failed and has none."""
        if prompt_cache is not None:
            super().insert_cache(model, tokens, prompt_cache, **options)

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> Any:
        """Return caches to continue; never of the whole prompt.

        mlx-lm's batches need a token to begin with.
        """
        cache, rest = super().fetch_nearest_cache(model, tokens)
        return (cache, rest) if rest else (None, tokens)


class _Guarded:
    """What the two stages of a batch share: the errors of requests by their number."""

    failed: dict[int, Exception]
    uids: list[int]

    def _fail(self, error: Exception) -> None:
        self.failed.update(dict.fromkeys(self.uids, error))


class GuardedPrompts(_Guarded, PromptProcessingBatch):
    """Prompts that are read; those whose reading fails wait to be taken out."""

    def prompt(self, tokens: list[list[int]]) -> None:
        """Read tokens; an error is of every sequence."""
        try:
            super().prompt(tokens)
        except Exception as error:
            self._fail(error)

    def generate(self, tokens: list[list[int]]) -> GenerationBatch:
        """Go on to generating; after an error with sequences that have nothing."""
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
    """Sequences that get a token at a time; an error is of as few as possible."""

    def next(self) -> list[Any]:
        """Return the next token of each sequence that has not failed."""
        while self.uids:
            try:
                return super().next()
            except BudgetError as error:
                # The longest makes the most room for the others.
                longest = max(range(len(self.uids)), key=lambda i: len(self.tokens[i]))
                self.failed[self.uids[longest]] = error
                self.filter([i for i in range(len(self.uids)) if i != longest])
            except MoefluxError as error:
                if len(self.uids) > 1:
                    return self._one_by_one()
                self._fail(error)
                return []
            except Exception as error:
                # Samplers may have taken part of a step: nobody can go on.
                self._fail(error)
                return []
        return []

    def _one_by_one(self) -> list[Any]:
        """Give each sequence its token alone, and go on with those that got it."""
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
        """Return one of the sequences as a batch of its own."""
        batch = copy.copy(self)
        batch.prompt_cache = []
        batch.filter([i])
        batch.prompt_cache = [
            type(single).merge([single])
            for single in (cache.extract(i) for cache in self.prompt_cache)
        ]
        return batch


class GuardedBatches(BatchGenerator):
    """mlx-lm's continuous batching, which reports failed requests and goes on.

    Prompts are read one after the other, so that an error is of one of them.
    """

    def __init__(self, model: Any, **options: Any):
        options["prefill_batch_size"] = 1
        super().__init__(model, **options)
        self._failed: dict[int, Exception] = {}
        self._prompt_batch = GuardedPrompts.empty(
            model, self.sampler, prefill_step_size=self.prefill_step_size
        )
        self._generation_batch = GuardedTokens.empty(model, self.sampler)
        self._prompt_batch.failed = self._generation_batch.failed = self._failed

    def _next(self) -> tuple[list[Any], list[Any]]:
        before = self._uids()
        try:
            prompts, generated = super()._next()
        except Exception as error:
            # Between two stages: no sequence is sure to be whole.
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
            logging.error("a request failed: %s", reason)
            told, ended = _report(uid, reason)
            prompts.append(told)
            generated.append(ended)
        return prompts, generated

    def _uids(self) -> list[int]:
        waiting = [sequence[0] for sequence in self._unprocessed_sequences]
        return [*waiting, *self._prompt_batch.uids, *self._generation_batch.uids]


def _report(uid: int, error: Exception) -> tuple[Any, Any]:
    """Return what makes the server tell a request its error, then forget it.

    The server hands on progress as it comes, and raises what is an exception where the
    request waits. Who has no caches leaves none to be kept.
    """
    told = PromptProcessingBatch.Response(uid, (0, 0), False, False)
    told.progress = error  # type: ignore[assignment]
    ended = GenerationBatch.Response(uid, 0, mx.zeros(1), "stop", None, [])
    return told, ended


def _guard_requests(server: ModuleType) -> None:
    """Look at requests before they join others, and answer those that failed."""
    tokenize = server.ResponseGenerator._tokenize
    complete = server.APIHandler.handle_completion

    def checked(self: Any, tokenizer: Any, request: Any, args: Any) -> Any:
        # The server tells a request what is raised here, but nothing that comes later.
        if not isinstance(self.prompt_cache, KeptPrompts):
            self.prompt_cache = KeptPrompts(self.prompt_cache.max_size)
            _kept.add(self.prompt_cache)
        found = tokenize(self, tokenizer, request, args)
        if not len(found[0]):
            raise ValueError("the prompt is empty: expected at least one token")
        model_key = self.model_provider.model_key
        self._make_state_machine(model_key, tokenizer, args.stop_words)
        server._make_sampler(args, tokenizer)
        server._make_logits_processors(args)
        return found

    def answered(self: Any, request: Any, stop_words: Any) -> None:
        try:
            complete(self, request, stop_words)
        except ConnectionError:
            raise
        except Exception as error:
            _answer(self, error)

    server.ResponseGenerator._tokenize = checked
    server.APIHandler.handle_completion = answered


def _answer(handler: Any, error: Exception) -> None:
    """Send an error as the answer, or as the last event of what has been begun."""
    body = json.dumps({"error": str(error)}).encode()
    if handler.stream:
        handler.wfile.write(b"data: " + body + b"\n\n")
    else:
        # The status of success waits there to be sent with the answer.
        handler._headers_buffer = []
        handler._set_completion_headers(_status(error))
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)
    handler.wfile.flush()


def _status(error: Exception) -> int:
    if isinstance(error, BudgetError):
        return 503
    return 400 if isinstance(error, ValueError) else 500


def _watch(generating: threading.Thread) -> None:
    """End the process, should the thread that generates end before it."""

    def wait() -> None:
        generating.join()
        main = threading.main_thread()
        main.join(ENDING_SECONDS)
        if main.is_alive():
            logging.error("the server cannot generate any more: it ends")
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="server-watch", daemon=True).start()
