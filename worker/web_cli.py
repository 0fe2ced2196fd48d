"""The verbs of the page: `serve` starts it, `user` says who may use it. Nothing here is logged; changes are in the audit trail."""

from __future__ import annotations

import getpass
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from worker import host
from worker.config import Config
from worker.console import ConfigFile, installation, out
from worker.domain import ROLES
from worker.ops import audit
from worker.record_feeds import clock
from worker.roles import record_audit
from worker.store import accounts
from worker.store.schema import AnyRow

Roles = Annotated[
    list[str],
    typer.Option("--role", help=f"One of {', '.join(ROLES)}; may be repeated. operator: retry, cancel; radiologist: agree, correct."),
]


def register(app: typer.Typer, serve_role: Callable[[Path | None, tuple[str, ...]], None]) -> None:
    """Add these verbs to the command line; `serve_role` runs roles."""

    @app.command()
    def serve(given: ConfigFile = None) -> None:
        """The page for people, and /metrics, /live and /ready for monitoring. [web] says where; `all` brings it where it is enabled."""
        serve_role(given, ("serve",))

    users = typer.Typer(help="Who may use the page: add, list, change, remove.", no_args_is_help=True)
    app.add_typer(users, name="user")

    @users.command()
    def add(name: str, role: Roles, given: ConfigFile = None) -> None:
        """Make an account. The password is asked for, or read from standard input; it is no argument, for those are seen by everybody."""
        settings, store = installation(given)
        password = accounts.hashed(_password())
        with store.begin() as conn:
            made = accounts.add(conn, name, password=password, roles=role, now=clock())
        _audit(settings, made.name, f"added as {' '.join(role)}")
        out.print(f"{made.name} may log in as {' '.join(sorted(made.roles))}.")

    @users.command(name="list")
    def list_(given: ConfigFile = None) -> None:
        """Every account."""
        _, store = installation(given)
        table = Table("name", "roles", "password", "wrong tries", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        with store.read() as conn:
            for row in accounts.all_of(conn):
                table.add_row(row.name, row.roles, "here" if row.password else "elsewhere", str(row.failures))
        out.print(table)

    @users.command()
    def password(name: str, given: ConfigFile = None) -> None:
        """Another password, asked for or read from standard input; who is logged in by the old one is so no more, and a lock ends."""
        settings, store = installation(given)
        found = accounts.hashed(_password())
        with store.begin() as conn:
            accounts.change(conn, _row(accounts.by_name(conn, name)).id, password=found)
        _audit(settings, name, "password changed")
        out.print("The password is another now.")

    @users.command()
    def role(name: str, role: Roles, given: ConfigFile = None) -> None:
        """Other roles, from the next click on."""
        settings, store = installation(given)
        with store.begin() as conn:
            accounts.change(conn, _row(accounts.by_name(conn, name)).id, roles=role)
        _audit(settings, name, f"is {' '.join(role)} now")
        out.print("The roles are others now.")

    @users.command()
    def remove(name: str, given: ConfigFile = None) -> None:
        """Take an account away, at once; what its owner said of findings stays."""
        settings, store = installation(given)
        with store.begin() as conn:
            accounts.remove(conn, _row(accounts.by_name(conn, name)).id)
        _audit(settings, name, "removed")
        out.print("The account is gone.")


def _row(row: AnyRow | None) -> AnyRow:
    if row is None:
        raise accounts.AccountRefused("There is no account of this name: `synoptic user list`.")
    return row


def _password() -> str:
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\n")
    first = getpass.getpass("Password: ")
    if getpass.getpass("Once more: ") != first:
        raise accounts.AccountRefused("The two are not the same.")
    return first


def _audit(settings: Config, name: str, reason: str) -> None:
    record_audit(settings)
    audit.guarded(audit.ATTRIBUTES, audit.Party(host.caller(), is_ae=False), name=accounts.plain(name), reason=reason)
    audit.end()
