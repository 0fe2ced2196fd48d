"""The HL7 v2 listener: one MLLP frame → one commit → one acknowledgment, in this order.

::

    0x0B message 0x1C 0x0D ─▶ hl7.parse ─▶ apply (commit 3) ─▶ AA   new, repeated, or of a trigger we do not use
                                  │            └ anything raised ─▶ AE   not kept; the sender tries again
                                  └ RecordError ─▶ reject ─▶ AR          kept for a person; sending again is no use

A connection is one thread and its messages are answered in order. A frame that is not whole (a deadline, the end of
the connection, a second start block) is never answered: the connection is closed, and its sender sends again.

Emits ``message.accepted`` and ``message.refused``. Not here: what a message says (hl7.py), which answer
its sender asks for (envelope.py), rows (store/records.py).
"""

from __future__ import annotations

import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Final

from worker.errors import PeerUnavailable, RecordError, Reject, cause_of
from worker.events import emit
from worker.intake.envelope import BOM, Verdict, acknowledgment, read_envelope
from worker.intake.hl7 import ParsedMessage, parse
from worker.intake.places import Place, Places, waiting, working

# MLLP Release 1, §2: start block, and end block with carriage return.
_START: Final = b"\x0b"
_END: Final = b"\x1c\r"
_CHUNK_BYTES: Final = 65536
#: What of an oversized message is kept for a person, and how much may come before a start block.
HEAD_BYTES: Final = 65536
_DRAIN_S: Final = 2.0


class FramingError(Exception):
    """The bytes are not whole frames. ``head`` holds the first bytes of a message that is too long, else nothing."""

    def __init__(self, message: str, head: bytes = b"") -> None:
        super().__init__(message)
        self.head = head


@dataclass(frozen=True, slots=True)
class Limits:
    """What one connection may take of us."""

    max_message_bytes: int = 8 * 2**20
    idle_s: float = 600.0
    message_deadline_s: float = 30.0


def _utc_now() -> datetime:
    return datetime.now(UTC)


def frames(connection: socket.socket, limits: Limits) -> Iterator[bytes]:
    """Yield the content of each frame; end where the peer ends between two frames or is idle for too long.

    Bytes outside frames are passed over, as MLLP asks.

    Raises
    ------
    FramingError
        See there. No further frame can be trusted.
    """
    pending = bytearray()
    while True:
        outside, deadline = 0, time.monotonic() + limits.idle_s
        while (start := pending.find(_START)) < 0:
            outside += len(pending)
            pending.clear()
            if outside > HEAD_BYTES:
                raise FramingError(f"{outside} bytes came without a start block.")
            try:
                chunk = _received(connection, deadline)
            except TimeoutError:
                return
            if not chunk:
                return
            pending += chunk
        del pending[: start + 1]
        yield _whole(connection, pending, limits)


def _whole(connection: socket.socket, pending: bytearray, limits: Limits) -> bytes:
    """Return the frame that `pending` begins with, and leave in it what follows."""
    deadline = time.monotonic() + limits.message_deadline_s
    searched = 0
    while (end := pending.find(_END, searched)) < 0 and len(pending) <= limits.max_message_bytes:
        searched = max(0, len(pending) - 1)
        try:
            chunk = _received(connection, deadline)
        except TimeoutError:
            raise FramingError(f"The message was not whole within {limits.message_deadline_s:g} s.") from None
        if not chunk:
            raise FramingError("The connection ended inside a message.")
        pending += chunk
    if end < 0 or end > limits.max_message_bytes:
        raise FramingError(f"The message has more than {limits.max_message_bytes} bytes.", bytes(pending[:HEAD_BYTES]))
    message = bytes(pending[:end])
    del pending[: end + len(_END)]
    if _START + b"MSH" in message:  # a lone 0x0B is a line break that word processors leave in texts
        raise FramingError("A start block came before the end block of the message before it.")
    return message


def _received(connection: socket.socket, deadline: float) -> bytes:
    """Receive once; b'' at the end of the connection, however it ended."""
    remaining_s = deadline - time.monotonic()
    if remaining_s <= 0:
        raise TimeoutError
    connection.settimeout(remaining_s)
    try:
        return connection.recv(_CHUNK_BYTES)
    except ConnectionError:
        return b""


class MllpServer:
    """Listen for HL7 v2 messages; one thread accepts, one serves each connection.

    Parameters
    ----------
    address
        Host and port; port 0 takes a free one, see `port`.
    apply
        Commits one message and returns False if an equal one was committed before. It is answered after this returns.
    reject
        Keeps a message that cannot be understood (of one too long the first 64 KiB), with the reason.
    zone, issuers, schemes, encoding
        As for `hl7.parse`.
    allowed_addresses
        IP addresses or networks; others are closed unread, and so is everybody if it is empty.
    max_connections
        One more is closed unread, or the one that owes its next message for longest (places.py). Each may hold a message in memory.
    idle_s
        A connection may be silent this long between messages.
    message_deadline_s
        From a start block to its end block, and for the sender to take our answer; also for the TLS handshake.
    ssl_context
        Gives the server context for one connection; with it every connection is TLS and a plain one is closed.
    """

    def __init__(
        self,
        address: tuple[str, int],
        *,
        apply: Callable[[ParsedMessage, bytes], bool],
        reject: Callable[[str, bytes], None],
        zone: tzinfo,
        issuers: Mapping[str, str],
        allowed_addresses: Sequence[str],
        schemes: Mapping[str, str] | None = None,
        encoding: str = "utf-8",
        max_message_bytes: int = 8 * 2**20,
        max_connections: int = 32,
        idle_s: float = 600.0,
        message_deadline_s: float = 30.0,
        clock: Callable[[], datetime] = _utc_now,
        ssl_context: Callable[[], ssl.SSLContext] | None = None,
    ) -> None:
        "".encode(encoding)  # an unknown name is a LookupError now, not at the first message
        self.port = address[1]
        self._address = address
        self._apply, self._reject = apply, reject
        self._zone, self._issuers, self._schemes, self._encoding = zone, dict(issuers), dict(schemes or {}), encoding
        self._networks = tuple(ip_network(one, strict=False) for one in allowed_addresses)
        self._limits = Limits(max_message_bytes, idle_s, message_deadline_s)
        self._places = Places(max_connections, max_connections)
        self._clock = clock
        self._ssl_context = ssl_context
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._connections: dict[threading.Thread, socket.socket] = {}
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None

    def start(self) -> None:
        """Bind and accept; an address in use raises OSError here."""
        family = socket.AF_INET6 if ":" in self._address[0] else socket.AF_INET
        self._listener = socket.create_server(self._address, family=family, backlog=64)
        self._listener.settimeout(0.5)
        self.port = int(self._listener.getsockname()[1])
        self._stopping.clear()
        self._acceptor = threading.Thread(target=self._accept, args=(self._listener,), name="mllp", daemon=True)
        self._acceptor.start()

    def stop(self, *, timeout_s: float = 10.0) -> None:
        """Accept and read no more; a message that is being applied is still answered."""
        self._stopping.set()
        deadline = time.monotonic() + timeout_s
        if self._listener and self._acceptor:
            with suppress(OSError):  # Linux wakes accept() by this; elsewhere its time-out does
                self._listener.shutdown(socket.SHUT_RDWR)
            self._acceptor.join(timeout_s)
            self._listener.close()
        with self._lock:
            serving = list(self._connections)
        for thread in serving:
            self._cut(thread)
        for thread in serving:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _cut(self, thread: threading.Thread) -> None:
        """Read no more of a connection; an answer that is on its way still goes."""
        with self._lock, suppress(KeyError, OSError):  # it has ended, or the peer is gone already
            # Of the plain socket: a TLS socket's own would send that answer unencrypted.
            socket.socket.shutdown(self._connections[thread], socket.SHUT_RD)

    # --- connections

    def _accept(self, listener: socket.socket) -> None:
        while not self._stopping.is_set():
            try:
                connection, peer = listener.accept()
            except TimeoutError:
                continue
            except OSError:
                self._stopping.wait(0.1)  # out of file descriptors: do not spin
                continue
            self._begin(connection, str(peer[0]))

    def _begin(self, connection: socket.socket, host: str) -> None:
        place = Place(host, waiting(), lambda: self._cut(thread))
        thread = threading.Thread(target=self._serve, args=(connection, place), name="mllp", daemon=True)
        if not (reason := self._turned_away(place)):
            with self._lock:
                self._connections[thread] = connection
            try:
                thread.start()
                return
            except RuntimeError:  # the system gives no more threads: the sender comes again, the acceptor must live
                reason = "no thread could be started"
            with self._lock:
                del self._connections[thread]
            self._places.leave(place)
        _closed(reason, host, is_alert=True)
        connection.close()

    def _turned_away(self, place: Place) -> str:
        address = ip_address(place.address.partition("%")[0])
        if isinstance(address, IPv6Address) and address.ipv4_mapped:
            address = address.ipv4_mapped
        if not any(address in network for network in self._networks):
            return "The peer's address is not allowed."
        return "" if self._places.take(place) else f"{len(self._places)} connections are open already."

    def _serve(self, connection: socket.socket, place: Place) -> None:
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = self._secured(connection)
            for raw in frames(connection, self._limits):
                place.waited_s = working
                self._reply(connection, self._answer(raw))
                place.waited_s = waiting()
                if self._stopping.is_set():
                    return
        except FramingError as exc:
            self._refuse_frame(connection, exc)
        except OSError as exc:  # the peer left before our answer; it will send again and be told so
            _closed(f"The connection broke: {cause_of(exc)}.", place.address, is_alert=isinstance(exc, ssl.SSLError))
        finally:
            self._places.leave(place)  # first: who sees the connection closed may come again at once
            with self._lock:
                self._connections.pop(threading.current_thread()).close()

    def _secured(self, connection: socket.socket) -> socket.socket:
        """Shake hands, in the connection's own thread: a peer that never does holds up nobody."""
        if self._ssl_context is None:
            return connection
        context = self._ssl_context()
        connection.settimeout(self._limits.message_deadline_s)
        with self._lock:  # `_cut` must find the socket that is read, and wrapping takes the other's descriptor
            secured = context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
            self._connections[threading.current_thread()] = secured
        secured.do_handshake()
        return secured

    def _reply(self, connection: socket.socket, answer: bytes | None) -> None:
        if answer is not None:
            connection.settimeout(self._limits.message_deadline_s)
            connection.sendall(_START + answer + _END)

    def _refuse_frame(self, connection: socket.socket, error: FramingError) -> None:
        if not error.head:
            _closed(str(error))
            return
        with suppress(OSError):  # whether the sender listens or not, the connection ends here
            self._reply(connection, self._refused(error.head, str(error)))
            connection.shutdown(socket.SHUT_WR)
            # Closed with bytes unread, TCP would reset the connection and take the answer back.
            deadline = time.monotonic() + _DRAIN_S
            while _received(connection, deadline):
                pass

    # --- messages

    def _answer(self, raw: bytes) -> bytes | None:
        started = time.perf_counter()
        try:
            message = parse(raw, zone=self._zone, issuers=self._issuers, schemes=self._schemes, encoding=self._encoding)
            is_new = self._apply(message, raw)
        except Reject as exc:
            return self._refused(raw, str(exc))
        except Exception as exc:  # noqa: BLE001  this is where the message's fate is decided; its text may hold a row
            return self._acknowledged(raw, "E", f"The message could not be stored: {type(exc).__name__}.")
        emit(
            "message.accepted",
            sender=message.sender,
            trigger=message.trigger,
            result=("applied" if message.update else "ignored") if is_new else "duplicate",
            skipped=message.skipped,
            seconds=round(time.perf_counter() - started, 4),
        )
        return self._acknowledged(raw, "A")

    def _refused(self, raw: bytes, reason: str) -> bytes | None:
        try:
            self._reject(reason, raw)
        except Exception as exc:  # noqa: BLE001  AR would make the sender drop what nobody has kept
            return self._acknowledged(raw, "E", f"The refused message could not be stored: {type(exc).__name__}.")
        return self._acknowledged(raw, "R", reason)

    def _acknowledged(self, raw: bytes, verdict: Verdict, reason: str = "") -> bytes | None:
        try:
            envelope = read_envelope(raw)
        except RecordError:
            envelope = None
        if verdict != "A":
            sender, trigger = (envelope.sender_label, envelope.trigger_label) if envelope else ("", "")
            emit("message.refused", sender=sender, trigger=trigger, result=f"A{verdict}", reason=reason)
        return acknowledgment(envelope, verdict, reason, at=self._clock().astimezone(self._zone))


def _closed(reason: str, address: str = "", *, is_alert: bool = False) -> None:
    emit("message.refused", sender="", trigger="", result="closed", reason=reason, address=address, is_alert=is_alert)


# --- the other side, for the demo, `synoptic import` and the tests


def split_messages(data: bytes) -> list[bytes]:
    """Split the content of a file into messages, segments ended by CR, as they go on the wire.

    Byte order marks, MLLP framing and the segments of batches (FHS, BHS, BTS, FTS) are left out.

    Raises
    ------
    RecordError
        Something else comes before the first MSH.
    """
    plain = data.removeprefix(BOM).replace(_END, b"\r").replace(_START + b"MSH", b"\rMSH")
    plain = re.sub(rb"(?:^|(?<=[\r\n]))(?:FHS|BHS|BTS|FTS)[^\r\n]*", b"", plain)
    before, *messages = re.split(rb"(?:^|(?<=[\r\n]))(?=MSH[^A-Za-z0-9\s])", plain)
    if before.strip():
        raise RecordError("The file does not begin with an MSH segment.")
    return [re.sub(rb"\r\n?" if b"\r" in one else rb"\n", b"\r", one) + b"\r" for one in (part.strip() for part in messages)]


def send(address: tuple[str, int], messages: Iterable[bytes], *, timeout_s: float = 30.0) -> list[str]:
    """Send `messages` one after the other, each when the one before is answered; return the MSA-1 codes.

    Raises
    ------
    PeerUnavailable
        No connection, no answer in time, or an answer to another message. Those before it were answered.
    """
    codes: list[str] = []
    try:
        with socket.create_connection(address, timeout=timeout_s) as connection:
            answers = frames(connection, Limits(idle_s=timeout_s, message_deadline_s=timeout_s))
            for message in messages:
                connection.settimeout(timeout_s)
                connection.sendall(_START + message + _END)
                codes.append(_msa_1(next(answers, b""), message))
    except (OSError, FramingError, RecordError) as exc:
        raise PeerUnavailable(f"The HL7 listener gave no answer to message {len(codes) + 1}: {type(exc).__name__}.") from exc
    return codes


def _msa_1(answer: bytes, message: bytes) -> str:
    envelope = read_envelope(answer)
    field = envelope.separators[0]
    for segment in answer.decode("latin-1").split("\r"):
        if segment.startswith(f"MSA{field}"):
            _, code, control_id, *_ = [*segment.split(field), ""]
            if control_id == read_envelope(message).raw(10):
                return code
    raise RecordError("The answer is not to this message.")
