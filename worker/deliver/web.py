"""HTTP as every door of ours speaks it: one request a connection, bounded in bytes and as a whole in time, no redirect, no proxy.

=============================  ==========================================================================================
what the server answers        what becomes of the document where its body does not say (`refusal`)
=============================  ==========================================================================================
3xx 401 403 404 405 429        PeerUnreachable: the URL, the secret or a proxy is at fault, not the document
502 503 504                    the same; no redirect is followed, for results and secrets go nowhere else
408, other 5xx                 PeerUnavailable: again later
other 4xx                      PeerRefused: sending again changes nothing
=============================  ==========================================================================================

Why http.client: `connect` has our deadlines, TLS rules and sentences for all doors; the library then only speaks HTTP on its socket.
Not here: what a body says (stow.py, fhir.py, notice.py).
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Final
from urllib.parse import urlsplit

from worker.deliver.association import Peer, connect
from worker.deliver.cstore import MAX_LOST, NO_RESPONSE, Outcome
from worker.domain import Document
from worker.errors import PeerRefused, PeerUnavailable, PeerUnreachable, WorkerError, cause_of

#: An answer about one document has a few hundred bytes.
MAX_BODY: Final = 1 << 20
#: Slowest line on which a document may still travel, as for C-STORE.
_SLOWEST_BYTES_PER_S: Final = 65536
#: Of these the document is not the cause (RFC 9110 §15): the wrong place, the wrong secret, a proxy before a server that is down.
_NOT_THE_DOCUMENT: Final = frozenset({*range(300, 400), 401, 403, 404, 405, 429, 502, 503, 504})


def each(documents: Sequence[Document], deliver: Callable[[Document], Outcome]) -> list[Outcome]:
    """Deliver in order; one outcome each. After two lost answers, or none at all from the peer, the rest waits."""
    outcomes: list[Outcome] = []
    lost: list[WorkerError] = []
    for document in documents:
        if len(lost) >= MAX_LOST:
            outcomes.append(Outcome(document.sop_instance_uid, error=lost[-1]))
            continue
        outcome = deliver(document)
        if isinstance(outcome.error, PeerUnreachable):
            lost = [outcome.error] * MAX_LOST
        elif isinstance(outcome.error, PeerUnavailable) and outcome.status == NO_RESPONSE:
            lost.append(outcome.error)
        outcomes.append(outcome)
    return outcomes


def refusal(status: int, what: str, *, again: Collection[int] = ()) -> WorkerError:
    """What a status means that is not a success; `what` says who answers what with it. Of `again` the server itself may think otherwise."""
    if status in again:
        return PeerUnavailable(f"{what}.")
    if status in _NOT_THE_DOCUMENT:
        return PeerUnreachable(f"{what}{', a redirect, which is not followed' if status < 400 else ''}.")
    return PeerUnavailable(f"{what}.") if status >= 500 or status == 408 else PeerRefused(f"{what}.")


def exchange(
    peer: Peer, method: str, url: str, *, body: bytes = b"", headers: Mapping[str, str], max_body: int = MAX_BODY
) -> tuple[int, bytes]:
    """Send one request, return status and body (empty where it is too long or was cut off); bounded in time as a whole.

    Raises
    ------
    PeerUnreachable
        Nothing was sent.
    PeerUnavailable
        It is not known what became of the request.
    """
    parts = urlsplit(url)
    target = parts.path + (f"?{parts.query}" if parts.query else "")
    all_headers = {"Host": parts.netloc, "Connection": "close", **headers}
    all_headers |= {"Authorization": peer.authorization} if peer.authorization else {}
    line = http.client.HTTPConnection(peer.host, peer.port)
    line.sock = sock = connect(peer)
    try:
        seconds = peer.timeout_s + len(body) / _SLOWEST_BYTES_PER_S
        with bounded(lambda: sock, seconds) as is_over:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # who has read enough answers before it has read all
                line.request(method, target or "/", body=body or None, headers=all_headers)
            with line.getresponse() as response:
                answer = b""
                with contextlib.suppress(OSError, http.client.HTTPException):
                    answer = response.read(max_body + 1)
                if is_over.is_set():
                    raise TimeoutError(f"it takes longer than {seconds:.3g} s")
                return response.status, answer if len(answer) <= max_body else b""
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = cause_of(error) if isinstance(error, OSError) else "what it sends is not HTTP"
        raise PeerUnavailable(f"{peer.name} gives no answer by HTTP: {reason}.") from error
    finally:
        line.close()
        sock.close()


@contextlib.contextmanager
def bounded(sock_of: Callable[[], socket.socket | None], seconds: float) -> Iterator[threading.Event]:
    """Cut the socket off after `seconds`: its own time-out is that of one piece, and a peer that drips would never meet it.

    Gives what is set before that: whoever reads the end of the stream must know that it is not the peer's.
    """
    is_over = threading.Event()

    def end() -> None:
        is_over.set()
        _cut(sock_of())

    timer = threading.Timer(seconds, end)
    timer.start()
    try:
        yield is_over
    finally:
        timer.cancel()


def _cut(sock: socket.socket | None) -> None:
    if sock is not None:
        with contextlib.suppress(OSError):  # of the plain socket: a TLS socket's own would send the rest in the clear
            socket.socket.shutdown(sock, socket.SHUT_RDWR)
