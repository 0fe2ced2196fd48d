"""Series of several stacks: each is found, named in words and never mixed, whatever the order, the names and the folders of the files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import FileDataset

from tests import factories
from worker.domain import Series
from worker.errors import GeometryError
from worker.imaging import volume
from worker.imaging.decoding import DecoderPool

Datasets = list[FileDataset]


def stack(
    seed: int, slices: int = 5, modality: str = "MR", image_type: Sequence[str] = ("ORIGINAL", "PRIMARY", "M"), **said: object
) -> Datasets:
    """Make one stack whose voxels are those of `known_hu(slices, seed=seed)`."""
    datasets = factories.make_ct(slices=slices, seed=seed)
    for ds in datasets:
        ds.Modality, ds.ImageType = modality, list(image_type)
        for keyword, value in said.items():
            setattr(ds, keyword, value)
    return datasets


def ct(seed: int, **said: object) -> Datasets:
    """Make one stack of a CT."""
    return stack(seed, 5, "CT", ("ORIGINAL", "PRIMARY", "AXIAL"), **said)


def timed(seed: int, second: int) -> Datasets:
    """Make one stack whose slices were acquired one after the other, from `second` on."""
    datasets = stack(seed)
    for k, ds in enumerate(datasets):
        ds.AcquisitionTime = f"1030{second + k:02d}.5"
    return datasets


def beating(seed: int, phase: int) -> Datasets:
    """Make one phase of a heart: the trigger time is a little different in each slice."""
    datasets = stack(seed)
    for k, ds in enumerate(datasets):
        ds.TriggerTime = 100 * phase + 1.25 * k
    return datasets


#: Two stacks of one series, and the words for each.
PAIRS: dict[str, tuple[Callable[[], tuple[Datasets, Datasets]], str, str]] = {
    "echo times": (
        lambda: (stack(1, EchoTime=20, EchoNumbers=1), stack(2, EchoTime=80.5, EchoNumbers=2)),
        "echo time 20 ms",
        "echo time 80.5 ms",
    ),
    "b-values": (lambda: (stack(1, DiffusionBValue=0.0), stack(2, DiffusionBValue=1000.0)), "b-value 0", "b-value 1000"),
    "one without b-value": (lambda: (stack(1), stack(2, DiffusionBValue=1000.0)), "no b-value", "b-value 1000"),
    "magnitude and phase": (lambda: (stack(1), stack(2, image_type=["ORIGINAL", "PRIMARY", "P"])), "magnitude", "phase"),
    "MIP": (lambda: (stack(1), stack(2, image_type=["DERIVED", "SECONDARY", "MIP"])), "primary", "secondary"),
    "contrast": (lambda: (stack(1), stack(2, ContrastBolusAgent="AGENT")), "without contrast agent", "with contrast agent"),
    "time points": (
        lambda: (stack(1, TemporalPositionIdentifier=1), stack(2, TemporalPositionIdentifier=2)),
        "time point 1",
        "time point 2",
    ),
    "phases of the heart": (lambda: (beating(1, 0), beating(2, 1)), "cardiac phase 1", "cardiac phase 2"),
    "acquisition numbers": (lambda: (stack(1, AcquisitionNumber=2), stack(2, AcquisitionNumber=3)), "acquisition 2", "acquisition 3"),
    "acquisition times": (lambda: (timed(1, 0), timed(2, 20)), "acquisition 1", "acquisition 2"),
    "ranges that overlap": (lambda: (stack(1, AcquisitionNumber=2), stack(2, 4, AcquisitionNumber=3)), "acquisition 2", "acquisition 3"),
    "directions": (
        lambda: (
            stack(1, DiffusionBValue=1000.0, DiffusionGradientOrientation=[1.0, 0.0, 0.0]),
            stack(2, DiffusionBValue=1005.0, DiffusionGradientOrientation=[0.0, 1.0, 0.0]),
        ),
        "diffusion direction 2",
        "diffusion direction 1",
    ),
    "energies": (lambda: (ct(1, KVP=80, AcquisitionNumber=1), ct(2, KVP=140, AcquisitionNumber=1)), "80 kV", "140 kV"),
    "kernels": (lambda: (ct(1, ConvolutionKernel=["B70f", "3"]), ct(2, ConvolutionKernel=["B30f", "3"])), "kernel 2", "kernel 1"),
    "sizes": (lambda: (stack(1), factories.make_ct(slices=5, rows=44, seed=2)), "40 x 48 pixels", "44 x 48 pixels"),
    "orientations": (
        lambda: (stack(1), factories.make_ct(slices=5, seed=2, orientation=(0, 1, 0, 0, 0, -1))),
        "axial",
        "sagittal",
    ),
}


@pytest.mark.requirement("P8")
@pytest.mark.parametrize("name", PAIRS)
def test_two_stacks_in_one_series_are_told_apart_and_never_mixed(pool: DecoderPool, tmp_path: Path, name: str) -> None:
    make, first, second = PAIRS[name]
    one, other = make()
    series = factories.spool(factories.in_one_series(one, other)[::-1], tmp_path)
    with pytest.raises(GeometryError) as caught:
        volume.load(series, kind="volume", pool=pool)
    assert f"The series has 2 stacks: {first}" in str(caught.value)
    assert f", {second}" in str(caught.value)
    assert str(caught.value).endswith("and nothing says which is meant.")
    for choose, datasets in (("first", one), ("last", other)):
        found = volume.load(series, kind="volume", pool=pool, stack=choose)  # type: ignore[arg-type]
        np.testing.assert_array_equal(found.array, np.stack([ds.pixel_array.astype(int) for ds in datasets]) + factories.INTERCEPT_HU)
        assert found.sop_instance_uids == tuple(ds.SOPInstanceUID for ds in datasets)
        assert found.stack.startswith(first if choose == "first" else second)


@pytest.mark.requirement("P8")
def test_phases_half_a_gap_apart_are_no_volume_of_thin_slices(pool: DecoderPool, tmp_path: Path) -> None:
    """No position repeats, and the gaps are even: only the temporal position says that each second slice is of another phase."""
    one, other = stack(1, TemporalPositionIdentifier=1), stack(2, TemporalPositionIdentifier=2)
    for ds in other:
        ds.ImagePositionPatient = [*ds.ImagePositionPatient[:2], float(ds.ImagePositionPatient[2]) + 1.25]
    series = factories.spool(factories.in_one_series(one, other), tmp_path)
    with pytest.raises(GeometryError, match=r"The header tells several stacks apart\. The series has 2 stacks: time point 1 \(5 slices\)"):
        volume.load(series, kind="volume", pool=pool)
    np.testing.assert_array_equal(volume.load(series, kind="volume", pool=pool, stack="last").array, factories.known_hu(5, seed=2))


@pytest.mark.requirement("P8")
@pytest.mark.parametrize(("keyword", "values"), [("KVP", (80, 140)), ("ConvolutionKernel", ("SOFT", "LUNG"))])
@pytest.mark.parametrize("is_enhanced", [False, True], ids=["classic", "enhanced"])
def test_slices_of_two_energies_or_kernels_that_interleave_are_no_volume(
    pool: DecoderPool, tmp_path: Path, keyword: str, values: tuple[object, object], is_enhanced: bool
) -> None:
    datasets = factories.make_ct(slices=8)
    for k, ds in enumerate(datasets):
        setattr(ds, keyword, values[k % 2])
    files = [factories.make_enhanced(datasets)] if is_enhanced else datasets
    with pytest.raises(GeometryError, match=r"differs between slices: 2 different ones\. The series has 2 stacks"):
        volume.load(factories.spool(files, tmp_path), kind="volume", pool=pool)


@pytest.mark.requirement("P8")
@pytest.mark.parametrize(
    ("modality", "acquisitions", "is_two"),
    [("CT", (1, 2, 1, 2, 1, 2, 1, 2), True), ("CT", (1, 1, 1, 1, 2, 2, 2, 2), False), ("MR", (1, 2, 1, 2, 1, 2, 1, 2), False)],
)
def test_two_scans_of_one_range_are_no_ct_while_ranges_in_turn_are_and_an_mr_in_two_passes_is_one(
    pool: DecoderPool, tmp_path: Path, modality: str, acquisitions: tuple[int, ...], is_two: bool
) -> None:
    datasets = stack(1, 8, modality)
    for ds, number in zip(datasets, acquisitions, strict=True):
        ds.AcquisitionNumber = number
    series = factories.spool(datasets, tmp_path)
    if is_two:
        with pytest.raises(GeometryError, match=r"2 stacks: acquisition 1 \(4 slices\), acquisition 2 \(4 slices\)"):
            volume.load(series, kind="volume", pool=pool)
    else:
        np.testing.assert_array_equal(volume.load(series, kind="volume", pool=pool).array, factories.known_hu(8, seed=1))


@pytest.mark.requirement("P8")
@pytest.mark.parametrize(
    ("keyword", "values"),
    [("EchoNumbers", (1, 2)), ("PhotometricInterpretation", ("MONOCHROME1", "MONOCHROME2")), ("Modality", ("MR", "NM"))],
)
def test_slices_that_alternate_in_what_one_volume_never_mixes_are_refused(
    pool: DecoderPool, tmp_path: Path, keyword: str, values: tuple[object, object]
) -> None:
    datasets = stack(1, 8)
    for k, ds in enumerate(datasets):
        setattr(ds, keyword, values[k % 2])
    with pytest.raises(GeometryError, match=r"differs between slices: 2 different ones\."):
        volume.load(factories.spool(datasets, tmp_path), kind="volume", pool=pool)


@pytest.mark.requirement("P8")
def test_the_first_stack_is_that_acquired_first_whatever_the_instance_numbers_say(pool: DecoderPool, tmp_path: Path) -> None:
    late, early = stack(1, AcquisitionTime="104000", EchoTime=10), stack(2, AcquisitionTime="103000", EchoTime=20)
    series = factories.spool(factories.in_one_series(late, early), tmp_path)
    found = volume.load(series, kind="volume", pool=pool, stack="first")
    np.testing.assert_array_equal(found.array, factories.known_hu(5, seed=2))


@pytest.mark.requirement("P8")
def test_slices_of_a_time_point_that_was_broken_off_do_not_extend_the_one_before(pool: DecoderPool, tmp_path: Path) -> None:
    datasets = stack(1, 8)
    for k, ds in enumerate(datasets):
        ds.TemporalPositionIdentifier = 1 if k < 6 else 2
    series = factories.spool(datasets, tmp_path)
    with pytest.raises(GeometryError, match=r"2 stacks: time point 1 \(6 slices\), time point 2 \(2 slices\)"):
        volume.load(series, kind="volume", pool=pool)


@pytest.mark.requirement("P8")
def test_the_largest_stack_is_that_of_most_slices_then_the_first(pool: DecoderPool, tmp_path: Path) -> None:
    parts = [stack(n, slices, EchoTime=10 * n) for n, slices in ((1, 4), (2, 6), (3, 6))]
    found = volume.load(factories.spool(factories.in_one_series(*parts), tmp_path), kind="volume", pool=pool, stack="largest")
    np.testing.assert_array_equal(found.array, factories.known_hu(6, seed=2))
    assert found.stack == "echo time 20 ms"


@pytest.mark.requirement("P8")
@pytest.mark.parametrize("stray", [1, 2])
def test_a_few_stray_slices_are_refused_or_left_out_never_used(pool: DecoderPool, tmp_path: Path, stray: int) -> None:
    """Localizers that nobody called so."""
    odd = factories.make_ct(slices=3, seed=9, orientation=(0, 1, 0, 0, 0, -1))[:stray]
    series = factories.spool(factories.in_one_series(odd, stack(1, 6)), tmp_path)
    with pytest.raises(
        GeometryError, match=rf"^{stray} of {6 + stray} slices have another orientation than the others.*sagittal \({stray} slice"
    ):
        volume.load(series, kind="volume", pool=pool)
    for choose in ("first", "last", "largest"):
        found = volume.load(series, kind="volume", pool=pool, stack=choose)
        np.testing.assert_array_equal(found.array, factories.known_hu(6, seed=1))


@pytest.mark.requirement("P8")
@pytest.mark.parametrize("choose", ["only", "first", "last", "largest"])
def test_repeated_positions_that_nothing_explains_are_refused(pool: DecoderPool, tmp_path: Path, choose: str) -> None:
    series = factories.spool(factories.in_one_series(stack(1), stack(2)), tmp_path)
    with pytest.raises(GeometryError, match="5 or more slices stand where another does"):
        volume.load(series, kind="volume", pool=pool, stack=choose)  # type: ignore[arg-type]


@pytest.mark.requirement("P8")
def test_acquisitions_that_interleave_in_time_are_not_guessed_apart(pool: DecoderPool, tmp_path: Path) -> None:
    """Slice by slice twice, not pass after pass: which of two is the first phase differs from slice to slice."""
    one, other = timed(1, 0), timed(2, 1)
    for k, (a, b) in enumerate(zip(one, other, strict=True)):
        a.AcquisitionTime, b.AcquisitionTime = f"1030{2 * k:02d}", f"1030{2 * k + 1:02d}"
    with pytest.raises(GeometryError, match="5 or more slices stand where another does"):
        volume.load(factories.spool(factories.in_one_series(one, other), tmp_path), kind="volume", pool=pool)


def test_times_and_numbers_that_differ_where_nothing_repeats_split_nothing(pool: DecoderPool, tmp_path: Path) -> None:
    """Sequential CT has an acquisition number and a time for each slice."""
    datasets = timed(1, 0)
    for k, ds in enumerate(datasets):
        ds.AcquisitionNumber, ds.TriggerTime, ds.TemporalPositionIdentifier = k, k, k
    found = volume.load(factories.spool(datasets, tmp_path), kind="volume", pool=pool)
    np.testing.assert_array_equal(found.array, factories.known_hu(5, seed=1))
    assert found.stack == ""


@pytest.mark.requirement("P8")
def test_many_stacks_are_counted_and_some_are_named(pool: DecoderPool, tmp_path: Path) -> None:
    parts = [stack(n, 3, TemporalPositionIdentifier=n) for n in range(1, 11)]
    with pytest.raises(GeometryError, match=r"10 stacks: time point 1 \(3 slices\), .*time point 6 \(3 slices\) and 4 more"):
        volume.load(factories.spool(factories.in_one_series(*parts), tmp_path), kind="volume", pool=pool)


@pytest.mark.requirement("P8")
@pytest.mark.parametrize("choose", ["first", "last", "largest"])
def test_no_other_phase_stands_in_for_the_wanted_one_that_lacks_a_slice(pool: DecoderPool, tmp_path: Path, choose: str) -> None:
    """A bundle that wants the native phase must not be given the arterial one, because a slice of the native one was lost."""
    gap, whole = (
        stack(1, 8, TemporalPositionIdentifier=1 + (choose == "last")),
        stack(2, 6, TemporalPositionIdentifier=2 - (choose == "last")),
    )
    del gap[2]
    series = factories.spool(factories.in_one_series(*((whole, gap) if choose == "last" else (gap, whole))), tmp_path)
    with pytest.raises(GeometryError, match=rf"There is a gap of 5.00 mm .* It is the {choose} of 2 stacks: .*time point 1"):
        volume.load(series, kind="volume", pool=pool, stack=choose)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def echoes(tmp_path_factory: pytest.TempPathFactory) -> Datasets:
    """Two echoes, magnitude and phase of each: four stacks of one series."""
    parts = [
        stack(n, EchoTime=echo, image_type=["ORIGINAL", "PRIMARY", kind])
        for n, (echo, kind) in enumerate(((20, "M"), (20, "P"), (80, "M"), (80, "P")))
    ]
    return factories.in_one_series(*parts)


@pytest.mark.requirement("P8")
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(20)), folders=st.lists(st.integers(0, 3), min_size=20, max_size=20))
def test_any_order_any_names_and_any_folders_give_the_same_stack(
    pool: DecoderPool, echoes: Datasets, tmp_path_factory: pytest.TempPathFactory, order: list[int], folders: list[int]
) -> None:
    root = tmp_path_factory.mktemp("shuffled")
    paths = [factories.write(echoes[n], root / str(folders[at]) / f"{order[at]}.x") for at, n in enumerate(order)]
    instances = tuple(factories.instance_of(path) for path in paths)
    found = volume.load(Series(echoes[0].SeriesInstanceUID, "MR", "", "", instances), kind="volume", pool=pool, stack="last")
    np.testing.assert_array_equal(found.array, factories.known_hu(5, seed=3))
    assert found.stack == "phase, echo time 80 ms"
    assert found.sop_instance_uids == tuple(ds.SOPInstanceUID for ds in echoes[15:])
