"""The HTTP handler of ``moeflux serve``: checks a request and sends the answer."""

from __future__ import annotations

import io
import ipaddress
import json
import logging
import select
import socket
from typing import Any

from mlx_lm import server as stock

from ..errors import RequestError
from ..serving import guards
from ..serving.requests import (
    BODY_BYTES,
    check_chat,
    check_names,
    check_text,
    parse_body,
)
from . import metrics, page
from .record import HUNG_UP, Record

# A name for the served model in requests, besides its path and id.
DEFAULT = "default_model"
CHATS = "/v1/chat/completions", "/chat/completions"
TEXTS = ("/v1/completions",)


class Handler(stock.APIHandler):
    """mlx-lm's request handler, extended so that every request gets an answer."""

    # Seconds after which a silent client loses its thread.
    timeout = 600
    # The ``Generator`` and ``Server`` of ``moeflux serve``.
    response_generator: Any
    server: Any
    failure: tuple[int, str] | None = None
    status = 0

    def do_GET(self) -> None:
        """Answer with the status page, metrics, health or the model's name."""
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
        """Tell a browser which origins may send requests."""
        try:
            self._check_sender()
            super().do_OPTIONS()
        except ConnectionError:
            pass
        except Exception as error:
            guards.answer(self, error, begun=False)

    def send_response(self, code: int, message: str | None = None) -> None:
        """Begin an answer and record its status."""
        self.status = int(code)
        super().send_response(code, message)

    def log_message(self, format: str, *args: Any) -> None:
        """Log through the ``logging`` module."""
        logging.info("%s %s", self.address_string(), (format % args))

    def _check_request(self) -> None:
        """Check a request before mlx-lm's handler reads it.

        Raises:
            RequestError: the request cannot be answered.
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
        """Raise ConnectionResetError if the client went away, without waiting."""
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        if poll.poll(0) and not self.connection.recv(1, socket.MSG_PEEK):
            raise ConnectionResetError("the client went away")

    def _check_sender(self) -> None:
        """Refuse requests from web pages of other origins.

        Raises:
            RequestError: the origin is not in ``--allowed-origins``, or the host name
                is not local.
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
        # A foreign host name may have been pointed at this machine (DNS rebinding).
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


def _is_local(host: str) -> bool:
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


def _models(generator: Any) -> tuple[int, bytes]:
    model = {
        "id": generator.served_names[0],
        "object": "model",
        "created": int(generator.record.started),
    }
    return 200, json.dumps({"object": "list", "data": [model]}).encode()
