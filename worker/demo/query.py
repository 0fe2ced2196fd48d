"""Study Root C-FIND over headers in memory: matching and what an answer holds (PS3.4 §C.2.2.2, §C.6.2).

Not here: the network (pacs.py). For a demonstration of some thousand instances: every query reads them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Final

from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

#: Level → its unique key (PS3.4 §C.6.2.1).
LEVELS: Final = {"STUDY": "StudyInstanceUID", "SERIES": "SeriesInstanceUID", "IMAGE": "SOPInstanceUID"}

# PS3.4 §C.3.4: attributes that no instance holds. Each takes the study's and the series' instances.
_COUNTED: Final[dict[str, Callable[[Sequence[Dataset], Sequence[Dataset]], object]]] = {
    "NumberOfStudyRelatedInstances": lambda study, _: len(study),
    "NumberOfStudyRelatedSeries": lambda study, _: len({ds.SeriesInstanceUID for ds in study}),
    "NumberOfSeriesRelatedInstances": lambda _, series: len(series),
    "ModalitiesInStudy": lambda study, _: sorted({str(ds.get("Modality", "")) for ds in study}),
    "SOPClassesInStudy": lambda study, _: sorted({str(ds.SOPClassUID) for ds in study}),
}
_NOT_KEYS: Final = ("QueryRetrieveLevel", "SpecificCharacterSet", "TimezoneOffsetFromUTC")


def answers(identifier: Dataset, headers: Sequence[Dataset]) -> list[Dataset]:
    """Return one answer for each entity of the identifier's level that matches it.

    Raises
    ------
    ValueError
        Query/Retrieve Level is not STUDY, SERIES or IMAGE.
    """
    level = str(identifier.get("QueryRetrieveLevel", ""))
    if level not in LEVELS:
        raise ValueError("Query/Retrieve Level is none of the Study Root model's.")
    studies, series = _grouped(headers, "StudyInstanceUID"), _grouped(headers, "SeriesInstanceUID")
    found = []
    for entity in _grouped(headers, LEVELS[level]).values():
        first = entity[0]
        siblings = studies[first.StudyInstanceUID], series[first.SeriesInstanceUID]
        counted = {k: count(*siblings) for k, count in _COUNTED.items() if k in identifier}
        if all(_matches(key, counted.get(key.keyword, first.get(key.tag, None))) for key in identifier if key.keyword not in _NOT_KEYS):
            found.append(_answer(identifier, first, counted, level=level))
    return found


def _grouped(headers: Sequence[Dataset], keyword: str) -> dict[str, list[Dataset]]:
    groups: dict[str, list[Dataset]] = {}
    for header in headers:
        groups.setdefault(str(header[keyword].value), []).append(header)
    return groups


def _matches(key: DataElement, held: object) -> bool:
    """Whether one matching key fits what is held: universal, list, range, wildcard or single value."""
    if key.VR == "SQ" or key.is_empty:
        return True
    value = held.value if isinstance(held, DataElement) else held
    values = [str(v) for v in value] if isinstance(value, (list, MultiValue)) else [str(value if value is not None else "")]
    wanted = [str(v) for v in key.value] if isinstance(key.value, MultiValue) else [str(key.value)]
    if key.VR in ("DA", "TM", "DT") and "-" in wanted[0]:
        low, high = wanted[0].split("-", 1)
        return any(v and low <= v and (not high or v <= high or v.startswith(high)) for v in values)
    if key.VR == "PN":  # case may be ignored for names, PS3.4 §C.2.2.2.1
        values, wanted = [v.casefold() for v in values], [v.casefold() for v in wanted]
    if key.VR == "UI":
        return any(v in wanted for v in values)
    # PS3.4 knows * and ? only: a bracket is a bracket.
    return any(fnmatchcase(v, w.replace("[", "[[]")) for v in values for w in wanted)


def _answer(identifier: Dataset, header: Dataset, counted: Mapping[str, object], *, level: str) -> Dataset:
    answer = Dataset()
    for key in identifier:
        if key.keyword in counted:
            answer.add_new(key.tag, key.VR, counted[key.keyword])
        elif key.tag in header and key.VR == header[key.tag].VR:
            value = header[key.tag].value
            answer.add_new(key.tag, key.VR, str(value) if key.VR == "PN" else value)
        elif key.keyword not in _NOT_KEYS:
            answer.add_new(key.tag, key.VR, [] if key.VR == "SQ" else None)
    answer.SpecificCharacterSet = "ISO_IR 192"
    answer.QueryRetrieveLevel = level
    return answer
