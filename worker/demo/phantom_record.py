"""The phantom patients' record: HL7 v2.5.1 messages and the words of their notes.

Same shape as messages of a laboratory system: ADT^A01, then one ORU^R01 per draw, OBX of type NM (or SN at
a detection limit) with LOINC codes and UCUM units, the note as one OBX of type TX. HL7 v2.5.1 §2.14, §7.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final

import numpy as np

_RISK: Final = (
    "smoker, {n} pack-years",
    "heavy smoker for {n} years",
    "smokes a pack a day since youth",
    "active tobacco use, about {n} cigarettes daily",
    "longstanding nicotine abuse",
    "former smoker who quit last year after {n} pack-years",
    "worked {n} years with asbestos insulation",
    "occupational asbestos exposure in a shipyard",
    "underground uranium miner for {n} years",
    "continues to smoke despite advice",
)
_NO_RISK: Final = (
    "never smoker",
    "has never smoked",
    "denies any tobacco use",
    "no history of smoking, no asbestos exposure",
    "lifelong non-smoker",
    "no occupational exposure and no nicotine",
    "does not smoke",
    "negative for tobacco or asbestos",
    "without any smoking history",
    "never worked with asbestos, never smoked",
)
#: True of both kinds of patient: words of risk that are not the patient's.
_DISTRACTORS: Final = (
    "Father was a heavy smoker and died of a stroke",
    "Wife smokes at home, {n} cigarettes daily",
    "Brother worked with asbestos",
    "Counselled on the harm of tobacco in general",
    "No known allergies",
    "No fever, no night sweats",
    "Denies chest pain",
    "Takes ramipril and a statin",
    "Appendectomy in childhood",
    "Retired teacher, lives alone",
    "Walks {n} km a week",
    "Cough for {n} days, now better",
)
_REASONS: Final = (
    "Chronic cough",
    "Dyspnea on exertion",
    "Follow-up of an opacity",
    "Weight loss",
    "Pre-operative work-up",
    "Check of a known nodule",
)

#: Code, name, unit; a foreign unit with its factor; how the healthy and the ill are spread: mean and sigma of the log.
_OTHERS: Final = (
    ("1988-5", "C reactive protein [Mass/volume] in Serum or Plasma", "mg/L", "mg/dL", 0.1, 1.8, 1.0),
    ("718-7", "Hemoglobin [Mass/volume] in Blood", "g/dL", "g/L", 10.0, 2.6, 0.12),
    ("6690-2", "Leukocytes [#/volume] in Blood by Automated count", "10*3/uL", "10*9/L", 1.0, 2.0, 0.3),
    ("2160-0", "Creatinine [Mass/volume] in Serum or Plasma", "mg/dL", "umol/L", 88.4, -0.1, 0.3),
)
_MARKER: Final = "2039-6^Carcinoembryonic Ag [Mass/volume] in Serum or Plasma^LN"
_DETECTION_LIMIT: Final = 0.6  # ng/mL; below it the laboratory writes "<0.6"

Pid = tuple[str, str, str, str, str]


@dataclass(frozen=True, slots=True)
class LabDraw:
    """One ORU^R01: the marker (ng/mL) with its OBX-11 status, other analytes, or a note."""

    at: datetime
    marker: float | None = None
    status: str = "F"
    others: bool = False
    note: str = ""


def note_text(rng: np.random.Generator, *, risk: bool) -> str:
    """Write a note; whether the patient bears a risk is said once, among sentences that prove nothing."""
    fact = str(rng.choice(_RISK if risk else _NO_RISK))
    opening = str(rng.choice(("History: ", "Social history: ", "Patient is a ", "Anamnesis: ", "")))
    if opening == "Patient is a " and not fact.startswith(("smoker", "heavy", "former", "never smoker", "lifelong", "underground")):
        opening = "Patient "
    sentences = [opening + fact, *(str(s) for s in rng.choice(_DISTRACTORS, size=int(rng.integers(2, 5)), replace=False))]
    rng.shuffle(sentences)
    filled = [s.format(n=int(rng.integers(11, 48))) for s in (str(rng.choice(_REASONS)), *sentences)]
    return ". ".join(s[0].upper() + s[1:] for s in filled) + "."


def adt_message(pid: Pid, at: datetime) -> str:
    """Build the admission, ADT^A01^ADT_A01."""
    stamp = _stamp(at)
    return _segments(_msh("ADT", stamp, "ADT^A01^ADT_A01", f"A{pid[0]}"), f"EVN|A01|{stamp}", _pid(pid), _pv1(pid))


def oru_message(rng: np.random.Generator, pid: Pid, *, number: int, draw: LabDraw) -> str:
    """Build the results of one draw, or a note, as ORU^R01^ORU_R01."""
    stamp = _stamp(draw.at)
    order = f"{pid[0]}{number:02d}"
    service = "NOTE^Note^L" if draw.note else "LAB^Laboratory^L"
    obx: list[tuple[str, str, str, str, str]] = []  # type, code, value, unit, status
    if draw.note:
        code = rng.choice(["34109-9^Note^LN", "11488-4^Consult note^LN"])
        obx.append(("TX", str(code), draw.note, "", draw.status))
    if draw.marker is not None:
        unit = "ng/mL" if rng.random() < 0.7 else "ug/L"
        if draw.marker < _DETECTION_LIMIT:
            obx.append(("SN", _MARKER, f"<^{_DETECTION_LIMIT}", unit, draw.status))
        else:
            obx.append(("NM", _MARKER, f"{draw.marker:.2f}", unit, draw.status))
    if draw.others:
        for code, name, unit, foreign, factor, mean, sigma in _OTHERS:
            abroad = rng.random() < 0.2
            value = float(np.exp(rng.normal(mean, sigma))) * (factor if abroad else 1.0)
            if rng.random() < 0.9:
                obx.append(("NM", f"{code}^{name}^LN", f"{value:.2f}", foreign if abroad else unit, draw.status))
    lines = [
        f"OBX|{index}|{kind}|{code}||{value}|{f'{unit}^{unit}^UCUM' if unit else ''}|||||{status}|||{stamp}"
        for index, (kind, code, value, unit, status) in enumerate(obx, start=1)
    ]
    return _segments(
        _msh("LAB", stamp, "ORU^R01^ORU_R01", f"L{order}"), _pid(pid), _pv1(pid), f"OBR|1||{order}|{service}|||{stamp}", *lines
    )


def _stamp(at: datetime) -> str:
    return at.strftime("%Y%m%d%H%M%S")


def _segments(*lines: str) -> str:
    return "".join(line + "\r" for line in lines)


def _msh(application: str, stamp: str, message_type: str, control_id: str) -> str:
    return rf"MSH|^~\&|{application}|SYNOPTIC-DEMO|SYNOPTIC|RAD|{stamp}||{message_type}|{control_id}|P|2.5.1|||AL|NE||UNICODE UTF-8"


def _pid(pid: Pid) -> str:
    patient_id, issuer, name, birth_date, sex = pid
    return f"PID|1||{patient_id}^^^{issuer}^MR||{name}||{birth_date}|{sex}"


def _pv1(pid: Pid) -> str:
    return f"PV1|1|I|||||||||||||||||V{pid[0]}"
