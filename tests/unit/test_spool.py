"""The spool: durable or absent, named by nobody's data, swept without loss."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pydicom
import pytest

from tests.scu import CT, EXPLICIT, encoded, slice_of
from worker.store.spool import IMPLEMENTATION_CLASS_UID, Incoming, Spool, SpoolError, Stored, file_meta

UID = "1.2.3.4.5"
NOW = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool", low_water_bytes=0)


def begin(spool: Spool, uid: str = UID) -> Incoming:
    return spool.begin(sop_class_uid=CT, sop_instance_uid=uid, transfer_syntax_uid=EXPLICIT)


def keep(spool: Spool, data: bytes = b"data set", uid: str = UID) -> Stored:
    incoming = begin(spool, uid)
    incoming.write(memoryview(data))
    return incoming.commit()


def files(spool: Spool) -> list[Path]:
    return sorted(path for path in spool.root.rglob("*") if path.is_file())


def nothing_known(paths: Sequence[str]) -> dict[str, bool]:
    return {}


@pytest.mark.requirement("X6")
def test_a_kept_file_is_a_dicom_file_with_an_empty_preamble(spool: Spool) -> None:
    ds = slice_of()
    stored = keep(spool, encoded(ds), ds.SOPInstanceUID)
    raw = stored.path.read_bytes()
    read = pydicom.dcmread(stored.path)
    assert raw[:132] == bytes(128) + b"DICM"
    assert read.file_meta.ImplementationClassUID == IMPLEMENTATION_CLASS_UID
    assert "SourceApplicationEntityTitle" not in read.file_meta
    assert read == ds
    assert stored.sha256 == hashlib.sha256(raw).hexdigest()
    assert stored.size_bytes == len(raw)


def test_the_digest_depends_on_the_three_uids_and_the_data_set_only(spool: Spool) -> None:
    first, second = keep(spool), keep(spool)
    assert first == second
    assert files(spool) == [first.path]
    assert keep(spool, b"other").path != first.path
    assert keep(spool, uid="1.2.3.4.6").sha256 != first.sha256


def test_the_file_meta_of_a_release_never_changes() -> None:
    """Duplicates are recognized by digest across versions of this program."""
    known = "be609b23c4e92d41d81ae684585c87c8df18b193"
    assert hashlib.sha1(file_meta(CT, UID, EXPLICIT)).hexdigest() == known


@pytest.mark.requirement("X7")
def test_a_name_is_a_digest_whatever_the_uid(spool: Spool) -> None:
    path = keep(spool).path
    assert re.fullmatch(r"[0-9a-f]{64}\.dcm", path.name)
    assert path.parent.name == path.name[:2]
    assert UID not in path.name


@pytest.mark.requirement("S9")
@pytest.mark.parametrize("umask", [0o000, 0o777])
def test_modes_do_not_depend_on_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        spool = Spool(tmp_path / "spool", low_water_bytes=0)
        stored = keep(spool)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(folder.stat().st_mode) for folder in (spool.root, *spool.root.rglob("*")) if folder.is_dir()}
    assert modes == {0o700}
    assert stat.S_IMODE(stored.path.stat().st_mode) == 0o600


@pytest.mark.requirement("S9")
def test_a_folder_that_everybody_can_write_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(SpoolError, match="chmod 700"):
        Spool(tmp_path, low_water_bytes=0)


@pytest.mark.requirement("S9")
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    other = tmp_path
    if os.geteuid() == 0:
        os.chown(other, 12345, 12345)
    else:
        other = Path("/usr")
    with pytest.raises(SpoolError, match="belongs to user"):
        Spool(other, low_water_bytes=0)


def test_a_file_in_the_way_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "incoming").touch()
    with pytest.raises(SpoolError, match="in the way"):
        Spool(tmp_path, low_water_bytes=0)


def test_an_aborted_file_leaves_nothing(spool: Spool) -> None:
    incoming = begin(spool)
    incoming.write(memoryview(b"half"))
    incoming.abort()
    incoming.abort()
    assert files(spool) == []


@pytest.mark.requirement("S4")
def test_a_file_that_a_read_only_disk_keeps_is_let_go_of_all_the_same(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each image that was under way would cost a descriptor, for as long as the process lives."""

    def refuse(_path: Path, *, missing_ok: bool) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    before = psutil.Process().num_fds()
    incoming = begin(spool)
    monkeypatch.setattr(Path, "unlink", refuse)
    incoming.abort()
    assert psutil.Process().num_fds() == before


@pytest.mark.requirement("S3")
def test_a_commit_that_fails_leaves_nothing(spool: Spool) -> None:
    incoming = begin(spool)
    for leaf in (spool.root / "instances").iterdir():
        leaf.rmdir()
    with pytest.raises(FileNotFoundError):
        incoming.commit()
    assert files(spool) == []


@pytest.mark.requirement("S3")
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's always-full device")
def test_a_full_disk_is_the_systems_own_error(spool: Spool) -> None:
    incoming = begin(spool)
    full = os.open("/dev/full", os.O_RDWR)
    os.dup2(full, incoming._fd)
    os.close(full)
    with pytest.raises(OSError, match="No space left") as caught:
        incoming.write(memoryview(b"one byte too many"))
    incoming.abort()
    assert caught.value.errno == errno.ENOSPC
    assert files(spool) == []


def test_low_water_is_measured_on_the_spools_file_system(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", low_water_bytes=0)
    assert spool.free_bytes > 0
    assert not spool.is_low
    assert Spool(tmp_path / "spool", low_water_bytes=1 << 60).is_low


@pytest.mark.requirement("R9")
def test_quarantine_moves_the_file_out_of_use(spool: Spool) -> None:
    stored = keep(spool)
    path = spool.quarantine(stored, "same UID, other bytes")
    assert not stored.path.exists()
    assert path.parent == spool.root / "quarantine"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == stored.sha256


@pytest.mark.requirement("S1")
class TestSweep:
    """What a crash left goes; nothing else does."""

    def test_what_no_row_names_goes_and_what_a_row_names_stays(self, spool: Spool) -> None:
        known, orphan = keep(spool, b"known"), keep(spool, b"orphan")
        swept = spool.sweep(lambda paths: {path: False for path in paths if path == str(known.path)}, written_before=NOW)
        assert (swept.parts, swept.orphans, swept.size_bytes) == (0, 1, orphan.size_bytes)
        # Not deleted: it may be the database that lost its row.
        assert sorted(files(spool)) == sorted([known.path, spool.root / "quarantine" / orphan.path.name])

    def test_a_file_between_its_rename_and_its_row_stays(self, spool: Spool) -> None:
        young = keep(spool)
        spool.sweep(nothing_known, written_before=datetime.now(UTC) - timedelta(minutes=15))
        assert files(spool) == [young.path]

    def test_a_part_that_is_being_written_stays_and_an_abandoned_one_goes(self, spool: Spool) -> None:
        incoming = begin(spool)
        left = spool.root / "incoming" / "left-by-a-crash.part"
        left.write_bytes(b"patient data")
        assert spool.sweep(nothing_known, written_before=NOW).parts == 1
        assert files(spool) == [incoming._part]
        assert incoming.commit().path.exists()

    def test_a_copy_renamed_in_after_the_question_is_put_back(self, spool: Spool) -> None:
        """A resend may land on an orphan's name while the sweep is deciding: it must survive."""
        orphan = keep(spool)
        os.utime(orphan.path, (0, 0))

        def resent_meanwhile(paths: Sequence[str]) -> dict[str, bool]:
            keep(spool)
            return {}

        swept = spool.sweep(resent_meanwhile, written_before=datetime.now(UTC) - timedelta(minutes=15))
        assert swept.orphans == 0
        assert files(spool) == [orphan.path]

    @pytest.mark.parametrize("is_known", [True, False])
    def test_an_interrupted_sweep_is_finished_by_the_next(self, spool: Spool, is_known: bool) -> None:
        """Taken away, then the power went: it may have been a fresh copy, whose sender was told Success."""
        kept = keep(spool)
        kept.path.rename(spool.root / "incoming" / f"{kept.path.stem}.orphan")
        spool.sweep(lambda paths: dict.fromkeys(paths, False) if is_known else {}, written_before=NOW)
        assert files(spool) == [kept.path if is_known else spool.root / "quarantine" / kept.path.name]

    def test_what_another_process_has_just_taken_away_is_left_to_it(self, spool: Spool) -> None:
        taken = spool.root / "incoming" / f"{keep(spool).path.stem}.orphan"
        keep(spool).path.rename(taken)
        spool.sweep(nothing_known, written_before=datetime.now(UTC) - timedelta(minutes=15))
        assert files(spool) == [taken]

    def test_the_same_bytes_that_came_again_stay_when_the_taken_ones_are_put_back(self, spool: Spool) -> None:
        kept = keep(spool)
        kept.path.rename(spool.root / "incoming" / f"{kept.path.stem}.orphan")
        keep(spool)
        spool.sweep(lambda paths: dict.fromkeys(paths, False), written_before=NOW)
        assert files(spool) == [kept.path]

    @pytest.mark.requirement("S5")
    def test_a_file_that_retention_gave_up_is_deleted_not_quarantined(self, spool: Spool) -> None:
        kept, given_up = keep(spool, b"kept"), keep(spool, b"given up")
        swept = spool.sweep(lambda paths: {path: path == str(given_up.path) for path in paths}, written_before=NOW)
        assert (swept.removed, swept.orphans, swept.size_bytes) == (1, 0, given_up.size_bytes)
        assert files(spool) == [kept.path]


@pytest.mark.requirement("S5")
class TestRemove:
    """Retention deletes what its rows have given up, and nothing that came since."""

    def test_old_files_go_and_a_missing_one_is_no_error(self, spool: Spool) -> None:
        gone, kept = keep(spool, b"gone"), keep(spool, b"kept")
        paths = [str(gone.path.relative_to(spool.root / "instances")), "ab/cd.dcm"]
        assert spool.remove(paths, written_before=NOW) == (1, gone.size_bytes)
        assert files(spool) == [kept.path]

    def test_a_file_sent_again_meanwhile_stays(self, spool: Spool) -> None:
        """Its row is about to be written, and its sender to be told Success."""
        fresh = keep(spool)
        before = datetime.now(UTC) - timedelta(minutes=15)
        assert spool.remove([str(fresh.path.relative_to(spool.root / "instances"))], written_before=before) == (0, 0)
        assert files(spool) == [fresh.path]

    def test_quarantine_is_emptied_by_when_a_file_was_put_there(self, spool: Spool) -> None:
        stored = keep(spool)
        os.utime(stored.path, (0, 0))
        path = spool.quarantine(stored, "a reason")
        assert spool.empty_quarantine(put_before=datetime.now(UTC) - timedelta(days=1)) == (0, 0)
        assert path.exists()
        assert spool.empty_quarantine(put_before=NOW) == (1, stored.size_bytes)
        assert not path.exists()


def test_a_persons_folder_in_quarantine_stays_and_stops_nothing(spool: Spool) -> None:
    """Quarantine is kept for a person, who may put it in order."""
    (spool.root / "quarantine" / "looked at").mkdir()
    spool.quarantine(keep(spool), "other bytes")
    files_, _ = spool.empty_quarantine(put_before=datetime.now(UTC) + timedelta(hours=1))
    assert files_ == 1
    assert [path.name for path in (spool.root / "quarantine").iterdir()] == ["looked at"]
