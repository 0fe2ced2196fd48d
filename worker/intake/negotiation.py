"""Who may open an association, and on what contexts: A-ASSOCIATE in, accept or reject out (PS3.8 §9.3.2 to 9.3.4).

Own code, held against pynetdicom's classes in tests: those take 42 ms for the 128 contexts storescu
proposes, this 2 ms, and a PACS that opens an association an image pays it each time. Hostile bytes end in one error.

Not here: sockets (wire.py), limits on how many (scp.py).
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from pydicom._uid_dict import UID_dictionary

from worker.intake.wire import ASSOCIATE_AC, ASSOCIATE_RJ, ProtocolError
from worker.store.spool import IMPLEMENTATION_CLASS_UID

VERIFICATION: Final = "1.2.840.10008.1.1"
STORAGE_COMMITMENT: Final = "1.2.840.10008.1.20.1"
_APPLICATION_CONTEXT: Final = "1.2.840.10008.3.1.1.1"  # PS3.7 Annex A.2.1
_IMPLEMENTATION_VERSION: Final = "SYNOPTIC"

_ROOT = "1.2.840.10008.5.1.4.1.1."
#: Every storage SOP class of the patient's composite objects DICOM ever had, retired ones included (PS3.6
#: Annex A). Not protocols and inventories (.200, .201), which have no patient and no study.
STORAGE_SOP_CLASSES: Final = frozenset(
    uid
    for uid, (name, kind, _, _, _) in UID_dictionary.items()
    if kind == "SOP Class" and "Storage" in name and uid.startswith(_ROOT) and not uid.startswith((_ROOT + "200.", _ROOT + "201."))
) | {
    _ROOT + "9.100.1",  # Waveform Presentation State: younger than pydicom 3.0.2, as are the next three
    _ROOT + "9.100.2",  # Waveform Acquisition Presentation State
    _ROOT + "66.7",  # Label Map Segmentation
    _ROOT + "66.8",  # Height Map Segmentation
    "1.2.840.10008.5.1.4.34.7",  # RT Beams Delivery Instruction
    "1.2.840.10008.5.1.4.34.10",  # RT Brachy Application Setup Delivery Instruction
}

#: What a decoder of ours reads (PS3.5 Annex A). Never Deflated (a bomb of 816 KB made 1.65 GB) nor Big Endian.
TRANSFER_SYNTAXES: Final = (
    "1.2.840.10008.1.2",  # Implicit VR Little Endian
    "1.2.840.10008.1.2.1",  # Explicit VR Little Endian
    "1.2.840.10008.1.2.4.50",  # JPEG Baseline
    "1.2.840.10008.1.2.4.51",  # JPEG Extended
    "1.2.840.10008.1.2.4.57",  # JPEG Lossless
    "1.2.840.10008.1.2.4.70",  # JPEG Lossless, first-order prediction
    "1.2.840.10008.1.2.4.80",  # JPEG-LS Lossless
    "1.2.840.10008.1.2.4.81",  # JPEG-LS Near-lossless
    "1.2.840.10008.1.2.4.90",  # JPEG 2000 Lossless
    "1.2.840.10008.1.2.4.91",  # JPEG 2000
    "1.2.840.10008.1.2.4.201",  # High-Throughput JPEG 2000 Lossless
    "1.2.840.10008.1.2.4.202",  # the same, with RPCL options
    "1.2.840.10008.1.2.4.203",  # High-Throughput JPEG 2000
    "1.2.840.10008.1.2.5",  # RLE Lossless
)

#: Data sets that are no images come in one of these.
_NATIVE: Final = frozenset(TRANSFER_SYNTAXES[:2])

#: 128 contexts of 14 transfer syntaxes fill 64 KB; nothing honest comes near.
MAX_REQUEST_BYTES: Final = 256 * 1024
_MAX_CONTEXTS: Final = 128  # odd numbers of one byte

# PS3.8 Table 9-21: (result, source, reason).
BAD_APPLICATION_CONTEXT, UNKNOWN_CALLING, UNKNOWN_CALLED = (1, 1, 2), (1, 1, 3), (1, 1, 7)
BAD_VERSION: Final = (1, 2, 2)
LOCAL_LIMIT: Final = (2, 3, 2)  # transient: come again

# PS3.8 Table 9-18: results of one context.
_ACCEPTED, _NO_ABSTRACT_SYNTAX, _NO_TRANSFER_SYNTAX = 0, 3, 4


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is on the other end, as it says (`calling_ae`) and as the network says (`address`)."""

    calling_ae: str
    called_ae: str
    address: str


@dataclass(frozen=True, slots=True)
class Context:
    """One accepted presentation context."""

    sop_class_uid: str
    transfer_syntax_uid: str


@dataclass(frozen=True, slots=True)
class Accepted:
    """An association and the PDU that says so; `max_length` is the peer's, 0 for no limit."""

    peer: Peer
    contexts: Mapping[int, Context]
    max_length: int
    reply: bytes


@dataclass(frozen=True, slots=True)
class Rejected:
    """No association, the PDU that says so, and why."""

    peer: Peer
    reply: bytes
    reason: str


class Policy:
    """The rules of one receiver.

    Parameters
    ----------
    calling
        Calling AE title → addresses or networks it may call from ("10.1.2.0/24", "::1"). "*"
        stands for any AE title. An AE title alone is no authentication: a peer must match both,
        and an empty mapping lets nobody in.
    accepts_unknown
        Also take SOP classes that are in no table: private ones, and those younger than pydicom.
    takes_commitments
        Accept Storage Commitment from a caller that proposes itself as its SCP: an archive that reports on what we sent it.
    commits_to
        Calling AE titles from which it is accepted as SCU: they may ask us to commit to what they sent. "*" as above.
    """

    def __init__(
        self,
        *,
        ae_title: str,
        calling: Mapping[str, Sequence[str]],
        max_pdu: int,
        accepts_unknown: bool = False,
        takes_commitments: bool = False,
        commits_to: Collection[str] = (),
        transfer_syntaxes: Collection[str] = TRANSFER_SYNTAXES,
    ) -> None:
        self.ae_title = ae_title
        self.max_pdu = max_pdu
        self._calling = {
            title: [ipaddress.ip_network(network, strict=False) for network in networks] for title, networks in calling.items()
        }
        self._accepts_unknown = accepts_unknown
        self._takes_commitments = takes_commitments
        self._commits_to = frozenset(commits_to)
        self._transfer_syntaxes = frozenset(transfer_syntaxes)

    def negotiate(self, body: bytes, address: str, *, has_room: Callable[[], bool]) -> Accepted | Rejected:
        """Answer the body of an A-ASSOCIATE-RQ; raises ProtocolError if it is not one. Room is asked for once it is known who calls."""
        try:
            return self._negotiate(_Request(body), address, has_room)
        except (struct.error, IndexError, UnicodeDecodeError):
            raise ProtocolError("The association request cannot be read.") from None

    def _negotiate(self, request: _Request, address: str, has_room: Callable[[], bool]) -> Accepted | Rejected:
        peer = Peer(request.calling_ae, request.called_ae, address)
        if not request.version & 1:
            return _rejected(peer, BAD_VERSION, "protocol version not supported")
        if request.application_context != _APPLICATION_CONTEXT:
            return _rejected(peer, BAD_APPLICATION_CONTEXT, "application context not supported")
        if request.called_ae != self.ae_title:
            return _rejected(peer, UNKNOWN_CALLED, "called AE title not recognized")
        if not self._may_call(request.calling_ae, address):
            return _rejected(peer, UNKNOWN_CALLING, "calling AE title not recognized from this address")
        if not has_room():
            return _rejected(peer, LOCAL_LIMIT, "local limit exceeded")
        contexts = {number: self._choose(request, sop_class_uid, syntaxes) for number, sop_class_uid, syntaxes in request.contexts}
        items = b"".join(_context_item(number, result) for number, result in contexts.items())
        user = _item(0x51, struct.pack(">L", self.max_pdu)) + _item(0x52, IMPLEMENTATION_CLASS_UID.encode())
        is_agreed = any(isinstance(one, Context) and one.sop_class_uid == STORAGE_COMMITMENT for one in contexts.values())
        if is_agreed and STORAGE_COMMITMENT in request.roles:
            roles = bytes(self._commitment_roles(request))
            user += _item(0x54, struct.pack(">H", len(STORAGE_COMMITMENT)) + STORAGE_COMMITMENT.encode() + roles)
        user += _item(0x55, _IMPLEMENTATION_VERSION.encode())
        # PS3.8 Table 9-17: the peer's own title fields come back as they were.
        reply = struct.pack(">HH", 1, 0) + request.titles + _item(0x10, _APPLICATION_CONTEXT.encode()) + items + _item(0x50, user)
        accepted = {number: result for number, result in contexts.items() if isinstance(result, Context)}
        return Accepted(peer, accepted, request.max_length, pdu(ASSOCIATE_AC, reply))

    def _choose(self, request: _Request, sop_class_uid: str, syntaxes: Sequence[str]) -> Context | int:
        """Return the context agreed, or the reason for none."""
        is_commitment = sop_class_uid == STORAGE_COMMITMENT
        takes = any(self._commitment_roles(request)) if is_commitment else self._takes(sop_class_uid)
        if not takes:
            return _NO_ABSTRACT_SYNTAX
        for syntax in syntaxes:
            # The proposer's order is its preference, and spares it a conversion.
            if syntax in (_NATIVE if is_commitment else self._transfer_syntaxes):
                return Context(sop_class_uid, syntax)
        return _NO_TRANSFER_SYNTAX

    def _commitment_roles(self, request: _Request) -> tuple[bool, bool]:
        """Whether the caller is SCU of Storage Commitment (asks us), and SCP (reports to us); PS3.7 §D.3.3.4: without a word of it, SCU."""
        asks, reports = request.roles.get(STORAGE_COMMITMENT, (True, False))
        return asks and not self._commits_to.isdisjoint((request.calling_ae, "*")), reports and self._takes_commitments

    def _takes(self, sop_class_uid: str) -> bool:
        if sop_class_uid == VERIFICATION or sop_class_uid in STORAGE_SOP_CLASSES:
            return True
        return self._accepts_unknown and sop_class_uid not in UID_dictionary

    def _may_call(self, calling_ae: str, address: str) -> bool:
        networks = self._calling.get(calling_ae, ()) or self._calling.get("*", ())
        ip = ipaddress.ip_address(address.partition("%")[0])
        if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped:
            ip = ip.ipv4_mapped
        return any(ip in network for network in networks)


class _Request:
    """The fields of an A-ASSOCIATE-RQ (PS3.8 Table 9-11, PS3.7 Annex D.3.3)."""

    def __init__(self, body: bytes) -> None:
        version, self.titles = struct.unpack_from(">Hxx64s", body)
        self.version: int = version
        self.called_ae = _title(self.titles[:16])
        self.calling_ae = _title(self.titles[16:32])
        self.application_context = ""
        self.max_length = 0
        #: Of which classes the caller would be SCU, and SCP (PS3.7 §D.3.3.4).
        self.roles: dict[str, tuple[bool, bool]] = {}
        self.contexts: list[tuple[int, str, list[str]]] = []
        for kind, value in _items(body, 68):
            if kind == 0x10:
                self.application_context = _uid(value)
            elif kind == 0x20:
                self._add_context(value)
            elif kind == 0x50:
                for sub_kind, sub_value in _items(value, 0):
                    if sub_kind == 0x51:
                        self.max_length = struct.unpack(">L", sub_value)[0]
                    elif sub_kind == 0x54:
                        self.roles[_uid(sub_value[2:-2])] = sub_value[-2] == 1, sub_value[-1] == 1

    def _add_context(self, value: bytes) -> None:
        number, abstract, syntaxes = value[0], "", []
        for kind, name in _items(value, 4):
            if kind == 0x30:
                abstract = _uid(name)
            elif kind == 0x40:
                syntaxes.append(_uid(name))
        if number % 2 == 0 or len(self.contexts) >= _MAX_CONTEXTS or any(number == known for known, _, _ in self.contexts):
            raise ProtocolError("The association request numbers its contexts wrongly.")
        self.contexts.append((number, abstract, syntaxes))


def pdu(kind: int, body: bytes) -> bytes:
    """Return a whole PDU."""
    return struct.pack(">BxL", kind, len(body)) + body


def _context_item(number: int, result: Context | int) -> bytes:
    # PS3.8 Table 9-18; of a refused context the transfer syntax means nothing, but must be there.
    code, syntax = (_ACCEPTED, result.transfer_syntax_uid) if isinstance(result, Context) else (result, TRANSFER_SYNTAXES[0])
    return _item(0x21, bytes((number, 0, code, 0)) + _item(0x40, syntax.encode()))


def _rejected(peer: Peer, codes: tuple[int, int, int], reason: str) -> Rejected:
    return Rejected(peer, pdu(ASSOCIATE_RJ, bytes((0, *codes))), reason)


def _items(data: bytes, position: int) -> Iterator[tuple[int, bytes]]:
    while position < len(data):
        kind, length = struct.unpack_from(">BxH", data, position)
        position += 4
        if length > len(data) - position:
            raise ProtocolError("The association request holds an item that does not fit.")
        yield kind, data[position : position + length]
        position += length


def _item(kind: int, value: bytes) -> bytes:
    return struct.pack(">BxH", kind, len(value)) + value


def _uid(value: bytes) -> str:
    # Some pad UIDs of items too, though PS3.8 Annex F says not to.
    return value.decode("ascii").rstrip("\0 ")


def _title(field: bytes) -> str:
    text = field.decode("latin-1").strip(" \0")
    # Only printable ASCII reaches the log.
    return "".join(character if " " <= character <= "~" else "?" for character in text)
