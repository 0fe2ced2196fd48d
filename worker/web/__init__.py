"""The page that people look at: worklist, studies, dead letters; and the numbers that monitoring reads. Role ``serve``.

::

    browser ─▶ connection.py: how long? ─▶ app.py: host, headers, errors ─▶ site.py: who is it, may they? ─┐
      store, templates/ ◀── pages.py, study.py, login.py, oidc.py; for Prometheus metrics.py ◀─────────────┘

Server-rendered: htmx (static/, vendored) only asks again for what changes. No patient data in a URL, a tab's title or the log:
studies are named by their row. Not here: what is asked of the database (store/worklist.py, store/measures.py).
"""

from __future__ import annotations

import socket
import ssl
import threading
from typing import Final

from worker.config import Config
from worker.roles import started
from worker.store.database import Store
from worker.tls import Credentials, server_context

#: Connections at once; more take the place of idle ones, or are told to come again.
MOST: Final = 100
GRACE_S: Final = 5


def serve(config: Config, store: Store, listener: socket.socket, stop: threading.Event) -> None:
    """Serve the page on `listener` until told to stop."""
    import uvicorn

    from worker.web.app import application
    from worker.web.connection import Connection

    credentials = server_context(config.web, section="web")
    settings = uvicorn.Config(
        application(config, store),
        log_config=None,
        access_log=False,
        server_header=False,
        # Whom to believe about the browser's address: a proxy that ends TLS before us, on this host.
        proxy_headers=config.web.base_url.startswith("https:") and credentials is None,
        forwarded_allow_ips=["127.0.0.1", "::1"],
        lifespan="off",
        ws="none",
        loop="asyncio",
        http=Connection,
        limit_concurrency=MOST,
        timeout_graceful_shutdown=GRACE_S,
        ssl_context_factory=None if credentials is None else lambda _settings, _default: _renewed(credentials),
    )
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="serve")
    thread.start()
    while thread.is_alive() and not server.started:
        thread.join(0.05)
    started("serve", port=listener.getsockname()[1])
    while not stop.wait(1.0):
        if not thread.is_alive():
            raise RuntimeError("The server of the page ended.")
    server.should_exit = True
    thread.join(GRACE_S + 1)


def _renewed(credentials: Credentials) -> ssl.SSLContext:
    """A context that takes another for each handshake: a renewed certificate needs no restart."""

    def choose(connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        connection.context = credentials()

    # Not the context that `credentials` keeps: that one is given to connections, and must not choose again.
    context = credentials.fresh()
    context.sni_callback = choose
    return context
