"""The words and files of the data scientist's verbs, without a training."""

from __future__ import annotations

import io
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from models import training
from models.bundle import Bundle, InvalidBundleError
from models.network import FusionNetwork
from models.recalibration import Recalibrated
from tests.unit import small_bundle
from worker import cohort, guards, infer, lab, progress
from worker.cli import app
from worker.errors import BundleError, Reject, WorkerError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle without weights, and an empty cohort beside it."""
    (tmp_path / "cohort").mkdir()
    return small_bundle.write(tmp_path / "bundle", small_bundle.TOML)


def refused(verb: str, folder: Path, *words: str) -> str:
    """What a verb says that fails before it reads the cohort, which is empty here."""
    found = CliRunner().invoke(app, [verb, "--bundle", str(folder), "--cohort", str(folder.parent / "cohort"), *words]).exception
    assert isinstance(found, WorkerError), found
    return str(found)


@pytest.mark.parametrize("device", ["foo", "", "mps", "meta", "cuda:7"])
def test_a_device_that_is_not_here_is_one_sentence_before_anything_is_read(folder: Path, device: str) -> None:
    assert refused("train", folder, "--device", device).startswith(f"The device {device!r} cannot be used here: there is cpu")
    infer.check_device("cpu")


def test_a_mistyped_fusion_is_said_before_anything_is_read(folder: Path) -> None:
    assert "'tokenz' is no fusion; known are tokens" in refused("evaluate", folder, "--out", str(folder), "--fusions", "tokens,tokenz")
    guards.check_fusions(["tokens", "late_mean"])
    text = small_bundle.TOML.replace("[network]", '[network]\nfusion = "tokenz"')
    small_bundle.write(folder, text)
    assert "'tokenz'" in refused("train", folder)


def test_missing_weights_come_with_the_next_step(folder: Path) -> None:
    (folder / "weights.safetensors").unlink(missing_ok=True)
    said = refused("predict", folder, "--out", str(folder / "p.csv"))
    assert f"train it: synoptic train --bundle {folder}" in said


def test_weights_of_another_network_are_one_sentence_without_sizes(folder: Path) -> None:
    bundle = Bundle.read(folder, verify=False)
    other = FusionNetwork(bundle, fusion="late_mean").state_dict()

    def load() -> None:
        with guards.advising(folder):
            try:
                FusionNetwork(bundle).load_state_dict(other)
            except RuntimeError as exc:
                raise BundleError(f"The weights of bundle small do not fit its network: {exc}") from exc

    with pytest.raises(BundleError) as found:
        load()
    assert str(found.value).startswith(
        "The weights of bundle bundle do not fit its network: bundle.toml was changed after training; train it"
    )
    assert "Error(s)" not in str(found.value)
    with pytest.raises(BundleError, match=r"^Other\.$"), guards.advising(folder):
        raise BundleError("Other.") from InvalidBundleError("Other.")


def test_a_file_is_whole_or_not_there_and_a_folder_that_is_not_is_said_at_once(tmp_path: Path) -> None:
    def half() -> None:
        with guards.whole(tmp_path / "p.csv") as file:
            file.write("half")
            raise Reject("Stopped.")

    with pytest.raises(Reject):
        half()
    assert list(tmp_path.iterdir()) == []
    with guards.whole(tmp_path / "p.csv") as file:
        file.write("all")
    assert [(one.name, one.read_text("utf-8")) for one in tmp_path.iterdir()] == [("p.csv", "all")]
    with pytest.raises(FileNotFoundError), guards.whole(tmp_path / "none" / "p.csv"):
        pytest.fail("nothing may begin")


def test_what_is_written_into_a_bundle_keeps_the_mode_of_bundle_toml(folder: Path) -> None:
    (folder / "bundle.toml").chmod(0o644)
    mode = guards.mode_of(folder)
    before = os.umask(0o077)
    try:
        (folder / "training.png").touch()
    finally:
        os.umask(before)
    guards.share(mode, folder / "training.png")
    assert (folder / "training.png").stat().st_mode & 0o777 == 0o644


def test_a_recalibration_at_the_bound_or_mostly_uncertain_is_doubted() -> None:
    def doubts(temperature: float, uncertain: float, refused: str = "") -> str:
        return " ".join(lab._doubts(Recalibrated("ill", temperature, 0.6, 0.4, 0.1, 60, 60, uncertain, refused)))

    assert doubts(1.3, 0.4) == ""
    assert "8.00 lies at the bound" in doubts(8.0, 0.4)
    assert "0.50 lies at the bound" in doubts(0.5, 0.4)
    assert "88% of these studies are called uncertain" in doubts(1.3, 0.88)
    assert doubts(1.3, 0.88, "12 patients; 19 are needed.") == "12 patients; 19 are needed."


def test_each_stage_says_how_long_it_learned_and_that_it_was_stopped_early() -> None:
    config = SimpleNamespace(epochs=40, fusion_epochs=2)
    losses = {"image:film": [0.6, 0.4, 0.5], "fusion": [math.nan, math.nan]}
    history = [{"stage": s, "epoch": n, "validation_loss": loss} for s, each in losses.items() for n, loss in enumerate(each, 1)]
    assert progress.stages(history, config) == {  # type: ignore[arg-type]  # two numbers of it
        "epochs, image:film": "3 of 40, the best was 2, stopped early",
        "epochs, fusion": "2 of 2, the last was taken",
    }


def test_a_stage_has_a_bar_that_ends_and_a_resumed_run_says_from_where() -> None:
    console = Console(file=io.StringIO(), width=120)
    with progress.bars(console) as bar:
        epochs = progress.Epochs(bar)
        for epoch, of in ((3, 40), (4, 40), (1, 2), (2, 2)):
            epochs(epoch, of, 0.5)
        epochs.close()
        assert [(task.description, task.completed, task.total) for task in bar.tasks] == [
            ("training, stopped early", 4, 4),
            ("training", 2, 2),
        ]
    assert console.file.getvalue().count("Going on from epoch 3") == 1  # type: ignore[attr-defined]


def test_files_and_studies_are_counted_apart_and_a_cache_needs_no_bar(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).touch()
    with progress.bars(Console(file=io.StringIO())) as bar:
        step = progress.reading(bar, [tmp_path, tmp_path / "none"])
        assert bar.tasks == []
        for done in range(1, 6):
            step(done, 5)
        assert [(task.description, task.completed, task.total) for task in bar.tasks] == [
            ("reading files", 3, 3),
            ("reading studies", 2, 2),
        ]


def test_folds_tell_the_time_left_by_those_that_were_learned_now(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 0.1, 120.1])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(now)))
    with progress.bars(Console(file=io.StringIO())) as bar:
        step = progress.folds(bar, 5)
        assert (bar.tasks[0].completed, bar.tasks[0].total) == (0, 5)
        step(1, 5)
        assert bar.tasks[0].description == "judging folds"
        step(2, 5)
        assert bar.tasks[0].description == "judging folds, about 6 min left"


def _cases(bundle: Bundle, n: int) -> cohort.Cohort:
    studies = small_bundle.studies(bundle, n)
    return cohort.Cohort(tuple(cohort.Case(f"1.2.{i}", one, "", {}, ("image",)) for i, one in enumerate(studies)), {})


def test_one_study_without_an_answer_takes_none_from_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.read(folder, verify=False)
    code = bundle.findings[0].code

    class Model:
        def __init__(self, *_: object, **__: object) -> None: ...

        def predict(self, batch: list[infer.Prepared]) -> list[object]:
            good = (SimpleNamespace(name="ill", probability=0.5, verdict="uncertain", code=code),)
            return [BundleError("Not finite."), *[good] * (len(batch) - 1)]

    monkeypatch.setattr(lab, "_open", lambda *_, **__: (bundle, None))
    monkeypatch.setattr(lab, "_load", lambda *_, **__: _cases(bundle, 3))
    monkeypatch.setattr(infer, "Model", Model)
    to = folder / "p.csv"
    done = CliRunner().invoke(app, ["predict", "--bundle", str(folder), "--cohort", str(folder.parent / "cohort"), "--out", str(to)])
    assert done.exit_code == 0, done.exception
    assert [line.split(",")[0] for line in to.read_text("utf-8").splitlines()[1:]] == ["1.2.1", "1.2.2"]
    assert "1 studies have no answer" in done.output


def test_a_training_that_is_stopped_says_from_where_it_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.read(folder, verify=False)

    def stopped(*_: object, progress: progress.Epochs, **__: object) -> None:
        progress(1, 40, 0.5)
        progress(2, 40, 0.5)
        raise KeyboardInterrupt

    monkeypatch.setattr(lab, "_open", lambda *_, **__: (bundle, None))
    monkeypatch.setattr(lab, "_load", lambda *_, **__: _cases(bundle, 3))
    monkeypatch.setattr(training, "fit", stopped)
    done = CliRunner().invoke(app, ["train", "--bundle", str(folder), "--cohort", str(folder.parent / "cohort")])
    assert done.exit_code == 130
    assert "Stopped; the same command goes on from epoch 3." in " ".join(done.output.split())
