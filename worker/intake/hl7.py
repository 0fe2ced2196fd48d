"""One HL7 v2 message: bytes → what it says of one patient.

::

    MSH ── who sent it, when, under which control ID, in which character set       every message
    EVN ── when it was recorded
    PID ─┬ the patient key, and in ADT^A01/A04/A05/A08/A28/A31 the demographics    hl7_patient.py
         └ MRG ── the key that is retired       (ADT^A18/A34/A40/A47)
    ORC ── OBR ── IPC ── imaging orders         (ORM^O01, OMG^O19, OMI^O23)        hl7_orders.py
    OBR ── OBX ×n ── results and reports        (ORU^R01)                          hl7_results.py
    TXA ── OBX ×n ── one document               (MDM^T02/T04/T06/T08/T10/T11)      hl7_documents.py

Every other trigger is read as far as MSH: its ``update`` is None, its ``note`` says why, and nothing of it is guessed.

Not here: sockets and answers (mllp.py), the syntax of fields (hl7_fields.py), rows (store/records.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, tzinfo
from typing import Final

from worker.domain import OWN_APPLICATION, Patient, RecordUpdate
from worker.errors import RecordError
from worker.intake.envelope import read_envelope
from worker.intake.facts import MAX_CONTROL_ID, MAX_SENDER, bounded
from worker.intake.hl7_documents import document
from worker.intake.hl7_fields import Reader, at, decoded, offset_of, segments
from worker.intake.hl7_orders import orders
from worker.intake.hl7_patient import merges, patient
from worker.intake.hl7_results import observations

DEMOGRAPHICS: Final = frozenset({"ADT^A01", "ADT^A04", "ADT^A05", "ADT^A08", "ADT^A28", "ADT^A31"})
MERGES: Final = frozenset({"ADT^A18", "ADT^A34", "ADT^A40", "ADT^A47"})
RESULTS: Final = frozenset({"ORU^R01"})
ORDERS: Final = frozenset({"ORM^O01", "OMG^O19", "OMI^O23"})
DOCUMENTS: Final = frozenset({"MDM^T02", "MDM^T04", "MDM^T06", "MDM^T08", "MDM^T10", "MDM^T11"})
#: Understood, and nothing is to be done: nothing of a visit is kept, so that none can be taken back.
CANCELLATIONS: Final = {
    "ADT^A11": "The admission was cancelled; nothing of a visit is kept, and demographics are not taken from a cancellation.",
    "ADT^A13": "The discharge was cancelled; nothing of a visit is kept, and demographics are not taken from a cancellation.",
}
READ: Final = DEMOGRAPHICS | MERGES | RESULTS | ORDERS | DOCUMENTS


@dataclass(frozen=True, slots=True)
class ParsedMessage:
    """What one message says. ``update`` is None where nothing is to be made of it; ``note`` says why, without patient data.

    ``skipped`` counts its observations of which no value and no text could be made, those without a code, and the orders
    that are none of imaging.
    """

    control_id: str
    sender: str
    sent_at: datetime
    trigger: str
    update: RecordUpdate | None
    skipped: int = 0
    note: str = ""


def parse(
    raw: bytes, *, zone: tzinfo, issuers: Mapping[str, str], schemes: Mapping[str, str] | None = None, encoding: str = "utf-8"
) -> ParsedMessage:
    """Read one message.

    Parameters
    ----------
    raw
        Without the bytes of the framing. Segments end with CR; LF and CR LF are understood.
    zone
        Of times without an offset, where MSH-7 has none either (HL7 v2.5.1 §2.15.9.7).
    issuers
        Name of an assigning authority (CX.4.1, or CX.4.2) → issuer of patient ID. Others are kept as they are; the
        name '' stands for an authority left out, which is refused without it.
    schemes
        Name of a coding system (table 0396) → coding scheme designator. Others are kept; one left out is local, 'L'.
    encoding
        Of messages without MSH-18.

    Raises
    ------
    RecordError
        What is needed cannot be understood; the text names the field and never repeats its content.
    """
    envelope = read_envelope(raw)
    text, codec = decoded(raw, envelope, encoding)
    found = list(segments(text, envelope.separators[0]))
    msh = found[0]
    if sum(fields[0] == "MSH" for fields in found) != 1:
        raise RecordError("There is more than one MSH segment in the message.")
    if len(msh) != len(envelope.fields):
        raise RecordError("MSH cannot be split before it is decoded: a name in it holds a separator's byte.")
    reader = Reader(envelope, codec, zone, issuers, schemes or {})
    control_id = reader.value(at(msh, 9))
    if not control_id:
        raise RecordError("MSH-10 has no message control ID.")
    bounded(control_id, MAX_CONTROL_ID, "MSH-10")
    _read_header(reader, msh)
    update, note = _update(reader, found)
    return ParsedMessage(control_id, reader.sender, reader.sent_at, envelope.trigger_label, update, reader.skipped, note)


def _read_header(reader: Reader, msh: list[str]) -> None:
    sent = reader.first(at(msh, 6))
    reader.sent_at = reader.moment(sent, "MSH-7")
    if sent[-5:-4] in ("+", "-"):
        offset = offset_of(sent[-5:])
        # A site that writes its own zone's offset means its zone: a winter draw sent in summer has winter's offset.
        if reader.sent_at.astimezone(reader.zone).utcoffset() != offset.utcoffset(None):
            reader.zone = offset
    reader.sender = bounded("|".join(reader.authority(at(msh, index), 1)[0] for index in (2, 3)), MAX_SENDER, "MSH-3 with MSH-4")
    reader.said_at = reader.sent_at


def _update(reader: Reader, found: list[list[str]]) -> tuple[RecordUpdate | None, str]:
    """Read the segments that the trigger calls for; None, and why, where nothing is to be made of them."""
    trigger, sender = reader.envelope.trigger, reader.sender
    if sender.partition("|")[0] == OWN_APPLICATION:
        return None, "The message is a result of ours, sent back: it is no fact of the patient's record."
    if trigger not in READ:
        return None, CANCELLATIONS.get(trigger, "Messages of this trigger are not used.")
    reader.said_at = _said_at(reader, found)
    if trigger in MERGES:
        pairs = merges(reader, found)
        # HL7 v2.5.1 §3.3.40: what else changes of a patient that is merged is told by ADT^A31, not by the merge.
        return RecordUpdate(Patient(pairs[0].survivor), source=sender, has_demographics=False, merges=pairs, at=reader.said_at), ""
    if trigger in DEMOGRAPHICS:
        return RecordUpdate(patient(reader, found), source=sender, at=reader.said_at), ""
    if trigger in ORDERS:
        ordered, facts = orders(reader, found)
        if not ordered:
            return None, "No order in the message is an imaging order: neither OBR-24 nor an accession number in IPC-1 or OBR-18 says so."
    else:
        ordered, facts = (), observations(reader, found) if trigger in RESULTS else document(reader, found)
        if not facts and trigger in DOCUMENTS:
            return None, "The document has no text that can be read."
    # A laboratory's copy of the demographics is older than the admission office's.
    about = patient(reader, found)
    return RecordUpdate(about, facts, sender, has_demographics=False, orders=ordered, at=reader.said_at), ""


def _said_at(reader: Reader, found: list[list[str]]) -> datetime:
    """Return EVN-2, when it was recorded, else MSH-7. Nothing is recorded after it is sent: such a clock would rule for years."""
    recorded = next((at(fields, 2) for fields in found if fields[0] == "EVN"), "")
    if recorded == at(found[0], 6) or not (recorded := reader.first(recorded)):
        return reader.sent_at
    return min(reader.moment(recorded, "EVN-2"), reader.sent_at)
