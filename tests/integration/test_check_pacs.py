"""`synoptic check --pacs`: what a destination lost is found, named and sent again as it was; of what a sender has more is told."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from pydicom.dataset import Dataset
from typer.testing import CliRunner, Result

from tests.integration.test_commitment import Site
from tests.integration.test_cstore import STUDY
from tests.peers import ScriptedPacs, free_port
from tests.scu import slice_of
from worker import watch_cli
from worker.cli import app
from worker.deliver.association import Peer
from worker.store import schema
from worker.store.database import Store


class Archived(Site):
    """A site whose reports are in an archive, checked from the command line."""

    def check(self, peer: Peer, *options: str, calling_ae: str = "") -> Result:
        """With `calling_ae` the archive sent us the studies too, and may be asked for counts."""
        config = self.folder / "synoptic.toml"
        database = self.store.url.render_as_string(hide_password=False)
        sender = f'[[senders]]\nae_title = "{calling_ae}"\nquery_host = "127.0.0.1"\nquery_port = {peer.port}\n' if calling_ae else ""
        config.write_text(
            f'[site]\ndata = "{self.folder}"\ndatabase = "{database}"\n[receive]\nlow_water_mb = 0\n{sender}'
            f'[[destinations]]\nname = "pacs"\nae_title = "{peer.ae_title}"\nhost = "127.0.0.1"\nport = {peer.port}\ntimeout_s = 5\n',
            "utf-8",
        )
        return CliRunner().invoke(app, ["check", "--pacs", *options, "--config", str(config)])


@pytest.fixture
def site(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Archived:
    monkeypatch.setattr(watch_cli, "PAUSE_S", 0.0)
    return Archived(store, tmp_path, now=datetime.now(UTC) - timedelta(hours=1))


@pytest.mark.requirement("L4")
def test_a_report_that_the_archive_lost_is_named_and_sent_again_byte_for_byte(site: Archived) -> None:
    first, second, third = site.add(3)
    with ScriptedPacs() as pacs:
        site.deliver(pacs.peer)
        asked = pacs.associations
        told = site.check(pacs.peer)
        assert (told.exit_code, pacs.associations) == (0, asked + 1)
        assert "pacs: 3 of 3 reports are there." in told.stdout
        del pacs.kept[second]
        told = site.check(pacs.peer)
        assert told.exit_code == 1
        assert "pacs: 2 of 3 reports are there." in told.stdout
        assert "Not found are reports of the studies 1." in told.stdout
        assert {state for state, _ in site.jobs()} == {"completed"}, "nothing was asked to be changed"
        told = site.check(pacs.peer, "--repair")
        assert told.exit_code == 0
        assert "1 reports are queued again, the same bytes under the same UIDs." in told.stdout
        assert site.jobs()[1] == ("available", "pacs does not find the document that it took.")
        site.now = datetime.now(UTC)
        assert site.deliver(pacs.peer) == 1
        assert set(pacs.kept) == {first, second, third}
        assert pacs.received[3] == pacs.received[1]
        assert "3 of 3" in site.check(pacs.peer).stdout


def test_only_so_many_days_are_asked_for(site: Archived) -> None:
    site.now -= timedelta(days=3)
    site.add()
    away = Peer("pacs", "NOBODY", "127.0.0.1", free_port(), "WORKER")
    assert site.check(away, "--days", "2").exit_code == 0, "who is not asked need not answer"
    with ScriptedPacs() as pacs:
        site.deliver(pacs.peer)
        pacs.kept.clear()
        assert "pacs: 0 of 0 reports are there." in site.check(pacs.peer, "--days", "2").stdout
        assert "pacs: 0 of 1 reports are there." in site.check(pacs.peer, "--days", "4").stdout


def test_an_archive_that_is_away_or_answers_no_query_leaves_all_as_it_is_and_is_no_success(site: Archived) -> None:
    """Nothing may be sent twice because a PACS was busy."""
    site.add(2)
    with ScriptedPacs() as pacs:
        site.deliver(pacs.peer)
    away = Peer("pacs", "NOBODY", "127.0.0.1", free_port(), "WORKER")
    told = site.check(away, "--repair")
    assert told.exit_code == 1
    assert "2 reports were not asked for: pacs cannot be reached" in told.stdout
    with ScriptedPacs(finding="failing") as pacs:
        told = site.check(pacs.peer, "--repair")
        assert told.exit_code == 1
        assert "2 reports were not asked for: pacs does not answer such a query." in told.stdout
    assert {state for state, _ in site.jobs()} == {"completed"}


def test_a_study_of_which_its_sender_has_more_is_named_and_our_own_reports_are_not_more(site: Archived) -> None:
    with site.store.begin() as conn:
        conn.execute(sa.update(schema.study).values(study_instance_uid=STUDY, calling_ae="SCRIPTED", last_received_at=site.now))
        number = conn.scalar(
            sa.insert(schema.series).values(study_id=site.study_id, series_instance_uid="1.3").returning(schema.series.c.id)
        )
        came = {"series_id": number, "sop_instance_uid": "1.4", "path": "x", "received_at": site.now, "removed_at": site.now}
        conn.execute(sa.insert(schema.instance).values(**came, sop_class_uid="1", transfer_syntax_uid="1", sha256="", size_bytes=1))
    site.add()
    with ScriptedPacs() as pacs:
        site.deliver(pacs.peer)
        pacs.kept["1.4"] = image("1.4")
        told = site.check(pacs.peer, calling_ae="SCRIPTED")
        assert (told.exit_code, "its sender" in told.stdout) == (0, False)
        pacs.kept |= {uid: image(uid) for uid in ("1.5", "1.6")}
        told = site.check(pacs.peer, calling_ae="SCRIPTED")
        assert told.exit_code == 0
        assert "Study 1: its sender counts 2 objects more than the 1 that came." in told.stdout
        pacs.kept.clear()
        assert "Of 1 studies the sender gave no count." in site.check(pacs.peer, calling_ae="SCRIPTED").stdout


def image(uid: str) -> Dataset:
    """An object of the study."""
    return slice_of(STUDY, SOPInstanceUID=uid)
