"""Seconds from the findings to all documents of a result, and highdicom's share of them: a radiograph, and a CT with a segmentation.

``python -m tests.bench.documents [--slices 300] [--size 512] [--rounds 5]`` prints a table and one JSON line. The images lie in the page
cache; what is quoted is the median of the rounds, each a Result of its own. highdicom's share is counted by a profiler in a round of its
own, where everything takes longer: it is a share, not seconds. Not here: what makes the findings and their regions.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from tests import factories, located, reports
from tests.bench.load import SPACING_MM, phantom
from worker.domain import Document, Finding, Series
from worker.imaging import volume
from worker.imaging.decoding import DecoderPool
from worker.report import forms, sr
from worker.report.result import Result, result_of

KINDS: Final = tuple(forms.BUILDERS)
_RADIOGRAPH: Final = (2500, 2048)


def _result(series: Series, findings: Sequence[Finding], planes: Sequence[str], pool: DecoderPool) -> Result:
    paths = [one.path for one in series.instances]
    return result_of(
        reports.study_of(paths[0]),
        algorithm=reports.ALGORITHM,
        evidence=paths,
        inputs=replace(reports.INPUTS, series={"image": series}),
        findings=findings,
        analysed_at=reports.ANALYSED_AT,
        zone=reports.ZONE,
        planes={"image": tuple((uid, 1) for uid in planes)},
        decoders=pool,
    )


def radiograph(folder: Path, pool: DecoderPool) -> Callable[[], Result]:
    """A film of 2500 × 2048 pixels with one region; gives what makes its Result anew."""
    shape = _RADIOGRAPH
    stored = np.random.default_rng(4).integers(0, 4096, shape).astype(np.uint16)
    series = factories.spool([factories.make_radiograph(stored=stored)], folder)
    loaded = volume.load(series, kind="radiograph", pool=pool)
    map_ = located.painted_on_film(shape, (0.6 * shape[0], 0.3 * shape[1]), 0.12 * shape[1])
    findings = [located.finding_at(map_, located.place_of(loaded)), reports.FINDINGS[1]]
    return lambda: _result(series, findings, loaded.sop_instance_uids, pool)


def ct(folder: Path, pool: DecoderPool, *, slices: int, size: int) -> Callable[[], Result]:
    """A CT with one region, an eighth of it wide; gives what makes its Result anew."""
    series = factories.spool(factories.make_ct(hu=phantom(slices, size=size), spacing_mm=SPACING_MM, is_signed=True), folder)
    loaded = volume.load(series, kind="volume", pool=pool)
    assert loaded.affine is not None
    middle = loaded.affine @ [0.4 * size, 0.5 * size, 0.5 * slices, 1]
    radius = max(size * SPACING_MM[1] / 16, 4.0)
    spec = replace(located.SPEC, spacing_mm=(size * SPACING_MM[2] / 40, size * SPACING_MM[1] / 36, max(slices * SPACING_MM[0] / 32, 1.0)))
    findings = [located.finding_at(located.painted(loaded, middle[:3], radius, spec), located.place_of(loaded)), reports.FINDINGS[1]]
    return lambda: _result(series, findings, loaded.sop_instance_uids, pool)


def measure(make: Callable[[], Result], *, rounds: int) -> dict[str, Any]:
    """Median seconds of each form and of all, bytes of each, and highdicom's share of the time."""
    seconds: dict[str, list[float]] = {kind: [] for kind in ("result", *KINDS, "sr", "all")}
    documents: list[Document] = []
    for _ in range(rounds):
        documents, began = [], time.perf_counter()
        result = make()
        seconds["result"].append(time.perf_counter() - began)
        for kind, build in forms.BUILDERS.items():
            start = time.perf_counter()
            documents += build(result)
            seconds[kind].append(time.perf_counter() - start)
        start = time.perf_counter()
        documents.append(sr.build(result, documents))
        seconds["sr"].append(time.perf_counter() - start)
        seconds["all"].append(time.perf_counter() - began)
    sizes = Counter[str]()
    for one in documents:
        sizes[one.kind] += len(one.data)
    return {
        "seconds": {kind: round(statistics.median(took), 4) for kind, took in seconds.items()},
        "bytes": dict(sizes),
        "highdicom_share": round(_share(make, "highdicom"), 3),
        "typst_share": round(_share(make, "typst"), 3),
    }


def _share(make: Callable[[], Result], package: str) -> float:
    """The part of the time that passes within calls of `package` by others; what it calls in turn (pydicom) is its time, too."""
    profiler = cProfile.Profile()
    profiler.enable()
    forms.author(make(), KINDS)
    profiler.disable()
    counted: Mapping[tuple[str, int, str], Any] = pstats.Stats(profiler).stats  # type: ignore[attr-defined]  # absent from typeshed
    inside = sum(
        of_caller[3]
        for (path, _, name), (*_, callers) in counted.items()
        if f"/{package}/" in path or f"{package}." in name
        for (caller, _, _), of_caller in callers.items()
        if f"/{package}/" not in caller
    )
    total = sum(entry[2] for entry in counted.values())
    return float(inside / total)


def run(folder: Path, *, slices: int, size: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Both studies."""
    with DecoderPool(processes=1) as pool:
        return {
            "radiograph": measure(radiograph(folder / "film", pool), rounds=rounds),
            f"ct {slices} × {size}²": measure(ct(folder / "ct", pool, slices=slices, size=size), rounds=rounds),
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="documents") as folder:
        measured = run(Path(folder), slices=given.slices, size=given.size, rounds=given.rounds)
    for name, figures in measured.items():
        print(f"{name}: highdicom's share {figures['highdicom_share']:.0%}, Typst's {figures['typst_share']:.0%}")
        for kind, took in figures["seconds"].items():
            print(f"  {kind:<10} {took:8.3f} s  {figures['bytes'].get(kind, ''):>12}")
    print(json.dumps({"bench": "documents", "rounds": given.rounds, **measured}))


if __name__ == "__main__":
    main()
