"""The sending side of receiver tests: synthetic instances, and an SCU that can break PS3.8 on cue.

Its association request is pynetdicom's, so that negotiation is held against another's code.
No patient data: names and IDs are made up.
"""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Self

from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset
from pydicom.filebase import DicomFileLike
from pydicom.filewriter import write_dataset
from pydicom.uid import generate_uid
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RJ, A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import A_ASSOCIATE, ImplementationClassUIDNotification, MaximumLengthNotification
from pynetdicom.presentation import build_context, build_role

from worker import events

CT, MR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4"
VERIFICATION = "1.2.840.10008.1.1"
IMPLICIT, EXPLICIT, BIG_ENDIAN, DEFLATED = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"
ABORT, RELEASE_RQ, RELEASE_RP, P_DATA = 7, 5, 6, 4


def slice_of(study_uid: str = "", *, rows: int = 64, **changes: object) -> Dataset:
    """Return a CT slice of zeros; `changes` replace attributes, None removes one."""
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = CT, generate_uid()
    ds.StudyInstanceUID, ds.SeriesInstanceUID = study_uid or generate_uid(), generate_uid()
    ds.PatientID, ds.PatientName, ds.IssuerOfPatientID = "P-17", "Made^Up", "HOSPITAL"
    ds.StudyDate, ds.StudyTime, ds.Modality, ds.AccessionNumber = "20260102", "101112", "CT", "A-1"
    ds.Rows = ds.Columns = rows
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation, ds.SamplesPerPixel = 16, 16, 15, 1, 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.PixelData = bytes(2 * rows * rows)
    ds["PixelData"].VR = "OW"
    for keyword, value in changes.items():
        if value is None:
            delattr(ds, keyword)
        else:
            setattr(ds, keyword, value)
    return ds


def encoded(ds: Dataset, *, is_implicit: bool = False) -> bytes:
    """Return the data set's bytes, little endian."""
    out = BytesIO()
    file = DicomFileLike(out)
    file.is_little_endian, file.is_implicit_VR = True, is_implicit
    write_dataset(file, ds)
    return out.getvalue()


def with_raw(ds: Dataset, values: Mapping[int, bytes]) -> bytes:
    """Return the data set's bytes, explicit VR, with these values as they are, whatever pydicom thinks of them."""
    out = b""
    for tag in sorted({*(int(element.tag) for element in ds), *values}):
        if tag in values:
            out += struct.pack("<HH2sH", tag >> 16, tag & 0xFFFF, dictionary_VR(tag).encode(), len(values[tag])) + values[tag]
        else:
            single = Dataset()
            single.add(ds[tag])
            out += encoded(single)
    return out


def command_set(field: int, *, has_data_set: bool, sop_class: str = CT, sop_instance: str = "", message_id: int = 7) -> bytes:
    """Return a request's command set, as implicit VR little endian."""

    def element(number: int, value: bytes) -> bytes:
        return struct.pack("<HHL", 0, number, len(value)) + value

    def uid(value: str) -> bytes:
        raw = value.encode("latin-1")
        return raw + b"\0" * (len(raw) % 2)

    body = element(0x0002, uid(sop_class)) + element(0x0100, struct.pack("<H", field)) + element(0x0110, struct.pack("<H", message_id))
    body += element(0x0700, b"\0\0") if has_data_set else b""
    body += element(0x0800, struct.pack("<H", 0 if has_data_set else 0x0101))
    body += element(0x1000, uid(sop_instance)) if sop_instance else b""
    return element(0x0000, struct.pack("<L", len(body))) + body


def pdv(context_id: int, control: int, data: bytes) -> bytes:
    """Return one presentation data value; control bit 0 is command, bit 1 last."""
    return struct.pack(">LBB", len(data) + 2, context_id, control) + data


def pdu(kind: int, body: bytes) -> bytes:
    """Return one PDU."""
    return struct.pack(">BxL", kind, len(body)) + body


class Scu:
    """One connection, spoken by hand."""

    def __init__(self, address: tuple[str, int], *, timeout_s: float = 15.0, source: str = "") -> None:
        self.sock = socket.create_connection(address, timeout=timeout_s, source_address=(source, 0) if source else None)
        # Else Nagle's wait meets the receiver's delayed ACK: 40 ms for each message of two PDUs.
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.contexts: dict[int, tuple[int, str]] = {}
        self.comment = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.sock.close()

    def associate(
        self,
        proposals: Sequence[tuple[str, Sequence[str]]] = ((CT, (EXPLICIT,)),),
        *,
        called: str = "SYNOPTIC",
        calling: str = "SENDER",
        scp_of: Sequence[str] = (),
    ) -> A_ASSOCIATE_AC | A_ASSOCIATE_RJ:
        """Ask for an association; contexts get the numbers 1, 3, 5, … in the order proposed."""
        primitive = A_ASSOCIATE()
        primitive.application_context_name = "1.2.840.10008.3.1.1.1"
        primitive.calling_ae_title, primitive.called_ae_title = calling, called
        contexts = [build_context(abstract, list(syntaxes)) for abstract, syntaxes in proposals]
        for index, context in enumerate(contexts):
            context.context_id = 2 * index + 1
        primitive.presentation_context_definition_list = contexts
        length, implementation = MaximumLengthNotification(), ImplementationClassUIDNotification()
        length.maximum_length_received, implementation.implementation_class_uid = 16384, "1.2.3.4"
        primitive.user_information = [length, implementation, *(build_role(uid, scp_role=True) for uid in scp_of)]
        request = A_ASSOCIATE_RQ()
        request.from_primitive(primitive)
        self.sock.sendall(request.encode())
        kind, body = self.read_pdu()
        answer: A_ASSOCIATE_AC | A_ASSOCIATE_RJ = A_ASSOCIATE_AC() if kind == 2 else A_ASSOCIATE_RJ()
        answer.decode(pdu(kind, body))
        if kind == 2:
            items = answer.to_primitive().presentation_context_definition_results_list
            self.contexts = {
                item.context_id or 0: (-1 if item.result is None else item.result, str(item.transfer_syntax[0])) for item in items
            }
        return answer

    def read_pdu(self) -> tuple[int, bytes]:
        """Return the next PDU; (0, b"") if the receiver closed."""
        head = self._read(6)
        if len(head) < 6:
            return 0, b""
        kind, length = struct.unpack(">BxL", head)
        return kind, self._read(length)

    def status(self) -> int:
        """Return the status of the next response."""
        kind, body = self.read_pdu()
        if kind != P_DATA:
            raise AssertionError(f"A PDU of type {kind} came instead of a response: {body.hex()}")
        elements, position = {}, 6
        while position < len(body):
            _, number, length = struct.unpack_from("<HHL", body, position)
            elements[number] = body[position + 8 : position + 8 + length]
            position += 8 + length
        self.comment = elements.get(0x0902, b"").decode("ascii")
        return int.from_bytes(elements[0x0900], "little")

    def begin_store(self, ds: Dataset, *, context_id: int = 1, sop_class: str = "", sop_instance: str = "") -> None:
        """Send the C-STORE-RQ command only."""
        command = command_set(1, has_data_set=True, sop_class=sop_class or ds.SOPClassUID, sop_instance=sop_instance or ds.SOPInstanceUID)
        self.sock.sendall(pdu(P_DATA, pdv(context_id, 3, command)))

    def send_data(self, data: bytes, *, context_id: int = 1, is_last: bool = True) -> None:
        """Send one PDU with one fragment."""
        self.sock.sendall(pdu(P_DATA, pdv(context_id, 2 if is_last else 0, data)))

    def store(self, ds: Dataset, *, context_id: int = 1, data: bytes | None = None, sop_class: str = "", sop_instance: str = "") -> int:
        """Store one instance (explicit VR little endian unless `data` is given); returns the status."""
        self.begin_store(ds, context_id=context_id, sop_class=sop_class, sop_instance=sop_instance)
        self.send_data(encoded(ds) if data is None else data, context_id=context_id)
        return self.status()

    def echo(self, *, context_id: int) -> int:
        """Verify; returns the status."""
        self.sock.sendall(pdu(P_DATA, pdv(context_id, 3, command_set(0x30, has_data_set=False, sop_class=VERIFICATION))))
        return self.status()

    def release(self) -> bool:
        """Release; whether the receiver agreed."""
        self.sock.sendall(pdu(RELEASE_RQ, bytes(4)))
        return self.read_pdu()[0] == RELEASE_RP

    def is_closed_after_trickle(self, every_s: float, limit_s: float) -> bool:
        """Send a zero byte every so often until the receiver cuts the line, or the limit is reached."""
        for _ in range(int(limit_s / every_s)):
            readable, _, _ = select.select([self.sock], [], [], every_s)
            if readable:
                return True
            try:
                self.sock.sendall(b"\0")
            except OSError:
                return True
        return False

    def _read(self, size: int) -> bytes:
        parts = b""
        while len(parts) < size:
            try:
                part = self.sock.recv(size - len(parts))
            except ConnectionError:
                return b""
            if not part:
                return b""
            parts += part
        return parts


class Heard:
    """Events that a test waits for."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[str, dict[str, object]]] = SimpleQueue()

    def listener(self, name: str, facts: dict[str, object]) -> None:
        """Take an event from whatever thread."""
        self._queue.put((name, facts))

    def next(self, name: str, *, timeout_s: float = 15.0) -> dict[str, object]:
        """Wait for the next event of this name, skipping others."""
        while True:
            try:
                found, facts = self._queue.get(timeout=timeout_s)
            except Empty:
                raise AssertionError(f"No {name} within {timeout_s} s.") from None
            if found == name:
                return facts

    def so_far(self, name: str) -> list[dict[str, object]]:
        """Take all that was said until now; return those of this name."""
        said = [self._queue.get() for _ in range(self._queue.qsize())]
        return [facts for found, facts in said if found == name]


@contextmanager
def hearing() -> Iterator[Heard]:
    """Listen to events while the block runs."""
    heard = Heard()
    events.listen(heard.listener)
    try:
        yield heard
    finally:
        events.unlisten(heard.listener)
