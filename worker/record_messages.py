"""What a person does about one message, by its number: take it once more, or withdraw what it said.

::

    refused, kept ─ apply ────▶ the way it came, applied or refused again; its row tells what came of it
    applied ─────── withdraw ─▶ a message of ours (sender "operator", the login, the words), its facts under status W

Nothing is deleted, no patient is named. Not here: the command line (record_cli.py), rows (store/).
"""

from __future__ import annotations

import getpass
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import typer
from rich.console import Console

from worker.errors import RecordError, Reject
from worker.record_feeds import clock
from worker.record_tables import plain
from worker.store import feeds, records
from worker.store.database import Store

THERE: Final = "The file is there already: name a new one."


def numbers_of(words: Sequence[str]) -> list[int] | None:
    """The messages that are meant; None for all."""
    if [*words] == ["all"]:
        return None
    if not all(word.isascii() and word.isdigit() and len(word) < 18 for word in words):
        raise typer.BadParameter("--apply takes the number of a message, several times if need be, or `all` alone.")
    return [*dict.fromkeys(map(int, words))]


def keep(out: Console, store: Store, number: int, to: Path) -> bool:
    """Write the bytes of a message to a new file; False where none are kept.

    Raises
    ------
    Reject
        The file is there already.
    """
    with store.read() as conn:
        raw = feeds.raw(conn, number)
    if raw is None:
        return False
    with os.fdopen(new_file(to), "wb") as file:
        file.write(raw)
    out.print(f"{len(raw)} bytes: {plain(str(to))}. They are patient data.", soft_wrap=True)
    return True


def apply(out: Console, store: Store, numbers: Sequence[int] | None, again: Callable[[int], str]) -> bool:
    """Take refused messages once more, each by `again`, and say what came of each; whether none was refused.

    Parameters
    ----------
    numbers
        None: every one that is kept and was not taken since, the first that came first.
    """
    if numbers is None:
        with store.read() as conn:
            numbers = feeds.to_apply(conn)
        if not numbers:
            out.print("No refused message is kept that was not taken since.")
    refused = 0
    for number in numbers:
        try:
            said = again(number)
        except RecordError as exc:
            refused += 1
            said = f"[red]Not applied.[/red] {plain(str(exc))}"
        else:
            said = plain(said)
        out.print(f"No. {number}: {said}", soft_wrap=True)
    if len(numbers) > 1:
        out.print(f"{len(numbers) - refused} of {len(numbers)} were taken.")
    return not refused


def withdraw(out: Console, store: Store, number: int, because: str, *, is_sure: bool) -> None:
    """Withdraw the facts of one message that stand, after asking.

    Raises
    ------
    Reject
        None of them stands, or there is no such message.
    """
    with store.read() as conn:
        result, found = feeds.result_of(conn, number), records.standing_of(conn, number)
    if result is None:
        raise Reject(f"There is no message of number {number}.")
    if not found:
        raise Reject(f"Nothing of message {number} stands: it told nothing new, or all of it was superseded or withdrawn.")
    persons = len({fact.patient_pk for fact in found})
    out.print(f"{len(found)} facts that message {number} said of {persons} patient{'s' * (persons > 1)} will not be used any more.")
    out.print("Only a correction by the sender stands again; the withdrawal itself cannot be undone.")
    if not is_sure:
        typer.confirm("Withdraw them?", abort=True)
    now = clock()
    with store.begin() as conn:
        own = feeds.note_message(
            conn,
            sender=feeds.OPERATOR,
            control_id=_login(),
            sent_at=now.isoformat(),
            trigger="withdraw",
            result="applied",
            reason=because,
            digest=str(number),
            now=now,
        )
        count = 0 if own is None else records.withdraw(conn, lambda: records.standing_of(conn, number), now=now, message_id=own)
        if not count:
            raise Reject("Somebody else withdrew or erased them meanwhile.")
    out.print(f"{count} facts are withdrawn, by No. {own}. Studies of the patient are looked at again.")


def _login() -> str:
    """Who does it: the login, of who called sudo too."""
    try:
        return os.environ.get("SUDO_USER") or getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return f"uid {os.getuid()}"


def new_file(path: Path) -> int:
    """A new file that only its owner may read; what was there is not written over, wherever a link may lead."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as exc:
        raise Reject(THERE) from exc
