"""Which documents are made of one result: the root report, and the forms that viewers, the RIS and the EHR show.

::

    Result ─▶ companions, each by its builder ─▶ root report (sr.py), which refers to them

A builder that has nothing to say gives none. One that fails costs its own document: the root report is sent all the same, and an empty
document stands for what is missing, whose deliveries become dead letters (deliver/send.py): a log alone nobody might read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final

from pydicom.uid import (
    BasicTextSRStorage,
    Comprehensive3DSRStorage,
    EncapsulatedPDFStorage,
    GrayscaleSoftcopyPresentationStateStorage,
    KeyObjectSelectionDocumentStorage,
    ParametricMapStorage,
    SecondaryCaptureImageStorage,
    SegmentationStorage,
)

from worker import events
from worker.domain import Document
from worker.ops.log import places
from worker.report import basic, capture, fhir, gsps, keys, notice, oru, parametric, seg, sr
from worker.report.result import Result

Builder = Callable[[Result], Sequence[Document]]

#: By the kind that `[[destinations]] documents` names; the root, "sr", is made always.
BUILDERS: Final[Mapping[str, Builder]] = {
    "seg": seg.build,
    "map": parametric.build,
    "summary": capture.summary,
    "pdf": capture.pdf,
    "gsps": gsps.build,
    "keys": keys.build,
    "basic": basic.build,
    "rejection": keys.reject,
    "oru": oru.build,
    "fhir": fhir.build,
    "notice": notice.build,
}

#: By kind, of which class a DICOM document is: what an archive must accept to get it.
SOP_CLASSES: Final[Mapping[str, str]] = {
    "sr": Comprehensive3DSRStorage,
    "seg": SegmentationStorage,
    "map": ParametricMapStorage,
    "summary": SecondaryCaptureImageStorage,
    "pdf": EncapsulatedPDFStorage,
    "gsps": GrayscaleSoftcopyPresentationStateStorage,
    "keys": KeyObjectSelectionDocumentStorage,
    "basic": BasicTextSRStorage,
    "rejection": KeyObjectSelectionDocumentStorage,
}


def author(result: Result, kinds: Collection[str]) -> tuple[Document, ...]:
    """Write the documents of `kinds`, empty where one cannot be written; the root report is always made, and is the last.

    Raises
    ------
    ReportInvalid, PatientConflict, ValueError
        As `sr.build`: of the root report alone.
    """
    companions: list[Document] = []
    for kind, build in BUILDERS.items():
        if kind not in kinds:
            continue
        try:
            companions += build(result)
        except Exception as exc:  # noqa: BLE001  the root report says it all, and must not wait for a picture
            events.emit("document.failed", kind=kind, bundle=result.algorithm.name, reason=type(exc).__name__, places=places(exc))
            companions.append(Document(result.uid(kind, "not written"), "", kind, b""))
    return (*companions, sr.build(result, companions))
