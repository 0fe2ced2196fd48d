"""`kill -9` of each process of the line under load, then of all at once: nothing acknowledged is lost, nothing is delivered twice."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest

from tests import accept
from tests.crash.line import PHASES, READY, complaints, killing

pytestmark = [pytest.mark.peer, pytest.mark.slow, pytest.mark.timeout(900)]

#: Each process of its own, everything at once in the midst of work, and twice in a start; `make crash` draws 200.
VICTIMS = ("receive", "deliver", "decoder", "all", READY, "run", "supervisor", "all")


@pytest.mark.requirement("S1")
@pytest.mark.requirement("L5")
@pytest.mark.requirement("Q1")
def test_kills_of_every_process_lose_nothing_and_deliver_nothing_twice(tmp_path: Path, shared: Path) -> None:
    """The senders resend what was not acknowledged, as modalities do; what was acknowledged must be there, and each report once."""
    with killing(tmp_path, shared, VICTIMS, seed=2026) as campaign:
        assert complaints(campaign.figures) == []
        assert campaign.figures["by_phase"].keys() & set(PHASES), "no kill fell into the work"
        data = campaign.installation.folder / "data"
        with contextlib.closing(sqlite3.connect(data / "synoptic.db")) as conn:
            asked = "SELECT study_instance_uid, path FROM instance JOIN series ON series.id = series_id JOIN study ON study.id = study_id"
            sources = {uid: data / "spool" / "instances" / path for uid, path in conn.execute(asked)}
        assert accept.gate(shared, accept.fetch(campaign.pacs, tmp_path / "reports"), sources, java=0) == []
