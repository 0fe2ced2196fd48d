"""HL7 v2 by MLLP to a RIS or an interface engine: one message, one acknowledgment, in this order. MSA-1 decides.

=========================  ==================================================================================
what the peer does         what becomes of the message (HL7 v2.5.1 §2.9.2, §2.13.8, tables 0008 and 0357)
=========================  ==================================================================================
AA, CA                     delivered
AE, CE                     PeerUnavailable: again later
AR, CR                     PeerRefused: sending again changes nothing; with ERR-3 206 or 207 (locked, an error within) again later
of another message         passed over where it is one that was sent before on this line, else PeerUnavailable
no acknowledgment          PeerUnavailable: again later, with the same control ID, by which the receiver knows a repetition
no connection, no TLS      PeerUnreachable
=========================  ==================================================================================

Original and enhanced acknowledgment mode are read alike, whatever else the answer holds; what it says in words may name a patient and is
not repeated. Not here: what a message says (report/oru.py), jobs (send.py).
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Final

from worker.deliver.association import Peer, connect
from worker.deliver.cstore import MAX_LOST, Outcome
from worker.domain import Document
from worker.errors import PeerRefused, PeerUnavailable, PeerUnreachable, WorkerError, cause_of

# MLLP Release 1, §2: start block, and end block with carriage return.
_START: Final = b"\x0b"
_END: Final = b"\x1c\r"
#: An acknowledgment has a few hundred bytes.
MAX_ANSWER: Final = 1 << 16
_CHUNK_BYTES: Final = 4096
#: Slowest line on which a message may still travel, as for C-STORE.
_SLOWEST_BYTES_PER_S: Final = 65536
_ACCEPTED: Final = ("AA", "CA")
_REFUSED: Final = ("AR", "CR")
_KNOWN: Final = (*_ACCEPTED, *_REFUSED, "AE", "CE")
#: Table 0357 of what is not the message's fault: application record locked, application internal error.
_PASSING: Final = ("206", "207")


def send(documents: Sequence[Document], *, peer: Peer) -> list[Outcome]:
    """Send `documents` in order over one connection, each acknowledged before the next; one outcome each, in order.

    Each exchange is bounded by ``peer.timeout_s``, and a call loses at most two connections.
    """
    outcomes: list[Outcome] = []
    lost: list[WorkerError] = []
    line: _Line | None = None
    try:
        for document in documents:
            if len(lost) >= MAX_LOST:
                outcomes.append(Outcome(document.sop_instance_uid, error=lost[-1]))
                continue
            try:
                line = line or _Line(peer)
                outcomes.append(_judged(line.exchange(document.data), document, peer=peer))
            except PeerUnavailable as error:
                lost += [error] * (MAX_LOST if isinstance(error, PeerUnreachable) else 1)
                outcomes.append(Outcome(document.sop_instance_uid, error=error))
                if line:
                    line.close()
                line = None
    finally:
        if line:
            line.close()
    return outcomes


def _judged(answer: tuple[str, str], document: Document, *, peer: Peer) -> Outcome:
    code, reason = answer
    uid, what = document.sop_instance_uid, f"{peer.name} answers {code}{f', ERR-3 {reason}' if reason else ''}"
    if code in _ACCEPTED:
        return Outcome(uid, 0)
    if code in _REFUSED and reason not in _PASSING:
        return Outcome(uid, 0, error=PeerRefused(f"{what}: it refuses the message."))
    return Outcome(uid, 0, error=PeerUnavailable(f"{what}: it cannot take the message now."))


def reach(peer: Peer) -> float:
    """Return the seconds that a connection takes, with TLS where it is wanted; HL7 has no question without consequences.

    Raises
    ------
    PeerUnreachable
        As `connect`.
    """
    started = time.perf_counter()
    with closing(connect(peer)):
        return time.perf_counter() - started


class _Line:
    """One connection, and the control IDs that were sent on it."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._sock = connect(peer)
        self._sent: set[str] = set()
        self._pending = bytearray()

    def close(self) -> None:
        self._sock.close()

    def exchange(self, message: bytes) -> tuple[str, str]:
        """Send one message and return MSA-1 of its acknowledgment, and ERR-3 (of old versions MSA-6) where there is one.

        Raises
        ------
        PeerUnavailable
            There was no acknowledgment of it; the line is of no more use.
        """
        control_id = _fields(message.partition(b"\r")[0].decode("utf-8", "replace"))[9]
        deadline = time.monotonic() + self._peer.timeout_s + len(message) / _SLOWEST_BYTES_PER_S
        try:
            self._write(_START + message + _END, deadline)
            for answer in self._frames(deadline):
                code, of, reason = _read(answer)
                if code not in _KNOWN:
                    raise PeerUnavailable(f"{self._peer.name} answers with something that is no acknowledgment.")
                if of == control_id:
                    self._sent.add(control_id)
                    return code, reason
                if of not in self._sent:
                    raise PeerUnavailable(f"{self._peer.name} acknowledges another message than the one that was sent.")
        except TimeoutError as error:
            raise PeerUnavailable(f"{self._peer.name} did not acknowledge the message within {self._peer.timeout_s:g} s.") from error
        except OSError as error:
            raise PeerUnavailable(f"{self._peer.name} broke the connection: {cause_of(error)}.") from error
        raise PeerUnavailable(f"{self._peer.name} closed the connection without an acknowledgment.")

    def _frames(self, deadline: float) -> Iterator[bytes]:
        """Yield the content of each frame until the peer ends; bytes outside are passed over, as MLLP asks. TimeoutError at `deadline`."""
        taken = len(self._pending)
        while True:
            start = self._pending.find(_START)
            end = self._pending.find(_END, start) if start >= 0 else -1
            if end >= 0:
                answer = bytes(self._pending[start + 1 : end])
                del self._pending[: end + len(_END)]
                yield answer
                continue
            if taken > MAX_ANSWER:
                raise PeerUnavailable(f"{self._peer.name} answers with more than {MAX_ANSWER} bytes.")
            chunk = self._socket(deadline).recv(_CHUNK_BYTES)
            if not chunk:
                return
            taken += len(chunk)
            self._pending += chunk

    def _write(self, data: bytes, deadline: float) -> None:
        rest = memoryview(data)
        while rest:  # `sendall` of a TLS socket gives each record the whole time anew
            rest = rest[self._socket(deadline).send(rest) :]

    def _socket(self, deadline: float) -> socket.socket:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        self._sock.settimeout(left_s)
        return self._sock


def _read(answer: bytes) -> tuple[str, str, str]:
    """MSA-1, MSA-2 and the code of ERR-3.1, else of MSA-6.1; '' for what is not there."""
    text = answer.decode("utf-8", "replace").lstrip("\ufeff\r\n ")
    separator = text[3:4] if text.startswith("MSH") else "|"
    component = text[4:5] or "^"
    found = {line[:3]: _fields(line, separator) for line in reversed(re.split("[\r\n]+", text)) if line[:3] in ("MSA", "ERR")}
    msa, err = found.get("MSA", []), found.get("ERR", [])

    def at(fields: list[str], number: int) -> str:
        return fields[number].strip() if number < len(fields) else ""

    reason = (at(err, 3) or at(msa, 6)).partition(component)[0]
    return at(msa, 1), at(msa, 2), reason if re.fullmatch("[0-9]{1,3}", reason) else ""


def _fields(line: str, separator: str = "|") -> list[str]:
    return line.split(separator)
