"""The data scientist's verbs: train, evaluate, recalibrate, predict, compress. A bundle's folder and a cohort's folder in.

Each is the same three steps: the cohort through the daemon's own path (cohort.py), the work (models/), a table and files.
Imports are late on purpose: the command line of a receiver must not load torch.
"""

from __future__ import annotations

import csv
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from worker import config, guards, progress
from worker.config import Config
from worker.errors import BundleError, Reject

if TYPE_CHECKING:
    from models.bundle import Bundle
    from models.recalibration import Recalibrated
    from worker.cohort import Cohort

out, err = Console(), Console(stderr=True)

BundleFolder = Annotated[Path, typer.Option("--bundle", "-b", exists=True, file_okay=False, help="The bundle's folder.")]
CohortFolder = Annotated[
    Path, typer.Option("--cohort", "-c", exists=True, file_okay=False, help="dicom/, hl7/ or fhir/, and labels.csv (models/README.md).")
]
CacheFolder = Annotated[
    Path | None, typer.Option(help="Keep the cohort's tensors here and read them the next time. They are patient data.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads of the network.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1 - 10_000, help="Same seed, same result (on a CPU).")]
# No -c here: that is the cohort.
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        envvar="SYNOPTIC_CONFIG",
        help="The installation's TOML file, for time zone, issuers and decoders; else the one that the daemon would take. "
        "Its database is not touched.",
    ),
]

#: Fewer local studies with a label than this cannot carry a new calibration (FUSION.md, risks).
LEAST_RECALIBRATION: Final = 100


@contextmanager
def _refusing() -> Iterator[None]:
    """What models/ refuses of this cohort, or of a run that was stopped, is a sentence for the user."""
    try:
        yield
    except ValueError as exc:
        raise Reject(str(exc)) from exc


def _load(
    bar: Progress, folder: Path, bundle: Bundle, settings: Config, cache: Path | None, *, splits: tuple[str, ...], is_labeled: bool = True
) -> Cohort:
    from worker import cohort

    steps = progress.reading(bar, [folder / name for name in cohort.FOLDERS])
    found = cohort.load(folder, bundle=bundle, config=settings, cache=cache, is_labeled=is_labeled, progress=steps)
    if progress.is_first():
        for reason, count in sorted(found.unread.items(), key=lambda item: -item[1]):
            err.print(f"{count} files are not read: {escape(reason)}", soft_wrap=True)
        for reason, count in sorted(found.refused.items(), key=lambda item: -item[1]):
            err.print(f"{count} studies are not used: {escape(reason)}", soft_wrap=True)
    chosen = found.part(*splits)
    if not chosen.cases:
        raise Reject(f"No study of this cohort has split {' or '.join(repr(split) for split in splits)} in labels.csv.")
    return chosen


def _open(bundle: Path, given: Path | None, threads: int, *, device: str = "cpu", verify: bool = True) -> tuple[Bundle, Config]:
    """Whatever is mistyped is said here, before a cohort is read for minutes."""
    import torch

    from worker import infer
    from worker.ops import log

    log.silence()
    torch.set_num_threads(threads)
    infer.check_device(device)
    with guards.advising(bundle):
        spec = infer.read(bundle, verify=verify)
    if not spec.network.fusion.startswith("single:"):
        guards.check_fusions([spec.network.fusion])
    return spec, config.read(config.config_file(given))


def train(
    bundle: BundleFolder,
    cohort_folder: CohortFolder,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = 1,
    cache: CacheFolder = None,
    given: ConfigFile = None,
) -> None:
    """Train a bundle's network on a folder of studies, records and labels; its weights are replaced.

    Stopped half-way and started again with the same words, it goes on where it was. Several devices: torchrun --nproc-per-node 2 -m
    worker train …. Writes weights.safetensors, its sha256 and the temperatures into the bundle, and training.png beside them.
    Rows of labels.csv with split "test" are left out.
    """
    from models import saving, training
    from models.bundle import check_writable
    from models.plots import learning_curve

    spec, settings = _open(bundle, given, threads, device=device, verify=False)
    with _refusing():
        check_writable(bundle)
    mode = guards.mode_of(bundle)
    with progress.bars(err) as bar:
        studies = _load(bar, cohort_folder, spec, settings, cache, splits=("train", "")).labeled
        epochs = progress.Epochs(bar)
        try:
            with _refusing():
                result = training.fit(spec, studies, seed=seed, device=device, folder=bundle, progress=epochs)
        except KeyboardInterrupt:
            err.print(f"Stopped; the same command goes on {f'from epoch {epochs.epoch + 1}' if epochs.epoch else 'where this one began'}.")
            sys.exit(130)  # 128 + SIGINT
        epochs.close()
    if not progress.is_first():
        return
    with _refusing():
        settled = saving.save_fit(spec, result, studies)
    learning_curve(result.history, bundle / "training.png")
    guards.share(mode, bundle / "bundle.toml", settled.weights_path, bundle / "training.png")
    table = Table(show_header=False)
    facts: dict[str, object] = {
        "studies": f"{len(studies)} of {len({s.group for s in studies})} patients",
        "learned from": result.train_studies,
        "held out": result.validation_studies,
        **progress.stages(result.history, spec.training),
        "loss on the held out": f"{result.validation_loss:.4f}",
        "temperatures": ", ".join(f"{f.name} {f.temperature:.2f}" for f in settled.findings),
        "weights": f"{settled.weights_path.stat().st_size / 1e6:.1f} MB, sha256 {settled.weights.sha256[:16]}…",
        "learning curve": str(bundle / "training.png"),
    }
    for name, value in facts.items():
        table.add_row(name, str(value))
    out.print(table)
    out.print("How good it is says `synoptic evaluate`, on patients it did not learn from.")
    if (bundle / "README.md").exists() and settled.weights.sha256 != spec.weights.sha256:
        out.print(f"The card, {bundle / 'README.md'}, is of other weights: write it anew with synoptic evaluate --card.", soft_wrap=True)


def evaluate(
    bundle: BundleFolder,
    cohort_folder: CohortFolder,
    to: Annotated[Path, typer.Option("--out", "-o", help="A folder for evaluation.json and evaluation.html.")],
    folds: Annotated[int, typer.Option(min=2, help="Folds, by patient.")] = 5,
    repeats: Annotated[int, typer.Option(min=1, help="How often the patients are dealt anew.")] = 5,
    fusions: Annotated[
        str,
        typer.Option(
            help="Which fusions to compare, with commas; empty: all. Always there: the bundle's own, single modalities, baselines, floors."
        ),
    ] = "",
    card: Annotated[bool, typer.Option("--card", help="Write the model card into the bundle's README.md.")] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    processes: Annotated[int, typer.Option(min=1, help="Folds at the same time.")] = 1,
    cache: CacheFolder = None,
    given: ConfigFile = None,
) -> None:
    """Judge a bundle's recipe: every fusion, single modality, baseline and shortcut floor, on the same folds by patient.

    Each network is trained anew in each fold, so this takes as long as folds x repeats trainings. The bundle is not changed. Stopped and
    started again, it goes on with the folds that are done.
    """
    from models import evaluation, page

    chosen = tuple(name.strip() for name in fusions.split(",") if name.strip())
    guards.check_fusions(chosen)
    spec, settings = _open(bundle, given, 1, device=device, verify=False)
    with progress.bars(err) as bar, _refusing():
        found = _load(bar, cohort_folder, spec, settings, cache, splits=("train", "test", ""))
        results = evaluation.evaluate(
            spec,
            found.labeled,
            [case.facts for case in found.cases],
            folds=folds,
            repeats=repeats,
            seed=seed,
            fusions=chosen,
            device=device,
            folder=to,
            processes=processes,
            progress=progress.folds(bar, folds * repeats),
        )
    to.mkdir(parents=True, exist_ok=True)
    (to / "evaluation.json").write_text(json.dumps(results, indent=1), "utf-8")
    written = page.write_page(results, to)
    if card:
        told = ("intended_use", "quality_statement", "learned_from", "limits", "citation", "license", "authors")
        text = {key: list(said) if isinstance(said := getattr(spec, key), tuple) else said for key in told if getattr(spec, key)}
        (bundle / "README.md").write_text(page.write_card(results, bundle_text=text), "utf-8")
        guards.share(guards.mode_of(bundle), bundle / "README.md")
    for line in evaluation.summary(results):
        out.print(line, soft_wrap=True)
    out.print(f"{to / 'evaluation.json'}, {', '.join(str(path) for path in written)}", soft_wrap=True)


def recalibrate(
    bundle: BundleFolder,
    cohort_folder: CohortFolder,
    alpha: Annotated[
        float, typer.Option(min=0.01, max=0.4, help="Share of truly positive patients that may be called negative, and the reverse.")
    ] = 0.1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print, and leave the bundle as it is.")] = False,
    device: Device = "cpu",
    threads: Threads = 1,
    cache: CacheFolder = None,
    given: ConfigFile = None,
) -> None:
    """Fit temperature and verdicts to a site's own cohort, on which the network was not trained; the weights stay.

    Writes temperature, threshold, negative_below and alpha of each finding: below negative_below a study is called negative, from
    threshold positive, uncertain between, and of the truly positive patients at most the share alpha is called negative (class-conditional
    conformal prediction). Refused where there are too few patients to promise that.
    """
    from models import recalibration, training
    from worker import infer

    spec, settings = _open(bundle, given, threads, device=device)
    mode = guards.mode_of(bundle)
    with guards.advising(bundle):
        network, _ = infer.load_network(spec)
    with progress.bars(err) as bar:
        found = _load(bar, cohort_folder, spec, settings, cache, splits=("calibration", ""))
    if not found.has_splits:
        err.print("labels.csv has no split: these must not be patients that the network learned from.", soft_wrap=True)
    labeled = [study for study in found.labeled if bool(study.labels.isfinite().any())]
    if len(labeled) < LEAST_RECALIBRATION:
        raise Reject(f"{len(labeled)} studies with a label are too few to recalibrate on: {LEAST_RECALIBRATION} are needed.")
    with _refusing():
        logits, labels = training.predict(network.to(device), labeled, device=device)
        new = recalibration.recalibrate(spec, logits, labels, [study.group for study in labeled], alpha=alpha)
    table = Table("finding", "patients +/-", "temperature", "negative below", "positive from", "uncertain", "")
    for one in new:
        table.add_row(
            one.finding,
            f"{one.positives}/{one.negatives}",
            f"{one.temperature:.2f}",
            f"{one.negative_below:.3f}",
            f"{one.threshold:.3f}",
            f"{one.uncertain:.0%}",
            "refused" if one.refused else "look below" if _doubts(one) else "ok",
        )
    out.print(table)
    for one in new:
        for doubt in _doubts(one):
            out.print(f"{one.finding}: {doubt}", soft_wrap=True, markup=False)
    if dry_run:
        return
    with _refusing():
        settled = recalibration.settle(spec, new)
    guards.share(mode, bundle / "bundle.toml")
    out.print(f"{bundle / 'bundle.toml'} is written; the bundle's digest is {settled.digest[:16]}…")
    if any(one.refused for one in new):
        sys.exit(1)


def _doubts(one: Recalibrated) -> list[str]:
    """Why a finding's new numbers are none, or not to be relied on."""
    if one.refused:
        return [one.refused]
    said = []
    if not 0.501 < one.temperature < 7.99:  # calibration.fit_temperature searches from 0.5 to 8
        said.append(
            f"the temperature {one.temperature:.2f} lies at the bound of its search: the network's certainty does not fit these patients."
        )
    if one.uncertain > 0.5:
        said.append(f"{one.uncertain:.0%} of these studies are called uncertain: the network leaves more than half to a person.")
    return said


def predict(
    bundle: BundleFolder,
    cohort_folder: Annotated[
        Path, typer.Option("--cohort", "-c", exists=True, file_okay=False, help="dicom/, hl7/ or fhir/; no labels needed.")
    ],
    to: Annotated[Path, typer.Option("--out", "-o", help="The CSV to write.")],
    device: Device = "cpu",
    threads: Threads = 1,
    batch: Annotated[int, typer.Option(min=1, help="Studies in one forward.")] = 16,
    cache: CacheFolder = None,
    given: ConfigFile = None,
) -> None:
    """Answer for every study of a folder: study_instance_uid, finding, probability, verdict, modalities used."""
    from worker import infer

    spec, settings = _open(bundle, given, threads, device=device)
    with guards.advising(bundle):
        model = infer.Model(bundle, device=device, threads=threads)
    answered, silent = 0, 0
    with guards.whole(to) as file, progress.bars(err) as bar:
        writer = csv.writer(file)
        writer.writerow(("study_instance_uid", "finding", "probability", "verdict", "modalities_used"))
        found = _load(bar, cohort_folder, spec, settings, cache, splits=("train", "test", "calibration", ""), is_labeled=False)
        step = progress.steps(bar, "predicting", len(found.cases))
        for start in range(0, len(found.cases), batch):
            chosen = found.cases[start : start + batch]
            for case, answer in zip(chosen, model.predict([infer.Prepared(c.labeled.sample) for c in chosen]), strict=True):
                if isinstance(answer, BundleError):  # of this study alone
                    silent += 1
                    continue
                answered += len(answer)
                used = "+".join(case.used)
                writer.writerows((case.study_instance_uid, f.name, f"{f.probability:.6f}", f.verdict, used) for f in answer)
            step(start + len(chosen), len(found.cases))
    out.print(f"{len(found.cases)} studies, {answered} answers: {to}", soft_wrap=True)
    if silent:
        err.print(f"{silent} studies have no answer: the network's output is not finite there.", soft_wrap=True)


def compress(
    bundle: BundleFolder,
    cohort_folder: CohortFolder,
    to: Annotated[Path, typer.Option("--out", "-o", help="A folder for the exported networks and compression.json.")],
    seed: Seed = 0,
    threads: Threads = 1,
    cache: CacheFolder = None,
    given: ConfigFile = None,
) -> None:
    """Measure smaller forms of a bundle, and write its network for other programs.

    Measured for size, speed and changed answers: the network in float32, bfloat16 and int8, and a student that sees the first image
    alone, taught here by the network on 70 % of the patients. Written: the network in float32 as network.pt2 (torch.export) and
    network.onnx, whose outputs are raw log-odds, before the temperatures of bundle.toml; the student as student.safetensors.
    """
    from safetensors.torch import save_file

    from models import compression, training
    from worker import infer

    # Operators of torchvision that it would export, were it installed: no network here has one.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    spec, settings = _open(bundle, given, threads)
    with guards.advising(bundle):
        network, _ = infer.load_network(spec)
    with progress.bars(err) as bar, _refusing():
        studies = _load(bar, cohort_folder, spec, settings, cache, splits=("train", "test", "")).labeled
        # The student is judged on patients it did not learn from; the bundle's own network may have.
        learned, asked = training.split_groups(studies, share=0.3, seed=seed)
        bar.add_task("teaching an image-only student", total=1)
        student = compression.distil(network, spec, learned, seed=seed)
        rows = compression.compress(network, spec, asked, student=student)
    to.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in student.state_dict().items()}, to / "student.safetensors")
    name = "network.pt2, network.onnx"
    try:
        program = compression.exported(network, asked[0].sample)
        compression.export_program(program, to / "network.pt2")
        name = "network.onnx"
        compression.export_onnx(program, asked[0].sample, to / name)
    except (ImportError, ValueError) as exc:
        err.print(f"{name} is not written: {escape(str(exc))}", soft_wrap=True)
    table = Table("form", "MB", "ms a study", "largest change", "mean change", "equal verdicts")
    for row in rows:
        table.add_row(
            str(row["name"]),
            f"{float(str(row['size_bytes'])) / 1e6:.2f}",
            f"{row['median_ms']:.2f}",
            f"{row['max_change']:.4f}",
            f"{row['mean_change']:.4f}",
            f"{row['same_verdicts']:.1%}",
        )
    out.print(table)
    out.print(f"On {len(asked)} studies; changes are of probabilities, against float32. {to}", soft_wrap=True)
    (to / "compression.json").write_text(json.dumps(rows, indent=1), "utf-8")


def register(app: typer.Typer) -> None:
    """Add these verbs to the command line."""
    for verb in (train, evaluate, recalibrate, predict, compress):
        app.command(rich_help_panel="For the data scientist")(verb)
