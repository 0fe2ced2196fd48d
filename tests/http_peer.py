"""An HTTP server on loopback for one test, with TLS or without: what the scripted webhook and the scripted archive have in common."""

from __future__ import annotations

import ssl
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar, Self


def handler(answer: Callable[[BaseHTTPRequestHandler], None], *, protocol: str = "HTTP/1.1") -> type[BaseHTTPRequestHandler]:
    """A handler that answers every request by `answer`, says nothing of its own, and whose answers leave at once."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = protocol
        disable_nagle_algorithm = True  # headers and body are two writes: 40 ms each time otherwise

        def do_GET(self) -> None:
            answer(self)

        def do_POST(self) -> None:
            answer(self)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    return Handler


@dataclass
class HttpPeer(ABC):
    """Serves from a thread until the block ends."""

    #: By HTTP/1.0 a connection ends with its answer, which needs no length.
    protocol: ClassVar[str] = "HTTP/1.1"

    tls: ssl.SSLContext | None = field(default=None, kw_only=True)
    _server: ThreadingHTTPServer | None = field(default=None, init=False)

    @abstractmethod
    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Answer one request."""

    def __enter__(self) -> Self:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler(self.answer, protocol=self.protocol))
        self._server.daemon_threads = True
        # A peer that breaks off in the middle is what some tests are about.
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        if self.tls:
            self._server.socket = self.tls.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()

    @property
    def port(self) -> int:
        """Where it listens."""
        assert self._server is not None
        return int(self._server.server_address[1])
