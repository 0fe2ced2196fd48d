"""One page that a person understands in five seconds: what is said on it, and how it is set.

::

    Result, Picture ─▶ words (`said`) ─▶ every character has a glyph? ─▶ page.typ, by Typst ─▶ PDF/A or PNG

The words reach the template as data, never as markup. A character for which no font is installed is shown as U+FFFD, a line of the page
says so, and an event is emitted: no page has empty boxes. Not here: the picture (picture.py), the DICOM objects (capture.py).
"""

from __future__ import annotations

import base64
import json
import re
from datetime import datetime
from functools import cache
from importlib import resources, util
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any, Final, Literal

import typst
from PIL import Image

from worker import events
from worker.domain import Finding, Inputs, UsedText, UsedValue
from worker.errors import ReportInvalid
from worker.report import content, replacing
from worker.report.picture import Picture, ranked
from worker.report.result import Result

Theme = Literal["light", "dark"]

RESEARCH: Final = "Not a diagnosis. For research use only."
CLINICAL: Final = "Not a diagnosis. Computed by an algorithm and not verified."
#: What the page is set in where it is installed. The last comes with matplotlib, whose other fonts have formulas and boxes for letters.
FACES: Final = ("Noto Sans", "DejaVu Sans")
_BROUGHT: Final = str(Path(str(util.find_spec("matplotlib").origin)).parent / "mpl-data" / "fonts" / "ttf")  # type: ignore[union-attr]
#: One character of each script, and who is named in it.
SCRIPTS: Final = {
    "Latin": "Ñ", "Greek": "Ω", "Cyrillic": "Ж", "Arabic": "ع", "Hebrew": "א", "Devanagari": "न", "Thai": "ก",
    "Han": "漢", "Kana": "あ", "Hangul": "한",
}  # fmt: skip
PIXELS_PER_INCH: Final = 144
UNSHOWN: Final = "\ufffd"
#: More than these would be too small to read; the structured report has them all.
_MOST_FINDINGS: Final = 14
_MOST_NAMED: Final = 8
_MOST_VALUES: Final = 8
_MOST_MISSING: Final = 5
#: The digits of a hash that a person compares.
_SHORT_HASH: Final = 12
#: What would reach past its own words (PS3.5 §6.1.3 control characters; Unicode TR9 embeddings, overrides and isolates).
_CONTROLS: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]+")
_WORDS: Final = {"positive": "Positive", "uncertain": "Uncertain", "negative": "Negative"}
_PARTS: Final = {"image": "Images", "values": "Values of the record", "text": "Texts of the record"}
# What a font must have for one character of it to be shown; an error names the first that has none.
_PROBE: Final = b"#set text(font: json(bytes(sys.inputs.fonts)), fallback: false)\n#for word in json(bytes(sys.inputs.words)) [#word \\ ]"


@cache
def fonts() -> typst.Fonts:
    """Return all fonts that are installed, and those that matplotlib brings; they are looked for once a process."""
    return typst.Fonts(include_embedded_fonts=False, font_paths=[_BROUGHT])


@cache
def families() -> list[str]:
    """Name the fonts to set the page in, in order of preference: `FACES`, what goes with them, any other that shows real letters."""
    found = {one.family for one in fonts().fonts() if not str(one.path).startswith(_BROUGHT) or one.family in FACES}
    real = (name for name in found if "last resort" not in name.lower())
    return sorted(real, key=lambda name: (FACES.index(name) if name in FACES else len(FACES), not name.startswith("Noto Sans"), name))


def scripts_without_font() -> list[str]:
    """Name the scripts of `SCRIPTS` that no installed font can show."""
    return [name for name, letter in SCRIPTS.items() if _has_no_glyph(letter)]


def render(result: Result, picture: Picture | None, *, theme: Theme, form: Literal["pdf", "png"]) -> bytes:
    """Set the page: the same result and picture give, with the same fonts, the same bytes.

    Raises
    ------
    ReportInvalid
        It cannot be set. What Typst says of it is not repeated: it quotes the page.
    """
    words = said(result, picture) | {"theme": theme, "fonts": families()}
    files = {"main.typ": resources.files("worker.report").joinpath("page.typ").read_bytes()}
    if picture is not None:
        files["picture.svg"] = _wrapped(picture)
    try:
        files["page.json"] = _shown(words)
        made = typst.compile(  # type: ignore[call-overload]  # its stub knows of no files in memory, its README does
            files,
            font_paths=fonts(),
            ignore_system_fonts=True,  # they are among `fonts()`
            format=form,
            ppi=PIXELS_PER_INCH,
            pdf_standards=["a-2a"] if form == "pdf" else [],
            timestamp=int(result.analysed_at.timestamp()),
        )
    except BaseException as error:
        # A panic of Typst is no Exception.
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise ReportInvalid(f"The summary page could not be set ({type(error).__name__}).") from None
    if not isinstance(made, bytes):
        raise ReportInvalid(f"The summary page became {len(made)} pages.")
    return made


def said(result: Result, picture: Picture | None) -> dict[str, Any]:
    """Everything that is written on the page, as page.typ lays it out."""
    algorithm, findings = result.algorithm, ranked(result.findings)
    made = _clean(f"Synoptic {algorithm.name} {algorithm.version}")
    marked = {outline.number for outline in picture.outlines} if picture else set()
    more = len(findings) - _MOST_FINDINGS
    return _whose(result) | {
        "title": _clean(f"AI summary: {algorithm.title or algorithm.name}"),
        "author": made,
        "answer": _answer(result, findings),
        "picture": _laid_out(picture) if picture else None,
        "findings": [_finding(one, number, number in marked, picture) for number, one in enumerate(findings[:_MOST_FINDINGS], start=1)],
        "findings-more": f"and {more} more, less probable, in the structured report" if more > 0 else "",
        "why": _why(result, findings[0], result.inputs) if findings and result.inputs else None,
        "missing": _missing(result.inputs) if findings and result.inputs else [],
        "notes": [_clean(sentence)] if (sentence := replacing.sentence(result)) else [],
        "statement": RESEARCH if algorithm.research_use else CLINICAL,
        "made": [
            _clean(" ".join((algorithm.title and f"{algorithm.title}.", algorithm.quality_statement))),
            f"{made} · bundle {algorithm.bundle_sha256[:_SHORT_HASH]} · input {algorithm.input_sha256[:_SHORT_HASH]}"
            f" · code {algorithm.code_version}",
        ],
    }


def _whose(result: Result) -> dict[str, Any]:
    """Patient and study, in the words of the images."""
    told = {element.keyword: str(element.value or "") for element in result.source.copied}
    patient, born, sex, day, clock, accession, what = (
        _clean(told.get(keyword, ""))
        for keyword in (
            "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "AccessionNumber", "StudyDescription",
        )
    )  # fmt: skip
    at = f"{_date(day)} {clock[:2]}:{clock[2:4]}".rstrip(" :")
    by = _clean(f"{result.algorithm.name} {result.algorithm.version}")
    return {
        "names": names(told.get("PatientName", "")) or ["Patient without a name"],
        "patient": " · ".join(filter(None, (f"ID {patient}", born and f"born {_date(born)}", sex))),
        "study": [
            ("Study", " · ".join(filter(None, (at, what or result.source.modality)))),
            ("Accession", accession or "none"),
            ("Analysed", f"{result.analysed_at.isoformat(' ', 'minutes')} by {by}"),
        ],
    }


def names(name: str) -> list[str]:
    """Write a PN (PS3.5 §6.2.1) as a person reads it, each of its groups: alphabetic, ideographic, phonetic."""
    found = []
    for number, group in enumerate(name.split("=")):
        family, *given = (_clean(part) for part in group.split("^"))
        # Where letters have two cases, a comma tells the family's name from the given.
        comma = ", " if number == 0 and family.upper() != family.lower() else " "
        found.append(comma.join(filter(None, (family, " ".join(filter(None, given))))))
    return list(dict.fromkeys(filter(None, found)))


def _answer(result: Result, findings: list[Finding]) -> dict[str, str]:
    """The answer in one line, what else was asked in a second one."""
    if result.failure:
        why = f"because {content.clause(_clean(result.failure))}."
        more = f"{why} No finding is stated: read the study as if no algorithm had been asked."
        return {"verdict": "failed", "word": "Could not be analysed", "text": "", "more": more}
    listed = {verdict: _listed(list(of)) for verdict, of in groupby(findings, key=lambda one: one.verdict)}
    first = findings[0].verdict
    others = f"{content.ATYPICAL_STATEMENT} " if any(one.is_atypical for one in findings) else ""
    others += "".join(f"{_WORDS[verdict]}: {of}. " for verdict, of in listed.items() if verdict != first or first == "negative")
    if first == "negative":
        return {"verdict": first, "word": "Nothing found", "text": "", "more": others.strip()}
    return {"verdict": first, "word": _WORDS[first], "text": listed[first], "more": others.strip()}


def _listed(findings: list[Finding]) -> str:
    named = [f"{_name(one.code.meaning or one.name)} ({_percent(one)})" for one in findings[:_MOST_NAMED]]
    more = len(findings) - len(named)
    return ", ".join(named) + (f" and {more} more" if more else "")


def _finding(finding: Finding, number: int, is_marked: bool, picture: Picture | None) -> dict[str, Any]:
    return {
        "number": number,
        "marked": is_marked,
        "name": _name(finding.code.meaning or finding.name),
        "verdict": finding.verdict,
        "word": _WORDS[finding.verdict],
        "probability": finding.probability,
        "threshold": finding.threshold,
        "percent": _percent(finding),
        "note": "its place is on another image" if finding.regions and picture and not is_marked else "",
    }


def _why(result: Result, finding: Finding, inputs: Inputs) -> dict[str, Any] | None:
    """What moved the first finding: the modalities' shares, and the values and texts of the record, the weightiest first."""
    latest: tuple[UsedValue | UsedText, ...] = (
        *inputs.values,
        *(history.points[-1] for history in inputs.histories if history.points),
        *inputs.texts,
    )
    given = {one.name: one for one in reversed(latest)}.values()
    heavy = sorted(given, key=lambda one: (-abs(finding.attributions.get(one.name, 0.0)), one.name))
    rows = [{"name": _PARTS.get(part, part), "value": "", "at": "", **_share(share)} for part, share in finding.shapley.items()]
    rows += [_given(one, finding, result) for one in heavy[:_MOST_VALUES]]
    more, is_told = len(heavy) - _MOST_VALUES, any(row["share"] is not None for row in rows)
    return (
        None
        if not rows
        else {
            "title": f"What moved “{_name(finding.code.meaning or finding.name)}”" if is_told else "Given of the record",
            "told": is_told,
            "rows": rows,
            "more": f"and {more} more of the record, of less weight, in the structured report" if more > 0 else "",
        }
    )


def _given(one: UsedValue | UsedText, finding: Finding, result: Result) -> dict[str, Any]:
    name, value = _name(one.code.meaning or one.name), ""
    if isinstance(one, UsedText):
        name += " (text)"
    else:
        value = _clean(f"{one.comparator} {one.value:.10g} {'' if one.unit == '1' else one.unit}")
    return {
        "name": name,
        "value": value,
        "at": _ago(one.at, result),
        **_share(finding.attributions.get(one.name)),
    }


def _ago(at: datetime, result: Result) -> str:
    """When, and how long before (−) or after the study: a person asks for both."""
    hours = (at - result.study.study_at).total_seconds() / 3600
    ago = f"{hours / 24:+.0f} d" if abs(hours) >= 48 else f"{hours:+.0f} h"
    told = "" if abs(hours) < 0.5 else f", {ago}".replace("-", "−")
    return f"{at.astimezone(result.zone):%Y-%m-%d %H:%M}{told}"


def _share(share: float | None) -> dict[str, Any]:
    rounded = round(share or 0.0, 2)
    return {"share": share, "said": "" if share is None else f"{rounded:+.2f}".replace("-", "−") if rounded else "0.00"}


def _missing(inputs: Inputs) -> list[str]:
    """What the network went without, and why; what lacks for one reason in one line."""
    causes: dict[str, list[str]] = {}
    for code, cause in zip(inputs.missing, inputs.missing_causes or [""] * len(inputs.missing), strict=True):
        causes.setdefault(_clean(cause), []).append(_name(code.meaning or code.value))
    lines = [f"{', '.join(names)}{': ' if cause else ''}{cause}" for cause, names in causes.items()]
    lines += [f"Image “{name}”: no series of the study fits" for name in inputs.missing_images]
    more = len(lines) - _MOST_MISSING
    return lines if more <= 0 else [*lines[:_MOST_MISSING], f"and {more} more, in the structured report"]


def _laid_out(picture: Picture) -> dict[str, Any]:
    rows, columns = picture.gray.shape
    outlines = [
        {"number": one.number, "lines": one.lines, "at": min((point for line in one.lines for point in line), key=lambda xy: xy[1])}
        for one in picture.outlines
    ]
    letters = dict(zip(("left", "right", "top", "bottom"), picture.letters, strict=True))
    return {"width": columns, "height": rows, "outlines": outlines, "letters": letters, "caption": _clean(picture.caption)}


def _wrapped(picture: Picture) -> bytes:
    """The pixels as an SVG: Typst takes files of text from memory, and none of the patient's is to be on a disk."""
    rows, columns = picture.gray.shape
    with BytesIO() as buffer:
        Image.fromarray(picture.gray).save(buffer, "png", compress_level=1)
        encoded = base64.b64encode(buffer.getvalue()).decode()
    size = f'width="{columns}" height="{rows}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><image {size} href="data:image/png;base64,{encoded}"/></svg>'.encode()


def _name(meaning: str) -> str:
    """A code's meaning without LOINC's property, time and system, which are for machines: "C reactive protein"."""
    return _clean(meaning.split(" [")[0])


def _percent(finding: Finding) -> str:
    """Only certainty itself is 0 or 100 %, as in the structured report."""
    percent = content.percent(finding.probability)
    return f"{percent:.1f} %" if 0.1 <= percent <= 99.9 or percent in (0, 100) else "< 0.1 %" if percent < 1 else "> 99.9 %"


def _date(digits: str) -> str:
    return f"{digits[:4]}-{digits[4:6]}-{digits[6:8]}" if len(digits) == 8 else _clean(digits)


def _clean(text: str) -> str:
    return " ".join(_CONTROLS.sub(" ", text).split())


def _shown(words: dict[str, Any]) -> bytes:
    """Write the words as JSON. What no installed font can show is replaced; the page says so, and so does an event."""
    text = json.dumps(words, ensure_ascii=False)
    if not _has_no_glyph(*set(text)):
        return text.encode(errors="replace")
    lost = [letter for letter in sorted(set(text)) if _has_no_glyph(letter)]
    events.emit("glyphs.missing", count=len(lost))
    words["notes"].append(f"{len(lost)} of the characters here have no font and are shown as {UNSHOWN}: the images have the words in full.")
    return json.dumps(words, ensure_ascii=False).translate(dict.fromkeys(map(ord, lost), UNSHOWN)).encode(errors="replace")


def _has_no_glyph(*letters: str) -> bool:
    """Ask Typst itself: PDF/A forbids what no font has (ISO 19005-2 §6.2.11.8), and 3 ms say so."""
    inputs = {"fonts": json.dumps(families()), "words": json.dumps(letters)}
    try:
        typst.compile(_PROBE, font_paths=fonts(), ignore_system_fonts=True, format="pdf", pdf_standards=["a-2b"], sys_inputs=inputs)
    except typst.TypstError:
        return True
    return False
