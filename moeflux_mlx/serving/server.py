"""mlx-lm's server with our loader, metrics and a status page: ``moeflux serve``."""

from __future__ import annotations

import argparse
import functools
import io
import ipaddress
import json
import logging
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx_lm import server as stock
from mlx_lm.models.cache import (
    LRUPromptCache,
    can_trim_prompt_cache,
    make_prompt_cache,
)

from ..download import find_model
from ..errors import ConfigError, RequestError
from ..experts.checkpoint import read_config
from ..loading import load
from ..progress import notice
from . import guards, metrics, page
from .record import HUNG_UP, Record
from .replaced import replaced
from .requests import (
    BODY_BYTES,
    check_chat,
    check_names,
    check_text,
    parse_body,
)
from .turns import generate_in_turns

# What a request names the served model by, beside its path or id.
DEFAULT = "default_model"
CHATS = "/v1/chat/completions", "/chat/completions"
TEXTS = ("/v1/completions",)


def serve(args: argparse.Namespace, options: dict[str, Any]) -> int:
    """Load a model and answer requests until somebody ends the process.

    Args:
        args: as the parser of mlx-lm's server gives them.
        options: as ``load`` takes them.

    Returns:
        The exit code: 0 where somebody ended it, 1 where it cannot generate any more.

    Raises:
        MoefluxError: as ``load``, or the address cannot be used.
    """
    server = Server(args.host, args.port)
    generator = Generator(Provider(args, options))
    server.generator = generator
    signal.signal(signal.SIGTERM, signal.default_int_handler)
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


class Provider(stock.ModelProvider):
    """Loads the model that is served, as ``moeflux_mlx.load`` does."""

    def __init__(self, args: argparse.Namespace, options: dict[str, Any]):
        super().__init__(args)
        if self.is_distributed:
            raise ConfigError(
                "[serve] expected one process but got several: start it without "
                "mlx.launch"
            )
        self._options = options

    def _load(self, *key: Any) -> None:
        with replaced(stock, load=self._opened):
            super()._load(*key)
        if self.draft_model is None:
            return
        if not can_trim_prompt_cache(make_prompt_cache(self.model)):
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
        """Stand in for ``mlx_lm.load``, which the server calls."""
        if not return_config:
            # A draft model: left to itself transformers asks to run its code.
            trusted = {"trust_remote_code": self.cli_args.trust_remote_code}
            return mlx_lm.load(path, trusted)[:2]
        model, tokenizer = load(
            path,
            **self._options,
            adapter_path=adapter_path,
            tokenizer_config=tokenizer_config,
        )
        return model, tokenizer, read_config(find_model(path))


class Generator(stock.ResponseGenerator):
    """mlx-lm's generating thread, which counts what it does."""

    def __init__(self, provider: Provider):
        self.record = Record()
        # What tells the thread of a request whether its client went away.
        self.here = threading.local()
        self._loaded = threading.Event()
        self._failure: BaseException | None = None
        super().__init__(provider, LRUPromptCache(provider.cli_args.prompt_cache_size))

    def _run_generate(self) -> None:
        super()._run_generate()
        # A thread that ends before its streams do may end the process with it.
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
        super()._generate()

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

        with replaced(stock, stream_generate=generate):
            super()._serve_single(*args)

    def wait_until_loaded(self) -> None:
        """Return once the model is there.

        Raises:
            MoefluxError, OSError: it cannot be loaded.
        """
        # Waited for in turns, so that Ctrl-C is heard.
        while not self._loaded.wait(0.1):
            pass
        if self._failure is not None:
            raise self._failure

    @property
    def has_loaded(self) -> bool:
        """Tell whether the model is there."""
        return self._loaded.is_set() and self._failure is None

    def generate(
        self,
        request: Any,
        generation_args: Any,
        progress_callback: Callable[[int, int], None] | None = None,
    ) -> Any:
        """Have a request answered, in the thread of its handler.

        Raises:
            ConnectionError: also where answers are taken: the client went away.
        """
        # One model is served, whatever name of it the request used.
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
        """What requests may name the model by; the first is what it is listed by."""
        name = str(self.cli_args.model)
        path = Path(name)
        found = [str(path.resolve()), name, path.name] if path.exists() else [name]
        return [*found, DEFAULT]


class Handler(stock.APIHandler):
    """mlx-lm's handler of requests, each of which gets an answer whatever happens."""

    # Another client's silence keeps a thread no longer than this.
    timeout = 600
    response_generator: Generator
    server: Server
    failure: tuple[int, str] | None = None
    status = 0

    def do_GET(self) -> None:
        """Answer with the status page, metrics, health, or the model's name."""
        pages = {
            "/": ("text/html; charset=utf-8", page.render),
            "/health": ("application/json", metrics.health),
            "/metrics": (metrics.CONTENT_TYPE, metrics.expose),
            "/v1/models": ("application/json", _models),
        }
        path = self.path.split("?")[0]
        path = "/v1/models" if path.startswith("/v1/models/") else path
        try:
            self._check_sender()
            if path not in pages:
                raise RequestError(f"[path] expected one of {[*pages]}", 404)
            kind, make = pages[path]
            status, text = make(self.response_generator)
            self._send(status, kind, text)
        except ConnectionError:
            pass
        except Exception as error:
            guards.answer(self, error, begun=False)

    def do_POST(self) -> None:
        """Answer a request for text."""
        record: Record = self.response_generator.record
        with record.open_request():
            try:
                self._check_sender()
                self._check_request()
                self.response_generator.here.check_client = self._check_client
                super().do_POST()
            except ConnectionError:
                self.failure = HUNG_UP, "the client went away"
            except Exception as error:
                guards.answer(self, error, begun=False)
            finally:
                status, text = self.failure or (self.status, None)
                record.end_request(status, text)

    def do_OPTIONS(self) -> None:
        """Tell a browser which pages of others may send requests."""
        try:
            self._check_sender()
            super().do_OPTIONS()
        except ConnectionError:
            pass
        except Exception as error:
            guards.answer(self, error, begun=False)

    def send_response(self, code: int, message: str | None = None) -> None:
        """Begin an answer; its status is remembered."""
        self.status = int(code)
        super().send_response(code, message)

    def log_message(self, format: str, *args: Any) -> None:
        """Log as everything else is logged."""
        logging.info("%s %s", self.address_string(), (format % args))

    def _check_request(self) -> None:
        """Look at a request before mlx-lm's handler reads it.

        Raises:
            RequestError: it cannot be answered.
        """
        path = self.path.split("?")[0]
        if path not in (*CHATS, *TEXTS):
            raise RequestError(f"[path] expected one of {[*CHATS, *TEXTS]}", 404)
        body = parse_body(self._read_body())
        (check_chat if path in CHATS else check_text)(body)
        args, names = self.response_generator.cli_args, {DEFAULT}
        served = {
            "model": names | {*self.response_generator.served_names},
            "draft_model": names | {args.draft_model},
            "adapters": {args.adapter_path},
        }
        check_names(body, served)
        data = json.dumps({k: v for k, v in body.items() if k != "adapters"}).encode()
        self.path, self.rfile = path, io.BytesIO(data)
        self.headers.replace_header("Content-Length", str(len(data)))

    def _read_body(self) -> bytes:
        text = self.headers.get("Content-Length")
        if text is None:
            raise RequestError("[Content-Length] expected a number but got none", 411)
        if not text.isdecimal() or len(text) > 20:
            raise RequestError(f"[Content-Length] expected a number but got {text!r}")
        if (n_bytes := int(text)) > BODY_BYTES:
            wanted = f"[body] expected at most {BODY_BYTES} bytes but got {n_bytes}"
            raise RequestError(wanted, 413)
        data: bytes = self.rfile.read(n_bytes)
        if len(data) < n_bytes:
            raise ConnectionResetError("the client went away")
        return data

    def _check_client(self) -> None:
        """Raise ConnectionResetError if the client went away; waits for nothing."""
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        if poll.poll(0) and not self.connection.recv(1, socket.MSG_PEEK):
            raise ConnectionResetError("the client went away")

    def _check_sender(self) -> None:
        """Refuse what a web page of others may have a browser send.

        Raises:
            RequestError: no page that ``--allowed-origins`` names sent it.
        """
        allowed = self.response_generator.cli_args.allowed_origins
        host = self.headers.get("Host", "")
        own = {f"http://{host}", f"https://{host}"}
        origin = self.headers.get("Origin")
        if origin and "*" not in allowed and origin not in {*allowed, *own}:
            raise RequestError(
                f"[Origin] expected none of other pages but got {origin[:200]!r}: "
                "allow it with --allowed-origins",
                403,
            )
        # A name that another's server had point here is that page's own.
        if self.server.is_private and not _is_local(host):
            raise RequestError(
                f"[Host] expected localhost but got {host[:200]!r}: name the address "
                "that is served with --host",
                403,
            )

    def _send(self, status: int, kind: str, text: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Security-Policy", page.POLICY)
        self.end_headers()
        self.wfile.write(text)


class Server(ThreadingHTTPServer):
    """A thread for each request; the address is taken before the model is loaded.

    Raises:
        ConfigError: the address is not one of this machine, or in use.
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
        """Where a browser finds this."""
        host, port = self.server_address[:2]
        host = host.decode() if isinstance(host, bytes) else host
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    @functools.cached_property
    def is_private(self) -> bool:
        """Tell whether only this machine reaches the address."""
        return ipaddress.ip_address(str(self.server_address[0])).is_loopback

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Answer one request."""
        Handler(self.generator, request, client_address, self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what came of a connection that broke; nobody is left to tell."""
        logging.info("%s: %s", client_address, sys.exc_info()[1])


def _is_local(host: str) -> bool:
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


def _models(generator: Generator) -> tuple[int, bytes]:
    model = {
        "id": generator.served_names[0],
        "object": "model",
        "created": int(generator.record.started),
    }
    return 200, json.dumps({"object": "list", "data": [model]}).encode()
