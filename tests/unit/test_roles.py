"""What the roles make of odd input, without a process."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Captured
from worker import daemon, roles
from worker.config import Config, ConfigError, Site
from worker.domain import Header, Patient, PatientKey
from worker.intake.header import InstanceRefused, read_header
from worker.reception import study_time
from worker.record_feeds import identified

EAST = timezone(timedelta(hours=1))

SITE = Config(site=Site(issuer="SITE"))


def header(**values: str) -> Header:
    return Header("1", "1.1", "1", "1.9", "1.9.1", Patient(PatientKey("", "P")), **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("date", "time", "offset", "instant"),
    [
        ("20240102", "103000", "", datetime(2024, 1, 2, 9, 30, tzinfo=UTC)),
        ("20240102", "103000.123", "-0500", datetime(2024, 1, 2, 15, 30, tzinfo=UTC)),
        ("20240102", "10", "+0000", datetime(2024, 1, 2, 10, tzinfo=UTC)),
        ("20240102", "", "", datetime(2024, 1, 1, 23, tzinfo=UTC)),
        ("", "103000", "", None),
        ("20241399", "103000", "", None),
        ("00010101", "000000", "", None),
        ("00010101", "120000", "+0000", None),
        ("18941231", "235959", "+0000", None),
        ("99991231", "235900", "-0500", None),
    ],
)
def test_a_study_is_dated_in_its_own_offset_or_the_sites_or_not_at_all(date: str, time: str, offset: str, instant: datetime | None) -> None:
    assert study_time(header(study_date=date, study_time=time, timezone_offset=offset), EAST) == instant


def test_only_a_patient_without_an_issuer_gets_the_sites() -> None:
    assert identified(header(), SITE).patient.key == PatientKey("SITE", "P")
    other = Header("1", "1.1", "1", "1.9", "1.9.1", Patient(PatientKey("X", "P")))
    assert identified(other, SITE).patient.key.issuer == "X"


def test_a_patient_id_of_two_values_is_refused_at_the_door() -> None:
    """Acknowledged, it would be refused later and for good: LO of Patient ID has one value (PS3.3 §C.7.1.1)."""
    elements = b"".join(
        tag + vr + len(value).to_bytes(2, "little") + value
        for tag, vr, value in (
            (b"\x08\x00\x16\x00", b"UI", b"1.2\0"),
            (b"\x08\x00\x18\x00", b"UI", b"1.3\0"),
            (b"\x10\x00\x20\x00", b"LO", b"A\\2 "),
            (b"\x20\x00\x0d\x00", b"UI", b"1.4\0"),
            (b"\x20\x00\x0e\x00", b"UI", b"1.5\0"),
        )
    )
    with pytest.raises(InstanceRefused, match="more than one value"):
        read_header(elements, "1.2.840.10008.1.2.1")
    assert read_header(elements.replace(b"A\\2 ", b"A-2 "), "1.2.840.10008.1.2.1").patient.key.patient_id == "A-2"


def test_a_package_is_absent_while_others_are_imported_without_it_and_there_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """MONAI must not bring transformers into every worker; a bundle with a BERT-type encoder must still find it."""
    monkeypatch.delitem(sys.modules, "wave", raising=False)
    with roles._without("wave"), pytest.raises(ModuleNotFoundError):
        import_module("wave")
    there = import_module("wave")
    with roles._without("wave"):
        assert import_module("wave") is there, "what was imported already stays"


def test_a_role_for_which_there_is_no_process_now_waits_and_the_others_go_on(captured: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the kernel killed one for its memory, the next fork may fail as well: no reason to end the receiver."""
    tries: list[object] = []

    def popen(*_: object, **__: object) -> Any:
        tries.append(0)
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(subprocess, "Popen", popen)
    supervisor = daemon.Supervisor([daemon.Child("run", ["none"])])
    for _ in range(3):
        supervisor._look_after(supervisor.children[0])
    (told,) = captured.named("role.restarted")
    assert (told["role"], told["code"], told["pause_s"], len(tries)) == ("run", errno.ENOMEM, 1.0, 1)


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.EADDRINUSE, OSError, "127.0.0.1:104, [records] port. Is synoptic running already?"),
        (errno.EACCES, ConfigError, "[records] port: 104 is for root alone"),
        (errno.EADDRNOTAVAIL, ConfigError, "[records] host: 127.0.0.1 is no address of this host"),
    ],
)
def test_a_port_that_cannot_be_listened_on_names_its_key(number: int, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind) as told, daemon._bound("records", "127.0.0.1", 104):
        raise OSError(number, os.strerror(number))
    assert words in str(told.value)


def test_a_data_folder_that_cannot_be_made_names_its_key(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for data in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=rf"\[site\] data: the folder {data} cannot be made"):
            daemon.open_store(Config(site=Site(data=data)))
