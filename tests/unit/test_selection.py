"""Which series are taken, and the words for it: whatever else a PACS sends along is left out by a rule that can be named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.sr.codedict import codes

from models.image_spec import ImageSpec, broken_image, matches
from tests.unit.test_inputs import series, study
from worker import selection
from worker.domain import ImageFacts, Instance, Series
from worker.errors import BundleError, NoSuitableSeries
from worker.selection import choices, choose

CT, SECONDARY, ENHANCED = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.7", "1.2.840.10008.5.1.4.1.1.2.1"
VOLUME = ImageSpec("image", "volume", ("CT",), (8, 8, 8), spacing_mm=(1, 1, 1), window_hu=(0, 1))
FILM = ImageSpec("image", "radiograph", ("DX", "CR", "MG"), (8, 8))
CLIP = ImageSpec("image", "frames", ("US",), (8, 8, 4))
AXIAL = ("ORIGINAL", "PRIMARY", "AXIAL")


def made(uid: str, *parts: tuple[int, ImageFacts], sop_class: str = CT, frames: int = 1, view: str = "", **changes: Any) -> Series:
    """A series of so many instances of each kind."""
    kinds = [facts for count, facts in parts for _ in range(count)]
    instances = tuple(Instance(f"{uid}.{n}", sop_class, "1.2.1", Path("x"), "", 1, view, frames, facts) for n, facts in enumerate(kinds, 1))
    return replace(Series(uid, "CT", "CHEST", "", instances), **changes)


def of_type(*values: str) -> ImageFacts:
    return ImageFacts(image_type=values)


def words(rule: ImageSpec, *found: Series) -> list[str]:
    """What is said of each series."""
    (choice,) = choices(study(*found), [rule])
    return [choice.words(one) for one in choice.judged]


def reason(rule: ImageSpec, found: Series) -> str:
    with pytest.raises(NoSuitableSeries) as caught:
        choose(study(found), [rule])
    return str(caught.value)


@pytest.mark.requirement("P9")
@pytest.mark.parametrize(
    ("values", "said"),
    [
        (("ORIGINAL", "PRIMARY", "LOCALIZER"), r"localizer: Image Type is ORIGINAL\PRIMARY\LOCALIZER"),
        (("ORIGINAL", "PRIMARY", "LOCALIZER", "CT_SOM5 TOP"), r"localizer: Image Type is ORIGINAL\PRIMARY\LOCALIZER\…"),
        (("DERIVED", "SECONDARY", "MPR", "DOE"), r"derived: Image Type is DERIVED\SECONDARY\MPR\…"),
        (("DERIVED", "PRIMARY", "AXIAL"), r"derived: Image Type is DERIVED\PRIMARY\AXIAL"),
        (("ORIGINAL", "SECONDARY"), r"derived: Image Type is ORIGINAL\SECONDARY"),
        (("ORIGINAL", "PRIMARY", "MIP_COR", "SUB"), r"MIP, made of other images: Image Type is ORIGINAL\PRIMARY\…\…"),
        (("DERIVED", "SECONDARY", "SCREEN SAVE"), r"SCREEN SAVE, made of other images: Image Type is DERIVED\SECONDARY\SCREEN SAVE"),
        (("DERIVED", "SECONDARY", "PROJECTION IMAGE"), "PROJECTION IMAGE, made of other images: Image Type is"),
    ],
)
def test_a_localizer_a_projection_and_a_screen_capture_are_no_volume_and_the_sentence_says_which(
    values: tuple[str, ...], said: str
) -> None:
    """The larger series of them loses against the smaller one of plain slices, and a study of nothing else is refused."""
    wrong = made("1.1", (40, of_type(*values)))
    assert choose(study(wrong, made("1.2", (9, of_type(*AXIAL)))), [VOLUME])["image"].series_instance_uid == "1.2"
    assert said in reason(VOLUME, wrong)


@pytest.mark.requirement("P9")
def test_a_localizer_among_the_slices_of_a_series_is_left_out_and_the_others_are_taken() -> None:
    mixed = made("1.1", (1, of_type("ORIGINAL", "PRIMARY", "LOCALIZER")), (20, of_type(*AXIAL)))
    taken = choose(study(mixed), [VOLUME])["image"]
    assert [one.sop_instance_uid for one in taken.instances] == [f"1.1.{n}" for n in range(2, 22)]
    assert words(VOLUME, mixed) == [r"taken: 20 images; 1 of 21 instances left out: localizer: Image Type is ORIGINAL\PRIMARY\LOCALIZER"]


@pytest.mark.requirement("P9")
@pytest.mark.parametrize("kind", [VOLUME, FILM, CLIP])
def test_a_secondary_capture_is_taken_only_where_the_bundle_says_so(kind: ImageSpec) -> None:
    capture = made("1.1", (20, ImageFacts()), sop_class=SECONDARY, frames=0, modality=kind.modalities[0])
    assert "a secondary capture, and the bundle takes none" in reason(kind, capture)
    assert choose(study(capture), [replace(kind, derived=True)])
    assert choose(study(capture), [replace(kind, sop_classes=("SecondaryCaptureImageStorage",))])


@pytest.mark.requirement("P9")
@pytest.mark.parametrize(
    ("sop_class", "modality"),
    [
        ("1.2.840.10008.5.1.4.1.1.88.33", "CT"),  # a report that says it is a CT
        ("1.2.840.10008.5.1.4.1.1.88.59", "KO"),
        ("1.2.840.10008.5.1.4.1.1.11.1", "PR"),
        ("1.2.840.10008.5.1.4.1.1.66.4", "SEG"),
        ("1.2.840.10008.5.1.4.1.1.66", "CT"),
        ("1.2.840.10008.5.1.4.1.1.481.3", "RTSTRUCT"),
        ("1.2.840.10008.5.1.4.1.1.104.1", "OT"),
        ("1.2.840.10008.5.1.4.1.1.9.1.1", "ECG"),
        ("1.2.840.10008.5.1.4.1.1.30", "MR"),
    ],
)
def test_reports_segmentations_raw_data_and_documents_are_never_images_whatever_they_call_themselves(sop_class: str, modality: str) -> None:
    anything = replace(VOLUME, modalities=(), derived=True)
    found = made("1.1", (20, of_type(*AXIAL)), sop_class=sop_class, modality=modality)
    assert "holds no image" in reason(anything, found) or "is not of images" in reason(anything, found)


@pytest.mark.requirement("P9")
def test_a_radiograph_is_usually_derived_and_is_taken_but_a_secondary_one_is_not() -> None:
    """Of 188 films of one hospital all say DERIVED PRIMARY (the flat field and the gain are corrected)."""
    film = made("1.1", (1, of_type("DERIVED", "PRIMARY")), modality="DX")
    assert choose(study(film), [FILM])
    assert "derived: Image Type is" in reason(replace(FILM, derived=False), film)
    assert "derived: Image Type is" in reason(FILM, made("1.1", (1, of_type("DERIVED", "SECONDARY")), modality="DX"))


@pytest.mark.requirement("P9")
def test_raw_data_for_processing_give_way_to_the_film_for_presentation() -> None:
    raw = made("1.1", (2, ImageFacts(intent="FOR PROCESSING")), modality="MG")
    shown = made("1.2", (1, ImageFacts(intent="FOR PRESENTATION")), modality="MG")
    assert choose(study(raw, shown), [FILM])["image"].series_instance_uid == "1.2"
    assert "raw data for processing" in reason(FILM, raw)


@pytest.mark.requirement("P13")
@pytest.mark.parametrize(
    ("changes", "fits", "misfits", "said"),
    [
        ({"body_parts": ("CHEST",)}, ImageFacts(body_part="THORAX"), ImageFacts(body_part="HEAD"), "body part is not CHEST"),
        ({"body_parts": ("CHEST",)}, ImageFacts(region="T-D3000"), ImageFacts(region="T-D1100"), "body part is not CHEST"),
        ({"body_parts": ("51185008",)}, ImageFacts(body_part="CHEST"), ImageFacts(body_part="KNEE"), "body part is not 51185008"),
        ({"laterality": "L"}, ImageFacts(laterality="L"), ImageFacts(laterality="R"), "laterality R is not L"),
        ({"contrast": "with"}, ImageFacts(has_contrast=True), ImageFacts(has_contrast=False), "no contrast agent is told"),
        ({"contrast": "without"}, ImageFacts(has_contrast=False), ImageFacts(has_contrast=True), "a contrast agent was given"),
        ({"kernels": ("/^B[3-5]/",)}, ImageFacts(kernel="B30F"), ImageFacts(kernel="B70F"), "the convolution kernel is not"),
        ({"pixel_mm": (0.5, 1.0)}, ImageFacts(pixel_mm=(0.7, 0.7)), ImageFacts(pixel_mm=(0.7, 2.0)), "pixels of 0.7 x 2 mm are not"),
        ({"slice_mm": (0.5, 2.5)}, ImageFacts(slice_mm=1.0), ImageFacts(slice_mm=3.0), "slices of 3 mm are not within 0.5 to 2.5 mm"),
        ({"orientation": "axial"}, ImageFacts(orientation="axial"), ImageFacts(orientation="coronal"), "orientation coronal is not axial"),
        ({"image_types": ("AXIAL",)}, of_type(*AXIAL), of_type("ORIGINAL", "PRIMARY", "OTHER"), "does not hold AXIAL"),
    ],
)
def test_a_series_outside_what_the_bundle_takes_is_refused_with_the_rule_and_its_numbers(
    changes: dict[str, Any], fits: ImageFacts, misfits: ImageFacts, said: str
) -> None:
    rule = replace(VOLUME, **changes)
    assert (
        choose(study(made("1.1", (9, misfits), body_part=""), made("1.2", (3, fits), body_part="")), [rule])["image"].series_instance_uid
        == "1.2"
    )
    assert said in reason(rule, made("1.1", (9, misfits), body_part=""))
    if "kernels" not in changes:  # a kernel must be told; all else that is not known excludes nothing
        assert choose(study(made("1.1", (9, ImageFacts()), body_part="")), [rule])


@pytest.mark.requirement("P13")
def test_another_sop_class_is_refused_and_one_that_does_not_exist_is_found_when_the_bundle_is_read() -> None:
    rule = replace(VOLUME, sop_classes=("CTImageStorage", ENHANCED))
    selection.check(rule)
    assert choose(study(made("1.1", (5, ImageFacts()), sop_class=ENHANCED)), [rule])
    assert "SOP Class MR Image Storage is not" in reason(rule, made("1.1", (5, ImageFacts()), sop_class="1.2.840.10008.5.1.4.1.1.4"))
    with pytest.raises(BundleError, match="'CTImagesStorage' is no SOP Class"):
        selection.check(replace(VOLUME, sop_classes=("CTImagesStorage",)))


def test_frames_count_as_images_and_a_series_may_have_too_many() -> None:
    rule = replace(VOLUME, min_instances=12, max_instances=400)
    assert choose(study(made("1.1", (1, ImageFacts()), sop_class=ENHANCED, frames=300)), [rule])
    assert "5 images are fewer than 12" in reason(rule, made("1.1", (5, ImageFacts())))
    assert "900 images are more than 400" in reason(rule, made("1.1", (3, ImageFacts()), sop_class=ENHANCED, frames=300))


def test_a_clip_needs_frames_and_a_radiograph_has_one() -> None:
    assert "a single frame" in reason(CLIP, made("1.1", (5, ImageFacts()), modality="US"))
    assert choose(study(made("1.1", (1, ImageFacts()), modality="US", frames=30)), [CLIP])
    assert "30 frames in one instance" in reason(FILM, made("1.1", (1, ImageFacts()), modality="DX", frames=30))


def test_preferences_come_before_the_number_of_images_and_ties_are_decided_and_said() -> None:
    rule = replace(VOLUME, prefer=("lung", "/^B[6-7]/"))
    found = [
        made("1.1", (40, ImageFacts()), description="SENTINEL abdomen"),
        made("1.2", (20, ImageFacts(kernel="B60F")), description="Lung 1.0"),
        made("1.4", (20, ImageFacts(kernel="B60F")), description="Lung 1.0"),
        made("1.3", (10, ImageFacts(kernel="B60F")), description="Lung 1.0"),
        made("1.5", (9, of_type("ORIGINAL", "PRIMARY", "LOCALIZER"))),
    ]
    assert words(rule, *found) == [
        "fits, but 0 of 2 preferences, 40 images; series 2 has 2 of 2 preferences, 20 images",
        "taken: 2 of 2 preferences, 20 images",
        "fits as well as series 2, which has the smaller UID",
        "fits, but has 10 images; series 2 has 20",
        r"localizer: Image Type is ORIGINAL\PRIMARY\LOCALIZER",
    ]
    (choice,) = choices(study(*found), [replace(rule, modalities=("MR",))])
    assert choice.taken is None
    assert not any("SENTINEL" in choice.words(one) for one in choice.judged)


def test_of_two_images_each_says_whom_the_other_series_serves() -> None:
    first, second = replace(VOLUME, name="first"), replace(VOLUME, name="second", required=False)
    (_, choice) = choices(study(series("1.1", count=9)), [first, second])
    assert (choice.taken, choice.words(choice.judged[0])) == (None, "fits, but serves image 'first'")


@pytest.mark.parametrize(
    ("pattern", "text", "is_found"),
    [
        ("lung", "Thorax LUNG 1.0", True),
        ("/^thorax.*1\\.0$/", "Thorax LUNG 1.0", True),
        ("/^lung/", "Thorax LUNG 1.0", False),
        ("x" * 3, "y" * 64 + "xxx", False),  # no more than 64 characters are looked at
        ("/", "a/b", True),
    ],
)
def test_a_pattern_is_words_or_an_expression_and_looks_at_64_characters(pattern: str, text: str, is_found: bool) -> None:
    assert matches(pattern, text) is is_found


@pytest.mark.parametrize(
    "pattern", ["/(a+)+$/", "/(a|b)*c/", "/[/", "/" + "a?" * 9 + "/", "/" + "a" * 70 + "/", "", " ", "/(?P<x>a)(?P=x)/"]
)
def test_an_expression_that_could_be_kept_busy_is_refused_with_the_bundle(pattern: str) -> None:
    """The bundle's author is trusted, but not to know how long an expression may take on a description that somebody else wrote."""
    assert any("none of a group" in rule for rule in broken_image(replace(VOLUME, descriptions=(pattern,)), []))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"slice_mm": (2.0, 1.0)}, "slice_mm must be"),
        ({"pixel_mm": (1.0,)}, "pixel_mm must be"),
        ({"pixel_mm": (float("nan"), 1.0)}, "pixel_mm must be"),
        ({"min_instances": 5, "max_instances": 4}, "max_instances must be"),
        ({"sop_classes": ("CT",)}, "sop_classes must be"),
        ({"image_types": ("localizer",)}, "must not share a value"),
        ({"image_types": ("",)}, "nor hold an empty one"),
        ({"intensity": {"p2": (0.0, 1.0)}}, "intensity and tensor hold"),
        ({"tensor": {"mean": (1.0, 0.0)}}, "intensity and tensor hold"),
        ({"kind": "frames", "spacing_mm": (), "window_hu": (), "stack": "first"}, "not to frames"),
        ({"kind": "radiograph", "size": (8, 8), "spacing_mm": (), "window_hu": (), "gantry_tilt": "correct"}, "belong to a volume"),
        ({"kind": "frames", "size": (8, 8), "spacing_mm": (), "window_hu": ()}, "size needs 2 numbers"),
    ],
)
def test_a_rule_that_cannot_be_is_refused_by_name(changes: dict[str, Any], said: str) -> None:
    assert any(said in rule for rule in broken_image(replace(VOLUME, **changes), []))


def test_what_the_rules_take_for_granted_is_no_broken_rule() -> None:
    for spec in (VOLUME, FILM, CLIP, replace(VOLUME, descriptions=("/^[(*+?]+lung (1|2)\\.0/",), image_types=("AXIAL",))):
        assert broken_image(spec, []) == []


@pytest.mark.parametrize(
    ("name", "part"),
    [("CervicalSpine", "CSPINE"), ("Head", "HEAD"), ("Brain", "BRAIN"), ("Thorax", "CHEST"), ("Abdomen", "ABDOMEN"), ("Pelvis", "PELVIS"),
     ("Knee", "KNEE"), ("Foot", "FOOT"), ("Hand", "HAND"), ("AnkleJoint", "ANKLE"), ("Liver", "LIVER"), ("Lung", "LUNG"),
     ("Prostate", "PROSTATE"), ("Breast", "BREAST"), ("ChestAndAbdomen", "CHESTABDOMEN"), ("EntireBody", "WHOLEBODY")],
)  # fmt: skip
def test_the_codes_of_body_parts_are_those_of_the_standard(name: str, part: str) -> None:
    assert selection._PART_OF[getattr(codes.cid4, name).value] == part


def test_no_code_or_word_of_a_body_part_stands_for_two() -> None:
    words_ = [word for line in selection.PARTS for word in line]
    assert len(set(words_)) == len(words_)


facts = st.builds(
    ImageFacts,
    image_type=st.sampled_from([(), AXIAL, ("ORIGINAL", "PRIMARY", "LOCALIZER"), ("DERIVED", "SECONDARY")]),
    slice_mm=st.sampled_from([0.0, 1.0, 9.0]),
    kernel=st.sampled_from(["", "B30F"]),
)


@given(st.lists(st.lists(facts, min_size=1, max_size=4), min_size=1, max_size=4).flatmap(lambda s: st.tuples(st.just(s), st.randoms())))
def test_the_choice_does_not_depend_on_the_order_in_which_anything_came_and_its_words_are_never_empty(drawn: Any) -> None:
    parts, random = drawn
    rule = replace(VOLUME, slice_mm=(0.5, 2.0), prefer=("B30",), required=False)
    found = [made(f"1.{n}", *((1, one) for one in kinds)) for n, kinds in enumerate(parts)]
    shuffled = [replace(one, instances=tuple(random.sample(one.instances, len(one.instances)))) for one in found]
    random.shuffle(shuffled)
    (first,), (second,) = choices(study(*found), [rule]), choices(study(*shuffled), [rule])
    assert (first.taken is None) == (second.taken is None)
    if first.taken and second.taken:
        assert first.taken.series.series_instance_uid == second.taken.series.series_instance_uid
        assert set(first.taken.series.instances) == set(second.taken.series.instances)
        assert all("LOCALIZER" not in one.facts.image_type for one in first.taken.series.instances)
    assert all(first.words(one) for one in first.judged)
