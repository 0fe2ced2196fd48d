"""Log in, log out. One sentence for whatever was wrong, after the same time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Annotated, Final

from fastapi import APIRouter, Depends, HTTPException, Request, Response
from fastapi.responses import RedirectResponse

from worker.domain import Account
from worker.ops import audit
from worker.store import accounts
from worker.web.site import ASite, AVisitor, Fields, Site, Visitor, address_of, may

router = APIRouter()

#: Each try takes 32 MiB and 0.2 s: so many at once, and so many that wait, each in a thread that the pages want.
_TRIES: Final = threading.BoundedSemaphore(2)
_WAITING: Final = threading.BoundedSemaphore(8)
#: After so many wrong ones an account waits for whoever tries at that address; see accounts.TRIES for all together.
TRIES: Final = 5
_MOST: Final = 10_000
WRONG: Final = (
    f"Name or password is wrong, or there were too many tries: after {TRIES} one waits, longer with each more. "
    "Who runs this installation can set a new password."
)
ENDED: Final = "You are logged out."


@router.get("/login")
def ask(request: Request, site: ASite, ended: bool = False) -> Response:
    """The form."""
    return site.page(request, "login.html", said=ENDED if ended else "", wrong="", is_external=bool(site.web.oidc_issuer))


@router.post("/login")
def log_in(request: Request, site: ASite, fields: Fields) -> Response:
    """Look at name and password; begin a session."""
    account = _proven(request, site, fields.get("name", ""), fields.get("password", ""))
    if account is None:
        return site.page(request, "login.html", status=401, said="", wrong=WRONG, is_external=bool(site.web.oidc_issuer))
    with site.store.begin() as conn:
        token = accounts.open_session(conn, account.id, now=site.now(), hours=site.web.session_h)
    return welcome(request, site, account.name, token)


class Guesses:
    """Wrong tries of an account from an address: who guesses is locked out there, long before the account's owner is."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of: dict[tuple[str, str], tuple[int, datetime]] = {}

    def begin(self, one: tuple[str, str], now: datetime) -> bool:
        """Count a try; whether it is one."""
        with self._lock:
            count, until = self._of.pop(one, (0, now))
            is_free = until <= now
            if is_free:
                count += 1
                until = now + accounts.pause(count - TRIES) if count >= TRIES else now
            self._of[one] = count, until
            if len(self._of) > _MOST:
                del self._of[next(iter(self._of))]
            return is_free

    def succeed(self, one: tuple[str, str]) -> None:
        """The try was right."""
        with self._lock:
            self._of.pop(one, None)


@contextmanager
def turn(waiting: threading.BoundedSemaphore) -> Iterator[None]:
    """One of those who may wait for a log-in; whoever is too much is told so at once."""
    if not waiting.acquire(blocking=False):
        raise HTTPException(503, "Too many log in at once. Try again.")
    try:
        yield
    finally:
        waiting.release()


def _proven(request: Request, site: Site, name: str, password: str) -> Account | None:
    """Whose name and password these are; None: nobody's, and the audit trail says so."""
    guesses: Guesses = request.app.state.guesses
    with turn(_WAITING), _TRIES:
        with site.store.begin() as conn:
            known = accounts.by_name(conn, name)
            # Of the password, for with another one begins anew; all names that nobody has are one.
            whose = ("" if known is None else known.password, address_of(request))
            row = accounts.begin_try(conn, name, now=site.now()) if guesses.begin(whose, site.now()) else None
        is_right = accounts.is_right(password, "" if row is None else row.password)
    if row is not None and is_right:
        guesses.succeed(whose)
        with site.store.begin() as conn:
            return accounts.succeed(conn, row)
    # A name that nobody has may be a password, typed into the wrong field.
    person = audit.Party("unknown" if known is None else known.name, address_of(request), is_ae=False)
    reason = "locked after too many tries" if known is not None and row is None else "name or password is wrong"
    audit.logged(audit.LOGIN, person, outcome=audit.AGAIN, reason=reason)
    return None


def welcome(request: Request, site: Site, name: str, token: str) -> Response:
    """Give the browser its cookie; whatever session it had before is ended."""
    with site.store.begin() as conn:
        accounts.close_session(conn, request.cookies.get(site.cookie, ""))
    audit.logged(audit.LOGIN, audit.Party(name, address_of(request), is_ae=False))
    answer = RedirectResponse("/", 303)
    answer.set_cookie(site.cookie, token, httponly=True, samesite="lax", secure=site.is_secure, path="/")
    return answer


@router.post("/logout")
def log_out(site: ASite, who: Annotated[Visitor, Depends(may("see"))]) -> Response:
    """End the session, here and in the database."""
    with site.store.begin() as conn:
        accounts.close_session(conn, who.token)
    audit.logged(audit.LOGOUT, who.party)
    answer = RedirectResponse("/login?ended=true", 303)
    answer.delete_cookie(site.cookie, path="/", httponly=True, secure=site.is_secure, samesite="lax")
    return answer


@router.get("/account")
def account(request: Request, site: ASite, _who: AVisitor, said: str = "") -> Response:
    """One's own password."""
    return site.page(request, "account.html", wrong="", is_done=said == "changed", shortest=accounts.SHORTEST)


@router.post("/account")
def change_password(request: Request, site: ASite, fields: Fields, who: Annotated[Visitor, Depends(may("see"))]) -> Response:
    """Another password; every session of the account ends, and this browser gets a new one."""
    if _proven(request, site, who.account.name, fields.get("old", "")) is None:
        return site.page(request, "account.html", status=400, wrong="The old password is wrong.", is_done=False, shortest=accounts.SHORTEST)
    try:
        password = accounts.hashed(fields.get("new", ""))
    except accounts.AccountRefused as exc:
        return site.page(request, "account.html", status=400, wrong=str(exc), is_done=False, shortest=accounts.SHORTEST)
    with site.store.begin() as conn:
        accounts.change(conn, who.account.id, password=password)
        token = accounts.open_session(conn, who.account.id, now=site.now(), hours=site.web.session_h)
    audit.guarded(audit.ATTRIBUTES, who.party, name=who.account.name, reason="password changed")
    answer = RedirectResponse("/account?said=changed", 303)
    answer.set_cookie(site.cookie, token, httponly=True, samesite="lax", secure=site.is_secure, path="/")
    return answer
