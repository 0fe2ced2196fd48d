"""Who may use the page: accounts, their passwords, and the browsers that are logged in.

::

    a try ──counted first──▶ locked? ──▶ scrypt ──right──▶ failures 0, a session

A try is counted before its password is looked at, so that many at once gain nothing; what is locked or unknown costs the same time.
Not here: cookies and pages (worker/web/), which roles may do what (worker/web/login.py).
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from worker.domain import ROLES, Account
from worker.errors import Reject
from worker.store.schema import AnyRow, account, session

#: NIST SP 800-63B-4 §3.1.1.2: length, no rules of composition.
SHORTEST: Final = 12
LONGEST: Final = 256
#: OWASP Password Storage Cheat Sheet: N = 2^15, r = 8, p = 3; 32 MiB and about 0.2 s a try.
COST: Final = (2**15, 8, 3)
_MEMORY: Final = 128 * 2**20
#: After so many wrong ones, from wherever, an account waits, twice as long with each more, up to the cap (NIST, §3.2.2: 100 at most).
TRIES: Final = 50
LOCK_S: Final = 30.0
LOCK_CAP_S: Final = 900.0
#: How often it is noted that a session is in use.
_SEEN_S: Final = 60.0
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._@+-]{0,63}")


class AccountRefused(Reject):
    """A name, role or password that cannot be."""


def hashed(password: str, *, cost: tuple[int, int, int] | None = None) -> str:
    """The password as it is stored: ``scrypt$n$r$p$salt$key``.

    Raises
    ------
    AccountRefused
        It is too short or too long.
    """
    if not SHORTEST <= len(password) <= LONGEST:
        raise AccountRefused(f"A password has {SHORTEST} to {LONGEST} characters; this one has {len(password)}.")
    n, r, p = cost or COST
    salt = secrets.token_bytes(16)
    return f"scrypt${n}${r}${p}${salt.hex()}${_key(password, salt, n, r, p).hex()}"


def is_right(password: str, stored: str) -> bool:
    """Whether it is the stored one; of none at all ('') it takes as long to say no."""
    n, r, p = COST
    salt, key = bytes(16), b""
    if stored:
        _, *numbers, salt_hex, key_hex = stored.split("$")
        (n, r, p), salt, key = map(int, numbers), bytes.fromhex(salt_hex), bytes.fromhex(key_hex)
    return hmac.compare_digest(_key(password[:LONGEST], salt, n, r, p), key)


def _key(password: str, salt: bytes, n: int, r: int, p: int) -> bytes:
    return hashlib.scrypt(password.encode(), salt=salt, n=n, r=r, p=p, maxmem=_MEMORY, dklen=32)


# --- accounts


def add(conn: Connection, name: str, *, password: str = "", subject: str = "", roles: Iterable[str], now: datetime) -> Account:
    """Make an account; `password` is what `hashed` gave.

    Raises
    ------
    AccountRefused
        The name is taken or is none, or a role is unknown.
    """
    name = plain(name)
    if not _NAME.fullmatch(name):
        raise AccountRefused("A name has 1 to 64 small letters, digits and . _ @ + -, and begins with a letter or digit.")
    if by_name(conn, name) is not None:
        raise AccountRefused("There is an account of this name already: `synoptic user role` or `synoptic user password` changes it.")
    given = {"name": name, "password": password, "subject": subject, "roles": _joined(roles), "created_at": now}
    row = conn.execute(sa.insert(account).values(given).returning(account)).one()
    return _account(row)


def plain(name: str) -> str:
    """The name as it is compared."""
    return name.strip().lower()


def by_name(conn: Connection, name: str) -> AnyRow | None:
    """The account's row."""
    return conn.execute(sa.select(account).where(account.c.name == plain(name))).first()


def all_of(conn: Connection) -> list[AnyRow]:
    """Every account, by name."""
    return list(conn.execute(sa.select(account).order_by(account.c.name)))


def change(conn: Connection, account_id: int, *, password: str | None = None, roles: Iterable[str] | None = None) -> None:
    """Another password or other roles; whoever is logged in by the old password is so no more (AccountRefused)."""
    values: dict[str, object] = {} if roles is None else {"roles": _joined(roles)}
    if password is not None:
        if conn.execute(sa.select(account.c.subject).where(account.c.id == account_id)).scalar():
            raise AccountRefused("This account logs in elsewhere; a password would open it when that server does so no more.")
        values |= {"password": password, "failures": 0, "locked_until": None}
        conn.execute(sa.delete(session).where(session.c.account_id == account_id))
    conn.execute(sa.update(account).where(account.c.id == account_id).values(**values))


def remove(conn: Connection, account_id: int) -> None:
    """Take the account away; what its owner said of findings stays, under the name."""
    conn.execute(sa.delete(session).where(session.c.account_id == account_id))
    conn.execute(sa.delete(account).where(account.c.id == account_id))


def external(conn: Connection, name: str, *, subject: str, roles: Iterable[str], now: datetime) -> Account:
    """The account of somebody who logged in elsewhere, made at the first time; the roles are what is said there now (AccountRefused)."""
    row = conn.execute(sa.select(account).where(account.c.subject == subject)).first()
    if row is None:
        return add(conn, name, subject=subject, roles=roles, now=now)
    change(conn, row.id, roles=roles)
    return _account(conn.execute(sa.select(account).where(account.c.id == row.id)).one())


def withdraw(conn: Connection, *, subject: str) -> None:
    """Who logs in elsewhere has no role there any more: wherever they are logged in here, they are so no more."""
    ids = sa.select(account.c.id).where(account.c.subject == subject)
    conn.execute(sa.delete(session).where(session.c.account_id.in_(ids)))


def _joined(roles: Iterable[str]) -> str:
    given = set(roles)
    if not given or given - set(ROLES):
        raise AccountRefused(f"Roles are {', '.join(ROLES)}, at least one.")
    return " ".join(role for role in ROLES if role in given)


def _account(row: AnyRow) -> Account:
    return Account(row.id, row.name, frozenset(row.roles.split()))


# --- tries


def begin_try(conn: Connection, name: str, *, now: datetime) -> AnyRow | None:
    """Count a try to log in by a password; None where there is no such local account, or it is locked."""
    row = by_name(conn, name)
    if row is None or not row.password or (row.locked_until is not None and row.locked_until > now):
        return None
    failures = row.failures + 1
    locked_until = now + pause(failures - TRIES) if failures >= TRIES else None
    conn.execute(sa.update(account).where(account.c.id == row.id).values(failures=failures, locked_until=locked_until))
    return row


def pause(more: int) -> timedelta:
    """How long to wait after so many wrong tries more than are free."""
    return timedelta(seconds=min(LOCK_CAP_S, LOCK_S * 2.0 ** min(more, 30)))


def succeed(conn: Connection, row: AnyRow) -> Account:
    """The try was right."""
    conn.execute(sa.update(account).where(account.c.id == row.id).values(failures=0, locked_until=None))
    return _account(row)


# --- sessions


def open_session(conn: Connection, account_id: int, *, now: datetime, hours: float) -> str:
    """Log a browser in; returns the token for its cookie, which is kept nowhere else. Sessions that ended are swept."""
    conn.execute(sa.delete(session).where(session.c.expires_at <= now))
    token = secrets.token_urlsafe(32)
    values = {"token_sha256": _digest(token), "account_id": account_id, "seen_at": now, "expires_at": now + timedelta(hours=hours)}
    conn.execute(sa.insert(session).values(values))
    return token


def of_session(conn: Connection, token: str, *, now: datetime, idle: timedelta) -> tuple[Account, bool] | None:
    """Whose session it is, and whether its use is to be noted (`touch`); None: none, ended, or unused for longer than `idle`."""
    wanted = sa.select(account, session.c.seen_at).join(session).where(session.c.token_sha256 == _digest(token))
    row = conn.execute(wanted.where(session.c.expires_at > now, session.c.seen_at > now - idle)).first()
    return None if row is None else (_account(row), now - row.seen_at >= timedelta(seconds=_SEEN_S))


def touch(conn: Connection, token: str, *, now: datetime) -> None:
    """The session is in use."""
    conn.execute(sa.update(session).where(session.c.token_sha256 == _digest(token)).values(seen_at=now))


def close_session(conn: Connection, token: str) -> None:
    """Log the browser out."""
    conn.execute(sa.delete(session).where(session.c.token_sha256 == _digest(token)))


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
