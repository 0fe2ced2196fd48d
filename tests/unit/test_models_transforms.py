"""Tensors show what is there, whatever way the scanner wrote it down."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.transforms import Resize, ResizeWithPadOrCrop

from models import transforms
from models.bundle import Bundle
from models.spec import Code, ImageSpec, NetworkConfig, RecordRule, TextSpec
from models.transforms import (
    PIECES,
    frames_tensor,
    gene_tensors,
    history_tensors,
    radiograph_tensor,
    text_ids,
    value_tensors,
    volume_tensor,
)

ROOT = Path(__file__).parents[2]
FILM = ImageSpec("image", "radiograph", ("CR",), (32, 32))
NETWORK = NetworkConfig(width=8, heads=1, layers=1)


def stored(order: tuple[int, ...], flips: tuple[bool, ...]) -> tuple[np.ndarray, np.ndarray]:
    """One patient, (x, y, z) in LPS with one voxel lit, as a scanner with these axes would store it."""
    patient = np.full((24, 20, 16), -1000.0, np.float32)  # 1 mm, 1 mm, 1.5 mm
    patient[18:22, 4:8, 2:4] = 400
    steps, origin = np.diag([1.0, 1.0, 1.5]), np.array([-11.5, -9.5, -11.25])
    ijk, matrix = patient.transpose(order), steps[:, order]
    for axis, flip in enumerate(flips):
        if flip:
            origin = origin + matrix[:, axis] * (ijk.shape[axis] - 1)
            ijk = np.flip(ijk, axis)
            matrix = matrix * np.where(np.arange(3) == axis, -1, 1)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = matrix, origin
    return np.ascontiguousarray(ijk.transpose(2, 1, 0)), affine


def test_the_tensor_does_not_depend_on_how_the_scanner_ordered_its_axes(bundle: Bundle) -> None:
    """48 ways to store one patient, one tensor: left is never taken for right."""
    tensors = [
        volume_tensor(*stored(order, flips), bundle.images[0])
        for order in permutations(range(3))
        for flips in product((False, True), repeat=3)
    ]
    assert len(tensors) == 48
    assert all(torch.equal(tensors[0], other) for other in tensors[1:])


def test_a_volume_runs_right_anterior_superior_and_is_windowed(bundle: Bundle) -> None:
    """The lit block lies left, anterior, inferior in LPS; in RAS that is small x, large y, small z."""
    image = volume_tensor(*stored((0, 1, 2), (False, False, False)), bundle.images[0])
    assert image.shape == (1, 12, 10, 8)
    assert type(image) is torch.Tensor
    x, y, z = (int(i) for i in np.unravel_index(int(image.argmax()), image.shape)[1:])
    assert (x < 6, y > 5, z < 4) == (True, True, True)
    assert image.max() == 1
    assert image.min() == 0


def test_a_volume_smaller_than_the_view_is_padded_with_air(bundle: Bundle) -> None:
    image = volume_tensor(np.zeros((2, 4, 4), np.float32), np.diag([2.0, 2.0, 3.0, 1.0]), bundle.images[0])
    assert image[0, 0, 0, 0] == 0
    assert image[0, 6, 5, 4] == pytest.approx(1000 / 1400)


@pytest.mark.parametrize("spacing", [0.0, float("nan"), 1e-320])
def test_a_volume_without_a_size_is_refused(bundle: Bundle, spacing: float) -> None:
    with pytest.raises(ValueError, match="positive and finite"):
        volume_tensor(np.zeros((2, 4, 4), np.float32), np.diag([spacing, 1.0, 1.0, 1.0]), bundle.images[0])


@pytest.mark.parametrize("times", [4, 1000])
def test_a_finer_grid_shows_the_same_patient_and_pads_no_finer_field_of_view(
    bundle: Bundle, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padded first, a field of view of 24 mm at 0.001 mm would have 10 ** 13 voxels."""

    def padded(view: list[int], value: float) -> ResizeWithPadOrCrop:
        assert np.prod(view) <= 2**14
        return ResizeWithPadOrCrop(view, value=value)

    monkeypatch.setattr(transforms, "FINEST", 2**14)
    monkeypatch.setattr(transforms, "ResizeWithPadOrCrop", padded)
    array, affine = stored((0, 1, 2), (False, False, False))
    coarse = volume_tensor(array, affine, bundle.images[0])
    finer = array.repeat(4, 0).repeat(4, 1).repeat(4, 2)
    fine = volume_tensor(finer, affine / [times, times, times, 1], bundle.images[0])
    if times == 4:
        assert torch.allclose(fine, coarse, atol=1e-5)
    assert fine.shape == coarse.shape


@pytest.mark.parametrize("shape", [(1, 60000), (60000, 1), (3, 5000)])
def test_a_strip_of_a_film_does_not_fill_the_memory(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    def resized(size: list[int], mode: str) -> Resize:
        assert np.prod(size) <= 32 * 32 * transforms.STRIP * 2
        return Resize(size, mode=mode)

    monkeypatch.setattr(transforms, "Resize", resized)
    image = radiograph_tensor(np.random.default_rng(0).random(shape, dtype=np.float32), FILM)
    assert image.shape == (1, 32, 32)


def test_a_film_of_ordinary_shape_is_read_whole() -> None:
    noise = np.random.default_rng(0).random((64, 64 * transforms.STRIP), dtype=np.float32)
    middle = noise[:, noise.shape[1] // 2 - 32 :][:, :64]
    assert torch.equal(radiograph_tensor(noise, FILM), radiograph_tensor(middle, FILM))


def disc(height: int, width: int) -> np.ndarray:
    """A bright disc of diameter 40 on a slope, in a film of `height` by `width`."""
    y, x = np.mgrid[:height, :width] - np.array([height - 1, width - 1])[:, None, None] / 2
    return np.where(x * x + y * y <= 400, 100, 10 + 0.01 * x).astype(np.float32)


def test_a_radiograph_keeps_its_aspect_and_forgets_its_scale() -> None:
    """A 12-bit and an 8-bit detector must not look different, nor a round heart become oval."""
    image = radiograph_tensor(disc(64, 100), FILM)
    assert image.shape == (1, 32, 32)
    assert image.min() == 0
    assert image.max() == 1
    lit = image[0] > 0.5
    assert int(lit.any(0).sum()) == int(lit.any(1).sum()) == 20
    assert torch.allclose(image, radiograph_tensor(disc(64, 100) * 100 + 7, FILM), atol=1e-5)


def test_the_shape_of_a_film_leaves_no_border_to_tell_it_by() -> None:
    """Bedside films are wide, standing ones tall; who is bedridden is near the answer, and must be seen in the lungs."""
    noise = np.random.default_rng(0).random((100, 64), dtype=np.float32)
    for image in (radiograph_tensor(noise, FILM), radiograph_tensor(noise.T, FILM)):
        for edge in (image[0, 0], image[0, -1], image[0, :, 0], image[0, :, -1]):
            assert edge.max() > 0


def test_a_blank_radiograph_is_refused() -> None:
    """Scaled to its own percentiles it would be noise, and the network would have an opinion on it."""
    with pytest.raises(ValueError, match="blank"):
        radiograph_tensor(np.full((40, 40), 3.0, np.float32), FILM)


def test_values_are_logged_where_asked_and_masked_where_absent(bundle: Bundle) -> None:
    made = value_tensors({"crp": (100.0, "<=", 6.5)}, bundle.record.values)
    assert made["numbers"].tolist() == pytest.approx([np.log(100), 0])
    assert made["signs"].tolist() == [1, 0]
    assert made["ages"].tolist() == [6.5, 0]
    assert made["number_mask"].tolist() == [True, False]


def test_of_a_history_the_last_points_are_kept_oldest_first(bundle: Bundle) -> None:
    points = [("ph", 7.1, "", 1.0), ("crp", 100.0, "<", 30.0), ("ph", 7.3, "", 20.0), ("crp", 10.0, "", 90.0)]
    made = history_tensors(points, bundle.record.values, steps=3)
    assert made["history_hours"].tolist() == [30.0, 20.0, 1.0]
    assert made["history_variables"].tolist() == [0, 1, 1]
    assert made["history_numbers"].tolist() == pytest.approx([np.log(100), 7.3, 7.1])
    assert made["history_signs"].tolist() == [1, 0, 0]
    assert made["history_mask"].tolist() == [True] * 3
    assert history_tensors(points[:1], bundle.record.values, steps=3)["history_mask"].tolist() == [True, False, False]


GENOMICS = RecordRule(
    wait_s=0,
    look_back_h=1,
    texts=(
        TextSpec("variants", Code("81252-9", "LN"), kind="variants"),
        TextSpec("levels", Code("LEVELS", "L"), kind="expression", genes=("TP53", "EGFR")),
    ),
)


def test_variants_are_a_set_and_a_gene_that_is_not_named_is_missing_not_zero() -> None:
    one = gene_tensors({"variants": "EGFR:p.L858R; KRAS:p.G12C", "levels": "EGFR=0;MYC=4, TP53=abc"}, GENOMICS, NETWORK)
    other = gene_tensors({"variants": "KRAS:p.G12C|EGFR:p.L858R KRAS:p.G12C"}, GENOMICS, NETWORK)
    assert torch.equal(one["variants"], other["variants"])
    assert int((one["variants"] > 0).sum()) == 2
    assert one["expression_mask"].tolist() == [False, True]
    assert not other["expression_mask"].any()


@pytest.mark.parametrize("beyond", [1e39, -1e300, float("inf"), float("nan")])
def test_what_float32_cannot_hold_is_missing(bundle: Bundle, beyond: float) -> None:
    made = value_tensors({"ph": (beyond, "", 1.0)}, bundle.record.values)
    assert not made["number_mask"].any()
    assert made["numbers"].tolist() == [0, 0]
    told = history_tensors([("ph", beyond, "", 1.0), ("ph", 7.1, "", 2.0)], bundle.record.values, steps=3)
    assert told["history_numbers"].tolist() == pytest.approx([7.1, 0, 0])
    assert told["history_mask"].tolist() == [True, False, False]
    genes = gene_tensors({"levels": f"TP53={beyond};EGFR=1"}, GENOMICS, NETWORK)
    assert genes["expression"].tolist() == [0, 1]
    assert genes["expression_mask"].tolist() == [False, True]


def test_words_hash_alike_in_every_process() -> None:
    """Python's own hash differs from process to process; the weights would then mean nothing."""
    code = (
        "from tests.unit.test_models_transforms import NETWORK; from models.transforms import text_ids; "
        "print(text_ids('Never smoked; CRP 12.5 — Größe', NETWORK).tolist())"
    )
    elsewhere = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": "1"}, capture_output=True, check=True
    )
    assert elsewhere.stdout == f"{text_ids('Never smoked; CRP 12.5 — Größe', NETWORK).tolist()}\n".encode()
    # And in every release: these ids are what the shipped weights were trained on.
    assert text_ids("smoker", NETWORK)[0].tolist() == [2908, 1339, 356, 1046, 1139, 1638, 2513, 0]


def test_words_stand_at_the_front_and_long_texts_are_cut() -> None:
    ids = text_ids("one two", NETWORK)
    assert ids.shape == (NETWORK.words, PIECES)
    assert (ids > 0).any(1).tolist() == [True, True] + [False] * (NETWORK.words - 2)
    assert (text_ids("word " * 1000, NETWORK)[:, 0] > 0).all()
    assert ids.max() < NETWORK.buckets
    assert not text_ids("", NETWORK).any()


def test_case_and_compatibility_forms_of_a_word_are_one_word() -> None:
    assert torch.equal(text_ids("SMOKER ﬁbrosis", NETWORK), text_ids("smoker fibrosis", NETWORK))


# --- clips ---------------------------------------------------------------------------------------


def test_a_clip_is_framed_like_a_radiograph_with_its_rows_along_x_and_time_last() -> None:
    """All frames get one crop and one scale: what moves, moves; what is as bright stays so."""
    spec = ImageSpec("clip", "frames", ("US",), (10, 8, 5))
    rng = np.random.default_rng(0)
    clip = np.kron(rng.random((5, 8, 10)), np.ones((1, 2, 2))).astype(np.float32)  # (5, 16, 20): twice the wanted pixels
    made = frames_tensor(clip, spec)
    assert made.shape == (1, 10, 8, 5)
    small = clip[:, ::2, ::2]
    low, high = np.percentile(small, (1, 99))
    expected = np.clip((small - low) / (high - low), 0, 1).transpose(2, 1, 0)
    assert np.allclose(made[0].numpy(), expected, atol=1e-4)


@pytest.mark.parametrize(("times", "wanted"), [(10, 5), (3, 6), (1, 4)])
def test_a_clip_of_any_length_has_as_many_frames_as_the_network_wants_from_first_to_last(times: int, wanted: int) -> None:
    spec = ImageSpec("clip", "frames", ("US",), (4, 4, wanted))
    clip = np.broadcast_to(np.arange(times, dtype=np.float32)[:, None, None], (times, 4, 4)).copy()
    clip[:, 0, 0], clip[:, 1, 1] = -1, times
    of_time = frames_tensor(clip, spec)[0, 2, 2]
    assert len(of_time) == wanted
    assert torch.equal(of_time, of_time.sort().values)


def test_a_blank_clip_is_refused() -> None:
    with pytest.raises(ValueError, match="The clip is blank"):
        frames_tensor(np.full((4, 8, 8), 7, np.float32), ImageSpec("clip", "frames", ("US",), (4, 4, 4)))
