"""Senders for the crash campaign: each remembers what it was told Success for, and sends again what it was not."""

from __future__ import annotations

import struct
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from pydicom import Dataset, dcmread
from pydicom.uid import generate_uid
from pynetdicom.pdu import A_ASSOCIATE_AC

from tests.scu import EXPLICIT, Scu, encoded, slice_of
from worker.errors import PeerUnavailable
from worker.intake import mllp

ULTRASOUND = "1.2.840.10008.5.1.4.1.1.6.1"
#: A message goes out in pieces of this many bytes with a short pause between, as from a slow modality: a kill must find some under way.
PIECE_BYTES, PAUSE_S = 16_000, 0.002


@dataclass(frozen=True, slots=True)
class Item:
    """One instance to send."""

    study: str
    instance: str
    sop_class: str
    syntax: str
    dataset: Dataset
    data: bytes


class Repeating(ABC):
    """Sends in a thread until told to finish; what was not acknowledged is sent again."""

    stop: threading.Event
    has_finished: bool

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._run, name=type(self).__name__, daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def finish(self) -> None:
        """Send what is under way until it is acknowledged, and no more."""
        self.stop.set()
        self._thread.join(300)
        if self._thread.is_alive():
            raise AssertionError(f"The last message of {self._thread.name} was not taken within 300 s.")
        if not self.has_finished:  # an exception ended it, and the load with it
            raise AssertionError(f"{self._thread.name} stopped before it was told to.")

    @abstractmethod
    def _run(self) -> None:
        """Send until told to stop."""


@dataclass
class Sender(Repeating):
    """One modality: sends what `items` gives, one association after another, until `stop`; `may_send` holds it back.

    ``acknowledged`` holds SOP Instance UID → Study Instance UID of what was answered 0x0000, ``again`` counts what was sent once more,
    ``longest_s`` is how long the one that had to wait longest was sent again and again.
    """

    address: tuple[str, int]
    called: str
    calling: str
    items: Iterator[Item]
    may_send: Callable[[], bool] = lambda: True
    acknowledged: dict[str, str] = field(default_factory=dict)
    again: int = 0
    longest_s: float = 0.0
    has_finished: bool = False
    stop: threading.Event = field(default_factory=threading.Event)

    def _run(self) -> None:
        for item in self.items:
            while not self.may_send() and not self.stop.wait(0.1):
                continue
            if self.stop.is_set():
                break
            began = time.monotonic()
            while not self._send(item):
                self.again += 1
                self.stop.wait(0.1)
            self.longest_s = max(self.longest_s, time.monotonic() - began)
            self.acknowledged[item.instance] = item.study
            self.stop.wait(0.02)
        self.has_finished = True

    def _send(self, item: Item) -> bool:
        """Whether it was acknowledged."""
        try:
            with Scu(self.address, timeout_s=30) as scu:
                answer = scu.associate([(item.sop_class, [item.syntax])], called=self.called, calling=self.calling)
                if not isinstance(answer, A_ASSOCIATE_AC):
                    return False
                scu.begin_store(item.dataset)
                for start in range(0, len(item.data), PIECE_BYTES):
                    scu.send_data(item.data[start : start + PIECE_BYTES], is_last=start + PIECE_BYTES >= len(item.data))
                    self.stop.wait(PAUSE_S)
                is_taken = scu.status() == 0x0000
                with suppress(OSError):  # what was promised stays promised
                    scu.release()
                return is_taken
        except (OSError, AssertionError, ValueError, LookupError, struct.error):  # it was killed in the middle of a word
            return False


@dataclass
class Laboratory(Repeating):
    """Results over MLLP, one after another, each of a patient who has no images; each is sent again until it is answered AA."""

    address: tuple[str, int]
    #: Control IDs.
    acknowledged: set[str] = field(default_factory=set)
    again: int = 0
    has_finished: bool = False
    stop: threading.Event = field(default_factory=threading.Event)

    def _run(self) -> None:
        for number in count():
            if self.stop.is_set():
                break
            message = _result(number)
            while True:
                with suppress(PeerUnavailable):
                    if mllp.send(self.address, [message], timeout_s=30) == ["AA"]:
                        break
                self.again += 1
                self.stop.wait(0.1)
            self.acknowledged.add(f"C{number}")
            self.stop.wait(0.2)
        self.has_finished = True


def _result(number: int) -> bytes:
    return "\r".join(
        [
            rf"MSH|^~\&|LAB|CRASH|SYNOPTIC|RAD|20260102101112||ORU^R01^ORU_R01|C{number}|P|2.5.1||||||UNICODE UTF-8",
            f"PID|1||C-{number % 50}^^^CRASH^MR||Made^Up{number % 50}|||F",
            f"OBR|1||O{number}|LAB^Laboratory^L|||20260102101112",
            f"OBX|1|NM|1988-5^C reactive protein^LN||{number}|mg/L^mg/L^UCUM|||||F|||20260102101112",
            "",
        ]
    ).encode()


def radiographs(paths: Sequence[Path]) -> Iterator[Item]:
    """The real radiographs for ever, each time as a new study of the same patient."""
    for number in count():
        ds = dcmread(paths[number % len(paths)])
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID = generate_uid(), generate_uid(), generate_uid()
        data = encoded(ds, is_implicit=ds.file_meta.TransferSyntaxUID.is_implicit_VR)
        yield Item(ds.StudyInstanceUID, ds.SOPInstanceUID, ds.SOPClassUID, ds.file_meta.TransferSyntaxUID, ds, data)


def ultrasound(*, images: int = 40, rows: int = 160) -> Iterator[Item]:
    """Studies that no bundle takes, for ever: so many images each."""
    for _ in count():
        study = generate_uid()
        for _ in range(images):
            ds = slice_of(study, rows=rows, Modality="US", SOPClassUID=ULTRASOUND)
            yield Item(study, ds.SOPInstanceUID, ULTRASOUND, EXPLICIT, ds, encoded(ds))
