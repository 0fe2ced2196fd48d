"""Bring in files instead of network messages: DICOM folders, HL7 v2 files, FHIR bundles.

They take the very path of their network twins: the same spool, the same parser, the same rows.
A file that cannot be taken is counted with its reason and the next one goes on.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Final

from pydicom.filereader import dcmread
from pydicom.uid import UID

from worker import reception, record_feeds
from worker.config import Config
from worker.domain import PatientKey, Received, RecordUpdate
from worker.errors import RecordError, Reject
from worker.imaging.codecs import CODECS
from worker.intake import fhir, mllp
from worker.intake.header import read_header
from worker.store import feeds, records
from worker.store.database import Connection, Store
from worker.store.spool import Spool

#: Patients of a FHIR file in one transaction: the feeds wait for it, and it for them.
BATCH: Final = 20
_FHIR_SENDER: Final = "FHIR import"
#: Who sent what was imported from files.
IMPORT_AE: Final = "IMPORT"
_META_TAGS: Final = ["MediaStorageSOPClassUID"]


@dataclass(slots=True)
class Tally:
    """What came of an import: counts by outcome, and reasons with how often each occurred."""

    counts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)

    def refuse(self, reason: str) -> None:
        """Count a refusal."""
        self.counts["refused"] += 1
        self.reasons[reason] += 1


def files(paths: Iterable[Path]) -> Iterator[Path]:
    """All files below `paths`, in a stable order."""
    for path in paths:
        if path.is_dir():
            yield from sorted(one for one in path.rglob("*") if one.is_file())
        else:
            yield path


def import_files(
    paths: Iterable[Path], *, config: Config, store: Store, spool: Spool, progress: Callable[[], None] = lambda: None
) -> Tally:
    """Take each file by what it holds: DICOM, HL7 v2 or FHIR JSON."""
    tally = Tally()
    several = list(paths)
    exports = [path for path in several if path.suffix == ".ndjson"]
    if exports:  # together: a subject may be in another file than what is said of it
        _import_ndjson(exports, tally, config=config, store=store)
    for path in several:
        if path.suffix == ".ndjson":
            progress()
            continue
        try:
            _import(path, tally, config=config, store=store, spool=spool)
        except Reject as exc:
            tally.refuse(str(exc))
        except OSError as exc:
            tally.refuse(f"The file cannot be read: {exc.strerror}.")
        progress()
    return tally


def _import(path: Path, tally: Tally, *, config: Config, store: Store, spool: Spool) -> None:
    with path.open("rb") as file:
        head = file.read(132)
    if head[128:] == b"DICM":
        received = import_dicom(path, config=config, store=store, spool=spool)
        tally.counts[f"instance {received.value}"] += 1
    elif head.lstrip(b"\xef\xbb\xbf\x0b\r\n \t").startswith((b"MSH", b"FHS", b"BHS")):
        _import_hl7(path, tally, config=config, store=store)
    elif head.lstrip(b"\xef\xbb\xbf\r\n \t").startswith(b"{"):
        _import_fhir(path, tally, config=config, store=store)
    else:
        tally.refuse("Neither DICOM (no DICM prefix), HL7 v2 nor FHIR JSON; a table is taken by `synoptic import --mapping`.")


def import_dicom(path: Path, *, config: Config, store: Store, spool: Spool) -> Received:
    """One DICOM file through the spool, its data set unchanged.

    Raises
    ------
    Reject
        No such transfer syntax, or the data set lacks what names it.
    """
    try:
        meta = dcmread(path, stop_before_pixels=True, specific_tags=_META_TAGS).file_meta
        transfer_syntax_uid = str(meta.TransferSyntaxUID)
        # PS3.10 §7.1: the group length counts what follows its own 12 bytes, after preamble and prefix.
        start = 132 + 12 + int(meta.FileMetaInformationGroupLength)
    except Exception as exc:
        raise Reject(f"The file meta information cannot be read ({type(exc).__name__}).") from exc
    if transfer_syntax_uid not in CODECS:
        raise Reject(f"Transfer syntax {UID(transfer_syntax_uid).name} is not taken.")
    data = path.read_bytes()
    header = read_header(data, transfer_syntax_uid, offset=start)
    incoming = spool.begin(
        sop_class_uid=header.sop_class_uid, sop_instance_uid=header.sop_instance_uid, transfer_syntax_uid=transfer_syntax_uid
    )
    try:
        incoming.write(memoryview(data)[start:])
        stored = incoming.commit()
    finally:
        incoming.abort()
    with store.begin() as conn:
        received = reception.add_instance(conn, config, header, stored, calling_ae=IMPORT_AE, address="")
    if received is Received.CONFLICT:
        spool.quarantine(stored, "same SOP Instance UID, other bytes")
    return received


def _import_hl7(path: Path, tally: Tally, *, config: Config, store: Store) -> None:
    for raw in mllp.split_messages(path.read_bytes()):
        try:
            message = record_feeds.parsed(config, raw)
            is_new = record_feeds.apply_message(config, store, message, raw)
        except RecordError as exc:
            record_feeds.keep_refused(store, str(exc), raw)
            tally.refuse(str(exc))
            continue
        tally.counts["message applied" if is_new and message.update else "message ignored" if is_new else "message repeated"] += 1


def _import_fhir(path: Path, tally: Tally, *, config: Config, store: Store) -> None:
    settings = config.records
    raw = path.read_bytes()
    updates = fhir.parse(raw, zone=config.zone, issuers=settings.issuers, schemes=settings.schemes)
    _apply_fhir(updates, raw, tally, config=config, store=store)


def _import_ndjson(paths: Sequence[Path], tally: Tally, *, config: Config, store: Store) -> None:
    settings = config.records
    raws = [path.read_bytes() for path in paths]
    updates, errors = fhir.parse_ndjson(raws, zone=config.zone, issuers=settings.issuers, schemes=settings.schemes)
    for sentence in errors:
        tally.refuse(sentence)
    _apply_fhir(updates, b"".join(raws), tally, config=config, store=store)


def _apply_fhir(updates: Iterable[RecordUpdate], raw: bytes, tally: Tally, *, config: Config, store: Store) -> None:
    """A file's patients in batches, with the row that says where they came from; a known file too, for codes may be mapped anew.

    One that was cut off is imported again: what is known is not added twice.
    """
    digest = hashlib.sha256(raw).hexdigest()
    # Writers that name patients in one order cannot wait for each other.
    several = sorted((record_feeds.localized(config, one) for one in updates), key=lambda one: _order(one.patient.key))
    for start in range(0, max(len(several), 1), BATCH):
        batch, now = several[start : start + BATCH], record_feeds.clock()
        with store.begin() as conn:
            number = feeds.note_message(
                conn, sender=_FHIR_SENDER, control_id="", sent_at="", trigger="Bundle", result="applied", digest=digest, now=now
            )
            number = number or feeds.row_of(conn, sender=_FHIR_SENDER, digest=digest)
            done = [_applied(conn, update, tally, config=config, now=now, message_id=number) for update in batch]
        several_added = [one for one in done if one is not None]
        tally.counts["patient updated"] += len(several_added)
        tally.counts["fact added"] += sum(several_added)


def _applied(conn: Connection, update: RecordUpdate, tally: Tally, *, config: Config, now: datetime, message_id: int | None) -> int | None:
    """The number of facts added; None, and a reason in the tally, for what is of somebody else."""
    try:
        held = record_feeds.check_person(config, conn, update, now=now, message_id=message_id)
    except RecordError as exc:
        tally.refuse(str(exc))
        return None
    return records.apply(conn, update, now=now, message_id=message_id, held=held)


def _order(key: PatientKey) -> tuple[str, str]:
    return key.issuer, key.patient_id
