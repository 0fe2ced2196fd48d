"""HL7 v2, orders: which study, how urgent, why, and whether it stands. Synthetic patients only."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from tests.unit.test_hl7 import PID, message, read
from worker.domain import ROUTINE, STAT, Observation, Order
from worker.errors import RecordError
from worker.intake.hl7 import ParsedMessage

ORC = "ORC|NW|P1^HIS|F1^RIS"


def obr(**fields: str) -> str:
    """Make an OBR of a chest CT, with `f18="A1"` and the like."""
    known = {2: "P1^HIS", 3: "F1^RIS", 4: "24627-2^CT chest^LN", 24: "CT", **{int(name[1:]): text for name, text in fields.items()}}
    return "|".join(["OBR", *(known.get(number, "") for number in range(1, 32))])


def parsed(*segments: str, trigger: str = "ORM^O01") -> ParsedMessage:
    return read(message(PID, *segments, trigger=trigger))


def said(*segments: str, trigger: str = "ORM^O01") -> tuple[tuple[Order, ...], tuple[Observation, ...]]:
    found = parsed(*segments, trigger=trigger).update
    assert found is not None
    assert not found.has_demographics
    return found.orders, found.observations


def order(*segments: str, trigger: str = "ORM^O01") -> Order:
    (found,) = said(*segments, trigger=trigger)[0]
    return found


@pytest.mark.parametrize("trigger", ["ORM^O01", "OMG^O19", "OMI^O23"])
def test_an_order_names_its_study_and_its_numbers(trigger: str) -> None:
    assert order(ORC, obr(f18="A1"), trigger=trigger) == Order("A1", placer="P1", filler="F1", priority=ROUTINE)


@pytest.mark.parametrize(
    ("segments", "accession_number"),
    [
        ((obr(f18="A1", f20="S1"), "IPC|I1"), "I1"),
        ((obr(f18="A1", f20="S1"),), "A1"),
        # OBR-20 is the scheduled procedure step of IHE.
        ((obr(f20="S1"),), "F1"),
        ((obr(f3=""),), "F1"),
    ],
)
def test_the_accession_number_is_that_of_ipc_else_of_obr_18_else_the_fillers(segments: tuple[str, ...], accession_number: str) -> None:
    assert order(ORC, *segments, trigger="OMI^O23").accession_number == accession_number


@pytest.mark.parametrize(
    ("segments", "priority"),
    [
        ((ORC, obr()), ROUTINE),
        ((ORC, "TQ1|1||||||||S", obr()), STAT),
        ((ORC, obr(), "TQ1|1||||||||R", "TQ1|2||||||||S^Stat^HL70485"), STAT),
        ((f"{ORC}||||1^^^20200506^^S", obr()), STAT),
        ((f"{ORC}||||1^^^^^R~1^^^^^A", obr()), STAT),
        ((ORC, obr(f27="1^^^20200506^^stat")), STAT),
        ((ORC, obr(f5="S")), STAT),
        ((ORC, obr(f5="ASAP")), STAT),
        # One field left at its default must not hide the other.
        ((ORC, "TQ1|1||||||||R", obr(f5="S")), STAT),
        ((ORC, "TQ1|1||||||||R", obr(f5="R", f27="^^^^^T")), ROUTINE),
        ((ORC, "TQ1|1||||||||P", obr(f5="PRN")), ROUTINE),
    ],
)
def test_an_order_is_as_urgent_as_any_of_its_fields_says(segments: tuple[str, ...], priority: int) -> None:
    assert order(*segments).priority == priority


@pytest.mark.parametrize("control", ["NW", "SN", "XO", "SC", "RO"])
def test_the_order_stands(control: str) -> None:
    assert not order(ORC.replace("NW", control), obr()).is_cancelled


@pytest.mark.parametrize("control", ["CA", "OC", "CR", "DC", "OD", "RP"])
@pytest.mark.parametrize("detail", [(), (obr(f31="R07.9^pneumonia?^I10"),)])
def test_a_cancelled_order_takes_its_reasons_back(control: str, detail: tuple[str, ...]) -> None:
    """An order is cancelled when it was placed for the wrong patient, too: then its reason was somebody else's."""
    _, reasons = said(ORC, obr(f31="R07.9^pneumonia?^I10", f13="cough"))
    (cancelled,), withdrawn = said(ORC.replace("NW", control), *detail)
    assert cancelled.is_cancelled
    assert (cancelled.placer, cancelled.filler) == ("P1", "F1")
    assert {fact.key for fact in withdrawn} == {fact.key for fact in reasons}
    assert {(fact.status, fact.text) for fact in withdrawn} == {("D", "")}


def test_a_status_of_cancelled_cancels() -> None:
    assert order("ORC|SC|P1|F1||CA", obr()).is_cancelled


def test_the_reason_and_the_clinical_information_become_texts() -> None:
    _, (reason, clinical) = said(
        f"{ORC}||||||20200505120000", obr(f31="R07.9^Chest pain^I10~^fall from a ladder", f13="cough \\T\\ fever~smoker", f7="20200506")
    )
    assert (reason.code.value, reason.code.scheme, reason.kind, reason.text) == ("18785-6", "LN", "text", "Chest pain\nfall from a ladder")
    assert (clinical.code.value, clinical.code.scheme, clinical.kind, clinical.text) == ("55752-0", "LN", "text", "cough & fever\nsmoker")
    assert {fact.at for fact in (reason, clinical)} == {datetime(2020, 5, 5, 11, tzinfo=UTC)}
    assert reason.key == "LAB|HOSP/P1^HIS/LN/18785-6"
    assert clinical.key != reason.key


def test_clinical_information_may_be_coded() -> None:
    _, (clinical,) = said(ORC, obr(f13="F^Fasting^HL70916"))
    assert clinical.text == "Fasting"


@pytest.mark.parametrize(("f7", "hour"), [("20200506020000", 1), ("", 5)])
def test_a_reason_without_orc_9_counts_from_obr_7_else_from_the_message(f7: str, hour: int) -> None:
    _, (reason,) = said(ORC, obr(f31="^cough", f7=f7))
    assert (reason.at.hour, reason.at.minute) == (hour, 0 if f7 else 30)


@pytest.mark.parametrize(
    "detail",
    [obr(f24="LAB"), obr(f24="PT"), obr(f24=""), "RXO|1", "NTE|1||CT"],
)
def test_an_order_that_is_none_of_imaging_is_counted_and_not_used(detail: str) -> None:
    """Its reason would stand as that of a radiological study."""
    found = parsed(ORC, detail)
    assert (found.update, found.skipped) == (None, 1)
    assert "OBR-24" in found.note


@pytest.mark.parametrize("detail", [(obr(f24="rad"),), (obr(f24="", f18="A1"),), (obr(f24=""), "IPC|A1")])
def test_a_section_or_an_accession_number_makes_it_one_of_imaging(detail: tuple[str, ...]) -> None:
    assert order(ORC, *detail).filler == "F1"


def test_an_imaging_order_message_needs_no_section() -> None:
    assert order(ORC, obr(f24=""), trigger="OMI^O23").accession_number == "F1"


@pytest.mark.parametrize("control", ["HD", "UC", "AF", "", "ZZ"])
def test_a_request_that_changes_nothing_is_counted(control: str) -> None:
    assert parsed(f"ORC|{control}|P1|F1", obr(f18="A1")).skipped == 1


def test_each_order_of_a_message_has_its_own_detail() -> None:
    found, reasons = said(
        ORC,
        obr(f18="A1", f31="^cough"),
        obr(f2="P2", f3="F2", f18="A2", f31="^fall"),
        "ORC|CA|P3|F3",
        "TQ1|1||||||||S",
        obr(f2="", f3="", f18="A3"),
    )
    assert [(one.accession_number, one.placer, one.filler, one.priority, one.is_cancelled) for one in found] == [
        ("A1", "P1", "F1", ROUTINE, False),
        ("A2", "P2", "F2", ROUTINE, False),
        ("A3", "P3", "F3", STAT, True),
    ]
    assert len({fact.key for fact in reasons}) == len(reasons) == 4


@pytest.mark.parametrize(
    ("segments", "field"), [((f"{ORC}||||||soon", obr(f31="^cough")), "ORC-9"), ((ORC, obr(f31="^cough", f7="soon")), "OBR-7")]
)
def test_a_time_that_is_none_is_refused(segments: tuple[str, ...], field: str) -> None:
    with pytest.raises(RecordError, match=field):
        parsed(*segments)


def test_an_order_of_nobody_is_refused() -> None:
    with pytest.raises(RecordError, match="PID"):
        read(message(ORC, obr(f18="A1"), trigger="ORM^O01"))
