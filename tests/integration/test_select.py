"""`synoptic select` on a real database: each series, taken or not, and the rule that decided; nothing of the patient."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.record_site import Site, installed, line_with
from worker.domain import Header, ImageFacts, Patient, PatientKey
from worker.store import studies

AT = datetime(2024, 1, 2, 11, 30, tzinfo=UTC)
WHO = Patient(PatientKey("SITE", "P-7731"), "Zyxhuber^Quillon", "19330224", "F")
FILM = Header(
    "1.2.840.10008.5.1.4.1.1.1", "", "1.2.840.10008.1.2.1", "2.25.1", "", WHO, accession_number="ACC-1", modality="CR", view="AP",
    series_description="Zyxhuber chest", facts=ImageFacts(image_type=("DERIVED", "PRIMARY"), body_part="CHEST", age_years=90.0),
)  # fmt: skip
SENT = (
    replace(FILM, view="LL"),
    replace(FILM, series_description="Thorax seitlich Zyxhuber"),
    FILM,
    replace(FILM, facts=ImageFacts(image_type=("DERIVED", "SECONDARY", "ZYXHUBER"))),
    replace(FILM, modality="SR", sop_class_uid="1.2.840.10008.5.1.4.1.1.88.33"),
    FILM,
)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with installed(tmp_path) as made:
        for number, header in enumerate(SENT, 1):
            one = replace(header, series_instance_uid=f"2.25.1.{number}", sop_instance_uid=f"2.25.1.{number}.1")
            with made.store.begin() as conn:
                studies.add_instance(conn, one, path=Path(f"{number}"), sha256=f"{number}", size_bytes=1, calling_ae="CT", address="",
                                     study_at=AT, quiet_s=1, now=AT)  # fmt: skip
        yield made


@pytest.mark.requirement("P9")
def test_each_series_is_named_with_the_rule_that_decided_in_eighty_columns(site: Site) -> None:
    code, said = site.run("select", "1", columns="80")
    assert code == 0
    assert max(map(len, said.splitlines())) <= 80
    assert "cxr-severity 0.1.0, image 'image' (radiograph): series 3" in said
    assert line_with(said, "view AP or PA").startswith("1 CR 1")
    assert "excluded word 'seitlich'" in " ".join(said.split())
    assert line_with(said, "yes") == "3 CR 1 yes 1 image"
    assert "fits as well as series 3, which has the smaller UID" in " ".join(said.split())
    assert "SR is not CR or DX" in " ".join(said.split())


def test_a_program_gets_the_same_with_uids_and_scores(site: Site) -> None:
    code, said = site.run("select", "ACC-1", "--bundle", "cxr-severity", "--json")
    facts = json.loads(said)
    assert code == 0
    (image,) = facts["bundles"][0]["images"]
    assert (facts["is_complete"], image["taken"], len(image["series"])) == (False, 3, 6)
    assert [one["taken"] for one in image["series"]] == [False, False, True, False, False, False]
    assert image["series"][3]["because"] == "derived: Image Type is DERIVED\\SECONDARY\\…"
    assert image["series"][2]["series_instance_uid"] == "2.25.1.3"


@pytest.mark.requirement("X1")
def test_nothing_that_names_the_patient_is_printed(site: Site) -> None:
    for words in ((), ("--json",)):
        said = site.run("select", "1", *words)[1].casefold()
        assert not any(word.casefold() in said for word in ("Zyxhuber", "Quillon", "P-7731", "19330224"))


def test_a_study_or_bundle_that_is_not_here_is_said_with_the_exit_code_of_nothing_found(site: Site) -> None:
    assert site.run("select", "99") == (3, "There is no such study here. `synoptic studies` lists those there are.\n")
    code, said = site.run("select", "1", "--bundle", "phantom")
    assert (code, said.strip()) == (3, "There is no such bundle in [run] bundles; there are: cxr-severity.")


def test_the_help_says_how_a_tie_is_decided(site: Site) -> None:
    said = " ".join(site.run("select", "--help")[1].split())
    assert "smaller UID" in said
    assert "Example: synoptic select 12 --bundle phantom" in said
