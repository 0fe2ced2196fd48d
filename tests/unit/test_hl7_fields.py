"""HL7 v2, characters: the sets between which a message switches, and bounded time on whatever comes. Synthetic patients only."""

from __future__ import annotations

import time
from contextlib import suppress

import pytest

from tests.unit.test_hl7 import PID, message, obx, read
from worker.errors import RecordError

NAME = "山田^太郎"


@pytest.mark.requirement("F9")
@pytest.mark.parametrize("charset", ["ISO IR87", "~ISO IR87", "ASCII~ISO IR87", "ISO IR14~ISO IR87~ISO IR159", "~ISO IR13~ISO IR87"])
def test_the_japanese_sets_are_switched_by_iso_2022(charset: str) -> None:
    """The bytes of kanji are those of '|' and '^' as well: what splits before it decodes loses fields."""
    update = read(message(f"PID|1||1^^^HOSP||{NAME}", trigger="ADT^A08", charset=charset, codec="iso2022_jp")).update
    assert update is not None
    assert update.patient.name == NAME


@pytest.mark.requirement("F9")
@pytest.mark.parametrize(
    ("charset", "name", "field"),
    [
        ("UNICODE UTF-8", "\x1b$B;3\x1b(B", "ISO 2022"),
        ("", "\x1b$B;3\x1b(B", "ISO 2022"),
        ("~ISO IR149", "\x1b$)C;3", "ISO 2022"),
        ("8859/1~ISO IR87", "\x1b$B;3\x1b(B", "ISO 2022"),
        ("~ISO IR87~ISO IR149", "\x1b$B;3\x1b(B", "not supported together"),
        ("~ISO IR87", "\x1b$B;3\rNTE|1", "iso2022_jp_ext"),
        ("~ISO IR87", "\x1b%G", "ISO 2022"),
        ("~ISO IR87", "\x1b$Bz\x7f", "iso2022_jp_ext"),
    ],
)
def test_other_switches_are_refused_in_words(charset: str, name: str, field: str) -> None:
    with pytest.raises(RecordError, match=field):
        read(message(f"PID|1||1^^^HOSP||{name}", trigger="ADT^A08", charset=charset, codec="ascii"))


@pytest.mark.requirement("F9")
@pytest.mark.parametrize(("charset", "escape"), [("8859/1", "XFC"), ("UNICODE UTF-8", "XC3BC"), ("GB 18030-2000", "XA8B9")])
def test_a_hexadecimal_escape_is_of_the_characters_of_msh_18(charset: str, escape: str) -> None:
    update = read(message(f"PID|1||1^^^HOSP||M\\{escape}\\ller", trigger="ADT^A08", charset=charset)).update
    assert update is not None
    assert update.patient.name == "Müller"


@pytest.mark.requirement("F8")
@pytest.mark.parametrize(
    "filling",
    ["|" * 100_000, "^" * 100_000, "~" * 100_000, "&" * 100_000, "\\" * 100_001, "\\X" * 50_000, "\\.br\\" * 40_000, "PID\r" * 10_000],
    ids=["fields", "components", "repetitions", "subcomponents", "escapes", "open escapes", "breaks", "segments"],
)
@pytest.mark.parametrize("where", ["ADT^A08", "ADT^A40", "ORU^R01", "ORM^O01", "MDM^T02"])
def test_a_message_of_separators_takes_no_longer_than_its_length(where: str, filling: str) -> None:
    rest = [f"MRG|{filling}", f"ORC|NW|{filling}", f"OBR|1||{filling}", f"TXA|1|{filling}", obx("CWE", filling), obx("TX", filling)]
    raw = message(f"PID|1||1^^^HOSP||{filling}", *rest, trigger=where)
    began = time.process_time()
    with suppress(RecordError):
        read(raw)
    assert time.process_time() - began < 2


def test_repeats_without_end_take_no_longer_than_their_number() -> None:
    """Each a fact or a line of its own; a join at every line would take the square of it."""
    raw = message(PID, "OBR|1||F7|LAB|||20200506", *[obx("TX", "a")] * 5_000, *[obx("NM", "3", code="x^y^L")] * 5_000)
    began = time.process_time()
    update = read(raw).update
    assert time.process_time() - began < 4
    assert update is not None
    assert len(update.observations) == 5_001
