"""A configured installation without a daemon, for the verbs of the patient's record."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from tests.installation import BUNDLES
from worker.cli import app
from worker.domain import RecordUpdate
from worker.errors import WorkerError
from worker.store import feeds, records
from worker.store.database import Store


@dataclass
class Site:
    """A configured installation without a daemon."""

    folder: Path
    store: Store

    def run(self, *words: str, answer: str = "", columns: str = "120") -> tuple[int, str]:
        """One command; its exit code as `main` would give it, and all it said."""
        done = CliRunner().invoke(app, [*words, "--config", str(self.folder / "synoptic.toml")], input=answer, env={"COLUMNS": columns})
        if isinstance(done.exception, WorkerError):
            return 1, done.output + str(done.exception)
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done.exit_code, done.output

    def say(self, update: RecordUpdate, *, control_id: str, at: datetime) -> None:
        with self.store.begin() as conn:
            sent = str(at - timedelta(seconds=90))
            words: dict[str, Any] = {"sender": "LAB|SITE", "control_id": control_id, "sent_at": sent, "trigger": "ORU^R01"}
            number = feeds.note_message(conn, **words, result="applied", now=at)
            records.apply(conn, update, now=at, message_id=number)


@contextmanager
def installed(folder: Path, *, zone: str = "+01:00") -> Iterator[Site]:
    """A migrated database and a configuration that knows one issuer, SITE."""
    (folder / "synoptic.toml").write_text(
        f'[site]\ndata = "data"\nissuer = "SITE"\ntimezone = "{zone}"\n[records]\nsilent_after_s = 3600\n'
        f'[receive]\nlow_water_mb = 1\n[run]\nbundles = ["{BUNDLES / "cxr-severity"}"]\n',
        "utf-8",
    )
    made = Store(f"sqlite:///{folder / 'data' / 'synoptic.db'}")
    made.migrate()
    yield Site(folder, made)
    made.close()


def line_with(said: str, word: str) -> str:
    """The one line of what was said that holds a word, its columns a blank apart."""
    (line,) = (line for line in said.splitlines() if word in line)
    return " ".join(line.split())
