"""A cohort's folder: what is kept says nothing of labels.csv, what service would not answer is not learned from."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileMetaDataset
from pydicom.uid import UID

from models.bundle import Bundle
from models.spec import RecordRule
from tests.scu import EXPLICIT, slice_of
from worker import cohort, joining
from worker.config import Config, ConfigError, Records, Run, Site
from worker.demo.phantom import write_cohort
from worker.domain import Inputs, Instance, Patient, PatientKey, PatientRecord, Series, Study, Volume
from worker.errors import DecoderDied, RecordPending, Snooze
from worker.scratch import PREFIX, scratch

CASES = 4
ROOT = Path(__file__).parents[2]
CONFIG = Config(run=Run(decoders=1))
STUDY_AT = datetime(2026, 3, 4, 12, tzinfo=UTC)
STUDY = Study("1.2", Patient(PatientKey("SITE", "P-1"), birth_date="19700101", sex="F"), "", STUDY_AT, "", 1, completed_at=STUDY_AT)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms without labels; not to be changed."""
    folder = tmp_path_factory.mktemp("phantoms")
    write_cohort(folder, CASES, 8100)
    (folder / "labels.csv").unlink()
    return folder


@pytest.fixture
def folder(phantoms: Path, tmp_path: Path) -> Path:
    return shutil.copytree(phantoms, tmp_path / "cohort")


def uids(folder: Path) -> list[str]:
    """The Study Instance UIDs, by patient."""
    firsts = [next(iter(sorted(one.iterdir()))) for one in sorted((folder / "dicom").iterdir())]
    return [str(pydicom.dcmread(one, stop_before_pixels=True).StudyInstanceUID) for one in firsts]


def label(folder: Path, header: str, *rows: str) -> None:
    (folder / "labels.csv").write_text("\n".join((f"study_instance_uid,{header}", *rows)) + "\n", "utf-8")


# --- labels.csv


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (("1,1,0,p,train", "2,1,0,p,test"), r"line 3: split is 'test', and 'train' in line 2 of the same group"),
        (("1,1,0,p,", "2,1,0,p,test"), r"line 3: split is 'test', and 'train' in line 2"),
        (("1,1,0,p,test", "1,1,0,p,test"), r"line 3: the study of line 2 again"),
        (("1,1,0,p,test,x",), r"line 2 has more fields"),
        (("1,1,maybe,p,test",), r"line 2: rare is no label"),
        (("1,1,0,p,train", "2,1,0,p,validation"), r"line 3: split is none of train, calibration, test and empty"),
        (("1,1,0,p,train", "Maier,1,0,p,train"), r"line 3: study_instance_uid is none; a UID is digits and dots"),
        ((f"1.{'2' * 63},1,0,p,train",), r"line 2: study_instance_uid is none"),
    ],
)
def test_labels_that_contradict_themselves_are_refused_by_line(tmp_path: Path, rows: tuple[str, ...], says: str) -> None:
    label(tmp_path, "ill,rare,group,split", *rows)
    with pytest.raises(ConfigError, match=says) as caught:
        cohort.read_labels(tmp_path, needed=("ill", "rare"))
    assert not any(word in str(caught.value) for word in ("maybe", "validation", "Maier"))


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (("1,1,P-1,g,train", "2,1,P-1,,train"), "line 3: another group than in line 2 of the same patient"),
        (("1,1,P-1,,train", "2,1,P-1,g,test"), "line 3: split is 'test', and 'train' in line 2 of the same patient"),
        (("1,1,P-1,g,train", "2,1,P-1,h,test"), "line 3: split is 'test', and 'train' in line 2 of the same patient"),
        (("1,1,P-1,g,", "2,1,P-1,h,"), "line 3: another group than in line 2 of the same patient"),
    ],
)
def test_a_patient_lies_in_one_group_and_one_split(tmp_path: Path, rows: tuple[str, ...], says: str) -> None:
    label(tmp_path, "ill,patient_id,group,split", *rows)
    with pytest.raises(ConfigError, match=says) as caught:
        cohort.read_labels(tmp_path)
    assert "P-1" not in str(caught.value)


def test_a_column_twice_is_refused(tmp_path: Path) -> None:
    label(tmp_path, "ill,ill", "1,1,0")
    with pytest.raises(ConfigError, match="the column 'ill' twice"):
        cohort.read_labels(tmp_path)


def test_an_empty_split_is_train_as_soon_as_any_row_has_one_and_a_short_row_is_empty_where_it_ends(tmp_path: Path) -> None:
    label(tmp_path, "ill,rare,group,split", "1,1", "2,0,,q,calibration")
    rows = cohort.read_labels(tmp_path, needed=("ill", "rare"))
    assert [(row.line, row.split, row.group) for row in rows.values()] == [(2, "train", ""), (3, "calibration", "q")]
    label(tmp_path, "ill,rare", "1,1", "2,0,")
    assert {row.split for row in cohort.read_labels(tmp_path).values()} == {""}


def test_labels_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes(b"study_instance_uid,name\n1,M\xfcller\n")
    with pytest.raises(ConfigError, match="no CSV in UTF-8") as caught:
        cohort.read_labels(tmp_path)
    assert "ller" not in str(caught.value)


# --- what is kept


def test_a_prediction_first_does_not_take_splits_groups_or_studies_from_a_later_training(
    folder: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, test rows were trained on this way."""
    cache = tmp_path / "cache"
    everything = cohort.load(folder, bundle=bundle, config=CONFIG, cache=cache, is_labeled=False)
    assert len(everything.cases) == CASES
    assert not everything.has_splits
    a, b, c, d = uids(folder)
    label(folder, "ill,rare,group,split", f"{a},1,0,g,train", f"{b},0,,g,", f"{c},1,1,,test", "9.9,1,1,,")
    monkeypatch.setattr(cohort, "import_files", lambda *_given, **_named: pytest.fail("the studies are kept"))
    found = cohort.load(folder, bundle=bundle, config=CONFIG, cache=cache)
    assert [(one.study_instance_uid, one.split) for one in found.cases] == [(a, "train"), (b, "train"), (c, "test")]
    assert [one.labeled.group for one in found.cases] == ["g", "g", "PH008102"]
    assert [one.study_instance_uid for one in found.part("train", "").cases] == [a, b]
    assert found.part("calibration", "").cases == ()
    assert found.refused == {"The study of this row is not in the folder.": 1}
    assert found.cases[0].labeled.labels.tolist() == [1, 0]
    assert math.isnan(found.cases[1].labeled.labels[1])
    label(folder, "ill,rare", f"{d},0,1")
    (only,) = cohort.load(folder, bundle=bundle, config=CONFIG, cache=cache).cases
    first = everything.cases[3].labeled.sample
    assert only.study_instance_uid == d
    assert all(only.labeled.sample[key].equal(first[key]) for key in first)
    assert [(one.suffix, one.stat().st_mode & 0o777) for one in cache.iterdir()] == [(".safetensors", 0o600)]


def test_a_patient_known_from_the_images_alone_may_not_lie_in_two_splits(folder: Path, bundle: Bundle) -> None:
    a, b, *_ = uids(folder)
    label(folder, "ill,rare,group,split", f"{a},1,0,PH008101,train", f"{b},0,1,,test")
    with pytest.raises(ConfigError, match="line 3: split is 'test', and 'train' in line 2"):
        cohort.load(folder, bundle=bundle, config=CONFIG)


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        ("g,train", ",train", "another group"),
        ("g,train", "h,test", "split is"),
        ("g,", "h,", "another group"),
        (",train", "h,test", "split"),
    ],
)
def test_a_patient_of_whom_only_the_images_tell_lies_in_one_group_and_one_split(
    tmp_path: Path, bundle: Bundle, first: str, second: str, says: str
) -> None:
    label(tmp_path, "ill,group,split", f"1,1,{first}", f"2,0,{second}")
    known = cohort._Known({}, "P-1", {}, ())
    found = cohort._Found({"1": known, "2": known}, {}, {})
    with pytest.raises(ConfigError, match=f"line 3: {says}.*line 2"):
        cohort._joined(tmp_path, found, cohort.read_labels(tmp_path), bundle)


@pytest.mark.parametrize(
    "change",
    [
        lambda config: replace(config, site=Site(timezone="Europe/Berlin")),
        lambda config: replace(config, site=Site(issuer="SITE")),
        lambda config: replace(config, records=Records(issuers={"ADT": "SITE"})),
        lambda config: replace(config, records=Records(schemes={"LAB": "LN"})),
    ],
)
def test_what_is_kept_is_of_one_way_of_reading(folder: Path, bundle: Bundle, change: Callable[[Config], Config]) -> None:
    assert cohort._key(folder, bundle, change(CONFIG)) != cohort._key(folder, bundle, CONFIG)
    assert cohort._key(folder, bundle, replace(CONFIG, run=Run(decoders=7))) == cohort._key(folder, bundle, CONFIG)


def test_what_is_kept_is_of_one_program_and_one_language_model_and_of_no_labels(
    folder: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    language = replace(bundle, network=replace(bundle.network, text="bert", bert="words"))
    (bundle.folder / "words").mkdir()
    before = cohort._key(folder, language, CONFIG)
    label(folder, "ill,rare", "1,1,1")
    assert cohort._key(folder, language, CONFIG) == before
    (bundle.folder / "words" / "vocab.txt").write_text("one")
    changed = cohort._key(folder, language, CONFIG)
    monkeypatch.setattr(cohort, "__version__", "99")
    assert len({before, changed, cohort._key(folder, language, CONFIG)}) == 3


# --- what is learned from


def test_a_study_that_the_daemon_would_discard_is_not_learned_from_and_unread_files_are_counted(folder: Path, bundle: Bundle) -> None:
    told = folder / "hl7" / "PH008100.hl7"
    born = pydicom.dcmread(next((folder / "dicom" / "PH008100").iterdir()), stop_before_pixels=True).PatientBirthDate
    assert born.encode() in told.read_bytes()
    told.write_bytes(told.read_bytes().replace(born.encode(), b"19010101"))
    (folder / "hl7" / "note.txt").write_text("nothing")
    found = cohort.load(folder, bundle=bundle, config=CONFIG, is_labeled=False)
    assert [one.study_instance_uid for one in found.cases] == uids(folder)[1:]
    assert found.refused == {"The birth dates of the images and of the patient's record differ.": 1}
    assert found.unread == {"Neither DICOM (no DICM prefix), HL7 v2 nor FHIR JSON; a table is taken by `synoptic import --mapping`.": 1}


def test_a_study_that_kills_its_decoder_is_refused_and_the_others_are_read(
    folder: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *others = uids(folder)
    study = cohort._study

    def dies(uid: str, **named: Any) -> Any:
        if uid == first:
            raise DecoderDied("The decoding process ended.")
        return study(uid, **named)

    monkeypatch.setattr(cohort, "_study", dies)
    found = cohort.load(folder, bundle=bundle, config=CONFIG, is_labeled=False)
    assert [one.study_instance_uid for one in found.cases] == others
    assert found.refused == {"The decoding process ended.": 1}


@pytest.mark.parametrize(
    ("hold", "born", "sex", "says"),
    [
        ("", "19700101", "F", ""),
        ("", "", "", ""),
        ("", "19700101", "O", ""),
        ("", "19700102", "F", "birth dates"),
        ("", "19700101", "M", "sexes"),
        ("Two patients.", "19700101", "F", "Two patients."),
    ],
)
def test_a_record_of_somebody_else_is_told_by_birth_date_and_sex(hold: str, born: str, sex: str, says: str) -> None:
    record = PatientRecord(replace(STUDY.patient, birth_date=born, sex=sex), STUDY_AT)
    found = joining.conflict(replace(STUDY, hold=hold), record)
    assert says in found
    assert bool(found) == bool(says)
    assert joining.conflict(replace(STUDY, hold=hold), None) == hold


def film(path: Path, **changes: Any) -> Path:
    ds = slice_of(rows=8, **changes)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    ds.file_meta.TransferSyntaxUID = UID(EXPLICIT)
    ds.save_as(path, enforce_file_format=True)
    return path


def test_facts_are_those_of_the_film_that_was_read_and_survive_odd_values(tmp_path: Path) -> None:
    other = Instance("1.1", "1", EXPLICIT, film(tmp_path / "a", SOPInstanceUID="1.1", ViewPosition="LL"), "", 1)
    read = film(tmp_path / "b", SOPInstanceUID="1.2", ViewPosition="PA", Manufacturer=["One", "Two"], ManufacturerModelName="", KVP=120)
    series = Series("1", "DX", "CHEST", "", (other, Instance("1.2", "1", EXPLICIT, read, "", 1)))
    images = {"frontal": Volume(np.zeros((1, 8, 8), np.float32), None, (0, 0, 0), "DX", "1", ("1.2",))}
    facts = cohort._facts(STUDY, Inputs({"frontal": series}), images)
    assert (facts["view"], facts["Manufacturer"], facts["scanner"], facts["KVP"]) == ("PA", "One\\Two", "One\\Two", 120)
    assert (facts["Rows"], facts["sex"], facts["age"]) == (8, "F", 56)
    endless: Any = {"KVP": math.inf}
    assert cohort._fact(endless, "KVP") is None
    undated = cohort._facts(replace(STUDY, study_at=datetime(1900, 1, 1, tzinfo=UTC)), Inputs({"frontal": series}), images)
    assert "age" not in undated


# --- what is left behind

ENDS = """
import os, signal, sys
from worker.scratch import scratch
# As a terminal starts a program: what runs the tests may have told it to ignore these.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
with scratch() as folder:
    (folder / "film").touch()
    print(folder.name, flush=True)
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
"""


def left_after(number: str, folder: Path) -> tuple[int, str]:
    """Exit status of a process that this signal ended while it had a scratch folder, and that folder's name."""
    environment = {**os.environ, "TMPDIR": str(folder)}
    ended = subprocess.run([sys.executable, "-c", ENDS, number], env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    return ended.returncode, ended.stdout.strip()


@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_process_that_is_told_to_end_leaves_no_patient_behind(tmp_path: Path, number: str) -> None:
    status, name = left_after(number, tmp_path)
    assert status in (128 + signal.Signals[number], -signal.Signals[number])
    assert name.startswith(PREFIX)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_by_the_next_and_what_a_living_one_has_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, name = left_after("SIGKILL", tmp_path)
    assert status == -signal.SIGKILL
    assert (tmp_path / name / "film").exists()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / f"{PREFIX}other").mkdir()
    with scratch() as own, scratch() as other:
        left = {one.name for one in tmp_path.iterdir()}
    assert left == {own.name, other.name, f"{PREFIX}other"}


# --- when the daemon may answer


def pending(
    hours_later: float, *, study: Study = STUDY, has_record: bool = True, wait_s: float = 600, horizon_h: float = 6
) -> Snooze | None:
    record = PatientRecord(study.patient, STUDY_AT) if has_record else None
    rule = RecordRule(wait_s=wait_s, look_back_h=24, horizon_h=horizon_h)
    inputs = Inputs({}, record_found=has_record)
    return joining.pending(study, record, inputs, rule, now=STUDY_AT + timedelta(hours=hours_later))


def test_a_study_waits_until_the_horizon_has_passed_so_that_service_sees_what_training_saw() -> None:
    waits = pending(2)
    # A known record would end the wait of a RecordPending at once, again and again.
    assert type(waits) is Snooze
    assert waits.delay_s == 4 * 3600
    assert pending(6) is None
    assert pending(2, horizon_h=0) is None
    assert pending(0, study=replace(STUDY, study_at=datetime(1900, 1, 1, tzinfo=UTC))) is None


def test_a_date_of_after_the_images_came_does_not_park_a_study() -> None:
    waits = pending(1, study=replace(STUDY, study_at=datetime(2099, 1, 1, tzinfo=UTC)))
    assert waits is not None
    assert waits.delay_s == 5 * 3600


def test_the_record_is_waited_for_first_and_the_horizon_without_it_too() -> None:
    waits = pending(0.1, has_record=False)
    assert isinstance(waits, RecordPending)
    assert waits.delay_s == 240
    later = pending(1, has_record=False)
    assert later is not None
    assert not isinstance(later, RecordPending)
    assert pending(0.1, has_record=True, horizon_h=0) is None
