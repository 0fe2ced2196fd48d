"""How many results a second go by each door that is not a PACS's: written, and sent over loopback and acknowledged.

``python -m tests.bench.doors [--documents 300]`` prints one JSON line a door. The receivers are the tests' own, in the same process, so
that a figure is the least of what the door can do.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from tests import reports
from tests.fhir_server import FhirServer
from tests.recipients import Hook, MailServer, ris
from worker.deliver import fhir, mllp, notice
from worker.deliver.association import Peer
from worker.deliver.cstore import Outcome
from worker.domain import Document
from worker.report import fhir as fhir_report
from worker.report import notice as notice_report
from worker.report import oru
from worker.report.result import Result

#: As in service: jobs are leased in batches of so many.
BATCH = 16


def results(folder: Path, count: int) -> list[Result]:
    """So many results of one radiograph, each of another input, with a critical finding."""
    source = reports.radiograph(folder)
    findings = [replace(reports.FINDINGS[0], is_critical=True), reports.FINDINGS[1]]
    return [
        reports.result([source], algorithm=replace(reports.ALGORITHM, input_sha256=f"{number:064x}"), findings=findings)
        for number in range(count)
    ]


def figure(
    door: str,
    made_of: Sequence[Result],
    build: Callable[[Result], Sequence[Document]],
    send: Callable[..., list[Outcome]],
    peer: Peer,
) -> None:
    """Print both rates of one door."""
    began = time.perf_counter()
    documents = [one for result in made_of for one in build(result)]
    written = time.perf_counter()
    outcomes = [one for start in range(0, len(documents), BATCH) for one in send(documents[start : start + BATCH], peer=peer)]
    sent = time.perf_counter()
    assert all(one.delivered for one in outcomes), next(one.error for one in outcomes if one.error)
    print(
        json.dumps(
            {
                "door": door,
                "documents": len(documents),
                "bytes": len(documents[0].data),
                "written_per_s": round(len(documents) / (written - began)),
                "sent_per_s": round(len(documents) / (sent - written)),
            }
        ),
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the bench."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--documents", type=int, default=300)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        made_of = results(Path(folder), given.documents)
        with ris() as his:
            figure("hl7", made_of, oru.build, mllp.send, his.peer())
        with FhirServer() as ehr:
            system = "urn:oid:1.2.3"
            ehr.put({"resourceType": "Patient", "id": "1", "identifier": [{"system": system, "value": "F-0001"}]})
            # The server looks for every identifier in every resource: of few it measures us, of many itself.
            peer = Peer("ehr", "", "127.0.0.1", ehr.port, "", url=ehr.base, door="fhir", systems={"FACTORY": system})
            figure("fhir", made_of[:50], fhir_report.build, fhir.send, peer)
        with Hook() as hook:
            figure("webhook", made_of, notice_report.build, notice.send, hook.peer(secret="hush"))
        with MailServer() as mail:
            figure("mail", made_of, notice_report.build, notice.send, mail.peer())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
