"""A folder of studies, records and labels, through the very gather and load of the daemon.

::

    dicom/**             any nesting, any file names
    hl7/*.hl7  fhir/*.json
    labels.csv           study_instance_uid, one column a label (1, 0, empty = unknown),
                         optional group (else patient_id, else the study's patient)

There is no second way to make a tensor: files go through the spool and the parsers into a database
of their own in a scratch folder, studies come out as `select_inputs` and `volume.load` make them.
"""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from worker import volume
from worker.config import Config, ConfigError
from worker.decoding import DecoderPool
from worker.domain import Inputs, Volume
from worker.errors import Unanalysable
from worker.importing import files, import_files
from worker.inputs import Spec, select_inputs
from worker.store import records, studies
from worker.store.database import Store
from worker.store.spool import Spool

#: Columns of labels.csv that are no labels.
NOT_LABELS: Final = frozenset({"study_instance_uid", "patient_id", "study_datetime", "group", "split"})


@dataclass(frozen=True, slots=True)
class LabeledStudy:
    """One study as the network sees it, with what is known to be true of it."""

    study_instance_uid: str
    group: str
    volume: Volume
    inputs: Inputs
    labels: Mapping[str, float | None]


def read_labels(folder: Path) -> dict[str, dict[str, str]]:
    """labels.csv by Study Instance UID.

    Raises
    ------
    ConfigError
        The file is absent, or has no column study_instance_uid.
    """
    path = folder / "labels.csv"
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError as exc:
        raise ConfigError(f"A cohort needs {path}: study_instance_uid and one column a label.") from exc
    if not rows or "study_instance_uid" not in rows[0]:
        raise ConfigError(f"{path} has no column study_instance_uid, or no rows.")
    return {row["study_instance_uid"]: row for row in rows}


def load(
    folder: Path,
    *,
    config: Config,
    spec: Spec,
    progress: Callable[[], None] = lambda: None,
    refused: Callable[[str], None] = lambda _reason: None,
) -> Iterator[LabeledStudy]:
    """Yield each labeled study that can be analysed; `refused` hears of the others and why."""
    labels = read_labels(folder)
    with tempfile.TemporaryDirectory(prefix="synoptic-cohort-") as scratch, DecoderPool(processes=config.run.decoders) as pool:
        root = Path(scratch)
        # Nothing here outlives the run: no low-water mark, and the studies are complete as they lie there.
        config = replace(config, site=replace(config.site, data=root, database=""))
        store = Store(f"sqlite:///{root / 'cohort.db'}")
        store.migrate()
        spool = Spool(root / "spool", low_water_bytes=0)
        todo = list(files([folder / name for name in ("dicom", "hl7", "fhir") if (folder / name).is_dir()]))
        import_files(todo, config=config, store=store, spool=spool)
        for uid, row in labels.items():
            try:
                yield _case(uid, row, store=store, root=root / "spool" / "instances", pool=pool, spec=spec)
            except Unanalysable as exc:
                refused(str(exc))
            progress()
        store.close()


def _case(uid: str, row: Mapping[str, str], *, store: Store, root: Path, pool: DecoderPool, spec: Spec) -> LabeledStudy:
    with store.read() as conn:
        found = studies.find(conn, uid)
        if not found:
            raise Unanalysable("The study of this row is not in the folder.")
        if found[0][1].hold:
            raise Unanalysable(found[0][1].hold)
        study = studies.load(conn, found[0][0], root=root)
        record = records.view(conn, study.patient.key, as_of=study.study_at)
    inputs = select_inputs(study, record, spec)
    loaded = volume.load(inputs.series, kind=spec.series.kind, views=spec.series.views, pool=pool)
    labels = {name: float(value) if value else None for name, value in row.items() if name not in NOT_LABELS}
    group = row.get("group") or row.get("patient_id") or study.patient.key.patient_id
    return LabeledStudy(uid, group, loaded, inputs, labels)
