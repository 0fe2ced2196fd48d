"""HL7 v2, documents: the words of one, from when they were written, until they are replaced. Synthetic patients only."""

from __future__ import annotations

import pytest

from tests.unit.test_hl7 import PID, message, read
from worker.domain import Code, Observation
from worker.errors import RecordError
from worker.intake.hl7 import DOCUMENTS, ParsedMessage

TEXTS = ("OBX|1|TX|||Lungs clear.||||||F", "OBX|2|FT|||Heart\\.br\\normal.||||||F")


def txa(**fields: str) -> str:
    """Make a signed discharge summary, with `f17="DI"` and the like."""
    known = {1: "1", 2: "DS", 4: "20200506060000", 12: "D1^HIS", 17: "AU", **{int(name[1:]): text for name, text in fields.items()}}
    return "|".join(["TXA", *(known.get(number, "") for number in range(1, 20))])


def parsed(*segments: str, trigger: str = "MDM^T02") -> ParsedMessage:
    return read(message("EVN|T02|20200506063000", PID, *segments, trigger=trigger))


def notes(*segments: str, trigger: str = "MDM^T02") -> tuple[Observation, ...]:
    found = parsed(*segments, trigger=trigger).update
    assert found is not None
    assert not found.has_demographics
    return found.observations


def note(*segments: str, trigger: str = "MDM^T02") -> Observation:
    (found,) = notes(*segments, trigger=trigger)
    return found


@pytest.mark.parametrize("trigger", sorted(DOCUMENTS - {"MDM^T11"}))
def test_a_document_is_one_text_under_its_own_number(trigger: str) -> None:
    found = note(txa(), *TEXTS, trigger=trigger)
    assert (found.kind, found.text, found.key) == ("text", "Lungs clear.\nHeart\nnormal.", "LAB|HOSP/document/D1^HIS")
    assert found.code == Code("DS", "HL70270", "")
    assert found.status == ("C" if trigger in ("MDM^T08", "MDM^T10") else "F")


@pytest.mark.parametrize(
    ("completion", "availability", "status"),
    [
        ("AU", "AV", "F"),
        ("LA", "", "F"),
        ("DI", "AV", "P"),
        ("IP", "", "P"),
        ("PA", "", "P"),
        ("AU", "UN", "P"),
        ("AU", "OB", "D"),
        ("AU", "CA", "D"),
        ("", "", "F"),
    ],
)
def test_only_what_somebody_signed_is_final(completion: str, availability: str, status: str) -> None:
    """Without TXA-17 the text's own OBX-11 says it."""
    assert note(txa(f17=completion, f19=availability), *TEXTS).status == status


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({}, "2020-05-06T05:00:00+00:00"),
        ({"f6": "20200506070000"}, "2020-05-06T06:00:00+00:00"),
        ({"f6": "20200506070000", "f7": "20200506080000", "f8": "20200506090000~20200506100000"}, "2020-05-06T09:00:00+00:00"),
        ({"f4": "", "f6": "20200505"}, "2020-05-05T22:59:59+00:00"),
        ({"f4": ""}, "2020-05-06T05:30:00+00:00"),
    ],
)
def test_a_document_counts_from_when_it_was_last_written(times: dict[str, str], expected: str) -> None:
    """Dictated of a study and edited the day after, it may hold what was only known the day after."""
    assert note(txa(**times), *TEXTS).at.isoformat() == expected


@pytest.mark.parametrize(
    ("kind", "obx_3", "code"),
    [
        ("DS", "18842-5^Discharge summary^LN", Code("18842-5", "LN", "Discharge summary")),
        ("11526-1^Pathology study^LN", "X^y^L", Code("11526-1", "LN", "Pathology study")),
        ("DS^Discharge summary", "X^y^L", Code("DS", "HL70270", "Discharge summary")),
        ("DS", "", Code("DS", "HL70270", "")),
        ("", "X^y", Code("X", "L", "y")),
    ],
)
def test_the_type_is_loinc_where_either_field_has_it(kind: str, obx_3: str, code: Code) -> None:
    assert note(txa(f2=kind), f"OBX|1|TX|{obx_3}||Lungs clear.||||||F").code == code


def test_a_replacement_withdraws_what_it_replaces() -> None:
    first = note(txa(), *TEXTS)
    second, withdrawn = notes(txa(f12="D2^HIS", f13="D1^HIS"), "OBX|1|TX|||Effusion.||||||F", trigger="MDM^T10")
    assert (second.text, second.status) == ("Effusion.", "C")
    assert (withdrawn.key, withdrawn.status, withdrawn.text) == (first.key, "D", "")


def test_a_replacement_under_the_same_number_needs_no_withdrawal() -> None:
    assert note(txa(f13="D1^HIS"), *TEXTS, trigger="MDM^T10").key == note(txa(), *TEXTS).key


def test_an_addendum_stands_beside_its_document() -> None:
    first, later = note(txa(), *TEXTS), note(txa(f13="D1^HIS"), *TEXTS, trigger="MDM^T06")
    other = note(txa(f12="D2^HIS", f13="D1^HIS"), *TEXTS, trigger="MDM^T06")
    assert len({first.key, later.key, other.key}) == 3


def test_a_cancelled_document_is_withdrawn() -> None:
    withdrawn = note(txa(), trigger="MDM^T11")
    assert (withdrawn.key, withdrawn.status, withdrawn.text) == (note(txa(), *TEXTS).key, "W", "")


def test_a_signature_that_comes_later_is_of_the_same_document() -> None:
    assert note(txa(f17="DI"), *TEXTS).key == note(txa(), *TEXTS, trigger="MDM^T04").key


@pytest.mark.parametrize(
    "segment",
    [
        "OBX|1|ED|||^application^pdf^Base64^JVBERi0xLjQ=||||||F",
        "OBX|1|HD|113014^DICOM Study^DCM||1.2.840||||||O",
        "OBX|1|TX|||not yet||||||O",
        "OBX|1|TX|||wrong||||||W",
        "OBX|1|NM|||3||||||F",
    ],
)
def test_what_is_no_text_of_the_document_is_counted(segment: str) -> None:
    found = parsed(txa(), segment)
    assert (found.update, found.skipped) == (None, 1)
    assert found.note == "The document has no text that can be read."
    assert note(txa(), segment, *TEXTS).text == "Lungs clear.\nHeart\nnormal."


def test_texts_before_txa_are_of_the_order() -> None:
    assert note("OBR|1||F7|LAB", "OBX|1|TX|||no||||||F", txa(), *TEXTS).text == "Lungs clear.\nHeart\nnormal."


@pytest.mark.parametrize(
    ("segments", "trigger", "field"),
    [
        (TEXTS, "MDM^T02", "TXA"),
        ((txa(), txa(), *TEXTS), "MDM^T02", "TXA"),
        ((txa(f17="ZZ"), *TEXTS), "MDM^T02", "TXA-17"),
        ((txa(f17=""), "OBX|1|TX|||x"), "MDM^T02", "TXA-17"),
        ((txa(f6="soon"), *TEXTS), "MDM^T02", "TXA-6"),
        ((txa(f2=""), *TEXTS), "MDM^T02", "TXA-2"),
        ((txa(f12=""),), "MDM^T11", "TXA-12"),
        ((PID, txa(), *TEXTS), "MDM^T02", "PID"),
    ],
)
def test_a_document_that_cannot_be_placed_is_refused(segments: tuple[str, ...], trigger: str, field: str) -> None:
    with pytest.raises(RecordError, match=field):
        parsed(*segments, trigger=trigger)


@pytest.mark.parametrize("trigger", ["MDM^T01", "MDM^T03", "MDM^T05", "MDM^T09"])
def test_a_notification_without_words_is_not_used(trigger: str) -> None:
    assert parsed(txa(), trigger=trigger).update is None


def test_a_document_without_a_number_is_known_by_its_type_and_time() -> None:
    first, second = note(txa(f12=""), *TEXTS), note(txa(f12="", f4="20200507"), *TEXTS)
    assert first.key != second.key
    assert "DS/2020-05-06" in first.key


@pytest.mark.requirement("F6")
def test_no_document_number_is_the_beginning_of_another() -> None:
    """Document 77 is withdrawn, 77/2 is not."""
    one, other = (note(txa(f12=number), *TEXTS).key for number in ("77", "77/2"))
    assert not other.startswith(f"{one}/")
    unnumbered = note(txa(f12="", f2="77"), *TEXTS).key
    assert not unnumbered.startswith(f"{one}/")
