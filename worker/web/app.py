"""The application: routes, the headers of every answer, and what an error looks like.

::

    host is ours? ─▶ POST from our own origin? ─▶ route ─▶ answer + headers; an error is a page with a sentence

Not here: who may what (site.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Final
from urllib.parse import urlsplit

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, PlainTextResponse, RedirectResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from worker import events
from worker.config import Config
from worker.ops.log import places
from worker.record_feeds import clock
from worker.store.database import DatabaseUnavailable, Store
from worker.web import login, metrics, oidc, pages, study
from worker.web.site import HERE, LoginNeeded, Site, environment

#: OWASP Secure Headers; nothing is loaded from elsewhere, nothing runs or styles that is not a file of ours.
HEADERS: Final[Mapping[str, str]] = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # Not "no-referrer": by that a browser without fetch metadata says of our own forms, too, that they are of nowhere.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=()",
    "Cache-Control": "no-store",
}
_STRICT: Final = "max-age=31536000"
#: Files of ours that change with the program alone.
_STATIC_S: Final = 3600


class Guard:
    """Headers on every answer; no name of ours but those we know, or an attacker's could be pointed here (DNS rebinding).

    And no POST from another origin: a form elsewhere must not even log somebody in.
    """

    def __init__(self, app: ASGIApp, *, site: Site) -> None:
        self._app, self._site = app, site
        self._names = {urlsplit(site.web.url).hostname, "localhost", "127.0.0.1", "::1"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                if scope["path"].startswith("/static/"):
                    headers["Cache-Control"] = f"max-age={_STATIC_S}"
                if self._site.is_secure:
                    headers["Strict-Transport-Security"] = _STRICT
            await send(message)

        await (self._refusal(scope["method"], Headers(scope=scope)) or self._app)(scope, receive, with_headers)

    def _refusal(self, method: str, headers: Headers) -> Response | None:
        if _named(headers.get("host", "")) not in self._names:
            return PlainTextResponse("This page may not be called by this name: [web] base_url says by which it may.", 400)
        if method not in ("GET", "HEAD") and not self._is_ours(headers):
            return PlainTextResponse("This form was sent from another page.", 403)
        return None

    @staticmethod
    def _is_ours(headers: Headers) -> bool:
        # Fetch metadata where the browser sends them, else Origin, which every browser sends with a POST.
        if site := headers.get("sec-fetch-site"):
            return site == "same-origin"
        return urlsplit(headers.get("origin", "")).netloc == headers.get("host", "")


def application(config: Config, store: Store, *, now: Callable[[], datetime] = clock) -> ASGIApp:
    """The page of an installation, as an ASGI application; `now` is the time for sessions and what is done."""
    site = Site(store, config.web, config.zone, environment(config.zone), now)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.site = site
    app.state.numbers = metrics.Numbers(config, store)
    app.state.guesses = login.Guesses()
    app.state.provider = oidc.provider(config.web)
    for router in (pages.router, study.router, login.router, oidc.router, metrics.router):
        app.include_router(router)
    app.mount("/static", StaticFiles(directory=HERE / "static"))
    handlers: dict[type[Exception], Callable[[Request, Exception], Response]] = {
        LoginNeeded: _to_login,
        AnyHTTPException: _refused,
        RequestValidationError: _unread,
        DatabaseUnavailable: _away,
        Exception: _failed,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
    # Around everything, so that the answer to a fault of ours has its headers, too.
    return Guard(app, site=site)


def _named(host: str) -> str:
    """The name or address in a Host header; '' for what is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _to_login(request: Request, _error: Exception) -> Response:
    if request.headers.get("hx-request"):
        return Response(status_code=204, headers={"HX-Redirect": "/login"})
    return RedirectResponse("/login", 303)


def _refused(request: Request, error: Exception) -> HTMLResponse:
    assert isinstance(error, AnyHTTPException)  # noqa: S101  registered for it
    # The framework's own words repeat what was asked for.
    words = error.detail if isinstance(error, HTTPException) else "There is no such page."
    return _sentence(request, error.status_code, words)


def _unread(request: Request, _error: Exception) -> HTMLResponse:
    return _sentence(request, 404, "There is no such page.")  # the framework would repeat what was asked for


def _away(request: Request, _error: Exception) -> HTMLResponse:
    # What the driver says names hosts, users and folders; this page is for whoever asks.
    return _sentence(request, 503, "The database is not available; /ready says why. Images are kept by their senders meanwhile.")


def _failed(request: Request, error: Exception) -> HTMLResponse:
    events.emit("page.failed", error=type(error).__name__, places=places(error))
    return _sentence(request, 500, "A fault of ours; the log says where. Nothing was lost.")


def _sentence(request: Request, status: int, words: str) -> HTMLResponse:
    site: Site = request.app.state.site
    return site.page(request, "message.html", status=status, words_said=words)
