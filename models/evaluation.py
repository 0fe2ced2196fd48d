"""One fair table: every fusion, single modality, baseline and shortcut floor on the same folds by patient.

::

    repeat × fold ─▶ encoders and image tokens, learned once on the inner patients
                     ├─ each fusion and each single modality: its own record encoders and head on these tokens
                     ├─ the headline again with modalities removed and values dropped
                     ├─ baselines on values, image features, both
                     └─ floors: what is missing, the view, the acquisition, alone
                  ─▶ out-of-fold probabilities of every row ─▶ intervals, differences, subgroups, curves ─▶ JSON

A study is only ever judged by a network that saw nothing of its patient, nor stopped or calibrated on one. Where the bundle
trains its stages jointly, the table freezes the encoders all the same: every head then stands on the same tokens. Folds that are
done are kept in the folder, so a run goes on where it was stopped. Not here: one fold (folds.py), the statistics (metrics.py), the
page (page.py).
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from models import metrics, words
from models.bundle import Bundle
from models.calibration import Coverage, Triage, covered, triage
from models.folds import JOINTLY, SHORTCUTS, Facts, FloatArray, Scores, Task, all_folds, assign_folds, group_of, presence, row_name
from models.fusion import FUSIONS, parameters
from models.network import FusionNetwork
from models.spec import FindingSpec
from models.training import Labeled

ALPHA: Final = 0.1
#: What the headline is claimed to beat or not: corrected for their number. All other differences are shown with their interval alone.
CLAIMED: Final = frozenset({"single", "late"})


def evaluate(
    bundle: Bundle,
    studies: Sequence[Labeled],
    facts: Sequence[Facts],
    *,
    folds: int,
    repeats: int,
    seed: int,
    folder: Path,
    fusions: Sequence[str] = (),
    device: str = "cpu",
    processes: int = 1,
    progress: Callable[[int, int], None] = lambda _done, _of: None,
) -> dict[str, Any]:
    """Train and judge; returns the results that page.py draws. `fusions` empty: all there are.

    Raises
    ------
    ValueError
        An unknown fusion, fewer patients than folds, an image named like a floor, or kept folds of another version.
    """
    if clash := sorted(set(SHORTCUTS) & {image.name for image in bundle.images}):
        raise ValueError(f"An image named {clash[0]!r} cannot be evaluated: its row would be that of a shortcut floor; rename it.")
    if unknown := sorted(set(fusions) - set(FUSIONS)):
        raise ValueError(f"{unknown[0]!r} is no fusion; known are {', '.join(FUSIONS)}.")
    began = time.perf_counter()
    headline = bundle.network.fusion
    chosen = dict.fromkeys((headline, *(fusions or FUSIONS)))
    alone = () if len(bundle.modalities) == 1 else (f"single:{name}" for name in bundle.modalities)
    task = Task(bundle, studies, facts, (*chosen, *(name for name in alone if name not in chosen)), seed, device)
    fold_of = [assign_folds(studies, folds=folds, seed=seed + 1000 * repeat) for repeat in range(repeats)]
    todo = [(repeat, fold) for repeat in range(repeats) for fold in range(folds)]
    found: dict[tuple[int, int], Scores] = {}
    for key, scores in all_folds(task, todo, fold_of, kept=folder / "folds" / _digest(task, folds), processes=processes):
        for name in scores:
            group_of(name, bundle.modalities)  # a strange row is refused now, not after the last fold
        found[key] = scores
        if set(scores) != set(found[next(iter(found))]):
            raise ValueError("The folds kept here have different rows, some kept by another version: remove them or give a new folder.")
        progress(len(found), len(todo))
    pooled = {name: np.full((repeats, len(studies), len(bundle.findings)), np.nan) for name in found[todo[0]]}
    for (repeat, fold), scores in found.items():
        outer = [index for index, study in enumerate(studies) if fold_of[repeat][study.group] == fold]
        for name, values in scores.items():
            pooled[name][repeat, outer] = values
    results = _judged(task, pooled, fold_of)
    return results | {
        "folds": folds,
        "repeats": repeats,
        "seed": seed,
        "seconds": round(time.perf_counter() - began, 1),
        "machine": f"{processes} process{'es' if processes > 1 else ''} on {device}, torch {torch.__version__}",
    }


def _judged(task: Task, pooled: Mapping[str, FloatArray], fold_of: Sequence[Mapping[str, int]]) -> dict[str, Any]:
    bundle, groups = task.bundle, np.array([study.group for study in task.studies])
    labels = torch.stack([study.labels for study in task.studies]).double().numpy()
    results: dict[str, Any] = {
        "bundle": {
            "name": bundle.name,
            "version": bundle.version,
            "title": bundle.title,
            "digest": bundle.digest,
            "fusion": row_name(bundle.network.fusion),
            "stages": bundle.training.stages,
        },
        "cohort": _population(task, labels, groups),
        "rows": [],
        "differences": [],
        "missing": [],
        "subgroups": [],
        "curves": {},
        "triage": {},
        "notes": [*_notes(bundle), *_unlabeled(task, labels, groups, fold_of)],
    }
    headline = row_name(bundle.network.fusion)
    kinds = {name: group_of(name, bundle.modalities) for name in pooled}
    sizes = {row_name(name): _size(bundle, name) for name in task.fusions}
    sizes[headline + JOINTLY] = sizes[headline]
    for index, spec in enumerate(bundle.findings):
        y = labels[:, index]
        for name, scores in pooled.items():
            found = _clean(metrics.intervals(scores[:, :, index], y, groups, threshold=spec.threshold))
            if kinds[name] == "missing":
                results["missing"].append(
                    {"finding": spec.name, "name": name, "metrics": {m: found[m] for m in ("auroc", "auprc", "brier")}}
                )
            else:
                row = {"finding": spec.name, "name": name, "group": kinds[name], "parameters": sizes.get(name), "metrics": found}
                results["rows"].append(row)
        each = {name: s[:, :, index] for name, s in pooled.items()}
        results["differences"] += _differences(spec.name, each, headline, y, groups, kinds)
        fused = pooled[headline][:, :, index]
        results["subgroups"] += _subgroups(task, spec.name, fused, y, groups, spec.threshold)
        results["curves"][spec.name] = _curves(each, headline, y, kinds)
        results["triage"][spec.name] = _triage(fused, y, groups, fold_of) | {"shipped": _shipped(spec, fused, y, groups)}
    return results


def _differences(
    finding: str, scores: Mapping[str, FloatArray], headline: str, y: FloatArray, groups: NDArray[Any], kinds: Mapping[str, str]
) -> list[dict[str, Any]]:
    """The headline less every other row, in AUROC; p, corrected by Holm, for the claimed rows alone.

    The least p of 2000 resamples is 0.001: corrected for some forty rows it is 0.04, and nothing could ever be shown.
    """
    found: list[dict[str, Any]] = []
    tests: list[tuple[dict[str, Any], float]] = []
    for name in scores:
        if name == headline or kinds[name] == "missing":
            continue
        value, low, high, p = metrics.paired(scores[headline], scores[name], y, groups)
        one: dict[str, Any] = {
            "finding": finding,
            "a": headline,
            "b": name,
            "metric": "auroc",
            "difference": _numbers((value, low, high)),
            "p": None,
        }
        found.append(one)
        if kinds[name] in CLAIMED:
            tests.append((one, p))
    for (test, _), corrected in zip(tests, metrics.holm([p for _, p in tests]), strict=True):
        test["p"] = _number(corrected)
    return found


def _population(task: Task, labels: FloatArray, groups: NDArray[Any]) -> dict[str, Any]:
    findings = task.bundle.findings
    present = presence(task.bundle, [study.sample for study in task.studies]).mean(0)
    return {
        "studies": len(task.studies),
        "patients": len({study.group for study in task.studies}),
        "positives": {spec.name: int((labels[:, i] == 1).sum()) for i, spec in enumerate(findings)},
        "negatives": {spec.name: int((labels[:, i] == 0).sum()) for i, spec in enumerate(findings)},
        "patients_positive": {spec.name: len(np.unique(groups[labels[:, i] == 1])) for i, spec in enumerate(findings)},
        "patients_negative": {spec.name: len(np.unique(groups[labels[:, i] == 0])) for i, spec in enumerate(findings)},
        "present": dict(zip(task.bundle.modalities, present.tolist(), strict=True)),
    }


def _size(bundle: Bundle, fusion: str) -> int:
    return parameters(FusionNetwork(bundle, fusion=fusion))


def _subgroups(task: Task, finding: str, scores: FloatArray, y: FloatArray, groups: NDArray[Any], threshold: float) -> list[dict[str, Any]]:
    kinds = {
        "sex": [str(one.get("sex", "unknown")) for one in task.facts],
        "age": [_age_band(one.get("age")) for one in task.facts],
        "view": [str(one.get("view", "unknown")) for one in task.facts],
        "scanner": [str(one.get("scanner", "unknown")) for one in task.facts],
    }
    rows = []
    for by, values in kinds.items():
        if len(set(values)) < 2:
            continue
        named = np.array(values)
        for value, found in metrics.subgroups(scores, y, groups, values, threshold=threshold).items():
            measured = _clean(found.metrics or {})
            chosen = {name: measured.get(name) for name in ("auroc", "recall", "specificity")}
            rows.append(
                {
                    "finding": finding,
                    "by": by,
                    "group": value,
                    "studies": found.studies,
                    "positives": found.positives,
                    "patients_positive": len(np.unique(groups[(named == value) & (y == 1)])),
                    "patients_negative": len(np.unique(groups[(named == value) & (y == 0)])),
                    "metrics": chosen,
                }
            )
    return rows


def _age_band(age: str | float | None) -> str:
    if not isinstance(age, float):
        return "unknown"
    low = min(80, int(age) // 20 * 20)
    return "80 and above" if low == 80 else f"{low} to {low + 19}"


def _curves(scores: Mapping[str, FloatArray], headline: str, y: FloatArray, kinds: Mapping[str, str]) -> dict[str, Any]:
    drawn = [headline, *(name for name in scores if kinds[name] in ("single", "late", "baseline", "floor"))]
    points = {name: metrics.curve_points(scores[name], y) for name in drawn}
    risk = metrics.risk_coverage(scores[headline], y)
    return {
        "roc": {name: found["roc"] for name, found in points.items()},
        "pr": {name: found["pr"] for name, found in points.items()},
        "reliability": metrics.reliability(scores[headline], y),
        "risk_coverage": {"coverage": risk.coverage, "risk": risk.risk, "is_monotone": metrics.is_monotone(risk)},
    }


def _triage(scores: FloatArray, y: FloatArray, groups: NDArray[Any], fold_of: Sequence[Mapping[str, int]]) -> dict[str, Any]:
    """The verdicts that `recalibrate` would give: thresholds from the other folds' patients, tried on this fold's; the mean of all."""
    whole = triage(scores.mean(0), y, alpha=ALPHA, groups=groups)
    shares: list[Coverage] = []
    for repeat, folds in enumerate(fold_of):
        where = np.array([folds[group] for group in groups])
        for fold in sorted(set(folds.values())):
            others = triage(scores[repeat, where != fold], y[where != fold], alpha=ALPHA, groups=groups[where != fold])
            if not others.refused:
                shares.append(covered(others, scores[repeat, where == fold], y[where == fold], groups=groups[where == fold]))
    mean = _mean(shares)
    return {
        "alpha": ALPHA,
        "threshold": _number(whole.threshold),
        "negative_below": _number(whole.negative_below),
        "positives": whole.positives,
        "negatives": whole.negatives,
        "uncertain": _number(mean.uncertain),
        "coverage_positive": _number(mean.positive),
        "coverage_negative": _number(mean.negative),
        "refused": whole.refused,
    }


def _shipped(spec: FindingSpec, scores: FloatArray, y: FloatArray, groups: NDArray[Any]) -> dict[str, float | None]:
    """The verdicts that the bundle gives as it stands: its own thresholds on out-of-fold probabilities; the mean over repeats."""
    low = spec.threshold if spec.negative_below is None else spec.negative_below
    own = Triage(spec.alpha, spec.threshold, low, 0, 0)  # how many it was fitted on is not asked
    mean = _mean([covered(own, each, y, groups=groups) for each in scores])
    return {
        "alpha": spec.alpha,
        "threshold": spec.threshold,
        "negative_below": low,
        "uncertain": _number(mean.uncertain),
        "positives_called_negative": _number(1 - mean.positive),
        "negatives_called_positive": _number(1 - mean.negative),
    }


def _mean(shares: Sequence[Coverage]) -> Coverage:
    """The mean of each share over those in which it is known; NaN where it never is."""

    def mean(found: Iterable[float]) -> float:
        known = [share for share in found if not math.isnan(share)]
        return sum(known) / len(known) if known else math.nan

    return Coverage(mean(s.positive for s in shares), mean(s.negative for s in shares), mean(s.uncertain for s in shares))


def _notes(bundle: Bundle) -> list[str]:
    thresholds = ", ".join(f"{finding.name} {finding.threshold:g}" for finding in bundle.findings)
    return [
        "Out of fold by patient: no network, temperature or early stop saw a patient that it is judged on. "
        "Nothing was tuned on the outer folds.",
        "Intervals resample patients; they hold the chance of having met these patients, not that of having trained these networks.",
        "All fusions and single modalities stand on the same frozen image encoders, each learned on the inner patients of its fold; "
        "one row learns them together with the fusion.",
        f"Accuracy, precision, recall, F1 and specificity are at the bundle's positive threshold ({thresholds}).",
        "Floors are shortcuts: what a row must beat to have learned something of the disease.",
        "p values are of single modalities and late fusions, corrected by Holm for their number; other differences have their interval "
        "alone, not corrected for how many there are.",
        "Verdicts are judged twice: by the bundle's own thresholds, and by those that a recalibration would give.",
        *(
            [f"The bundle trains encoders and fusion together, as in the row{JOINTLY.removeprefix(',')}; the headline has frozen encoders."]
            if bundle.training.stages == "joint"
            else []
        ),
    ]


def _unlabeled(task: Task, labels: FloatArray, groups: NDArray[Any], fold_of: Sequence[Mapping[str, int]]) -> list[str]:
    """A note for each finding of which some fold had nothing to learn."""
    notes = []
    for index, spec in enumerate(task.bundle.findings):
        known = ~np.isnan(labels[:, index])
        parts = [(folds, fold) for folds in fold_of for fold in sorted(set(folds.values()))]
        empty = sum(not any(has and folds[group] != fold for has, group in zip(known, groups, strict=True)) for folds, fold in parts)
        if empty:
            said = f"{spec.name}: in {empty} of {len(parts)} folds no study to learn from has a label; baselines and floors say 0.5 there."
            notes.append(said)
    return notes


def summary(results: Mapping[str, Any]) -> list[str]:
    """What a person wants to know first, a sentence each."""
    lines = []
    for finding in words.findings(results):
        lines += [words.how_good(results, finding), *words.how_compared(results, finding)]
    return lines


def _digest(task: Task, folds: int) -> str:
    """Changes with the recipe, the tensors, labels and patients, the fusions, the seed, the folds and the device.

    Not with the facts: kept folds hold the floors of the facts they were made with. Nor with the version of this package or of any
    library, so that an update does not throw hours away. Where the facts changed, or how networks are trained, give a new folder.
    """
    bundle = task.bundle
    # Not the title, nor what training and recalibration write: thresholds and temperature change no fold's networks.
    recipe = [*map(asdict, bundle.images), asdict(bundle.record), asdict(bundle.network), asdict(bundle.training)]
    names = [finding.name for finding in bundle.findings]
    whole = hashlib.sha256(json.dumps([recipe, names, task.fusions, task.seed, folds, task.device], sort_keys=True).encode())
    for study in task.studies:
        whole.update(study.group.encode())
        for key in sorted(study.sample):
            whole.update(key.encode() + study.sample[key].contiguous().numpy().tobytes())
        whole.update(study.labels.numpy().tobytes())
    return whole.hexdigest()[:16]


def _clean(found: Mapping[str, Sequence[float]]) -> dict[str, list[float | None] | None]:
    return {name: None if math.isnan(values[0]) else _numbers(values) for name, values in found.items()}


def _numbers(values: Iterable[float]) -> list[float | None]:
    return [_number(value) for value in values]


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
