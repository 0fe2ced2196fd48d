"""Which series each image of a bundle is made of, and why: rules, a score, ties decided, every answer in words.

::

    study ─▶ each distinct instance of a series against the rule ─▶ fits, or the first rule that says no, with its numbers
                         └─ of those that fit: enough? not too many? ─▶ score: patterns preferred, images, smaller UID
    images in the bundle's order ─▶ each takes the best series of which no instance serves another image

What a series does not say of itself excludes it only where a rule needs it told (descriptions, kernels, contrast "with"). An instance
that does not fit among others that do is left out: a localizer in front of a volume, the lateral film beside the frontal one.
Pure functions; sentences repeat the bundle's words and defined terms, never what a sender wrote freely.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Final

from pydicom import uid as uids
from pydicom.uid import UID

from models.image_spec import ImageSpec, matches
from worker.domain import Instance, Series, Study
from worker.errors import BundleError, NoSuitableSeries

#: Modalities without an image (PS3.3 §C.7.3.1.1.1). Reports come back to us, our own among them: "any modality" is never these.
_NO_IMAGES: Final = frozenset(
    {
        "SR", "KO", "PR", "SEG", "REG", "FID", "RWV", "DOC", "PLAN", "RTSTRUCT", "RTPLAN", "RTRECORD", "RTDOSE", "RTRAD",
        "AU", "ECG", "EPS", "HD", "RESP", "EEG", "EMG", "EOG", "M3D", "ANN", "SMR", "STAIN", "TEXTUREMAP",
    }
)  # fmt: skip
# PS3.4 §B.5: presentation states, waveforms, raw data and segmentations, surfaces, measurements, reports, encapsulated documents,
# radiotherapy other than its images, spectroscopy, parametric maps, protocols.
_NO_IMAGE_CLASSES: Final = tuple(
    f"1.2.840.10008.5.1.4.1.1.{arc}"
    for arc in ("9.", "11.", "66", "67", "68.", "78.", "79.", "80.", "81.", "88.", "90.", "91.", "104.", "200.", "30", "4.2")
)
_RADIOTHERAPY: Final = "1.2.840.10008.5.1.4.1.1.481."
_RT_IMAGE: Final = "1.2.840.10008.5.1.4.1.1.481.1"
_SECONDARY_CAPTURE: Final = "1.2.840.10008.5.1.4.1.1.7"
#: What programs and consoles write into Image Type of what they made of images (GE, Philips, Siemens); a whole value or a word of one.
_MADE: Final = frozenset({"MIP", "MINIP", "MNIP", "PROJECTION IMAGE", "SCREEN SAVE", "SCREENSHOT"})
#: Of a sender's Image Type only these are repeated.
_TERMS: Final = frozenset({"ORIGINAL", "DERIVED", "PRIMARY", "SECONDARY", "AXIAL", "LOCALIZER", "VOLUME", "OTHER", "MPR"}) | _MADE

#: Body Part Examined and Anatomic Region, each line one part: defined terms and what is written for them, SNOMED CT, SNOMED RT
# (PS3.16 Annex L, CID 4; codes as pydicom knows them, and those that CT has retired).
PARTS: Final = (
    ("CHEST", "THORAX", "51185008", "816094009", "T-D3000"),
    ("ABDOMEN", "818981001", "818983003", "113345001", "T-D4000"),
    ("PELVIS", "816092008", "12921003", "T-D6000"),
    ("ABDOMENPELVIS", "ABDOMEN_PELVIS", "818982008", "R-FAB57"),
    ("CHESTABDOMEN", "CHEST_ABDOMEN", "416550000", "R-FAB55"),
    ("CHESTABDPELVIS", "CHEST_ABD_PELVIS", "416775004", "R-FAB56"),
    ("HEAD", "69536005", "T-D1100"),
    ("BRAIN", "12738006", "T-A0100"),
    ("SKULL", "89546000", "T-11100"),
    ("HEADNECK", "HEAD_NECK", "774007", "T-D1000"),
    ("NECK", "45048000", "T-D1600"),
    ("SPINE", "421060004", "T-D04FF"),
    ("CSPINE", "C_SPINE", "122494005", "T-11501"),
    ("TSPINE", "T_SPINE", "122495006", "T-11502"),
    ("LSPINE", "L_SPINE", "122496007", "T-11503"),
    ("BREAST", "76752008", "T-04000"),
    ("HEART", "80891009", "T-32000"),
    ("LUNG", "39607008", "T-28000"),
    ("LIVER", "10200004", "T-62000"),
    ("KIDNEY", "64033007", "T-71000"),
    ("PROSTATE", "41216001", "T-92000"),
    ("SHOULDER", "16982005", "T-D2220"),
    ("ELBOW", "16953009", "T-15430"),
    ("WRIST", "74670003", "T-15460"),
    ("HAND", "85562004", "T-D8700"),
    ("HIP", "24136001", "29836001", "T-15710", "T-D2500"),
    ("KNEE", "72696002", "T-D9200"),
    ("ANKLE", "70258002", "T-15750"),
    ("FOOT", "56459004", "T-D9700"),
    ("WHOLEBODY", "WHOLE BODY", "WHOLE_BODY", "38266002", "T-D0010"),
)
_PART_OF: Final = {word: words[0] for words in PARTS for word in words}


@dataclass(frozen=True, slots=True)
class Judged:
    """What one image's rules make of one series: its `number` in the study from 1, and its instances that fit, if it does.

    `reason` says why it does not fit, '' if it does; `left_out` why some of its instances do not. `preferred` counts the patterns of
    `prefer` found in it, `images` its images that fit, each frame one.
    """

    number: int
    series: Series
    reason: str
    preferred: int = 0
    images: int = 0
    left_out: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """One image's choice among the series of a study, in the order of the study; `taken` is one of `judged`, or none is free."""

    image: ImageSpec
    judged: tuple[Judged, ...]
    taken: Judged | None
    #: By number of the series: the image that it serves already.
    serving: tuple[tuple[int, str], ...] = ()

    def words(self, one: Judged) -> str:
        """Why `one` is taken or not."""
        if one is self.taken:
            return f"taken: {_score(one, self.image)}" + (f"; {one.left_out}" if one.left_out else "")
        if one.reason:
            return one.reason
        other = dict(self.serving).get(one.number)
        if other is not None:
            return f"fits, but serves image {other!r}"
        assert self.taken is not None  # noqa: S101  what fits and is free is taken, or another is
        if one.preferred < self.taken.preferred:
            return f"fits, but {_score(one, self.image)}; series {self.taken.number} has {_score(self.taken, self.image)}"
        if one.images < self.taken.images:
            return f"fits, but has {one.images} images; series {self.taken.number} has {self.taken.images}"
        return f"fits as well as series {self.taken.number}, which has the smaller UID"


def takes(modalities: Collection[str], modality: str) -> bool:
    """Whether an image of these modalities may be made of a series of `modality`; none named: any that has pixels."""
    return modality in modalities if modalities else modality not in _NO_IMAGES


def holds_image(sop_class_uid: str) -> bool:
    """Whether objects of this class have pixels to analyse: raw data of a scanner call themselves MR, too."""
    is_other = sop_class_uid.startswith(_NO_IMAGE_CLASSES)
    return not is_other and (not sop_class_uid.startswith(_RADIOTHERAPY) or sop_class_uid == _RT_IMAGE)


def is_capture(sop_class_uid: str) -> bool:
    """Whether this is a Secondary Capture, of one frame or several: dose reports and screens call themselves CT, too."""
    return sop_class_uid == _SECONDARY_CAPTURE or sop_class_uid.startswith(_SECONDARY_CAPTURE + ".")


def takes_captures(rule: ImageSpec) -> bool:
    """Whether `rule` may fit a secondary capture."""
    return bool(rule.derived or rule.sop_classes)


def choices(study: Study, images: Sequence[ImageSpec]) -> tuple[Choice, ...]:
    """Judge every series for every image; each image in turn takes the best that is still free."""
    made: list[Choice] = []
    used: dict[str, str] = {}  # SOP Instance UID → image
    for image in images:
        judged = tuple(_judged(number, series, image) for number, series in enumerate(study.series, 1))
        serving: dict[int, str] = {}
        free: list[Judged] = []
        for one in judged:
            if one.reason:
                continue
            others = {used[i.sop_instance_uid] for i in one.series.instances if i.sop_instance_uid in used}
            if others:
                serving[one.number] = min(others)
            else:
                free.append(one)
        taken = min(free, key=_rank, default=None)
        made.append(Choice(image, judged, taken, tuple(serving.items())))
        used |= {i.sop_instance_uid: image.name for i in taken.series.instances} if taken else {}
    return tuple(made)


def choose(study: Study, images: Sequence[ImageSpec]) -> dict[str, Series]:
    """The series of each image that has one, with those of its instances that fit.

    Raises
    ------
    NoSuitableSeries
        An image the bundle requires has no series, or none has; the sentence says how each series falls short.
    """
    made = choices(study, images)
    for one in made:
        if one.taken is None and one.image.required:
            raise NoSuitableSeries(_lack(one, is_only=len(images) == 1))
    chosen = {one.image.name: one.taken.series for one in made if one.taken is not None}
    if not chosen:
        raise NoSuitableSeries(" ".join(_lack(one, is_only=len(images) == 1) for one in made))
    return chosen


def suitable_series(study: Study, rule: ImageSpec) -> tuple[Series, ...]:
    """Return the series that fit `rule`, best first, with those of their instances that fit."""
    judged = (_judged(number, series, rule) for number, series in enumerate(study.series, 1))
    return tuple(one.series for one in sorted((one for one in judged if not one.reason), key=_rank))


def check(rule: ImageSpec) -> None:
    """Refuse a rule that no series can meet, for it names a SOP Class that there is none of (BundleError)."""
    for name in rule.sop_classes:
        if not name[0].isdecimal() and not isinstance(getattr(uids, name, None), UID):
            raise BundleError(f"Image {rule.name!r}: {name!r} is no SOP Class of PS3.6; write its keyword, or its UID.")


def _rank(one: Judged) -> tuple[int, int, str]:
    return -one.preferred, -one.images, one.series.series_instance_uid


def _score(one: Judged, image: ImageSpec) -> str:
    preferred = f"{one.preferred} of {len(image.prefer)} preferences, " if image.prefer else ""
    return f"{preferred}{one.images} image{'s' if one.images != 1 else ''}"


def _lack(choice: Choice, *, is_only: bool) -> str:
    fitting = sum(not one.reason for one in choice.judged)
    reasons = sorted({one.reason for one in choice.judged} - {""})
    if fitting:  # and yet none is free
        reasons.append("the series that fits serves another image")
    return (
        ("" if is_only else f"Image {choice.image.name!r}: ")
        + f"1 suitable series needed, {fitting} of {len(choice.judged)} fit"
        + (f": {'; '.join(reasons)}." if reasons else ".")
    )


# --- the rules -----------------------------------------------------------------------------------


def _judged(number: int, series: Series, rule: ImageSpec) -> Judged:
    if not takes(rule.modalities, series.modality):
        known = series.modality if series.modality.isalnum() and len(series.modality) <= 16 else "unknown"
        return Judged(number, series, f"modality {known} is not {' or '.join(rule.modalities) or 'of images'}")
    if reason := _misnamed(series.description, rule):
        return Judged(number, series, reason)
    fitting, others = _sorted_out(series, rule)
    images = sum(max(1, one.frames) for one in fitting)
    left_out = ""
    if others:
        reason, count = min(others.items(), key=lambda item: (-item[1], item[0]))
        left_out = f"{others.total()} of {len(series.instances)} instances left out: {reason}"
        if not fitting:
            is_same = len(others) == 1
            return Judged(number, series, reason if is_same else f"{reason} ({count} of {len(series.instances)} instances, others differ)")
    if reason := _miscounted(images, rule):
        return Judged(number, series, f"{reason}; {left_out}" if left_out else reason)
    found = replace(series, instances=fitting) if others else series
    told = {text for i in fitting for text in (series.description, i.facts.kernel, " ".join(i.facts.image_type))}
    preferred = sum(any(matches(pattern, text) for text in told) for pattern in rule.prefer)
    return Judged(number, found, "", preferred, images, left_out)


def _sorted_out(series: Series, rule: ImageSpec) -> tuple[tuple[Instance, ...], Counter[str]]:
    """The instances that fit, and how many do not for which reason. What instances share is judged once."""
    reasons: dict[tuple[object, ...], str] = {}
    fitting: list[Instance] = []
    others: Counter[str] = Counter()
    for one in series.instances:
        kind = (one.facts, one.view, one.frames, one.sop_class_uid)
        if kind not in reasons:
            reasons[kind] = next((reason for check_ in _RULES if (reason := check_(one, series, rule))), "")
        if reasons[kind]:
            others[reasons[kind]] += 1
        else:
            fitting.append(one)
    return tuple(fitting), others


def _misnamed(description: str, rule: ImageSpec) -> str:
    """Why a description does not fit, or ''. Its words may name a person: only the rule's own are repeated."""
    if word := next((w for w in rule.exclude_descriptions if matches(w, description)), ""):
        return f"the series description holds the excluded word {word!r}"
    if rule.descriptions and not any(matches(w, description) for w in rule.descriptions):
        return f"the series description does not hold {' or '.join(map(repr, rule.descriptions))}"
    return ""


def _miscounted(images: int, rule: ImageSpec) -> str:
    if images < rule.min_instances:
        return f"{images} images are fewer than {rule.min_instances}"
    if rule.max_instances and images > rule.max_instances:
        return f"{images} images are more than {rule.max_instances}"
    return ""


def _of_class(one: Instance, _series: Series, rule: ImageSpec) -> str:
    uid = one.sop_class_uid
    if not holds_image(uid):
        return f"{_name_of(uid)} holds no image"
    if rule.sop_classes and uid not in rule.sop_classes and UID(uid).keyword not in rule.sop_classes:
        return f"{_name_of(uid)} is not {' or '.join(rule.sop_classes)}"
    if is_capture(uid) and not takes_captures(rule):
        return "a secondary capture, and the bundle takes none"
    if one.facts.intent == "FOR PROCESSING" and rule.kind == "radiograph":
        return "raw data for processing, not for presentation"
    return ""


def _name_of(uid: str) -> str:
    name = UID(uid).name
    return f"SOP Class {name}" if name != uid else "an unknown SOP Class"


def _of_type(one: Instance, _series: Series, rule: ImageSpec) -> str:
    told = one.facts.image_type
    if not told:
        return ""
    words = {*told, *(word for value in told for word in value.replace("_", " ").split())}
    if excluded := sorted(words & {value.strip().upper() for value in rule.exclude_image_types}):
        what = "localizer" if "LOCALIZER" in excluded else f"excluded type {excluded[0]}"
        return f"{what}: Image Type is {_shown(told, rule)}"
    wanted = {value.strip().upper() for value in rule.image_types}
    if wanted and not wanted & words:
        return f"Image Type {_shown(told, rule)} does not hold {' or '.join(rule.image_types)}"
    if rule.derived or wanted & words & (_MADE | {"DERIVED", "SECONDARY"}):
        return ""
    if made := sorted(words & _MADE):
        return f"{made[0]}, made of other images: Image Type is {_shown(told, rule)}"
    is_strict = rule.derived is False or rule.kind == "volume"
    if told[1:2] == ("SECONDARY",) or (is_strict and told[0] == "DERIVED"):
        return f"derived: Image Type is {_shown(told, rule)}"
    return ""


def _shown(told: Sequence[str], rule: ImageSpec) -> str:
    r"""An Image Type as ORIGINAL\PRIMARY\…, only with words that are defined or the bundle's own."""
    known = _TERMS | {value.strip().upper() for value in (*rule.image_types, *rule.exclude_image_types)}
    return "\\".join(value if value in known else "…" for value in told[:4])


def _of_part(one: Instance, series: Series, rule: ImageSpec) -> str:
    # Both are optional or conditional (PS3.3 §C.7.3.1): absent ones are no reason to refuse.
    told = {part for part in (one.facts.body_part or series.body_part.strip().upper(), one.facts.region) if part}
    wanted = {_PART_OF.get(part.upper(), part.upper()) for part in rule.body_parts}
    if wanted and told and not wanted & {_PART_OF.get(part, part) for part in told}:
        return f"body part is not {' or '.join(rule.body_parts)}"
    if rule.laterality and one.facts.laterality not in ("", "U", rule.laterality):
        return f"laterality {one.facts.laterality} is not {rule.laterality}"
    return ""


def _of_view(one: Instance, _series: Series, rule: ImageSpec) -> str:
    # An image that does not say its view may be of any.
    if rule.views and one.view and one.view not in rule.views:
        return f"no image is of view {' or '.join(rule.views)}"
    return ""


def _of_frames(one: Instance, _series: Series, rule: ImageSpec) -> str:
    if rule.kind == "frames" and one.frames == 1:
        return "a single frame, and the bundle takes clips"
    if rule.kind == "radiograph" and one.frames > 1:
        return f"{one.frames} frames in one instance, and the bundle takes single images"
    return ""


def _of_acquisition(one: Instance, _series: Series, rule: ImageSpec) -> str:
    has_agent = one.facts.has_contrast
    if rule.contrast == "with" and has_agent is False:
        return "no contrast agent is told, and the bundle takes images with one"
    if rule.contrast == "without" and has_agent:
        return "a contrast agent was given, and the bundle takes images without"
    if rule.kernels and not any(matches(pattern, one.facts.kernel) for pattern in rule.kernels):
        return f"the convolution kernel is not {' or '.join(map(repr, rule.kernels))}"
    return ""


def _of_place(one: Instance, series: Series, rule: ImageSpec) -> str:
    orientation, slice_mm = one.facts.orientation or series.orientation, one.facts.slice_mm or series.slice_mm
    if rule.orientation and orientation and orientation != rule.orientation:
        return f"orientation {orientation} is not {rule.orientation}"
    if rule.slice_mm and slice_mm and not rule.slice_mm[0] <= slice_mm <= rule.slice_mm[1]:
        return f"slices of {slice_mm:g} mm are not within {rule.slice_mm[0]:g} to {rule.slice_mm[1]:g} mm"
    pixel_mm = one.facts.pixel_mm
    if rule.pixel_mm and pixel_mm and not all(rule.pixel_mm[0] <= mm <= rule.pixel_mm[1] for mm in pixel_mm):
        return f"pixels of {pixel_mm[0]:g} x {pixel_mm[1]:g} mm are not within {rule.pixel_mm[0]:g} to {rule.pixel_mm[1]:g} mm"
    return ""


#: In the order in which they are asked: the first that says no is the reason.
_RULES: Final[tuple[Callable[[Instance, Series, ImageSpec], str], ...]] = (
    _of_class, _of_type, _of_part, _of_view, _of_frames, _of_acquisition, _of_place,
)  # fmt: skip
