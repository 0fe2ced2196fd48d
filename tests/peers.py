"""The scripted outside world: PACS that misbehave on cue, and the real ones where they are installed.

A real server that is not installed skips its tests on a laptop and fails them in CI (`require`).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import ssl
import subprocess
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, evt
from pynetdicom.dimse_primitives import N_ACTION
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RQ
from pynetdicom.transport import ThreadedAssociationServer

from worker.deliver.association import STUDY_ROOT_FIND, VERIFICATION, Peer
from worker.deliver.commitment import STORAGE_COMMITMENT
from worker.deliver.wire import open_file
from worker.demo import query

COMPREHENSIVE_3D_SR: Final = "1.2.840.10008.5.1.4.1.1.88.34"
SHARED: Final = Path(__file__).parents[2] / "shared"
#: A peer that keeps silent does so until it is stopped, and never longer.
_SILENCE_S: Final = 20.0
# Nagle and delayed acknowledgement together cost DCMTK and Orthanc 40 ms a message on Linux.
_ENVIRONMENT: Final = {**os.environ, "TCP_NODELAY": "1"}

#: A status to answer, or: store and discard, abort or keep silent, with or without keeping the object.
Step = int | Literal["discard", "abort", "keep, abort", "silence", "keep, silence"]
Finding = Literal["honest", "other", "endless", "failing", "failing for studies", "silence", "unsupported"]


def unavailable(reason: str) -> None:
    """Skip on a laptop; fail in CI, where everything is installed."""
    if os.environ.get("CI"):
        pytest.fail(f"{reason} In CI this must not be missing.")
    pytest.skip(reason)


def require(binary: str) -> str:
    """Return the path of an installed program; skip or fail where there is none."""
    # The system's first: an active virtual environment has pynetdicom's programs of the same names.
    found = shutil.which(binary, path=f"/usr/bin:/usr/sbin:{os.environ.get('PATH', '')}")
    if found is None:
        unavailable(f"{binary} is not installed.")
    return found or ""


def require_shared(relative: str) -> Path:
    """Return a file of the shared data; skip or fail where it is absent."""
    path = SHARED / relative
    if not path.exists():
        unavailable(f"The shared file {relative} is absent.")
    return path


def dcmtk(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run one DCMTK program to its end; what it says is on stderr and stdout together."""
    command = [require(program), *arguments]
    return subprocess.run(command, env=_ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False)


def free_port() -> int:
    """Return a TCP port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class ScriptedPacs:
    """A PACS that does `steps`, one for each C-STORE, and after them answers Success and keeps.

    It keeps the object with 0x0000 and with warnings, and loses it with any other status.
    """

    steps: Sequence[Step] = ()
    finding: Finding = "honest"
    sop_classes: Sequence[str] = (COMPREHENSIVE_3D_SR,)
    syntaxes: Sequence[str] = (ExplicitVRLittleEndian, ImplicitVRLittleEndian)
    patient_id: str = ""
    timeout_s: float = 5.0
    #: Given what an N-ACTION asks to be committed to, returns the status; without it the class is not accepted.
    commits: Callable[[Dataset], int] | None = None
    tls: ssl.SSLContext | None = None
    port: int = 0
    received: list[bytes] = field(default_factory=list)
    kept: dict[str, Dataset] = field(default_factory=dict)
    associations: int = 0
    _stopped: threading.Event = field(default_factory=threading.Event)
    _sockets: list[socket.socket] = field(default_factory=list)
    _server: ThreadedAssociationServer | None = None

    def __enter__(self) -> Self:
        ae = AE("SCRIPTED")
        ae.add_supported_context(VERIFICATION)
        if self.finding != "unsupported":
            ae.add_supported_context(STUDY_ROOT_FIND)
        for sop_class in self.sop_classes:
            ae.add_supported_context(sop_class, list(self.syntaxes))
        if self.commits:
            ae.add_supported_context(STORAGE_COMMITMENT)
        handlers: list[evt.EventHandlerType] = [
            (evt.EVT_CONN_OPEN, self._opened),
            (evt.EVT_ACCEPTED, self._accepted),
            (evt.EVT_C_STORE, self._store),
            (evt.EVT_C_FIND, self._find),
            (evt.EVT_N_ACTION, self._action),
        ]
        self._server = ae.start_server(("127.0.0.1", self.port), block=False, evt_handlers=handlers, ssl_context=self.tls)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopped.set()
        assert self._server is not None
        self._server.shutdown()
        self._server.ae.shutdown()
        # pynetdicom 3.0.4 leaves a socket to the garbage collector when the caller has gone first.
        for sock in self._sockets:
            sock.close()

    @property
    def peer(self) -> Peer:
        """How we call it."""
        assert self._server is not None
        return Peer("the scripted PACS", "SCRIPTED", "127.0.0.1", int(self._server.server_address[1]), "WORKER", timeout_s=self.timeout_s)

    def _opened(self, event: evt.Event) -> None:
        transport = event.assoc.dul.socket
        assert transport is not None
        assert transport.socket is not None
        self._sockets.append(transport.socket)

    def _accepted(self, _event: evt.Event) -> None:
        self.associations += 1

    def _store(self, event: evt.Event) -> int:
        step = self.steps[len(self.received)] if len(self.received) < len(self.steps) else 0
        item = open_file(event.encoded_dataset())
        self.received.append(bytes(item.data))
        keeps = step in (0, 0x0107, 0xB000, 0xB006, 0xB007, "keep, abort", "keep, silence")
        if keeps:
            self.kept[item.sop_instance_uid] = event.dataset
        if step in ("abort", "keep, abort"):
            event.assoc.abort()
        elif step in ("silence", "keep, silence"):
            self._stopped.wait(_SILENCE_S)
        return step if isinstance(step, int) else 0

    def _action(self, event: evt.Event) -> tuple[int, None]:
        assert self.commits is not None
        assert isinstance(event.request, N_ACTION)
        assert (event.action_type, event.request.RequestedSOPInstanceUID) == (1, "1.2.840.10008.1.20.1.1")
        return self.commits(event.action_information), None

    def _find(self, event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        match self.finding, event.identifier.QueryRetrieveLevel:
            case ("failing", _) | ("failing for studies", "STUDY"):
                yield 0xA700, None
            case "silence", _:
                self._stopped.wait(_SILENCE_S)
            case "endless", _:
                for _ in range(500):
                    yield 0xFF00, event.identifier
            case "other", _:
                answer = event.identifier
                answer.SOPInstanceUID = "1.2.3.4"
                yield 0xFF00, answer
            case _:
                for answer in query.answers(event.identifier, list(self.kept.values())):
                    if self.patient_id:
                        answer.PatientID = self.patient_id
                    yield 0xFF00, answer


@contextlib.contextmanager
def raw_peer(script: Callable[[socket.socket], None]) -> Iterator[Peer]:
    """Listen, and let `script` talk on each connection in turn; it may raise OSError as peers leave.

    The connection stays open after the script until the other side closes it.
    """

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.settimeout(_SILENCE_S)
                script(connection)
                while connection.recv(65536):
                    continue

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield Peer("the raw peer", "RAW", "127.0.0.1", int(listener.getsockname()[1]), "WORKER", timeout_s=0.5)
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(_SILENCE_S)


def accept_association(connection: socket.socket) -> None:
    """Read an A-ASSOCIATE-RQ and accept all it proposes, each in its first transfer syntax."""
    head = connection.recv(6, socket.MSG_WAITALL)
    request = A_ASSOCIATE_RQ()
    request.decode(head + connection.recv(int.from_bytes(head[2:]), socket.MSG_WAITALL))
    primitive = request.to_primitive()
    contexts = primitive.presentation_context_definition_list
    for context in contexts:
        context.transfer_syntax, context.result = [context.transfer_syntax[0]], 0
    primitive.presentation_context_definition_list = []
    primitive.presentation_context_definition_results_list = contexts
    primitive.result = 0
    answer = A_ASSOCIATE_AC()
    answer.from_primitive(primitive)
    connection.sendall(answer.encode())


@dataclass(frozen=True)
class Orthanc:
    """A running Orthanc with DICOMweb; callers by AE title as given to `orthanc`."""

    dicom_port: int
    http_port: int
    ae_title: str = "TESTPACS"

    def peer(self, own_ae_title: str = "WORKER") -> Peer:
        """How we call it."""
        return Peer("Orthanc", self.ae_title, "127.0.0.1", self.dicom_port, own_ae_title)

    def get(self, path: str) -> Any:
        """GET a path of the REST interface as JSON."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.http_port}{path}", headers={"Accept": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.load(response)

    def post(self, path: str, body: str | bytes) -> Any:
        """POST to a path of the REST interface; the answer as JSON."""
        data = body.encode() if isinstance(body, str) else body
        request = urllib.request.Request(f"http://127.0.0.1:{self.http_port}{path}", data=data, method="POST")
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.load(response)

    def delete(self, path: str) -> None:
        """DELETE a path of the REST interface."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.http_port}{path}", method="DELETE")
        urllib.request.urlopen(request, timeout=30).close()

    def file(self, orthanc_id: str) -> bytes:
        """Return an instance as Orthanc stores it."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}/instances/{orthanc_id}/file", timeout=30) as response:
            return bytes(response.read())

    def qidos(self, level: str = "instances", **matching: str) -> list[dict[str, Any]]:
        """QIDO-RS: search studies, series or instances by keywords."""
        found: list[dict[str, Any]] = self.get(f"/dicom-web/{level}?{urllib.parse.urlencode(matching)}")
        return found

    def instances(self) -> list[str]:
        """Return Orthanc's own identifiers of all instances."""
        found: list[str] = self.get("/instances")
        return found


@contextlib.contextmanager
def orthanc(folder: Path, *, callers: dict[str, int] | None = None, lua: str = "", **settings: object) -> Iterator[Orthanc]:
    """Run Debian's Orthanc in `folder` on free ports until the block ends.

    `callers`: AE title → the port it listens on (for C-MOVE and storage commitment), WORKER by default.
    `lua`: a script, for filters. `settings` override the configuration.
    """
    program = require("Orthanc")
    plugin = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
    if not plugin.exists():
        unavailable("Orthanc's DICOMweb plug-in is not installed.")
    server = Orthanc(dicom_port=free_port(), http_port=free_port())
    permissions = {f"Allow{verb}": True for verb in ("Echo", "Find", "Get", "Move", "Store", "StorageCommitment")}
    configuration: dict[str, object] = {
        "Name": f"test-{server.http_port}",
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "index"),
        "Plugins": [str(plugin)],
        "HttpPort": server.http_port,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "DicomAet": server.ae_title,
        "DicomPort": server.dicom_port,
        "DicomCheckCalledAet": True,
        "DicomAlwaysAllowStore": False,
        "DicomAlwaysAllowFind": False,
        "UnknownSopClassAccepted": False,
        "OverwriteInstances": False,
        "DefaultEncoding": "Utf8",
        "SyncStorageArea": True,
        "StableAge": 2,
        "DicomModalities": {
            title.lower(): {"AET": title, "Host": "127.0.0.1", "Port": port, **permissions}
            for title, port in (callers or {"WORKER": free_port()}).items()
        },
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/", "Host": f"127.0.0.1:{server.http_port}", "Ssl": False},
        **settings,
    }
    if lua:
        (folder / "filter.lua").write_text(lua)
        configuration["LuaScripts"] = [str(folder / "filter.lua")]
    (folder / "orthanc.json").write_text(json.dumps(configuration))
    with (folder / "orthanc.log").open("wb") as log:
        process = subprocess.Popen([program, "orthanc.json"], cwd=folder, env=_ENVIRONMENT, stdout=log, stderr=log)
        try:
            _await_ready(process, server, str(configuration["Name"]))
            yield server
        finally:
            process.terminate()
            process.wait(30)


@contextlib.contextmanager
def storescp(folder: Path, *options: str) -> Iterator[Peer]:
    """Run DCMTK's storescp into `folder` with fault options until the block ends."""
    port = free_port()
    command = [require("storescp"), "-aet", "STORESCP", "--promiscuous", "-od", str(folder), *options, str(port)]
    with (folder / "storescp.log").open("wb") as log:
        process = subprocess.Popen(command, env=_ENVIRONMENT, stdout=log, stderr=log)
        try:
            _await(process, lambda: socket.create_connection(("127.0.0.1", port), 1).close())
            yield Peer("storescp", "STORESCP", "127.0.0.1", port, "WORKER", timeout_s=5, read_back=False)
        finally:
            process.terminate()
            process.wait(30)


def _await_ready(process: subprocess.Popen[bytes], server: Orthanc, name: str) -> None:
    def ask() -> None:
        # Another Orthanc on the port would answer too: the name tells.
        if server.get("/system")["Name"] != name:
            raise OSError("another server answers")

    _await(process, ask)


def _await(process: subprocess.Popen[bytes], attempt: Callable[[], None]) -> None:
    """Repeat `attempt` until it raises no OSError; the process's end is waited for in between."""
    for _ in range(600):
        try:
            attempt()
        except OSError:
            try:
                ended = process.wait(0.05)
            except subprocess.TimeoutExpired:
                continue
            raise RuntimeError(f"The server ended with {ended}; its log is beside its files.") from None
        else:
            return
    raise RuntimeError("The server is not ready after 30 s.")
