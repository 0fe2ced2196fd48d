"""Which part of the body an image shows, in codes, as far as its header says: Anatomic Region, Body Part Examined, laterality."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from highdicom.sr import CodedConcept
from pydicom.sr.codedict import codes as standard

from worker.domain import ImageFacts
from worker.report.result import Result
from worker.selection import PARTS

# PS3.16 CID 4 by its codes, by its names, and by all that the rules that choose a series know for one part of the body.
_BY_CODE: Final = {code.value: code for code in standard.cid4.concepts.values()}
_BY_WORD: Final = {
    **{name.upper(): code for name, code in standard.cid4.concepts.items()},
    **{word: _BY_CODE[known] for words in PARTS if (known := next((w for w in words if w in _BY_CODE), "")) for word in words},
    **_BY_CODE,
}
# PS3.16 CID 244.
_SIDES: Final = {"L": standard.SCT.Left, "R": standard.SCT.Right, "B": standard.SCT.Bilateral}


@dataclass(frozen=True, slots=True)
class Site:
    """A region of the body, and its side where it has one."""

    region: CodedConcept
    laterality: CodedConcept | None


def of_image(result: Result, image: str) -> Site | None:
    """The part of the body that the bundle's `image` shows; None where its header does not say, or in no code of ours."""
    series = result.inputs.series.get(image) if result.inputs else None
    if series is None:
        return None
    facts = [one.facts for one in series.instances if one.facts != ImageFacts()]
    said = [one.region for one in facts] + [one.body_part for one in facts] + [series.body_part]
    region = next((code for one in said if (code := _BY_WORD.get(one.strip().upper()))), None)
    if region is None:
        return None
    sides = {one.laterality for one in facts}
    side = _SIDES.get(sides.pop()) if len(sides) == 1 else None
    return Site(CodedConcept.from_code(region), CodedConcept.from_code(side) if side else None)
