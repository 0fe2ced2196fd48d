"""The door to torch in service: a bundle becomes a warm model; studies go in, coded findings come out.

::

    Volumes + Inputs ─ prepare ─▶ Prepared ─┐
    Volumes + Inputs ─ prepare ─▶ Prepared ─┴ predict: one forward ─▶ findings, each with its Shapley shares
                                             explain ─▶ the same with the share of each value and a map of each image

Training and evaluation (lab.py, cohort.py) make their tensors by the same `prepare`: there is no second way. fp32
throughout on the CPU; a study's answer does not depend on its batch (to 1e-5). Not here: which series and values
(inputs.py), the network (models/).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from models import loading
from models.bundle import Bundle, InvalidBundleError
from models.calibration import Atypical
from models.explanation import saliency, to_patient, token_shares
from models.fusion import shapley, subset_logits
from models.network import FusionNetwork
from models.spec import FindingSpec, ImageSpec
from models.text import bert_ids
from models.transforms import (
    Sample,
    collate,
    frames_tensor,
    gene_tensors,
    history_tensors,
    radiograph_tensor,
    text_ids,
    value_tensors,
    volume_tensor,
)
from worker import checks, selection
from worker.domain import Code, Finding, Inputs, Saliency, Verdict, Volume
from worker.errors import BundleError, DeviceLost, DeviceOutOfMemory, GeometryError, PixelError, Reject
from worker.regions import Place, regions


@dataclass(frozen=True, slots=True)
class Prepared:
    """One study as tensors on the CPU, ready to be batched."""

    tensors: Sample


@dataclass(frozen=True, slots=True)
class Raw:
    """Of a batch: log-odds (B, L), their Shapley shares (M, B, L), whether each study (B,) is atypical, and has what the head sees."""

    logits: NDArray[np.float64]
    shares: NDArray[np.float64]
    is_atypical: NDArray[np.bool_]
    is_heard: NDArray[np.bool_]


class Model:
    """A bundle, loaded, checked and warm.

    Parameters
    ----------
    threads
        CPU threads of one forward; set for the whole process.

    Raises
    ------
    BundleError
        Metadata, weights or their digest are not what they should be.
    Reject
        The device is not here. The CPU does not take its place unasked.
    """

    def __init__(self, folder: Path, *, device: str = "cpu", threads: int = 1) -> None:
        self.bundle = read(folder)
        self.name, self.version, self.digest = self.bundle.name, self.bundle.version, self.bundle.digest
        self.device = check_device(device)
        torch.set_num_threads(threads)
        network, self._atypical = load_network(self.bundle)
        self.network = network.to(self.device)
        self._temperatures = torch.tensor([f.temperature for f in self.bundle.findings], device=self.device)
        # The first forward allocates and chooses kernels; no study shall wait for it.
        try:
            answer = self.predict([_blank(self.bundle)])[0]
        except ValueError as exc:  # an image too small for its encoder, embeddings of another size than what is atypical
            raise BundleError(f"The weights of bundle {self.name} do not fit its network: {exc}") from exc
        if isinstance(answer, BundleError):
            raise answer

    def prepare(self, volumes: Mapping[str, Volume], inputs: Inputs) -> Prepared:
        """Turn one study into tensors; see `prepare`. Volumes are resized on the model's device, on the CPU if it has no room."""
        try:
            return prepare(self.bundle, volumes, inputs, device=self.device)
        except torch.OutOfMemoryError:
            return prepare(self.bundle, volumes, inputs)
        except torch.AcceleratorError as exc:
            raise self._lost(exc) from exc

    def predict(self, batch: Sequence[Prepared]) -> list[tuple[Finding, ...] | BundleError]:
        """Answer for each study, in order, in one forward; halves the batch while the device is out of memory.

        The answer is a BundleError, of that study alone, where a finite input gave an infinite or undefined output, or one that
        its input had no part in.

        Raises
        ------
        DeviceOutOfMemory
            Not even one study fits.
        DeviceLost
            The device answers no more.
        BundleError
            The network gave another number of answers than there are studies and findings.
        """
        if not batch:
            return []
        try:
            raw = self._forward(collate([one.tensors for one in batch]))
        except torch.AcceleratorError as exc:
            raise self._lost(exc) from exc
        except torch.OutOfMemoryError as exc:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            if len(batch) == 1:
                raise DeviceOutOfMemory(f"{self.device} cannot hold one study of bundle {self.name}.") from exc
            middle = len(batch) // 2
            return self.predict(batch[:middle]) + self.predict(batch[middle:])
        return [self._answer(raw, b) for b in range(len(batch))]

    def _lost(self, error: torch.AcceleratorError) -> DeviceLost:
        return DeviceLost(f"{self.device} answers no more ({type(error).__name__}); its process must end.")

    @torch.inference_mode()
    def _forward(self, sample: Sample) -> Raw:
        tokens = self.network.encode({key: tensor.to(self.device) for key, tensor in sample.items()})
        heard = torch.stack([tokens[name][1].any(1) for name in self.network.head.used]).any(0)  # (B,)
        game = subset_logits(self.network.head, tokens)  # (S, B, L)
        if game.shape[1:] != (wanted := (len(heard), len(self.bundle.findings))):
            raise BundleError(f"Bundle {self.name} gave answers of shape {tuple(game.shape[1:])} where {wanted} were expected.")
        game = game / self._temperatures
        logits = game[-1].double().cpu().numpy()
        far = np.zeros(len(logits), dtype=bool)
        if self._atypical is not None:
            far = self._atypical.is_atypical(self.network.head.embed(tokens).double().cpu().numpy())
        return Raw(logits, shapley(game.double()).cpu().numpy(), far, heard.cpu().numpy())

    def explain(self, prepared: Prepared, findings: Sequence[Finding], places: Mapping[str, Place]) -> tuple[Finding, ...]:
        """The same findings with the share of each value, and with maps and regions of those that are not negative.

        `places` says of each image what its array was and where it lies in the patient.
        """
        sample = {key: tensor.to(self.device) for key, tensor in prepared.tensors.items()}
        shares = self._attributions(sample)
        explained = []
        for index, finding in enumerate(findings):
            maps: tuple[Saliency, ...] = ()
            if finding.verdict != "negative":
                maps = tuple(self._map(sample, spec, index, places[spec.name]) for spec in self.bundle.images if spec.name in places)
            told = {name: share[index] for name, share in shares.items()}
            explained.append(replace(finding, attributions=told, saliency=maps, regions=regions(maps, places)))
        return tuple(explained)

    @torch.inference_mode()
    def _attributions(self, sample: Sample) -> dict[str, NDArray[np.float64]]:
        """Share (L,) of each present value, history and gene in the calibrated log-odds; the note's words stay untold."""
        record, batch = self.bundle.record, collate([sample])
        names = {"values": [spec.name for spec in record.values]}
        if record.histories:
            names["history"] = [f"{record.histories[int(variable)].name} history" for variable in sample["history_variables"]]
        if record.genomics:
            names["genes"] = [*["variants"] * len(sample["variants"]), *record.genes]
        tokens, result = self.network.encode(batch), dict[str, NDArray[np.float64]]()
        for modality in self.bundle.modalities:
            if modality not in names or not bool(tokens[modality][1].any()):
                continue
            found = (token_shares(self.network, tokens, modality)[0] / self._temperatures).double().cpu().numpy()  # (n, L)
            for name, share, is_there in zip(names[modality], found, tokens[modality][1][0].tolist(), strict=True):
                if is_there:
                    result[name] = result.get(name, np.zeros(len(share))) + share
        return result

    def _map(self, sample: Sample, spec: ImageSpec, finding: int, place: Place) -> Saliency:
        found = saliency(self.network, sample, spec.name, finding)
        array, affine = to_patient(found, spec, place.shape, place.affine)
        return Saliency(array.astype(np.float16), affine, spec.name, place.sop_instance_uids)

    def _answer(self, raw: Raw, b: int) -> tuple[Finding, ...] | BundleError:
        logits, shares = raw.logits[b], raw.shares[:, b]
        if not (np.isfinite(logits).all() and np.isfinite(shares).all()):
            return BundleError(f"Bundle {self.name} gave an output that is not finite.")
        # With and without each modality the very same number: the answer is a constant, not this patient's.
        if raw.is_heard[b] and (constant := int((~shares.any(axis=0)).sum())):
            return BundleError(f"Bundle {self.name} gave {constant} of {len(logits)} answers that its input had no part in.")
        far = bool(raw.is_atypical[b])
        return tuple(self._finding(spec, logits[f], shares[:, f], is_atypical=far) for f, spec in enumerate(self.bundle.findings))

    def _finding(self, spec: FindingSpec, logit: float, shares: NDArray[np.float64], *, is_atypical: bool) -> Finding:
        with np.errstate(over="ignore"):  # of a log-odds below -709 the probability is 0
            probability = float(1 / (1 + np.exp(-logit)))
        return Finding(
            name=spec.name,
            code=Code(spec.code.value, spec.code.scheme, spec.code.meaning),
            probability=probability,
            threshold=spec.threshold,
            # Of a study unlike all it learned from, the network may say how probable, not that it is sure.
            verdict="uncertain" if is_atypical else verdict(spec, probability),
            is_atypical=is_atypical,
            is_critical=spec.critical,
            shapley={name: float(share) for name, share in zip(self.bundle.modalities, shares, strict=True)},
        )


def verdict(spec: FindingSpec, probability: float) -> Verdict:
    """Positive at or above the threshold, negative below the lower one, uncertain between."""
    if probability >= spec.threshold:
        return "positive"
    lower = spec.threshold if spec.negative_below is None else spec.negative_below
    return "negative" if probability < lower else "uncertain"


def check_device(device: str) -> torch.device:
    """The device of this name; Reject if it is not here, or no network can be run on it."""
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        found = torch.device(device)
    except RuntimeError:
        found = torch.device("meta")
    if found.type not in ("cpu", "cuda") or (found.type == "cuda" and (found.index or 0) >= cards):
        here = f"cpu, {', '.join(['cuda', *(f'cuda:{n}' for n in range(cards))])}" if cards else "cpu; torch finds no CUDA device"
        raise Reject(f"The device {device!r} cannot be used here: there is {here}.")
    return found


def read(folder: Path, *, verify: bool = True) -> Bundle:
    """A bundle's folder.

    Raises
    ------
    BundleError
        Naming the file and the key.
    """
    try:
        bundle = Bundle.read(folder, verify=verify)
    except InvalidBundleError as exc:
        raise BundleError(str(exc)) from exc
    for image in bundle.images:
        selection.check(image)
    return bundle


def load_network(bundle: Bundle) -> tuple[FusionNetwork, Atypical | None]:
    """The bundle's network with its weights, on the CPU, for inference, and what is atypical for it.

    Raises
    ------
    BundleError
        The configuration makes no network, or the weights are not its.
    """
    try:
        return loading.load_network(bundle)
    except (InvalidBundleError, RuntimeError, ValueError) as exc:
        raise BundleError(f"The weights of bundle {bundle.name} do not fit its network: {exc}") from exc


def prepare(bundle: Bundle, volumes: Mapping[str, Volume], inputs: Inputs, *, device: torch.device | str = "cpu") -> Prepared:
    """Turn one study into the tensors the network of `bundle` takes; `volumes` by image name, without those that are missing.

    The tensors are on the CPU, whatever `device` made them.

    Raises
    ------
    PixelError
        A pixel, a value or a number of a tensor is infinite or undefined, or a radiograph is blank or has more than one plane.
    Implausible
        The pixels are not what the bundle says it takes; see checks.py.
    GeometryError
        A volume without patient coordinates, where the network needs millimetres.
    """
    used = (*inputs.values, *(point for history in inputs.histories for point in history.points))
    if not all(np.isfinite(one.value) for one in used):
        raise PixelError("A laboratory value is not a finite number.")
    tensors: Sample = {}
    for spec in bundle.images:
        there = spec.name in volumes
        tensors[spec.name] = _image(spec, volumes[spec.name], device) if there else torch.zeros(1, *spec.size)
        tensors[f"{spec.name}_mask"] = torch.tensor(there)
    return Prepared(tensors | record_tensors(bundle, inputs))


def places(bundle: Bundle, volumes: Mapping[str, Volume]) -> dict[str, Place]:
    """What `explain` needs to know of the images once their pixels are gone."""
    kind = {spec.name: spec.kind for spec in bundle.images}
    return {
        name: Place(
            one.array.shape[1:] if kind[name] == "radiograph" else one.array.shape,
            one.affine,
            one.sop_instance_uids,
            one.frame_numbers or (1,) * len(one.sop_instance_uids),
        )
        for name, one in volumes.items()
    }


def record_tensors(bundle: Bundle, inputs: Inputs) -> Sample:
    """The tensors of all that is no image."""
    record, config, tensors = bundle.record, bundle.network, Sample()
    texts = {used.name: used.text for used in inputs.texts}
    if record.values:
        tensors |= value_tensors({u.name: (u.value, u.comparator, u.age_h) for u in inputs.values}, record.values)
    if record.histories:
        points = [(history.name, p.value, p.comparator, p.age_h) for history in inputs.histories for p in history.points]
        tensors |= history_tensors(points, record.histories, steps=config.steps)
    if record.notes:
        words = "\n".join(texts[spec.name] for spec in record.notes if spec.name in texts)
        if config.text == "bert":
            tensors["words"], tensors["word_mask"] = bert_ids(words, bundle.folder / config.bert, words=config.words)
        else:
            tensors["words"] = text_ids(words, config)
    if record.genomics:
        tensors |= gene_tensors(texts, record, config)
    return tensors


def _image(spec: ImageSpec, volume: Volume, device: torch.device | str) -> torch.Tensor:
    """One image's tensor, looked at before and after."""
    checks.image(volume, spec)
    made = _transformed(spec, volume, device)
    checks.tensor(made.numpy(), spec)
    return made


def _transformed(spec: ImageSpec, volume: Volume, device: torch.device | str) -> torch.Tensor:
    if spec.kind != "volume":
        if spec.kind == "radiograph" and volume.array.shape[0] != 1:
            raise PixelError(f"A radiograph has one plane; this series has {volume.array.shape[0]}.")
        try:
            return radiograph_tensor(volume.array[0], spec) if spec.kind == "radiograph" else frames_tensor(volume.array, spec)
        except ValueError as exc:
            raise PixelError(str(exc)) from exc
    if volume.affine is None:
        raise GeometryError("The series has no patient coordinates; the network needs a volume in millimetres.")
    try:
        return volume_tensor(volume.array, volume.affine, spec, device=device)
    except ValueError as exc:
        raise GeometryError(str(exc)) from exc


def _blank(bundle: Bundle) -> Prepared:
    """An empty study, for the warm-up."""
    return prepare(bundle, {}, Inputs(series={}))
