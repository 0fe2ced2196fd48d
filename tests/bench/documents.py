"""CPU seconds from findings to each document of one result, its bytes, and highdicom's share: a CT of 300 slices, a radiograph.

``python -m tests.bench.documents [--slices 300] [--rounds 5]`` prints one JSON line a document: of the rounds after the first, whose
imports and tables come once in a process ("first_s"), the median. The share is that of the time under highdicom's frames, pydicom
below it included. CPU seconds ("cpu_s"), because a shared machine's clock ("s") says more of its other work; the summary's key
image is decoded in another process, whose time only "s" has.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import torch

from models.explanation import to_patient
from models.image_spec import ImageSpec
from tests import factories, located, reports
from worker.domain import Document, Saliency
from worker.imaging.decoding import DecoderPool
from worker.regions import Place, region
from worker.report import forms, sr
from worker.report.result import Result

SPEC: Final = ImageSpec("image", "volume", ("CT",), (96, 96, 96), spacing_mm=(3.5, 3.5, 3.5))
MM: Final = (1.25, 0.7, 0.7)
ORIGIN: Final = (-180.0, -180.0, -200.0)


def of_ct(folder: Path, slices: int) -> Result:
    """A region of 25 mm about one place in a series whose pixels nobody reads again."""
    datasets = factories.make_ct(hu=np.zeros((slices, 4, 4), np.float32), spacing_mm=MM, origin_mm=ORIGIN)
    for ds in datasets:
        ds.Rows = ds.Columns = 512
        ds.PixelData = b"\0" * (2 * 512 * 512)
    series = factories.spool(datasets, folder)
    affine = factories.known_affine(spacing_mm=MM, origin_mm=ORIGIN)
    place = Place((slices, 512, 512), affine, tuple(one.sop_instance_uid for one in series.instances), (1,) * slices)
    array, to_mm = to_patient(torch.full(SPEC.size, 0.2), SPEC, place.shape, affine)
    k, j, i = np.indices(array.shape)
    distance = np.linalg.norm((np.stack([i, j, k, np.ones_like(i)], -1) @ to_mm.T)[..., :3] - (40, -20, -20), axis=-1)
    array[distance < 25] = 0.9
    array[np.unravel_index(distance.argmin(), array.shape)] = 1
    started = time.process_time()
    found = region(Saliency(array.astype(np.float16), to_mm, "image", place.sop_instance_uids), place)
    assert found is not None
    print(json.dumps({"what": "region", "of": f"CT, {slices} slices", "cpu_s": round(time.process_time() - started, 3)}))
    saliency = Saliency(array.astype(np.float16), to_mm, "image", place.sop_instance_uids)
    return located.result_with(series, [replace(reports.FINDINGS[0], saliency=(saliency,), regions=(found,))])


def of_film(folder: Path) -> Result:
    """A region of 300 pixels about one place of a radiograph of 3000 x 2500."""
    series = located.film(folder, rows=3000, columns=2500)
    place = Place((3000, 2500), None, (series.instances[0].sop_instance_uid,), (1,))
    return located.result_with(series, [located.finding_at(located.painted_on_film((3000, 2500), (1000, 1200), 300), place)])


def pictured(result: Result, pool: DecoderPool) -> Result:
    """The result as the line makes it: what the summary page reads its key image by."""
    [where] = result.findings[0].regions
    return replace(result, planes={"image": tuple(zip(where.sop_instance_uids, where.frame_numbers, strict=True))}, decoders=pool)


def measure(what: str, of: str, build: Callable[[], list[Document]], rounds: int) -> None:
    """Print the line of one kind of document."""
    spent, took = [], []
    for _ in range(rounds + 1):
        clock, started = time.perf_counter(), time.process_time()
        made = build()
        spent.append(time.process_time() - started)
        took.append(time.perf_counter() - clock)
    profile = cProfile.Profile()
    profile.runcall(build)
    share = _share(pstats.Stats(profile), "highdicom")
    figures = {
        "s": round(statistics.median(took[1:]), 3),
        "cpu_s": round(statistics.median(spent[1:]), 3),
        "first_s": round(spent[0], 3),
        "highdicom": round(share, 2),
    }
    print(
        json.dumps({"what": what, "of": of, "bytes": [len(one.data) for one in made], "highdicom": round(share, 2), **figures}), flush=True
    )


def _share(stats: pstats.Stats, library: str) -> float:
    """The share of the time that was spent below the library's frames, from wherever else it was called."""
    rows = stats.stats  # type: ignore[attr-defined]  # (file, line, name): calls, primitive calls, own, cumulative, by caller
    entered = sum(
        cumulative
        for (file, _, _), (*_, callers) in rows.items()
        for (caller, _, _), (*_, cumulative) in callers.items()
        if f"/{library}/" in file and f"/{library}/" not in caller
    )
    return float(min(1.0, entered / stats.total_tt))  # type: ignore[attr-defined]


def main() -> None:
    """Measure each kind on each image."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, DecoderPool(processes=1) as pool:
        for of, result in (
            (f"CT, {given.slices} slices", of_ct(Path(scratch) / "ct", given.slices)),
            ("radiograph", of_film(Path(scratch) / "film")),
        ):
            result = pictured(result, pool)
            for kind, builder in forms.BUILDERS.items():
                measure(kind, of, lambda result=result, builder=builder: list(builder(result)), given.rounds)  # type: ignore[misc]
            measure("sr", of, lambda result=result: [sr.build(result)], given.rounds)  # type: ignore[misc]
            measure("all", of, lambda result=result: list(forms.author(result, forms.BUILDERS)), given.rounds)  # type: ignore[misc]


if __name__ == "__main__":
    main()
