"""The data scientist's path, on phantoms: a folder of studies in; weights, figures, verdicts and predictions out."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from models import compression
from models.bundle import Bundle
from models.network import FusionNetwork
from tests.oasis import write as write_oasis
from worker.cli import app
from worker.config import ConfigError
from worker.demo.phantom import write_cohort
from worker.errors import WorkerError

ROOT = Path(__file__).parents[2]
CASES = 24


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cohort of phantoms, and a study that a row names and the folder has not."""
    folder = tmp_path_factory.mktemp("cohort")
    write_cohort(folder, CASES, 7000)
    with (folder / "labels.csv").open("a", encoding="utf-8", newline="") as file:
        csv.writer(file).writerow(("1.2.3.4", "nobody", "nobody", 1, 0))
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, cohort: Path, cache: Path) -> Path:
    """The phantom bundle's recipe, two epochs of it, trained by the command."""
    folder = tmp_path_factory.mktemp("bundles") / "quick"
    shutil.copytree(ROOT / "models" / "bundles" / "phantom", folder, ignore=shutil.ignore_patterns("checkpoint.pt"))
    text = (folder / "bundle.toml").read_text("utf-8")
    text = text.replace("epochs = 24", 'epochs = 2\nstages = "frozen"').replace("size = [32, 24, 22]", "size = [18, 16, 16]")
    text = text.replace("spacing_mm = [9.0, 9.0, 9.0]", "spacing_mm = [16, 14, 13]").replace("words = 96", "words = 24")
    (folder / "bundle.toml").write_text(text, "utf-8")
    (folder / "bundle.toml").chmod(0o640)
    done = run("train", "--bundle", folder, "--cohort", cohort, "--cache", cache)
    assert done.exit_code == 0, done.output
    assert "is of other weights" in done.output, "the card that was copied"
    assert "0/?" not in done.output
    return folder


def run(*words: object) -> Result:
    """One command, as a person would give it."""
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False, env={"COLUMNS": "200"})


def test_training_says_what_it_used_and_leaves_a_bundle_that_the_daemon_takes(bundle: Path, cohort: Path, cache: Path) -> None:
    settled = Bundle.read(bundle)
    assert (bundle / "training.png").read_bytes().startswith(b"\x89PNG")
    assert not (bundle / "checkpoint.pt").exists()
    assert {(bundle / name).stat().st_mode & 0o777 for name in ("bundle.toml", "weights.safetensors", "training.png")} == {0o640}
    assert len(list(cache.iterdir())) == 1
    again = run("train", "--bundle", bundle, "--cohort", cohort, "--cache", cache)
    assert re.search(r"1 studies are not used: The study of this row is not in the folder\.", again.output)
    assert f"{CASES} of {CASES} patients" in again.output
    assert re.search(r"epochs, image:image .* 2 of 2, the best was", again.output)
    assert "is of other weights" not in again.output
    assert Bundle.read(bundle).weights.sha256 == settled.weights.sha256, "the same cohort and seed give the same weights"


def test_every_study_is_predicted_with_verdict_and_modalities_and_without_labels(bundle: Path, cohort: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    for name in ("dicom", "hl7"):
        shutil.copytree(cohort / name, bare / name)
    shutil.rmtree(next((bare / "hl7").iterdir()).parent)  # no record at all: the image alone answers
    done = run("predict", "--bundle", bundle, "--cohort", bare, "--out", tmp_path / "predictions.csv")
    assert done.exit_code == 0, done.output
    with (tmp_path / "predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * CASES
    assert {row["finding"] for row in rows} == {"suspicious_nodule", "large_nodule"}
    assert {row["modalities_used"] for row in rows} == {"image"}
    assert all(0 < float(row["probability"]) < 1 and row["verdict"] in {"positive", "negative", "uncertain"} for row in rows)


@pytest.mark.timeout(900)  # three folds of ten networks and 23 baselines
def test_an_evaluation_has_every_row_an_interval_a_page_and_goes_on_where_it_stopped(
    bundle: Path, cohort: Path, cache: Path, tmp_path: Path
) -> None:
    bundle = shutil.copytree(bundle, tmp_path / "one")
    text = (bundle / "bundle.toml").read_text("utf-8")  # of one finding: each of the baselines is learned for each
    (bundle / "bundle.toml").write_text(re.sub(r'\[\[findings\]\]\nname = "large_nodule".*?(?=\n\[)', "", text, flags=re.DOTALL), "utf-8")
    assert [finding.name for finding in Bundle.read(bundle).findings] == ["suspicious_nodule"]
    to = tmp_path / "judged"
    size = ("--folds", 2, "--repeats", 1, "--processes", 2)
    words = ("evaluate", "--bundle", bundle, "--cohort", cohort, "--cache", cache, "--out", to, *size)
    before = Bundle.read(bundle).digest
    done = run(*words, "--fusions", "tokens,late_mean", "--card")
    assert done.exit_code == 0, done.output
    results = json.loads((to / "evaluation.json").read_text("utf-8"))
    names = {row["name"] for row in results["rows"]}
    assert {"tokens", "late_mean", "image alone", "values alone", "text alone", "late stack of single networks"} <= names
    assert {"values: random forest", "image features: SVM", "both: logistic regression"} <= names
    assert {row["name"] for row in results["missing"]} >= {"without image", "without text", "60% of the values dropped"}
    for row in results["rows"]:
        if row["metrics"]["auroc"] is not None:
            value, low, high = row["metrics"]["auroc"]
            assert low is None or low <= value <= high
    assert "<svg" in (to / "evaluation.html").read_text("utf-8")
    assert "Intended use" in (bundle / "README.md").read_text("utf-8")
    assert Bundle.read(bundle).digest == before, "judging changes nothing"
    folds = {path: path.stat().st_mtime_ns for path in to.rglob("*.npz")}
    assert len(folds) == 2
    next(iter(folds)).unlink()
    again = run(*words, "--fusions", "tokens,late_mean")
    assert again.exit_code == 0
    repeated = json.loads((to / "evaluation.json").read_text("utf-8"))
    assert repeated["rows"] == results["rows"], "a fold done again says the same"
    assert sum(path.stat().st_mtime_ns == folds[path] for path in to.rglob("*.npz")) == 1


def test_too_few_studies_are_no_ground_for_new_verdicts(bundle: Path, cohort: Path, cache: Path) -> None:
    done = refused("recalibrate", "--bundle", bundle, "--cohort", cohort, "--cache", cache)
    assert "24 studies with a label are too few to recalibrate on: 100 are needed." in done


def test_studies_without_a_label_do_not_count_and_a_site_without_splits_is_warned(
    bundle: Path, cohort: Path, cache: Path, tmp_path: Path
) -> None:
    lines = (cohort / "labels.csv").read_text("utf-8").splitlines()
    unknown = [",".join((*line.split(",")[:3], "", "")) for line in lines[6:]]
    folder = relabeled(cohort, tmp_path / "bare", lines[:6] + unknown)
    done = CliRunner().invoke(app, ["recalibrate", "--bundle", str(bundle), "--cohort", str(folder), "--cache", str(cache)])
    assert "5 studies with a label are too few" in str(done.exception)
    assert "must not be patients that the network learned from" in done.output
    split = [f"{line},{'split' if number == 0 else 'calibration'}" for number, line in enumerate(lines)]
    folder = relabeled(cohort, tmp_path / "split", split)
    done = CliRunner().invoke(app, ["recalibrate", "--bundle", str(bundle), "--cohort", str(folder), "--cache", str(cache)])
    assert "24 studies with a label are too few" in str(done.exception)
    assert "must not be" not in done.output


def relabeled(cohort: Path, folder: Path, lines: list[str]) -> Path:
    """The same studies, under other labels."""
    folder.mkdir()
    for name in ("dicom", "hl7"):
        (folder / name).symlink_to(cohort / name)
    (folder / "labels.csv").write_text("\n".join(lines) + "\n", "utf-8")
    return folder


def test_what_the_models_refuse_is_a_sentence(bundle: Path, cohort: Path, cache: Path, tmp_path: Path) -> None:
    words = ("evaluate", "--bundle", bundle, "--cohort", cohort, "--cache", cache, "--out", tmp_path)
    assert "'alchemy' is no fusion" in refused(*words, "--fusions", "alchemy")
    copied = shutil.copytree(bundle, tmp_path / "copied")
    lines = [line.split(",") for line in (cohort / "labels.csv").read_text("utf-8").splitlines()]
    one = relabeled(cohort, tmp_path / "one", [",".join((*line[:2], "g" if n else line[2], *line[3:])) for n, line in enumerate(lines)])
    assert "at least 2 are needed" in refused("train", "--bundle", copied, "--cohort", one, "--cache", cache)


def test_the_installed_configuration_counts_as_with_every_other_verb(
    bundle: Path, cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["predict", "--bundle", str(bundle), "--cohort", str(cohort), "--out", str(tmp_path / "p.csv")]
    (tmp_path / "synoptic.toml").write_text('[site]\ntimezone = "Nowhere/Here"\n')
    (tmp_path / "other.toml").write_text('[site]\ntimezone = "Nowhere/Else"\n')
    monkeypatch.chdir(tmp_path)
    assert "Nowhere/Here" in str(CliRunner().invoke(app, words).exception)
    assert "Nowhere/Else" in str(CliRunner().invoke(app, words, env={"SYNOPTIC_CONFIG": str(tmp_path / "other.toml")}).exception)
    assert "Nowhere/Else" in str(CliRunner().invoke(app, [*words, "--config", "other.toml"]).exception)


@pytest.mark.timeout(600)
def test_a_smaller_form_is_compared_with_the_whole(bundle: Path, cohort: Path, cache: Path, tmp_path: Path) -> None:
    done = run("compress", "--bundle", bundle, "--cohort", cohort, "--cache", cache, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    rows = {row["name"]: row for row in json.loads((tmp_path / "compression.json").read_text("utf-8"))}
    assert set(rows) == {"float32", "bfloat16", "int8", "image alone", "image alone, int8"}
    assert "torchvision" not in done.output
    assert rows["float32"]["max_change"] == 0
    assert rows["int8"]["size_bytes"] < 0.5 * rows["float32"]["size_bytes"]
    assert (tmp_path / "network.onnx").stat().st_size > 10_000
    student = FusionNetwork(compression.image_only(Bundle.read(bundle)))
    student.load_state_dict(load_file(tmp_path / "student.safetensors"))


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ("study,large_nodule\n1.2,1\n", "has no column study_instance_uid"),
        ("study_instance_uid,large_nodule\n1.2,1\n", "has no column 'suspicious_nodule'"),
        (
            "study_instance_uid,large_nodule,suspicious_nodule\n1.2,1,maybe\n",
            "line 2: suspicious_nodule is .*; a label is 1, 0 or empty",
        ),
        ("study_instance_uid,large_nodule,suspicious_nodule\n1.2,1,1\n", "No study of .* can be analysed"),
        (None, "A cohort needs"),
    ],
)
def test_labels_that_cannot_be_read_are_refused_with_file_and_line(bundle: Path, tmp_path: Path, labels: str | None, says: str) -> None:
    if labels is not None:
        (tmp_path / "labels.csv").write_text(labels, "utf-8")
    assert re.search(says, refused("train", "--bundle", bundle, "--cohort", tmp_path))


def refused(*words: object) -> str:
    """A command that fails: the sentence of its error, which the program prints."""
    found = CliRunner().invoke(app, [str(word) for word in words]).exception
    assert isinstance(found, WorkerError | ConfigError)
    return str(found)


def test_a_second_task_is_a_folder_only(shared: Path, tmp_path: Path) -> None:
    """Three MR slices by orientation, demographics and volumes: predicted by a bundle that no line of code knows of."""
    assert write_oasis(shared / "data" / "oasis1", tmp_path / "cohort", limit=4) == 4
    bundle = ROOT / "models" / "bundles" / "brain-dementia"
    done = run("predict", "--bundle", bundle, "--cohort", tmp_path / "cohort", "--out", tmp_path / "p.csv")
    assert done.exit_code == 0, done.output
    with (tmp_path / "p.csv").open(encoding="utf-8", newline="") as file:
        assert {row["modalities_used"] for row in csv.DictReader(file)} == {"axial+coronal+sagittal+values"}
