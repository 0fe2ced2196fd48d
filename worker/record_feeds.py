"""What the hospital's systems say → rows of the record, whichever door it came through: the MLLP listener, files, tables, a FHIR server.

Here the site's words are turned into ours: issuers, patient IDs as the site compares them, local codes. Not here: how a message is
read (intake/), when a feed is asked (sweeps.py).
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Final

from worker import joining
from worker.config import Config
from worker.domain import Code, Header, Merge, Observation, Patient, PatientKey, RecordUpdate
from worker.errors import RecordError
from worker.intake.envelope import read_envelope
from worker.intake.facts import MAX_CONTROL_ID, token
from worker.ops import audit
from worker.store import feeds, persons, records, sources
from worker.store.database import Connection, Store
from worker.tls import server_context

#: Why a result is refused that names another person than the admissions.
OF_ANOTHER: Final = (
    "The patient's name, birth date or sex (PID-5, PID-7, PID-8) contradicts what is known of the patient with this ID (PID-3); "
    "nothing of it was applied. Correct the patient at the sender, or send the right demographics (ADT^A08) first."
)

if TYPE_CHECKING:
    from worker.intake.hl7 import ParsedMessage
    from worker.intake.mllp import MllpServer


def clock() -> datetime:
    """The time, aware."""
    return datetime.now(UTC)


def identified(header: Header, config: Config) -> Header:
    """The same header; a patient without an issuer becomes one of the site's, the ID is as the site compares it."""
    key = header.patient.key
    known = PatientKey(key.issuer or config.site.issuer, comparable(config, key.patient_id))
    return header if known == key else replace(header, patient=replace(header.patient, key=known))


def localized(config: Config, update: RecordUpdate) -> RecordUpdate:
    """The same update with the site's own codes under the codes that bundles ask for, and its patient IDs as the site compares them."""
    mapping = {tuple(one.local): one.standard for one in config.records.mappings}

    def key(one: PatientKey) -> PatientKey:
        return replace(one, patient_id=comparable(config, one.patient_id))

    def fact(one: Observation) -> Observation:
        standard = mapping.get((one.code.value, one.code.scheme))
        return replace(one, code=Code(*standard)) if standard else one

    return replace(
        update,
        patient=replace(update.patient, key=key(update.patient.key)),
        observations=tuple(map(fact, update.observations)) if mapping else update.observations,
        merges=tuple(Merge(key(one.survivor), key(one.retired)) for one in update.merges),
    )


def comparable(config: Config, patient_id: str) -> str:
    """A patient ID as this site compares it; as it is, unless the configuration says otherwise."""
    rules = config.records.patient_ids
    if rules.narrow_digits:
        patient_id = unicodedata.normalize("NFKC", patient_id)
    if rules.upper_case:
        patient_id = patient_id.upper()
    if rules.strip_leading_zeros:
        patient_id = patient_id.lstrip("0") or "0"
    return patient_id


def apply_message(config: Config, store: Store, message: ParsedMessage, raw: bytes) -> bool:
    """Commit 3: one HL7 message, remembered and applied in one transaction; False for a repetition.

    Raises
    ------
    RecordError
        The message speaks of another person than the one who is known by its patient ID; nothing of it is applied but what it withdraws.
    """
    try:
        return _apply_message(config, store, message, raw)
    except RecordError:
        if message.update and _withdraws_all(config, store, message, message.update, raw):
            return True
        raise


def _withdraws_all(config: Config, store: Store, message: ParsedMessage, update: RecordUpdate, raw: bytes) -> bool:
    """Take of a message in another person's name the withdrawals of what stands under its patient ID, which harm nobody.

    False if there is more in it, or nothing was withdrawn: that is to be refused.
    """
    update = localized(config, update)
    with store.begin() as conn:
        standing = [fact.key for fact in records.standing_from(conn, update.patient.key, update.source) if fact.key]

        def is_taken(one: Observation) -> bool:
            names = (f"{one.key}/", f"{one.key}#")  # of its parts and repeats
            return one.status in records.WITHDRAWN and any(key == one.key or key.startswith(names) for key in standing)

        taken = tuple(filter(is_taken, update.observations))
        is_all = len(taken) == len(update.observations) and not update.orders
        # The whole message may still be taken when the patient is mended: what is taken now is another one.
        said = raw if is_all else b"withdrawals of " + raw
        number = taken and feeds.note_message(
            conn,
            sender=message.sender,
            control_id=message.control_id,
            sent_at=str(message.sent_at),
            trigger=message.trigger,
            result="applied",
            digest=hashlib.sha256(said).hexdigest(),
            reason="It names another person than is known by its patient ID: only its withdrawals were applied.",
            now=clock(),
        )
        if number:
            whose = Patient(update.patient.key)  # of the other person nothing is kept
            records.apply(conn, replace(update, patient=whose, observations=taken, orders=()), now=clock(), message_id=number)
    return bool(number) and is_all


def _apply_message(config: Config, store: Store, message: ParsedMessage, raw: bytes) -> bool:
    result = "applied" if message.update else "ignored"
    unread = f"{message.skipped} of its observations could not be read." if message.skipped else ""
    with store.begin() as conn:
        number = feeds.note_message(
            conn,
            sender=message.sender,
            control_id=message.control_id,
            sent_at=str(message.sent_at or ""),
            trigger=message.trigger,
            result=result,
            digest=hashlib.sha256(raw).hexdigest(),
            reason=" ".join(filter(None, (message.note, unread))),
            # What nothing was made of, in whole or in part, is kept for a person.
            raw=None if message.update and not unread else raw,
            now=clock(),
        )
        if number is not None and message.update:
            update = localized(config, message.update)
            held = check_person(config, conn, update, now=clock(), message_id=number)
            records.apply(conn, update, now=clock(), message_id=number, held=held)
    return number is not None


def check_person(
    config: Config, conn: Connection, update: RecordUpdate, *, now: datetime, message_id: int | None = None
) -> persons.Held | None:
    """Refuse what is said of somebody else under a patient's ID; the patients it names stay locked until the commit.

    An admission's word is not looked at, and locks nobody (None): it is what corrects who a patient is. What came in passing speaks
    against nobody: of two that contradict each other nobody knows the wrong one, so both are kept, and a study is not joined
    (joining.py).

    Raises
    ------
    RecordError
        Name, birth date or sex contradict what admissions say of the patient with this ID.
    """
    if update.has_demographics:
        return None
    held, (is_of_another,) = check_persons(config, conn, [update], now=now, message_id=message_id)
    if is_of_another:
        raise RecordError(OF_ANOTHER)
    return held


def check_persons(
    config: Config, conn: Connection, updates: Sequence[RecordUpdate], *, now: datetime, message_id: int | None = None
) -> tuple[persons.Held, list[bool]]:
    """Which of these updates, if they are no admission's, are of somebody else than the patient they name; all stay locked."""
    # Locked first: an admission that is being applied this moment counts.
    said = {"source": updates[0].source, "received_at": now, "message_id": message_id}
    held = persons.locked(conn, (key for one in updates for key in one.named), said)
    keys = held.keys(conn)
    survivors = {keys[pk]: chain[0] for chain in held.chains.values() for pk in chain}
    told: dict[int, list[tuple[datetime, Patient]]] = {}
    for line in sources.demographics_of(conn, survivors):
        if line.at > records.IN_PASSING:
            told.setdefault(survivors[line.key], []).append((line.at, Patient(line.key, line.name, line.birth_date, line.sex)))

    def is_of_another(update: RecordUpdate) -> bool:
        if update.has_demographics:
            return False
        chain = held.chains[held.rows[update.patient.key]]
        lines, several = told.get(chain[0], ()), [keys[pk] for pk in chain]
        known = joining.admitted(lines, several)
        at, must_agree = update.at or now, config.records.must_agree
        return bool(known and joining.is_another(update.patient, known, lines, several, at=at, must_agree=must_agree))

    return held, [is_of_another(one) for one in updates]


def parsed(config: Config, raw: bytes) -> ParsedMessage:
    """One HL7 message as this site reads it.

    Raises
    ------
    RecordError
        As `hl7.parse`.
    """
    from worker.intake import hl7

    settings = config.records
    return hl7.parse(raw, zone=config.zone, issuers=settings.issuers, schemes=settings.schemes, encoding=settings.encoding)


def apply_again(config: Config, store: Store, number: int) -> str:
    """Take a refused message that was kept once more, the same way as when it came; returns what came of it, which is noted with it too.

    What it says counts from when it was said, and is received now: what was known before stays so.

    Raises
    ------
    RecordError
        It is refused again, was not refused, was taken since, or is not kept whole; the sentence says which.
    """
    from worker.intake.mllp import HEAD_BYTES

    with store.read() as conn:
        result, raw = feeds.result_of(conn, number), feeds.raw(conn, number)
    if result != "refused":
        raise RecordError(f"It was not refused: it was {result} when it came." if result else "There is no such message.")
    if raw is None:
        raise RecordError("Its bytes are not kept: only those of HL7 v2 messages are, and for [records] keep_raw_days. Have it sent again.")
    if len(raw) == HEAD_BYTES:
        raise RecordError(f"It was too long, and only its first {HEAD_BYTES} bytes are kept: have it sent again.")
    try:
        message = parsed(config, raw)
        is_new = apply_message(config, store, message, raw)
    except RecordError as exc:
        with store.begin() as conn:
            feeds.note_again(conn, number, f"refused again. {exc}")
        raise
    digest, sent_at = hashlib.sha256(raw).hexdigest(), str(message.sent_at)
    with store.begin() as conn:
        own = feeds.row_of(conn, sender=message.sender, control_id=message.control_id, sent_at=sent_at, digest=digest)
        words = f"applied, as No. {own}." if message.update else f"nothing is to be made of it, No. {own}. {message.note}"
        feeds.note_again(conn, number, words)
    if not is_new:
        raise RecordError(f"It was taken already, as No. {own}: nothing was changed.")
    unread = f" {message.skipped} of its observations could not be read." if message.skipped else ""
    return f"{words[0].upper()}{words[1:]}{unread}"


def keep_refused(store: Store, reason: str, raw: bytes) -> None:
    """Keep what could not be understood, for a person to read; whose it was as far as its envelope can be read."""
    try:
        envelope = read_envelope(raw)
        sender, trigger, control_id = envelope.sender_label, envelope.trigger_label, token(envelope.raw(10))[:MAX_CONTROL_ID]
    except RecordError:
        sender = trigger = control_id = ""
    said = {"sender": sender, "control_id": control_id, "trigger": trigger}
    with store.begin() as conn:
        feeds.note_message(conn, **said, sent_at="", result="refused", reason=reason, raw=raw, now=clock())


def _audited(config: Config, store: Store, message: ParsedMessage, raw: bytes) -> bool:
    """`apply_message`, recorded; a repetition changes nothing, and what the database has no time for comes again."""
    try:
        is_new = apply_message(config, store, message, raw)
    except RecordError as exc:
        _audit(message, outcome=audit.FAILED, reason=str(exc))
        raise
    if is_new:
        _audit(message, outcome=audit.SUCCESS)
    return is_new


def _audit(message: ParsedMessage, *, outcome: str, reason: str = "") -> None:
    if update := message.update:
        source = audit.Party(message.sender, is_ae=False)
        say = partial(audit.record, outcome=outcome, source=source, message=message.control_id, reason=reason)
        say("U", [update.patient])
        say("D", [Patient(one.retired) for one in update.merges])


def records_listener(config: Config, store: Store) -> MllpServer:
    """The HL7 v2 listener, not started yet."""
    from worker.intake.mllp import MllpServer

    settings = config.records
    return MllpServer(
        (settings.host, settings.port),
        apply=lambda message, raw: _audited(config, store, message, raw),
        reject=lambda reason, raw: keep_refused(store, reason, raw),
        zone=config.zone,
        issuers=settings.issuers,
        schemes=settings.schemes,
        encoding=settings.encoding,
        allowed_addresses=settings.addresses,
        max_message_bytes=settings.max_message_mb * 2**20,
        max_connections=settings.max_connections,
        idle_s=settings.idle_s,
        ssl_context=server_context(settings, section="records"),
    )
