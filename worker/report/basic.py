"""The root report once more, in words: Basic Text SR, for archives and viewers that take no other.

::

    content.tree ─▶ summary and statements ─▶ a heading and a paragraph a finding ─▶ the algorithm, once ─▶ how many images

What the root says is said, because it is made of the root's own tree; each text says of itself what it is, for there are viewers that
show no concept names, and "73.21 % 50 %" is no sentence. Not Enhanced SR: whoever shows its numbers well shows the
root, and the oldest viewers show text (IHE Radiology, Simple Image and Numeric Report).

References: PS3.3 §A.35.1, Table A.35.1-2.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from highdicom import sr
from pydicom.dataset import Dataset
from pydicom.uid import BasicTextSRStorage

from worker.domain import Code, Document
from worker.report import codes, replacing
from worker.report.codes import concept
from worker.report.evidence import references
from worker.report.keys import image_in_words
from worker.report.result import Result
from worker.report.sr import told_places, written
from worker.report.tree import told

# PS3.16 TID 1501 and TID 4019: of each group the same, and so said once.
_ALGORITHM: Final = frozenset({"111001", "111002", "111003"})
_LIBRARY, _MEASUREMENTS = "111028", "126010"
_TRACKING: Final = "112039"
_FINDING: Final = Code("121071", "DCM", "Finding")
_CONTAINS: Final = sr.RelationshipTypeValues.CONTAINS


def build(result: Result) -> tuple[Document, ...]:
    """Write the report in words."""
    tree = result.tree(told_places(result)[0], replaces=replacing.sentence(result))
    # Not the root's title, which is TID 1500's: OHIF 3.13 looks for measurements to draw in whatever is called so, and stays black.
    root = sr.ContainerContentItem(concept(codes.SERIES), is_content_continuous=False)
    root.ContentSequence = sr.ContentSequence(list(_in_words(tree, result)))
    ds = written(result, sr.EnhancedSR, root, "basic", what="as text")
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = BasicTextSRStorage  # of the same modules: PS3.3 Tables A.35.1-1, A.35.2-1
    ds.CurrentRequestedProcedureEvidenceSequence = references(result.source.instances)
    result.finish(ds)
    return (result.document(ds, "basic"),)


def _in_words(tree: Dataset, result: Result) -> Iterator[sr.ContentItem]:
    """Put what a person wants first to the front, after what PS3.16 has there: language, observer, procedure."""
    yield from (item for item in tree.ContentSequence if item.ValueType != "CONTAINER")
    parts = {_name(item): item.ContentSequence for item in tree.ContentSequence if item.ValueType == "CONTAINER"}
    names = [finding.name for finding in result.findings]
    groups = sorted(parts.get(_MEASUREMENTS, ()), key=lambda group: _order(group, names))
    said = parts[codes.QUALITATIVE_EVALUATIONS.value]
    sentences = [item if item.ValueType == "TEXT" else _text(item.name, [item], result) for item in said]
    yield _container(concept(codes.QUALITATIVE_EVALUATIONS), sentences)
    yield from (_of_group(group, result) for group in groups)
    if identified := {item.TextValue: item for group in groups for item in group.ContentSequence if _name(item) in _ALGORITHM}:
        yield _text(concept(codes.PROCESSING_EQUIPMENT), identified.values(), result)
    if _LIBRARY in parts:
        yield sr.TextContentItem(concept(codes.SOURCE), f"{len(result.source.instances)} images, named in the evidence.", _CONTAINS)


def _of_group(group: Dataset, result: Result) -> sr.ContainerContentItem:
    """A finding under its own name, all that is said of it in one paragraph; what tracks it stays apart."""
    tracking = [item for item in group.ContentSequence if item.ValueType == "UIDREF" or _name(item) == _TRACKING]
    said = [item for item in group.ContentSequence if item not in tracking and _name(item) not in _ALGORITHM]
    heading = next((item.value for item in said if _name(item) == _FINDING.value), group.name)
    # Not named Finding: OHIF 3.13 sets such a text without line breaks, and it runs out of the screen.
    return _container(heading, [*tracking, _text(concept(codes.SUMMARY), said, result)])


def _text(name: sr.CodedConcept, items: Iterable[sr.ContentItem], result: Result) -> sr.TextContentItem:
    """Say "Probability: 73.21 %. Verdict at the operating threshold: Positive."."""
    said = ((item.name.meaning, _value(item, result)) for item in items)
    return sr.TextContentItem(name, " ".join(f"{meaning}: {value}." for meaning, value in said if value), _CONTAINS)


def _value(item: sr.ContentItem, result: Result) -> str:
    """Its value in words; of coordinates where they are, and nothing of the same outline in the patient."""
    if item.ValueType == "SCOORD":
        (reference,) = item.ContentSequence[0].ReferencedSOPSequence
        return f"drawn on {image_in_words(result, reference.ReferencedSOPInstanceUID, reference.get('ReferencedFrameNumber', 0))}"
    return "" if item.get("GraphicType") == "POLYGON" else told(item, has_code=False)


def _order(group: Dataset, names: Sequence[str]) -> int:
    """Findings as the result has them, then the record."""
    tracked = next(str(item.TextValue) for item in group.ContentSequence if _name(item) == _TRACKING)
    return names.index(tracked) if tracked in names else len(names)


def _container(name: sr.CodedConcept, items: Iterable[sr.ContentItem]) -> sr.ContainerContentItem:
    container = sr.ContainerContentItem(name, is_content_continuous=False, relationship_type=_CONTAINS)
    container.ContentSequence = sr.ContentSequence(list(items))
    return container


def _name(item: Dataset) -> str:
    return str(item.name.value)
