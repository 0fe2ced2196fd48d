"""Seconds from the last C-STORE response to the report in the PACS, one warm study at a time; then a burst.

``python -m tests.bench.line [--studies 20] [--scratch DIR]`` prints one JSON line a figure. The completeness is by
the sender's own count (C-FIND), so no quiet period is in the figures; the asking is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydicom import FileDataset, dcmread

from tests import accept, factories
from tests.installation import BUNDLES, Installation
from tests.peers import SHARED, free_port
from worker.deliver.cstore import Peer
from worker.demo.pacs import DemoPacs
from worker.domain import PatientKey
from worker.intake import mllp

#: Studies before the measured ones: the network and the decoders are warm then.
WARM = 3


@dataclass(frozen=True, slots=True)
class Bench:
    """A PACS and a daemon that knows it."""

    pacs: DemoPacs
    installation: Installation

    @property
    def worker(self) -> Peer:
        """The daemon as the PACS calls it."""
        return Peer("worker", "WORKER", "127.0.0.1", self.installation.port, self.pacs.ae_title)

    def seconds_to_report(self, uid: str) -> float:
        """Forward one study and wait for its report."""
        sent = self.pacs.forward(uid, peer=self.worker)
        assert set(sent.statuses) == {0}, sent.statuses

        def report() -> list[float]:
            return [s.arrived_at for s in self.pacs.instances(uid) if s.modality == "SR"]

        assert self.pacs.wait_for(lambda: bool(report()), 120), "no report within 120 s"
        return report()[0] - sent.responded_at


def run(name: str, studies: Sequence[Sequence[FileDataset]], messages: Sequence[bytes], *, bundle: str, folder: Path) -> list[float]:
    """Measure each study after the warm ones; prints p50 and p95."""
    installation = Installation(folder / "worker", bundles=(bundle,), processes=1, senders=("DEMOPACS",), ask_sender=False)
    images = folder / "pacs"
    images.mkdir(parents=True)
    for study in studies:
        for ds in study:
            factories.write(ds, images / f"{ds.SOPInstanceUID}.dcm")
    port = free_port()
    installation.extra = f'[[destinations]]\nname = "pacs"\nae_title = "DEMOPACS"\nhost = "127.0.0.1"\nport = {port}\n'
    installation.write_config()
    asking = f'ae_title = "DEMOPACS"\nquery_host = "127.0.0.1"\nquery_port = {port}\n'
    text = installation.config.read_text("utf-8").replace('ae_title = "DEMOPACS"\nquery_host = "127.0.0.1"\nquery_port = 0\n', asking)
    installation.config.write_text(text, "utf-8")
    with DemoPacs(images, port=port) as pacs, installation:
        bench = Bench(pacs, installation)
        mllp.send(("127.0.0.1", installation.mllp_port), messages, timeout_s=60)
        seconds = [bench.seconds_to_report(str(study[0].StudyInstanceUID)) for study in studies][WARM:]
        done = [event["seconds"] for event in installation.events("job.completed") if event["kind"] == "infer"][WARM:]
    ordered = sorted(seconds)
    p95 = ordered[min(len(ordered) - 1, round(0.95 * len(ordered)))]
    figure: dict[str, object] = {
        "bench": f"seconds to report, {name}",
        "n": len(ordered),
        "p50": round(statistics.median(ordered), 3),
        "p95": round(p95, 3),
    }
    figure["stages_p50"] = {stage: round(statistics.median(one[stage] for one in done), 3) for stage in done[0]}
    print(json.dumps(figure), flush=True)
    return seconds


def radiographs(count: int, folder: Path) -> list[float]:
    """Real radiographs, with their records."""
    files = list(accept.cohort(SHARED, limit=count + WARM).values())
    patients = sorted({path.parent.name for path in files})
    hl7 = [m for name in patients for m in mllp.split_messages((SHARED / "data/cxr-severity/hl7" / f"{name}.hl7").read_bytes())]
    return run("radiograph", [[dcmread(path)] for path in files], hl7, bundle="cxr-severity", folder=folder)


def volumes(count: int, folder: Path) -> list[float]:
    """CTs of 200 slices of 512 x 512, whose patients have a record without values."""
    keys = [PatientKey("BENCH", f"B-{number}") for number in range(count + WARM)]
    studies = [
        factories.make_ct(slices=200, rows=512, columns=512, spacing_mm=(1.5, 0.7, 0.7), patient=key, seed=number)
        for number, key in enumerate(keys)
    ]
    hl7 = [
        f"MSH|^~\\&|HIS|BENCH|X|Y|20260101||ADT^A01^ADT_A01|{key.patient_id}|P|2.5.1\rPID|1||{key.patient_id}^^^BENCH^MR||Test^Bench\r".encode()
        for key in keys
    ]
    return run("CT of 200 slices", studies, hl7, bundle="phantom", folder=folder)


def idle_roles(folder: Path) -> None:
    """Each role's memory when ready, and the seconds that took."""
    installation = Installation(
        folder, bundles=("cxr-severity",), extra='[[destinations]]\nname = "x"\nae_title = "X"\nhost = "127.0.0.1"\nport = 1\n'
    )
    with installation:
        for event in installation.events("role.started"):
            print(json.dumps({"bench": "role", **{key: event[key] for key in ("role", "seconds", "rss_mb")}}), flush=True)


def main() -> None:
    """Run all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=20)
    parser.add_argument("--volumes", type=int, default=8)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="synoptic-bench-") as scratch:
        root = Path(scratch)
        print(json.dumps({"bench": "bundles", "folder": BUNDLES.name, "date": time.strftime("%Y-%m-%d")}))
        idle_roles(root / "roles")
        radiographs(arguments.studies, root / "radiographs")
        volumes(arguments.volumes, root / "volumes")


if __name__ == "__main__":
    main()
