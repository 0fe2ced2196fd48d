"""Command sets (PS3.7 §6.3.1): a handful of elements, always implicit VR little endian.

Not here: data sets (header.py) and what a command makes happen (dataphase.py).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

# PS3.7 Annex E.1: command fields. A response is its request with the high bit set.
C_STORE_RQ, C_ECHO_RQ, N_EVENT_REPORT_RQ, N_ACTION_RQ, C_CANCEL_RQ = 0x0001, 0x0030, 0x0100, 0x0130, 0x0FFF
RESPONSE: Final = 0x8000

# PS3.7 Annex C: statuses of every service.
SUCCESS, INVALID_INSTANCE, CLASS_NOT_SUPPORTED, PROCESSING_FAILURE, UNRECOGNIZED_OPERATION = 0x0000, 0x0117, 0x0122, 0x0110, 0x0211
# Of N-EVENT-REPORT and N-ACTION, PS3.7 §10.1.1.1.8 and §10.1.4.1.10.
NO_SUCH_INSTANCE, NO_SUCH_EVENT, INVALID_ARGUMENT, NO_SUCH_ACTION, RESOURCE_LIMITATION = 0x0112, 0x0113, 0x0115, 0x0123, 0x0213

#: PS3.7 §9.3: the value of Command Data Set Type that says none follows.
NO_DATA_SET: Final = 0x0101

_CLASS, _FIELD, _MESSAGE_ID, _RESPONDED, _DATA_SET = 0x0002, 0x0100, 0x0110, 0x0120, 0x0800
_STATUS, _COMMENT, _INSTANCE, _EVENT_TYPE = 0x0900, 0x0902, 0x1000, 0x1002
# N-ACTION says what it requests where others say what they affect.
_REQUESTED_CLASS, _REQUESTED_INSTANCE, _ACTION_TYPE = 0x0003, 0x1001, 0x1008


@dataclass(frozen=True, slots=True)
class Command:
    """What we read of a request's command set."""

    field: int
    message_id: int
    has_data_set: bool
    sop_class_uid: str
    sop_instance_uid: str
    #: Of the event or the action.
    type_id: int = 0


def decode(data: bytes) -> Command:
    """Read a command set; raises ValueError if it is not one."""
    values: dict[int, bytes] = {}
    position = 0
    while position < len(data):
        if len(data) - position < 8:
            raise ValueError("A command set ends in the middle of an element.")
        group, element, length = struct.unpack_from("<HHL", data, position)
        position += 8
        if group != 0 or length > len(data) - position:
            raise ValueError("A command set holds an element that does not belong there or does not fit.")
        values[element] = data[position : position + length]
        position += length
    return Command(
        field=_number(values, _FIELD),
        # Responses, which we never asked for, and C-CANCEL have none of their own.
        message_id=_number(values, _MESSAGE_ID) if _MESSAGE_ID in values else _number(values, _RESPONDED),
        has_data_set=_number(values, _DATA_SET) != NO_DATA_SET,
        sop_class_uid=_text(values, _CLASS) or _text(values, _REQUESTED_CLASS),
        sop_instance_uid=_text(values, _INSTANCE) or _text(values, _REQUESTED_INSTANCE),
        type_id=next((_number(values, element) for element in (_EVENT_TYPE, _ACTION_TYPE) if element in values), 0),
    )


def encode_response(command: Command, status: int, comment: str = "") -> bytes:
    """Return the command set that answers `command`; `comment` is ASCII, at most 64 characters."""
    body = _element(_CLASS, command.sop_class_uid) if command.sop_class_uid else b""
    body += _us(_FIELD, command.field | RESPONSE) + _us(_RESPONDED, command.message_id) + _us(_DATA_SET, NO_DATA_SET) + _us(_STATUS, status)
    if comment:
        body += _element(_COMMENT, comment[:64], pad=b" ")
    if command.sop_instance_uid:
        body += _element(_INSTANCE, command.sop_instance_uid)
    return struct.pack("<HHLL", 0, 0, 4, len(body)) + body


def _number(values: dict[int, bytes], element: int) -> int:
    value = values.get(element, b"")
    if len(value) != 2:
        raise ValueError(f"Command element (0000,{element:04X}) is missing or not one US.")
    return int.from_bytes(value, "little")


def _text(values: dict[int, bytes], element: int) -> str:
    return values.get(element, b"").decode("latin-1").rstrip("\0 ")


def _us(element: int, value: int) -> bytes:
    return struct.pack("<HHLH", 0, element, 2, value)


def _element(element: int, value: str, *, pad: bytes = b"\0") -> bytes:
    encoded = value.encode("latin-1")
    encoded += pad * (len(encoded) % 2)
    return struct.pack("<HHL", 0, element, len(encoded)) + encoded
