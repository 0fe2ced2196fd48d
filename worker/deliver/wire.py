"""The bytes of an association as SCU: PDUs, command sets, a DICOM file taken apart. No socket here.

References: PS3.7 §6.3 and §E.1 (command sets), PS3.8 §9.3 (PDUs), PS3.10 §7.1 (file meta information).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Final

from pydicom.filereader import read_dataset, read_preamble
from pydicom.tag import BaseTag
from pydicom.uid import UID
from pynetdicom import PYNETDICOM_IMPLEMENTATION_UID, PYNETDICOM_IMPLEMENTATION_VERSION
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RJ, A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import (
    A_ASSOCIATE,
    ImplementationClassUIDNotification,
    ImplementationVersionNameNotification,
    MaximumLengthNotification,
)
from pynetdicom.presentation import build_context, build_role

# PS3.8 §9.3.1
ASSOCIATE_AC, ASSOCIATE_RJ, P_DATA, RELEASE_RQ, RELEASE_RP, ABORT = 2, 3, 4, 5, 6, 7
RELEASE_RQ_PDU: Final = bytes((RELEASE_RQ, 0, 0, 0, 0, 4, 0, 0, 0, 0))
RELEASE_RP_PDU: Final = bytes((RELEASE_RP, 0, 0, 0, 0, 4, 0, 0, 0, 0))
ABORT_PDU: Final = bytes((ABORT, 0, 0, 0, 0, 4, 0, 0, 0, 0))
#: Length of an A-ASSOCIATE PDU's fixed part, PS3.8 Table 9-17.
_ASSOCIATE_FIXED: Final = 74
# PS3.7 Table E.1-1: command fields and the value that says "no data set".
C_STORE, C_FIND, C_ECHO, N_EVENT_REPORT, N_ACTION = 0x0001, 0x0020, 0x0030, 0x0100, 0x0130
_NO_DATA_SET: Final = 0x0101


@dataclass(frozen=True, slots=True)
class EncodedObject:
    """A SOP instance as it travels: the data set of a DICOM file without its file meta information."""

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    data: memoryview


@dataclass(frozen=True, slots=True)
class Response:
    """The status of a response (PS3.7 Annex C) and the elements it blames, as ``(gggg,eeee)``."""

    status: int
    offending: tuple[str, ...] = ()


def open_file(file: bytes) -> EncodedObject:
    """Take a DICOM file apart without decoding its data set (PS3.10 §7.1)."""
    stream = BytesIO(file)
    read_preamble(stream, False)
    meta = read_dataset(stream, False, True, stop_when=_is_past_file_meta)
    return EncodedObject(
        sop_class_uid=str(meta.MediaStorageSOPClassUID),
        sop_instance_uid=str(meta.MediaStorageSOPInstanceUID),
        transfer_syntax_uid=str(meta.TransferSyntaxUID),
        data=memoryview(file)[stream.tell() :],
    )


def request_pdu(
    *, called: str, calling: str, proposals: Mapping[int, tuple[str, Sequence[str]]], max_pdu: int, scp_of: Sequence[str] = ()
) -> bytes:
    """Encode an A-ASSOCIATE-RQ; `proposals`: context ID → abstract syntax, transfer syntaxes (PS3.8 §9.3.2); `scp_of`: PS3.7 §D.3.3.4."""
    length = MaximumLengthNotification()
    length.maximum_length_received = max_pdu
    implementation = ImplementationClassUIDNotification()
    implementation.implementation_class_uid = PYNETDICOM_IMPLEMENTATION_UID
    version = ImplementationVersionNameNotification()
    version.implementation_version_name = PYNETDICOM_IMPLEMENTATION_VERSION
    primitive = A_ASSOCIATE()
    primitive.application_context_name = UID("1.2.840.10008.3.1.1.1")  # PS3.7 §A.2.1
    primitive.calling_ae_title = calling
    primitive.called_ae_title = called
    contexts = []
    for context_id, (abstract, syntaxes) in proposals.items():
        context = build_context(abstract, list(syntaxes))
        context.context_id = context_id
        contexts.append(context)
    primitive.presentation_context_definition_list = contexts
    primitive.user_information = [length, implementation, version, *(build_role(uid, scp_role=True) for uid in scp_of)]
    pdu = A_ASSOCIATE_RQ()
    pdu.from_primitive(primitive)
    return pdu.encode()


def accepted(pdu: bytes) -> tuple[int, dict[int, str]]:
    """Return an A-ASSOCIATE-AC's limit on PDUs (0: none) and its accepted contexts' transfer syntaxes.

    Raises
    ------
    ValueError
        The PDU is shorter than its fixed part. The decoder raises others of its own.
    """
    if len(pdu) < _ASSOCIATE_FIXED:
        raise ValueError("An A-ASSOCIATE-AC PDU ends within its fixed part.")
    answer = A_ASSOCIATE_AC()
    answer.decode(pdu)
    primitive = answer.to_primitive()
    results = primitive.presentation_context_definition_results_list
    syntaxes = {cx.context_id or 0: str(cx.transfer_syntax[0]) for cx in results if cx.result == 0}
    return primitive.maximum_length_received or 0, syntaxes


def rejection(pdu: bytes) -> str:
    """Say what an A-ASSOCIATE-RJ means (PS3.8 §9.3.4)."""
    answer = A_ASSOCIATE_RJ()
    answer.decode(pdu)
    how = "permanently" if answer.result == 1 else "for now"
    return f"rejects the association {how}: {answer.reason_str}"


def unexpected(kind: int) -> str:
    """Say what a PDU of this type means where another was due."""
    if kind == ABORT:
        return "aborted the association"
    return "released the association" if kind == RELEASE_RQ else f"sent a PDU of type {kind} out of turn"


def data_pdus(context_id: int, command: bytes, data: bytes | memoryview, *, max_fragment: int) -> Iterator[bytes]:
    """Yield a message as P-DATA-TF PDUs of one fragment each (PS3.8 §9.3.5, §E.2)."""
    for is_command, part in ((1, memoryview(command)), (0, memoryview(data))):
        for start in range(0, len(part), max_fragment):
            fragment = part[start : start + max_fragment]
            is_last = 2 if start + len(fragment) == len(part) else 0
            header = struct.pack(">BxIIBB", P_DATA, len(fragment) + 6, len(fragment) + 2, context_id, is_last | is_command)
            yield header + fragment


def fragments(pdu: bytes) -> list[tuple[int, bytes]]:
    """Take a P-DATA-TF PDU apart: (message control header, fragment) each.

    Raises
    ------
    ValueError
        The lengths within do not fit.
    """
    found, position = [], 6
    while position < len(pdu):
        length = int.from_bytes(pdu[position : position + 4])
        if length < 2 or position + 4 + length > len(pdu):
            raise ValueError("The lengths within a P-DATA-TF PDU do not fit.")
        found.append((pdu[position + 5], pdu[position + 6 : position + 4 + length]))
        position += 4 + length
    return found


def command_set(field: int, *, sop_class_uid: str, message_id: int, sop_instance_uid: str = "", type_id: int = 0) -> bytes:
    """Encode a request's command set: Implicit VR Little Endian, ascending (PS3.7 §6.3, §9.3, §10.3)."""
    has_data_set = field != C_ECHO
    # N-ACTION names what it requests, the others what they affect.
    class_element, instance_element = (0x0003, 0x1001) if field == N_ACTION else (0x0002, 0x1000)
    body = _element(class_element, _uid(sop_class_uid)) + _element(0x0100, _short(field)) + _element(0x0110, _short(message_id))
    if has_data_set and field not in (N_ACTION, N_EVENT_REPORT):
        body += _element(0x0700, _short(0))  # Priority: medium
    body += _element(0x0800, _short(1 if has_data_set else _NO_DATA_SET))
    if sop_instance_uid:
        body += _element(instance_element, _uid(sop_instance_uid))
    if type_id:
        body += _element(0x1008 if field == N_ACTION else 0x1002, _short(type_id))
    return _element(0x0000, struct.pack("<I", len(body))) + body


@dataclass(frozen=True, slots=True)
class Command:
    """What matters of a response's command set; None where it is not there."""

    field: int | None
    responds_to: int | None
    status: int | None
    has_data_set: bool
    offending: tuple[str, ...]


def read_command(encoded: bytes) -> Command:
    """Take a response's command set apart. Garbage gives a command without content, never an error."""
    elements: dict[int, bytes] = {}
    position = 0
    while position + 8 <= len(encoded):
        group, number, length = struct.unpack_from("<HHI", encoded, position)
        if group == 0:
            elements[number] = encoded[position + 8 : position + 8 + length]
        position += 8 + length
    tags = elements.get(0x0901, b"")
    return Command(
        field=_number(elements.get(0x0100)),
        responds_to=_number(elements.get(0x0120)),
        status=_number(elements.get(0x0900)),
        has_data_set=_number(elements.get(0x0800)) != _NO_DATA_SET,
        offending=tuple(f"({group:04X},{number:04X})" for group, number in struct.iter_unpack("<HH", tags[: len(tags) // 4 * 4])),
    )


def _element(number: int, value: bytes) -> bytes:
    return struct.pack("<HHI", 0, number, len(value)) + value


def _short(value: int) -> bytes:
    return struct.pack("<H", value)


def _uid(uid: str) -> bytes:
    value = uid.encode("ascii")
    return value + b"\0" * (len(value) % 2)


def _number(value: bytes | None) -> int | None:
    return int.from_bytes(value, "little") if value is not None and len(value) == 2 else None


def _is_past_file_meta(tag: BaseTag, _vr: str | None, _length: int) -> bool:
    return tag.group != 2
