"""Whether a study and a record may be joined, and whether the study must wait for more of it.

A wrong join harms a patient: the right one or none.
Pure functions of what they are given, but for `doubt` and `record_of`, which ask the store. Not here: what the network is given of the
record (inputs.py), rows (store/records.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from functools import cache
from itertools import combinations
from typing import Final

from models.spec import RecordRule, TextSpec, ValueSpec
from worker.domain import Code, Inputs, Observation, Patient, PatientKey, PatientRecord, Study
from worker.errors import RecordPending, Snooze
from worker.identity import contradictions, disagreement, says_the_same
from worker.inputs import unanswered
from worker.store import records
from worker.store.database import Connection

#: What images and record may not contradict each other in, where the site says nothing else.
MUST_AGREE: Final = ("birth_date", "sex", "name")
#: What admissions said, of which key, and when; oldest first (`PatientRecord.admissions`).
Admissions = Sequence[tuple[datetime, Patient]]
#: How soon to ask a FHIR server again that was away.
PULL_S: Final = 10.0

_SEVERAL: Final = "The results under this patient ID name different persons."


def doubt(conn: Connection, study: Study, record: PatientRecord | None, *, must_agree: Sequence[str] = MUST_AGREE) -> str:
    """Why nobody may say whose this study is, by all rows that speak of it; '' if nothing speaks against it."""
    if reason := ambiguous(study, records.issuers_of(conn, study.patient.key.patient_id)):
        return reason
    return conflict(study, record, must_agree=must_agree)


def admitted(admissions: Admissions, keys: Sequence[PatientKey]) -> Patient | None:
    """Who admissions say that this is, the surviving key's word last; None where they say nothing."""
    said = Patient(keys[0])
    for _, line in sorted(admissions, key=lambda one: one[1].key == keys[0]):
        said = _told_too(said, line)
    return said if said != Patient(keys[0]) else None


def _told_too(known: Patient, line: Patient) -> Patient:
    return replace(known, **{name: said for name in ("name", "birth_date", "sex") if (said := getattr(line, name))})


def is_another(
    told: Patient, person: Patient, admissions: Admissions, keys: Sequence[PatientKey], *, at: datetime, must_agree: Sequence[str]
) -> bool:
    """Whether who was told to be so, at this time, is not this person, who has these keys.

    Where a feed has merged several, whoever an admission named under one of them is this person (an unknown in the emergency
    department, who gets a number and a name for the while); but only by the very words of that admission, in all that speaks against it.
    """
    against = contradictions(told, person, must_agree=must_agree)
    return bool(against) and not any(
        says_the_same(told, one, against) and not contradictions(told, one, must_agree=must_agree) for one in _names(admissions, keys, at)
    )


def _names(admissions: Admissions, keys: Sequence[PatientKey], at: datetime) -> Iterator[Patient]:
    """Who the admissions of each of several merged keys say that it is, and said at this time that a retired one was.

    Of the survivor, as of a patient who was never merged, only what is said now counts. A key that was first somebody else's and was
    taken by mistake names nobody by that.
    """
    for key in keys if len(keys) > 1 else ():
        said, states = Patient(key), list[tuple[datetime, Patient]]()
        for time, line in admissions:
            if line.key == key and (said := _told_too(said, line)) != Patient(key):
                states.append((time, said))
        yield from (said for _, said in states[-1:])
        then = [said for time, said in states if time <= at]
        if then and key != keys[0] and not contradictions(then[-1], states[0][1], must_agree=MUST_AGREE):
            yield then[-1]


def record_of(conn: Connection, study: Study, rule: RecordRule, *, must_agree: Sequence[str]) -> PatientRecord | None:
    """The patient's own record as of the study's time, or the bundle's horizon later: as much of it as `rule` asks for.

    What is made of it is what would be made of the whole: facts of before the look-back are read where nothing in time answers, for
    they say why; all facts where some may be another person's, and where there are few.
    """
    key, as_of = study.patient.key, study.study_at + timedelta(hours=rule.horizon_h)
    if records.has_few(conn, key):
        found = records.view(conn, key, as_of=as_of)
        return own(found, must_agree) if found else None
    since = study.study_at - timedelta(hours=max(rule.look_back_h, rule.history_h))
    codes = _codes((*rule.values, *rule.histories, *rule.record_texts))
    found = records.view(conn, key, as_of=as_of, codes=codes, since=since)
    if found is None:
        return None
    if any(disagreement(one, other, must_agree=must_agree) for one, other in combinations((found.patient, *found.told), 2)):
        found = records.view(conn, key, as_of=as_of)
        return own(found, must_agree) if found else None
    if older := _codes(unanswered(study, found, rule)):
        whole = records.view(conn, key, as_of=as_of, codes=older)
        found = _with(found, whole, older) if whole else None
    return found


def _codes(specs: Iterable[TextSpec | ValueSpec]) -> frozenset[tuple[str, str]]:
    return frozenset((code.value, code.scheme) for spec in specs for code in (spec.code, *spec.synonyms))


def _with(record: PatientRecord, whole: PatientRecord, codes: Collection[tuple[str, str]]) -> PatientRecord:
    """The record with all that is known under some codes."""

    def others(facts: Iterable[Observation]) -> list[Observation]:
        return [one for one in facts if (one.code.value, one.code.scheme) not in codes]

    observations = (*others(record.observations), *whole.observations)
    return replace(record, observations=observations, unusable=(*others(record.unusable), *whole.unusable))


def own(record: PatientRecord, must_agree: Sequence[str]) -> PatientRecord:
    """The record without the facts that came in another person's name; they are among the unusable."""

    @cache  # a patient has thousands of facts, and few names
    def is_of_another(told: Patient, at: datetime) -> bool:
        return is_another(told, record.patient, record.admissions, record.keys, at=at, must_agree=must_agree)

    others = [one for one in record.observations if one.told and is_of_another(one.told, _said_at(one))]
    if not others:
        return record
    gone = set(map(id, others))
    kept = tuple(one for one in record.observations if id(one) not in gone)
    return replace(record, observations=kept, unusable=(*record.unusable, *others))


def _said_at(fact: Observation) -> datetime:
    return fact.said_at or fact.received_at or fact.at


def _names_several(record: PatientRecord, must_agree: Sequence[str]) -> bool:
    """Whether facts that stand name different persons, and no admission tells which of them is the patient."""
    facts = (one for one in (*record.observations, *record.unusable) if one.status not in records.WITHDRAWN)
    told, admission = {one.told for one in facts if one.told}, admitted(record.admissions, record.keys or (record.patient.key,))
    if admission:
        told = {one for one in told if not disagreement(one, admission, must_agree=must_agree)}
    return any(disagreement(one, other, must_agree=must_agree) for one, other in combinations(told, 2))


def ambiguous(study: Study, issuers: Sequence[str]) -> str:
    """Why the images' patient ID names nobody: they say no issuer, and several know it. '' if it does."""
    if study.patient.key.issuer or len(issuers) < 2:
        return ""
    return f"The images name no issuer of the patient ID, and {len(issuers)} issuers know this ID: set site.issuer."


def conflict(study: Study, record: PatientRecord | None, *, must_agree: Sequence[str] = MUST_AGREE) -> str:
    """Why nobody may say whose this study is; '' if nothing speaks against it. Training leaves out what service discards.

    Its images name two patients, the results of the record name two and no admission tells which is meant, or the record cannot be of
    the person on the images, though ID and issuer agree.
    """
    if study.hold or record is None:
        return study.hold
    if _names_several(record, must_agree):
        return _SEVERAL
    if is_another(study.patient, record.patient, record.admissions, record.keys, at=study.study_at, must_agree=must_agree):
        return disagreement(study.patient, record.patient, must_agree=must_agree)
    return ""


def pending(
    study: Study, record: PatientRecord | None, inputs: Inputs, rule: RecordRule, *, now: datetime, trouble: str = ""
) -> Snooze | None:
    """What the study must wait for, if anything: its patient's record, what is wanted of it, the end of the time the bundle may use."""
    if study.completed_at is None:
        return None
    record_left = study.completed_at + timedelta(seconds=rule.wait_s) - now
    if record is None and record_left > timedelta() and not trouble:
        return RecordPending("The patient's record has not arrived yet.", delay_s=record_left.total_seconds())
    if trouble and record_left > timedelta():
        return Snooze(trouble, delay_s=min(PULL_S, record_left.total_seconds()))
    required, wanted = lacking(inputs, rule)
    if (required or wanted) and record_left > timedelta():
        names = ", ".join(code.meaning for code in (*required, *wanted))
        return Snooze(f"Values of the record that the bundle waits for are not there yet: {names}.", delay_s=record_left.total_seconds())
    # The network learned from all that was known at the horizon. A date of after the images came is a wrong one: it may not park a study.
    left = min(study.study_at, study.completed_at) + timedelta(hours=rule.horizon_h) - now
    if rule.horizon_h > 0 and left > timedelta():
        return Snooze("Values of after the study may still come, and the bundle uses them.", delay_s=left.total_seconds())
    return None


def lacking(inputs: Inputs, rule: RecordRule) -> tuple[tuple[Code, ...], tuple[Code, ...]]:
    """What `rule` requires and `inputs` does not have, and what it wants and `inputs` does not have; none is in both.

    A value whose code also names a history may be there while the other is not: each is asked for by itself.
    """
    asked = (
        (rule.values, {used.name for used in inputs.values}),
        (rule.histories, {used.name for used in inputs.histories}),
        (rule.texts, {used.name for used in inputs.texts}),
    )
    absent = [
        (spec.need, Code(spec.code.value, spec.code.scheme, spec.code.meaning))
        for specs, there in asked
        for spec in specs
        if spec.name not in there
    ]
    required = dict.fromkeys(code for need, code in absent if need == "required")
    wanted = dict.fromkeys(code for need, code in absent if need == "wanted" and code not in required)
    return tuple(required), tuple(wanted)


def incomplete(inputs: Inputs, rule: RecordRule) -> str:
    """What the bundle requires of the record and is not there, as a sentence; '' if all is. Training leaves such studies out."""
    required, _ = lacking(inputs, rule)
    if not required:
        return ""
    causes = dict(zip(inputs.missing, inputs.missing_causes, strict=True))
    said = "; ".join(f"{code.meaning}: {causes.get(code, 'not there')}" for code in required)
    return f"The bundle requires what the patient's record does not have. {said}."
