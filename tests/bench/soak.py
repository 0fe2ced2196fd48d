"""Thousands of instances at line rate through a real installation: memory and descriptors of each process, and whether they stay.

``python -m tests.bench.soak [--instances 10000] [--slices 100] [--rows 512] [--plot FILE]`` prints one JSON line a process and one of the
whole, and exits 1 where a process has grown. Half of the instances are CT series of `slices`, half radiographs, a study each, so that
10,000 instances are 5,050 studies and 5 GB through one receiver, one inference process and one delivery, each study with its patient's
HL7 message before it. One modality sends as fast as it is answered; inference follows behind, and the end is when the last report was
found in the PACS.

"start", "middle", "end" are medians over the first, the middle and the last tenth of the time, after a warm-up; memory is the
resident set (RSS), and its own share, without pages of files. Not the unique set (USS): inference's rose by 122 MB while its RSS rose
by 8, as other programs that had torch's libraries mapped ended. Flat is an end of at most `GROWTH_MB` above the start, resident and own,
and at most `DESCRIPTORS`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil
from pydicom import Dataset, FileDataset
from pydicom.uid import generate_uid
from pynetdicom.pdu import A_ASSOCIATE_AC

from tests import factories
from tests.bench.abuse import store
from tests.installation import Installation
from tests.scu import EXPLICIT, Scu, encoded
from worker.demo.pacs import DemoPacs
from worker.intake import mllp

#: Above the start a process may hold so much at the end: 7 kB for each of 5,050 studies.
GROWTH_MB: Final = 32.0
DESCRIPTORS: Final = 8


# --- the modality


class Template:
    """A series whose UIDs and patient are put in anew for each study; its pixels are encoded once."""

    def __init__(self, series: Sequence[FileDataset]) -> None:
        self._instances = []
        for ds in series:
            pixels = Dataset()
            pixels.add(ds["PixelData"])
            del ds.PixelData
            self._instances.append((ds, encoded(pixels)))
        self.sop_class = str(series[0].SOPClassUID)

    def study(self, patient_id: str) -> Iterator[tuple[Dataset, bytes]]:
        """Yield each instance of a new study and its bytes."""
        study, series = generate_uid(), generate_uid()
        for ds, pixels in self._instances:
            ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID = study, series, generate_uid()
            ds.PatientID = patient_id
            yield ds, encoded(ds) + pixels


@dataclass
class Modality:
    """Sends batches of one CT and as many radiographs as that has slices."""

    installation: Installation
    slices: int
    rows: int
    instances: int = 0
    studies: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        spacing_mm = (2.0, 350 / self.rows, 350 / self.rows)
        ct = factories.make_ct(slices=self.slices, rows=self.rows, columns=self.rows, spacing_mm=spacing_mm)
        self._ct, self._film = Template(ct), Template([factories.make_radiograph(rows=self.rows, columns=self.rows)])

    def send(self, films: int) -> None:
        """Send a CT and so many radiographs, an association each kind; the patients are told of before."""
        patients = [f"SOAK-{self.studies + number}" for number in range(films + 1)]
        said = "MSH|^~\\&|HIS|A|SYNOPTIC|B|20240101||ADT^A01^ADT_A01|{0}|P|2.5.1\rPID|1||{0}^^^FACTORY^MR||Test^Factory||19700101|O\r"
        codes = mllp.send(("127.0.0.1", self.installation.mllp_port), [said.format(name).encode() for name in patients], timeout_s=60)
        assert set(codes) == {"AA"}, codes
        for template, names in ((self._ct, patients[:1]), (self._film, patients[1:])):
            with Scu(("127.0.0.1", self.installation.port), timeout_s=120) as scu:
                answer = scu.associate([(template.sop_class, [EXPLICIT])], called="WORKER", calling="MODALITY")
                assert isinstance(answer, A_ASSOCIATE_AC)
                for name in names:
                    self._store(scu, template.study(name))
                scu.release()

    def _store(self, scu: Scu, study: Iterator[tuple[Dataset, bytes]]) -> None:
        for ds, data in study:
            began = time.monotonic()
            status = store(scu, ds, data)
            assert status == 0x0000, f"{status:#06x} {scu.comment}"
            self.seconds += time.monotonic() - began
            self.instances += 1
        self.studies += 1


# --- the processes


@dataclass
class Watch:
    """Samples of each process: seconds since the start, RSS and its own share in MiB, open descriptors."""

    processes: Mapping[str, psutil.Process]
    every_s: float
    samples: dict[str, list[tuple[float, float, float, int]]] = field(default_factory=dict)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Sample while the block runs; a process that is gone ends its samples."""
        stop, began = threading.Event(), time.monotonic()

        def look() -> None:
            while not stop.wait(self.every_s):
                for name, process in self.processes.items():
                    try:
                        memory, descriptors = process.memory_info(), process.num_fds()
                    except psutil.Error:
                        continue
                    sample = time.monotonic() - began, memory.rss / 2**20, (memory.rss - memory.shared) / 2**20, descriptors
                    self.samples.setdefault(name, []).append(sample)

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def table(self) -> list[dict[str, Any]]:
        """Return a row a process: start, middle, end of each figure, and whether it is flat."""
        rows = []
        for name, samples in self.samples.items():
            tenth = max(1, len(samples) // 10)
            half = (len(samples) - tenth) // 2
            parts = samples[:tenth], samples[half : half + tenth], samples[-tenth:]
            rss, own, descriptors = ([round(statistics.median(one[column] for one in part), 1) for part in parts] for column in (1, 2, 3))
            is_flat = max(rss[2] - rss[0], own[2] - own[0]) <= GROWTH_MB and descriptors[2] - descriptors[0] <= DESCRIPTORS
            rows.append({"process": name, "rss_mb": rss, "own_mb": own, "descriptors": descriptors, "is_flat": is_flat})
        return rows

    def plot(self, path: Path) -> None:
        """Draw RSS over time."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="seconds", ylabel="RSS, MiB")
        for name, samples in self.samples.items():
            axes.plot([one[0] for one in samples], [one[1] for one in samples], label=name, linewidth=1)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize="small")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")


def processes_of(installation: Installation) -> dict[str, psutil.Process]:
    """Return the daemon's processes by role; the decoders are children of `run`."""
    found = {one["role"]: psutil.Process(one["pid"]) for one in installation.events("role.started")}
    children = found["run"].children()
    return found | {f"run's child {number}": child for number, child in enumerate(children, start=1)}


def run(
    folder: Path, *, instances: int, slices: int, rows: int, every_s: float, plot: Path | None = None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Send, wait for all reports, and return the table and the figures of the whole."""
    made = Installation(folder / "worker", bundles=("phantom", "cxr-severity"), processes=1, senders=("MODALITY",), ask_sender=False)
    with DemoPacs(folder / "pacs") as pacs:
        made.extra = f'[[destinations]]\nname = "pacs"\nae_title = "DEMOPACS"\nhost = "127.0.0.1"\nport = {pacs.port}\n'
        with made:
            modality = Modality(made, slices, rows)
            modality.send(films=10)  # warm: codecs, network, connections
            made.wait_idle(timeout_s=120)
            warm_instances, warm_s = modality.instances, modality.seconds
            watch, began = Watch(processes_of(made), every_s), time.monotonic()
            with watch.watching():
                for _ in range(instances // (2 * slices)):
                    modality.send(films=slices)
                sent_s = time.monotonic() - began
                made.wait_idle(timeout_s=7200)
                all_s = time.monotonic() - began
            ledger = json.loads(made.cli("status", "--ledger", "--json").stdout)
            reports = {one.study_instance_uid for one in pacs.instances() if one.modality == "SR"}
            restarted = [one["role"] for one in made.events("role.restarted")]
    if plot is not None:
        watch.plot(plot)
    count = modality.instances - warm_instances
    whole = {
        "bench": "soak",
        "instances": count,
        "studies": modality.studies,
        "instances_a_s": round(count / (modality.seconds - warm_s), 1),
        "sent_s": round(sent_s),
        "all_s": round(all_s),
        "reported_studies": len(reports),
        "ledger": {name: number for name, number in ledger["all"].items() if number},
        "adds_up": ledger["adds_up"],
        "restarted": restarted,
    }
    return watch.table(), whole


def faults(table: Sequence[Mapping[str, Any]], whole: Mapping[str, Any]) -> list[str]:
    """Return what is wrong, in words; nothing if all is well."""
    found = [f"{row['process']} has grown: {row}" for row in table if not row["is_flat"]]
    if whole["reported_studies"] != whole["studies"] or whole["ledger"].get("delivered") != whole["studies"] or not whole["adds_up"]:
        found.append(f"{whole['studies']} studies were sent, {whole['reported_studies']} have a report, the ledger says {whole['ledger']}.")
    return found + [f"{role} was restarted." for role in whole["restarted"]]


def main() -> int:
    """Run; exit 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=10_000)
    parser.add_argument("--slices", type=int, default=100)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--plot", type=Path, help="a PNG of RSS over time")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="synoptic-soak-") as folder:
        table, whole = run(Path(folder), instances=asked.instances, slices=asked.slices, rows=asked.rows, every_s=2.0, plot=asked.plot)
    for one in [*table, whole]:
        print(json.dumps(one), flush=True)
    wrong = faults(table, whole)
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
