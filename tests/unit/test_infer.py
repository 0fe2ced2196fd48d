"""One warm model: what it is given it answers, what it cannot answer it refuses, and company changes nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from models.bundle import Bundle, settle
from models.saving import save_fit
from models.training import fit
from models.transforms import Sample
from tests.unit import small_bundle
from worker.demo.phantom import PhantomCase, make_case
from worker.domain import (
    Code,
    Finding,
    Inputs,
    Instance,
    Patient,
    PatientKey,
    PatientRecord,
    Series,
    Study,
    UsedText,
    UsedValue,
    Volume,
)
from worker.errors import BundleError, DeviceOutOfMemory, GeometryError, PixelError
from worker.infer import Model, Prepared, Raw, places, verdict
from worker.inputs import Spec, select_inputs
from worker.intake.hl7 import parse

AT = datetime(2026, 1, 1, tzinfo=UTC)
CRP = Code("1988-5", "LN", "CRP")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bundle, trained for an epoch."""
    path = small_bundle.write(tmp_path_factory.mktemp("bundle") / "small")
    bundle = Bundle.read(path, verify=False)
    save_fit(bundle, fit(bundle, small_bundle.studies(bundle, 12), seed=0, epochs=1))
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return Model(folder)


def volume(seed: int = 0) -> Volume:
    hu = np.random.default_rng(seed).uniform(-1000, 400, (9, 11, 13)).astype(np.float32)
    return Volume(hu, np.diag([2.0, 2.0, 3.0, 1.0]), (3, 2, 2), "CT", "1.2", ())


def inputs(value: float | None = 50.0, text: str = "a note") -> Inputs:
    values = () if value is None else (UsedValue("crp", CRP, value, "", "mg/L", AT, ""),)
    texts = (UsedText("note", Code("34109-9", "LN", "Note"), text, AT, ""),) if text else ()
    return Inputs({"image": Series("1.2", "CT", "", "")}, values, texts)


def answers(model: Model, batch: Sequence[Prepared]) -> list[tuple[Finding, ...]]:
    """What the network says, where it says something finite of every study."""
    found = model.predict(batch)
    assert not [one for one in found if isinstance(one, BundleError)]
    return [one for one in found if not isinstance(one, BundleError)]


def test_every_finding_is_answered_with_its_code_threshold_and_shares(model: Model) -> None:
    ((ill, rare),) = answers(model, [model.prepare({"image": volume()}, inputs())])
    assert (ill.name, ill.code, ill.threshold) == ("ill", Code("ILL", "99TEST", "Ill"), 0.6)
    assert rare.name == "rare"
    assert 0 < ill.probability < 1
    assert tuple(ill.shapley) == ("image", "values", "text")
    assert (model.name, model.version, model.digest) == ("small", "1.0.0", Bundle.read(model.bundle.folder).digest)


def test_a_study_is_answered_alike_alone_and_in_a_batch(model: Model) -> None:
    batch = [model.prepare({"image": volume(n)}, inputs(float(n) + 1, "word " * n)) for n in range(7)]
    together = answers(model, batch)
    for one, answer in zip(batch, together, strict=True):
        (alone,) = answers(model, [one])
        for a, b in zip(alone, answer, strict=True):
            assert a.probability == pytest.approx(b.probability, abs=1e-5)
            assert dict(a.shapley) == pytest.approx(dict(b.shapley), abs=1e-5)


def test_an_empty_batch_has_no_answers(model: Model) -> None:
    assert answers(model, []) == []


def test_the_shares_add_up_to_the_log_odds_over_those_of_a_study_nothing_is_known_of(model: Model) -> None:
    (first, second) = answers(
        model, [model.prepare({"image": volume(1)}, inputs(2.0)), model.prepare({"image": volume(2)}, inputs(900.0, ""))]
    )
    offsets = [np.log(f.probability / (1 - f.probability)) - sum(f.shapley.values()) for f in (first[0], second[0])]
    assert offsets[0] == pytest.approx(offsets[1], abs=1e-4)
    assert second[0].shapley["text"] == 0


def test_a_study_without_a_record_is_answered_from_the_image_alone(model: Model) -> None:
    ((ill, _),) = answers(model, [model.prepare({"image": volume()}, inputs(None, ""))])
    assert ill.shapley["values"] == ill.shapley["text"] == 0


@pytest.mark.parametrize(("probability", "expected"), [(0.6, "positive"), (0.59, "uncertain"), (0.4, "uncertain"), (0.39, "negative")])
def test_verdicts_at_and_around_the_thresholds(model: Model, probability: float, expected: str) -> None:
    assert verdict(model.bundle.findings[0], probability) == expected


def test_without_a_lower_threshold_there_is_no_uncertain(model: Model) -> None:
    assert [verdict(model.bundle.findings[1], p) for p in (0.5, 0.499)] == ["positive", "negative"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_pixels_and_values_that_are_not_numbers_are_refused(model: Model, bad: float) -> None:
    broken = volume()
    broken.array[0, 0, 0] = bad
    with pytest.raises(PixelError, match="1 pixels"):
        model.prepare({"image": broken}, inputs())
    with pytest.raises(PixelError, match="laboratory value"):
        model.prepare({"image": volume()}, inputs(bad))


def test_a_volume_without_patient_coordinates_is_refused(model: Model) -> None:
    with pytest.raises(GeometryError, match="no patient coordinates"):
        model.prepare({"image": replace(volume(), affine=None)}, inputs())
    with pytest.raises(GeometryError, match="positive and finite"):
        model.prepare({"image": replace(volume(), affine=np.zeros((4, 4)))}, inputs())


def test_a_film_of_two_planes_or_of_nothing_is_refused() -> None:
    film = Model(Path(__file__).parents[2] / "models" / "bundles" / "cxr-severity")
    flat = Volume(np.zeros((1, 50, 60), np.float32), None, (0, 0, 0), "CR", "1.2", ())
    with pytest.raises(PixelError, match="one plane"):
        film.prepare({"image": volume()}, inputs(None, ""))
    with pytest.raises(PixelError, match="blank"):
        film.prepare({"image": flat}, inputs(None, ""))
    flat.array[0] = np.random.default_rng(0).random((50, 60))  # as bright and as varied as a film, which a white square is not
    ((icu,),) = answers(film, [film.prepare({"image": flat}, inputs(None, ""))])
    assert icu.shapley["values"] == 0


def test_weights_that_answer_nonsense_are_refused_not_reported(folder: Path, tmp_path: Path) -> None:
    broken = small_bundle.write(tmp_path / "broken")
    tensors = load((folder / "weights.safetensors").read_bytes())
    raw = save({**tensors, "head.bias": tensors["head.bias"] * float("nan")})
    (broken / "weights.safetensors").write_bytes(raw)
    settle(broken, {}, sha256=hashlib.sha256(raw).hexdigest())
    with pytest.raises(BundleError, match="not finite"):
        Model(broken)


class Undecided(Model):
    """A model that gives no number for the second study of a batch."""

    def _forward(self, sample: Sample) -> Raw:
        raw = super()._forward(sample)
        raw.logits[1:2, 0] = np.nan
        return raw


def test_an_output_that_is_no_number_costs_its_own_study_only(folder: Path) -> None:
    undecided = Undecided(folder)
    first, second, third = undecided.predict([undecided.prepare({"image": volume(n)}, inputs()) for n in range(3)])
    assert isinstance(second, BundleError)
    assert [isinstance(one, tuple) for one in (first, third)] == [True, True]


def test_weights_of_another_network_or_with_another_hash_are_refused(folder: Path, tmp_path: Path) -> None:
    other = small_bundle.write(tmp_path / "other", (folder / "bundle.toml").read_text("utf-8").replace("width = 16", "width = 32"))
    (other / "weights.safetensors").write_bytes((folder / "weights.safetensors").read_bytes())
    with pytest.raises(BundleError, match="do not fit"):
        Model(other)
    (other / "weights.safetensors").write_bytes(b"tampered")
    with pytest.raises(BundleError, match="sha256"):
        Model(other)


def test_a_limit_of_what_is_typical_that_belongs_to_another_network_is_refused(folder: Path, tmp_path: Path) -> None:
    other = small_bundle.write(tmp_path / "other")
    tensors = load((folder / "weights.safetensors").read_bytes())
    about = {"mean": torch.zeros(3), "precision": torch.eye(3), "limit": torch.tensor(1.0)}
    raw = save({**tensors, **{f"atypical.{name}": tensor for name, tensor in about.items()}})
    (other / "weights.safetensors").write_bytes(raw)
    settle(other, {}, sha256=hashlib.sha256(raw).hexdigest())
    with pytest.raises(BundleError, match="do not fit"):
        Model(other)


def phantom(seed: int, absent: frozenset[str], spec: Spec) -> tuple[PhantomCase, Volume, Inputs]:
    """One synthetic patient by way of our own HL7 parser and choice of inputs."""
    case = make_case(seed, absent=absent)
    first = case.datasets[0]
    affine = np.diag([2.6, 2.6, 6.0, 1.0])
    affine[:3, 3] = first.ImagePositionPatient
    hu = np.stack([ds.pixel_array for ds in case.datasets]).astype(np.float32) - 1024
    at = case.study_at.replace(tzinfo=UTC)
    parsed = [parse(message.encode(), zone=UTC, issuers={}) for message in case.hl7]
    observations = tuple(one for message in parsed if message.update for one in message.update.observations)
    patient = Patient(PatientKey("SYNOPTIC-DEMO", case.patient_id))
    instances = tuple(Instance(ds.SOPInstanceUID, "", "", Path("x"), "", 0) for ds in case.datasets)
    series = Series(first.SeriesInstanceUID, "CT", "CHEST", "Chest axial", instances)
    study = Study(case.study_instance_uid, patient, "", at, "", 1, (series,))
    return case, Volume(hu, affine, (6, 2.6, 2.6), "CT", "", ()), select_inputs(study, PatientRecord(patient, at, observations), spec)


def test_the_shipped_phantom_bundle_is_right_about_patients_it_has_never_seen() -> None:
    """And about which source says what: a record's fact shows in the share of the values or of the text."""
    shipped = Model(Path(__file__).parents[2] / "models" / "bundles" / "phantom")
    right = 0
    for seed in range(500, 524):
        case, image, chosen = phantom(seed, frozenset(), shipped.bundle)
        ((suspicious, large),) = answers(shipped, [shipped.prepare({"image": image}, chosen)])
        right += suspicious.verdict == ("positive" if case.truth["suspicious_nodule"] else "negative")
        assert large.verdict == ("positive" if case.truth["large_nodule"] else "negative")
        assert (suspicious.shapley["values"] > 0) == bool(case.factors["marker"])
    assert right >= 22


def test_the_shipped_phantom_bundle_reads_a_record_with_a_gap() -> None:
    shipped = Model(Path(__file__).parents[2] / "models" / "bundles" / "phantom")
    _, image, chosen = phantom(501, frozenset({"note"}), shipped.bundle)
    ((suspicious, _),) = answers(shipped, [shipped.prepare({"image": image}, chosen)])
    assert [code.value for code in chosen.missing if code.value == "34109-9"] == ["34109-9"]
    assert suspicious.shapley["text"] == 0


class Cramped(Model):
    """A model on a device that holds `room` studies."""

    room = 99

    def _forward(self, sample: Sample) -> Raw:
        if len(sample["image_mask"]) > self.room:
            raise torch.OutOfMemoryError("full")
        return super()._forward(sample)


def test_a_full_device_gets_smaller_batches_and_the_same_answers(folder: Path, model: Model) -> None:
    batch = [model.prepare({"image": volume(n)}, inputs(float(n) + 1)) for n in range(5)]
    cramped = Cramped(folder)
    cramped.room = 2
    expected = [f.probability for findings in answers(model, batch) for f in findings]
    assert [f.probability for findings in answers(cramped, batch) for f in findings] == pytest.approx(expected, abs=1e-5)
    cramped.room = 0
    with pytest.raises(DeviceOutOfMemory, match="one study"):
        answers(cramped, batch)


def test_findings_come_with_the_share_of_each_value_and_a_map_in_patient_coordinates(model: Model) -> None:
    """The values' shares are the modality's; a negative finding has no map: there is nothing to point at."""
    read = {"image": replace(volume(), sop_instance_uids=("1.2.3",))}
    prepared = model.prepare(read, inputs())
    (told,) = answers(model, [prepared])
    sure = tuple(replace(finding, verdict="positive" if finding.name == "ill" else "negative") for finding in told)
    ill, rare = model.explain(prepared, sure, places(model.bundle, read))
    assert set(ill.attributions) == {"crp"}
    assert ill.attributions["crp"] == pytest.approx(ill.shapley["values"], abs=1e-5)
    assert (rare.saliency, rare.regions) == ((), ())
    (found,) = ill.regions
    assert (found.shape, found.image, found.sop_instance_uids, found.frame_numbers) == ((9, 11, 13), "image", ("1.2.3",), (1,))
    (where,) = ill.saliency
    assert (where.image, where.sop_instance_uids) == ("image", ("1.2.3",))
    assert where.array.max() == 1
    assert where.affine is not None
    middle = where.affine @ [*(np.array(where.array.shape[::-1]) - 1) / 2, 1]
    assert middle[:3] == pytest.approx([12, 10, 12], abs=2)  # the middle of 13 x 11 x 9 voxels of 2, 2 and 3 mm


def test_a_study_unlike_all_it_learned_from_is_uncertain_and_said_to_be(tmp_path: Path) -> None:
    folder = small_bundle.write(tmp_path / "small")
    bundle = Bundle.read(folder, verify=False)
    studies = small_bundle.studies(bundle, 60)
    save_fit(bundle, fit(bundle, studies, seed=0, epochs=1), studies)
    careful = Model(folder)
    usual = Prepared(studies[0].sample)
    strange = Prepared({**studies[0].sample, "image": torch.linspace(0, 30, 12)[None, :, None, None].expand(1, 12, 10, 8)})
    (first, _), (second, _) = answers(careful, [usual, strange])
    assert not first.is_atypical
    assert second.is_atypical
    assert second.verdict == "uncertain"
