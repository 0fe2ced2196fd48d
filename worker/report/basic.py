"""The root report once more, in words: Basic Text SR, for archives and viewers that take no other.

::

    content.tree ─▶ summary and statements first ─▶ a heading a finding, its numbers as text ─▶ the algorithm, once ─▶ how many images

What the root says is said, because it is made of the root's own tree. Not Enhanced SR: whoever shows its numbers well shows the
root, and the oldest viewers show text (IHE RAD TF-1 §13, Simple Image and Numeric Report: its Basic Text SR option).

References: PS3.3 §A.35.1, Table A.35.1-2.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from highdicom import sr
from pydicom.dataset import Dataset
from pydicom.uid import BasicTextSRStorage

from worker.domain import Document
from worker.report import codes, replacing
from worker.report.codes import concept
from worker.report.evidence import references
from worker.report.places import placed
from worker.report.result import Result
from worker.report.sr import written
from worker.report.tree import told

# PS3.16 TID 1501 and TID 4019: of each group the same, and so said once.
_ALGORITHM: Final = frozenset({"111001", "111002", "111003"})
_GROUP, _FINDING, _LIBRARY, _MEASUREMENTS = "125007", "121071", "111028", "126010"
#: What Basic Text SR may hold as it is; numbers and coordinates it may not.
_KEPT: Final = frozenset({"CODE", "TEXT", "UIDREF", "DATETIME", "DATE", "TIME", "PNAME"})


def build(result: Result) -> tuple[Document, ...]:
    """Write the report in words. Its predecessor is the old one in words where there was one, else the old root."""
    tree = result.tree([placed(result, finding, ()) for finding in result.findings], replaces=replacing.sentence(result))
    root = sr.ContainerContentItem(concept(codes.SERIES))
    root.ContentSequence = sr.ContentSequence(_in_words(tree, images=len(result.source.instances)))
    ds = written(result, sr.EnhancedSR, root, "basic", what="as text")
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = BasicTextSRStorage  # of the same modules, PS3.3 Table A.1-4
    ds.CurrentRequestedProcedureEvidenceSequence = references(result.source.instances)
    result.finish(ds)
    return (result.document(ds, "basic"),)


def _in_words(tree: Dataset, *, images: int) -> Iterator[sr.ContentItem]:
    """Put what a person wants first to the front, after what PS3.16 has there: language, observer, procedure."""
    context = [item for item in tree.ContentSequence if item.ValueType != "CONTAINER"]
    parts = {_name(item): item for item in tree.ContentSequence if item.ValueType == "CONTAINER"}
    groups = sorted(parts[_MEASUREMENTS].ContentSequence if _MEASUREMENTS in parts else (), key=_is_of_record)
    yield from context
    yield _container(concept(codes.QUALITATIVE_EVALUATIONS), parts[codes.QUALITATIVE_EVALUATIONS.value].ContentSequence)
    yield from (_container(_heading(group), _said(group)) for group in groups)
    identified = {item.TextValue: item for group in groups for item in group.ContentSequence if _name(item) in _ALGORITHM}
    if identified:
        yield _container(concept(codes.PROCESSING_EQUIPMENT), identified.values())
    if _LIBRARY in parts:
        yield sr.TextContentItem(parts[_LIBRARY].name, f"{images} images, named in the evidence", sr.RelationshipTypeValues.CONTAINS)


def _said(group: Dataset) -> Iterator[sr.ContentItem]:
    for item in group.ContentSequence:
        if _name(item) in _ALGORITHM:
            continue
        if item.ValueType in _KEPT:
            yield item
        else:
            yield sr.TextContentItem(item.name, told(item), sr.RelationshipTypeValues.CONTAINS)


def _is_of_record(group: Dataset) -> bool:
    return any(_name(item) == codes.GROUP_ROLE.value for item in group.ContentSequence)


def _heading(group: Dataset) -> sr.CodedConcept:
    """The finding itself, in place of "Measurement Group"."""
    found = (item.value for item in group.ContentSequence if _name(item) == _FINDING)
    return next(found, group.name)


def _container(name: sr.CodedConcept, items: Iterable[sr.ContentItem]) -> sr.ContainerContentItem:
    container = sr.ContainerContentItem(name, relationship_type=sr.RelationshipTypeValues.CONTAINS)
    container.ContentSequence = sr.ContentSequence(list(items))
    return container


def _name(item: Dataset) -> str:
    return str(item.name.value)
