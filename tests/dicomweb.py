"""A DICOMweb archive on loopback that answers as it is told to: STOW-RS with any status and body, QIDO-RS of what it kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from email import message_from_bytes
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler
from io import BytesIO
from typing import Any
from urllib.parse import parse_qs, urlsplit

from pydicom import dcmread
from pydicom.dataset import Dataset

from tests.http_peer import HttpPeer
from worker.deliver.association import Peer

Json = dict[str, Any]
#: A handler that writes what it likes; it is closed afterwards.
Raw = Callable[[BaseHTTPRequestHandler], None]


@dataclass(frozen=True)
class Answer:
    """One answer to a store: `body` is given the object's UID. It keeps the object only if told to."""

    status: int = 200
    body: Callable[[str], bytes] = lambda _uid: b""
    keeps: bool = False
    headers: tuple[tuple[str, str], ...] = ()


def response(*, stored: str = "", failed: str = "", reason: int | None = None, warning: int | None = None) -> bytes:
    """A Store Instances Response of one object, in the DICOM JSON Model."""

    def item(uid: str, tag: str, code: int | None) -> Json:
        found: Json = {"00081155": {"vr": "UI", "Value": [uid]}}
        return found | ({tag: {"vr": "US", "Value": [code]}} if code is not None else {})

    said: Json = {"00081190": {"vr": "UR", "Value": ["http://elsewhere"]}}
    if stored:
        said["00081199"] = {"vr": "SQ", "Value": [item(stored, "00081196", warning)]}
    if failed:
        said["00081198"] = {"vr": "SQ", "Value": [item(failed, "00081197", reason)]}
    return json.dumps(said).encode()


@dataclass
class Archive(HttpPeer):
    """Gives `steps`, one for each store, and then keeps and says so. QIDO-RS answers `query_status` where that is not 200."""

    steps: Sequence[Answer | Raw] = ()
    query_status: int = 200
    patient_id: str = ""
    received: list[bytes] = field(default_factory=list)
    kept: dict[str, Dataset] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    authorizations: set[str | None] = field(default_factory=set)

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Store and be asked."""
        (self._store if request.command == "POST" else self._query)(request)

    @property
    def url(self) -> str:
        """Of its studies."""
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}/dicom-web/studies"

    def peer(self, *, timeout_s: float = 5.0, read_back: bool = True, authorization: str = "") -> Peer:
        """How we call it."""
        return Peer(
            "the web archive",
            "",
            "127.0.0.1",
            self.port,
            "",
            timeout_s=timeout_s,
            read_back=read_back,
            stow_url=self.url,
            authorization=authorization,
        )

    def _store(self, handler: BaseHTTPRequestHandler) -> None:
        self.asked.append(f"POST {urlsplit(handler.path).path}")
        self.authorizations.add(handler.headers["Authorization"])
        body = handler.rfile.read(int(handler.headers["Content-Length"]))
        whole = message_from_bytes(f"Content-Type: {handler.headers['Content-Type']}\r\n\r\n".encode() + body, policy=HTTP)
        (part,) = whole.iter_parts()
        assert (whole.get_content_type(), whole.get_param("type")) == ("multipart/related", "application/dicom")
        assert part.get_content_type() == "application/dicom"
        file = part.get_payload(decode=True)
        assert isinstance(file, bytes)
        step = self.steps[len(self.received)] if len(self.received) < len(self.steps) else None
        self.received.append(file)
        ds = dcmread(BytesIO(file))
        uid = str(ds.SOPInstanceUID)
        if step is None or (isinstance(step, Answer) and step.keeps):
            self.kept[uid] = ds
        if step is None:
            step = Answer(200, lambda one: response(stored=one))
        if isinstance(step, Answer):
            _reply(handler, step.status, step.body(uid), step.headers)
        else:
            handler.close_connection = True
            step(handler)

    def _query(self, handler: BaseHTTPRequestHandler) -> None:
        url = urlsplit(handler.path)
        self.asked.append(f"GET {url.path}")
        matching = {key: values[0] for key, values in parse_qs(url.query).items()}
        found = [ds for ds in self.kept.values() if all(str(ds[key].value) == value for key, value in matching.items())]
        answers = [
            {
                "00080018": {"vr": "UI", "Value": [str(ds.SOPInstanceUID)]},
                "0020000D": {"vr": "UI", "Value": [str(ds.StudyInstanceUID)]},
                "00100020": {"vr": "LO", "Value": [self.patient_id or str(ds.PatientID)]},
            }
            for ds in found
        ]
        body = json.dumps(answers).encode() if self.query_status == 200 and answers else b""
        _reply(handler, self.query_status if body or self.query_status != 200 else 204, body)


def _reply(handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: Sequence[tuple[str, str]] = ()) -> None:
    handler.send_response(status)
    for name, value in headers:
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


@contextmanager
def archive(*steps: Answer | Raw, **settings: Any) -> Iterator[Archive]:
    """Run an archive that gives these answers."""
    with Archive(steps, **settings) as running:
        yield running
