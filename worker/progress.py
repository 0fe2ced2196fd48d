"""What a person sees while the lab works: a bar for each thing that is counted, and what an early end means.

Not here: the work (cohort.py, models/), the verbs (lab.py).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from models.spec import TrainingConfig


@contextmanager
def bars(console: Console) -> Iterator[Progress]:
    """Bars on `console`; under torchrun one process speaks for all."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not is_first()) as bar:
        yield bar


def is_first() -> bool:
    """Whether this process is the one of torchrun's that speaks and writes, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def steps(bar: Progress, what: str, total: int) -> Callable[[int, int], None]:
    """One bar of `total` steps, drawn at once."""
    task = bar.add_task(what, total=total)
    return lambda done, of: bar.update(task, completed=done, total=of)


def reading(bar: Progress, folders: list[Path]) -> Callable[[int, int], None]:
    """A bar of the files of `folders`, then one of the studies; called with both together. Tensors out of a cache need neither."""
    tasks: list[TaskID] = []
    files = 0

    def step(done: int, of: int) -> None:
        nonlocal files
        if not tasks:
            files = sum(one.is_file() for folder in folders for one in folder.rglob("*"))
            tasks.append(bar.add_task("reading files", total=files))
        bar.update(tasks[0], completed=min(done, files))
        if done > files:
            if len(tasks) == 1:
                tasks.append(bar.add_task("reading studies"))
            bar.update(tasks[1], completed=done - files, total=of - files)

    return step


def folds(bar: Progress, total: int) -> Callable[[int, int], None]:
    """A bar of folds with the time that is left, of which the first fold that is learned here tells."""
    task, began, kept = bar.add_task("judging folds", total=total), time.monotonic(), 0

    def step(done: int, of: int) -> None:
        nonlocal kept
        spent = time.monotonic() - began
        if spent < 1:  # kept from a run before: nothing was learned in that time
            kept = done
        minutes = spent / 60 / (done - kept) * (of - done) if done > kept else 0.0
        bar.update(
            task, completed=done, description=f"judging folds, about {max(1, round(minutes))} min left" if minutes else "judging folds"
        )

    return step


class Epochs:
    """A bar for each stage of a training, and how far it is: `epoch` is the last one done of the stage, 0 before the first."""

    def __init__(self, bar: Progress) -> None:
        self.epoch, self._of = 0, 0
        self._bar, self._task = bar, TaskID(-1)

    def __call__(self, epoch: int, of: int, _loss: float) -> None:
        """One epoch is done."""
        if epoch <= self.epoch or not self.epoch:
            self.close()
            self._task = self._bar.add_task("training", total=of)
            if epoch > 1:
                self._bar.console.print(f"Going on from epoch {epoch}, where the run was stopped.")
        self.epoch, self._of = epoch, of
        self._bar.update(self._task, completed=epoch)

    def close(self) -> None:
        """The stage is over: a bar that is not full would look like one that hangs."""
        if self.epoch < self._of:
            self._bar.update(self._task, total=self.epoch, description="training, stopped early")


def stages(history: Iterable[Mapping[str, Any]], training: TrainingConfig) -> dict[str, str]:
    """How long each stage learned, and whether it was stopped early."""
    said = {}
    for stage, each in groupby(history, key=lambda epoch: str(epoch["stage"])):
        epochs, of = list(each), (training.fusion_epochs if stage == "fusion" else 0) or training.epochs
        known = [epoch for epoch in epochs if math.isfinite(epoch["validation_loss"])]
        best = f"the best was {min(known, key=lambda epoch: epoch['validation_loss'])['epoch']}" if known else "the last was taken"
        said[f"epochs, {stage}"] = f"{len(epochs)} of {of}, {best}{', stopped early' if len(epochs) < of else ''}"
    return said
