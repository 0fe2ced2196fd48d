"""A folder of studies, records and labels, through the very gather and load of the daemon.

::

    dicom/**             any nesting, any file names
    hl7/*.hl7  fhir/*.json
    labels.csv           study_instance_uid, one column a label (1, 0, empty = unknown),
                         optional group (else patient_id, else the study's patient), optional split

There is no second way to make a tensor: files go through the spool and the parsers into a database of their own in a
scratch folder, studies come out as `select_inputs`, `volume.load` and `infer.prepare` make them.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

import pydicom
import torch
from safetensors.torch import load_file, save_file

from models.bundle import Bundle
from models.training import Labeled
from worker import pipeline
from worker.config import Config, ConfigError
from worker.decoding import DecoderPool
from worker.domain import Inputs, Study
from worker.errors import Unanalysable
from worker.importing import files, import_files
from worker.infer import prepare
from worker.inputs import select_inputs
from worker.store import studies
from worker.store.database import Store
from worker.store.spool import Spool

#: Columns of labels.csv that are no labels.
NOT_LABELS: Final = frozenset({"study_instance_uid", "patient_id", "study_datetime", "group", "split"})
#: What a film tells of how it was made: for shortcut floors and subgroups, never an input.
_ACQUISITION: Final = (
    "ViewPosition",
    "Manufacturer",
    "ManufacturerModelName",
    "Rows",
    "Columns",
    "BitsStored",
    "PhotometricInterpretation",
    "KVP",
)


@dataclass(frozen=True, slots=True)
class Case:
    """One study of a cohort: its tensors, what is known to be true of it, and how it was made.

    `facts`: sex, age (years), view, scanner and the acquisition's attributes as text or number; `used`: the modalities present.
    """

    study_instance_uid: str
    labeled: Labeled
    split: str
    facts: Mapping[str, str | float]
    used: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Cohort:
    """All studies of a folder that can be analysed, and how many cannot, by reason."""

    cases: tuple[Case, ...]
    refused: Mapping[str, int]

    @property
    def labeled(self) -> list[Labeled]:
        """What a network learns from."""
        return [case.labeled for case in self.cases]

    def part(self, *splits: str) -> Cohort:
        """Only the studies of these splits; all, if the folder has no column split."""
        has_splits = any(case.split for case in self.cases)
        return self if not has_splits else replace(self, cases=tuple(case for case in self.cases if case.split in splits))


def read_labels(folder: Path, *, needed: Sequence[str] = ()) -> dict[str, dict[str, str]]:
    """labels.csv by Study Instance UID.

    Raises
    ------
    ConfigError
        The file is absent, has no column study_instance_uid or none of a `needed` label, or a label is neither 0, 1 nor empty.
    """
    path = folder / "labels.csv"
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError as exc:
        raise ConfigError(f"A cohort needs {path}: study_instance_uid and one column a label.") from exc
    if not rows or "study_instance_uid" not in rows[0]:
        raise ConfigError(f"{path} has no column study_instance_uid, or no rows.")
    for name in needed:
        if name not in rows[0]:
            raise ConfigError(f"{path} has no column {name!r}, which the bundle's finding of that name is learned from.")
        for number, row in enumerate(rows, start=2):
            if row[name] and _label(row[name]) is None:
                raise ConfigError(f"{path}, line {number}: {name} is {row[name]!r}; a label is 1, 0 or empty.")
    return {row["study_instance_uid"]: row for row in rows}


def load(
    folder: Path,
    *,
    bundle: Bundle,
    config: Config,
    cache: Path | None = None,
    is_labeled: bool = True,
    progress: Callable[[int, int], None] = lambda _done, _of: None,
) -> Cohort:
    """Read a cohort's studies as the daemon would; with `cache`, keep the tensors there and read them the next time.

    Without labels.csv (`is_labeled` off) every study of the folder is taken, and nothing is known to be true of it.

    Raises
    ------
    ConfigError
        There is no readable labels.csv, or no study.
    """
    labels = read_labels(folder, needed=[f.name for f in bundle.findings]) if is_labeled else {}
    kept = cache / f"{_key(folder, bundle)}.safetensors" if cache else None
    if kept is not None and kept.exists():
        return _restore(kept, bundle, labels)
    cases: list[Case] = []
    refused: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="synoptic-cohort-") as scratch, DecoderPool(processes=config.run.decoders) as pool:
        root = Path(scratch)
        # Nothing here outlives the run: no low-water mark, and the studies are complete as they lie there.
        config = replace(config, site=replace(config.site, data=root, database=""))
        store = Store(f"sqlite:///{root / 'cohort.db'}")
        store.migrate()
        spool = Spool(root / "spool", low_water_bytes=0)
        todo = list(files([folder / name for name in ("dicom", "hl7", "fhir") if (folder / name).is_dir()]))
        done = 0

        def imported() -> None:
            nonlocal done
            done += 1
            progress(done, len(todo) + len(labels))

        import_files(todo, config=config, store=store, spool=spool, progress=imported)
        with store.read() as conn:
            wanted = list(labels) or studies.uids(conn)
        for uid in wanted:
            try:
                cases.append(_case(uid, labels.get(uid, {}), store=store, root=root / "spool" / "instances", pool=pool, bundle=bundle))
            except Unanalysable as exc:
                refused[str(exc)] = refused.get(str(exc), 0) + 1
            imported()
        store.close()
    if not cases:
        raise ConfigError(f"No study of {folder} can be analysed: {'; '.join(sorted(refused)) or 'there is none'}.")
    cohort = Cohort(tuple(cases), refused)
    if kept is not None:
        _keep(kept, cohort)
    return cohort


def _case(uid: str, row: Mapping[str, str], *, store: Store, root: Path, pool: DecoderPool, bundle: Bundle) -> Case:
    with store.read() as conn:
        found = studies.find(conn, uid)
        if not found:
            raise Unanalysable("The study of this row is not in the folder.")
        if found[0][1].hold:
            raise Unanalysable(found[0][1].hold)
        study = studies.load(conn, found[0][0], root=root)
        record = pipeline.record_of(conn, study, bundle)
    inputs = select_inputs(study, record, bundle)
    prepared = prepare(bundle, pipeline.load_images(bundle, inputs, pool), inputs)
    group = row.get("group") or row.get("patient_id") or study.patient.key.patient_id
    labeled = Labeled(prepared.tensors, _truth(bundle, row), group)
    return Case(uid, labeled, row.get("split", ""), _facts(study, inputs), used_modalities(inputs, bundle))


def used_modalities(inputs: Inputs, bundle: Bundle) -> tuple[str, ...]:
    """Which of the bundle's modalities a study has."""
    texts = {text.name for text in inputs.texts}
    there = {
        **dict.fromkeys(inputs.series, True),
        "values": bool(inputs.values),
        "history": any(history.points for history in inputs.histories),
        "text": any(spec.name in texts for spec in bundle.record.notes),
        "genes": any(spec.name in texts for spec in bundle.record.genomics),
    }
    return tuple(name for name in bundle.modalities if there.get(name))


def _facts(study: Study, inputs: Inputs) -> dict[str, str | float]:
    """How the study's first image was made, and the patient's sex and age: by these a result is broken down."""
    first = next(iter(inputs.series.values())).instances[0].path
    header = pydicom.dcmread(first, stop_before_pixels=True, specific_tags=list(_ACQUISITION))
    said = {name: header.get(name) for name in _ACQUISITION}
    facts: dict[str, str | float] = {
        name: str(value).strip() if isinstance(value, str) else float(value) for name, value in said.items() if value not in (None, "")
    }
    facts["view"] = str(facts.get("ViewPosition", "unknown"))
    facts["scanner"] = " ".join(str(facts[name]) for name in ("Manufacturer", "ManufacturerModelName") if name in facts) or "unknown"
    facts["sex"] = study.patient.sex or "unknown"
    born = study.patient.birth_date[:4]
    if born.isdecimal():
        facts["age"] = float(study.study_at.year - int(born))
    return facts


def _truth(bundle: Bundle, row: Mapping[str, str]) -> torch.Tensor:
    known = [_label(row.get(finding.name, "")) for finding in bundle.findings]
    return torch.tensor([math.nan if label is None else label for label in known])


def _label(text: str) -> float | None:
    return {"1": 1.0, "0": 0.0, "1.0": 1.0, "0.0": 0.0}.get(text.strip())


# --- tensors kept from one run to the next


def _key(folder: Path, bundle: Bundle) -> str:
    """Changes with any file of the cohort and with anything of the bundle that decides on tensors."""
    there = sorted((str(one.relative_to(folder)), one.stat().st_size, one.stat().st_mtime_ns) for one in folder.rglob("*") if one.is_file())
    wanted = {"images": [asdict(i) for i in bundle.images], "record": asdict(bundle.record), "network": asdict(bundle.network)}
    return hashlib.sha256(json.dumps([there, wanted], sort_keys=True).encode()).hexdigest()[:32]


def _keep(path: Path, cohort: Cohort) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    tensors = {f"{index}/{key}": tensor for index, case in enumerate(cohort.cases) for key, tensor in case.labeled.sample.items()}
    about = [
        {"uid": case.study_instance_uid, "group": case.labeled.group, "split": case.split, "facts": case.facts, "used": case.used}
        for case in cohort.cases
    ]
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata={"cases": json.dumps(about), "refused": json.dumps(cohort.refused)})
    part.chmod(0o600)
    part.rename(path)


def _restore(path: Path, bundle: Bundle, labels: Mapping[str, Mapping[str, str]]) -> Cohort:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    samples: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split("/", 1)
        samples.setdefault(int(index), {})[key] = tensor
    cases = [
        Case(
            about["uid"],
            Labeled(samples[index], _truth(bundle, labels.get(about["uid"], {})), about["group"]),
            about["split"],
            about["facts"],
            tuple(about["used"]),
        )
        for index, about in enumerate(json.loads(metadata["cases"]))
    ]
    return Cohort(tuple(cases), json.loads(metadata["refused"]))
