"""The Storage SCP: a listening socket, a thread for each connection, and limits on both.

What a C-STORE is answered (PS3.4 Table B.2-1, PS3.7 Annex C); each comes with an Error Comment:

=======  ============================================================================
0x0000   file and row are durable; also an identical duplicate, and other bytes under a
         known UID (quarantined: the first stays as it is, a person is told)
0x0117   Affected SOP Class or Instance UID is not a UID
0x0122   C-STORE on a context of verification or storage commitment
0x0211   any other DIMSE operation
0xA700   spool nearly full, disk full or failing, database away: send again later
0xA900   SOP class or instance of the data set is not that of the request
0xC000   the store turns the instance away for ever
0xC001   data set is not encoded in the agreed transfer syntax, or its tags are out of order or double
0xC002   data set ends in the middle of an element, or is missing
0xC003   sequences nested too deep or too long
0xC010   Study Instance UID missing or not a UID; 0xC011 Series; 0xC012 SOP class or instance
0xC020   patient ID missing or empty
0xC021   patient ID, its issuer or accession number: over 64 characters, control characters, or two values
0xC211   a bug of ours; the next instance is served
=======  ============================================================================

And an archive's N-EVENT-REPORT on storage commitment (PS3.7 §10.1.1.1.8), where the association agreed that it is SCP of that class:
0x0000 taken, repeated ones too; 0x0112 another SOP instance; 0x0113 another event type; 0x0115 cannot be read, or the transaction is
unknown or another archive's; 0x0213 too long, or the database is away: report again later. A sender's N-ACTION, where it may be SCU: 0x0000
our report follows, whatever it will say; 0x0112, 0x0115, 0x0213 likewise, 0x0123 another action type.

Several processes may share one listening socket (`listen`): an idle one accepts first. Emits
``association.rejected``, ``association.closed``, ``instance.refused`` and ``commitment.turned_away``.
"""

from __future__ import annotations

import selectors
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

from worker import events
from worker.errors import cause_of
from worker.intake import wire
from worker.intake.dataphase import DataPhase, Reports, Sink
from worker.intake.negotiation import MAX_REQUEST_BYTES, Accepted, Policy, pdu
from worker.intake.places import Place, Places, waiting, working
from worker.intake.wire import Closed, ProtocolError, Stalled, Stopping, Wire
from worker.store.spool import Spool

#: Each open association delays a process's next accept by so much, so that an idle one is first.
_LAG_S: Final = 0.002
_FULL_LAG_S: Final = 0.05
#: Connections, and half of them from one address. One more is closed unread, or the one that owes its association request for longest.
_MAX_CONNECTIONS: Final = 512
_LINGER_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What a peer may take. The defaults fit a department; times in seconds."""

    #: Largest PDU we announce. CPU per instance (wire.py's measure): 0.66 ms at 16 KiB, 0.53 at 64 and 128, 0.55 at 256.
    max_pdu: int = 131072
    #: Open associations of this process; one more is rejected, transient, unless one of them has stalled (places.py).
    associations: int = 50
    #: Of one address, so that one broken peer leaves room for the others.
    per_address: int = 40
    #: From connection to association request, TLS handshake apart.
    request_s: float = 10.0
    #: A begun PDU must be complete.
    pdu_s: float = 30.0
    #: Silence in an open association, between PDUs.
    idle_s: float = 60.0


def listen(address: tuple[str, int], *, backlog: int = 128) -> socket.socket:
    """Return a listening socket that any number of processes may accept from; port 0 takes a free one."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    listener.listen(backlog)
    listener.setblocking(False)
    return listener


@dataclass(slots=True)
class _Load:
    """How busy this process is; guarded by its lock."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    #: Every connection's thread and socket, negotiated or not.
    connections: dict[threading.Thread, socket.socket] = field(default_factory=dict)


class StorageScp:
    """A running receiver: ``start()``, and in the end ``stop(grace_s)``.

    Parameters
    ----------
    listener
        From `listen`, perhaps inherited from a parent process. Closed by `stop`, here only.
    ssl_context
        Gives the server context for one connection; then nothing but TLS is spoken. The handshake runs in the connection's own thread.
    reports
        Takes what archives say of storage commitment and senders ask; goes with the policy's `takes_commitments` and `commits_to`.
    """

    def __init__(
        self,
        listener: socket.socket,
        *,
        policy: Policy,
        spool: Spool,
        sink: Sink,
        limits: Limits | None = None,
        ssl_context: Callable[[], ssl.SSLContext] | None = None,
        reports: Reports | None = None,
    ) -> None:
        self._listener = listener
        self._policy = policy
        self._spool = spool
        self._sink = sink
        self._reports = reports
        self._limits = limits or Limits()
        self._ssl_context = ssl_context
        self._load = _Load()
        self._connected = Places(_MAX_CONNECTIONS, _MAX_CONNECTIONS // 2)
        self._associated = Places(self._limits.associations, self._limits.per_address)
        self._is_stopping = threading.Event()
        self._is_over = threading.Event()
        self._acceptor = threading.Thread(target=self._accept_all, name="scp-accept", daemon=True)
        listener.setblocking(False)

    @property
    def address(self) -> tuple[str, int]:
        """Where we listen."""
        host, port = self._listener.getsockname()[:2]
        return str(host), int(port)

    @property
    def associations(self) -> int:
        """How many associations are open now."""
        return len(self._associated)

    def start(self) -> None:
        """Begin to accept; returns at once."""
        self._acceptor.start()

    def stop(self, grace_s: float) -> None:
        """Reject what is new, let messages under way finish within `grace_s`, cut the rest."""
        self._is_stopping.set()
        deadline = time.monotonic() + grace_s
        for thread in self._threads():
            thread.join(max(0.0, deadline - time.monotonic()))
        self._is_over.set()
        self._acceptor.join()
        left = self._threads()
        for thread in left:
            self._cut(thread)
        for thread in left:
            thread.join(5.0)
        self._listener.close()

    def _threads(self) -> list[threading.Thread]:
        with self._load.lock:
            return list(self._load.connections)

    # --- accepting --------------------------------------------------------------------------------

    def _accept_all(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            while not self._is_over.is_set():
                if not selector.select(wire.TICK_S):
                    continue
                # Another process may be idle: let it be first.
                if self._is_over.wait(self._lag_s()):
                    return
                # As many more as we have: however long the lag, who knocks in a tight loop keeps nobody out.
                for _ in range(1 + self.associations):
                    if not self._accept():
                        break

    def _accept(self) -> bool:
        try:
            sock, name = self._listener.accept()
        except BlockingIOError:
            return False
        except OSError:
            # Out of descriptors, or the peer gave up: what is open goes on.
            self._is_over.wait(wire.TICK_S)
            return False
        self._begin(sock, str(name[0]))
        return True

    def _lag_s(self) -> float:
        if self._is_stopping.is_set() or self.associations >= self._limits.associations:
            return _FULL_LAG_S
        return min(_LAG_S * self.associations, _FULL_LAG_S / 2)

    def _begin(self, sock: socket.socket, address: str) -> None:
        load, place = self._load, Place(address, waiting(), lambda: self._cut(thread))
        thread = threading.Thread(target=self._serve, args=(sock, place), name="scp-association", daemon=True)
        if not self._connected.take(place):
            sock.close()
            events.emit("association.rejected", address=address, reason="too many connections", is_alert=True)
            return
        try:
            with load.lock:  # `stop` waits for each that it finds here, and one that has not begun cannot be waited for
                thread.start()
                load.connections[thread] = sock
        except RuntimeError:  # the system gives no more threads: this peer comes again, the acceptor must live
            self._connected.leave(place)
            sock.close()
            events.emit("association.rejected", address=address, reason="no thread could be started")

    def _cut(self, thread: threading.Thread) -> None:
        """End a connection from outside; its own thread finds it closed."""
        with self._load.lock:
            sock = self._load.connections.get(thread)
            with suppress(OSError):
                if sock is not None:
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)  # a TLS socket's own would send what its thread writes in the clear

    # --- one connection ---------------------------------------------------------------------------

    def _serve(self, sock: socket.socket, place: Place) -> None:
        """Own one connection from accept to close."""
        load, thread, limits, address = self._load, threading.current_thread(), self._limits, place.address
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if self._ssl_context is not None:
                sock.settimeout(limits.request_s)
                sock = self._ssl_context().wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
                with load.lock:
                    load.connections[thread] = sock
                sock.do_handshake()
            line = Wire(sock, idle_s=limits.request_s, pdu_s=limits.request_s, is_stopping=self._is_stopping.is_set)
            self._converse(line, place, _names(sock))
            line.linger(_LINGER_S)
        except OSError as error:
            is_alert = isinstance(error, ssl.SSLError)
            reason = f"connection failed before an association: {cause_of(error)}"
            events.emit("association.rejected", address=address, reason=reason, is_alert=is_alert)
        finally:
            self._connected.leave(place)  # first: who sees the connection closed may come again at once
            sock.close()
            with load.lock:
                del load.connections[thread]

    def _converse(self, line: Wire, place: Place, names: Collection[str]) -> None:
        """Negotiate, and serve what was agreed."""
        address = place.address
        try:
            request = _request(line)
        except (Closed, Stalled, Stopping, ProtocolError) as error:
            self._give_up(line, address, error)
            return
        place.waited_s = working  # from now on the association's place says how long we wait
        # Only now: connections that never ask for an association take nobody's place.
        slot = Place(address, line.waited_s, line.give_way)

        def has_room() -> bool:
            return not self._is_stopping.is_set() and self._associated.take(slot)

        try:
            answer = self._policy.negotiate(request, address, has_room=has_room, names=names)
            line.send(answer.reply)
        except (Closed, Stalled, ProtocolError) as error:
            self._give_up(line, address, error)
        else:
            if isinstance(answer, Accepted):
                self._associate(line, answer)
            else:
                facts = {"calling_ae": answer.peer.calling_ae, "called_ae": answer.peer.called_ae}
                events.emit("association.rejected", address=address, reason=answer.reason, is_alert=answer.is_alert, **facts)
        finally:
            self._associated.leave(slot)

    def _give_up(self, line: Wire, address: str, error: Exception) -> None:
        if isinstance(error, ProtocolError):
            _abort(line, error.reason)
        is_alert = isinstance(error, ProtocolError)
        events.emit("association.rejected", address=address, reason=str(error) or type(error).__name__, is_alert=is_alert)

    def _associate(self, line: Wire, accepted: Accepted) -> None:
        """Serve one association to its end, whatever that is, and say so in one line."""
        line.idle_s, line.pdu_s = self._limits.idle_s, self._limits.pdu_s
        phase = DataPhase(line, accepted, max_pdu=self._policy.max_pdu, spool=self._spool, sink=self._sink, reports=self._reports)
        began, facts = time.monotonic(), {}
        try:
            end = phase.run()
        except Closed:
            end = "lost"
        except Stalled as error:
            end, facts = "timeout", {"reason": str(error)}
            _abort(line, 0)
        except Stopping:
            end = "shutdown"
            _abort(line, 0)
        except ProtocolError as error:
            end, facts = "protocol error", {"reason": str(error)}
            _abort(line, error.reason)
        except Exception as error:  # noqa: BLE001  a bug of ours costs this association, not the receiver
            end, facts = "bug", {"reason": type(error).__name__}
            _abort(line, 0)
        events.emit(
            "association.closed",
            calling_ae=accepted.peer.calling_ae,
            address=accepted.peer.address,
            instances=phase.tally.instances,
            refused=phase.tally.refused,
            stored_bytes=phase.tally.stored_bytes,
            received_bytes=line.received_bytes,
            seconds=round(time.monotonic() - began, 3),
            end=end,
            **facts,
        )


def _names(sock: socket.socket) -> list[str]:
    """The names in the certificate of the other side, if it was asked for one: its alternative names and its common name."""
    shown: Mapping[str, Any] = (sock.getpeercert() if isinstance(sock, ssl.SSLSocket) else None) or {}
    common = [value for part in shown.get("subject", ()) for kind, value in part if kind == "commonName"]
    return [*common, *(value for _, value in shown.get("subjectAltName", ()))]


def _request(line: Wire) -> bytes:
    kind, length = line.next_pdu(is_between_messages=False)
    if kind != wire.ASSOCIATE_RQ:
        raise ProtocolError(f"The connection began with a PDU of type {kind}.", wire.UNEXPECTED_PDU)
    return line.body(length, MAX_REQUEST_BYTES)


def _abort(line: Wire, reason: int) -> None:
    """Send an A-ABORT of the service provider (PS3.8 §9.3.8)."""
    try:
        line.send(pdu(wire.ABORT, bytes((0, 0, 2, reason))))
    except (Closed, Stalled):
        return  # nobody left to tell
