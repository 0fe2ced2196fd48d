"""One DICOM association as SCU, on the calling thread: bounded in time, in PDU size and in answers.

pynetdicom's requestor is not used. Measured with 3.0.4: a peer that sends half a PDU stops ``AE.associate``
for ever, whatever the timeouts (``kill()`` waits for a thread in ``recv`` without a deadline), a PDU's length
is believed up to 4 GB, and ``send_c_store`` encodes the data set anew. Its PDU classes do the negotiation;
the bytes travel here, as they are in the file, without a thread or a polling loop.

Not here: what a status means for a job (cstore.py). References: PS3.7 §9, PS3.8 §9.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from types import TracebackType
from typing import Final, Self

from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom.dsutils import decode, encode

from worker.deliver import wire
from worker.deliver.wire import EncodedObject, Response
from worker.errors import PeerUnavailable, PeerUnreachable, cause_of
from worker.ops import audit

VERIFICATION: Final = "1.2.840.10008.1.1"
STUDY_ROOT_FIND: Final = "1.2.840.10008.5.1.4.1.2.2.1"
#: Identifiers are short: any little-endian syntax will do.
NATIVE: Final = (str(ExplicitVRLittleEndian), str(ImplicitVRLittleEndian))

_PENDING: Final = (0xFF00, 0xFF01)  # PS3.4 Table C.4-1

#: What we announce and take: answers to an SCU are small, so anything longer is not an answer.
_MAX_PDU_RECEIVED: Final = 65536
_MAX_MESSAGE: Final = 1 << 20
_MAX_ANSWERS: Final = 64
#: Longest fragment sent, whatever the peer allows; 0 in its answer means no limit (PS3.8 §D.1).
_MAX_PDU_SENT: Final = 131072
#: Slowest line on which an object may still travel; below it the worker is held for too long.
_SLOWEST_BYTES_PER_S: Final = 65536
#: After the last answer nothing depends on the goodbye.
_GOODBYE_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Peer:
    """A PACS as we call it.

    ``timeout_s`` bounds the connection with its TLS handshake, each negotiation, each response and each whole query.
    ``read_back`` off is for archives without C-FIND: Success alone then counts as delivered.
    ``tls`` gives the context for a new connection; with it nothing is ever sent in the clear. The peer's certificate
    must be for ``tls_server_name``, or where that is empty for ``host``.
    ``door`` says how it is called (config_sections.Destination); with a ``stow_url`` by DICOMweb there (stow.py). Of a door with a URL,
    ``url`` is that, ``authorization`` the header's value, and nothing here has a meaning but name, host, port, time-out, read-back and TLS.
    ``systems``: issuer of patient IDs → the Identifier.system that a FHIR server keeps them under. ``secret``: the key that webhooks are
    signed with, or ``user:password`` of a mail server; ``mail_from`` and ``mail_to`` are addresses.
    """

    name: str
    ae_title: str
    host: str
    port: int
    own_ae_title: str
    timeout_s: float = 30.0
    read_back: bool = True
    tls: Callable[[], ssl.SSLContext] | None = None
    tls_server_name: str = ""
    stow_url: str = ""
    url: str = ""
    door: str = "dicom"
    authorization: str = field(default="", repr=False)
    systems: Mapping[str, str] = field(default_factory=dict, hash=False)
    secret: str = field(default="", repr=False)
    mail_from: str = ""
    mail_to: tuple[str, ...] = ()

    @property
    def address(self) -> str:
        """Host and port as people write them."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def connect(peer: Peer) -> socket.socket:
    """Connect, and shake hands if TLS is wanted; both together take ``peer.timeout_s`` at most.

    Raises
    ------
    PeerUnreachable
        No connection, or a handshake that failed: who cannot be trusted gets no byte of ours.
    """
    deadline = time.monotonic() + peer.timeout_s
    try:
        sock = socket.create_connection((peer.host, peer.port), timeout=peer.timeout_s)
    except OSError as error:
        raise PeerUnreachable(f"{peer.name} cannot be reached at {peer.address}: {cause_of(error)}.") from error
    # Nagle and delayed acknowledgement together cost 40 ms a message on Linux: 120 ms instead of 40 ms a report.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if peer.tls is None:
        return sock
    try:
        sock.settimeout(max(deadline - time.monotonic(), 0.001))
        # The socket's time-out is that of the whole handshake, however slowly its bytes drip.
        sock = peer.tls().wrap_socket(sock, server_hostname=peer.tls_server_name or peer.host, do_handshake_on_connect=False)
        sock.do_handshake()
    except TimeoutError as error:
        sock.close()
        raise PeerUnreachable(f"{peer.name} did not finish the TLS handshake within {peer.timeout_s:g} s.") from error
    except (OSError, ValueError) as error:  # ValueError: a name that cannot be one of a certificate
        sock.close()
        reason = cause_of(error) if isinstance(error, OSError) else "its name cannot be that of a certificate"
        raise PeerUnreachable(f"{peer.name} cannot be reached by TLS at {peer.address}: {reason}.") from error
    return sock


def associate(peer: Peer, proposals: Sequence[tuple[str, Sequence[str]]], *, scp_of: Sequence[str] = ()) -> Association:
    """Connect and negotiate; `proposals` pairs each abstract syntax with transfer syntaxes. Of `scp_of` we are the SCP, of the others SCU.

    Raises
    ------
    PeerUnreachable
        No connection, a rejection, an abort, silence or something that is not DICOM. A permanent rejection
        too: an AE title that is wrong for an hour must not lose a report.
    """
    association = Association(connect(peer), peer)
    try:
        association.negotiate(proposals, scp_of=scp_of)
    except PeerUnavailable as error:
        raise PeerUnreachable(str(error)) from error
    return association


class Association:
    """What was agreed with one peer, and the socket it was agreed on. Made by `associate`.

    Everything that ends it early raises PeerUnavailable, and `is_open` is False from then on.
    """

    def __init__(self, sock: socket.socket, peer: Peer) -> None:
        self._sock: socket.socket | None = sock
        self._peer = peer
        self._contexts: dict[tuple[str, str], int] = {}
        self._max_fragment = _MAX_PDU_SENT
        self._message_id = 0

    def __enter__(self) -> Self:
        """Return the association; leaving releases it, or aborts it on an error."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Release, or abort when an error is on its way."""
        if kind is None:
            self.release()
        else:
            self.abort()

    @property
    def is_open(self) -> bool:
        """Whether a message may still be sent."""
        return self._sock is not None

    def context(self, sop_class_uid: str, transfer_syntaxes: Sequence[str]) -> int | None:
        """Return the accepted context for the first of `transfer_syntaxes` the peer takes, else None."""
        ids = (self._contexts.get((sop_class_uid, syntax)) for syntax in transfer_syntaxes)
        return next((context_id for context_id in ids if context_id is not None), None)

    def negotiate(self, proposals: Sequence[tuple[str, Sequence[str]]], *, scp_of: Sequence[str] = ()) -> None:
        """Send the A-ASSOCIATE-RQ and take in the answer (PS3.8 §7.1). Done by `associate`."""
        deadline = time.monotonic() + self._peer.timeout_s
        proposed = {2 * k + 1: proposal for k, proposal in enumerate(proposals)}
        called, calling = self._peer.ae_title, self._peer.own_ae_title
        request = wire.request_pdu(called=called, calling=calling, proposals=proposed, max_pdu=_MAX_PDU_RECEIVED, scp_of=scp_of)
        self._write(request, deadline)
        kind, pdu = self._read_pdu(deadline)
        if kind not in (wire.ASSOCIATE_AC, wire.ASSOCIATE_RJ):
            raise self._lost(wire.unexpected(kind))
        try:
            refused = wire.rejection(pdu) if kind == wire.ASSOCIATE_RJ else ""
            limit, syntaxes = (0, {}) if refused else wire.accepted(pdu)
        except Exception as error:  # the decoder raises whatever a hostile PDU makes it raise
            raise self._lost("answered the association request with something that is not DICOM") from error
        if refused:
            raise self._lost(refused)
        for context_id, syntax in syntaxes.items():
            abstract, offered = proposed.get(context_id, ("", ()))
            if syntax in offered:
                self._contexts[abstract, syntax] = context_id
        # The peer's limit counts the PDV header of six bytes (PS3.8 §D.1.1); all fragments but the last are even (§E.2).
        self._max_fragment = max((min(limit or _MAX_PDU_SENT, _MAX_PDU_SENT) - 6) // 2 * 2, 2)

    def echo(self) -> Response:
        """C-ECHO (PS3.7 §9.1.5)."""
        context_id = self.context(VERIFICATION, NATIVE)
        if context_id is None:
            raise self._lost("does not accept the Verification SOP Class")
        deadline = time.monotonic() + self._peer.timeout_s
        self._send(context_id, wire.C_ECHO, deadline, sop_class_uid=VERIFICATION)
        return self._response(wire.C_ECHO, deadline)[0]

    def store(self, item: EncodedObject, context_id: int) -> Response:
        """C-STORE `item` as it is encoded (PS3.7 §9.1.1); the context must be one for its syntax."""
        deadline = time.monotonic() + self._peer.timeout_s + len(item.data) / _SLOWEST_BYTES_PER_S
        self._send(
            context_id, wire.C_STORE, deadline, sop_class_uid=item.sop_class_uid, sop_instance_uid=item.sop_instance_uid, data=item.data
        )
        return self._response(wire.C_STORE, deadline)[0]

    def find(self, keys: Mapping[str, str]) -> tuple[Response, list[dict[str, str]]]:
        """Study Root C-FIND: the final response and, for each match, what it says of `keys`.

        Raises
        ------
        PeerUnavailable
            The association ended, or the answers did not: more than 64, or longer than the peer's time.
        """
        context_id = self.context(STUDY_ROOT_FIND, NATIVE)
        if context_id is None:
            raise self._lost("does not accept Study Root C-FIND")
        is_implicit = self._contexts.get((STUDY_ROOT_FIND, NATIVE[0])) != context_id
        identifier = Dataset()
        for keyword, value in keys.items():
            setattr(identifier, keyword, value)
        encoded = encode(identifier, is_implicit, True) or b""
        to = audit.Party(self._peer.ae_title, self._peer.host)
        with audit.asking(to, encoded, of=STUDY_ROOT_FIND, syntax=NATIVE[is_implicit]):
            return self._found(context_id, encoded, keys, is_implicit=is_implicit)

    def _found(
        self, context_id: int, encoded: bytes, keys: Mapping[str, str], *, is_implicit: bool
    ) -> tuple[Response, list[dict[str, str]]]:
        deadline = time.monotonic() + self._peer.timeout_s
        self._send(context_id, wire.C_FIND, deadline, sop_class_uid=STUDY_ROOT_FIND, data=encoded)
        matches: list[dict[str, str]] = []
        while True:
            response, data = self._response(wire.C_FIND, deadline)
            if response.status not in _PENDING:
                return response, matches
            if len(matches) == _MAX_ANSWERS:
                raise self._lost(f"gave more than {_MAX_ANSWERS} answers to a query for one object")
            try:
                match = decode(BytesIO(data), is_implicit, True)
                matches.append({keyword: str(match.get(keyword) or "").strip() for keyword in keys})
            except Exception as error:  # pydicom raises whatever hostile bytes make it raise
                raise self._lost("answered a query with something that cannot be decoded") from error

    def normalized(self, field: int, sop_class_uid: str, sop_instance_uid: str, type_id: int, *, data: bytes, context_id: int) -> Response:
        """N-ACTION or N-EVENT-REPORT (PS3.7 §10.1.4, §10.1.1); `data` is the Action or Event Information, encoded for the context."""
        deadline = time.monotonic() + self._peer.timeout_s
        self._send(
            context_id,
            field,
            deadline,
            sop_class_uid=sop_class_uid,
            sop_instance_uid=sop_instance_uid,
            data=data,
            type_id=type_id,
        )
        return self._response(field, deadline)[0]

    def release(self) -> None:
        """Say goodbye (PS3.8 §7.2). Nothing that goes wrong here changes an answer already given."""
        if self._sock is None:
            return
        deadline = time.monotonic() + min(_GOODBYE_S, self._peer.timeout_s)
        with contextlib.suppress(PeerUnavailable):
            self._write(wire.RELEASE_RQ_PDU, deadline)
            while (kind := self._read_pdu(deadline)[0]) != wire.RELEASE_RP:
                if kind == wire.RELEASE_RQ:  # both sides at once: PS3.8 §7.2.2.7
                    self._write(wire.RELEASE_RP_PDU, deadline)
        self._close()

    def abort(self) -> None:
        """Send an A-ABORT if that is possible at once, and close."""
        if self._sock is None:
            return
        with contextlib.suppress(OSError):
            self._sock.settimeout(0)
            self._sock.send(wire.ABORT_PDU)
        self._close()

    def _close(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def _lost(self, reason: str) -> PeerUnavailable:
        self.abort()
        return PeerUnavailable(f"{self._peer.name} {reason}.")

    def _send(
        self,
        context_id: int,
        field: int,
        deadline: float,
        *,
        sop_class_uid: str,
        sop_instance_uid: str = "",
        data: bytes | memoryview = b"",
        type_id: int = 0,
    ) -> None:
        """Send one request; a small one, command and data, leaves in one packet."""
        self._message_id = self._message_id % 0xFFFF + 1
        command = wire.command_set(
            field,
            sop_class_uid=sop_class_uid,
            message_id=self._message_id,
            sop_instance_uid=sop_instance_uid,
            type_id=type_id,
        )
        ready = bytearray()
        for pdu in wire.data_pdus(context_id, command, data, max_fragment=self._max_fragment):
            ready += pdu
            if len(ready) >= _MAX_PDU_SENT:
                self._write(ready, deadline)
                ready.clear()
        self._write(ready, deadline)

    def _response(self, field: int, deadline: float) -> tuple[Response, bytes]:
        """Read one message, which must be a response to the request just sent."""
        encoded, data = bytearray(), bytearray()
        command: wire.Command | None = None
        while True:
            for control, fragment in self._read_fragments(deadline):
                (encoded if control & 1 else data).extend(fragment)
                if len(encoded) + len(data) > _MAX_MESSAGE:
                    raise self._lost(f"sent a response of more than {_MAX_MESSAGE} bytes")
                if control & 3 == 3:
                    command = wire.read_command(bytes(encoded))
                    if command.field != field | 0x8000 or command.responds_to != self._message_id or command.status is None:
                        raise self._lost("sent something that does not answer the request")
                if control & 2 and command and command.status is not None and (not control & 1 or not command.has_data_set):
                    return Response(command.status, command.offending), bytes(data)

    def _read_fragments(self, deadline: float) -> list[tuple[int, bytes]]:
        kind, pdu = self._read_pdu(deadline)
        if kind != wire.P_DATA:
            raise self._lost(wire.unexpected(kind))
        try:
            return wire.fragments(pdu)
        except ValueError as error:
            raise self._lost("sent a PDU whose lengths do not fit") from error

    def _read_pdu(self, deadline: float) -> tuple[int, bytes]:
        header = self._read(6, deadline)
        kind, length = header[0], int.from_bytes(header[2:])
        if not wire.ASSOCIATE_AC <= kind <= wire.ABORT:
            raise self._lost("sent something that is not DICOM")
        # Some peers count the six bytes of header in, some do not.
        if length > _MAX_PDU_RECEIVED + 6:
            raise self._lost(f"sent a PDU of {length} bytes where {_MAX_PDU_RECEIVED} were agreed")
        return kind, header + self._read(length, deadline)

    def _read(self, count: int, deadline: float) -> bytes:
        taken = bytearray()
        while len(taken) < count:
            try:
                piece = self._socket(deadline).recv(count - len(taken))
            except OSError as error:
                raise self._broken(error) from error
            if not piece:
                raise self._lost("closed the connection")
            taken += piece
        return bytes(taken)

    def _write(self, data: bytes | bytearray, deadline: float) -> None:
        rest = memoryview(data)
        try:
            while rest:  # `sendall` of a TLS socket gives each record the whole time anew
                rest = rest[self._socket(deadline).send(rest) :]
        except OSError as error:
            raise self._broken(self._refusal(deadline) or error) from error

    def _refusal(self, deadline: float) -> OSError | None:
        """What a peer said before it closed: in TLS 1.3 our certificate is judged after the handshake, and we may be writing by then."""
        if isinstance(self._sock, ssl.SSLSocket):
            try:
                self._socket(deadline).recv(1)
            except OSError as error:
                return error
        return None

    def _socket(self, deadline: float) -> socket.socket:
        """Return the socket with what is left of the time."""
        if self._sock is None:
            raise PeerUnavailable(f"The association with {self._peer.name} is closed.")
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        self._sock.settimeout(left_s)
        return self._sock

    def _broken(self, error: OSError) -> PeerUnavailable:
        if isinstance(error, TimeoutError):
            return self._lost(f"did not answer within {self._peer.timeout_s:g} s")
        return self._lost(f"broke the connection: {cause_of(error)}")
