"""One fold of the fair table: learn on the inner patients, answer for the outer ones, for every row.

::

    inner ─ pretrain ─▶ image encoders ─ cache_tokens ─▶ tokens ─┬─ each fusion and single modality: record encoders + head
                                                                 └─ the headline again: modalities removed, values dropped
    inner ─ the headline with its image encoders, learned jointly
    inner ─ values, image features, both ─▶ baselines          inner ─ what is missing, view, acquisition ─▶ floors

Shapes: L findings. Not here: how folds make a table (evaluation.py).
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
import time
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit
from torch import Tensor

from models import baselines
from models.bundle import Bundle
from models.features import SMALLEST, features
from models.files import replacing
from models.fusion import FUSIONS
from models.training import Fit, Labeled, TokenCache, cache_tokens, fit, predict, pretrain
from models.transforms import Sample

FloatArray = NDArray[np.float64]
#: What is known of a study beside its tensors: sex, age, view, scanner, acquisition attributes.
Facts = Mapping[str, str | float]
#: Probabilities (studies of the fold, L) of one row of the table.
Scores = dict[str, FloatArray]

#: numpy takes 32 bits; the seeds of the folds lie above their repeat's.
MOST_SEED: Final = 2**32 - 1 - 10_000
#: Shares of the values that are dropped to see what is left.
DROPPED: Final = (0.3, 0.6)
#: Rows of late fusion proper: networks that never met.
LATE: Final = ("late mean of single networks", "late stack of single networks")
#: Ends the row of a fusion that learned its image encoders with itself, not before.
JOINTLY: Final = ", learned jointly"
#: Of what a floor is made: no image may be named like one, or its row would be the floor's.
SHORTCUTS: Final = ("missingness", "view", "acquisition")
#: The tables that baselines are given.
TABLES: Final = ("values", "image features", "both")
#: Facts that are no acquisition attribute.
_NOT_ACQUISITION: Final = frozenset({"sex", "age", "view", "scanner"})


@dataclass(frozen=True, slots=True)
class Task:
    """All that a fold needs, made once and sent to each process."""

    bundle: Bundle
    studies: Sequence[Labeled]
    facts: Sequence[Facts]
    fusions: tuple[str, ...]
    seed: int
    device: str


def assign_folds(studies: Sequence[Labeled], *, folds: int, seed: int) -> dict[str, int]:
    """Deal the groups to folds: large ones first, each to the fold that is furthest behind in studies of its kind.

    A group's kind is whether it has a positive of the first finding, so that every fold holds both; ties by a seeded hash.

    Raises
    ------
    ValueError
        Fewer groups than folds, or a seed that the learners of the folds cannot take.
    """
    if not 0 <= seed <= MOST_SEED:
        raise ValueError(f"A seed must lie from 0 to {MOST_SEED}, with 1000 for each repeat; this is {seed}.")
    sizes: dict[str, int] = {}
    positive: dict[str, bool] = {}
    for study in studies:
        sizes[study.group] = sizes.get(study.group, 0) + 1
        positive[study.group] = positive.get(study.group, False) or bool(study.labels[0] == 1)
    if len(sizes) < folds:
        raise ValueError(f"{len(sizes)} groups cannot fill {folds} folds.")
    order = sorted(sizes, key=lambda g: (-sizes[g], hashlib.sha256(f"{seed}/{g}".encode()).digest()))
    load = {kind: [0] * folds for kind in (False, True)}
    result = {}
    for group in order:
        counts = load[positive[group]]
        fold = min(range(folds), key=lambda f: (counts[f], sum(load[kind][f] for kind in load), f))
        result[group] = fold
        counts[fold] += sizes[group]
    return result


def all_folds(
    task: Task, todo: Sequence[tuple[int, int]], fold_of: Sequence[Mapping[str, int]], *, kept: Path, processes: int
) -> Iterable[tuple[tuple[int, int], Scores]]:
    """Every fold's scores, as they are done; those that `kept` holds already at once. An OSError names a folder that is full."""
    kept.mkdir(parents=True, exist_ok=True)
    files = {key: kept / f"{key[0]}-{key[1]}.npz" for key in todo}
    left = []
    for key in todo:
        if (scores := _read(files[key])) is None:
            left.append(key)
        else:
            yield key, scores
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_begin, initargs=(task,)) as pool:
        running = {pool.submit(_run, fold_of[repeat], fold, repeat): (repeat, fold) for repeat, fold in left}
        for done in as_completed(running):
            key, scores = running[done], done.result()
            with replacing(files[key]) as stream:
                np.savez_compressed(stream, allow_pickle=False, **scores)
            yield key, scores


def _read(file: Path) -> Scores | None:
    """The scores that a file keeps; a broken one is removed, for its fold can be learned anew."""
    if not file.exists():
        return None
    try:
        with np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (EOFError, ValueError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error):  # all that numpy and zip files raise
        file.unlink()
        return None


_TASK: list[Task] = []


def _begin(task: Task) -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    _TASK[:] = [task]


def _end_with(parent: int) -> None:
    """A fold takes minutes, and nobody would read what it makes after its parent was killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _run(fold_of: Mapping[str, int], fold: int, repeat: int) -> Scores:
    return one_fold(_TASK[0], [fold_of[study.group] == fold for study in _TASK[0].studies], seed=_TASK[0].seed + 1000 * repeat + fold)


def one_fold(task: Task, is_outer: Sequence[bool], *, seed: int) -> Scores:
    """Learn on the inner studies, answer for the outer ones: every row's probabilities (outer, L)."""
    bundle = task.bundle
    inner = [study for study, out in zip(task.studies, is_outer, strict=True) if not out]
    outer = [study for study, out in zip(task.studies, is_outer, strict=True) if out]
    encoders = pretrain(bundle, inner, seed=seed, device=task.device)
    tokens = cache_tokens(bundle, inner, encoders, seed=seed, device=task.device)
    asked = cache_tokens(bundle, outer, encoders, seed=seed, copies=0, device=task.device)
    scores: Scores = {}
    singles: dict[str, tuple[FloatArray, Fit]] = {}
    for name in task.fusions:
        result = fit(bundle, inner, seed=seed, device=task.device, fusion=name, tokens=tokens)
        answer = partial(_answer, result, tokens=asked)
        logits = answer(outer)
        scores[row_name(name)] = expit(logits)
        if name.startswith("single:"):
            singles[name.removeprefix("single:")] = (logits, result)
        if name == bundle.network.fusion:
            for modality in bundle.modalities if len(bundle.modalities) > 1 else ():
                rest = [one for one in bundle.modalities if one != modality]
                scores[f"without {modality}"] = expit(answer(outer, keep=rest))
            for share in DROPPED if bundle.record.values else ():
                scores[_dropped(share)] = expit(answer(_with_gaps(outer, share, seed)))
    whole = replace(bundle, training=replace(bundle.training, stages="joint"))
    jointly = fit(whole, inner, seed=seed, device=task.device)
    scores[row_name(bundle.network.fusion) + JOINTLY] = expit(_answer(jointly, outer))
    # Of two modalities, "trained without one" is the other alone.
    for modality in bundle.modalities if len(bundle.modalities) > 2 else ():
        result = fit(bundle, _without(inner, modality), seed=seed, device=task.device, tokens=tokens)
        scores[f"trained without {modality}"] = expit(_answer(result, _without(outer, modality), tokens=asked))
    if singles:
        scores |= _late(bundle, singles, inner, outer)
    return scores | _classical(task, np.array(is_outer), seed=seed)


def _answer(result: Fit, studies: Sequence[Labeled], *, tokens: TokenCache | None = None, keep: Sequence[str] | None = None) -> FloatArray:
    """Calibrated log-odds (N, L)."""
    logits, _ = predict(result.network, studies, keep=keep, tokens=tokens)
    return (logits / result.temperatures).double().numpy()


def _late(bundle: Bundle, singles: Mapping[str, tuple[FloatArray, Fit]], inner: Sequence[Labeled], outer: Sequence[Labeled]) -> Scores:
    """Late fusion proper: networks that never met, their calibrated log-odds averaged, or weighed on the held-out inner patients."""
    names = list(singles)
    columns = [bundle.modalities.index(name) for name in names]
    there = presence(bundle, [study.sample for study in outer])[:, columns, None]  # (N, M, 1)
    logits = np.stack([singles[name][0] for name in names], axis=1) * there  # (N, M, L)
    mean = logits.sum(1) / np.maximum(there.sum(1), 1)
    first = singles[names[0]][1]
    # In the order in which `fit` kept them.
    held = sorted((study for study in inner if study.group in set(first.held_groups)), key=lambda study: study.group)
    assert [study.group for study in held] == list(first.held_groups)  # noqa: S101
    seen = presence(bundle, [study.sample for study in held])[:, columns, None]
    known = np.stack([(fit.held_logits / fit.temperatures).double().numpy() for _, fit in singles.values()], axis=1) * seen
    stack = np.empty_like(mean)
    for index in range(mean.shape[1]):
        y = first.held_labels[:, index].double().numpy()
        stack[:, index] = baselines.stacked(known[:, :, index], y, logits[:, :, index])
    return dict(zip(LATE, (expit(mean), stack), strict=True))


def presence(bundle: Bundle, samples: Sequence[Sample]) -> FloatArray:
    """(N, M) of 1 where a study has the modality."""
    return np.array([[float(_has(sample, name)) for name in bundle.modalities] for sample in samples])


def _has(sample: Sample, modality: str) -> bool:
    if modality == "text":  # BERT's own tokens of no word stand even in an empty text: its mask knows
        keys = ["word_mask" if "word_mask" in sample else "words"]
    elif modality == "genes":  # either is enough
        keys = ["variants", "expression_mask"]
    else:
        keys = [{"values": "number_mask", "history": "history_mask"}.get(modality, f"{modality}_mask")]
    return any(bool((sample[key] != 0).any()) for key in keys)


def row_name(fusion: str) -> str:
    """How a fusion's row is headed: "single:image" is "image alone"."""
    return f"{fusion.removeprefix('single:')} alone" if fusion.startswith("single:") else fusion


def group_of(row: str, modalities: Sequence[str]) -> str:
    """Of which kind a row is: "fusion", "single", "late", "baseline", "floor", or "missing" for the headline with parts taken away.

    Raises
    ------
    ValueError
        No row is named so: it was kept by another version.
    """
    table, _, learner = row.partition(": ")
    row = row.removesuffix(JOINTLY)
    kinds = {
        "late": row in LATE or row in ("late_mean", "late_stack"),
        "fusion": row in FUSIONS,
        "single": row in [f"{name} alone" for name in modalities],
        "floor": row in [f"{name} alone" for name in SHORTCUTS],
        "baseline": table in TABLES and learner in baselines.BASELINES,
        "missing": row.removeprefix("trained ") in [f"without {name}" for name in modalities]
        or row in [_dropped(share) for share in DROPPED],
    }
    found = next((kind for kind, holds in kinds.items() if holds), "")
    if not found:
        raise ValueError(f"{row!r} is no row of this table: these folds were kept by another version, remove them.")
    return found


def _dropped(share: float) -> str:
    return f"{share:.0%} of the values dropped"


def _without(studies: Sequence[Labeled], modality: str) -> list[Labeled]:
    """The same studies, none of which has this modality."""
    keys = {
        "values": ["number_mask"],
        "history": ["history_mask"],
        "text": ["words", "word_mask"],
        "genes": ["variants", "expression_mask"],
    }
    return [
        replace(
            s, sample={**s.sample, **{k: torch.zeros_like(s.sample[k]) for k in keys.get(modality, [f"{modality}_mask"]) if k in s.sample}}
        )
        for s in studies
    ]


def _with_gaps(studies: Sequence[Labeled], share: float, seed: int) -> list[Labeled]:
    generator = torch.Generator().manual_seed(seed)
    result = []
    for study in studies:
        mask: Tensor = study.sample["number_mask"]
        kept = mask & (torch.rand(mask.shape, generator=generator) >= share)
        result.append(replace(study, sample={**study.sample, "number_mask": kept}))
    return result


def _classical(task: Task, outer: NDArray[np.bool_], *, seed: int) -> Scores:
    """Baselines and floors, all findings."""
    samples = [study.sample for study in task.studies]
    first = task.bundle.images[0]
    groups = np.array([study.group for study in task.studies])
    truth = torch.stack([study.labels for study in task.studies]).double().numpy()
    tables: dict[str, FloatArray] = {}
    if min(first.size) >= SMALLEST:
        found = [features(sample[first.name]) if bool(sample[f"{first.name}_mask"]) else None for sample in samples]
        count = next((len(one) for one in found if one is not None), 0)
        # Zeros stand for an absent image, but their features would be of a black one.
        tables["image features"] = np.stack([np.full(count, np.nan) if one is None else one for one in found])
    present = presence(task.bundle, samples)
    floors = {"acquisition alone": _acquisition(task.facts, exclude=_NOT_ACQUISITION), "view alone": _acquisition(task.facts, only="view")}
    if task.bundle.record.values:
        tables["values"] = baselines.value_table(samples)
        if "image features" in tables:
            tables["both"] = np.hstack([tables["values"], tables["image features"]])
        present = np.hstack([present, baselines.missing_table(samples)])
    if np.ptp(present, axis=0).any():
        floors["missingness alone"] = present
    rows = {
        f"{table}: {name}": (name, x)
        for table, x in tables.items()
        if x.shape[1]
        for name in baselines.BASELINES
        if table != "image features" or "missing" not in name
    }
    rows |= {name: ("logistic regression", x) for name, x in floors.items() if x.shape[1]}
    scores: Scores = {}
    for row, (name, x) in rows.items():
        columns = []
        for index in range(truth.shape[1]):
            y = truth[:, index]
            is_known = ~outer & ~np.isnan(y)
            if not is_known.any():  # nothing to learn from says nothing, rather than to stop what ran for hours
                columns.append(np.full(int(outer.sum()), 0.5))
                continue
            columns.append(baselines.fit_predict(name, x[is_known], y[is_known], x[outer], seed=seed, groups=groups[is_known]))
        scores[row] = np.stack(columns, axis=1)
    return scores


def _acquisition(facts: Sequence[Facts], *, only: str = "", exclude: frozenset[str] = frozenset()) -> FloatArray:
    """Facts as numbers: one column for each word that two studies or more have, numbers as they are."""
    names = [only] if only else sorted({name for one in facts for name in one} - exclude)
    columns: list[list[float]] = []
    for name in names:
        found = [one.get(name, "") for one in facts]
        if all(isinstance(value, float) or value == "" for value in found):
            columns.append([value if isinstance(value, float) else math.nan for value in found])
        else:
            columns += [[float(value == word) for value in found] for word in sorted({str(v) for v in found}) if found.count(word) > 1]
    return np.array(columns, dtype=np.float64).T.reshape(len(facts), -1)
