"""The reports that tests look at: one of each kind, of synthetic patients. `python -m tests.reports` writes the golden trees anew."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta, timezone
from io import BytesIO
from pathlib import Path
from typing import Any

from pydicom import Dataset, FileDataset, dcmread

from tests import factories
from worker.domain import Code, Document, Finding, Inputs, Patient, PatientKey, Series, Study, UsedText, UsedValue
from worker.report import sr
from worker.report.content import Algorithm
from worker.report.result import Result, result_of
from worker.report.tree import lines

GOLDEN = Path(__file__).parent / "golden"
ZONE = timezone(timedelta(hours=1))
ANALYSED_AT = datetime(2026, 11, 21, 1, 2, 3, 456789, tzinfo=UTC)
DRAWN_AT = datetime(2024, 1, 2, 5, 30, tzinfo=UTC)
SECRET = "wheezing since Tuesday"

CRP = Code("1988-5", "LN", "C reactive protein [Mass/volume] in Serum or Plasma")
LDH = Code("2532-0", "LN", "Lactate dehydrogenase [Enzymatic activity/volume] in Serum or Plasma")
PNEUMONIA = Code("233604007", "SCT", "Pneumonia")
EFFUSION = Code("60046008", "SCT", "Pleural effusion")

ALGORITHM = Algorithm(
    name="chest-fusion",
    version="0.1.0",
    title="Chest radiograph with laboratory values",
    bundle_sha256="ab" * 32,
    weights_sha256="cd" * 32,
    input_sha256="ef" * 32,
    code_version="0.1.0",
    code_sha256="ef" * 32,
    procedure=Code("43468-8", "LN", "XR unspecified body region"),
    quality_statement="Trained on 188 radiographs of one hospital; AUROC 0.76 in cross-validation.",
)
INPUTS = Inputs(
    series={"image": Series("1.2.3", "DX", "CHEST", "", ())},
    values=(
        UsedValue("crp", CRP, 0.3, "<", "mg/L", DRAWN_AT, "LAB"),
        UsedValue("ldh", LDH, 295.5, "", "U/L", DRAWN_AT, "LAB"),
        UsedValue("f13", Code("F13", "L", "Coagulation factor XIII activity"), 80.0, "", "%", DRAWN_AT - timedelta(days=1), "LAB"),
    ),
    texts=(UsedText("Admission note", Code("34117-2", "LN", "History and physical note"), SECRET, DRAWN_AT, "HIS"),),
    missing=(Code("48065-7", "LN", "Fibrin D-dimer FEU [Mass/volume] in Platelet poor plasma"),),
    record_found=True,
)
FINDINGS = (
    Finding("pneumonia", PNEUMONIA, 0.7321, 0.5, "positive", {"image": 1.31234, "values": -0.2, "text": 0.0}),
    Finding("effusion", EFFUSION, 0.031, 0.5, "negative"),
)


@dataclass(frozen=True, slots=True)
class Example:
    """A report and the files it was made from."""

    document: Document
    sources: tuple[Path, ...]

    @property
    def ds(self) -> FileDataset:
        """The report as a receiver reads it."""
        return dcmread(BytesIO(self.document.data))


def study_of(path: Path, *, version: int = 1, patient: PatientKey | None = None) -> Study:
    """Describe the study of one file as the store would; `patient` in place of the file's own."""
    ds = dcmread(path, stop_before_pixels=True)
    key = patient or PatientKey(str(ds.get("IssuerOfPatientID", "")), str(ds.get("PatientID", "")))
    at = datetime(2024, 1, 2, 10, 30, tzinfo=ZONE)
    return Study(str(ds.StudyInstanceUID), Patient(key), str(ds.get("AccessionNumber", "")), at, "", version)


def report(sources: Sequence[Path], **made_of: Any) -> Example:
    """Build the report of `sources`; what `made_of` does not name is as `result` has it."""
    return Example(sr.build(result(sources, **made_of)), tuple(sources))


def result(
    sources: Sequence[Path],
    *,
    algorithm: Algorithm = ALGORITHM,
    study: Study | None = None,
    inputs: Inputs | None = INPUTS,
    findings: Sequence[Finding] = FINDINGS,
    failure: str = "",
    predecessor: Document | None = None,
) -> Result:
    """What all documents of `sources` are written from, the rest as usual."""
    return result_of(
        study or study_of(sources[0]),
        algorithm=algorithm,
        evidence=sources,
        inputs=inputs,
        findings=findings,
        analysed_at=ANALYSED_AT,
        zone=ZONE,
        failure=failure,
        predecessor=predecessor,
    )


def radiograph(folder: Path, *, change: Callable[[Dataset], object] = lambda _: None) -> Path:
    """Write one synthetic radiograph that `change` has altered."""
    ds = factories.make_radiograph()
    order = Dataset()
    order.RequestedProcedureID, order.RequestedProcedureDescription = "RP-7", "Chest, one view"
    ds.RequestAttributesSequence = [order]
    change(ds)
    return factories.write(ds, folder / "radiograph.dcm")


def of_radiograph(folder: Path) -> Example:
    """A positive and a negative finding, values, a text, something missing."""
    return report([radiograph(folder)])


def of_ct(folder: Path) -> Example:
    """A series of slices, no record at all, an uncertain finding."""
    series = factories.spool(factories.make_ct(slices=5), folder)
    uncertain = Finding("pneumonia", PNEUMONIA, 0.48, 0.5, "uncertain", {"image": -0.08})
    inputs = Inputs(series={"image": series}, missing=(CRP,))
    algorithm = replace(ALGORITHM, title="Chest CT", procedure=Code("25045-6", "LN", "CT unspecified body region"))
    return report([i.path for i in series.instances], algorithm=algorithm, inputs=inputs, findings=[uncertain])


def of_nothing_found(folder: Path) -> Example:
    """Every answer is no."""
    return report([radiograph(folder)], findings=[FINDINGS[1]])


def of_failure(folder: Path) -> Example:
    """No answer at all, and why."""
    reason = "Slices 4 and 5 are 7.5 mm apart where 2.5 mm were expected."
    return report([radiograph(folder)], inputs=None, findings=(), failure=reason)


EXAMPLES: Mapping[str, Callable[[Path], Example]] = {
    "radiograph": of_radiograph,
    "ct": of_ct,
    "nothing_found": of_nothing_found,
    "failure": of_failure,
}


def golden_text(example: Example) -> str:
    """Its tree, UIDs blanked: they are hashes, and a change in one would say nothing to a reader."""
    return re.sub(r"\b[12](\.\d+){6,}", "<UID>", "\n".join(lines(example.ds))) + "\n"


if __name__ == "__main__":
    for name, make in EXAMPLES.items():
        with tempfile.TemporaryDirectory() as scratch:
            (GOLDEN / f"sr_{name}.txt").write_text(golden_text(make(Path(scratch))), encoding="utf-8")
