"""Any file as a sender would send it: its bytes behind the file meta, its UIDs, its transfer syntax, however broken it is.

Own code, and lenient where pydicom raises: these files are to reach the receiver as they are. Not here: judging them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from tests.scu import CT, EXPLICIT, IMPLICIT
from worker.domain import Header, Instance
from worker.intake.header import is_uid, read_header
from worker.store.spool import Spool

_CLASS, _INSTANCE, _SYNTAX = 0x00020002, 0x00020003, 0x00020010
_LONG: Final = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())


@dataclass(frozen=True, slots=True)
class Sendable:
    """What one C-STORE needs; a UID is '' where the file has none that is one."""

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    data: bytes
    has_prefix: bool

    def plausible(self, number: int) -> Sendable:
        """Fill in what is missing, so that the data set can be sent."""
        return replace(
            self, sop_class_uid=self.sop_class_uid or CT, sop_instance_uid=self.sop_instance_uid or f"2.25.{number + 1}",
            transfer_syntax_uid=self.transfer_syntax_uid or _encoding(self.data),
        )  # fmt: skip


def sendable(raw: bytes) -> Sendable:
    """Part a file into its file meta (PS3.10 §7.1), as far as it can be read, and what follows."""
    has_prefix = raw[128:132] == b"DICM"
    found, at = _meta(raw, 132) if has_prefix else ({}, 0)
    data = raw[at:]
    if not has_prefix:
        found = {_SYNTAX: _encoding(data)}
    for tag, wanted in ((0x0016, _CLASS), (0x0018, _INSTANCE)):
        found.setdefault(wanted, _early(data, tag, is_implicit=_encoding(data) == IMPLICIT))
    uids = [uid if is_uid(uid := found.get(tag, "")) else "" for tag in (_CLASS, _INSTANCE, _SYNTAX)]
    return Sendable(uids[0], uids[1], uids[2], data, has_prefix)


def _meta(raw: bytes, at: int) -> tuple[dict[int, str], int]:
    found: dict[int, str] = {}
    while len(raw) >= at + 12 and raw[at : at + 2] == b"\x02\x00":
        group, number, vr, length = struct.unpack_from("<HH2sH", raw, at)
        if is_long := vr in _LONG:
            (length,) = struct.unpack_from("<L", raw, at + 8)
        begin = at + (12 if is_long else 8)
        if begin + length > len(raw):
            break
        found[group << 16 | number] = raw[begin : begin + length].decode("latin-1").rstrip("\0 ")
        at = begin + length
    return found, at


def _encoding(data: bytes) -> str:
    return EXPLICIT if data[4:6].isalpha() and data[4:6].isupper() else IMPLICIT


def _early(data: bytes, number: int, *, is_implicit: bool) -> str:
    """Look a UID of group 0008 up without a parser: its tag, then its length."""
    head = struct.pack("<HH", 8, number) + (b"" if is_implicit else b"UI")
    at = data[:4096].find(head) + len(head)
    if at < len(head) or at + 4 > len(data):
        return ""
    (length,) = struct.unpack_from("<H", data, at)
    begin = at + (4 if is_implicit else 2)
    return data[begin : begin + min(length, 64)].decode("latin-1").rstrip("\0 ")


def receive(one: Sendable, spool: Spool) -> tuple[Header, Instance]:
    """Do what the receiver does with a data set: read its header and write it durably; raises InstanceRefused."""
    header = read_header(one.data, one.transfer_syntax_uid)
    incoming = spool.begin(
        sop_class_uid=header.sop_class_uid, sop_instance_uid=header.sop_instance_uid, transfer_syntax_uid=one.transfer_syntax_uid
    )
    incoming.write(memoryview(one.data))
    stored = incoming.commit()
    return header, Instance(
        header.sop_instance_uid, header.sop_class_uid, one.transfer_syntax_uid, stored.path, stored.sha256, stored.size_bytes,
        frames=header.number_of_frames,
    )  # fmt: skip


def below(folder: Path) -> list[Path]:
    """Every file below a folder, in order."""
    return sorted(path for path in folder.rglob("*") if path.is_file())
