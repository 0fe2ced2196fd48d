"""A FHIR server as a feed: asked for one patient just before a study of theirs is analysed.

::

    gather ─▶ Puller(key) ─ asked lately? ─▶ intake/fhir_client.py ─▶ one transaction: a message row, its facts
                          └ failed lately? ─▶ PeerUnavailable at once: a server that is away must not hold up every study in turn

The server is asked with the patient ID as this site compares it (`[records.patient_ids]`), which is all that is stored: where that
rewrites IDs, the server must keep them so too, else it does not find the patient, and the log says so.
What it has deleted is withdrawn, after a pull of everything and by its own word (410) for each resource.
Not here: HTTP, tokens, paging (intake/fhir_*.py), what a study does while the server is away (pipeline.py).
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final

from worker import events, record_feeds
from worker.config import Config, ConfigError
from worker.domain import PatientKey, RecordUpdate
from worker.errors import PeerRefused, PeerUnavailable, RecordError, Retry
from worker.intake.fhir import resource_of
from worker.intake.fhir_client import Client
from worker.store import feeds, records
from worker.store.database import Connection, Store
from worker.store.schema import AnyRow

#: Patients of whom it is remembered when they were asked for.
_REMEMBERED: Final = 10_000
#: How long a server that failed is left alone, whoever the patient is.
REST: Final = timedelta(seconds=30)
#: A whole pull may take this many times `[fhir] timeout_s`: a study waits in its batch while another's record is pulled.
PATIENCE: Final = 3


class Puller:
    """Bring a patient's record from the configured FHIR server; of other issuers' patients it knows nothing and asks nothing.

    Raises
    ------
    ConfigError
        `[fhir]` cannot be right.
    """

    def __init__(self, config: Config, store: Store) -> None:
        settings, told = config.fhir, config.records
        self._config, self._store = config, store
        # One mapping for whom we ask and for whom the answer speaks of: a linked patient would else be another issuer's.
        issuers = {settings.issuer_system: config.site.issuer, **told.issuers}
        self._issuer = issuers[settings.issuer_system]
        self._asked: dict[PatientKey, datetime] = {}
        self._rests_until: datetime | None = None
        self._trouble = ""
        try:
            self._client = Client(
                settings.url,
                zone=config.zone,
                issuers=issuers,
                schemes=told.schemes,
                token_url=settings.token_url,
                client_id=settings.client_id,
                client_secret=settings.client_secret,
                key_file=settings.key_file,
                key_id=settings.key_id,
                scope=settings.scope,
                ca=settings.ca,
                timeout_s=settings.timeout_s,
                deadline_s=PATIENCE * settings.timeout_s,
                whole_every_s=settings.full_every_h * 3600,
                refused=_refused,
            )
        except ValueError as exc:
            raise ConfigError(f"[fhir]: {exc}") from exc

    def __call__(self, key: PatientKey) -> None:
        """Ask, unless that was done lately, and commit what is said.

        Raises
        ------
        PeerUnavailable, PeerRefused
            As `Client.pull`; PeerUnavailable too while the server is left alone after it failed.
        PatientAmbiguous
            Several patients have this identifier.
        RecordError
            The answer cannot be understood.
        """
        now = record_feeds.clock()
        fresh = timedelta(seconds=self._config.fhir.fresh_s)
        asked = self._asked.get(key)
        if key.issuer != self._issuer or (asked is not None and now - asked < fresh):
            return
        if self._rests_until is not None and now < self._rests_until:
            raise PeerUnavailable(self._trouble)
        try:
            updates = self._client.pull(key, issuer_system=self._config.fhir.issuer_system)
        except (Retry, PeerRefused) as exc:
            # From its end: the time-out itself may be longer than the rest.
            self._rests_until, self._trouble = record_feeds.clock() + REST, str(exc)
            _refused(str(exc), result="failed")
            raise
        except RecordError as exc:
            _refused(str(exc), result="refused")
            raise
        self._rests_until = None
        is_whole = True
        if updates:
            is_whole = self._commit(key, updates, now=now)
        else:
            _refused("The FHIR server knows no patient with this identifier.", result="not found")
        if is_whole:  # else all is asked for again, for what was refused may be right by then
            self._client.committed(key)
        if len(self._asked) >= _REMEMBERED:
            self._asked.clear()
        self._asked[key] = now

    def _commit(self, key: PatientKey, updates: list[RecordUpdate], *, now: datetime) -> bool:
        """Whether all of it was taken."""
        is_whole = True
        with self._store.begin() as conn:
            number = feeds.note_message(
                conn, sender=self._client.source, control_id="", sent_at=now.isoformat(), trigger="pull", result="applied", now=now
            )
            for one in updates:
                update = record_feeds.localized(self._config, one)
                try:
                    held = record_feeds.check_person(self._config, conn, update, now=now, message_id=number)
                except RecordError as exc:
                    is_whole = False
                    _refused(str(exc), result="refused")
                    continue
                records.apply(conn, update, now=now, message_id=number, held=held)
        self._withdraw_deleted(key)
        return is_whole

    def _withdraw_deleted(self, key: PatientKey) -> None:
        """Withdraw what the server says that it has deleted; if it does not answer, the next whole pull asks again."""
        source = self._client.source

        def named(conn: Connection) -> dict[str, list[AnyRow]]:
            found: dict[str, list[AnyRow]] = {}
            for fact in records.standing_from(conn, key, source):
                found.setdefault(resource_of(fact.key, source), []).append(fact)
            return found

        with self._store.read() as conn:
            held = named(conn)
        try:
            gone = self._client.gone(held)
        except (Retry, PeerRefused) as exc:
            _refused(str(exc), result="failed")
            return
        if not gone:
            return
        now = record_feeds.clock()
        why = "The FHIR server has deleted them."

        def deleted(conn: Connection) -> list[AnyRow]:
            return [one for name, several in named(conn).items() if name in gone for one in several]

        with self._store.begin() as conn:
            number = feeds.note_message(
                conn, sender=source, control_id="", sent_at=now.isoformat(), trigger="deleted", result="applied", reason=why, now=now
            )
            if number is not None:
                records.withdraw(conn, lambda: deleted(conn), now=now, message_id=number)


def _refused(sentence: str, *, result: str = "left out") -> None:
    events.emit("message.refused", sender="FHIR", trigger="pull", result=result, reason=sentence)
