"""`synoptic train`: a bundle's folder and a cohort's folder in, weights and an honest table out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from models.bundle import Bundle
from worker import cohort, infer
from worker.config import Config
from worker.infer import LabeledCase


def train(out: Console, err: Console, *, bundle: Path, cohort_folder: Path, settings: Config, seed: int, device: str) -> None:
    """Train in place and print what came of it.

    The AUROC printed is of the held-out groups that also chose the epoch: it flatters. The figures to
    quote are the cross-validated ones in models/README.md.
    """
    refused: Counter[str] = Counter()
    spec = Bundle.read(bundle, verify=False)
    total = len(cohort.read_labels(cohort_folder))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err) as progress:
        reading = progress.add_task("reading studies", total=total)
        learning = progress.add_task("training", total=spec.training.epochs)

        def cases() -> Iterator[LabeledCase]:
            loaded = cohort.load(
                cohort_folder,
                config=settings,
                spec=spec,
                progress=lambda: progress.advance(reading),
                refused=lambda reason: refused.update([reason]),
            )
            for case in loaded:
                yield case.volume, case.inputs, dict(case.labels), case.group

        report = infer.train(bundle, cases(), seed=seed, device=device, progress=lambda *_: progress.advance(learning))
        progress.update(learning, completed=spec.training.epochs)
    for reason, count in refused.most_common():
        out.print(f"{count} studies were not used: {reason}")
    table = Table(show_header=False)
    for name, value in asdict(report).items():
        table.add_row(name.replace("_", " "), str(value))
    out.print(table)
