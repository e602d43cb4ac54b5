"""Make requests of ``mlx_lm.server`` fail separately."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

from ..errors import BudgetError, RequestError, one_line
from .batches import GuardedBatches
from .owner import bounds_of, keeper_of, least_of, plan_of
from .prompts import KeptPrompts, release_oldest_prompt
from .requests import check_arguments

# Time for the interpreter to exit after Ctrl-C, which also ends the generating thread.
ENDING_SECONDS = 5.0


class RequestFailed(BaseException):
    """Carries a request's error past mlx-lm's handler, which would answer with 404."""

    def __init__(self, error: Exception):
        super().__init__(str(error))
        self.error = error


def running_server() -> ModuleType | None:
    """Return the module of ``mlx_lm.server`` if this process has imported it."""
    main = sys.modules.get("__main__")
    if getattr(getattr(main, "__spec__", None), "name", None) == "mlx_lm.server":
        return main
    return sys.modules.get("mlx_lm.server")


def join() -> Callable[[], bool] | None:
    """Guard the server that loads a model in this process, if there is one.

    Returns:
        A function that frees a kept prompt, and returns whether it did.
    """
    if (server := running_server()) is None:
        return None
    if server.BatchGenerator is not GuardedBatches:
        server.BatchGenerator = GuardedBatches  # type: ignore[attr-defined]
        _guard_requests(server)
        _watch(threading.current_thread())
    return release_oldest_prompt


def _guard_requests(server: ModuleType) -> None:
    """Check requests before they join a batch, and answer failed ones."""
    tokenize = server.ResponseGenerator._tokenize
    generate = server.ResponseGenerator.generate
    complete = server.APIHandler.handle_completion

    def checked(self: Any, tokenizer: Any, request: Any, args: Any) -> Any:
        # The server reports errors raised here to the request, but no later ones.
        if not isinstance(self.prompt_cache, KeptPrompts):
            self.prompt_cache = kept_prompts(self)
        found = tokenize(self, tokenizer, request, args)
        check_arguments(args, len(found[0]), *bounds_of(self.model_provider.model))
        _check_room(self, len(found[0]))
        model_key = self.model_provider.model_key
        self._make_state_machine(model_key, tokenizer, args.stop_words)
        server._make_sampler(args, tokenizer)
        server._make_logits_processors(args)
        return found

    def begun(self: Any, *args: Any, **options: Any) -> Any:
        try:
            return generate(self, *args, **options)
        except Exception as error:
            raise RequestFailed(error) from error

    def answered(self: Any, request: Any, stop_words: Any) -> None:
        try:
            complete(self, request, stop_words)
        except RequestFailed as failed:
            answer(self, failed.error, begun=False)
        except ConnectionError:
            raise
        except Exception as error:
            answer(self, error, begun=self.stream)

    server.ResponseGenerator._tokenize = checked
    server.ResponseGenerator.generate = begun
    server.APIHandler.handle_completion = answered


def _check_room(generator: Any, n_prompt: int) -> None:
    """Raise BudgetError for a prompt that can never fit, before it is read."""
    model = generator.model_provider.model
    plan = plan_of(model)
    # The plan assumes unquantised caches.
    if plan is None or generator.cli_args.kv_bits is not None:
        return
    if n_prompt > (most := least_of(model, plan.context_tokens)):
        raise BudgetError(
            f"[memory] expected a prompt of at most {most} tokens, for "
            f"which {plan.budget_bytes} bytes have room, but got {n_prompt}: shorten "
            "it, or raise memory"
        )


def kept_prompts(generator: Any) -> KeptPrompts:
    """Return a server's store of prompts, bounded by the plan's share for them."""
    provider, args = generator.model_provider, generator.cli_args
    if args.prompt_cache_bytes is None:
        plan = plan_of(provider.model)
        args.prompt_cache_bytes = (
            None if plan is None else least_of(provider.model, plan.prompt_bytes)
        )
    return KeptPrompts(
        generator.prompt_cache.max_size,
        args.prompt_cache_bytes,
        lambda: keeper_of(provider.model),
    )


def answer(handler: Any, error: Exception, *, begun: bool) -> None:
    """Send an error as the answer, or as the last event of a stream."""
    text = one_line(str(error)) or type(error).__name__
    logging.error("a request failed: %s", text)
    body = json.dumps({"error": text}).encode()
    handler.failure = status_of(error), text
    if begun:
        handler.wfile.write(b"data: " + body + b"\n\n")
    else:
        # The buffer may already hold the headers of a successful answer.
        handler._headers_buffer = []
        handler._set_completion_headers(status_of(error))
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)
    handler.wfile.flush()


def status_of(error: Exception) -> int:
    """Return the HTTP status of an error."""
    if isinstance(error, BudgetError):
        return 503
    if isinstance(error, RequestError):
        return error.status
    return 400 if isinstance(error, ValueError) else 500


def _watch(generating: threading.Thread) -> None:
    """End the process if the generating thread ends before it."""

    def wait() -> None:
        generating.join()
        main = threading.main_thread()
        main.join(ENDING_SECONDS)
        if main.is_alive():
            logging.error("the server cannot generate any more: it ends")
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="server-watch", daemon=True).start()
