"""What a report says of the one that it replaces: of when that is, and what changed since.

Two content trees are compared, the old one as it was sent and the new one, so that nothing has to be remembered between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from pydicom.dataset import Dataset

from worker.domain import Code
from worker.report import codes
from worker.report.content import derive_uid
from worker.report.evidence import referred
from worker.report.result import Result
from worker.report.tree import line

_IMAGE_LIBRARY: Final = Code("111028", "DCM", "Image Library")
_MOST_NAMES: Final = 4


def sentence(result: Result) -> str:
    """Say "Replaces the report of 2026-11-21 02:02 +0100, because 4 images came."; nothing where none is replaced."""
    if result.previous is None:
        return ""
    reasons = list(_reasons(result, result.previous)) or ["what it was made from changed"]
    return f"Replaces the report of {written(result.previous)}, because {'; '.join(reasons)}."


def written(ds: Dataset) -> str:
    """When the analysis of the report `ds` began, in its own zone."""
    day, time = str(ds.ContentDate), str(ds.ContentTime)
    return f"{day[:4]}-{day[4:6]}-{day[6:8]} {time[:2]}:{time[2:4]} {ds.get('TimezoneOffsetFromUTC', '')}".strip()


def companions(previous: Dataset, *kinds: str) -> list[Dataset]:
    """Refer to what was made with the report `previous` and is one of `kinds`: their series tell them from the images."""
    ours = {derive_uid("series", kind, str(previous.SeriesInstanceUID)) for kind in kinds}
    return [one for one in referred(previous) if one.SeriesInstanceUID in ours]


def _reasons(result: Result, previous: Dataset) -> Iterator[str]:
    root = result.tree()
    before, now = _images(previous), _images(root)
    if came := len(now - before):
        yield f"{came} image{'s' * (came > 1)} came"
    if gone := len(before - now):
        yield f"{gone} image{'s' * (gone > 1)} that it was made from {'are' if gone > 1 else 'is'} not used any more"
    algorithm, old = result.algorithm, str(previous.SoftwareVersions[0])
    if previous.DeviceSerialNumber != codes.short(algorithm.bundle_sha256):
        is_other = old != codes.short(algorithm.version)
        yield f"the algorithm is version {algorithm.version} now{f', not {old}' if is_other else ', another build'}"
    was_failure = any(codes.FAILED.value in line(item) for item in _items(previous))
    if was_failure != bool(result.failure):
        yield "it could be analysed now" if was_failure else "it cannot be analysed any more"
    elif changed := _changed(_record(previous), _record(root)):
        more = f" and {len(changed) - _MOST_NAMES} more" if len(changed) > _MOST_NAMES else ""
        yield f"the patient's record changed ({', '.join(changed[:_MOST_NAMES])}{more})"


def _changed(before: dict[str, set[str]], now: dict[str, set[str]]) -> list[str]:
    return sorted(name for name in before | now if before.get(name) != now.get(name))


def _images(root: Dataset) -> set[str]:
    """Of the image library: what else a report refers to was made from these."""
    library = (item for item in root.get("ContentSequence") or () if _name(item).CodeValue == _IMAGE_LIBRARY.value)
    return {item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for one in library for item in _items(one) if item.ValueType == "IMAGE"}


def _record(root: Dataset) -> dict[str, set[str]]:
    """What the report says of the record, by name: that alone has a time of its own."""
    said: dict[str, set[str]] = {}
    for item in _items(root):
        if "ObservationDateTime" in item:
            said.setdefault(str(_name(item).CodeMeaning), set()).add(line(item))
    return said


def _name(item: Dataset) -> Dataset:
    name: Dataset = item.ConceptNameCodeSequence[0]
    return name


def _items(root: Dataset) -> Iterator[Dataset]:
    for item in root.get("ContentSequence") or ():
        yield item
        yield from _items(item)
