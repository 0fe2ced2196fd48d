"""A FHIR server as a feed: asked for one patient just before a study of theirs is analysed.

::

    gather ─▶ Puller(key) ─ asked lately? ─▶ intake/fhir_client.py ─▶ one transaction: a message row, its facts

Not here: HTTP, tokens, paging (intake/fhir_*.py), what a study does while the server is away (pipeline.py).
"""

from __future__ import annotations

from datetime import datetime, timedelta

from worker import events, record_feeds
from worker.config import Config, ConfigError
from worker.domain import PatientKey
from worker.intake.fhir_client import Client
from worker.store import feeds, records
from worker.store.database import Store

#: Patients of whom it is remembered when they were asked for.
_REMEMBERED = 10_000


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
        self._issuer = told.issuers.get(settings.issuer_system, config.site.issuer)
        self._asked: dict[PatientKey, datetime] = {}
        try:
            self._client = Client(
                settings.url,
                zone=config.zone,
                issuers=told.issuers,
                schemes=told.schemes,
                token_url=settings.token_url,
                client_id=settings.client_id,
                client_secret=settings.client_secret,
                key_file=settings.key_file,
                key_id=settings.key_id,
                scope=settings.scope,
                ca=settings.ca,
                timeout_s=settings.timeout_s,
                refused=_refused,
            )
        except ValueError as exc:
            raise ConfigError(f"[fhir]: {exc}") from exc

    def __call__(self, key: PatientKey) -> None:
        """Ask, unless that was done lately, and commit what is said.

        Raises
        ------
        PeerUnavailable, PeerRefused, RecordError
            As `Client.pull`.
        """
        now = record_feeds.clock()
        fresh = timedelta(seconds=self._config.fhir.fresh_s)
        if key.issuer != self._issuer or now - self._asked.get(key, datetime.min.replace(tzinfo=now.tzinfo)) < fresh:
            return
        updates = self._client.pull(key, issuer_system=self._config.fhir.issuer_system)
        if updates:
            with self._store.begin() as conn:
                number = feeds.note_message(
                    conn, sender="FHIR", control_id="", sent_at=now.isoformat(), trigger="pull", result="applied", now=now
                )
                for update in updates:
                    records.apply(conn, record_feeds.localized(self._config, update), now=now, message_id=number)
        self._client.committed(key)
        if len(self._asked) >= _REMEMBERED:
            self._asked.clear()
        self._asked[key] = now


def _refused(sentence: str) -> None:
    events.emit("message.refused", sender="FHIR", trigger="pull", result="left out", reason=sentence)
