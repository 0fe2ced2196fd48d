"""The wall clock jumps: work goes on by the clock that only goes forward, and nothing is removed for its sake."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from tests.installation import Installation
from tests.scu import Scu, slice_of
from tests.shim import Shim

pytestmark = [pytest.mark.timeout(300)]

YEAR, DAY = timedelta(days=365), timedelta(days=1)


def send(installation: Installation) -> None:
    with Scu(("127.0.0.1", installation.port)) as scu:
        scu.associate(called="WORKER", calling="MODALITY")
        assert scu.store(slice_of()) == 0x0000


@pytest.mark.requirement("S8")
def test_studies_are_completed_whatever_the_clock_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A day back, a year ahead, and put right again while a study is being received: each is judged as soon as ever."""
    with monkeypatch.context() as preloaded:
        shim = Shim(tmp_path / "shim", tmp_path / "worker", preloaded)
        installation = Installation(tmp_path / "worker", bundles=(), ask_sender=False, processes=1, quiet_s=1.0)
        installation.start()
    try:
        for judged, clock in enumerate((timedelta(), -DAY, YEAR), 1):
            shim.jump(round(clock.total_seconds()))
            send(installation)
            installation.wait_for_event("study.excluded", timeout_s=60, count=judged)
        send(installation)
        shim.jump(0)
        installation.wait_for_event("study.excluded", timeout_s=60, count=4)
        assert [one["seconds"] for one in installation.wait_for_event("clock.jumped", timeout_s=60, count=3)] == pytest.approx(
            [-86400, 366 * 86400, -365 * 86400], abs=30
        )
        assert installation.events("sweep.failed") == []
    finally:
        installation.stop()
