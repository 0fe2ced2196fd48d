"""What the record forgets: facts past their time, and all of one patient; nothing of anybody else, nothing a job still needs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from worker.domain import Code, Document, Finding, Header, Job, Merge, Observation, Order, Patient, PatientKey, RecordUpdate
from worker.intake import assembly
from worker.store import documents, erasure, feeds, queue, records, reviews, schema, studies
from worker.store.database import Store

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
DAY = timedelta(days=1)
WANTS = [assembly.Wants("bundle", frozenset({"CT"}), min_instances=1)]

ADA = Patient(PatientKey("SITE", "PLANTED-77"), "Plantedname^Ada", "19991231", "F")
EVA = Patient(PatientKey("SITE", "OTHER-78"), "Anothername^Eva", "19880102", "F")
PLANTED = ("PLANTED-77", "Plantedname", "19991231")
KEEP = {"keep_raw_days": 0, "keep_values_days": 0, "keep_texts_days": 0}


def fact(value: float | None, *, key: str, text: str = "", status: str = "F") -> Observation:
    crp = Code("1988-5", "LN", "CRP")
    return Observation(crp, NOW - 100 * DAY, value, text=text, key=key, kind="text" if value is None else "number", status=status)


def receive(store: Store, patient: Patient, *facts: Observation, days: float = 0, **more: object) -> None:
    update = RecordUpdate(patient, facts, "LAB", **more)  # type: ignore[arg-type]  # orders and merges
    with store.begin() as conn:
        records.apply(conn, update, now=NOW - days * DAY)


def note(store: Store, raw: bytes | None, *, control_id: str, result: str = "ignored", days: float = 0) -> None:
    with store.begin() as conn:
        feeds.note_message(
            conn, sender="HIS", control_id=control_id, sent_at="", trigger="ADT^A01", result=result, raw=raw, now=NOW - days * DAY
        )


def study(store: Store, patient: Patient, uid: str) -> Job:
    """A complete study of one image; returns its job, leased."""
    header = Header("1.2", f"{uid}.1", "1.2", uid, f"{uid}.9", patient, accession_number=f"ACC-{patient.key.patient_id}", modality="CT")
    with store.begin() as conn:
        studies.add_instance(
            conn,
            header,
            path=Path(f"/spool/{uid}"),
            sha256="a",
            size_bytes=9,
            calling_ae="CT",
            address="",
            study_at=NOW,
            quiet_s=0,
            now=NOW,
        )
    assembly.sweep(store, wants=WANTS, limit_s=100, now=NOW)
    with store.begin() as conn:
        (job,) = queue.lease(conn, "infer", owner="me", limit=1, lease_s=30, now=NOW)
    return job


def report(store: Store, job: Job, uid: str, patient: Patient) -> None:
    """A report with one finding, and its delivery, done."""
    one = Finding("f", Code("1", "99X", "F"), 0.9, 0.5, "positive")
    data = f"{patient.name} {patient.key.patient_id} {patient.birth_date}".encode()
    with store.begin() as conn:
        number = documents.add(conn, job, report=Document(uid, "1.2.3", "sr", data), findings=[one], input_sha256="", failure="", now=NOW)
        finding_id = conn.execute(sa.select(schema.finding.c.id).where(schema.finding.c.document_id == number)).scalar_one()
        reviews.add(conn, finding_id, study_id=job.study_id, author="r", verdict="negative", note=f"{patient.name}: old", now=NOW)
        queue.complete(conn, job, now=NOW)
        queue.enqueue_deliver(
            conn, job.study_id, document_id=number, bundle="bundle", input_version=1, destination="PACS", priority=1, now=NOW
        )
        (delivery,) = queue.lease(conn, "deliver", owner="me", limit=1, lease_s=30, now=NOW)
        queue.complete(conn, delivery, now=NOW)


def dump(store: Store) -> dict[str, list[str]]:
    """Every row of every table as text, bytes as Latin-1."""
    found = {}
    with store.read() as conn:
        for table in schema.metadata.sorted_tables:
            rows = conn.execute(sa.select(table).order_by(table.c.id)).all()
            found[table.name] = [" ".join(v.decode("latin-1") if isinstance(v, bytes) else str(v) for v in row) for row in rows]
    return found


def expire(store: Store, **keep: int) -> dict[str, int]:
    return erasure.expire(store, now=NOW, **(KEEP | keep))


def erase(store: Store, patient: Patient = ADA) -> erasure.Receipt:
    with store.begin() as conn:
        return erasure.erase(conn, patient.key, now=NOW)


def facts(store: Store, patient: Patient) -> list[str]:
    with store.read() as conn:
        found = records.view(conn, patient.key, as_of=NOW)
    return sorted(f"{one.key} {one.status}" for one in found.observations) if found else []


# --- by the calendar


def test_what_is_past_its_time_goes_and_the_rest_stays(store: Store) -> None:
    for days in (9, 11):
        receive(store, ADA, fact(1.0, key=f"value {days}"), fact(None, key=f"text {days}", text="A note."), days=days)
        note(store, b"MSH|", control_id=f"refused {days}", result="refused", days=days)
        note(store, b"MSH|", control_id=f"ignored {days}", days=days)
    assert expire(store) == {"raw": 0, "values": 0, "texts": 0}
    assert expire(store, keep_texts_days=10) == {"raw": 0, "values": 0, "texts": 1}
    assert facts(store, ADA) == ["text 9 F", "value 11 F", "value 9 F"]
    assert expire(store, keep_raw_days=10, keep_values_days=10, keep_texts_days=10) == {"raw": 2, "values": 1, "texts": 0}
    assert facts(store, ADA) == ["text 9 F", "value 9 F"]
    with store.read() as conn:
        assert feeds.counts(conn) == {"ignored": 2, "refused": 2}
        assert [feeds.raw(conn, number) is None for number in (1, 2, 3, 4)] == [False, False, True, True]
        found = records.view(conn, ADA.key, as_of=NOW)
    assert found is not None
    assert found.patient == ADA, "who the patient is does not expire"


def test_facts_stay_while_a_study_of_the_person_is_received_or_worked_on(store: Store) -> None:
    receive(store, EVA, fact(1.0, key="k"), days=20)
    receive(store, ADA, merges=(Merge(ADA.key, EVA.key),))
    job = study(store, ADA, "2.25.1")
    assert expire(store, keep_values_days=10)["values"] == 0
    with store.begin() as conn:
        queue.complete(conn, job, now=NOW)
        conn.execute(sa.update(schema.study).values(state="receiving"))
    assert expire(store, keep_values_days=10)["values"] == 0
    with store.begin() as conn:
        conn.execute(sa.update(schema.study).values(state="complete"))
    assert expire(store, keep_values_days=10)["values"] == 1


def test_a_correction_outlives_what_it_corrects(store: Store) -> None:
    """A preliminary result that came late must not stand alone because its correction went first; across a merge, too."""
    receive(store, ADA, fact(2.0, key="k", status="C"), fact(0.0, key="panel", status="W"), days=11)
    receive(store, EVA, fact(1.0, key="k"), fact(3.0, key="panel/part"), days=9)
    receive(store, ADA, merges=(Merge(ADA.key, EVA.key),), days=9)
    assert expire(store, keep_values_days=10)["values"] == 0
    assert facts(store, EVA) == ["k C", "panel W"]
    assert expire(store, keep_values_days=8)["values"] == 4


def test_all_that_is_past_its_time_goes_in_one_call_however_small_the_transactions(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many facts are received at one time; what must stay does not keep the rest from its turn."""
    monkeypatch.setattr(erasure, "BATCH", 2)
    monkeypatch.setattr(erasure, "_PAGE", 3)
    for number in range(7):
        who = Patient(PatientKey("SITE", f"P{number}"))
        receive(store, who, *(fact(1.0, key=f"{n}") for n in range(3)), days=20)
        note(store, b"MSH|", control_id=f"{number}", days=20)
    receive(store, Patient(PatientKey("SITE", "P1")), fact(2.0, key="0", status="C"), days=1)
    begin, locked = store.begin, []

    def counted() -> AbstractContextManager[sa.Connection]:
        locked.append(1)
        return begin()

    monkeypatch.setattr(store, "begin", counted)
    assert expire(store, keep_raw_days=10, keep_values_days=10) == {"raw": 7, "values": 20, "texts": 0}
    assert len(locked) >= 4 + 4, "no transaction holds the lock for more than two"


# --- by request


def two_patients(store: Store) -> None:
    """Two patients with all that can be known of one; Eva's rows are counted before Ada comes."""
    for patient, uid, other in ((EVA, "2.25.1", PatientKey("SITE", "X-1")), (ADA, "2.25.2", PatientKey("SITE", "X-2"))):
        told = (fact(1.0, key="k"), fact(None, key="t", text=f"{patient.name} came on foot."))
        receive(store, patient, *told, orders=(Order(f"ACC-{patient.key.patient_id}"),), merges=(Merge(patient.key, other),))
        report(store, study(store, patient, uid), f"2.25.9{uid[-1]}", patient)
        note(store, f"PID|||{patient.key.patient_id}^^^SITE||{patient.name}||{patient.birth_date}\r".encode(), control_id=uid)


def test_nothing_of_an_erased_patient_is_left_and_nothing_of_another_is_touched(store: Store) -> None:
    two_patients(store)
    before = dump(store)
    assert all(any(word in row for rows in before.values() for row in rows) for word in PLANTED)
    receipt = erase(store)
    after = dump(store)
    for word in PLANTED:
        assert not [name for name, rows in after.items() for row in rows if word in row]
    eva = {name: [row for row in rows if EVA.key.patient_id in row or "Anothername" in row] for name, rows in before.items()}
    assert sum(map(len, eva.values())) >= 5
    for name, rows in eva.items():
        assert set(rows) <= set(after[name])
    kinds = {
        "facts": "observation", "demographics": "demographics", "orders": "imaging_order", "merges": "merge", "patients": "patient",
        "studies": "study", "series": "series", "instances": "instance", "documents": "document", "findings": "finding",
        "jobs": "job", "reviews": "review",
    }  # fmt: skip
    for kind, name in kinds.items():
        assert receipt["counts"][kind] == len(before[name]) - len(after[name]) > 0, kind
    assert receipt["counts"]["events"] == len(before["event"]) - len(after["event"]) + 1, "one event says that it happened"
    assert receipt["counts"]["raw_messages"] == 1
    assert len(after["message"]) == len(before["message"]), "a message still counts without its bytes"
    assert receipt["paths"] == ["/spool/2.25.2"]


def test_a_receipt_proves_of_whom_it_is_and_tells_nobody_else(store: Store) -> None:
    two_patients(store)
    receipt = erase(store)
    assert erasure.is_of(receipt, ADA.key)
    assert not erasure.is_of(receipt, EVA.key)
    assert not erasure.is_of(receipt, PatientKey("OTHER", ADA.key.patient_id))
    assert not any(word in str(receipt) for word in PLANTED)
    assert receipt["at"] == NOW.isoformat()
    assert "merged with it" in receipt["scope"]
    with store.read() as conn:
        (row,) = conn.execute(sa.select(schema.event).where(schema.event.c.name == "patient.erased"))
    assert row.study_id is None
    assert row.facts["patient_sha256"] == receipt["patient_sha256"]
    assert receipt["salt"] not in str(row.facts)
    two = PatientKey("SITE", "X-1")
    with store.begin() as conn:
        first, second = (erasure.erase(conn, key, now=NOW) for key in (two, EVA.key))
    assert len({receipt["salt"], first["salt"], second["salt"]}) == 3


def test_a_patient_is_not_erased_from_under_a_job(store: Store) -> None:
    job = study(store, ADA, "2.25.2")
    before = dump(store)
    with pytest.raises(erasure.NotErased, match="1 jobs of the patient's studies are not finished") as caught:
        erase(store)
    assert not any(word in str(caught.value) for word in PLANTED)
    with store.begin() as conn:
        queue.complete(conn, job, now=NOW)
        conn.execute(sa.update(schema.study).values(state="receiving"))
    with pytest.raises(erasure.NotErased, match="still being received"):
        erase(store)
    with pytest.raises(erasure.NotErased, match="Neither images nor a feed"):
        erase(store, EVA)
    with store.begin() as conn:
        conn.execute(sa.update(schema.study).values(state="complete"))
    assert erase(store)["counts"]["studies"] == 1
    assert len(dump(store)["event"]) == 1
    assert len(before["event"]) > 1


def test_exactly_one_key_goes_and_the_studies_of_the_other_are_looked_at_again(store: Store) -> None:
    receive(store, ADA, fact(1.0, key="a"))
    receive(store, EVA, fact(2.0, key="e"), merges=(Merge(EVA.key, ADA.key),))
    job = study(store, EVA, "2.25.1")
    with store.begin() as conn:
        queue.complete(conn, job, now=NOW)
    assert facts(store, EVA) == ["a F", "e F"]
    erase(store)
    assert facts(store, EVA) == ["e F"]
    with store.read() as conn:
        assert studies.record_changed(conn) == [(job.study_id, NOW)]
        assert not records.is_known(conn, ADA.key)


@pytest.mark.parametrize(
    ("raw", "is_gone"),
    [
        (b"PID|||PLANTED-77^^^SITE", True),
        (b"PID|||planted-77", True),
        (b"PID|||00PLANTED-77|", True),
        ("PID|||PLANTED-７７".encode(), True),
        ("PID|||PLANTED-77|Jürgen".encode("latin-1"), True),
        ("PID|||PLANTED-77".encode("utf-16"), True),
        (rb"PID|||\X504C\ANTED\X2D\77", True),
        (b"PID|||PLANTED-770", False),
        (b"PID|||XPLANTED-77", False),
        (b"PID|||OTHER-78", False),
    ],
    ids=["as it is", "case", "zeros", "width", "Latin-1", "UTF-16", "hexadecimal escapes", "longer", "within a word", "another"],
)
def test_raw_messages_that_hold_the_id_lose_their_bytes(tmp_path: Path, raw: bytes, *, is_gone: bool) -> None:
    store = Store(f"sqlite:///{tmp_path / 's.db'}")
    store.migrate()
    receive(store, ADA)
    note(store, raw, control_id="1", result="refused")
    assert erase(store)["counts"]["raw_messages"] == is_gone
    with store.read() as conn:
        assert (feeds.raw(conn, 1) is None) == is_gone
    store.close()


def test_the_files_of_the_database_hold_no_byte_of_an_erased_patient(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 's.db'}")
    store.migrate()
    two_patients(store)
    erase(store)

    def held() -> bytes:
        return b"".join(path.read_bytes() for path in sorted(tmp_path.iterdir()))

    assert b"Plantedname" in held(), "deleting a row does not delete its bytes"
    erasure.purge(store)
    assert b"Anothername" in held()
    assert not [word for word in PLANTED if word.encode() in held()]
    store.close()


def test_postgres_is_vacuumed_without_a_complaint(postgres_url: str) -> None:
    store = Store(postgres_url)
    store.migrate()
    receive(store, ADA, fact(1.0, key="k"))
    erase(store)
    erasure.purge(store)
    with store.read() as conn:
        assert not records.is_known(conn, ADA.key)
    store.close()


def test_a_control_id_made_of_the_patients_id_goes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every message, also of those that left no row of the record: refused, ignored, a merge alone."""
    monkeypatch.setattr(erasure, "_PAGE", 2)
    store = Store(f"sqlite:///{tmp_path / 's.db'}")
    store.migrate()
    with store.begin() as conn:
        for control_id in ("A-PLANTED-77-1", "B-1"):
            number = feeds.note_message(
                conn, sender="HIS", control_id=control_id, sent_at="", trigger="ORU^R01", result="applied", digest=control_id, now=NOW
            )
            records.apply(conn, RecordUpdate(ADA, (fact(1.0, key=control_id),), "LAB"), now=NOW, message_id=number)
    for control_id in ("planted-77", "PLANTED-770"):
        note(store, None, control_id=control_id, result="refused")
    note(store, b"PID|||OTHER-78", control_id="00PLANTED-77.2")
    erase(store)
    with store.read() as conn:
        assert conn.exec_driver_sql("SELECT control_id FROM message ORDER BY id").scalars().all() == ["", "B-1", "", "PLANTED-770", ""]
    store.close()
