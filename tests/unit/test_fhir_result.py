"""A result as FHIR: valid R4 in each of its forms, created once, complete, and where it looked to the millimeter."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset

from tests import factories, reports
from tests.fhir_r4 import validated
from tests.reports import ALGORITHM, FINDINGS, INPUTS
from worker.domain import Finding, Region
from worker.report import codes, content, fhir, sr
from worker.report.result import Result

Json = dict[str, Any]
SELECTION = "http://hl7.org/fhir/5.0/StructureDefinition/extension-ImagingSelection."


def bundle(result: Result) -> Json:
    """The transaction, valid and with every reference within it leading somewhere."""
    [document] = fhir.build(result)
    assert (document.kind, document.sop_class_uid) == ("fhir", "")
    whole: Json = json.loads(document.data)
    validated(whole)
    urls = [entry["fullUrl"] for entry in whole["entry"]]
    assert len(set(urls)) == len(urls)
    assert set(_references(whole)) <= set(urls)
    return whole


def _references(value: object) -> Sequence[str]:
    if isinstance(value, dict):
        own = [value["reference"]] if "reference" in value else []
        return [*own, *(one for child in value.values() for one in _references(child))]
    return [one for child in value for one in _references(child)] if isinstance(value, list) else []


def of(whole: Json, kind: str) -> list[Json]:
    """Its resources of one type."""
    return [entry["resource"] for entry in whole["entry"] if entry["resource"]["resourceType"] == kind]


def coded(concept: Json) -> tuple[str, str]:
    """System and code."""
    [coding] = concept["coding"]
    return coding["system"], coding["code"]


def test_the_validator_finds_what_is_wrong(tmp_path: Path) -> None:
    """A check that cannot fail proves nothing."""
    whole = bundle(reports.result([reports.radiograph(tmp_path)]))
    [observation, _] = of(whole, "Observation")
    changes: tuple[Json, ...] = ({"status": "amende"}, {"issued": "2024"}, {"foo": 1}, {"component": [{}]})
    for change in changes:
        with pytest.raises(ValueError, match=next(iter(change))):
            validated(observation | change)
    with pytest.raises(ValueError, match="code"):
        validated({key: value for key, value in observation.items() if key != "code"})


def test_a_result_is_a_report_an_observation_a_finding_and_the_device_that_says_so(tmp_path: Path) -> None:
    result = reports.result([reports.radiograph(tmp_path)])
    whole = bundle(result)
    assert [entry["resource"]["resourceType"] for entry in whole["entry"]] == [
        "Device", "Observation", "Observation", "DiagnosticReport"]  # fmt: skip
    [device], [report], observations = of(whole, "Device"), of(whole, "DiagnosticReport"), of(whole, "Observation")
    assert device["identifier"] == [{"system": "urn:dicom:uid", "value": f"urn:oid:{result.uids.device_uid}"}]
    assert (device["modelNumber"], device["version"][0]["value"], device["serialNumber"]) == ("chest-fusion", "0.1.0", "ab" * 32)
    assert report["identifier"] == [{"system": "urn:dicom:uid", "value": f"urn:oid:{result.uids.sop_instance_uid}"}]
    assert (report["status"], report["issued"]) == ("preliminary", "2026-11-21T02:02:03.456+01:00")
    assert report["effectiveDateTime"] == "2024-01-02T10:30:00.000+01:00"
    assert report["conclusion"].startswith(content.outcome(FINDINGS, failure="")[1])
    assert "For research use only" in report["conclusion"]
    assert coded(report["conclusionCode"][0]) == ("http://dicom.nema.org/resources/ontology/DCM", "111242")
    assert [one["reference"] for one in report["result"]] == [whole["entry"][1]["fullUrl"], whole["entry"][2]["fullUrl"]]
    study = {"system": "urn:dicom:uid", "value": f"urn:oid:{result.study.study_instance_uid}"}
    assert report["imagingStudy"] == [{"type": "ImagingStudy", "identifier": study}]
    for one in (report, *observations):
        assert one["subject"] == {"type": "Patient", "identifier": {"value": "F-0001", "assigner": {"display": "FACTORY"}}}
        assert [order["identifier"]["value"] for order in one["basedOn"]] == ["A-0002"]
    pneumonia, effusion = observations
    assert pneumonia["device"]["reference"] == whole["entry"][0]["fullUrl"]
    assert coded(pneumonia["code"]) == ("http://snomed.info/sct", "233604007")
    assert coded(pneumonia["valueCodeableConcept"]) == ("http://snomed.info/sct", "10828004")
    assert [coded(one)[1] for one in pneumonia["interpretation"]] == ["POS"]
    assert [coded(one)[1] for one in effusion["interpretation"]] == ["NEG"]
    said = {coded(one["code"])[1]: (one["valueQuantity"]["value"], one["valueQuantity"]["code"]) for one in pneumonia["component"]}
    assert said == {
        "122157": (73.21, "%"),
        "threshold": (50.0, "%"),
        "shapley-image": (1.3123, "{log-odds}"),
        "shapley-values": (-0.2, "{log-odds}"),
        "shapley-text": (0.0, "{log-odds}"),
    }
    assert pneumonia["identifier"][1]["value"] == f"urn:oid:{content.tracking_uid(result.study, ALGORITHM, FINDINGS[0])}"


def test_each_resource_is_created_unless_one_with_its_identifier_is_there(tmp_path: Path) -> None:
    result = reports.result([reports.radiograph(tmp_path)])
    whole = bundle(result)
    for entry in whole["entry"]:
        own = entry["resource"]["identifier"][0]
        assert entry["request"] == {
            "method": "POST",
            "url": entry["resource"]["resourceType"],
            "ifNoneExist": f"identifier={own['system']}|{own['value']}",
        }
    uids = [entry["resource"]["identifier"][0]["value"] for entry in whole["entry"]]
    assert len(set(uids)) == len(uids)
    assert fhir.build(result) == fhir.build(reports.result([reports.radiograph(tmp_path)]))
    assert not {"Patient", "ImagingStudy", "ServiceRequest"} & {entry["resource"]["resourceType"] for entry in whole["entry"]}


def test_a_replacement_is_amended_and_names_what_it_replaces(tmp_path: Path) -> None:
    first = reports.of_radiograph(tmp_path).document
    changed = replace(ALGORITHM, input_sha256="01" * 32)
    result = reports.result([reports.radiograph(tmp_path)], algorithm=changed, predecessor=first)
    before = bundle(reports.result([reports.radiograph(tmp_path)]))
    whole = bundle(result)
    [report] = of(whole, "DiagnosticReport")
    assert report["status"] == "amended"
    assert {one["status"] for one in of(whole, "Observation")} == {"amended"}
    [extension] = report["extension"]
    assert extension["url"] == "http://hl7.org/fhir/StructureDefinition/diagnosticReport-replaces"
    assert extension["valueReference"]["identifier"] == of(before, "DiagnosticReport")[0]["identifier"][0]
    created = [{entry["resource"]["identifier"][0]["value"] for entry in one["entry"]} for one in (before, whole)]
    assert created[0] & created[1] == {f"urn:oid:{result.uids.device_uid}"}, "nothing but the device is the same resource"


def test_a_study_that_could_not_be_analysed_is_a_cancelled_report_that_says_why(tmp_path: Path) -> None:
    failed = reports.result([reports.radiograph(tmp_path)], inputs=None, findings=(), failure="Slices 4 and 5 are 7.5 mm apart.")
    whole = bundle(failed)
    [report] = (entry["resource"] for entry in whole["entry"])
    assert (report["resourceType"], report["status"]) == ("DiagnosticReport", "cancelled")
    assert report["conclusion"].startswith("Could not be analysed, because slices 4 and 5 are 7.5 mm apart.")
    assert "result" not in report


def test_a_critical_finding_and_an_atypical_study_are_said(tmp_path: Path) -> None:
    critical = replace(FINDINGS[0], is_critical=True)
    uncertain = replace(FINDINGS[0], name="other", verdict="uncertain", is_atypical=True, is_critical=True)
    whole = bundle(reports.result([reports.radiograph(tmp_path)], findings=[critical, uncertain]))
    first, second = of(whole, "Observation")
    assert [coded(one)[1] for one in first["interpretation"]] == ["POS", "AA"]
    assert [coded(one)[1] for one in second["interpretation"]] == ["IND"]
    assert second["note"] == [{"text": content.ATYPICAL_STATEMENT}]


def region(paths: Sequence[Path]) -> Region:
    """Two voxels in plane 1, one in plane 2, of an oblique image."""
    uids = [str(dcmread(path, specific_tags=["SOPInstanceUID"]).SOPInstanceUID) for path in paths]
    mask = np.zeros((2, 1, 2), bool)
    mask[0, 0, :] = mask[1, 0, 0] = True
    affine = np.array([[0.0, 0.5, 0.0, -10.0], [0.6, 0.0, -0.8, 20.0], [0.8, 0.0, 0.6, 30.0], [0.0, 0.0, 0.0, 1.0]])
    return Region(mask, (1, 3, 4), (len(paths), 8, 8), affine, "image", tuple(uids), (1,) * len(paths))


def of_ct(folder: Path) -> tuple[Result, Region]:
    """A CT's result with one region."""
    series = factories.spool(factories.make_ct(slices=5), folder)
    paths = [instance.path for instance in series.instances]
    where = region(paths)
    found: Finding = replace(FINDINGS[0], regions=(where,))
    return reports.result(paths, inputs=replace(INPUTS, series={"image": replace(series, body_part="CHEST")}), findings=[found]), where


def test_a_region_has_its_centre_and_volume_and_names_the_images_it_lies_in(tmp_path: Path) -> None:
    result, where = of_ct(tmp_path)
    whole = bundle(result)
    [observation], [selection] = of(whole, "Observation"), of(whole, "Basic")
    found = {coded(one["code"])[1]: one for one in observation["component"]}
    assert found["saliency-volume"]["valueQuantity"]["value"] == pytest.approx(3 * 0.5)
    assert found["saliency-volume"]["code"]["text"] == "Volume of the saliency region, in image image"
    centre = [found[f"saliency-centre-{axis}"]["valueQuantity"]["value"] for axis in "xyz"]
    # Voxels (i, j, k) = (4, 3, 1), (5, 3, 1), (4, 3, 2): their mean by the affine.
    mean = np.array([13 / 3, 3.0, 4 / 3, 1.0])
    assert where.affine is not None
    assert centre == pytest.approx((where.affine @ mean)[:3].round(2))
    assert (coded(observation["bodySite"]), observation["bodySite"]["text"]) == (("http://snomed.info/sct", "816094009"), "Thorax")
    assert observation["focus"] == [{"reference": next(e["fullUrl"] for e in whole["entry"] if e["resource"] is selection)}]
    assert coded(selection["code"])[1] == "saliency-region", "what the answer rests on, not the outline of a lesion"
    said = {one["url"].removeprefix(SELECTION): one for one in selection["extension"] if "extension" not in one}
    assert said["status"]["valueCode"] == "available"
    assert said["studyUid"]["valueId"] == result.study.study_instance_uid
    instances = [one["extension"] for one in selection["extension"] if one["url"] == f"{SELECTION}instance"]
    assert [one[0]["valueId"] for one in instances] == list(where.sop_instance_uids[1:3])
    assert {one[1]["valueCoding"]["code"] for one in instances} == {"urn:oid:1.2.840.10008.5.1.4.1.1.2"}


def test_frames_of_one_object_are_named_by_their_numbers(tmp_path: Path) -> None:
    result, where = of_ct(tmp_path)
    enhanced = replace(where, sop_instance_uids=(where.sop_instance_uids[0],) * 5, frame_numbers=(3, 4, 5, 6, 7))
    framed = replace(result, findings=(replace(result.findings[0], regions=(enhanced,)),))
    [selection] = of(bundle(framed), "Basic")
    [instance] = [one["extension"] for one in selection["extension"] if one["url"] == f"{SELECTION}instance"]
    assert [one["valueString"] for one in instance if one["url"] == "subset"] == ["4", "5"]


def test_a_region_without_patient_coordinates_has_no_millimeters(tmp_path: Path) -> None:
    result, where = of_ct(tmp_path)
    flat = replace(result, findings=(replace(result.findings[0], regions=(replace(where, affine=None),)),))
    [observation] = of(bundle(flat), "Observation")
    assert not {"saliency-volume", "saliency-centre-x"} & {coded(one["code"])[1] for one in observation["component"]}


@pytest.mark.parametrize(
    ("scheme", "system"),
    [
        ("SCT", "http://snomed.info/sct"),
        ("http://snomed.info/sct", "http://snomed.info/sct"),
        ("LOINC", "http://loinc.org"),
        ("http://hospital.example/codes", "http://hospital.example/codes"),
        (codes.OWN, f"urn:oid:{content.derive_uid('scheme', codes.OWN)}"),
    ],
)
def test_each_coding_scheme_is_a_uri(scheme: str, system: str, tmp_path: Path) -> None:
    finding = replace(FINDINGS[0], code=replace(FINDINGS[0].code, scheme=scheme))
    [observation] = of(bundle(reports.result([reports.radiograph(tmp_path)], findings=[finding])), "Observation")
    assert coded(observation["code"])[0] == system


def test_volume_and_centre_are_those_of_the_report_in_the_pacs(tmp_path: Path) -> None:
    """One result in two forms: who compares them must find the same place."""
    result, _ = of_ct(tmp_path)
    ds = dcmread(BytesIO(sr.build(result, ()).data))
    group = next(one for one in items(ds) if _named(one) == "saliency-volume")
    point = next(one for one in items(ds) if _named(one) == "saliency-centre")
    found = {coded(one["code"])[1]: one["valueQuantity"]["value"] for one in of(bundle(result), "Observation")[0]["component"]}
    assert found["saliency-volume"] == pytest.approx(float(group.MeasuredValueSequence[0].NumericValue), rel=1e-3)
    assert [found[f"saliency-centre-{axis}"] for axis in "xyz"] == pytest.approx(list(point.GraphicData), abs=0.01)


def items(ds: Dataset) -> Iterator[Dataset]:
    """Every content item."""
    for item in ds.get("ContentSequence", ()):
        yield item
        yield from items(item)


def _named(item: Dataset) -> str:
    return str(item.ConceptNameCodeSequence[0].CodeValue) if "ConceptNameCodeSequence" in item else ""
