"""`synoptic demo`: the real daemon beside a small PACS, phantom patients through both, on loopback.

Nothing is pretended: the daemon is ``synoptic all`` in a process of its own, fed by C-STORE and HL7 over
MLLP; the reports counted are those that arrive in the PACS by C-STORE. Only the patients are made up,
which is why their truth is known.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from PIL import Image
from pydicom import Dataset, dcmread
from pydicom.uid import Comprehensive3DSRStorage, SecondaryCaptureImageStorage
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from worker import config
from worker.deliver import cstore
from worker.demo.pacs import DemoPacs
from worker.demo.phantom import PhantomCase, make_case
from worker.errors import PeerUnavailable
from worker.intake import mllp
from worker.report import tree

BUNDLE: Final = Path(__file__).parents[2] / "models" / "bundles" / "phantom"
#: The patients: fixed, so that the demo shows the same on every machine.
FIRST_SEED: Final = 900_000
#: A machine that is busy with other things took 58 s to load torch.
READY_S: Final = 180.0
#: One study may take this long from its last image to its report before the demo gives up.
REPORT_S: Final = 60.0
CONFIGURATION: Final = """\
# Written by `synoptic demo`; deploy/synoptic.toml explains every key.
[site]
data = "data"
[receive]
port = {receive}
ae_title = "SYNOPTIC"
processes = 1
low_water_mb = 64
[[senders]]
ae_title = "DEMOPACS"
query_host = "127.0.0.1"
query_port = {pacs}
[assembly]
quiet_s = 3
ask_sender_after_s = 0.1
[records]
port = {records}
[run]
bundles = ["{bundle}"]
[[destinations]]
name = "demo"
ae_title = "DEMOPACS"
host = "127.0.0.1"
port = {pacs}
documents = ["sr", "seg", "map", "summary", "pdf", "gsps", "keys", "basic"]
"""


@dataclass(slots=True)
class Followed:
    """One case on its way."""

    case: PhantomCase
    responded_at: float = 0.0
    report: Dataset | None = None
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


def run(out: Console, err: Console, *, cases: int, folder: Path) -> bool:
    """Run the demo in `folder`; returns whether every report came and is right."""
    if folder.exists() and any(folder.iterdir()):
        folder = next(path for n in range(2, 10_000) if not (path := folder.with_name(f"{folder.name}-{n}")).exists())
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    followed = [Followed(_case(number)) for number in range(cases)]
    (folder / "pacs").mkdir()
    for one in followed:
        for ds in one.case.datasets:
            ds.save_as(folder / "pacs" / f"{ds.SOPInstanceUID}.dcm", enforce_file_format=True)
    with DemoPacs(folder / "pacs") as pacs:
        receive, records = _free_port(), _free_port()
        path = folder / "synoptic.toml"
        path.write_text(CONFIGURATION.format(receive=receive, records=records, pacs=pacs.port, bundle=BUNDLE), "utf-8")
        with _daemon(path, folder / "daemon.log"):
            _wait_ready(folder / "daemon.log", roles={"receive", "run", "deliver"})
            _drive(err, pacs, followed, receive=receive, records=records)
        _pages(pacs, folder / "pages")
        for one in followed:
            one.faults += faults_of(one.case, one.report)
    _print(out, followed, folder)
    return not any(one.faults for one in followed)


def _case(number: int) -> PhantomCase:
    """Every fourth patient lacks the marker: the report says so. His other two facts agree, so the truth is still known."""
    seed = FIRST_SEED + 100 * number
    if number % 4 != 3:
        return make_case(seed, absent=frozenset())
    drawn = (make_case(candidate, absent=frozenset({"marker"})) for candidate in range(seed, seed + 100))
    return next(case for case in drawn if case.factors["nodule"] == case.factors["history"])


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@contextmanager
def _daemon(path: Path, log: Path) -> Iterator[None]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(config.ENVIRONMENT_PREFIX)}
    with log.open("wb") as file:
        command = [sys.executable, "-m", "worker", "all", "--config", str(path)]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environ)  # noqa: S603  our own interpreter
        try:
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def _drive(err: Console, pacs: DemoPacs, followed: list[Followed], *, receive: int, records: int) -> None:
    """Send everything, wait for the reports; what does not come is left without one."""
    worker = cstore.Peer("worker", "SYNOPTIC", "127.0.0.1", receive, pacs.ae_title)
    columns = (TextColumn("{task.description:22}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err) as progress:
        tasks = [progress.add_task(what, total=len(followed)) for what in ("patients by HL7", "studies by C-STORE", "reports in the PACS")]
        for one in followed:
            codes = mllp.send(("127.0.0.1", records), [message.encode() for message in one.case.hl7], timeout_s=20)
            one.faults += [f"an HL7 message was answered {code}" for code in codes if code not in {"AA", "CA"}]
            progress.advance(tasks[0])
        for one in followed:
            sent = pacs.forward(one.case.study_instance_uid, peer=worker)
            one.responded_at = sent.responded_at
            one.faults += [f"C-STORE was answered 0x{status:04X}" for status in sent.statuses if status]
            progress.advance(tasks[1])
            progress.update(tasks[2], completed=len(_reports(pacs)))
        deadline = time.monotonic() + REPORT_S + 2 * len(followed)
        while (count := len(_reports(pacs))) < len(followed) and time.monotonic() < deadline:
            pacs.wait_for(lambda count=count: len(_reports(pacs)) > count, 1.0)  # type: ignore[misc]
            progress.update(tasks[2], completed=len(_reports(pacs)))
        progress.update(tasks[2], completed=len(_reports(pacs)))
    arrived = _reports(pacs)
    for one in followed:
        if one.case.study_instance_uid in arrived:
            stored = arrived[one.case.study_instance_uid]
            one.report, one.seconds = dcmread(stored[0]), stored[1] - one.responded_at


def _wait_ready(log: Path, *, roles: set[str]) -> None:
    """Until each role has said that it is ready: then the seconds measured are those of work, not of starting."""
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        lines = [line for line in log.read_text("utf-8", "replace").splitlines() if '"role.started"' in line]
        waited = sorted(role for role in roles if not any(f'"role": "{role}"' in line for line in lines))
        if not waited:
            return
        time.sleep(0.1)
    raise PeerUnavailable(f"The daemon was not ready within {READY_S:g} s, for want of {', '.join(waited)}; {log} is all it said.")


def _reports(pacs: DemoPacs) -> dict[str, tuple[Path, float]]:
    """The root report of each study that has one; whatever it refers to came before it."""
    return {s.study_instance_uid: (s.path, s.arrived_at) for s in pacs.instances() if s.sop_class_uid == Comprehensive3DSRStorage}


def _pages(pacs: DemoPacs, folder: Path) -> None:
    """Keep each summary page as a picture, for who has no viewer at hand."""
    folder.mkdir()
    for one in pacs.instances():
        if one.sop_class_uid == SecondaryCaptureImageStorage:
            ds = dcmread(one.path)
            Image.fromarray(ds.pixel_array).save(folder / f"{ds.AccessionNumber}.png")


def findings(report: Dataset) -> dict[str, tuple[float, str]]:
    """What a report says, read from the report itself: tracking identifier → probability, verdict in words."""
    found = {}
    for group in _items(report):
        named = {
            item.ConceptNameCodeSequence[0].CodeValue: item
            for item in group.get("ContentSequence", [])
            if "ConceptNameCodeSequence" in item
        }
        # DCM 112039 Tracking Identifier, DCM 122157 Probability (PS3.16 Annex D)
        if "112039" in named and "122157" in named and "verdict" in named:
            probability = float(named["122157"].MeasuredValueSequence[0].NumericValue) / 100
            found[str(named["112039"].TextValue)] = (probability, str(named["verdict"].ConceptCodeSequence[0].CodeMeaning).lower())
    return found


def _items(ds: Dataset) -> Iterator[Dataset]:
    for item in ds.get("ContentSequence", []):
        yield item
        yield from _items(item)


def faults_of(case: PhantomCase, report: Dataset | None) -> list[str]:
    """What is wrong with a report, in words. Right means: there, of this study and patient, and no verdict the opposite of the truth."""
    if report is None:
        return ["no report arrived"]
    is_its_own = (report.StudyInstanceUID, report.PatientID) == (case.study_instance_uid, case.patient_id)
    faults = [] if is_its_own else ["the report is of another study or patient"]
    found = findings(report)
    for name, truth in case.truth.items():
        verdict = found.get(name, (0.0, "missing"))[1]
        if verdict in {"missing", "negative" if truth else "positive"}:
            faults.append(f"{name} is {verdict}, the truth is {'present' if truth else 'absent'}")
    return faults


def _print(out: Console, followed: list[Followed], folder: Path) -> None:
    table = Table(
        title="Phantom patients",
        caption="seconds: from the last image's C-STORE response to the report in the PACS",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for name, justify in (("study", "left"), ("finding", "left"), ("prob.", "right"), ("verdict", "left"), ("truth", "left")):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("lacks", no_wrap=True)
    table.add_column("seconds", justify="right", no_wrap=True)
    table.add_column("")
    for one in followed:
        case, found = one.case, findings(one.report) if one.report is not None else {}
        for line, (name, truth) in enumerate(case.truth.items()):
            probability, verdict = found.get(name, (None, ""))
            last = [
                ", ".join(sorted(case.absent)),
                f"{one.seconds:.2f}" if found else "",
                "ok" if not one.faults else "; ".join(one.faults),
            ]
            table.add_row(
                case.datasets[0].AccessionNumber if line == 0 else "",
                name.replace("_", " "),
                "" if probability is None else f"{probability:.3f}",
                verdict,
                "present" if truth else "absent",
                *(last if line == 0 else ("", "", "")),
                style="red" if one.faults else None,
            )
    out.print(table)
    shown = next((one for one in followed if one.report is not None), None)
    if shown is not None and shown.report is not None:
        out.print(f"\nThe report of {shown.case.datasets[0].AccessionNumber}, as a tree:\n")
        for text in tree.lines(shown.report):
            out.print(text, soft_wrap=True, markup=False)
    faults = sum(bool(one.faults) for one in followed)
    out.print(f"\n{len(followed) - faults} of {len(followed)} reports are there and right.")
    out.print(f"One page of each, as the PACS has it beside the report: {folder / 'pages'}", soft_wrap=True)
    out.print(
        f"Images and reports: {folder / 'pacs'}   log: {folder / 'daemon.log'}   database and spool: {folder / 'data'}", soft_wrap=True
    )
    out.print(f"Look closer: .venv/bin/synoptic show 1 --config {folder / 'synoptic.toml'}", soft_wrap=True)
