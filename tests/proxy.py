"""A TCP proxy before PostgreSQL that hands everything on, until it is told to cut: at the next COMMIT, or everything at once."""

from __future__ import annotations

import contextlib
import socket
import threading
from types import TracebackType
from typing import Final, Literal, Self

import sqlalchemy as sa

#: Where a connection is cut: before the server hears the COMMIT, or after it did it and before the client hears so.
Cut = Literal["before", "after"]

#: The message Query, its length and its text: https://www.postgresql.org/docs/current/protocol-message-formats.html
_COMMIT: Final = b"Q\x00\x00\x00\x0bCOMMIT\x00"


class Proxy:
    """Use it as a context manager; `url` leads through it."""

    def __init__(self, url: str) -> None:
        self._server = sa.make_url(url)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._is_down = False
        self._cut: Cut | None = None
        #: How many connections were cut at their COMMIT.
        self.cuts = 0

    @property
    def url(self) -> str:
        """The database, by way of us."""
        port = self._listener.getsockname()[1]
        url = self._server.set(host="127.0.0.1", port=port, query={})
        return url.render_as_string(hide_password=False)

    def cut_at_commit(self, cut: Cut) -> None:
        """Cut the connection that says the next COMMIT, once."""
        self._cut = cut

    def down(self) -> None:
        """Cut every connection, and each new one at once, as a server that was stopped does."""
        self._is_down = True
        self._close_all()

    def up(self) -> None:
        """Hand on again."""
        self._is_down = False

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._is_down = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._close_all()

    def _close_all(self) -> None:
        with self._lock:
            for sock in self._sockets:
                _end(sock)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._is_down:
                client.close()
                continue
            server = self._connect()
            with self._lock:
                self._sockets |= {client, server}
            threading.Thread(target=self._serve, args=(client, server), daemon=True).start()

    def _connect(self) -> socket.socket:
        folder = self._server.query.get("host") or self._server.host
        if isinstance(folder, str) and folder.startswith("/"):
            server = socket.socket(socket.AF_UNIX)
            server.connect(f"{folder}/.s.PGSQL.{self._server.port or 5432}")
            return server
        return socket.create_connection((self._server.host or "127.0.0.1", self._server.port or 5432))

    def _serve(self, client: socket.socket, server: socket.socket) -> None:
        is_cut = threading.Event()

        def answers() -> None:
            with contextlib.suppress(OSError):
                while data := server.recv(65536):
                    if is_cut.is_set():  # this is the answer to the COMMIT: it was done
                        break
                    client.sendall(data)
            _end(client)

        threading.Thread(target=answers, daemon=True).start()
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                if self._cut and _COMMIT in data:
                    cut, self._cut, self.cuts = self._cut, None, self.cuts + 1
                    if cut == "before":
                        break
                    is_cut.set()
                server.sendall(data)
        _end(server)
        _end(client)
        with self._lock:
            self._sockets -= {client, server}
        client.close()
        server.close()


def _end(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
