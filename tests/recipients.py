"""Who gets results beside the PACS, on loopback and as they are told to be: a RIS (MLLP), a webhook, a mail server."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Final, Self

from tests.http_peer import HttpPeer
from worker.deliver.association import Peer

START, END = b"\x0b", b"\x1c\r"
#: A peer that keeps silent does so until it is stopped, and never longer.
SILENCE_S: Final = 20.0
#: What a peer sends after a message, as it stands; None: nothing, and the connection stays; an empty one closes it.
Step = Callable[[bytes], bytes | None]


def control_id(message: bytes) -> str:
    """MSH-10."""
    return message.split(b"\r", 1)[0].split(b"|")[9].decode()


def acknowledged(code: str = "AA", *, of: str = "", more: str = "", end: str = "\r") -> Step:
    """Answer with this code, of the message that came unless `of` another, and `more` segments."""

    def step(message: bytes) -> bytes:
        lines = [
            "MSH|^~\\&|RIS|H|SYNOPTIC||20260101120000||ACK^R01^ACK|77|P|2.5.1",
            f"MSA|{code}|{of or control_id(message)}|ZZNAME is not known",
        ]
        return START + end.join([*lines, *filter(None, [more]), ""]).encode() + END

    return step


def silence(_message: bytes) -> None:
    """Say nothing."""


def hang_up(_message: bytes) -> bytes:
    """Close without an answer."""
    return b""


@dataclass
class Server(ABC):
    """A TCP server with a thread a connection; ends with the block."""

    tls: ssl.SSLContext | None = None
    connections: int = 0
    _stopped: threading.Event = field(default_factory=threading.Event)
    _listener: socket.socket = field(init=False)
    _open: list[socket.socket] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=32)
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for one in self._open:
            one.close()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._listener.getsockname()[1])

    def _accept(self) -> None:
        while not self._stopped.is_set():
            try:
                one = self._listener.accept()[0]
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._run, args=(one,), daemon=True).start()

    def _run(self, one: socket.socket) -> None:
        with contextlib.suppress(OSError), one:
            one.settimeout(SILENCE_S)
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._open.append(one)
            self.serve(one)

    @abstractmethod
    def serve(self, one: socket.socket) -> None:
        """Speak on one connection until it ends."""


@dataclass
class Ris(Server):
    """Gives `steps`, one for each message, and then AA."""

    steps: Sequence[Step] = ()
    received: list[bytes] = field(default_factory=list)

    def peer(self, *, timeout_s: float = 5.0) -> Peer:
        """How we call it."""
        return Peer("the RIS", "", "127.0.0.1", self.port, "", timeout_s=timeout_s, door="hl7")

    @property
    def orders(self) -> set[str]:
        """What it has filed: one for each control ID."""
        return {control_id(message) for message in self.received}

    def serve(self, one: socket.socket) -> None:
        """Read frames and answer each."""
        if self.tls:
            one = self.tls.wrap_socket(one, server_side=True)
            self._open.append(one)
        pending = b""
        while chunk := one.recv(65536):
            pending += chunk
            while (end := pending.find(END)) >= 0:
                assert pending.startswith(START)
                message, pending = pending[1:end], pending[end + len(END) :]
                step = self.steps[len(self.received)] if len(self.received) < len(self.steps) else acknowledged()
                self.received.append(message)
                answer = step(message)
                if answer is None:
                    self._stopped.wait(SILENCE_S)
                if not answer:
                    return
                one.sendall(answer)


@dataclass
class Hook(HttpPeer):
    """A webhook's receiver that answers `statuses`, and then 204."""

    protocol = "HTTP/1.0"
    statuses: Sequence[int] = ()
    received: list[tuple[dict[str, str], bytes]] = field(default_factory=list)

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Keep what is posted."""
        body = request.rfile.read(int(request.headers["Content-Length"]))
        number = len(self.received)
        self.received.append(({name.lower(): value for name, value in request.headers.items()}, body))
        request.send_response(self.statuses[number] if number < len(self.statuses) else 204)
        request.end_headers()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}/notices"

    def peer(self, *, secret: str = "", timeout_s: float = 5.0) -> Peer:
        """How we call it."""
        return Peer("the webhook", "", "127.0.0.1", self.port, "", timeout_s=timeout_s, url=self.url, door="webhook", secret=secret)


@dataclass
class MailServer(Server):
    """Takes mail as SMTP asks (RFC 5321). `replies` gives another answer to a verb; an empty one closes the connection."""

    replies: dict[str, str] = field(default_factory=dict)
    refuses: Sequence[str] = ()
    login: str = ""
    mails: list[bytes] = field(default_factory=list)
    verbs: list[str] = field(default_factory=list)

    def peer(self, *, to: Sequence[str] = ("a@h.example", "b@h.example"), secret: str = "", timeout_s: float = 5.0) -> Peer:
        """How we call it, without TLS."""
        own = {"mail_from": "synoptic@h.example", "mail_to": tuple(to), "secret": secret}
        return Peer("the mail server", "", "127.0.0.1", self.port, "", timeout_s=timeout_s, door="mail", **own)  # type: ignore[arg-type]

    def serve(self, one: socket.socket) -> None:
        """Answer verb by verb."""
        stream = one.makefile("rwb")
        self._say(stream, self.replies.get("", "220 mail ready"))
        while line := stream.readline():
            verb = re.split(rb"[\s:]", line)[0].decode().upper()
            self.verbs.append(verb)
            answer = self.replies.get(verb, self._usual(verb, line.decode()))
            if not answer:
                return
            self._say(stream, answer)
            if verb == "STARTTLS" and answer.startswith("220"):
                assert self.tls is not None
                stream.close()
                one = self.tls.wrap_socket(one, server_side=True)
                self._open.append(one)
                stream = one.makefile("rwb")
            if verb == "DATA" and answer.startswith("354"):
                self.mails.append(b"".join(iter(stream.readline, b".\r\n")))
                said = self.replies.get("mail", "250 queued")
                if not said:
                    return
                self._say(stream, said)

    def _usual(self, verb: str, line: str) -> str:
        if verb == "EHLO":
            return "250-mail\r\n" + ("250-STARTTLS\r\n" if self.tls else "") + "250 AUTH PLAIN"
        if verb == "RCPT":
            return "550 no such user ZZNAME" if any(name in line for name in self.refuses) else "250 ok"
        if verb == "AUTH":
            return "235 welcome" if line.split()[-1] == self.login else "535 no"
        return {"DATA": "354 go on", "STARTTLS": "220 go on", "QUIT": "221 bye"}.get(verb, "250 ok")

    @staticmethod
    def _say(stream: object, text: str) -> None:
        stream.write(f"{text}\r\n".encode())  # type: ignore[attr-defined]
        stream.flush()  # type: ignore[attr-defined]


@contextlib.contextmanager
def ris(*steps: Step, tls: ssl.SSLContext | None = None) -> Iterator[Ris]:
    """Run a RIS that gives these answers."""
    with Ris(steps=steps, tls=tls) as running:
        yield running
