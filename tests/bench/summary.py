"""Seconds of the processor, memory and bytes that the summary page costs, and what of it is typesetting.

``python -m tests.bench.summary [--rounds 30]`` prints one JSON line: medians, each round another page, so that Typst remembers
nothing of the last. "picture": reading the key image again (its decoding process apart), windowing, scaling, outlines.
"png", "pdf": the page alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from tests import factories, reports
from worker.domain import Region
from worker.imaging.decoding import DecoderPool
from worker.report import capture, page
from worker.report.picture import key_picture

SIZE = 2048


def main() -> None:
    """Print the figures."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=30)
    rounds = arguments.parse_args().rounds
    j, i = np.mgrid[0:SIZE, 0:SIZE]
    noise = np.random.default_rng(1).normal(0, 60, (SIZE, SIZE))
    film = factories.make_radiograph(stored=(2000 + 900 * np.cos(i / 300) * np.cos(j / 500) + noise).clip(0, 4095).astype(np.uint16))
    uid, mask = str(film.SOPInstanceUID), np.ones((1, 300, 300), bool)
    region = Region(mask, (0, 500, 500), (1, SIZE, SIZE), None, "image", (uid,), (1,))
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    sizes: dict[str, int] = {}

    def timed(what: str, do: Callable[[], Any]) -> Any:
        started = time.process_time()
        made = do()
        seconds[what].append(time.process_time() - started)
        return made

    before = psutil.Process().memory_info().rss
    with DecoderPool(processes=1) as pool, tempfile.TemporaryDirectory() as scratch:
        series = factories.spool([film], Path(scratch))
        made = reports.result([series.instances[0].path], inputs=replace(reports.INPUTS, series={"image": series}))
        made = replace(made, planes={"image": ((uid, 1),)}, decoders=pool)
        for number in range(rounds):
            first = replace(reports.FINDINGS[0], probability=0.6 + number / 1000, regions=(region,))
            result = replace(made, findings=(first, reports.FINDINGS[1]))
            picture = timed("picture", partial(key_picture, result))
            timed("png", partial(page.render, result, picture, theme="dark", form="png"))
            timed("pdf", partial(page.render, result, picture, theme="light", form="pdf"))
            for kind, build in (("summary", capture.summary), ("encapsulated", capture.pdf)):
                sizes[kind] = len(timed(kind, partial(build, result))[0].data)
    figures = {what: round(statistics.median(each), 3) for what, each in seconds.items()}
    grown = (psutil.Process().memory_info().rss - before) >> 20
    first_s = round(seconds["png"][0], 3)
    print(json.dumps({"bench": "summary", "rounds": rounds, "cpu_s": figures, "first_s": first_s, "bytes": sizes, "grown_mb": grown}))


if __name__ == "__main__":
    main()
