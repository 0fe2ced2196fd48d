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

from worker.deliver import web
from worker.deliver.association import Peer, connect
from worker.deliver.cstore import Outcome
from worker.domain import Document
from worker.errors import PeerRefused, PeerUnavailable, cause_of

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
    """Send `documents` in order, each acknowledged before the next, over one connection while it lasts; one outcome each, in order."""
    line = _Line(peer)
    try:
        return web.each(documents, line.deliver)
    finally:
        line.close()


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
    """A connection that is made when it is needed, and the control IDs that were sent on it."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._sock: socket.socket | None = None
        self._sent: set[str] = set()

    def close(self) -> None:
        """End the connection, if there is one."""
        if self._sock is not None:
            self._sock.close()
        self._sock = None

    def deliver(self, document: Document) -> Outcome:
        """Send one message and judge its acknowledgment; what has none ends the connection."""
        uid = document.sop_instance_uid
        try:
            code, reason = self._exchange(document.data)
        except PeerUnavailable as error:
            self.close()
            return Outcome(uid, error=error)
        what = f"{self._peer.name} answers {code}{f', ERR-3 {reason}' if reason else ''}"
        if code in _ACCEPTED:
            return Outcome(uid, 0)
        if code in _REFUSED and reason not in _PASSING:
            return Outcome(uid, 0, error=PeerRefused(f"{what}: it refuses the message."))
        return Outcome(uid, 0, error=PeerUnavailable(f"{what}: it cannot take the message now."))

    def _exchange(self, message: bytes) -> tuple[str, str]:
        """Return MSA-1 of the acknowledgment, and ERR-3 (of old versions MSA-6) where there is one."""
        name, control_id = self._peer.name, message.partition(b"\r")[0].decode().split("|")[9]
        if self._sock is None:
            self._sock, self._sent = connect(self._peer), set()
            self._sock.settimeout(None)  # each exchange is bounded as a whole
        seconds = self._peer.timeout_s + len(message) / _SLOWEST_BYTES_PER_S
        problem = "closed the connection without an acknowledgment"
        with web.bounded(lambda: self._sock, seconds) as is_over:
            try:
                self._sock.sendall(_START + message + _END)
                for code, of, reason in map(_read, self._frames(self._sock)):
                    if code not in _KNOWN:
                        raise PeerUnavailable(f"{name} answers with something that is no acknowledgment.")
                    if of == control_id:
                        self._sent.add(control_id)
                        return code, reason
                    if of not in self._sent:
                        raise PeerUnavailable(f"{name} acknowledges another message than the one that was sent.")
            except OSError as error:
                problem = f"broke the connection: {cause_of(error)}"
        raise PeerUnavailable(f"{name} {f'did not acknowledge the message within {seconds:.3g} s' if is_over.is_set() else problem}.")

    def _frames(self, sock: socket.socket) -> Iterator[bytes]:
        """Yield the content of each frame until the peer ends; bytes outside are passed over, as MLLP asks."""
        pending, taken = bytearray(), 0
        while chunk := sock.recv(_CHUNK_BYTES):
            pending += chunk
            taken += len(chunk)
            while (start := pending.find(_START)) >= 0 and (end := pending.find(_END, start)) >= 0:
                answer = bytes(pending[start + 1 : end])
                del pending[: end + len(_END)]
                yield answer
            if taken > MAX_ANSWER:
                raise PeerUnavailable(f"{self._peer.name} answers with more than {MAX_ANSWER} bytes.")


def _read(answer: bytes) -> tuple[str, str, str]:
    """MSA-1, MSA-2 and the code of ERR-3.1, else of MSA-6.1; '' for what is not there."""
    text = answer.decode("utf-8", "replace").lstrip("\ufeff\r\n ")
    separator, component = (text[3:4], text[4:5]) if text.startswith("MSH") and len(text) > len("MSH") else ("|", "^")
    found = {line[:3]: [*line.split(separator), *[""] * 7] for line in reversed(re.split("[\r\n]+", text))}
    msa, err = (found.get(name, [""] * 7) for name in ("MSA", "ERR"))
    reason = (err[3] or msa[6]).split(component)[0].strip() if component else ""
    return msa[1].strip(), msa[2].strip(), reason if re.fullmatch("[0-9]{1,3}", reason) else ""
