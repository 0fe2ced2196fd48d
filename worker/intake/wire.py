"""Bytes of one DICOM connection: PDU headers and pieces of PDU bodies, each within a deadline (PS3.8 §9.3).

Three clocks cut a peer off: silence between PDUs (`idle_s`), the time a begun PDU takes
(`pdu_s`), and the pace of a message made of many small PDUs. Only time spent waiting for the
peer counts. Not here: what a PDU means.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable
from typing import Final

#: PS3.8 §9.3.1: PDU types.
ASSOCIATE_RQ, ASSOCIATE_AC, ASSOCIATE_RJ, P_DATA_TF, RELEASE_RQ, RELEASE_RP, ABORT = 1, 2, 3, 4, 5, 6, 7
#: PS3.8 §9.3.8: reasons of an abort by the service provider.
UNRECOGNIZED_PDU, UNEXPECTED_PDU, UNEXPECTED_PARAMETER, INVALID_PARAMETER = 1, 2, 5, 6

#: How often a waiting thread looks at its clocks.
TICK_S: Final = 0.25
#: A message slower than this on average, after twice the PDU deadline, is an attack or a dead line.
_SLOWEST_BYTES_PER_S: Final = 1024
#: Measured, CPU per 512 x 512 x 16 instance in PDUs of 128 KiB, digest included, disk not: 0.60 ms with 64 KiB, 0.53 with
#: 256 KiB, 0.52 with 1 MiB.
_BUFFER_BYTES: Final = 256 * 1024

_PDU: Final = struct.Struct(">BxL")


class Closed(Exception):
    """The peer closed or lost the connection."""


class Stalled(Exception):
    """The peer took longer than allowed."""


class Stopping(Exception):
    """We are shutting down, and the peer is between two messages."""


class ProtocolError(Exception):
    """The peer broke PS3.8; `reason` goes into our abort."""

    def __init__(self, message: str, reason: int = INVALID_PARAMETER) -> None:
        super().__init__(message)
        self.reason = reason


class Wire:
    """The buffered reading side, and the writing side, of one connected socket."""

    def __init__(self, sock: socket.socket, *, idle_s: float, pdu_s: float, is_stopping: Callable[[], bool]) -> None:
        sock.settimeout(TICK_S)
        self._sock = sock
        self.idle_s = idle_s
        self.pdu_s = pdu_s
        self._is_stopping = is_stopping
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._start = self._end = 0
        self._pdu_waited_s = self._message_waited_s = 0.0
        self._message_bytes = 0
        self._waiting_since: float | None = None
        self._must_give_way = False
        self.received_bytes = 0

    def begin_message(self) -> None:
        """Start the clock of a new message."""
        self._message_waited_s = 0.0
        self._message_bytes = 0

    def waited_s(self) -> float:
        """How long the peer keeps us waiting now: its silence, or its message where that comes too slowly; 0 while it waits for us."""
        since = self._waiting_since  # read once: this is another thread's call
        if since is None:
            return 0.0
        is_slow = self._message_bytes < _SLOWEST_BYTES_PER_S * self._message_waited_s
        return max(time.monotonic() - since, self._message_waited_s if is_slow else 0.0)

    def give_way(self) -> None:
        """Stop waiting for the peer: its place was given to another."""
        self._must_give_way = True

    def next_pdu(self, *, is_between_messages: bool) -> tuple[int, int]:
        """Wait for a PDU; returns its type and the length of its body.

        Raises
        ------
        Closed, Stalled, Stopping
        """
        waited_s = 0.0
        while self._start == self._end:
            if is_between_messages and self._is_stopping():
                raise Stopping
            waited_s += self._receive()
            if self._start == self._end and waited_s > self.idle_s:
                raise Stalled(f"The peer was silent for {waited_s:.0f} s.")
        self._pdu_waited_s = 0.0
        if is_between_messages:
            self.begin_message()  # the silence that `idle_s` allows is no slowness of the message that ends it
        kind, length = _PDU.unpack(self.exactly(6))
        return kind, length

    def exactly(self, size: int) -> memoryview:
        """Return the next `size` bytes of the PDU; valid until the next call. `size` fits the buffer."""
        while self._end - self._start < size:
            self._receive_within_pdu()
        taken = self._buffer[self._start : self._start + size]
        self._start += size
        return taken

    def some(self, limit: int) -> memoryview:
        """Return between 1 and `limit` bytes of the PDU, as many as are here; valid until the next call."""
        if self._start == self._end:
            self._receive_within_pdu()
        taken = self._buffer[self._start : min(self._end, self._start + limit)]
        self._start += len(taken)
        return taken

    def body(self, length: int, limit: int) -> bytes:
        """Return a whole PDU body; one longer than `limit` is refused before it is read."""
        if length > limit:
            raise ProtocolError(f"A PDU of {length} bytes is longer than the {limit} allowed.")
        parts = bytearray()
        while len(parts) < length:
            parts += self.some(length - len(parts))
        return bytes(parts)

    def send(self, data: bytes) -> None:
        """Send all of `data` within the PDU deadline."""
        rest = memoryview(data)
        deadline = time.monotonic() + self.pdu_s
        while rest:
            try:
                rest = rest[self._sock.send(rest) :]
            except TimeoutError:
                if time.monotonic() > deadline:
                    raise Stalled("The peer does not read what we answer.") from None
            except OSError as error:
                raise Closed(str(error)) from error

    def linger(self, wait_s: float) -> None:
        """Say that nothing follows and wait for the peer to close: closing at once could destroy our last PDU."""
        deadline, left = time.monotonic() + wait_s, len(self._buffer)
        try:
            self._sock.shutdown(socket.SHUT_WR)
            while time.monotonic() < deadline and left > 0:
                try:
                    count = self._sock.recv_into(self._buffer)
                except TimeoutError:
                    continue
                if not count:
                    return
                left -= count
        except OSError:
            return  # gone already, which is what we wait for

    def _receive_within_pdu(self) -> None:
        self._pdu_waited_s += self._receive()
        if self._pdu_waited_s > self.pdu_s:
            raise Stalled(f"A PDU was not complete after {self.pdu_s:.0f} s.")
        if self._message_waited_s > 2 * self.pdu_s and self._message_bytes < _SLOWEST_BYTES_PER_S * self._message_waited_s:
            raise Stalled(f"A message came at less than {_SLOWEST_BYTES_PER_S} bytes/s.")

    def _receive(self) -> float:
        """Receive once, at most a tick long; returns the seconds waited."""
        if self._must_give_way:
            raise Stalled("The peer kept us waiting while another wanted its place.")
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end == len(self._buffer) or self._start > len(self._buffer) // 2:
            rest = self._end - self._start
            self._buffer[:rest] = bytes(self._buffer[self._start : self._end])
            self._start, self._end = 0, rest
        began = time.monotonic()
        self._waiting_since = self._waiting_since or began
        try:
            count = self._sock.recv_into(self._buffer[self._end :])
        except TimeoutError:
            count = -1
        except OSError as error:
            raise Closed(str(error)) from error
        if count == 0:
            raise Closed("The peer closed the connection.")
        waited_s = time.monotonic() - began
        self._message_waited_s += waited_s
        if count > 0:
            self._waiting_since = None
            self._end += count
            self._message_bytes += count
            self.received_bytes += count
        return waited_s
