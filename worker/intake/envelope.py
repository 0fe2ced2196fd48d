"""MSH, the envelope of an HL7 v2 message, as it came; and the answer to it.

Read without decoding, one character a byte, so that a message whose character set is unknown or whose text is broken
can still be answered, and the sender's own names come back to it in its own bytes. Not here: what a message says (hl7.py).

Which answer (HL7 v2.5.1 §2.9.2): AA, AE, AR without MSH-15 and MSH-16, and where MSH-16 asks for an application
acknowledgment; CA, CE, CR, meaning the same here because we answer after the commit, where only MSH-15 asks; nothing
where neither asks (NE and NE, or ER and SU that do not apply). Never two answers. Engines such as Mirth take AA and CA
alike; a sender that knows AA alone must leave MSH-15 and MSH-16 empty.
"""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal

from worker.errors import RecordError
from worker.intake.facts import token

BOM: Final = b"\xef\xbb\xbf"
_HEAD_BYTES: Final = 65536
_TRIGGER: Final = re.compile(r"[A-Z][A-Z0-9]{2}\^[A-Z0-9]{3}")

#: Accepted, error (send again), rejected (do not): the second letter of MSA-1, table 0008.
Verdict = Literal["A", "E", "R"]


@dataclass(frozen=True, slots=True)
class Envelope:
    """MSH, undecoded. ``separators``: field, component, repetition, escape, subcomponent (MSH-1 and MSH-2)."""

    separators: str
    fields: tuple[str, ...]

    def raw(self, number: int) -> str:
        """Return MSH-`number` (2 and above), undecoded; '' where it is absent."""
        return self.fields[number - 1] if number <= len(self.fields) else ""

    @property
    def trigger(self) -> str:
        """MSH-9.1 and MSH-9.2, as in 'ADT^A01'."""
        return "^".join(token(part) for part in self.raw(9).split(self.separators[1])[:2])

    @property
    def trigger_label(self) -> str:
        """The trigger, or '' for what is none: it would make a new time series of each message."""
        return self.trigger if _TRIGGER.fullmatch(self.trigger) else ""

    @property
    def sender_label(self) -> str:
        """The names of MSH-3 and MSH-4, of any message, fit for a log."""
        return "|".join(token(self.raw(number).split(self.separators[1])[0])[:64] for number in (3, 4))


def read_envelope(raw: bytes) -> Envelope:
    """Read the MSH that `raw` begins with.

    Raises
    ------
    RecordError
        There is no MSH, or its separators are not five different characters.
    """
    line = re.split(b"[\r\n]", raw[:_HEAD_BYTES].removeprefix(BOM), maxsplit=1)[0].decode("latin-1")
    if not line.startswith("MSH"):
        raise RecordError("The message does not begin with an MSH segment.")
    fields = line[3:].split(line[3:4] or "|")
    separators = line[3:4] + fields[1][:4] if len(fields) > 1 else ""
    if len(set(separators)) != 5 or not separators.isascii() or any(c.isalnum() or c.isspace() for c in separators) or len(fields[1]) > 5:
        raise RecordError("MSH-1 and MSH-2 do not name five different separators.")
    return Envelope(separators, ("MSH", *fields[1:]))


def acknowledgment(envelope: Envelope | None, verdict: Verdict, reason: str, *, at: datetime) -> bytes | None:
    """Return the answer to the message of `envelope` (None: its MSH could not be read); None if it asks for none.

    `at` is when it is answered, in our zone; `reason` is a sentence without patient data.
    """
    envelope = envelope or Envelope("|^~\\&", ())
    code = _code(envelope, verdict)
    if code is None:
        return None
    raw, separators = envelope.raw, envelope.separators
    field, component = separators[0], separators[1]
    kind = raw(9).split(component)
    # MSH-9.3 is of version 2.3.1 and later: older senders do not have it and do not expect it.
    message_type = component.join(["ACK", *kind[1:2], *(["ACK"] if len(kind) > 2 else [])])
    sent_at, control_id = at.strftime("%Y%m%d%H%M%S%z"), uuid.uuid4().hex[:20]
    header = [raw(5), raw(6), raw(3), raw(4), sent_at, "", message_type, control_id, raw(11) or "P", raw(12) or "2.5.1"]
    header += ["", "", "", "", "", raw(18)]
    text = "".join(c if c not in separators and " " <= c <= "~" else " " for c in reason)
    msh = field.join(["MSH", separators[1:], *header]).rstrip(field)
    msa = field.join(["MSA", code, raw(10), text]).rstrip(field)
    return f"{msh}\r{msa}\r".encode("latin-1")


def _code(envelope: Envelope, verdict: Verdict) -> str | None:
    accept, application = envelope.raw(15).strip(), envelope.raw(16).strip()
    if envelope.trigger.startswith("ACK"):
        return None  # or two listeners would answer each other for ever
    if not accept and not application:
        return f"A{verdict}"
    asking = {"AL", "SU" if verdict == "A" else "ER"}
    if application in asking:
        return f"A{verdict}"
    return f"C{verdict}" if accept in asking else None
