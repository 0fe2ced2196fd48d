"""`synoptic check`: what a disk, a hand or an old backup did to spool or database is found, said in words, and mended if it can be."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner, Result

from tests.conformance.test_ledger import STEP, WANTS, lease
from tests.conformance.test_retention import OLD, Site
from tests.conformance.test_store import NOW
from tests.conftest import Captured
from worker import consistency, sweeps
from worker.cli import app
from worker.errors import StoredFileLost
from worker.intake import assembly
from worker.store import queue, schema
from worker.store.database import Store
from worker.store.spool import Spool


class Checked(Site):
    """A site with a configuration, to be checked from the command line."""

    def check(self, *options: str) -> Result:
        config = self.spool.root.parent / "synoptic.toml"
        database = self.store.url.render_as_string(hide_password=False)
        config.write_text(f'[site]\ndata = "{self.spool.root.parent}"\ndatabase = "{database}"\n', "utf-8")
        return CliRunner().invoke(app, ["check", *options, "--config", str(config)])

    def paths(self) -> list[Path]:
        """The files in use, in the order their rows came."""
        with self.store.read() as conn:
            rows = conn.scalars(sa.select(schema.instance.c.path).order_by(schema.instance.c.id)).all()
        return [self.spool.root / "instances" / path for path in rows]

    def lose(self) -> None:
        """The analysis finds that a file is not there, as imaging/pixels.py does."""
        assembly.sweep(self.store, wants=WANTS[:1], limit_s=100, now=NOW + STEP)
        (job,) = lease(self.store, "infer", NOW + STEP)
        with self.store.begin() as conn:
            queue.discard(conn, job, error=StoredFileLost("A stored file is missing."), now=NOW + STEP)

    def job_states(self) -> list[str]:
        with self.store.read() as conn:
            return [job.state for job in queue.of_study(conn, 1)]


@pytest.fixture
def site(store: Store, tmp_path: Path) -> Checked:
    made = Checked(store, Spool(tmp_path / "spool", low_water_bytes=0))
    for number in (1, 2, 3):
        made.receive(number)
    return made


def test_a_sound_site_is_said_to_be_one(site: Checked) -> None:
    told = site.check("--digests", "--repair")
    assert (told.exit_code, told.stdout) == (0, "3 of 3 files are as they came (by size and sha256).\nNothing is wrong.\n")


@pytest.mark.requirement("S7")
def test_a_missing_file_is_found_and_nothing_is_changed_without_repair(site: Checked) -> None:
    site.paths()[1].unlink()
    told = site.check()
    assert told.exit_code == 1
    assert "2 of 3 files" in told.stdout
    assert "Study 1: 1 files are missing." in told.stdout
    assert "Nothing was changed" in told.stdout


@pytest.mark.requirement("S6")
def test_a_flipped_byte_is_found_by_its_digest_alone_and_a_cut_file_by_its_size(site: Checked) -> None:
    flipped, cut, _ = site.paths()
    whole = flipped.read_bytes()
    flipped.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert site.check().exit_code == 0
    cut.write_bytes(cut.read_bytes()[:-1])
    told = site.check("--digests")
    assert told.exit_code == 1
    assert "1 files are changed." in told.stdout
    assert "1 files are of another size." in told.stdout


@pytest.mark.requirement("S7")
@pytest.mark.parametrize("is_damaged", [False, True])
def test_what_quarantine_has_is_put_back_and_the_study_analysed_again(site: Checked, is_damaged: bool) -> None:
    """An older database was restored, its sweep put files away, then the newer database came back."""
    site.lose()
    place = site.paths()[0]
    kept = site.spool.root / "quarantine" / place.name
    kept.write_bytes(place.read_bytes())
    if is_damaged:
        place.write_bytes(b"damaged")
    else:
        place.unlink()
    told = site.check("--repair")
    assert told.exit_code == 0
    assert "1 files put back from quarantine, 0 put into quarantine, 1 analyses queued again" in told.stdout
    assert not kept.exists()
    assert site.job_states() == ["available"]
    assert site.check("--digests").exit_code == 0


def test_another_file_of_that_name_in_quarantine_is_not_put_back(site: Checked) -> None:
    place = site.paths()[0]
    place.unlink()
    (site.spool.root / "quarantine" / place.name).write_bytes(b"other bytes")
    told = site.check("--repair")
    assert told.exit_code == 1
    assert "1 files are nowhere: have these studies sent again, then `synoptic check --repair` once more: 1." in told.stdout
    assert not place.exists()


@pytest.mark.requirement("S6")
@pytest.mark.requirement("S7")
def test_what_is_nowhere_is_mended_by_a_resend_and_the_analysis_queued_again(site: Checked) -> None:
    site.lose()
    site.paths()[0].unlink()
    site.paths()[1].write_bytes(b"damaged")
    assert site.check("--repair", "--digests").exit_code == 1
    assert site.job_states() == ["discarded"]
    for number in (1, 2):
        site.receive(number)
    told = site.check("--digests")
    assert told.exit_code == 1
    assert "Study 1: its files are here again, 1 of its analyses failed without them." in told.stdout
    assert site.check("--repair").exit_code == 0
    assert site.job_states() == ["available"]


def test_after_retention_too_a_resend_and_a_repair_bring_the_analysis_back(site: Checked) -> None:
    site.lose()
    with site.store.begin() as conn:
        conn.execute(sa.update(schema.instance).values(removed_at=NOW))
    site.receive(1)
    assert site.check().exit_code == 0  # two of its three are gone on purpose
    site.receive(2)
    site.receive(3)
    assert site.check("--repair").exit_code == 0
    assert site.job_states() == ["available"]


def test_a_dead_letter_for_another_reason_stays_one(site: Checked) -> None:
    site.analyse("discard")
    assert site.check("--repair").exit_code == 0
    assert site.job_states() == ["discarded"]


@pytest.mark.requirement("S1")
def test_a_file_that_no_row_names_goes_to_quarantine_once_it_is_old(site: Checked) -> None:
    """A young one may be between its rename and its row."""
    stray = site.spool.root / "instances" / "ab" / f"ab{'0' * 62}.dcm"
    stray.write_bytes(b"whose?")
    assert site.check().exit_code == 0
    os.utime(stray, (OLD, OLD))
    told = site.check()
    assert told.exit_code == 1
    assert "1 files are no image's in the database." in told.stdout
    assert site.check("--repair").exit_code == 0
    assert (site.spool.root / "quarantine" / stray.name).read_bytes() == b"whose?"
    assert site.check().exit_code == 0


def test_what_retention_took_between_two_looks_is_no_fault(site: Checked) -> None:
    """The daemon runs meanwhile."""

    def taken_meanwhile(done: int, of: int) -> None:
        with site.store.begin() as conn:
            conn.execute(sa.update(schema.instance).values(removed_at=NOW))

    for path in site.paths():
        path.unlink()
    found = consistency.check(site.store, site.spool, with_digests=False, now=datetime.now(UTC), progress=taken_meanwhile)
    assert (found.files, found.is_sound) == (3, True)


def test_pages_leave_out_and_repeat_nothing(site: Checked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consistency, "_PAGE", 2)
    for path in site.paths():
        path.unlink()
    seen: list[tuple[int, int]] = []
    found = consistency.check(
        site.store, site.spool, with_digests=False, now=datetime.now(UTC), progress=lambda done, of: seen.append((done, of))
    )
    assert sorted(one.id for one, _ in found.faults) == [1, 2, 3]
    assert seen == [(1, 3), (2, 3), (3, 3)]


def hourly(size_bytes: float) -> float:
    """MB an hour that are a little less than so many bytes each turn."""
    return (size_bytes - 0.1) * 3600 / sweeps.VERIFY_S / 2**20


class TestReadAgain:
    """The daemon's slow sweep: all files in their turn, a restart or not, and no more of them than allowed."""

    @pytest.fixture
    def sizes(self, site: Checked) -> list[int]:
        return [path.stat().st_size for path in site.paths()]

    @pytest.mark.requirement("S6")
    @pytest.mark.requirement("S7")
    def test_each_file_has_its_turn_and_what_is_wrong_is_told_each_time_round(
        self, site: Checked, sizes: list[int], captured: Captured
    ) -> None:
        changed, missing, _ = site.paths()
        root = site.spool.root / "instances"
        whole = changed.read_bytes()
        changed.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        missing.unlink()
        told = []
        for _ in range(6):
            # A new one each time, as after a restart; three files and the end of the list are a round of four turns.
            sweeps.verifier(site.store, site.spool, mb_per_h=hourly(sizes[0]))()
            told.append(len(captured.named("file.damaged")))
        assert told == [1, 2, 2, 2, 3, 4]
        facts = {"study": 1, "file": str(missing.relative_to(root)), "reason": "A stored file is missing."}
        assert captured.named("file.damaged")[1] == facts

    def test_a_large_file_takes_the_time_of_several_turns(self, site: Checked, sizes: list[int], captured: Captured) -> None:
        for path in site.paths():
            path.write_bytes(b"damaged")
        turn = sweeps.verifier(site.store, site.spool, mb_per_h=hourly(sizes[0] / 4))
        told = []
        for _ in range(8):
            turn()
            told.append(len(captured.named("file.damaged")))
        assert told == [1, 1, 1, 1, 2, 2, 2, 2]

    def test_a_place_that_a_crash_cut_off_is_the_beginning(self, site: Checked, captured: Captured) -> None:
        (site.spool.root / "verified").write_bytes(b"")
        site.paths()[0].unlink()
        consistency.verify(site.store, site.spool, budget_bytes=1)
        size_bytes, faults = consistency.verify(site.store, site.spool, budget_bytes=10**9)
        assert (size_bytes > 0, faults) == (True, ())

    def test_what_retention_took_is_no_damage(self, site: Checked) -> None:
        for path in site.paths():
            path.unlink()
        with site.store.begin() as conn:
            conn.execute(sa.update(schema.instance).values(removed_at=NOW))
        assert consistency.verify(site.store, site.spool, budget_bytes=10**9) == (0, ())
