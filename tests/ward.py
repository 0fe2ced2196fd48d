"""A ward for the page: studies in every state with names in several scripts, made by the store's own functions; or very many at once."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import sqlalchemy as sa
from PIL import Image, ImageDraw
from pydicom import Dataset, dcmwrite
from pydicom.dataset import FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, SecondaryCaptureImageStorage

from tests import reports
from worker.domain import STAT, Code, Document, Finding, Header, Patient, PatientKey, Study
from worker.errors import PeerRefused, PeerUnavailable
from worker.intake import assembly
from worker.report import forms
from worker.store import accounts, documents, ledger, queue, schema, studies
from worker.store.database import Store

NOW = datetime(2026, 11, 29, 9, 30, tzinfo=UTC)
PASSWORD = "a long enough pass phrase"
#: Cheap on purpose: what is tested is not how long scrypt takes.
CHEAP = (2**4, 8, 1)
WHY = "PACS refused the document: 0xC000, cannot understand. No attempt will help; a person must look."
_WANTS = [assembly.Wants("cxr-severity", frozenset({"DX"}))]

PATIENTS: Sequence[tuple[str, Patient, str, str]] = (
    ("delivered", Patient(PatientKey("SITE", "4711"), "Müller^Änne", "19480312", "F"), "A-1001", "Thorax p.a."),
    ("failed", Patient(PatientKey("SITE", "0815"), "Παπαδόπουλος^Γιώργος", "19710921", "M"), "A-1002", "Chest, two views"),
    ("waiting", Patient(PatientKey("SITE", "2718"), "Wang^XiaoDong=王^小東", "19630505", "M"), "A-1003", "Chest PA"),
    ("analysing", Patient(PatientKey("SITE", "3141"), "محمد^علي", "19900101", "M"), "A-1004", "Chest PA"),
    ("held", Patient(PatientKey("SITE", "1618"), "Okafor^Chidi", "20250110", "M"), "A-1005", "Chest AP, supine"),
    ("sending", Patient(PatientKey("SITE", "1414"), "García-Ñíguez^María José", "19551224", "F"), "A-1006", "Tórax"),
    ("excluded", Patient(PatientKey("SITE", "2236"), "Smith^John", "19391130", "M"), "A-1008", "MR knee"),
    ("replaced", Patient(PatientKey("SITE", "4711"), "Müller^Änne", "19480312", "F"), "A-1009", "Thorax p.a., Kontrolle"),
    ("unanalysable", Patient(PatientKey("", "5772"), "", "", ""), "", ""),
    ("receiving", Patient(PatientKey("SITE", "1732"), "Kowalska^Łucja", "19820730", "F"), "A-1007", "Chest PA and lateral"),
)


#: Documents by study, version and whether they are real, made once: the same input makes the same bytes.
_MADE: dict[tuple[int, int, bool], tuple[Document, ...]] = {}


@dataclass(frozen=True, slots=True)
class Ward:
    """State → the study's row."""

    studies: dict[str, int]


def people(store: Store, *, cost: tuple[int, int, int] = CHEAP) -> None:
    """One account of each role, all with `PASSWORD`."""
    with store.begin() as conn:
        for role in ("viewer", "operator", "radiologist", "admin"):
            accounts.add(conn, f"a.{role}", password=accounts.hashed(PASSWORD, cost=cost), roles=[role], now=NOW)


def furnish(store: Store, folder: Path, *, now: datetime = NOW, is_real: bool = False) -> Ward:
    """Every study of `PATIENTS`, at about `now`; with the summary image that Typst sets, or one that takes no time."""
    found = {}
    for number, (state, patient, accession, words) in enumerate(PATIENTS):
        at = now - timedelta(minutes=7 * len(PATIENTS) - 7 * number)
        found[state] = _study(store, folder, number, state, patient, accession, words, at, is_real)
    return Ward(found)


def furnish_one(store: Store, at: datetime) -> None:
    """One more study, whose first image came at `at`."""
    uid = f"2.25.99{at:%Y%m%d%H%M%S}"
    _image(store, Header("1.2", f"{uid}.1", "1.2", uid, f"{uid}.0", Patient(PatientKey("SITE", "1")), "DX"), at)


def _study(
    store: Store, folder: Path, number: int, state: str, patient: Patient, accession: str, words: str, at: datetime, is_real: bool
) -> int:
    uid = f"2.25.77{number}"
    one = Header(
        sop_class_uid="1.2.840.10008.5.1.4.1.1.1.1",
        sop_instance_uid=f"{uid}.1",
        transfer_syntax_uid="1.2.840.10008.1.2.1",
        study_instance_uid=uid,
        series_instance_uid=f"{uid}.0",
        patient=patient,
        modality="MR" if state == "excluded" else "DX",
        accession_number=accession,
        study_description=words,
    )
    _image(store, one, at)
    if state == "held":
        _image(store, replace(one, sop_instance_uid=f"{uid}.2", patient=Patient(PatientKey("SITE", "9999"))), at)
    with store.read() as conn:
        study = studies.find(conn, uid)[0][0]
    if state == "receiving":
        return study
    assembly.sweep(store, wants=_WANTS, limit_s=100, now=at + timedelta(seconds=16))
    if state in ("waiting", "held", "excluded"):
        _put_off(store, at + timedelta(seconds=17))
        return study
    _analyse(store, folder, study, state, at + timedelta(seconds=18), is_real)
    if state == "replaced":
        _image(store, replace(one, sop_instance_uid=f"{uid}.3"), at + timedelta(seconds=60))
        assembly.sweep(store, wants=_WANTS, limit_s=100, now=at + timedelta(seconds=80))
        _analyse(store, folder, study, state, at + timedelta(seconds=82), is_real)
    return study


def _image(store: Store, one: Header, at: datetime) -> None:
    with store.begin() as conn:
        studies.add_instance(
            conn,
            one,
            path=Path(one.sop_instance_uid),
            sha256="a",
            size_bytes=9,
            calling_ae="XRAY_1",
            address="127.0.0.1",
            study_at=at - timedelta(minutes=4),
            quiet_s=15,
            now=at,
        )


def _put_off(store: Store, at: datetime) -> None:
    """What is not analysed yet waits for a long time."""
    with store.begin() as conn:
        for job in queue.lease(conn, "infer", owner="ward", limit=9, lease_s=3600, now=at):
            queue.snooze(conn, job, delay_s=36000, reason="The patient's record has not come yet.", now=at)


def _analyse(store: Store, folder: Path, study: int, state: str, at: datetime, is_real: bool) -> None:
    with store.begin() as conn:
        (job,) = queue.lease(conn, "infer", owner="ward", limit=1, lease_s=3600, now=at)
        assert job.study_id == study
        if state == "analysing":
            queue.prioritize(conn, study, now=at, priority=STAT)
            return
        last = documents.predecessor(conn, study, bundle=job.bundle, before_version=job.input_version)
        described = studies.load(conn, study)
    failure = "The series has no image of the view PA: the only one is AP, supine." if state == "unanalysable" else ""
    findings = () if failure else FINDINGS
    key = (study, job.input_version, is_real)
    if key not in _MADE:
        source = reports.radiograph(folder, change=lambda ds: _of(ds, described))
        algorithm = replace(reports.ALGORITHM, input_sha256=f"{job.input_version}" * 64)
        result = reports.result([source], algorithm=algorithm, study=described, predecessor=last, failure=failure, findings=findings)
        made = forms.author(result, ["summary"] if is_real else [])
        stub = () if is_real or failure else (summary(f"{made[-1].sop_instance_uid[:60]}.9", described),)
        _MADE[key] = (*stub, *made)
    done = at + timedelta(seconds=2)
    with store.begin() as conn:
        for document in _MADE[key]:
            said = findings if document.kind == "sr" else ()
            row = documents.add(conn, job, report=document, findings=said, input_sha256=f"{job.input_version}", failure=failure, now=done)
            to = {"document_id": row, "bundle": job.bundle, "input_version": job.input_version, "priority": job.priority}
            queue.enqueue_deliver(conn, study, destination="pacs", now=done, **to)  # type: ignore[arg-type]
        queue.complete(conn, job, now=done, findings={one.name: one.probability for one in findings}, failure=failure)
        _deliver(conn, study, state, done)


def _deliver(conn: sa.Connection, study: int, state: str, at: datetime) -> None:
    for one in queue.lease(conn, "deliver", owner="ward", limit=9, lease_s=60, now=at):
        if one.study_id == study and state == "failed":
            queue.discard(conn, one, error=PeerRefused(WHY), now=at + timedelta(seconds=2))
        elif one.study_id == study and state != "sending":
            queue.complete(conn, one, now=at + timedelta(seconds=2))
        else:
            queue.retry(conn, one, error=PeerUnavailable("pacs does not answer: connection refused."), now=at)


def _of(ds: Dataset, study: Study) -> None:
    ds.StudyInstanceUID, ds.AccessionNumber = study.study_instance_uid, study.accession_number
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.PatientID, ds.IssuerOfPatientID = study.patient.key.patient_id, study.patient.key.issuer
    ds.PatientName, ds.PatientBirthDate, ds.PatientSex = study.patient.name, study.patient.birth_date, study.patient.sex


FINDINGS = (
    replace(reports.FINDINGS[0], shapley={"image": 1.31, "values": 0.42, "text": 0.0}, attributions={"crp": 0.38, "ldh": 0.04}),
    Finding("infiltrate", Code("409609008", "SCT", "Radiologic infiltrate of lung"), 0.4702, 0.45, "uncertain", {"image": -0.11}),
    reports.FINDINGS[1],
)


def summary(uid: str, study: Study) -> Document:
    """A small picture in the place of the summary image."""
    picture = Image.fromarray(np.linspace(20, 90, 720 * 960).astype(np.uint8).reshape(720, 960)).convert("RGB")
    pen = ImageDraw.Draw(picture)
    pen.ellipse((520, 380, 700, 520), outline=(255, 190, 70), width=5)
    pen.text((30, 30), "A picture in the place of the summary image", fill=(235, 240, 240))
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = SecondaryCaptureImageStorage, UID(uid)
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPClassUID, UID(uid)
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 720, 960, 3, "RGB", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
    ds.PixelData = picture.tobytes()
    ds.SeriesInstanceUID, ds.Modality, ds.ConversionType = f"{study.study_instance_uid}.9", "OT", "WSD"
    _of(ds, study)
    out = io.BytesIO()
    dcmwrite(out, ds, enforce_file_format=True)
    return Document(uid, SecondaryCaptureImageStorage, "summary", out.getvalue())


# --- very many


def crowd(store: Store, count: int, *, now: datetime = NOW) -> None:
    """`count` studies with series, instance, jobs, report and findings, ninety of a hundred delivered, the rest in every other state."""
    step = timedelta(days=90) / count
    for begin in range(0, count, 5000):
        with store.begin() as conn:
            _some(conn, range(begin, min(count, begin + 5000)), now, step, count)
    with store.begin() as conn:
        if not store.is_sqlite:
            for table in schema.metadata.tables:  # rows that were given their number: the next is counted on
                conn.exec_driver_sql(
                    f"SELECT setval(pg_get_serial_sequence('{table}', 'id'), (SELECT max(id) + 1 FROM \"{table}\"), false)"
                )
        conn.exec_driver_sql("ANALYZE")


def state_of(number: int) -> str:
    """Which state the study of a number is in."""
    rest = number % 100
    return {0: "failed", 1: "receiving", 2: "held", 3: "waiting", 4: "sending", 5: "excluded", 6: "excluded", 7: "undone"}.get(
        rest, "delivered"
    )


def _some(conn: sa.Connection, numbers: range, now: datetime, step: timedelta, count: int) -> None:
    tables = ("study", "series", "instance", "event", "document", "finding", "job")
    rows: dict[str, list[dict[str, object]]] = {name: [] for name in tables}
    for n in numbers:
        state, at, key = state_of(n), now - step * (count - n), n + 1
        rows["study"].append({
            "id": key, "study_instance_uid": f"2.25.{key}", "issuer": "SITE", "patient_id": f"P{n // 3:07d}",
            "patient_name": f"Family{n % 997}^Given{n % 89}", "birth_date": f"19{n % 100:02d}0101", "sex": "FM"[n % 2],
            "accession_number": f"A{n:08d}", "description": "Chest PA",
            "study_at": at, "state": "receiving" if state == "receiving" else "complete", "version": 1, "created_at": at,
            "last_received_at": at,
            "quiet_until": at, "completed_at": at, "hold": "Two patients." if state == "held" else "",
        })  # fmt: skip
        rows["series"].append({"id": key, "study_id": key, "series_instance_uid": f"2.25.{key}.1", "modality": "DX"})
        rows["instance"].append({
            "id": key, "series_id": key, "sop_instance_uid": f"2.25.{key}.2", "sop_class_uid": "1.2", "transfer_syntax_uid": "1.2",
            "path": f"{key}", "sha256": "a", "size_bytes": 1, "received_at": at,
        })  # fmt: skip
        word = "study.excluded" if state == "excluded" else "study.completed"
        rows["event"].append({"id": key, "at": at, "study_id": key, "name": word, "facts": {}})
        if state in ("receiving", "held", "excluded"):
            continue
        infer = "available" if state == "waiting" else "discarded" if state == "undone" else "completed"
        rows["job"].append(_job(2 * key, key, "infer", infer, at))
        if infer != "completed":
            continue
        rows["document"].append({
            "id": key, "study_id": key, "sop_instance_uid": f"2.25.{key}.3", "sop_class_uid": "1.2", "kind": "sr", "bundle": "cxr",
            "input_version": 1, "sha256": "a", "data": b"x" * 200, "created_at": at,
        })  # fmt: skip
        rows["finding"].append({
            "id": key, "document_id": key, "name": "p", "code": "1", "scheme": "SCT", "meaning": "Pneumonia",
            "probability": (n % 100) / 100,
            "threshold": 0.5, "verdict": "positive" if n % 4 == 0 else "negative", "shapley": {}, "attributions": {},
        })  # fmt: skip
        sent = {"failed": "discarded", "sending": "available"}.get(state, "completed")
        rows["job"].append(_job(2 * key + 1, key, "deliver", sent, at) | {"document_id": key, "destination": "pacs"})
    for name, several in rows.items():
        if several:
            conn.execute(sa.insert(schema.metadata.tables[name]), several)


def _job(number: int, study: int, kind: str, state: str, at: datetime) -> dict[str, object]:
    ended = state in ("completed", "discarded")
    return {
        "id": number, "kind": kind, "study_id": study, "bundle": "cxr", "input_version": 1, "document_id": None, "destination": "",
        "unique_key": f"{kind}/{number}", "priority": STAT if study % 50 == 3 else 10, "state": state, "attempt": 1,
        "not_before": at, "reason": WHY if state == "discarded" else "", "created_at": at, "started_at": at + timedelta(seconds=1),
        "finished_at": at + timedelta(seconds=4 + study % 17) if ended else None,
    }  # fmt: skip


def account_of(store: Store, study: int) -> str:
    """Where the ledger has a study."""
    with store.read() as conn:
        one = ledger.standing([study])
        return str(conn.execute(sa.select(one.c.account)).scalar_one())
