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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from models import metrics, words
from models.bundle import Bundle
from models.calibration import covered, triage
from models.folds import Facts, FloatArray, Scores, Task, all_folds, assign_folds, presence, row_name
from models.fusion import FUSIONS, parameters
from models.network import FusionNetwork
from models.training import Labeled

ALPHA: Final = 0.1


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
        An unknown fusion, or fewer patients than folds.
    """
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
        found[key] = scores
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
        },
        "cohort": _population(task, labels),
        "rows": [],
        "differences": [],
        "missing": [],
        "subgroups": [],
        "curves": {},
        "triage": {},
        "notes": _notes(bundle),
    }
    sizes = {row_name(name): _size(bundle, name) for name in task.fusions}
    for index, spec in enumerate(bundle.findings):
        y = labels[:, index]
        for name, scores in pooled.items():
            found = _clean(metrics.intervals(scores[:, :, index], y, groups, threshold=spec.threshold))
            if name.startswith("without ") or name.endswith("dropped"):
                results["missing"].append(
                    {"finding": spec.name, "name": name, "metrics": {m: found[m] for m in ("auroc", "auprc", "brier")}}
                )
            else:
                row = {"finding": spec.name, "name": name, "group": _group(name), "parameters": sizes.get(name), "metrics": found}
                results["rows"].append(row)
        headline = row_name(bundle.network.fusion)
        for name in pooled:
            if name != headline and not (name.startswith("without ") or name.endswith("dropped")):
                value, low, high, p = metrics.paired(pooled[headline][:, :, index], pooled[name][:, :, index], y, groups)
                results["differences"].append(
                    {
                        "finding": spec.name,
                        "a": headline,
                        "b": name,
                        "metric": "auroc",
                        "difference": _numbers((value, low, high)),
                        "p": _number(p),
                    }
                )
        tests = [one for one in results["differences"] if one["finding"] == spec.name]
        for one, corrected in zip(tests, metrics.holm([math.nan if one["p"] is None else one["p"] for one in tests]), strict=True):
            one["p"] = _number(corrected)
        fused = pooled[headline][:, :, index]
        results["subgroups"] += _subgroups(task, spec.name, fused, y, groups, spec.threshold)
        results["curves"][spec.name] = _curves({name: s[:, :, index] for name, s in pooled.items()}, headline, y)
        results["triage"][spec.name] = _triage(fused, y, groups, fold_of)
    return results


def _group(name: str) -> str:
    if name.startswith("late"):
        return "late"
    if ": " in name:
        return "baseline"
    if name in ("missingness alone", "view alone", "acquisition alone"):
        return "floor"
    return "single" if name.endswith(" alone") else "fusion"


def _population(task: Task, labels: FloatArray) -> dict[str, Any]:
    findings = task.bundle.findings
    present = presence(task.bundle, [study.sample for study in task.studies]).mean(0)
    return {
        "studies": len(task.studies),
        "patients": len({study.group for study in task.studies}),
        "positives": {spec.name: int((labels[:, i] == 1).sum()) for i, spec in enumerate(findings)},
        "negatives": {spec.name: int((labels[:, i] == 0).sum()) for i, spec in enumerate(findings)},
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
        for value, found in metrics.subgroups(scores, y, groups, values, threshold=threshold).items():
            measured = _clean(found.metrics or {})
            chosen = {name: measured.get(name) for name in ("auroc", "recall", "specificity")}
            rows.append(
                {"finding": finding, "by": by, "group": value, "studies": found.studies, "positives": found.positives, "metrics": chosen}
            )
    return rows


def _age_band(age: str | float | None) -> str:
    if not isinstance(age, float):
        return "unknown"
    low = min(80, int(age) // 20 * 20)
    return "80 and above" if low == 80 else f"{low} to {low + 19}"


def _curves(scores: Mapping[str, FloatArray], headline: str, y: FloatArray) -> dict[str, Any]:
    drawn = [headline, *(name for name in scores if _group(name) in ("single", "late"))]
    points = {name: metrics.curve_points(scores[name], y) for name in drawn}
    risk = metrics.risk_coverage(scores[headline], y)
    return {
        "roc": {name: found["roc"] for name, found in points.items()},
        "pr": {name: found["pr"] for name, found in points.items()},
        "reliability": metrics.reliability(scores[headline], y),
        "risk_coverage": {"coverage": risk.coverage, "risk": risk.risk, "is_monotone": metrics.is_monotone(risk)},
    }


def _triage(scores: FloatArray, y: FloatArray, groups: NDArray[Any], fold_of: Sequence[Mapping[str, int]]) -> dict[str, Any]:
    """Verdicts judged across folds: thresholds from the other folds' patients, tried on this fold's; the mean over repeats."""
    whole = triage(scores.mean(0), y, alpha=ALPHA, groups=groups)
    shares = []
    for repeat, folds in enumerate(fold_of):
        where = np.array([folds[group] for group in groups])
        for fold in sorted(set(folds.values())):
            others = triage(scores[repeat, where != fold], y[where != fold], alpha=ALPHA, groups=groups[where != fold])
            if not others.refused:
                here = covered(others, scores[repeat, where == fold], y[where == fold], groups=groups[where == fold])
                shares.append((here.positive, here.negative, here.uncertain))
    positive, negative, uncertain = np.nanmean(np.array(shares), axis=0) if shares else (math.nan,) * 3
    return {
        "alpha": ALPHA,
        "threshold": _number(whole.threshold),
        "negative_below": _number(whole.negative_below),
        "positives": whole.positives,
        "negatives": whole.negatives,
        "uncertain": _number(uncertain),
        "coverage_positive": _number(positive),
        "coverage_negative": _number(negative),
        "refused": whole.refused,
    }


def _notes(bundle: Bundle) -> list[str]:
    thresholds = ", ".join(f"{finding.name} {finding.threshold:g}" for finding in bundle.findings)
    return [
        "Out of fold by patient: no network, temperature or early stop saw a patient that it is judged on. "
        "Nothing was tuned on the outer folds.",
        "Intervals resample patients; they hold the chance of having met these patients, not that of having trained these networks.",
        "All fusions and single modalities stand on the same frozen image encoders, each learned on the inner patients of its fold.",
        f"Accuracy, precision, recall, F1 and specificity are at the bundle's positive threshold ({thresholds}).",
        "Floors are shortcuts: what a row must beat to have learned something of the disease.",
    ]


def summary(results: Mapping[str, Any]) -> list[str]:
    """What a person wants to know first, a sentence each."""
    lines = []
    for finding in words.findings(results):
        lines += [words.how_good(results, finding), *words.how_compared(results, finding)]
    return lines


def _digest(task: Task, folds: int) -> str:
    """Changes with anything that a fold's scores depend on."""
    recipe = asdict(replace(task.bundle, digest="", weights=replace(task.bundle.weights, sha256=""), folder=Path()))
    recipe.pop("folder")
    whole = hashlib.sha256(json.dumps([recipe, task.fusions, task.seed, folds, task.device], sort_keys=True, default=str).encode())
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
