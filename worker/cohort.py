"""A folder of studies, records and labels, through the very gather and load of the daemon.

::

    dicom/**             any nesting, any file names
    hl7/*.hl7  fhir/*.json
    labels.csv           study_instance_uid, one column a label (1, 0, empty = unknown), optional group (else patient_id, else the
                         patient), optional split (train, calibration, test); where any row has one, an empty one is "train"

There is no second way to make a tensor: files go through the spool and the parsers into a database of their own in a
scratch folder, studies come out as `select_inputs`, `volume.load` and `infer.prepare` make them.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Final

import pydicom
import torch
from pydicom.multival import MultiValue
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from models.bundle import Bundle
from models.training import Labeled
from models.transforms import Sample
from worker import __version__, checks, joining, pipeline
from worker.config import Config, ConfigError
from worker.domain import Inputs, Study, Volume
from worker.errors import DecoderDied, Unanalysable
from worker.imaging.decoding import DecoderPool
from worker.importing import files, import_files
from worker.infer import prepare
from worker.inputs import select_inputs
from worker.scratch import scratch
from worker.store import studies
from worker.store.database import Store
from worker.store.spool import Spool

#: Folders of a cohort whose files are read.
FOLDERS: Final = ("dicom", "hl7", "fhir")
#: What labels.csv may say a study is for; no verb would take another.
SPLITS: Final = ("", "train", "calibration", "test")
_UID: Final = re.compile(r"[0-9.]{1,64}")
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
#: Keys of [network] that decide on a study's tensors.
_OF_TENSORS: Final = frozenset({"text", "bert", "words", "steps", "buckets", "variants"})
_ABSENT: Final = "The study of this row is not in the folder."


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
    """All studies of a folder that can be analysed; how many cannot, and how many files could not be read, by reason."""

    cases: tuple[Case, ...]
    refused: Mapping[str, int]
    unread: Mapping[str, int] = field(default_factory=dict)

    @property
    def labeled(self) -> list[Labeled]:
        """What a network learns from."""
        return [case.labeled for case in self.cases]

    @property
    def has_splits(self) -> bool:
        """Whether labels.csv says which study is for what."""
        return any(case.split for case in self.cases)

    def part(self, *splits: str) -> Cohort:
        """Only the studies of these splits; all, if no row has a split."""
        return replace(self, cases=tuple(case for case in self.cases if case.split in splits)) if self.has_splits else self


@dataclass(frozen=True, slots=True)
class Row:
    """One line of labels.csv; `group` is '' where the study's patient is one."""

    line: int
    told: Mapping[str, str]
    group: str = ""
    split: str = ""


def read_labels(folder: Path, *, needed: Sequence[str] = ()) -> dict[str, Row]:
    """labels.csv by Study Instance UID. Where any row has a split, an empty one is "train": no other verb may then take the row.

    Raises
    ------
    ConfigError
        The file is absent, has no column study_instance_uid, none of a `needed` label or one twice; a label is neither 0, 1 nor empty, a
        split or a UID is none; a study is there twice, a row is longer than the header, a group lies in two splits or a patient in two
        groups. No cell is repeated: it may be a name.
    """
    path = folder / "labels.csv"
    rows: dict[str, Row] = {}
    for number, told in _lines(path, needed):
        for name in needed:
            if told[name] and _label(told[name]) is None:
                raise ConfigError(f"{path}, line {number}: {name} is no label; a label is 1, 0 or empty.")
        uid, split = told["study_instance_uid"], told.get("split", "")
        if not _UID.fullmatch(uid):
            raise ConfigError(f"{path}, line {number}: study_instance_uid is none; a UID is digits and dots, 64 at most.")
        if split not in SPLITS:
            raise ConfigError(f"{path}, line {number}: split is none of {', '.join(SPLITS[1:])} and empty.")
        if uid in rows:
            raise ConfigError(f"{path}, line {number}: the study of line {rows[uid].line} again.")
        rows[uid] = Row(number, told, told.get("group") or told.get("patient_id", ""), split)
    if any(row.split for row in rows.values()):
        rows = {uid: replace(row, split=row.split or "train") for uid, row in rows.items()}
    _check_whose(path, ((row.told.get("patient_id", ""), row) for row in rows.values()))
    return rows


def _lines(path: Path, needed: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """The rows with the numbers of their lines; what a short row lacks is empty."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="")
            lines = [(reader.line_num, row) for row in reader]
            header = [name for name in reader.fieldnames or () if name]
    except FileNotFoundError as exc:
        raise ConfigError(f"A cohort needs {path}: study_instance_uid and one column a label.") from exc
    except (UnicodeDecodeError, csv.Error, OSError) as exc:
        raise ConfigError(f"{path} is no CSV in UTF-8 ({type(exc).__name__}).") from exc
    if not lines or "study_instance_uid" not in lines[0][1]:
        raise ConfigError(f"{path} has no column study_instance_uid, or no rows.")
    if missing := [name for name in needed if name not in header]:
        raise ConfigError(f"{path} has no column {missing[0]!r}, which the bundle's finding of that name is learned from.")
    if twice := [name for name in header if header.count(name) > 1]:
        raise ConfigError(f"{path} has the column {twice[0]!r} twice.")
    for number, row in lines:
        if None in row:
            raise ConfigError(f"{path}, line {number} has more fields than the header.")
    return [(number, {name: text.strip() for name, text in row.items()}) for number, row in lines]


def _check_whose(path: Path, rows: Iterable[tuple[str, Row]]) -> None:
    """Refuse a patient (or '' where none is known yet) or a group on both sides: what was learned from one study answers the other."""
    first: dict[tuple[str, str], Row] = {}
    for patient, row in rows:
        for whose in (("group", row.group), ("patient", patient)):
            known = first.setdefault(whose, row) if whose[1] else row
            if known.split != row.split:
                raise ConfigError(
                    f"{path}, line {row.line}: split is {row.split!r}, and {known.split!r} in line {known.line} of the same {whose[0]}."
                )
            if known.group != row.group:
                raise ConfigError(f"{path}, line {row.line}: another group than in line {known.line} of the same patient.")


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
        There is no readable labels.csv, or no study; or a patient lies in two splits.
    """
    labels = read_labels(folder, needed=[f.name for f in bundle.findings]) if is_labeled else {}
    kept = cache / f"{_key(folder, bundle, config)}.safetensors" if cache else None
    if kept is not None and kept.exists():
        found = _restore(kept)
    else:
        # What is kept serves every verb: all studies of the folder, whatever labels.csv says today.
        found = _read(folder, bundle, config, wanted=None if kept is not None else list(labels) or None, progress=progress)
        if kept is not None:
            _keep(kept, found)
    return _joined(folder, found, labels, bundle)


@dataclass(frozen=True, slots=True)
class _Known:
    """What a study is without labels.csv; nothing of that file may be kept here, for it changes between two verbs."""

    sample: Sample
    patient_id: str
    facts: Mapping[str, str | float]
    used: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Found:
    """The studies of a folder by Study Instance UID, why others are not used, and why files were not read."""

    known: Mapping[str, _Known]
    refused: Mapping[str, str]
    unread: Mapping[str, int]


def _joined(folder: Path, found: _Found, labels: Mapping[str, Row], bundle: Bundle) -> Cohort:
    """What was read with what labels.csv says of it now."""
    rows = labels or dict.fromkeys((*found.known, *found.refused), Row(0, {}))
    refused = Counter(found.refused.get(uid, _ABSENT) for uid in rows if uid not in found.known)
    there = [(uid, row, found.known[uid]) for uid, row in rows.items() if uid in found.known]
    if not there:
        raise ConfigError(f"No study of {folder} can be analysed: {'; '.join(sorted(refused)) or 'there is none'}.")
    there = [(uid, replace(row, group=row.group or one.patient_id), one) for uid, row, one in there]
    # Once more: whose a study is may only be known from its images.
    _check_whose(folder / "labels.csv", ((one.patient_id, row) for _, row, one in there))
    cases = [Case(uid, Labeled(one.sample, _truth(bundle, row), row.group), row.split, one.facts, one.used) for uid, row, one in there]
    return Cohort(tuple(cases), dict(refused), found.unread)


def _read(folder: Path, bundle: Bundle, config: Config, *, wanted: Sequence[str] | None, progress: Callable[[int, int], None]) -> _Found:
    """Read the `wanted` studies of a folder, or all."""
    known: dict[str, _Known] = {}
    refused: dict[str, str] = {}
    run = config.run
    pool = DecoderPool(processes=run.decoders, memory_bytes=run.decoder_memory_mb * 2**20, timeout_s=run.decoder_timeout_s)
    with scratch() as root, pool:
        # Nothing here outlives the run: no low-water mark, and the studies are complete as they lie there.
        config = replace(config, site=replace(config.site, data=root, database=""))
        store = Store(f"sqlite:///{root / 'cohort.db'}")
        store.migrate()
        spool = Spool(root / "spool", low_water_bytes=0)
        todo = list(files([folder / name for name in FOLDERS if (folder / name).is_dir()]))
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            progress(done, len(todo) + len(wanted or ()))

        tally = import_files(todo, config=config, store=store, spool=spool, progress=advance)
        if wanted is None:
            with store.read() as conn:
                wanted = studies.uids(conn)
        for uid in wanted:
            try:
                known[uid] = _study(uid, config=config, store=store, pool=pool, bundle=bundle)
            except (Unanalysable, DecoderDied) as exc:  # one study that kills its decoder does not end the others
                refused[uid] = str(exc)
            advance()
        store.close()
    return _Found(known, refused, dict(tally.reasons))


def _study(uid: str, *, config: Config, store: Store, pool: DecoderPool, bundle: Bundle) -> _Known:
    with store.read() as conn:
        found = [number for number, one in studies.find(conn, uid) if one.study_instance_uid == uid]
        if not found:
            raise Unanalysable(_ABSENT)
        study = studies.load(conn, found[0], root=config.spool / "instances")
        record = joining.record_of(conn, study, bundle.record, must_agree=config.records.must_agree)
        doubt = joining.doubt(conn, study, record, must_agree=config.records.must_agree)
    # The daemon gives no answer to these: a network must not learn from them either.
    if doubt:
        raise Unanalysable(doubt)
    inputs = select_inputs(study, record, bundle)
    if reason := checks.patient(study, record, inputs.series.values(), bundle.patients) or joining.incomplete(inputs, bundle.record):
        raise Unanalysable(reason)
    images = pipeline.load_images(bundle, inputs, pool)
    prepared = prepare(bundle, images, inputs)
    return _Known(prepared.tensors, study.patient.key.patient_id, _facts(study, inputs, images), used_modalities(inputs, bundle))


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


def _facts(study: Study, inputs: Inputs, images: Mapping[str, Volume]) -> dict[str, str | float]:
    """How the first image that was read was made, and the patient's sex and age: by these a result is broken down."""
    read = next(iter(images.values())).sop_instance_uids[0]
    path = next(one.path for series in inputs.series.values() for one in series.instances if one.sop_instance_uid == read)
    header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(_ACQUISITION))
    facts = {name: fact for name in _ACQUISITION if (fact := _fact(header, name)) is not None}
    facts["view"] = str(facts.get("ViewPosition", "unknown"))
    facts["scanner"] = " ".join(str(facts[name]) for name in ("Manufacturer", "ManufacturerModelName") if name in facts) or "unknown"
    facts["sex"] = study.patient.sex or "unknown"
    born = study.patient.birth_date[:4]
    if born.isdecimal() and study.study_at > studies.UNDATED:
        facts["age"] = float(study.study_at.year - int(born))
    return facts


def _fact(header: pydicom.Dataset, name: str) -> str | float | None:
    """One attribute as text or number; None where it is absent, empty or malformed, for no study is refused for it."""
    try:
        value = header.get(name)
        if value is None or value == "":
            return None
        if isinstance(value, MultiValue):
            return "\\".join(str(one).strip() for one in value)
        if isinstance(value, str):
            return value.strip()
        return number if math.isfinite(number := float(value)) else None
    except (ValueError, TypeError, ArithmeticError, RuntimeError):
        return None


def _truth(bundle: Bundle, row: Row) -> torch.Tensor:
    known = [_label(row.told.get(finding.name, "")) for finding in bundle.findings]
    return torch.tensor([math.nan if label is None else label for label in known])


def _label(text: str) -> float | None:
    return {"1": 1.0, "0": 0.0, "1.0": 1.0, "0.0": 0.0}.get(text)


# --- tensors kept from one run to the next


def _key(folder: Path, bundle: Bundle, config: Config) -> str:
    """Changes with any file that is read and with anything of bundle, configuration and program that decides on tensors."""
    found = [one for name in FOLDERS for one in (folder / name).rglob("*") if one.is_file()]
    there = sorted((str(one.relative_to(folder)), one.stat().st_size, one.stat().st_mtime_ns) for one in found)
    # Networks are compared on one cohort: what only they see makes no other tensors.
    network = {key: value for key, value in asdict(bundle.network).items() if key in _OF_TENSORS}
    images = [
        {key: value for key, value in asdict(one).items() if key not in ("encoder", "channels", "grid", "like")} for one in bundle.images
    ]
    wanted = {"images": images, "record": asdict(bundle.record), "patients": asdict(bundle.patients), "network": network}
    records = config.records
    reading = [config.site.timezone, config.site.issuer, dict(records.issuers), dict(records.schemes), records.encoding]
    whole = [there, wanted, reading, __version__, bundle.language_sha256]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:32]


def _keep(path: Path, found: _Found) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    tensors = {f"{index}/{key}": tensor for index, one in enumerate(found.known.values()) for key, tensor in one.sample.items()}
    about = [{"uid": uid, "patient_id": one.patient_id, "facts": one.facts, "used": one.used} for uid, one in found.known.items()]
    metadata = {"cases": json.dumps(about), "refused": json.dumps(found.refused), "unread": json.dumps(found.unread)}
    # Each process of torchrun writes its own; whichever is renamed last counts, and they say the same.
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.stem, suffix=".part", delete=False) as file:
        part = Path(file.name)
    try:
        save_file(tensors, part, metadata=metadata)
        part.chmod(0o600)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _restore(path: Path) -> _Found:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    samples: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(path).items():
        index, key = name.split("/", 1)
        samples.setdefault(int(index), {})[key] = tensor
    known = {
        about["uid"]: _Known(samples[index], about["patient_id"], about["facts"], tuple(about["used"]))
        for index, about in enumerate(json.loads(metadata["cases"]))
    }
    return _Found(known, json.loads(metadata["refused"]), json.loads(metadata["unread"]))
