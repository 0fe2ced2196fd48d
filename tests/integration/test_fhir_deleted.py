"""What a FHIR server deletes is withdrawn by its own word for it, and nothing by what it does not say."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.conftest import Captured
from tests.fhir_records import KEY, LONG_AGO, SYSTEM, crp, fill
from tests.fhir_server import FhirServer, Reply
from worker import record_view
from worker.config import Config, Site
from worker.config import FhirServer as Settings
from worker.fhir_feed import Puller
from worker.store import records
from worker.store.database import Store
from worker.store.schema import observation

AS_OF = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(f"sqlite:///{tmp_path / 's.db'}")
    made.migrate()
    yield made
    made.close()


def puller(server: FhirServer, store: Store, *, full_every_h: float = 0.0) -> Puller:
    asked = Settings(url=server.base, issuer_system=SYSTEM, fresh_s=0.0, full_every_h=full_every_h)
    return Puller(Config(site=Site(issuer="HOSP"), fhir=asked), store)


def values(store: Store, known_at: datetime | None = None) -> list[float | None]:
    with store.read() as conn:
        found = records.view(conn, KEY, as_of=AS_OF, known_at=known_at)
    assert found is not None
    return sorted((one.value for one in found.observations if one.status == "F"), key=lambda value: value or 0.0)


@pytest.mark.requirement("F6")
def test_what_the_server_has_deleted_is_withdrawn_and_was_known_before(server: FhirServer, store: Store) -> None:
    fill(server, 4)
    pull = puller(server, store)
    pull(KEY)
    then = datetime.now(UTC)
    server.delete("Observation", "o1")
    pull(KEY)
    assert (values(store), values(store, then)) == ([0.0, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0])
    server.asked.clear()
    pull(KEY)
    assert server.lines("GET /fhir/Observation/") == []  # withdrawn once
    with store.read() as conn:
        facts = record_view.gather_patient(conn, KEY, as_of=AS_OF, known_at=None, is_full=False)
        assert conn.execute(sa.select(sa.func.count()).select_from(observation)).scalar_one() == 5
    assert facts is not None
    assert [one["because"] for one in facts["unusable"]] == ["withdrawn by FHIR 127.0.0.1: The FHIR server has deleted them."]


@pytest.mark.requirement("F6")
def test_what_is_only_missing_hidden_or_not_understood_stays(server: FhirServer, store: Store, captured: Captured) -> None:
    """An empty page by mistake must not wipe a record."""
    fill(server, 4)
    pull = puller(server, store)
    pull(KEY)
    empty = {"resourceType": "Bundle", "type": "searchset", "entry": []}
    server.script("GET /fhir/Observation", Reply(200, empty))
    pull(KEY)
    del server.resources["Observation", "o1"]  # 404: it keeps no deletions
    server.put(crp("o2", valueQuantity={"value": "ZZ"}), at=LONG_AGO)
    pull(KEY)
    assert values(store) == [0.0, 1.0, 2.0, 3.0]
    server.delete("Observation", "o3")
    server.script("GET /fhir/Observation/o1", *[Reply(503)] * 4)
    pull(KEY)
    assert values(store) == [0.0, 1.0, 2.0, 3.0]
    assert captured.named("message.refused")[-1]["result"] == "failed"
    pull(KEY)
    assert values(store) == [0.0, 1.0, 2.0]
    server.delete("Patient", "p1")
    for number in range(3):
        server.resources.pop(("Observation", f"o{number}"), None)
        server.deleted.add(("Observation", f"o{number}"))
    pull(KEY)
    assert values(store) == [0.0, 1.0, 2.0]  # the patient is not found


@pytest.mark.requirement("F6")
def test_between_two_whole_pulls_nobody_asks_what_was_deleted(server: FhirServer, store: Store) -> None:
    fill(server, 2)
    pull = puller(server, store, full_every_h=1.0)
    pull(KEY)
    server.delete("Observation", "o1")
    pull(KEY)
    assert values(store) == [0.0, 1.0]
    puller(server, store)(KEY)  # another process knows nothing and asks for all
    assert values(store) == [0.0]
