"""The HL7 v2 listener on real sockets: framing, bounds, and that nothing is acknowledged before it is kept."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import cast

import pytest

from tests.conftest import Captured
from worker import config
from worker.errors import PatientConflict, PeerUnavailable, RecordError
from worker.intake.hl7 import ParsedMessage
from worker.intake.mllp import Limits, MllpServer, frames, send, split_messages
from worker.record_feeds import records_listener
from worker.store.database import Store

START, END = b"\x0b", b"\x1c\r"
SENTINEL = "ZZSENTINEL"
CLOCK = datetime(2020, 5, 6, 12, 0, tzinfo=UTC)


def admission(control_id: str = "C1", *, accept: str = "", application: str = "", pid: str = f"1||4711^^^HOSP||{SENTINEL}") -> bytes:
    head = f"MSH|^~\\&|HIS|HOSP|SYN|RAD|20200506||ADT^A01^ADT_A01|{control_id}|P|2.5.1|||{accept}|{application}||UNICODE UTF-8"
    return f"{head}\rPID|{pid}\r".encode()


@dataclass
class Records:
    """The other side of the listener: what was committed, what was kept for a person; may fail as told."""

    committed: dict[str, bytes] = field(default_factory=dict)
    kept: list[tuple[str, bytes]] = field(default_factory=list)
    failure: Exception | None = None
    refusal: Exception | None = None
    entered: threading.Event = field(default_factory=threading.Event)
    may_commit: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.may_commit.set()

    def apply(self, message: ParsedMessage, raw: bytes) -> bool:
        self.entered.set()
        assert self.may_commit.wait(30)
        if self.failure:
            raise self.failure
        is_new = message.control_id not in self.committed
        self.committed[message.control_id] = raw
        return is_new

    def reject(self, reason: str, raw: bytes) -> None:
        if self.refusal:
            raise self.refusal
        self.kept.append((reason, raw))


@pytest.fixture
def records() -> Records:
    return Records()


Serve = Callable[..., MllpServer]


@pytest.fixture
def serve(records: Records) -> Iterator[Serve]:
    """Start a listener on a free port."""
    servers: list[MllpServer] = []

    def start(*, allowed: tuple[str, ...] = ("127.0.0.0/8",), **limits: float) -> MllpServer:
        made = MllpServer(
            ("127.0.0.1", 0),
            apply=records.apply,
            reject=records.reject,
            zone=UTC,
            issuers={},
            allowed_addresses=allowed,
            clock=lambda: CLOCK,
            **limits,  # type: ignore[arg-type]
        )
        made.start()
        servers.append(made)
        return made

    yield start
    for server in servers:
        server.stop()


@contextmanager
def connected(server: MllpServer) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        yield connection


def answers(connection: socket.socket, count: int) -> list[bytes]:
    """Read `count` whole answers, or as many as come before the end."""
    data = b""
    while data.count(END) < count and (chunk := connection.recv(65536)):
        data += chunk
    return [one.removeprefix(START) for one in data.split(END) if one]


def is_closed(connection: socket.socket) -> bool:
    """Whether the listener ends the connection without a further byte."""
    try:
        return connection.recv(1) == b""
    except ConnectionError:  # it left bytes of ours unread
        return True


def codes(server: MllpServer, *messages: bytes) -> list[str]:
    return send(("127.0.0.1", server.port), messages, timeout_s=30)


@pytest.mark.requirement("F6")
def test_a_new_a_repeated_and_an_unused_message_are_accepted(serve: Serve, records: Records, captured: Captured) -> None:
    server = serve()
    unused = admission("C2").replace(b"ADT^A01", b"SIU^S12")
    assert codes(server, admission(), admission(), unused) == ["AA", "AA", "AA"]
    assert list(records.committed) == ["C1", "C2"]
    server.stop()
    assert [facts["result"] for facts in captured.named("message.accepted")] == ["applied", "duplicate", "ignored"]


def test_the_answer_names_the_message_and_turns_the_names_around(serve: Serve) -> None:
    with connected(serve()) as connection:
        connection.sendall(START + admission("ID7") + END)
        (answer,) = answers(connection, 1)
    msh, msa, _ = answer.decode().split("\r")
    fields = msh.split("|")
    assert fields[:9] == ["MSH", "^~\\&", "SYN", "RAD", "HIS", "HOSP", "20200506120000+0000", "", "ACK^A01^ACK"]
    assert fields[9] not in ("", "ID7")
    assert fields[10:] == ["P", "2.5.1", "", "", "", "", "", "UNICODE UTF-8"]
    assert msa == "MSA|AA|ID7"


@pytest.mark.requirement("F7")
def test_nothing_is_answered_before_it_is_committed(serve: Serve, records: Records) -> None:
    records.may_commit.clear()
    with connected(serve()) as connection:
        connection.sendall(START + admission() + END)
        assert records.entered.wait(30)
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        records.may_commit.set()
        connection.settimeout(30)
        assert b"MSA|AA|C1" in answers(connection, 1)[0]


@pytest.mark.requirement("F7")
def test_what_cannot_be_stored_is_an_error_and_the_resend_is_accepted(serve: Serve, records: Records, captured: Captured) -> None:
    server = serve()
    records.failure = OSError(f"row of {SENTINEL}")
    assert codes(server, admission()) == ["AE"]
    assert not records.kept
    records.failure = None
    assert codes(server, admission()) == ["AA"]
    assert captured.named("message.refused")[0]["reason"] == "The message could not be stored: OSError."


@pytest.mark.requirement("F7")
def test_what_cannot_be_understood_is_rejected_and_kept(serve: Serve, records: Records) -> None:
    bad = admission(pid=f"1||^^^HOSP||{SENTINEL}")
    assert codes(serve(), bad, admission("C2")) == ["AR", "AA"]
    ((reason, raw),) = records.kept
    assert ("PID-3.1" in reason, raw) == (True, bad)


def test_a_refusal_that_cannot_be_kept_is_an_error(serve: Serve, records: Records) -> None:
    """AR would make the sender drop a message that nobody has."""
    records.refusal = OSError()
    assert codes(serve(), admission(pid="1")) == ["AE"]


def test_what_the_store_refuses_for_good_is_rejected(serve: Serve, records: Records) -> None:
    records.failure = PatientConflict("Two patients.")
    assert codes(serve(), admission()) == ["AR"]
    assert records.kept


def test_a_message_without_a_readable_header_is_rejected_without_its_id(serve: Serve, records: Records) -> None:
    with connected(serve()) as connection:
        connection.sendall(START + b"PID|1||4711" + END)
        (answer,) = answers(connection, 1)
    assert b"MSA|AR||The message does not begin with an MSH segment." in answer
    assert records.kept


@pytest.mark.parametrize(
    ("accept", "application", "good", "bad"),
    [
        ("", "", "AA", "AR"),
        ("AL", "NE", "CA", "CR"),
        ("AL", "", "CA", "CR"),
        ("AL", "AL", "AA", "AR"),
        ("NE", "AL", "AA", "AR"),
        ("ER", "NE", None, "CR"),
        ("NE", "ER", None, "AR"),
        ("SU", "NE", "CA", None),
        ("NE", "NE", None, None),
    ],
)
def test_the_sender_says_which_answer_it_wants(
    serve: Serve, records: Records, accept: str, application: str, good: str | None, bad: str | None
) -> None:
    server = serve()
    with connected(server) as connection:
        for message in (
            admission("GOOD", accept=accept, application=application),
            admission("BAD", accept=accept, application=application, pid="1"),
            admission("LAST"),
        ):
            connection.sendall(START + message + END)
        expected = [f"MSA|{code}|{name}" for code, name in ((good, "GOOD"), (bad, "BAD"), ("AA", "LAST")) if code]
        got = [answer.decode().split("\r")[1] for answer in answers(connection, len(expected))]
    assert [msa[: len(wanted)] for msa, wanted in zip(got, expected, strict=True)] == expected
    assert set(records.committed) == {"GOOD", "LAST"}
    assert len(records.kept) == 1


def test_an_acknowledgment_is_not_acknowledged(serve: Serve) -> None:
    with connected(serve()) as connection:
        connection.sendall(START + admission("ACK1").replace(b"ADT^A01^ADT_A01", b"ACK^A01^ACK") + END + START + admission("C2") + END)
        assert b"MSA|AA|C2" in answers(connection, 1)[0]


@pytest.mark.requirement("F8")
def test_two_messages_in_a_packet_and_one_byte_by_byte_are_whole(serve: Serve) -> None:
    with connected(serve()) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(b"\r\n noise" + START + admission("C1") + END + b"\r\n" + START + admission("C2") + END)
        for byte in START + admission("C3") + END:
            connection.sendall(bytes([byte]))
        got = answers(connection, 3)
    assert [answer.decode().split("\r")[1] for answer in got] == ["MSA|AA|C1", "MSA|AA|C2", "MSA|AA|C3"]


class Chunks(socket.socket):
    """A connection whose bytes arrive as told, and then end."""

    def __init__(self, *chunks: bytes) -> None:
        super().__init__()
        self.chunks = [*chunks, b""]

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        return self.chunks.pop(0)


@pytest.mark.requirement("F8")
def test_a_frame_may_be_cut_anywhere() -> None:
    sent = START + b"one" + END + START + b"two" + END
    for cut in range(1, len(sent)):
        with Chunks(sent[:cut], sent[cut:]) as connection:
            assert list(frames(connection, Limits())) == [b"one", b"two"]


def test_a_vertical_tab_in_a_text_is_no_start_block(serve: Serve) -> None:
    """Word processors leave them; closing the connection would have the sender repeat it for ever."""
    assert codes(serve(), admission() + b"NTE|1||line\x0bline\r") == ["AA"]


@pytest.mark.requirement("F8")
@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (START + admission("C1")[:40], "ended inside"),
        (START + admission("C1") + START + admission("C2") + END, "start block"),
        (b"MSH|^~\\&|" * 10_000, "without a start block"),
    ],
)
def test_what_is_not_a_frame_is_never_answered(serve: Serve, records: Records, captured: Captured, sent: bytes, reason: str) -> None:
    with connected(serve()) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        assert is_closed(connection)
    assert not records.committed
    assert [reason in str(facts["reason"]) for facts in captured.named("message.refused")] == [True]


@pytest.mark.requirement("F8")
def test_a_message_without_end_is_cut_at_its_deadline(serve: Serve, records: Records, captured: Captured) -> None:
    with connected(serve(message_deadline_s=0.1)) as connection:
        connection.sendall(START + admission())
        assert is_closed(connection)
    assert not records.committed
    assert "not whole within 0.1 s" in str(captured.named("message.refused")[0]["reason"])


@pytest.mark.requirement("F8")
def test_a_message_too_long_is_rejected_at_the_limit_and_its_head_is_kept(serve: Serve, records: Records) -> None:
    """A listener that just closed would reset the connection, and the sender would not learn why, and try again."""
    server = serve(max_message_bytes=200_000)
    with connected(server) as connection:
        connection.sendall(START + admission("LONG") + b"x" * 5_000_000)  # as many senders do, before it looks for an answer
        (answer,) = answers(connection, 1)
        assert is_closed(connection)
    assert b"MSA|AR|LONG|The message has more than 200000 bytes." in answer
    ((_, raw),) = records.kept
    assert len(raw) == 65536


def test_a_silent_connection_is_closed(serve: Serve) -> None:
    with connected(serve(idle_s=0.1)) as connection:
        assert is_closed(connection)


@pytest.mark.parametrize("allowed", [(), ("10.0.0.0/8",), ("127.0.0.2",)])
def test_other_addresses_are_closed_unread(serve: Serve, records: Records, captured: Captured, allowed: tuple[str, ...]) -> None:
    with pytest.raises(PeerUnavailable):
        codes(serve(allowed=allowed), admission())
    assert not records.committed
    assert captured.named("message.refused")[0]["reason"] == "The peer's address is not allowed."


def test_more_connections_than_allowed_are_closed_and_the_place_is_free_again(serve: Serve, records: Records) -> None:
    server = serve(max_connections=1)
    with connected(server) as first:
        first.sendall(START + admission() + END)
        answers(first, 1)
        with pytest.raises(PeerUnavailable):
            codes(server, admission("C2"))
        first.shutdown(socket.SHUT_WR)
        assert is_closed(first)  # closed by the listener after its place was given back
    assert codes(server, admission("C3")) == ["AA"]


def test_how_many_connections_there_may_be_and_how_long_idle_is_the_sites(captured: Captured) -> None:
    settings = config.Records(port=0, max_connections=1, idle_s=0.1)
    server = records_listener(config.Config(records=settings), cast("Store", None))
    server.start()
    try:
        with connected(server) as first:
            with connected(server) as second:
                assert is_closed(second)
            assert is_closed(first)
    finally:
        server.stop()
    assert [one["reason"] for one in captured.named("message.refused")] == ["1 connections are open already."]


def test_stopping_answers_the_message_that_is_being_applied(serve: Serve, records: Records) -> None:
    server = serve()
    records.may_commit.clear()
    with connected(server) as connection:
        connection.sendall(START + admission() + END)
        assert records.entered.wait(30)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        records.may_commit.set()
        assert b"MSA|AA|C1" in answers(connection, 1)[0]
        assert is_closed(connection)
        stopping.join()
    with pytest.raises(PeerUnavailable):
        codes(server, admission())


@pytest.mark.requirement("X1")
def test_no_event_and_no_answer_names_the_patient(serve: Serve, records: Records, captured: Captured) -> None:
    server = serve()
    with connected(server) as connection:
        records.failure = ValueError(SENTINEL)
        connection.sendall(START + admission() + END + START + admission(pid=f"1||{SENTINEL}||{SENTINEL}") + END)
        got = answers(connection, 2)
    server.stop()
    assert len(got) == len(captured) == 2
    assert SENTINEL not in f"{got} {captured}"


def test_an_answer_to_another_message_is_no_answer() -> None:
    """A late answer taken for this message's would hide that this one was lost."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def peer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(START + b"MSH|^~\\&|A|B|C|D|2020||ACK|9|P|2.5\rMSA|AA|OTHER\r" + END)

        thread = threading.Thread(target=peer)
        thread.start()
        with pytest.raises(PeerUnavailable, match="message 1"):
            send(listener.getsockname(), [admission()], timeout_s=30)
        thread.join()


@pytest.mark.parametrize("end", [b"\r", b"\n", b"\r\n"])
@pytest.mark.parametrize("between", [b"", b"\n", b"\r\n\r\n"])
def test_a_file_is_split_into_the_messages_it_was_made_of(end: bytes, between: bytes) -> None:
    messages = [admission("C1"), admission("C2") + b"NTE|1||MSH|text\r"]
    data = (
        b"\xef\xbb\xbfFHS|^~\\&|A" + end + b"BHS|^~\\&" + end + between.join(one.replace(b"\r", end) for one in messages) + b"BTS|2" + end
    )
    assert split_messages(data) == messages
    assert split_messages(b"".join(START + one + END for one in messages)) == messages


def test_a_file_of_something_else_is_refused() -> None:
    assert split_messages(b"\n \n") == []
    with pytest.raises(RecordError, match="MSH"):
        split_messages(b"PID|1\r" + admission())
