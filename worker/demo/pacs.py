"""A small PACS on a loopback socket, for the demonstration and the tests: echo, store, find, get, forward.

It keeps files in a folder and their headers in memory, says when something arrives, and forwards studies
as a routing rule of a real PACS would. It is no archive: no hardening, no database, no TLS. The receiver
that faces a hospital is intake/.
"""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.filereader import read_file_meta_info
from pydicom.uid import (
    JPEG2000,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)
from pynetdicom import AE, AllStoragePresentationContexts, evt
from pynetdicom.association import Association
from pynetdicom.transport import ThreadedAssociationServer

from worker.deliver.association import NATIVE, STUDY_ROOT_FIND, VERIFICATION, Peer, associate
from worker.deliver.cstore import NO_RESPONSE
from worker.deliver.wire import open_file
from worker.demo import query

_STUDY_ROOT_GET: Final = "1.2.840.10008.5.1.4.1.2.2.3"
# Never Deflated: it is inflated without a bound. Never Big Endian: retired.
_SYNTAXES: Final = [
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    JPEG2000Lossless,
    JPEG2000,
    RLELossless,
]
# PS3.4 Tables B.2-1, C.4-1, C.4-3
_SUCCESS, _PENDING, _CANCEL, _DUPLICATE, _OUT_OF_RESOURCES, _MISMATCH = 0x0000, 0xFF00, 0xFE00, 0x0111, 0xA700, 0xA900


@dataclass(frozen=True, slots=True)
class Stored:
    """One instance as it arrived; ``arrived_at`` on the PACS's clock, in seconds, once the file is in place."""

    study_instance_uid: str
    series_instance_uid: str
    sop_instance_uid: str
    sop_class_uid: str
    modality: str
    path: Path
    arrived_at: float


@dataclass(frozen=True, slots=True)
class Forwarded:
    """What the other side answered, in order, and when the last response came (same clock as `Stored`)."""

    statuses: tuple[int, ...]
    responded_at: float


class DemoPacs:
    """A storage, query and retrieve SCP over `folder`, whose files from before it serves again.

    Parameters
    ----------
    port
        0 takes a free one; `port` tells which after `start`.
    on_store
        Called in the network's thread for each new instance, before it is acknowledged.
    """

    def __init__(
        self,
        folder: Path,
        *,
        ae_title: str = "DEMOPACS",
        port: int = 0,
        host: str = "127.0.0.1",
        on_store: Callable[[Stored], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder, self.ae_title, self.host, self.port = folder, ae_title, host, port
        self._on_store, self._clock = on_store, clock
        self._server: ThreadedAssociationServer | None = None
        self._sockets: dict[Association, socket.socket] = {}
        self._changed = threading.Condition()
        self._stored: dict[str, Stored] = {}
        self._headers: dict[str, Dataset] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob("*.dcm")):
            self._enter(path, dcmread(path, stop_before_pixels=True))

    def __enter__(self) -> Self:
        """Start."""
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop."""
        self.stop()

    def start(self) -> None:
        """Listen; raises OSError where the port is taken."""
        ae = AE(self.ae_title)
        ae.require_called_aet = True
        ae.maximum_pdu_size = 131072
        ae.maximum_associations = 32
        for uid in (VERIFICATION, STUDY_ROOT_FIND, _STUDY_ROOT_GET):
            ae.add_supported_context(uid, list(NATIVE))
        for context in AllStoragePresentationContexts:
            # Both roles: C-GET sends its instances back on the same association (PS3.4 §C.5.3).
            ae.add_supported_context(str(context.abstract_syntax), _SYNTAXES, scu_role=True, scp_role=True)
        handlers: list[evt.EventHandlerType] = [
            (evt.EVT_CONN_OPEN, self._opened),
            (evt.EVT_CONN_CLOSE, self._closed),
            (evt.EVT_C_STORE, self._store),
            (evt.EVT_C_FIND, self._find),
            (evt.EVT_C_GET, self._get),
        ]
        self._server = ae.start_server((self.host, self.port), block=False, evt_handlers=handlers)
        if self._server:  # always, with block=False
            self.port = int(self._server.server_address[1])

    def stop(self) -> None:
        """Stop listening and end what is open; the files stay."""
        if self._server:
            self._server.shutdown()
            self._server.ae.shutdown()
            self._server = None

    def peer(self, own_ae_title: str, *, name: str = "demo", timeout_s: float = 30.0) -> Peer:
        """Return this PACS as a caller with `own_ae_title` addresses it."""
        return Peer(name, self.ae_title, self.host, self.port, own_ae_title, timeout_s=timeout_s)

    def instances(self, study_instance_uid: str = "") -> tuple[Stored, ...]:
        """Return what is stored, of one study or of all, in order of arrival."""
        with self._changed:
            return tuple(s for s in self._stored.values() if study_instance_uid in ("", s.study_instance_uid))

    def wait_for(self, predicate: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until `predicate`, asked again after each arrival, is true; False when time is up."""
        with self._changed:
            return self._changed.wait_for(predicate, timeout_s)

    def forward(
        self,
        study_instance_uid: str,
        *,
        peer: Peer,
        calling_ae_title: str = "",
        on_response: Callable[[int], None] | None = None,
    ) -> Forwarded:
        """Send one study's instances to `peer`, calling as this PACS unless told otherwise."""
        calling = replace(peer, own_ae_title=calling_ae_title or self.ae_title)
        return forward([s.path for s in self.instances(study_instance_uid)], peer=calling, on_response=on_response, clock=self._clock)

    def _opened(self, event: evt.Event) -> None:
        transport = event.assoc.dul.socket
        if transport and transport.socket:
            # Nagle and delayed acknowledgement together cost 40 ms a message on Linux.
            transport.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets[event.assoc] = transport.socket

    def _closed(self, event: evt.Event) -> None:
        # pynetdicom 3.0.4 leaves the socket to the garbage collector when the caller has gone first.
        if sock := self._sockets.pop(event.assoc, None):
            sock.close()

    def _store(self, event: evt.Event) -> int:
        file = event.encoded_dataset()
        item = open_file(file)
        header = dcmread(BytesIO(file), stop_before_pixels=True)
        uid = item.sop_instance_uid
        if uid != header.get("SOPInstanceUID") or not header.get("StudyInstanceUID") or not header.get("SeriesInstanceUID"):
            return _MISMATCH
        path = self.folder / f"{hashlib.sha256(uid.encode()).hexdigest()[:32]}.dcm"
        with self._changed:
            if uid in self._stored:
                return _SUCCESS if open_file(path.read_bytes()).data == item.data else _DUPLICATE
            part = path.with_suffix(".part")
            try:
                part.write_bytes(file)
                part.replace(path)
            except OSError:
                return _OUT_OF_RESOURCES
            stored = self._enter(path, header)
            self._changed.notify_all()
        if self._on_store:
            self._on_store(stored)
        return _SUCCESS

    def _enter(self, path: Path, header: Dataset) -> Stored:
        stored = Stored(
            study_instance_uid=str(header.StudyInstanceUID),
            series_instance_uid=str(header.SeriesInstanceUID),
            sop_instance_uid=str(header.SOPInstanceUID),
            sop_class_uid=str(header.SOPClassUID),
            modality=str(header.get("Modality", "")),
            path=path,
            arrived_at=self._clock(),
        )
        self._stored[stored.sop_instance_uid] = stored
        self._headers[stored.sop_instance_uid] = header
        return stored

    def _answers(self, identifier: Dataset) -> list[Dataset] | None:
        # Nearly every query names its study, so the others need not be read.
        value = identifier.get("StudyInstanceUID") or ""
        wanted = {str(value)} if isinstance(value, str) else {str(uid) for uid in value}
        with self._changed:
            headers = [h for uid, h in self._headers.items() if not value or self._stored[uid].study_instance_uid in wanted]
            try:
                return query.answers(identifier, headers)
            except ValueError:
                return None

    def _find(self, event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        found = self._answers(event.identifier)
        if found is None:
            yield _MISMATCH, None
            return
        for answer in found:
            if event.is_cancelled:
                yield _CANCEL, None
                return
            yield _PENDING, answer

    def _get(self, event: evt.Event) -> Iterator[int | tuple[int, Dataset | None]]:
        found = self._answers(event.identifier)
        if found is None:
            yield 0
            yield _MISMATCH, None
            return
        key = query.LEVELS[event.identifier.QueryRetrieveLevel]
        wanted = {str(answer[key].value) for answer in found if key in answer}
        with self._changed:
            paths = [self._stored[uid].path for uid, header in self._headers.items() if str(header[key].value) in wanted]
        yield len(paths)
        for path in paths:
            if event.is_cancelled:
                yield _CANCEL, None
                return
            yield _PENDING, dcmread(path)


def forward(
    paths: Sequence[Path],
    *,
    peer: Peer,
    on_response: Callable[[int], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Forwarded:
    """Send files over one association as they are encoded, as a PACS forwards a study.

    Parameters
    ----------
    on_response
        Called with each status, for a progress bar. `NO_RESPONSE` where no context was accepted.

    Raises
    ------
    PeerUnavailable
        No association, or it ended early.
    """
    metas = [read_file_meta_info(path) for path in paths]
    pairs = dict.fromkeys((str(meta.MediaStorageSOPClassUID), str(meta.TransferSyntaxUID)) for meta in metas)
    statuses: list[int] = []
    responded_at = clock()
    with associate(peer, [(sop_class, [syntax]) for sop_class, syntax in pairs]) as line:
        for path in paths:
            item = open_file(path.read_bytes())
            context_id = line.context(item.sop_class_uid, [item.transfer_syntax_uid])
            status = NO_RESPONSE if context_id is None else line.store(item, context_id).status
            responded_at = clock()
            statuses.append(status)
            if on_response:
                on_response(status)
    return Forwarded(tuple(statuses), responded_at)
