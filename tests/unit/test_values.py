"""What stored values mean: rescale, modality LUT, Hounsfield units, uptake, padding. Real files through real decoding processes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import PositronEmissionTomographyImageStorage

from tests import factories
from worker.errors import PixelError
from worker.imaging import volume
from worker.imaging.decoding import DecoderPool
from worker.imaging.values import values

# Times that are none are what is tested.
pytestmark = pytest.mark.filterwarnings("ignore:Invalid value for VR TM")

Unit = Literal["", "HU", "SUVbw"]
#: Fluorine-18.
THE_DAY_BEFORE: Final = {"RadiopharmaceuticalStartTime": "233000", "RadiopharmaceuticalStartDateTime": "20240101233000"}
HALF_LIFE_S, DOSE_BQ, WEIGHT_KG = 6586.2, 370e6, 74.0


def valued(pool: DecoderPool, datasets: Sequence[FileDataset], folder: Path, *, unit: Unit = "") -> NDArray[np.float32]:
    paths = [factories.write(ds, folder / f"{number}.dcm") for number, ds in enumerate(datasets)]
    read = pool.read(paths, [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths])
    return values([one for frames in read for one in frames], unit=unit)


def refused(pool: DecoderPool, ds: FileDataset, folder: Path, *, unit: Unit = "") -> str:
    with pytest.raises(PixelError) as caught:
        valued(pool, [ds], folder, unit=unit)
    return str(caught.value)


# --- modality LUT


def with_lut(
    ds: FileDataset, entries: NDArray[np.uint16], *, first: int = 0, bits: int = 16, kind: str = "OD", vr: str = "US"
) -> FileDataset:
    """Put a Modality LUT in place of the rescale."""
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(entries) % 65536, first & 0xFFFF, bits])
    item.ModalityLUTType = kind
    item.add_new("LUTData", vr, entries.tobytes() if vr == "OW" else entries.tolist())
    ds.ModalityLUTSequence = Items([item])
    for keyword in ("RescaleSlope", "RescaleIntercept", "RescaleType"):
        if keyword in ds:
            delattr(ds, keyword)
    return ds


@pytest.mark.requirement("P10")
@pytest.mark.parametrize("vr", ["US", "OW"])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_a_modality_lut_is_applied_before_bright_is_made_dense(pool: DecoderPool, tmp_path: Path, photometric: str, vr: str) -> None:
    """PS3.3 §C.11.1.1.1: values beyond the ends of the table take the ends' entries."""
    entries = np.random.default_rng(0).integers(0, 2**14, 4000).astype(np.uint16)
    stored = factories.known_stored(bits_stored=12)
    ds = with_lut(factories.make_radiograph(stored=stored, photometric=photometric), entries, first=50, bits=14, vr=vr)
    wanted = entries[np.clip(stored.astype(int) - 50, 0, 3999)].astype(int)
    np.testing.assert_array_equal(valued(pool, [ds], tmp_path)[0], wanted if photometric == "MONOCHROME2" else 2**14 - 1 - wanted)


def test_a_modality_lut_of_signed_values_begins_below_zero(pool: DecoderPool, tmp_path: Path) -> None:
    entries = np.arange(4096, dtype=np.uint16)[::-1].copy()
    stored = np.arange(-2048, 2048, dtype=np.int16).reshape(64, 64)
    ds = with_lut(factories.make_radiograph(stored=stored), entries, first=-2048, bits=12)
    np.testing.assert_array_equal(valued(pool, [ds], tmp_path)[0], 2047 - stored.astype(int))


def test_a_modality_lut_of_65536_entries_says_0(pool: DecoderPool, tmp_path: Path) -> None:
    entries = np.random.default_rng(0).permutation(65536).astype(np.uint16)
    stored = factories.known_stored(bits_stored=16)
    ds = with_lut(factories.make_radiograph(stored=stored, bits_stored=16), entries, vr="OW")
    np.testing.assert_array_equal(valued(pool, [ds], tmp_path)[0], entries[stored])


@pytest.mark.requirement("P10")
def test_padding_under_a_modality_lut_stays_padding(pool: DecoderPool, tmp_path: Path) -> None:
    """The table gives other pixels the entry of the padding, too: these must stay."""
    entries = np.where(np.arange(4096) < 2000, 700, 900).astype(np.uint16)
    stored = np.array([[0, 1999, 5], [2000, 4095, 0]], np.uint16)
    ds = with_lut(factories.make_radiograph(stored=stored), entries)
    ds.PixelPaddingValue = 4095
    assert valued(pool, [ds], tmp_path)[0].tolist() == [[700, 700, 700], [900, 700, 700]]


@pytest.mark.requirement("P6")
def test_a_ct_whose_modality_lut_gives_hounsfield_units_is_read_and_any_other_is_not(pool: DecoderPool, tmp_path: Path) -> None:
    entries = np.arange(4096, dtype=np.uint16)
    ds = factories.make_ct(slices=1)[0]
    stored = ds.pixel_array.copy()
    np.testing.assert_array_equal(valued(pool, [with_lut(ds, entries, kind="HU")], tmp_path)[0], stored)
    assert "no rescale to Hounsfield units" in refused(pool, with_lut(ds, entries, kind="US"), tmp_path)


@pytest.mark.requirement("P6")
@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda ds: setattr(ds, "RescaleSlope", 1), "both a Modality LUT Sequence (0028,3000) and a rescale"),
        (lambda ds: ds.ModalityLUTSequence.append(Dataset()), "has 2 items; one is read"),
        (lambda ds: delattr(ds.ModalityLUTSequence[0], "LUTData"), "or its descriptor is absent"),
        (lambda ds: setattr(ds.ModalityLUTSequence[0], "LUTDescriptor", [4095, 0, 12]), "does not hold 4095 entries of 12 bits"),
        (lambda ds: setattr(ds.ModalityLUTSequence[0], "LUTDescriptor", [4096, 0, 17]), "entries of 17 bits"),
        (lambda ds: setattr(ds.ModalityLUTSequence[0], "LUTDescriptor", [4096, 0, 11]), "wider than the 11 bits"),
        (lambda ds: setattr(ds.ModalityLUTSequence[0], "LUTDescriptor", [4096, 0]), "or its descriptor is absent"),
    ],
)
def test_a_modality_lut_that_does_not_add_up_is_refused(
    pool: DecoderPool, tmp_path: Path, spoil: Callable[[FileDataset], None], sentence: str
) -> None:
    ds = with_lut(factories.make_radiograph(), np.arange(4096, dtype=np.uint16), bits=12)
    spoil(ds)
    assert sentence in refused(pool, ds, tmp_path)


# --- uptake


def make_pet(*, slope: float = 2.0, number: int = 1) -> FileDataset:
    """Make one PET slice in Bq/ml, decay corrected to the start of the scan, an hour after the injection."""
    ds = factories.make_ct(slices=number)[number - 1]
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = PositronEmissionTomographyImageStorage
    ds.Modality, ds.Units, ds.DecayCorrection, ds.CorrectedImage = "PT", "BQML", "START", ["NORM", "DTIM", "ATTN", "SCAT", "DECY"]
    ds.RescaleSlope, ds.RescaleIntercept, ds.PatientWeight = slope, 0, WEIGHT_KG
    del ds.RescaleType
    ds.SeriesDate = ds.AcquisitionDate = "20240102"
    ds.SeriesTime, ds.AcquisitionTime = "103000.5", "103500"
    item = Dataset()
    item.RadionuclideTotalDose, item.RadionuclideHalfLife, item.RadiopharmaceuticalStartTime = DOSE_BQ, HALF_LIFE_S, "093000.50"
    ds.RadiopharmaceuticalInformationSequence = Items([item])
    return ds


def factor(elapsed_s: float = 3600) -> float:
    """QIBA's, written down a second time."""
    return float(WEIGHT_KG * 1000 / (DOSE_BQ * np.exp(-np.log(2) * elapsed_s / HALF_LIFE_S)))


def test_uptake_is_activity_by_weight_over_the_dose_that_is_left_with_each_slice_s_own_slope(pool: DecoderPool, tmp_path: Path) -> None:
    slices = [make_pet(slope=slope, number=number) for number, slope in ((1, 2.0), (2, 0.5), (3, 31.25))]
    wanted = [ds.pixel_array * float(ds.RescaleSlope) for ds in slices]
    np.testing.assert_allclose(valued(pool, slices, tmp_path), wanted, rtol=1e-6)
    np.testing.assert_allclose(valued(pool, slices, tmp_path, unit="SUVbw"), np.array(wanted) * factor(), rtol=1e-6)


@pytest.mark.requirement("P10")
@pytest.mark.parametrize(
    ("keyword", "value", "unit", "sentence"),
    [
        ("RescaleSlope", None, "", "1 of 3 slices have no rescale, and the others do."),
        ("Units", "GML", "", "The slices are in 2 different units"),
        ("Units", "GML", "SUVbw", "The slices are in 2 different units"),
        ("PatientWeight", 37.0, "SUVbw", "weight, dose or times differ"),
    ],
)
def test_a_slice_of_another_scale_than_its_neighbors_is_refused(
    pool: DecoderPool, tmp_path: Path, keyword: str, value: object, unit: Unit, sentence: str
) -> None:
    slices = [make_pet(slope=2.0, number=number) for number in (1, 2, 3)]
    if value is None:
        del slices[1].RescaleSlope, slices[1].RescaleIntercept
    else:
        setattr(slices[1], keyword, value)
    with pytest.raises(PixelError, match=sentence):
        valued(pool, slices, tmp_path, unit=unit)


def test_a_volume_is_in_the_unit_asked_for(pool: DecoderPool, tmp_path: Path) -> None:
    series = factories.spool([make_pet(slope=slope, number=number) for number, slope in ((1, 2.0), (2, 0.5), (3, 4.0))], tmp_path)
    plain, uptake = (volume.load(series, kind="volume", pool=pool, unit=unit).array for unit in ("", "SUVbw"))
    np.testing.assert_allclose(uptake, plain * factor(), rtol=1e-6)
    with pytest.raises(PixelError, match="no rescale to Hounsfield units"):
        volume.load(series, kind="volume", pool=pool, unit="HU")


def test_a_body_that_holds_its_dose_evenly_has_an_uptake_of_one(pool: DecoderPool, tmp_path: Path) -> None:
    """The definition: dose over weight, at the time of the scan, is an SUV of 1."""
    ds = make_pet(slope=1.0)
    even = DOSE_BQ * 2 ** (-3600 / HALF_LIFE_S) / (WEIGHT_KG * 1000)
    ds.RescaleSlope = even / 1000
    factories.set_pixels(ds, np.full((40, 48), 1000, np.uint16), bits_stored=12)
    np.testing.assert_allclose(valued(pool, [ds], tmp_path, unit="SUVbw"), 1, rtol=1e-5)


def injection(**said: object) -> Callable[[FileDataset], None]:
    """Edit the injection; None takes an element away."""

    def edit(ds: FileDataset) -> None:
        item = ds.RadiopharmaceuticalInformationSequence[0]
        for keyword, value in said.items():
            if value is None:
                delattr(item, keyword)
            else:
                setattr(item, keyword, value)

    return edit


def header(**said: object) -> Callable[[FileDataset], None]:
    """Edit the data set; None takes an element away."""

    def edit(ds: FileDataset) -> None:
        for keyword, value in said.items():
            if value is None:
                delattr(ds, keyword)
            else:
                setattr(ds, keyword, value)

    return edit


@pytest.mark.parametrize(
    ("edit", "wanted"),
    [
        (header(), factor()),
        (header(DecayCorrection="ADMIN"), factor(0)),
        (header(Units="GML"), 1.0),
        (header(Units="GML", SUVType="BW"), 1.0),
        (injection(RadiopharmaceuticalStartDateTime="20240102093000.5"), factor()),
        (injection(RadiopharmaceuticalStartDateTime="20240102093000.5+0100"), factor()),
        (injection(RadiopharmaceuticalStartTime=None, RadiopharmaceuticalStartDateTime="20240102083000.5"), factor(7200)),
        # Across midnight, with and without a date.
        (lambda ds: (header(SeriesTime="003000")(ds), injection(RadiopharmaceuticalStartTime="233000")(ds)), factor()),
        (lambda ds: (header(SeriesTime="003000")(ds), injection(**THE_DAY_BEFORE)(ds)), factor()),
    ],
)  # fmt: skip
def test_uptake_counts_from_the_injection_however_it_is_told(
    pool: DecoderPool, tmp_path: Path, edit: Callable[[FileDataset], None], wanted: float
) -> None:
    ds = make_pet()
    edit(ds)
    np.testing.assert_allclose(valued(pool, [ds], tmp_path, unit="SUVbw")[0], ds.pixel_array * 2.0 * wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (header(Modality="MR"), "no PET"),
        (header(Units="CNTS"), "(0054,1001)"),
        (header(Units=None), "(0054,1001)"),
        (header(Units="GML", SUVType="LBM"), "(0054,1006) is not BW"),
        (header(CorrectedImage=["DECY"]), "not corrected for attenuation"),
        (header(CorrectedImage=["ATTN"]), "not corrected for decay"),
        (header(CorrectedImage=None), "not corrected"),
        (header(DecayCorrection="NONE"), "(0054,1102)"),
        (header(DecayCorrection=None), "(0054,1102)"),
        (header(PatientWeight=None), "(0010,1030)"),
        (header(PatientWeight=0), "(0010,1030)"),
        (header(PatientWeight=74000), "(0010,1030)"),
        (header(RadiopharmaceuticalInformationSequence=None), "has 0 items"),
        (lambda ds: ds.RadiopharmaceuticalInformationSequence.append(Dataset()), "has 2 items"),
        (injection(RadionuclideTotalDose=None), "(0018,1074) is absent"),
        (injection(RadionuclideTotalDose=-5), "(0018,1074) is absent or not a positive"),
        (injection(RadionuclideTotalDose=370), "as if it were in MBq"),
        (injection(RadionuclideHalfLife=None), "(0018,1075) is absent"),
        (injection(RadionuclideHalfLife=0), "(0018,1075) is absent"),
        (injection(RadiopharmaceuticalStartTime=None), "(0018,1078) are absent"),
        (injection(RadiopharmaceuticalStartTime="9:30"), "is no time"),
        (injection(RadionuclideHalfLife=282240.0), "too long for a time without a date"),
        (injection(RadiopharmaceuticalStartDateTime="20240102083000"), "contradict each other"),
        (injection(RadiopharmaceuticalStartDateTime="20230102093000.5"), "half lives before the scan"),
        (injection(RadiopharmaceuticalStartDateTime="20240103093000.5"), "half lives before the scan"),
        (header(SeriesTime="113000"), "later than those of the acquisition"),
        (header(SeriesTime=None), "Series Date or Series Time is absent"),
        (header(AcquisitionDate=None), "Acquisition Date or Acquisition Time is absent"),
        (header(AcquisitionTime="??"), "is no date or time"),
    ],
)
def test_what_an_uptake_needs_is_asked_for_by_name(
    pool: DecoderPool, tmp_path: Path, edit: Callable[[FileDataset], None], sentence: str
) -> None:
    ds = make_pet()
    edit(ds)
    said = refused(pool, ds, tmp_path, unit="SUVbw")
    assert said.startswith("There is no standardized uptake value: ")
    assert sentence in said
    assert valued(pool, [ds], tmp_path).shape == (1, 40, 48)  # in the unit of the rescale it is still there


@pytest.mark.requirement("P6")
def test_hounsfield_units_of_another_modality_need_a_rescale_that_says_so(pool: DecoderPool, tmp_path: Path) -> None:
    ds = make_pet()
    assert refused(pool, ds, tmp_path, unit="HU").startswith("The image has no rescale to Hounsfield units")
    ds.RescaleType = "HU"
    assert valued(pool, [ds], tmp_path, unit="HU").shape == (1, 40, 48)


@pytest.mark.requirement("P6")
@pytest.mark.parametrize("slope", ["1e308", "-1e308"])
def test_a_slope_that_overflows_is_refused_in_any_modality(pool: DecoderPool, tmp_path: Path, slope: str) -> None:
    ds = make_pet()
    ds.RescaleSlope = slope
    assert refused(pool, ds, tmp_path) == "Rescaled pixel values of slice 1 of 1 are not finite."


# --- overlays and private elements


@pytest.mark.requirement("P14")
def test_an_overlay_beside_the_pixels_and_a_large_private_element_change_nothing(pool: DecoderPool, tmp_path: Path) -> None:
    """64 MB of a vendor's own data are neither parsed nor kept."""
    ds = factories.make_radiograph()
    ds.add_new(0x00291001, "OB", bytes(64 * 2**20))
    ds.add_new(0x00290010, "LO", "VENDOR")
    ds.add_new(0x60000010, "US", 64)
    ds.add_new(0x60000011, "US", 48)
    ds.add_new(0x60000102, "US", 0)
    ds.add_new(0x60003000, "OW", b"\xff" * (64 * 48 // 8))
    np.testing.assert_array_equal(valued(pool, [ds], tmp_path)[0], factories.known_stored(bits_stored=12))


@pytest.mark.requirement("P14")
def test_a_private_element_larger_than_a_file_may_be_is_refused_by_its_size(pool: DecoderPool, tmp_path: Path) -> None:
    path = factories.write(factories.make_radiograph(), tmp_path / "one.dcm")
    with path.open("r+b") as file:
        file.truncate(3 * 2**30)  # sparse: no disk is written
    with pytest.raises(PixelError, match="has 3221225472 bytes; at most 536870912 can be decoded"):
        pool.read([path], ["0" * 64])
