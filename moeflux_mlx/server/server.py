"""``moeflux serve``: mlx-lm's server with our loader, metrics and a status page."""

from __future__ import annotations

import argparse
import functools
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx
from mlx_lm import server as stock
from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache

from ..drafts import can_go_back
from ..errors import ConfigError, GroupError
from ..experts.files.checkpoint import read_config
from ..loading import load, load_draft
from ..opening.download import find_model
from ..serving import guards
from ..system.progress import notice
from .handler import DEFAULT, Handler
from .record import Record
from .replaced import replaced
from .turns import generate_in_turns

# MLX begins the errors of its connections with the backend's name.
BACKENDS = ("[ring]", "[nccl]", "[jaccl]", "[mpi]")


def serve(args: argparse.Namespace, options: dict[str, Any]) -> int:
    """Load a model and answer requests until the process is ended.

    Args:
        args: parsed arguments of mlx-lm's server.
        options: arguments of ``load``.

    Returns:
        The exit code: 0 after an interrupt, 1 if the server cannot generate any more.

    Raises:
        MoefluxError: see ``load``; or the address cannot be used.
    """
    if args.group is not None and args.group.rank():
        return _follow(Generator(Provider(args, options)))
    server = Server(args.host, args.port)
    generator = Generator(Provider(args, options))
    server.generator = generator
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    try:
        generator.wait_until_loaded()
        server.server_activate()
        notice(f"serving {args.model} at {server.address}")
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
        failed = generator.has_loaded and not generator.generation_available()
        generator.stop_and_join()
    return int(failed)


def _end(*_: Any) -> NoReturn:
    """End the server once: a second signal must not break that off, which aborts.

    Ctrl-C a second time ends the process at once.

    Raises:
        KeyboardInterrupt: always.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    raise KeyboardInterrupt


def _follow(generator: Generator) -> int:
    """Generate for the requests of the first process until it ends."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    try:
        generator.wait_until_loaded()
        generator.join()
    except KeyboardInterrupt:
        # The interrupt reached the first process too. Unless that is gone, it now ends
        # this process's thread.
        if not generator.has_ended(guards.ENDING_SECONDS):
            os._exit(1)
    return int(not generator.has_ended(0))


class Provider(stock.ModelProvider):
    """Loads the served model with ``moeflux_mlx.load``."""

    def __init__(self, args: argparse.Namespace, options: dict[str, Any]):
        super().__init__(args)
        self._options = options

    def _load(self, *key: Any) -> None:
        with replaced(stock, load=self._opened, sharded_load=self._divided):
            super()._load(*key)
        if self.draft_model is None:
            return
        if not can_go_back(make_prompt_cache(self.model)):
            raise ConfigError(
                "[serve] expected a model that can take tokens back but got "
                f"--draft-model with {self.model.model_type}, whose layers cannot"
            )

    def _opened(
        self,
        path: str,
        adapter_path: str | None = None,
        tokenizer_config: dict[str, Any] | None = None,
        return_config: bool = False,
        trust_remote_code: bool = False,
    ) -> Any:
        """Replace ``mlx_lm.load``, which the server calls."""
        if not return_config:
            # A draft model. Without this value transformers would ask to run its code.
            trusted = {"trust_remote_code": self.cli_args.trust_remote_code}
            return load_draft(path, trusted)
        model, tokenizer = load(
            path,
            **self._options,
            adapter_path=adapter_path,
            tokenizer_config=tokenizer_config,
        )
        return model, tokenizer, read_config(find_model(path))

    def _divided(
        self, path: str, *, tokenizer_config: dict[str, Any], **_groups: Any
    ) -> Any:
        """Replace ``mlx_lm.utils.sharded_load``; our own options divide the model."""
        return self._opened(path, None, tokenizer_config, True)


class Generator(stock.ResponseGenerator):
    """mlx-lm's generating thread, extended to count its work."""

    def __init__(self, provider: Provider):
        self.record = Record()
        # For each request's thread, the function that checks its client's connection.
        self.here = threading.local()
        self._loaded = threading.Event()
        self._failure: BaseException | None = None
        # Set in the first of several processes, which then ends all of them.
        self._ends = False
        super().__init__(provider, LRUPromptCache(provider.cli_args.prompt_cache_size))

    def _run_generate(self) -> None:
        super()._run_generate()
        # A thread that ends before its streams may crash the process.
        mx.clear_streams()

    def _generate(self) -> None:
        try:
            self.model_provider.load_default()
            self.prompt_cache = guards.kept_prompts(self)
        except BaseException as error:
            self._failure = error
            return
        finally:
            self._loaded.set()
        try:
            super()._generate()
        except GroupError as error:
            logging.error("%s", error)
            self._generation_failed = True
        except RuntimeError as error:
            # mlx-lm itself adds numbers of all processes, as the first seed.
            if not str(error).startswith(BACKENDS):
                raise
            logging.error("%s", _one_ended(error))
            self._generation_failed = True

    def _tokenize(self, *args: Any) -> Any:
        found = super()._tokenize(*args)
        self._divided = found[:3]
        return found

    def _serve_single(self, *args: Any) -> None:
        def keep(tokens: list[int], cache: list[Any], kind: str) -> None:
            key = self.model_provider.model_key
            self.prompt_cache.insert_cache(key, tokens, cache, cache_type=kind)

        def generate(**options: Any) -> Iterator[Any]:
            tokens, segments, kinds = self._divided
            yield from generate_in_turns(tokens, segments, kinds, keep, **options)

        made = {"GenerationContext": _Unstoppable} if self._is_distributed else {}
        with replaced(stock, stream_generate=generate, **made):
            super()._serve_single(*args)

    def _share_object(self, obj: Any) -> Any:
        """Return the first process's object in all of them.

        Raises:
            GroupError: one of them ended.
        """
        try:
            return super()._share_object(obj)
        except RuntimeError as error:
            raise _one_ended(error) from error

    def _share_request(self, request: Any) -> Any:
        """Pass a request to all processes, or None to end them."""
        if self._is_distributed:
            self._stop = self._share_object(self._ends or None) is not None
        return None if self._stop else super()._share_request(request)

    def stop_and_join(self) -> None:
        """End the generating thread, in all processes, and wait for it."""
        if self._is_distributed:
            self._ends = True
            self.join()
        else:
            super().stop_and_join()

    def wait_until_loaded(self) -> None:
        """Wait until the model is loaded.

        Raises:
            MoefluxError, OSError: the model cannot be loaded.
        """
        # Wait in short intervals, so that Ctrl-C is noticed.
        while not self._loaded.wait(0.1):
            pass
        if self._failure is not None:
            raise self._failure

    def has_ended(self, seconds: float) -> bool:
        """Wait for the generating thread to end well; return whether it did."""
        self._generation_thread.join(seconds)
        return not (self._generation_thread.is_alive() or self._generation_failed)

    @property
    def has_loaded(self) -> bool:
        """Tell whether the model is loaded."""
        return self._loaded.is_set() and self._failure is None

    def generate(
        self,
        request: Any,
        generation_args: Any,
        progress_callback: Callable[[int, int], None] | None = None,
    ) -> Any:
        """Submit a request; its handler's thread calls this.

        Raises:
            ConnectionError: the client went away; also raised by the responses.
        """
        # The server has one model, whatever name the request used.
        generation_args.model.model = generation_args.model.draft = DEFAULT
        check = self.here.check_client

        def progress(n_done: int, n_tokens: int) -> None:
            check()
            if progress_callback is not None:
                progress_callback(n_done, n_tokens)

        context, responses = super().generate(request, generation_args, progress)
        return context, self._counted(context, responses, check)

    def _counted(
        self, context: Any, responses: Iterator[Any], check: Callable[[], None]
    ) -> Iterator[Any]:
        is_first = True
        for response in responses:
            check()
            if is_first:
                n_cached = max(0, context.prompt_cache_count)
                self.record.add_prompt(len(context.prompt), n_cached)
                is_first = False
            self.record.add_token()
            yield response

    @property
    def served_names(self) -> list[str]:
        """The names of the model in requests; the first is the listed one."""
        name = str(self.cli_args.model)
        path = Path(name)
        found = [str(path.resolve()), name, path.name] if path.exists() else [name]
        return [*found, DEFAULT]


def _one_ended(error: RuntimeError) -> GroupError:
    """Return the error for a connection that another process has closed."""
    told = " ".join(str(error).split())
    return GroupError(
        f"[group] expected every process to serve but one ended ({told}): its own "
        "error says why, start all of them again"
    )


class _Unstoppable(stock.GenerationContext):
    """A request outside of batches in several processes, which runs to its end."""

    def stop(self) -> None:
        """Continue without the client, because the other processes continue."""


class Server(ThreadingHTTPServer):
    """An HTTP server with a thread per request, bound before the model is loaded.

    Raises:
        ConfigError: the address is not of this machine, or is in use.
    """

    generator: Generator

    def __init__(self, host: str, port: int):
        try:
            found = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            self.address_family, *_, address = found[0]
            super().__init__(address, Handler, bind_and_activate=False)  # type: ignore[arg-type]
            self.server_bind()
        except OSError as error:
            raise ConfigError(
                f"[serve] cannot use {host}:{port}: {error.strerror or error}: choose "
                "another --host or --port"
            ) from error

    @property
    def address(self) -> str:
        """The server's URL."""
        host, port = self.server_address[:2]
        host = host.decode() if isinstance(host, bytes) else host
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    @functools.cached_property
    def is_private(self) -> bool:
        """Tell whether only this machine can reach the address."""
        return ipaddress.ip_address(str(self.server_address[0])).is_loopback

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Answer one request."""
        Handler(self.generator, request, client_address, self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log the error of a broken connection, because there is no client to tell."""
        logging.info("%s: %s", client_address, sys.exc_info()[1])
