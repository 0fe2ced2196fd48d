"""The only door to torch: a bundle becomes a warm model; studies go in, coded findings come out.

::

    Volume + Inputs ─ prepare ─▶ Prepared ─┐
    Volume + Inputs ─ prepare ─▶ Prepared ─┴ predict: one forward ─▶ findings, each with its Shapley shares

`train` and `cross_validate` make their tensors by the same `prepare`: there is no second way. fp32 throughout on the CPU;
a study's answer does not depend on its batch (to 1e-5). Not here: which series and values (inputs.py), the network (models/).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from models import evaluation, training
from models.bundle import Bundle, FindingSpec, InvalidBundleError
from models.fusion import FusionNetwork, shapley, subset_logits
from models.transforms import Sample, collate, radiograph_tensor, text_ids, value_tensors, volume_tensor
from worker.domain import Code, Finding, Inputs, Verdict, Volume
from worker.errors import BundleError, DeviceOutOfMemory, GeometryError, PixelError

if TYPE_CHECKING:
    from worker.inputs import Spec

#: (volume, inputs, labels by finding name, None where unknown; group: studies of one group are never split)
LabeledCase = tuple[Volume, Inputs, dict[str, float | None], str]


@dataclass(frozen=True, slots=True)
class Prepared:
    """One study as tensors on the CPU, ready to be batched."""

    tensors: Sample


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """How a training went; `auroc` is on the held-out groups that also chose the epoch, so it flatters."""

    studies: int
    groups: int
    epochs: int
    best_epoch: int
    validation_loss: float
    validation_studies: int
    auroc: dict[str, dict[str, float]]
    temperatures: dict[str, float]
    digest: str
    weights_bytes: int


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
    """

    def __init__(self, folder: Path, *, device: str = "cpu", threads: int = 1) -> None:
        self.bundle = _read(folder)
        self.name, self.version, self.digest = self.bundle.name, self.bundle.version, self.bundle.digest
        self.spec: Spec = self.bundle
        self.device = torch.device(device)
        torch.set_num_threads(threads)
        self._network = FusionNetwork(self.bundle)
        try:
            self._network.load_state_dict(self.bundle.tensors())
        except (InvalidBundleError, RuntimeError) as exc:
            raise BundleError(f"The weights of bundle {self.name} do not fit its network: {exc}") from exc
        self._network.to(self.device).eval()
        self._temperatures = torch.tensor([f.temperature for f in self.bundle.findings], device=self.device)
        # The first forward allocates and chooses kernels; no study shall wait for it.
        if isinstance(answer := self.predict([_blank(self.bundle)])[0], BundleError):
            raise answer

    def prepare(self, volume: Volume, inputs: Inputs) -> Prepared:
        """Turn one study into tensors; see `prepare`."""
        return prepare(self.bundle, volume, inputs)

    def predict(self, batch: Sequence[Prepared]) -> list[tuple[Finding, ...] | BundleError]:
        """Answer for each study, in order, in one forward; halves the batch while the device is out of memory.

        The answer is a BundleError, of that study alone, where a finite input gave an infinite or undefined output.

        Raises
        ------
        DeviceOutOfMemory
            Not even one study fits.
        """
        if not batch:
            return []
        try:
            logits, shares = self._forward(collate([one.tensors for one in batch]))
        except torch.OutOfMemoryError as exc:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            if len(batch) == 1:
                raise DeviceOutOfMemory(f"{self.device} cannot hold one study of bundle {self.name}.") from exc
            middle = len(batch) // 2
            return self.predict(batch[:middle]) + self.predict(batch[middle:])
        return [self._answer(logits[b], shares[:, b]) for b in range(len(batch))]

    def _answer(self, logits: NDArray[np.float64], shares: NDArray[np.float64]) -> tuple[Finding, ...] | BundleError:
        if not (np.isfinite(logits).all() and np.isfinite(shares).all()):
            return BundleError(f"Bundle {self.name} gave an output that is not finite.")
        return tuple(self._finding(spec, logits[f], shares[:, f]) for f, spec in enumerate(self.bundle.findings))

    @torch.inference_mode()
    def _forward(self, sample: Sample) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Calibrated log-odds (B, L) and their Shapley shares (M, B, L)."""
        tokens = self._network.encode({key: tensor.to(self.device) for key, tensor in sample.items()})
        game = subset_logits(self._network.head, tokens) / self._temperatures  # (S, B, L)
        return game[-1].double().cpu().numpy(), shapley(game.double()).cpu().numpy()

    def _finding(self, spec: FindingSpec, logit: float, shares: NDArray[np.float64]) -> Finding:
        probability = float(1 / (1 + np.exp(-logit)))
        return Finding(
            name=spec.name,
            code=Code(spec.code.value, spec.code.scheme, spec.code.meaning),
            probability=probability,
            threshold=spec.threshold,
            verdict=verdict(spec, probability),
            shapley={name: float(share) for name, share in zip(self.bundle.modalities, shares, strict=True)},
        )


def verdict(spec: FindingSpec, probability: float) -> Verdict:
    """Positive at or above the threshold, negative below the lower one, uncertain between."""
    if probability >= spec.threshold:
        return "positive"
    lower = spec.threshold if spec.negative_below is None else spec.negative_below
    return "negative" if probability < lower else "uncertain"


def prepare(bundle: Bundle, volume: Volume, inputs: Inputs) -> Prepared:
    """Turn one study into the tensors the network of `bundle` takes.

    Raises
    ------
    PixelError
        A pixel or a value is infinite or undefined, or a radiograph is blank or has more than one plane.
    GeometryError
        A volume without patient coordinates, where the network needs millimetres.
    """
    if not np.isfinite(volume.array).all():
        raise PixelError(f"{int((~np.isfinite(volume.array)).sum())} pixels of the series are not finite numbers.")
    if not all(np.isfinite(used.value) for used in inputs.values):
        raise PixelError("A laboratory value is not a finite number.")
    tensors: Sample = {"image": _image(bundle, volume), "image_mask": torch.tensor(True)}
    if bundle.record.values:
        numbers, signs, mask = value_tensors({u.name: (u.value, u.comparator) for u in inputs.values}, bundle.record.values)
        tensors |= {"numbers": numbers, "signs": signs, "number_mask": mask}
    if bundle.record.texts:
        tensors["words"] = text_ids("\n".join(used.text for used in inputs.texts), bundle.network)
    return Prepared(tensors)


def train(
    folder: Path,
    cases: Iterable[LabeledCase],
    *,
    seed: int = 0,
    epochs: int | None = None,
    device: str = "cpu",
    progress: training.Progress | None = None,
) -> TrainingReport:
    """Train the bundle in `folder` on `cases`; write its weights, their sha256 and the temperatures there.

    `cases` is read once; only tensors of the network's size are kept. The epochs default to the bundle's own.
    """
    bundle = _read(folder, verify=False)
    studies = _labeled(bundle, cases)
    result = training.fit(bundle, studies, seed=seed, epochs=epochs, device=device, progress=progress)
    settled = training.save_fit(bundle, result)
    _, held_out = training.split_groups(studies, share=bundle.training.validation, seed=seed)
    return TrainingReport(
        studies=len(studies),
        groups=len({s.group for s in studies}),
        epochs=result.epochs,
        best_epoch=result.best_epoch,
        validation_loss=result.validation_loss,
        validation_studies=result.validation_studies,
        auroc=_judge(bundle, result.network, held_out, device="cpu"),
        temperatures={f.name: f.temperature for f in settled.findings},
        digest=settled.digest,
        weights_bytes=settled.weights_path.stat().st_size,
    )


def evaluate(folder: Path, cases: Iterable[LabeledCase], *, device: str = "cpu") -> dict[str, dict[str, float]]:
    """AUROC per finding, fused and of each modality alone, of the bundle as it stands, on cases it has not seen."""
    model = Model(folder, device=device, threads=torch.get_num_threads())
    return _judge(model.bundle, model._network, _labeled(model.bundle, cases), device=device)


def cross_validate(
    folder: Path,
    cases: Iterable[LabeledCase],
    *,
    folds: int = 5,
    repeats: int = 1,
    seed: int = 0,
    epochs: int | None = None,
    device: str = "cpu",
    progress: evaluation.FoldProgress | None = None,
) -> list[dict[str, dict[str, float]]]:
    """Grouped out-of-fold AUROC per finding, fused and of each modality alone, one table per repeat; writes nothing."""
    bundle = _read(folder, verify=False)
    studies = _labeled(bundle, cases)
    labels = torch.stack([s.labels for s in studies])
    tables = []
    for repeat in range(repeats):
        pooled = evaluation.out_of_fold(
            bundle, studies, folds=folds, seed=seed + 1000 * repeat, epochs=epochs, device=device, progress=progress
        )
        tables.append(evaluation.by_modality(bundle, pooled, labels))
    return tables


def _judge(bundle: Bundle, network: FusionNetwork, studies: Sequence[training.Labeled], *, device: str) -> dict[str, dict[str, float]]:
    scores = {view: training.predict(network, studies, device=device, keep=keep)[0] for view, keep in evaluation.views(bundle).items()}
    return evaluation.by_modality(bundle, scores, torch.stack([s.labels for s in studies]))


def _read(folder: Path, *, verify: bool = True) -> Bundle:
    try:
        return Bundle.read(folder, verify=verify)
    except InvalidBundleError as exc:
        raise BundleError(str(exc)) from exc


def _image(bundle: Bundle, volume: Volume) -> torch.Tensor:
    if bundle.series.kind == "radiograph":
        if volume.array.shape[0] != 1:
            raise PixelError(f"A radiograph has one plane; this series has {volume.array.shape[0]}.")
        try:
            return radiograph_tensor(volume.array[0], bundle.network)
        except ValueError as exc:
            raise PixelError(str(exc)) from exc
    if volume.affine is None:
        raise GeometryError("The series has no patient coordinates; the network needs a volume in millimetres.")
    try:
        return volume_tensor(volume.array, volume.affine, bundle.network)
    except ValueError as exc:
        raise GeometryError(str(exc)) from exc


def _labeled(bundle: Bundle, cases: Iterable[LabeledCase]) -> list[training.Labeled]:
    studies = []
    for volume, inputs, labels, group in cases:
        known = [labels.get(f.name) for f in bundle.findings]
        truth = torch.tensor([float("nan") if label is None else label for label in known])
        studies.append(training.Labeled(prepare(bundle, volume, inputs).tensors, truth, group))
    return studies


def _blank(bundle: Bundle) -> Prepared:
    """An empty study, for the warm-up."""
    values = len(bundle.record.values)
    tensors: Sample = {"image": torch.zeros(1, *bundle.network.image_size), "image_mask": torch.tensor(True)}
    if values:
        tensors |= {
            "numbers": torch.zeros(values),
            "signs": torch.zeros(values, dtype=torch.long),
            "number_mask": torch.zeros(values, dtype=torch.bool),
        }
    if bundle.record.texts:
        tensors["words"] = text_ids("", bundle.network)
    return Prepared(tensors)
