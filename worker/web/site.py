"""What every page needs: the installation, who asks, and whether they may. Dependencies of FastAPI.

A visitor is a cookie with a token; its sha256 is a row (store/accounts.py). What changes something is a POST with the session's own
CSRF token, from our own origin. Not here: how one logs in (login.py).
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import parse_qsl

from fastapi import Depends, HTTPException, Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from worker import __version__
from worker.config import Web
from worker.domain import Account
from worker.ops import audit
from worker.store import accounts, worklist
from worker.store.database import Connection, Store
from worker.web import words

HERE: Final = Path(__file__).parent
#: Of a form; nothing we ask for is longer.
MAX_FORM_BYTES: Final = 16 * 1024
COUNTS_S: Final = 5.0
MAX_FIELDS: Final = 20
#: What each role may. An administrator is no radiologist: who says that a finding is wrong must be one.
RIGHTS: Final[Mapping[str, frozenset[str]]] = {
    "see": frozenset({"viewer", "operator", "radiologist", "admin"}),
    "act": frozenset({"operator", "admin"}),
    "review": frozenset({"radiologist"}),
}


class LoginNeeded(Exception):
    """Nobody is logged in."""


class Counts:
    """How many studies are in each state, `COUNTS_S` old at most: the many lists of many browsers share one look."""

    def __init__(self) -> None:
        self._found, self._until = dict[str, int](), 0.0

    def of(self, conn: Connection) -> dict[str, int]:
        """The counts; two at once may both look."""
        if time.monotonic() >= self._until:
            self._found, self._until = worklist.counts(conn), time.monotonic() + COUNTS_S
        return self._found

    def forget(self) -> None:
        """Somebody changed something here, and is to see it at once."""
        self._until = 0.0


@dataclass(frozen=True, slots=True)
class Site:
    """The installation, as the pages know it."""

    store: Store
    web: Web
    zone: tzinfo
    templates: Environment
    now: Callable[[], datetime]
    counts: Counts = field(default_factory=Counts)

    def page(self, request: Request, name: str, *, status: int = 200, **facts: Any) -> HTMLResponse:
        """A template filled in."""
        found = {"visitor": getattr(request.state, "visitor", None), "version": __version__, "path": request.url.path, **facts}
        return HTMLResponse(self.templates.get_template(name).render(found), status_code=status)

    @property
    def is_secure(self) -> bool:
        """Whether browsers come by TLS."""
        return self.web.url.startswith("https:")

    @property
    def cookie(self) -> str:
        """The session cookie's name; by TLS one that no other host or path can set (RFC 6265bis §4.1.3.2)."""
        return "__Host-synoptic" if self.is_secure else "synoptic"


def environment(zone: tzinfo) -> Environment:
    """The templates, which escape whatever they are given."""
    made = Environment(
        loader=FileSystemLoader(HERE / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.filters |= {
        "at": lambda when, style="minutes": words.at(when, zone, style),
        "person": words.person,
        "day": words.day,
        "percent": words.percent,
        "age": words.age,
    }
    made.globals |= {"words": words, "zone": str(zone)}
    return made


@dataclass(frozen=True, slots=True)
class Visitor:
    """Who is logged in, and from where."""

    account: Account
    token: str
    address: str

    @property
    def csrf(self) -> str:
        """What this session's forms must bring."""
        return self.sealed("csrf")

    def sealed(self, text: str) -> str:
        """What nobody without this session can say of a text."""
        return hmac.new(self.token.encode(), text.encode(), hashlib.sha256).hexdigest()

    @property
    def party(self) -> audit.Party:
        """The same person in the audit trail."""
        return audit.Party(self.account.name, self.address, is_ae=False)

    def may(self, right: str) -> bool:
        """Whether one of the roles has the right."""
        return bool(self.account.roles & RIGHTS[right])


def site_of(request: Request) -> Site:
    """The one installation."""
    site: Site = request.app.state.site
    return site


def address_of(request: Request) -> str:
    """Where the browser is."""
    return request.client.host if request.client else ""


def _visitor(request: Request, site: Site, *, is_use: bool) -> Visitor:
    token = request.cookies.get(site.cookie, "")
    if not token:
        raise LoginNeeded
    now = site.now()
    with site.store.read() as conn:
        found = accounts.of_session(conn, token, now=now, idle=timedelta(minutes=site.web.idle_min))
    if found is None:
        raise LoginNeeded
    account, is_due = found
    if is_use and is_due:
        with site.store.begin() as conn:
            accounts.touch(conn, token, now=now)
    request.state.visitor = visitor = Visitor(account, token, address_of(request))
    return visitor


def visitor(request: Request, site: Annotated[Site, Depends(site_of)]) -> Visitor:
    """Whoever is logged in; LoginNeeded where nobody is."""
    return _visitor(request, site, is_use=True)


def watcher(request: Request, site: Annotated[Site, Depends(site_of)]) -> Visitor:
    """The same for what the browser asks by itself: a page left open must not keep its session alive."""
    return _visitor(request, site, is_use=False)


async def form(request: Request) -> dict[str, str]:
    """The fields of a form, bounded."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_FORM_BYTES:
            raise HTTPException(413, "The form is too long.")
    try:
        found = dict(parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=MAX_FIELDS))
    except ValueError:
        raise HTTPException(400, "The form has too many fields.") from None
    if any("\0" in value for value in found.values()):  # PostgreSQL has no text with one
        raise HTTPException(400, "The form holds a character that no keyboard has.")
    return found


Fields = Annotated[dict[str, str], Depends(form)]
ASite = Annotated[Site, Depends(site_of)]
AVisitor = Annotated[Visitor, Depends(visitor)]
AWatcher = Annotated[Visitor, Depends(watcher)]


def may(right: str) -> Callable[..., Visitor]:
    """A dependency: who sends this form may do so, and meant it."""

    def check(fields: Fields, who: AVisitor) -> Visitor:
        if not hmac.compare_digest(fields.get("csrf", "").encode(), who.csrf.encode()):
            raise HTTPException(403, "This form is of another session. Load the page again, and say it once more.")
        if not who.may(right):
            roles = " or ".join(sorted(RIGHTS[right]))
            audit.guarded(
                audit.RESTRICTED, who.party, name=who.account.name, reason=f"refused, for it needs the role {roles}", outcome=audit.AGAIN
            )
            raise HTTPException(403, f"This needs the role {roles}.")
        return who

    return check
