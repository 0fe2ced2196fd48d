"""Audit messages (PS3.15 §A.5.3): who did what with whose images and records. They name patients; the log never does.

=============================  ==============================================================================
Application Activity           a role's process starts, stops, or dies (outcome 12)
DICOM Instances Transferred    received: one a study, action and outcome of an association; a report sent
Begin Transferring             a report is about to be sent
Query                          each C-FIND or QIDO-RS of ours
DICOM Instances Accessed       an analysis: its network read the images. Not Procedure Record, which is of the order's procedure
Patient Record                 R: an analysis joined the record; U, D: an HL7 message changed it, or merged it away
Security Alert                 a caller was rejected (Node Authentication), counted where there are many; an account was changed
                               (User Security Attributes Changed); somebody was refused what their role may not (Use of Restricted Function)
User Authentication            somebody logged in to the page, or was refused (Login), or out (Logout)
DICOM Instances Accessed, too  by a person: R, a study was shown; U, somebody changed what becomes of it, and how
=============================  ==============================================================================

What goes well and what fails is never one message (§A.5.2). Outcome 4: it may be tried again; 8: it is not; 12: the process is gone.
Events that name nobody are listened to; the others' callers call here. Without `begin` nothing is written.
"""

from __future__ import annotations

import base64
import ipaddress
import os
import re
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Final
from xml.etree.ElementTree import Element, SubElement, fromstring, tostring

from worker import events
from worker.domain import Patient
from worker.errors import WorkerError
from worker.ops.trail import Tally, Trail

SUCCESS, AGAIN, FAILED, GONE = "0", "4", "8", "12"

# PS3.16 CID 400, 401, 402, 404.
_ACTIVITY, _BEGIN, _ACCESSED = (
    ("110100", "Application Activity"),
    ("110102", "Begin Transferring DICOM Instances"),
    ("110103", "DICOM Instances Accessed"),
)
_TRANSFERRED, _RECORD, _QUERY = ("110104", "DICOM Instances Transferred"), ("110110", "Patient Record"), ("110112", "Query")
_ALERT, _START, _STOP = ("110113", "Security Alert"), ("110120", "Application Start"), ("110121", "Application Stop")
_NODE_AUTHENTICATION, _RECORDING = ("110126", "Node Authentication"), ("110134", "Audit Recording Started")
_AUTHENTICATION, LOGIN, LOGOUT = ("110114", "User Authentication"), ("110122", "Login"), ("110123", "Logout")
RESTRICTED, ATTRIBUTES = ("110132", "Use of Restricted Function"), ("110137", "User Security Attributes Changed")
_APPLICATION, _DESTINATION, _SOURCE = ("110150", "Application"), ("110152", "Destination Role ID"), ("110153", "Source Role ID")
_URI: Final = ("12", "URI")
_STUDY_UID, _CLASS_UID, _NODE_ID = ("110180", "Study Instance UID"), ("110181", "SOP Class UID"), ("110182", "Node ID")

#: Of one text; nothing honest is longer, and a message of ours stays far below the 32768 octets of §A.6.
_MAX_TEXT: Final = 1024
# XML 1.0 §2.2 has no form for most of these, escaped or not; the others may end a line for whoever reads the trail.
_NO_XML: Final = re.compile("[^\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True, slots=True)
class Party:
    """Somebody who takes part: an AE title or another name, and the address or host it has."""

    name: str
    address: str = ""
    is_ae: bool = True


@dataclass(frozen=True, slots=True)
class Subject:
    """A study and whose it is; ``sop_classes`` counts the instances spoken of."""

    study_instance_uid: str
    patient: Patient
    accession_number: str = ""
    sop_classes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Recorder:
    trail: Trail
    ae_title: str
    host: str
    rejected: Tally


_recorders: list[_Recorder] = []


def begin(folder: Path, *, ae_title: str, limit_bytes: int) -> None:
    """Record from now on, in files of `folder`."""
    end()
    _recorders.append(_Recorder(Trail(folder, limit_bytes=limit_bytes), ae_title, socket.gethostname(), Tally(_alert)))
    events.listen(_heard)


def end() -> None:
    """Record what was only counted so far, and then nothing more."""
    for recorder in tuple(_recorders):
        recorder.rejected.flush()
        _recorders.clear()
        events.unlisten(_heard)
        recorder.trail.close()


def transferred(
    subject: Subject | None,
    *,
    source: Party | None = None,
    destination: Party | None = None,
    action: str = "C",
    outcome: str,
    reason: str = "",
    event: tuple[str, str] = _TRANSFERRED,
) -> None:
    """Instances came from `source` or went to `destination`; the other is us. `action`: C created there, R were there already.

    Of what could not be read no subject is known.
    """
    # Who opens the association asks for it: the sender, always.
    parties = [(_SOURCE, source, True), (_DESTINATION, destination, False)]
    _write(event, action, outcome, parties, [_study(subject), _patient(subject.patient)] if subject else [], reason=reason)


def begun(subject: Subject, *, destination: Party) -> None:
    """Instances are about to be sent."""
    transferred(subject, destination=destination, action="E", outcome=SUCCESS, event=_BEGIN)


def accessed(
    subject: Subject, *, user: str = "", person: Party | None = None, action: str = "R", outcome: str = SUCCESS, reason: str = ""
) -> None:
    """`user`, a bundle of ours, analysed a study's images; or a `person` was shown it (R), or acted on it (U), as `reason` says."""
    parties: list[_Taking] = [(None, person, True), (None, None, False)] if person else [(None, None, True)]
    _write(_ACCESSED, action, outcome, parties, [_study(subject), _patient(subject.patient)], reason=reason, user=user)


def logged(kind: tuple[str, str], person: Party, *, outcome: str = SUCCESS, reason: str = "") -> None:
    """Somebody logged in or out (LOGIN, LOGOUT), or could not; a name that nobody has is not repeated, for it may be a password."""
    _write(_AUTHENTICATION, "E", outcome, [(None, person, True), (None, None, False)], [], kind=kind, reason=reason)


def searched(person: Party, query: str) -> None:
    """Somebody looked for an accession number or a patient ID on the page, or for studies in a state."""
    one = _object("2", "3", _URI, "worklist", query=query[:_MAX_TEXT].encode(), scheme="RFC-3881")
    _write(_QUERY, "E", SUCCESS, [(_SOURCE, person, True), (_DESTINATION, None, False)], [one])


def guarded(kind: tuple[str, str], person: Party, *, name: str, reason: str, outcome: str = SUCCESS) -> None:
    """The account `name` was changed by `person` (ATTRIBUTES), or `person` was refused what its role may not (RESTRICTED)."""
    one = _object("2", "", _URI, f"account:{name}", name=name, scheme="RFC-3881", details={"Alert Description": reason.encode()})
    _write(_ALERT, "E", outcome, [(None, person, True)], [one], kind=kind)


def record(
    action: str,
    patients: Iterable[Patient],
    *,
    outcome: str,
    source: Party | None = None,
    message: str = "",
    reason: str = "",
    user: str = "",
) -> None:
    """A patient's record was read (R), changed (U) or merged into another's (D); `message` is MSH-10 of what `source` sent."""
    parties: list[_Taking] = [(_SOURCE, source, True), (_DESTINATION, None, False)] if source else [(None, None, True)]
    for one in patients:
        _write(
            _RECORD, action, outcome, parties, [_patient(one, {"MSH-10": message.encode()} if message else {})], reason=reason, user=user
        )


@contextmanager
def asking(destination: Party, query: bytes, *, of: str, syntax: str = "") -> Iterator[None]:
    """Ask `destination` within the block: by the C-FIND of a SOP class in a transfer syntax, or below a URL. Its answer is not recorded."""
    if syntax:
        one = _object("2", "3", _CLASS_UID, of, query=query, details={"TransferSyntax": syntax.encode()})
    else:
        one = _object("2", "3", _URI, of, query=query, scheme="RFC-3881")
    say = partial(_write, _QUERY, "E", parties=[(_SOURCE, None, True), (_DESTINATION, destination, False)], objects=[one])
    try:
        yield
    except WorkerError as error:
        say(outcome=AGAIN, reason=str(error))
        raise
    say(outcome=SUCCESS)


def turned_away(address: str, reason: str) -> None:
    """Somebody without a name asked for what nobody may; counted, for whoever may ask as often as they like could fill the trail."""
    for recorder in _recorders:
        recorder.rejected.add(address, "", reason)


# --- what events say


def _heard(name: str, facts: dict[str, object]) -> None:
    if name in ("role.started", "role.stopped", "role.restarted"):
        kind, outcome, reason = (_START if name == "role.started" else _STOP), SUCCESS, ""
        if name == "role.restarted":
            outcome, reason = GONE, f"It ended with code {facts['code']} and is started again after {facts['pause_s']} s."
        pid = str(facts.get("pid", os.getpid()))
        _write(
            _ACTIVITY, "E", outcome, [(_APPLICATION, None, False)], [], kind=kind, reason=reason, user=f"synoptic {facts['role']}", pid=pid
        )
    elif facts.get("is_alert"):
        for recorder in _recorders:
            recorder.rejected.add(str(facts["address"]), str(facts.get("calling_ae", "")), str(facts["reason"]))


def _alert(key: tuple[str, str, str], more: str, kind: tuple[str, str] = _NODE_AUTHENTICATION) -> None:
    address, ae_title, reason = key
    details = {"Alert Description": ": ".join(filter(None, (reason, more))).encode()}
    one = _object("2", "", _NODE_ID, address, name=ae_title or address, details=details)
    _write(_ALERT, "E", AGAIN, [(None, None, False)], [one], kind=kind)


# --- XML


#: Role, who (None: us), and whether they asked for what happened.
_Taking = tuple[tuple[str, str] | None, Party | None, bool]


def _write(
    event: tuple[str, str],
    action: str,
    outcome: str,
    parties: Sequence[_Taking],
    objects: Sequence[Element],
    *,
    kind: tuple[str, str] | None = None,
    reason: str = "",
    user: str = "",
    pid: str = "",
) -> None:
    for recorder in _recorders:
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        root = Element("AuditMessage")
        what = SubElement(root, "EventIdentification", EventActionCode=action, EventDateTime=now, EventOutcomeIndicator=outcome)
        _code(what, "EventID", event)
        if kind:
            _code(what, "EventTypeCode", kind)
        if reason:
            SubElement(what, "EventOutcomeDescription").text = _clean(reason)
        us = Party(recorder.ae_title, recorder.host)
        for role, party, is_requestor in parties:
            _participant(root, role, party or us, is_requestor, user="" if party else user, pid="" if party else pid or str(os.getpid()))
        SubElement(SubElement(root, "AuditSourceIdentification", AuditSourceID=recorder.ae_title), "AuditSourceTypeCode", {"csd-code": "4"})
        root.extend(objects)
        # RFC 5424 §6, PS3.15 §A.6: facility 10, severity 5 or, where something failed, 4.
        head = f"<{85 if outcome == SUCCESS else 84}>1 {now} {recorder.host} synoptic {os.getpid()} DICOM+RFC3881 - \ufeff"
        lost = recorder.trail.append((head + tostring(root, encoding="unicode")).encode())
        if lost:
            _alert(("", "", f"{lost} audit messages could not be recorded"), "", _RECORDING)


def _participant(root: Element, role: tuple[str, str] | None, party: Party, is_requestor: bool, *, user: str, pid: str) -> None:
    # §A.5.2.1: a process by its number; of others' processes the number is not known.
    facts = {"UserID": pid or _clean(party.name)}
    if party.is_ae and party.name:
        facts["AlternativeUserID"] = f"AETITLES={_clean(party.name)}"
    if user:
        facts["UserName"] = _clean(user)
    facts["UserIsRequestor"] = str(is_requestor).lower()
    if party.address:
        facts |= {"NetworkAccessPointID": _clean(party.address), "NetworkAccessPointTypeCode": "2" if _is_ip(party.address) else "1"}
    element = SubElement(root, "ActiveParticipant", facts)
    if role:
        _code(element, "RoleIDCode", role)


def _study(subject: Subject) -> Element:
    one = _object("2", "3", _STUDY_UID, subject.study_instance_uid, name="study")
    about = SubElement(one, "ParticipantObjectDescription")
    if subject.accession_number:
        SubElement(about, "Accession", Number=_clean(subject.accession_number))
    for sop_class_uid, count in sorted(subject.sop_classes.items()):
        SubElement(about, "SOPClass", UID=_clean(sop_class_uid), NumberOfInstances=str(count))
    return one


def _patient(patient: Patient, details: Mapping[str, bytes] | None = None) -> Element:
    # As HL7 CX writes an identifier with its issuer.
    whole = f"{patient.key.patient_id}^^^{patient.key.issuer}" if patient.key.issuer else patient.key.patient_id
    return _object("1", "1", ("2", "Patient Number"), whole, name=patient.name, details=details, scheme="RFC-3881")


def _object(
    kind: str,
    role: str,
    id_type: tuple[str, str],
    identifier: str,
    *,
    name: str = "",
    query: bytes = b"",
    details: Mapping[str, bytes] | None = None,
    scheme: str = "DCM",
) -> Element:
    facts = {"ParticipantObjectID": _clean(identifier), "ParticipantObjectTypeCode": kind}
    one = Element("ParticipantObjectIdentification", facts | ({"ParticipantObjectTypeCodeRole": role} if role else {}))
    _code(one, "ParticipantObjectIDTypeCode", id_type, scheme)
    if query:
        SubElement(one, "ParticipantObjectQuery").text = base64.b64encode(query).decode()
    else:
        SubElement(one, "ParticipantObjectName").text = _clean(name)
    for what, value in (details or {}).items():
        SubElement(one, "ParticipantObjectDetail", type=what, value=base64.b64encode(value[:_MAX_TEXT]).decode())
    return one


def _code(parent: Element, tag: str, code: tuple[str, str], scheme: str = "DCM") -> None:
    SubElement(parent, tag, {"csd-code": code[0], "codeSystemName": scheme, "originalText": code[1]})


def _clean(text: str) -> str:
    return _NO_XML.sub("\ufffd", text[:_MAX_TEXT]).strip() or "unknown"


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    return True


# --- for people


def told(folder: Path, *, since: str = "", study_instance_uid: str = "") -> Iterator[str]:
    """The messages of the trail in words, oldest first: since a time written as ``2026-11-29T03:00``, of one study."""
    for path in sorted(folder.glob("*.log")):
        if path.stem < since[:10]:
            continue
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                said = line.partition("\ufeff")[2]
                if study_instance_uid in said and line.split(" ", 2)[1] >= since and said.endswith("</AuditMessage>\n"):
                    yield _words(fromstring(said))  # noqa: S314  our own lines, and no entity can be declared in one


#: RFC 3881 §5.1.1 and §5.1.5.
_ACTIONS: Final = {"C": "new", "R": "read", "U": "changed", "D": "removed"}
_OUTCOMES: Final = {AGAIN: "not done", FAILED: "failed", GONE: "died"}


def _words(root: Element) -> str:
    event = root[0]
    # The kind of an event says more than its class: Login, Application Stop.
    name = next(one.get("originalText", "") for tag in ("EventTypeCode", "EventID") if (one := event.find(tag)) is not None)
    action = _ACTIONS.get(event.get("EventActionCode", ""), "")
    parties = [_party(one) for one in root.findall("ActiveParticipant")]
    objects = root.findall("ParticipantObjectIdentification")
    subjects = [one.get("ParticipantObjectID", "") for one in objects]
    details = [one.get("value", "") for whole in objects for one in whole.findall("ParticipantObjectDetail[@type='Alert Description']")]
    said = [base64.b64decode(one).decode("utf-8", "replace") for one in details]
    outcome, reason = _OUTCOMES.get(event.get("EventOutcomeIndicator", SUCCESS), ""), event.findtext("EventOutcomeDescription", "")
    what = f"{name}, {action}" if action else name
    return "  ".join(filter(None, (event.get("EventDateTime"), what, " > ".join(parties), *subjects, outcome, reason, *said)))


def _party(one: Element) -> str:
    name = one.get("AlternativeUserID", "").removeprefix("AETITLES=") or one.get("UserID", "")
    return f"{name} ({user})" if (user := one.get("UserName")) else name
