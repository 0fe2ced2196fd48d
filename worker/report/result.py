"""What one analysis said, whole: all that each of its documents is written from, and what they have in common.

::

    study, files of the images, record, findings ─▶ result_of ─▶ Result ─▶ sr.py and the builders of forms.py

Not here: what a document says (content.py and the builders), which are made (forms.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone, tzinfo
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import highdicom as hd
import pydicom
from highdicom.sr import ContainerContentItem, ContentItem
from pydicom import config
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes as standard
from pydicom.uid import ExplicitVRLittleEndian
from pydicom.valuerep import DA, DT, TM

from worker.domain import Document, Finding, Inputs, Study
from worker.imaging.decoding import DecoderPool
from worker.report import codes, content
from worker.report.content import MANUFACTURER, Algorithm, Placed, ReportUids, derive_uid, versions
from worker.report.evidence import Evidence, read

# A misspelt keyword would otherwise be dropped from a document without a word (STANDARDS.md §0.11).
config.INVALID_KEYWORD_BEHAVIOR = "RAISE"

Planes = Mapping[str, tuple[tuple[str, int], ...]]

#: Series Number by kind: one series a kind and bundle, behind the images.
SERIES_NUMBERS: Final = {
    "sr": 9001,
    "seg": 9002,
    "map": 9003,
    "summary": 9004,
    "pdf": 9005,
    "gsps": 9006,
    "keys": 9007,
    "basic": 9008,
    "rejection": 9009,
}
#: All that another object needs to know of one to refer to it.
REFERENCE: Final = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
_UNIX_EPOCH_YEAR: Final = 1970
#: So many versions of a study have an Instance Number of their own.
_MOST_VERSIONS: Final = 1000


def report_uids(
    study_instance_uid: str, *, bundle_sha256: str, input_sha256: str, is_failure: bool = False, predecessor_uid: str = ""
) -> ReportUids:
    """Derive the UIDs of the report that this bundle makes of this input of this study, after that predecessor.

    A report that replaces another has a series of its own: viewers list series, and tell by them which is current. A failure has its own
    instance UID: what failed once may succeed when it is tried again, and is another document then. So is an input that was there before
    another one (a merge that was undone): it is filed after that other, which would else remain the last word.
    """
    kind = "failure" if is_failure else "report"
    after = (predecessor_uid,) if predecessor_uid else ()
    return ReportUids(
        sop_instance_uid=derive_uid(kind, study_instance_uid, bundle_sha256, input_sha256, *after),
        series_instance_uid=derive_uid("series", study_instance_uid, bundle_sha256, *after),
        device_uid=derive_uid("device", bundle_sha256),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One analysis, checked: findings, or a reason why there are none.

    ``analysed_at`` is in the one zone that all dates of its documents are in; ``zone`` is the site's, that of the times in a text.
    ``previous`` is the root report that this one replaces; None if it is the first.
    ``planes`` are those of each image that was loaded, and ``decoders`` read a plane again; without either there is no picture.
    """

    study: Study
    algorithm: Algorithm
    source: Evidence
    inputs: Inputs | None
    findings: tuple[Finding, ...]
    analysed_at: datetime
    zone: tzinfo
    failure: str
    previous: Dataset | None
    uids: ReportUids
    planes: Planes = field(default_factory=dict)
    decoders: DecoderPool | None = None

    @property
    def study_at(self) -> datetime | None:
        """When the study was made, in the documents' zone; None where nobody said."""
        at = self.study.study_at
        return at.astimezone(self.analysed_at.tzinfo) if at.year >= _UNIX_EPOCH_YEAR else None

    def uid(self, kind: str, *more: str) -> str:
        """Derive the SOP Instance UID of a document of `kind`; `more` tells several apart."""
        return self.uids.sop_instance_uid if kind == "sr" else derive_uid(kind, self.uids.sop_instance_uid, *more)

    def series_uid(self, kind: str) -> str:
        """Derive the Series Instance UID of this result's documents of `kind`."""
        return self.uids.series_instance_uid if kind == "sr" else derive_uid("series", kind, self.uids.series_instance_uid)

    def tree(self, placed: Sequence[Placed] = (), *, whole: ContentItem | None = None, replaces: str = "") -> ContainerContentItem:
        """Build the content tree of the root report, without places where none are given."""
        return content.tree(
            self.study,
            algorithm=self.algorithm,
            uids=self.uids,
            source=self.source,
            inputs=self.inputs,
            findings=self.findings,
            zone=self.zone,
            failure=self.failure,
            placed=placed or [Placed()] * len(self.findings),
            whole=whole,
            replaces=replaces,
        )

    def finish(self, ds: Dataset) -> None:
        """Give `ds` the patient, study and order of the images, and one clock in place of the several that highdicom reads."""
        for element in self.source.copied:
            ds[element.tag] = element
        at = self.analysed_at
        ds.SpecificCharacterSet = "ISO_IR 192"
        ds.TimezoneOffsetFromUTC = at.strftime("%z")
        ds.InstanceCreationDate, ds.InstanceCreationTime = DA(at.date()), TM(at.time())
        for level in ("Content", "Series", "PresentationCreation"):
            if f"{level}Date" in ds:
                setattr(ds, f"{level}Date", DA(at.date()))
                setattr(ds, f"{level}Time", TM(at.time()))
        for item in ds.get("ContributingEquipmentSequence") or ():
            if "ContributionDateTime" in item:
                item.ContributionDateTime = stamp(at)

    def document(self, ds: Dataset, kind: str) -> Document:
        """Encode the finished `ds`."""
        with BytesIO() as buffer:
            ds.save_as(buffer, enforce_file_format=True)
            data = buffer.getvalue()
        previous = str(self.previous.SOPInstanceUID) if self.previous else ""
        return Document(
            sop_instance_uid=str(ds.SOPInstanceUID),
            sop_class_uid=str(ds.SOPClassUID),
            kind=kind,
            data=data,
            predecessor_uid=previous if kind == "sr" else "",
        )


def result_of(
    study: Study,
    *,
    algorithm: Algorithm,
    evidence: Sequence[Path],
    inputs: Inputs | None,
    findings: Sequence[Finding],
    analysed_at: datetime,
    zone: tzinfo,
    failure: str = "",
    predecessor: Document | None = None,
    planes: Planes | None = None,
    decoders: DecoderPool | None = None,
) -> Result:
    """Read what the images say and put all of one analysis together.

    Parameters
    ----------
    evidence
        Files of the instances that were analysed (or that were tried, if it failed), in any order.
    inputs
        None when the analysis failed before the patient's record was asked.
    analysed_at
        Aware; when the analysis began (IHE AIR: Content Date and Time).
    zone
        The site's zone: that of the times in the text, and of images without Timezone Offset From UTC.
    failure
        Why there are no findings, as words that follow "because"; empty if the analysis succeeded.
    predecessor
        The last root report on an earlier version of this study, which this one replaces.
    planes
        By image name, plane by plane: SOP Instance UID and frame number (from 1).
    decoders
        What reads their files.

    Raises
    ------
    PatientConflict
        An analysed instance is of another patient or study.
    PixelError
        An analysed instance has no readable header.
    ValueError
        Findings and failure contradict each other.
    """
    if bool(failure) == bool(findings):
        raise ValueError("A report has either findings or a reason why there are none.")
    source = read(evidence, study=study)
    derive = partial(
        report_uids,
        study.study_instance_uid,
        bundle_sha256=algorithm.bundle_sha256,
        input_sha256=algorithm.input_sha256,
        is_failure=bool(failure),
    )
    uids = derive()
    previous = _previous(predecessor, own_uid=uids.sop_instance_uid)
    if previous is not None:
        uids = derive(predecessor_uid=str(previous.SOPInstanceUID))
    return Result(
        study=study,
        algorithm=algorithm,
        source=source,
        inputs=inputs,
        findings=tuple(findings),
        analysed_at=analysed_at.astimezone(_document_zone(source, study=study, analysed_at=analysed_at, zone=zone)),
        zone=zone,
        failure=failure,
        previous=previous,
        uids=uids,
        planes=planes or {},
        decoders=decoders,
    )


def about(result: Result, kind: str, *more: str, number: int = 1, what: str = "") -> dict[str, Any]:
    """What highdicom's classes ask alike of the document of `kind` that `more` tells from its sisters: UIDs, series, equipment, encoding.

    `number` counts those from 1; `what` says in a word what the series shows. A series that replaces another says which it is by the
    study's version.
    """
    algorithm, version = result.algorithm, max(1, result.study.version)
    use = "research, not for diagnosis" if algorithm.research_use else "not verified"
    what = "".join(f" {word}" for word in (what, f"#{version}" if result.previous else "") if word)
    # PS3.5 §6.2: an LO has 64 characters.
    name = codes.short(f"AI {algorithm.name} {algorithm.version}", 62 - len(use) - len(what))
    return {
        "series_instance_uid": result.series_uid(kind),
        "series_number": SERIES_NUMBERS[kind],
        "sop_instance_uid": result.uid(kind, *more),
        "instance_number": version + _MOST_VERSIONS * (number - 1),
        "series_description": f"{name}{what}: {use}",
        "manufacturer": MANUFACTURER,
        "manufacturer_model_name": codes.short(algorithm.name),
        "software_versions": versions(algorithm),
        "device_serial_number": codes.short(algorithm.bundle_sha256),
        "content_qualification": "RESEARCH" if algorithm.research_use else "PRODUCT",
        "coding_schemes": codes.identification(content.codes_of(algorithm, result.findings, result.inputs)),
        "contributing_equipment": [_equipment(algorithm, device_uid=result.uids.device_uid, at=result.analysed_at)],
        "specific_character_set": "ISO_IR 192",
        "transfer_syntax_uid": ExplicitVRLittleEndian,
    }


def _equipment(algorithm: Algorithm, *, device_uid: str, at: datetime) -> hd.ContributingEquipment:
    """Name the algorithm; its Device UID changes with every byte of the bundle (IHE AIR)."""
    item = hd.ContributingEquipment(
        manufacturer=MANUFACTURER,
        purpose_of_reference=standard.DCM.ProcessingEquipment,
        manufacturer_model_name=codes.short(algorithm.name),
        software_versions=versions(algorithm),
        device_serial_number=codes.short(algorithm.bundle_sha256),
        contribution_datetime=stamp(at),
        contribution_description=f"Processing algorithm, weights-sha256:{algorithm.weights_sha256}",
    )
    item.DeviceUID = device_uid
    return item


def _document_zone(source: Evidence, *, study: Study, analysed_at: datetime, zone: tzinfo) -> timezone:
    """Choose the one offset that all dates of the document are in, the study's among them (PS3.3 §C.12.1.1.8).

    The images' own where they name one; else the site's on the day of the study, not today's: with
    today's, summer time would move the time of a winter's study.
    """
    moment = study.study_at if study.study_at.year >= _UNIX_EPOCH_YEAR else analysed_at
    site = moment.astimezone(zone).utcoffset() or timedelta()
    return timezone(site if source.utc_offset is None else source.utc_offset)


def _previous(predecessor: Document | None, *, own_uid: str) -> Dataset | None:
    """Read the report that this one replaces; a report that is made again does not precede itself."""
    if predecessor is None or predecessor.sop_instance_uid == own_uid:
        return None
    return pydicom.dcmread(BytesIO(predecessor.data))


def stamp(at: datetime) -> DT:
    """Write a moment with its offset."""
    return DT(at.strftime("%Y%m%d%H%M%S.%f%z"))
