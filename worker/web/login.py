"""Log in, log out. One sentence for whatever was wrong, after the same time."""

from __future__ import annotations

import threading
from typing import Annotated, Final

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import RedirectResponse

from worker.ops import audit
from worker.store import accounts
from worker.web.site import ASite, AVisitor, Fields, Site, Visitor, address_of, may

router = APIRouter()

#: Each try takes 32 MiB and 0.2 s: so many at once, the others wait so long.
_TRIES: Final = threading.BoundedSemaphore(2)
_WAIT_S: Final = 10.0
WRONG: Final = (
    f"Name or password is wrong, or there were too many tries: after {accounts.TRIES} an account waits, longer with each more. "
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
    name, password = fields.get("name", ""), fields.get("password", "")
    if not _TRIES.acquire(timeout=_WAIT_S):
        return site.page(request, "login.html", status=503, said="", wrong="Too many log in at once. Try again.", is_external=False)
    try:
        with site.store.begin() as conn:
            row = accounts.begin_try(conn, name, now=site.now())
        is_right = accounts.is_right(password, "" if row is None else row.password)
    finally:
        _TRIES.release()
    if row is None or not is_right:
        # A name that nobody has may be a password, typed into the wrong field.
        with site.store.read() as conn:
            known = accounts.by_name(conn, name)
        person = audit.Party("unknown" if known is None else known.name, address_of(request), is_ae=False)
        reason = "the account is locked" if known is not None and row is None else "name or password is wrong"
        audit.logged(audit.LOGIN, person, outcome=audit.AGAIN, reason=reason)
        return site.page(request, "login.html", status=401, said="", wrong=WRONG, is_external=bool(site.web.oidc_issuer))
    with site.store.begin() as conn:
        account = accounts.succeed(conn, row)
        token = accounts.open_session(conn, account.id, now=site.now(), hours=site.web.session_h)
    return welcome(request, site, account.name, token)


def welcome(request: Request, site: Site, name: str, token: str) -> Response:
    """Give the browser its cookie; whatever session it had before is another."""
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
    with site.store.begin() as conn:
        row = accounts.begin_try(conn, who.account.name, now=site.now())
    if row is None or not accounts.is_right(fields.get("old", ""), row.password):
        return site.page(request, "account.html", status=400, wrong="The old password is wrong.", is_done=False, shortest=accounts.SHORTEST)
    try:
        password = accounts.hashed(fields.get("new", ""))
    except accounts.AccountRefused as exc:
        return site.page(request, "account.html", status=400, wrong=str(exc), is_done=False, shortest=accounts.SHORTEST)
    with site.store.begin() as conn:
        accounts.change(conn, row.id, password=password)
        token = accounts.open_session(conn, row.id, now=site.now(), hours=site.web.session_h)
    audit.guarded(audit.ATTRIBUTES, who.party, name=who.account.name, reason="password changed")
    answer = RedirectResponse("/account?said=changed", 303)
    answer.set_cookie(site.cookie, token, httponly=True, samesite="lax", secure=site.is_secure, path="/")
    return answer
