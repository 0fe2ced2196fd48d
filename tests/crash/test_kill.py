"""`kill -9` of everything, five times on the way: nothing acknowledged is lost, nothing is delivered twice."""

from __future__ import annotations

import json
import random
import threading
import time
from pathlib import Path

import pytest

from tests import accept
from tests.installation import Installation
from tests.peers import orthanc

pytestmark = [pytest.mark.peer, pytest.mark.slow, pytest.mark.timeout(900)]

KILLS = 5


@pytest.mark.requirement("S1")
@pytest.mark.requirement("L5")
@pytest.mark.requirement("Q1")
def test_five_kills_lose_nothing_and_deliver_nothing_twice(tmp_path: Path, shared: Path) -> None:
    """The sender resends what was not acknowledged, as a PACS does; what was acknowledged must be there."""
    installation = Installation(tmp_path / "worker", bundles=("cxr-severity",), ask_sender=False, quiet_s=1.0)
    (tmp_path / "orthanc").mkdir()
    files = accept.cohort(shared)
    pauses = random.Random(2026)
    with orthanc(tmp_path / "orthanc", callers={"WORKER": installation.port}) as pacs:
        installation.orthanc = pacs
        accept.upload(pacs, files)
        installation.start()
        try:
            accept.send_records(installation, shared, files)
            sender = threading.Thread(target=accept.forward, args=(pacs, installation, files))
            sender.start()
            at = []
            for _ in range(KILLS):
                time.sleep(pauses.uniform(1.0, 4.0))  # the moment of a power cut is nobody's event
                at.append(len(accept.reports(pacs)))
                installation.kill()
                installation.start()
            sender.join()
            accept.wait_for_reports(pacs, len(files), timeout_s=300)
            installation.wait_idle()
            found = accept.reports(pacs)
            print(json.dumps({"kills": KILLS, "reports_at_each_kill": at, "studies": len(files), "studies_with_report": len(found)}))
            assert set(found) == set(files)
            assert {len(uids) for uids in found.values()} == {1}
            assert any(0 < count < len(files) for count in at), "no kill fell into the work"
            assert accept.gate(shared, accept.fetch(pacs, tmp_path / "reports"), files, java=0) == []
            store = installation.store
            with store.read() as conn:
                root = installation.folder / "data" / "spool" / "instances"
                spooled = {str(path.relative_to(root)) for path in root.rglob("*.dcm")}
                rows = {path for (path,) in conn.exec_driver_sql("SELECT path FROM instance")}
            store.close()
            assert rows <= spooled
        finally:
            if installation.process is not None:
                installation.stop()
