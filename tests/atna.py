"""What an audit message must be, written down from PS3.15 §A.5 by hand, and a repository that takes them by syslog over TLS."""

from __future__ import annotations

import base64
import re
import socket
import ssl
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, Final, Self
from xml.etree.ElementTree import Element, fromstring

# RFC 5424 §6: PRI and VERSION, TIMESTAMP, HOSTNAME, APP-NAME, PROCID, MSGID, no structured data, a BOM, the message.
_SYSLOG: Final = re.compile(
    r"<(84|85)>1 \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z [!-~]{1,255} synoptic \d+ DICOM\+RFC3881 - \ufeff(<AuditMessage>.*</AuditMessage>)"
)
_CODE: Final = {"csd-code": "token", "codeSystemName": "token", "originalText": "token"}
_OUTCOMES: Final = ("0", "4", "8", "12")

#: §A.5.1.1: of each element its attributes (a trailing ? where it may lack) and, in order, its children with how often they may come.
SCHEMA: Final[dict[str, tuple[dict[str, object], list[tuple[str, int, int]]]]] = {
    "AuditMessage": (
        {},
        [
            ("EventIdentification", 1, 1),
            ("ActiveParticipant", 1, 99),
            ("AuditSourceIdentification", 1, 1),
            ("ParticipantObjectIdentification", 0, 99),
        ],
    ),
    "EventIdentification": (
        {"EventActionCode?": ("C", "R", "U", "D", "E"), "EventDateTime": "time", "EventOutcomeIndicator": _OUTCOMES},
        [("EventID", 1, 1), ("EventTypeCode", 0, 99), ("EventOutcomeDescription", 0, 1)],
    ),
    "EventID": (_CODE, []),  # type: ignore[dict-item]
    "EventTypeCode": (_CODE, []),  # type: ignore[dict-item]
    "EventOutcomeDescription": ({}, []),
    "ActiveParticipant": (
        {
            "UserID": "token",
            "AlternativeUserID?": "aes",
            "UserName?": "token",
            "UserIsRequestor": ("true", "false"),
            "NetworkAccessPointID?": "token",
            "NetworkAccessPointTypeCode?": ("1", "2"),
        },
        [("RoleIDCode", 0, 99)],
    ),
    "RoleIDCode": (_CODE, []),  # type: ignore[dict-item]
    "AuditSourceIdentification": ({"AuditSourceID": "token"}, [("AuditSourceTypeCode", 0, 99)]),
    "AuditSourceTypeCode": ({"csd-code": tuple("123456789")}, []),
    "ParticipantObjectIdentification": (
        {
            "ParticipantObjectID": "token",
            "ParticipantObjectTypeCode?": ("1", "2", "3", "4"),
            "ParticipantObjectTypeCodeRole?": tuple(map(str, range(1, 27))),
        },
        [
            ("ParticipantObjectIDTypeCode", 1, 1),
            ("ParticipantObjectName", 0, 1),
            ("ParticipantObjectQuery", 0, 1),
            ("ParticipantObjectDetail", 0, 99),
            ("ParticipantObjectDescription", 0, 99),
        ],
    ),
    "ParticipantObjectIDTypeCode": (_CODE, []),  # type: ignore[dict-item]
    "ParticipantObjectName": ({}, []),
    "ParticipantObjectQuery": ({}, []),
    "ParticipantObjectDetail": ({"type": "token", "value": "base64"}, []),
    "ParticipantObjectDescription": ({}, [("Accession", 0, 99), ("SOPClass", 0, 99)]),
    "Accession": ({"Number": "token"}, []),
    "SOPClass": ({"UID?": "token", "NumberOfInstances": "number"}, []),
}

#: §A.5.3: event → its name, its actions, the roles that must each be there once, the types of objects that must, those that may.
EVENTS: Final[dict[str, tuple[str, str, set[str], set[str], set[str]]]] = {
    "110100": ("Application Activity", "E", {"110150"}, set(), set()),
    "110102": ("Begin Transferring DICOM Instances", "E", {"110152", "110153"}, {"110180", "2"}, set()),
    "110103": ("DICOM Instances Accessed", "CRUD", set(), {"110180", "2"}, set()),
    # What could not be read at all has neither study nor patient.
    "110104": ("DICOM Instances Transferred", "CRU", {"110152", "110153"}, set(), {"110180", "2"}),
    "110110": ("Patient Record", "CRUD", set(), {"2"}, set()),
    "110112": ("Query", "E", {"110152", "110153"}, set(), {"110181", "12"}),
    "110113": ("Security Alert", "E", set(), set(), {"110182", "12"}),
    "110114": ("User Authentication", "E", set(), set(), set()),
}


def checked(line: str) -> Element:
    """Return the message of one line of a trail or one syslog message; it must be what RFC 5424 and PS3.15 want."""
    found = _SYSLOG.fullmatch(line)
    assert found, line[:200]
    assert "\n" not in line
    assert len(line.encode()) < 32768
    root = fromstring(found[2])
    _check(root)
    event = root[0]
    code = event.find("EventID")
    assert code is not None
    name, actions, roles, must, may = EVENTS[code.attrib["csd-code"]]
    assert code.attrib["originalText"] == name
    assert event.attrib["EventActionCode"] in actions
    assert (found[1] == "85") == (event.attrib["EventOutcomeIndicator"] == "0")
    shown = [one.attrib["csd-code"] for one in root.iter("RoleIDCode")]
    assert sorted(shown) == sorted(roles) or (not roles and shown == ["110153", "110152"])  # a feed's are not asked for
    types = {one.attrib["csd-code"] for one in root.iter("ParticipantObjectIDTypeCode")}
    assert must <= types <= must | may
    return root


def _check(element: Element) -> None:
    attributes, children = SCHEMA[element.tag]
    rules = {name.rstrip("?"): rule for name, rule in attributes.items()}
    assert set(element.attrib) <= set(rules), element.tag
    assert {name for name in attributes if not name.endswith("?")} <= set(element.attrib), element.tag
    for name, value in element.attrib.items():
        _check_value(rules[name], value)
    order = [name for name, _, _ in children]
    tags = [child.tag for child in element]
    assert tags == sorted(tags, key=order.index)
    for name, least, most in children:
        assert least <= tags.count(name) <= most, (element.tag, name)
    if element.tag == "ParticipantObjectIdentification":
        assert tags.count("ParticipantObjectName") + tags.count("ParticipantObjectQuery") == 1
    if element.tag == "ParticipantObjectQuery":
        base64.b64decode(element.text or "", validate=True)
    for child in element:
        _check(child)


def _check_value(rule: object, value: str) -> None:
    assert value.strip()
    if isinstance(rule, tuple):
        assert value in rule
    elif rule == "time":
        assert datetime.fromisoformat(value).tzinfo is not None
    elif rule == "base64":
        base64.b64decode(value, validate=True)
    elif rule == "number":
        assert int(value) > 0
    elif rule == "aes":
        assert value.startswith("AETITLES=")


def lines(folder: Path) -> list[str]:
    """Every line of a trail that is not empty."""
    return [line for path in sorted(folder.glob("*.log")) for line in path.read_text("utf-8").split("\n") if line]


def trail(folder: Path, event: str = "") -> list[Element]:
    """Every message of a trail, checked; of one event or all."""
    found = [checked(line) for line in lines(folder)]
    return [one for one in found if not event or one[0][0].attrib["csd-code"] == event]


def outcome(message: Element) -> str:
    """Its outcome indicator."""
    return message[0].attrib["EventOutcomeIndicator"]


def objects(message: Element) -> list[str]:
    """The identifiers of what it speaks of."""
    return [one.attrib["ParticipantObjectID"] for one in message.iter("ParticipantObjectIdentification")]


def details(message: Element) -> dict[str, str]:
    """What it says in base64."""
    return {one.attrib["type"]: base64.b64decode(one.attrib["value"]).decode() for one in message.iter("ParticipantObjectDetail")}


@dataclass
class Repository:
    """An Audit Record Repository (RFC 5425) that keeps what it gets, and may be killed and started again on its port."""

    context: ssl.SSLContext
    port: int = 0
    received: list[str] = field(default_factory=list)
    connections: int = 0
    _listener: socket.socket | None = None
    _open: list[socket.socket] = field(default_factory=list)

    def start(self) -> None:
        """Listen."""
        self._listener = socket.create_server(("127.0.0.1", self.port), reuse_port=False)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def kill(self) -> None:
        """End it as `kill -9` does: with what was not read."""
        listener, self._listener = self._listener, None
        if listener:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for sock in self._open:
            with suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
            sock.close()
        self._open.clear()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.kill()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                sock, _ = listener.accept()
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        with suppress(OSError, ValueError):
            sock = self.context.wrap_socket(plain, server_side=True)
            self._open.append(sock)
            self.connections += 1
            with sock.makefile("rb") as file:
                while (length := _length(file)) is not None:
                    data = file.read(length)
                    if len(data) < length:
                        return
                    self.received.append(data.decode())


def _length(file: BinaryIO) -> int | None:
    """MSG-LEN and its blank."""
    digits = b""
    while (one := file.read(1)) != b" ":
        if not one:
            return None
        digits += one
    return int(digits)
