"""Every kind of report before dciodvfy, dsrdump, PixelMed and our own rules: no finding, or it may not be sent."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
from pydicom import Dataset

from tests import reports
from tests.reports import ALGORITHM, CRP, DRAWN_AT, EXAMPLES, INPUTS, Example
from worker.domain import Code, UsedValue

pytestmark = [pytest.mark.peer, pytest.mark.slow]

Gate = Callable[..., list[tuple[str, str]]]


@pytest.fixture
def gate(shared: Path, tmp_path: Path) -> Gate:
    """Run srgate.py, with PixelMed (some seconds each); a tool that is missing skips on a laptop and fails in CI."""
    missing = [tool for tool in ("dciodvfy", "dsrdump", "java") if shutil.which(tool) is None]
    missing += [] if Path("/usr/share/java/pixelmed.jar").exists() else ["pixelmed.jar"]
    if missing:
        said = f"validators not installed: {', '.join(missing)} (apt-get install dicom3tools dcmtk libpixelmed-java default-jre-headless)"
        if os.environ.get("CI"):
            pytest.fail(said)
        pytest.skip(said)
    spec = importlib.util.spec_from_file_location("srgate", shared / "tools" / "srgate.py")
    assert spec is not None
    assert spec.loader is not None
    srgate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(srgate)

    def validate(example: Example, *, java: bool = True) -> list[tuple[str, str]]:
        path = tmp_path / "report.dcm"
        path.write_bytes(example.document.data)
        return cast("list[tuple[str, str]]", srgate.validate(str(path), [str(source) for source in example.sources[:3]], java))

    return validate


@pytest.mark.parametrize("kind", EXAMPLES)
def test_no_kind_of_report_has_a_finding(kind: str, gate: Gate, tmp_path: Path) -> None:
    """Positive, uncertain, nothing found, could not be analysed."""
    assert gate(EXAMPLES[kind](tmp_path)) == []


def test_the_report_of_a_real_radiograph_has_no_finding(gate: Gate, shared: Path) -> None:
    """As it left a hospital, not as our factory makes it."""
    source = min((shared / "data" / "cxr-severity" / "dicom").glob("*/*.dcm"))
    assert gate(reports.report([source])) == []


def test_a_korean_report_that_replaces_another_has_no_finding(gate: Gate, tmp_path: Path) -> None:
    """UTF-8 from an empty first character set, local codes, every comparator, a unit that is no UCUM, Predecessor Documents."""

    def change(ds: Dataset) -> None:
        ds.SpecificCharacterSet = ["", "ISO 2022 IR 149"]
        ds.PatientName = "Hong^Gildong=洪^吉洞=홍^길동"

    source = reports.radiograph(tmp_path, change=change)
    first = reports.report([source])
    values = tuple(
        UsedValue("x", Code(f"X{n}", scheme, "혈액"), 3.0, symbol, unit, DRAWN_AT, "검사실")
        for n, (symbol, scheme, unit) in enumerate([("<", "L", "Stück/µl"), ("<=", "", "mg/L"), (">", "99HOSP", "1"), (">=", "urn:x", "")])
    )
    inputs = replace(INPUTS, values=(*values, UsedValue("crp", CRP, 0.1, "", "mg/L", DRAWN_AT, "")))
    second = reports.report(
        [source],
        study=reports.study_of(source, version=2),
        inputs=inputs,
        algorithm=replace(ALGORITHM, input_sha256="01" * 32, research_use=False),
        predecessor=first.document,
    )
    assert gate(second) == []


def test_the_gate_itself_finds_what_is_broken(gate: Gate, tmp_path: Path) -> None:
    """A gate that passes everything would pass all tests above."""
    good = reports.of_radiograph(tmp_path)
    broken = replace(good.document, data=good.document.data.replace(b"UNVERIFIED", b"VERIFIED  "))
    assert any("R12" in said for _, said in gate(Example(broken, good.sources), java=False))
