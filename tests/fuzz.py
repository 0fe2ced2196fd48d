"""Real files with one to four faults put into them, through the receiver's header reader and the decoding processes.

::

    python -m tests.fuzz [MINUTES] [SEED]    faults for so long; one line of counts, exit status 1 and the seed if anything escapes

An outcome is typed: a volume, `InstanceRefused`, or one of our errors. Anything else is a bug, and so is a process that does not
come back. Each file's faults follow from its seed alone. Not here: whole files made to be hostile (tests/integration/test_hostile.py).
"""

from __future__ import annotations

import hashlib
import random
import re
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil

from tests.files import below, sendable
from worker.domain import Instance, Series
from worker.errors import DecoderDied, WorkerError
from worker.imaging import volume
from worker.imaging.codecs import CODECS
from worker.imaging.decoding import DecoderPool
from worker.intake.header import InstanceRefused, read_header
from worker.store.spool import file_meta

ROOT: Final = Path(__file__).parents[1].parent / "shared" / "data" / "dicom"
#: Smaller files go through more often; each transfer syntax has some.
MOST_BYTES: Final = 400_000
SEED: Final = 20261129
#: Of one file in a decoding process.
TIMEOUT_S: Final = 20.0
LENGTHS: Final = (0, 1, 2, 3, 0xFF, 0xFFFE, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
VALUES: Final = (
    b"",
    b"0 ",
    b"-1",
    b"65535 ",
    b"1e400 ",
    b"nan ",
    b"0\\0 ",
    b"\xff\xff\xff\xff",
    b"\0\0",
    b"\xff\xff",
    b"\x80\x80",
    b"\\" * 64,
)

Mutation = Callable[[bytearray, Sequence[int], random.Random], None]


def _at(data: bytearray, places: Sequence[int], rng: random.Random) -> int:
    """A byte in or soon behind the head of an element, or any."""
    if places and rng.random() < 0.8:
        return min(rng.choice(places) + rng.randrange(24), len(data) - 1)
    return rng.randrange(len(data))


def flip(data: bytearray, places: Sequence[int], rng: random.Random) -> None:
    """Flip single bits."""
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[_at(data, places, rng)] ^= 1 << rng.randrange(8)


def cut(data: bytearray, places: Sequence[int], rng: random.Random) -> None:
    """Take a stretch out, or all to the end."""
    at = _at(data, places, rng)
    del data[at : at + rng.choice((1, 2, 8, 100, len(data)))]


def insert(data: bytearray, places: Sequence[int], rng: random.Random) -> None:
    """Put random bytes in between."""
    at = _at(data, places, rng)
    data[at:at] = rng.randbytes(rng.choice((1, 2, 8, 12, 500)))


def lengthen(data: bytearray, places: Sequence[int], rng: random.Random) -> None:
    """Give an element another length."""
    at = rng.choice(places) + rng.choice((4, 6, 8))
    size = rng.choice((2, 4))
    if at + size <= len(data):
        was = int.from_bytes(data[at : at + size], "little")
        made = rng.choice((*LENGTHS, was + 1, was + 2, max(was - 1, 0), was * 2)) & (256**size - 1)
        data[at : at + size] = made.to_bytes(size, "little")


def swap(data: bytearray, places: Sequence[int], rng: random.Random) -> None:
    """Exchange the tags of two elements."""
    one, other = rng.choice(places), rng.choice(places)
    data[one : one + 4], data[other : other + 4] = data[other : other + 4], data[one : one + 4]


def double(data: bytearray, places: Sequence[int], rng: random.Random) -> None:
    """Say an element twice, or leave it out."""
    at = rng.randrange(len(places))
    end = places[at + 1] if at + 1 < len(places) else len(data)
    data[places[at] : end] = bytes(data[places[at] : end]) * rng.choice((0, 2))


def revalue(data: bytearray, places: Sequence[int], rng: random.Random) -> None:
    """Write another value over an element's, of its length."""
    at = rng.choice(places)
    head, size = 8, struct.unpack_from("<H", data, at + 6)[0] if len(data) >= at + 8 else 0
    if 0 < size <= 512 and at + head + size <= len(data):
        data[at + head : at + head + size] = rng.choice((*VALUES, rng.randbytes(size))).ljust(size, b"\0 "[size % 2 :][:1])[:size]


#: A file whose tags are out of order ends early, at the receiver: faults within values are the more frequent ones.
MUTATIONS: Final[tuple[Mutation, ...]] = (flip, flip, cut, insert, lengthen, swap, double, revalue, revalue, revalue, revalue, revalue)


def places_of(data: bytes | bytearray) -> list[int]:
    """Where elements seem to begin: a group that occurs in images, with a likely VR or length behind, up to the codestream's head."""
    pattern = rb"(?=(?:[\x08\x10\x18\x20\x28\x40\x54]\x00..(?:[A-Z]{2}|..\x00\x00)|\xe0\x7f\x10\x00|\xfe\xff[\x00\x0d\xdd]\xe0))"
    end = data.find(b"\xe0\x7f\x10\x00") % 200_000
    found = [one.start() for one in re.finditer(pattern, data[: end + 40], re.DOTALL)]
    return [*found, *range(end + 40, min(end + 200, len(data) - 12), 40)]


@dataclass
class Tally:
    """What came of how many, and what escaped."""

    outcomes: Counter[str] = field(default_factory=Counter)
    escaped: list[str] = field(default_factory=list)
    #: Of each decoding process that ended or was ended: the seed, the file and the sentence.
    died: list[str] = field(default_factory=list)
    longest_s: float = 0.0
    grown_bytes: int = 0


@dataclass(frozen=True)
class Whole:
    """One real file, and who it says it is."""

    name: str
    data: bytes
    syntax: str
    uids: tuple[str, str]
    series_instance_uid: str


def corpus() -> list[Whole]:
    """Each small real image that a decoder is asked about."""
    found = []
    for path in below(ROOT):
        if path.stat().st_size <= MOST_BYTES:
            one = sendable(path.read_bytes())
            if one.has_prefix and one.transfer_syntax_uid in CODECS and b"\xe0\x7f\x10\x00" in one.data:
                try:
                    said = read_header(one.data, one.transfer_syntax_uid)
                except InstanceRefused:
                    continue
                uids = said.sop_class_uid, said.sop_instance_uid
                found.append(Whole(str(path.relative_to(ROOT)), one.data, one.transfer_syntax_uid, uids, said.series_instance_uid))
    return found


def one_file(whole: Whole, folder: Path, pool: DecoderPool, rng: random.Random) -> str:
    """Name the outcome of one file with faults."""
    broken, syntax = bytearray(whole.data), whole.syntax
    for _ in range(rng.choice((1, 1, 2, 4))):
        places = places_of(broken) or [0]
        if len(broken) > 8:
            rng.choice(MUTATIONS)(broken, places, rng)
    try:
        header = read_header(bytes(broken), syntax)
        uids = header.sop_class_uid, header.sop_instance_uid
        series = header.series_instance_uid
        outcome = ""
    except InstanceRefused as exc:
        # What the receiver would have refused is decoded all the same: a disk may break a file after it was taken.
        uids, series = whole.uids, whole.series_instance_uid
        outcome = f"header {exc.status:#06x}, "
    path = folder / "one.dcm"
    path.write_bytes(file_meta(*uids, syntax) + broken)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    instance = Instance(uids[1], uids[0], syntax, path, digest, len(broken))
    kind: volume.Kind = rng.choice(("radiograph", "frames", "volume"))
    try:
        volume.load(Series(series, "", "", "", (instance,)), kind=kind, pool=pool, color="luminance")
    except DecoderDied:
        raise
    except WorkerError as exc:
        by = re.findall(r"cannot be parsed \((\w+)\)", str(exc))
        return outcome + type(exc).__name__ + (f" by {by[0]}" if by else "")
    return outcome + "read"


def run(seconds: float, *, seed: int = SEED, files: int = sys.maxsize) -> Tally:
    """Put faults into files for so many seconds, at most so many files."""
    made, sources = Tally(), corpus()
    this, until = psutil.Process(), time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder, DecoderPool(processes=1, memory_bytes=2**30, timeout_s=TIMEOUT_S) as pool:
        before = 0
        for number in range(seed, seed + files):
            if time.monotonic() > until:
                break
            rng = random.Random(number)
            whole = rng.choice(sources)
            started = time.monotonic()
            try:
                made.outcomes[one_file(whole, Path(folder), pool, rng)] += 1
            except DecoderDied as exc:
                made.outcomes["DecoderDied"] += 1
                made.died.append(f"seed {number}, {whole.name}: {exc}")
            except Exception as exc:  # noqa: BLE001  what escapes is what is looked for
                made.escaped.append(f"seed {number}, {whole.name}: {type(exc).__name__}: {exc}")
            made.longest_s = max(made.longest_s, time.monotonic() - started)
            before = before or (this.memory_info().rss if number == seed + 200 else 0)
        made.grown_bytes = this.memory_info().rss - before if before else 0
    return made


def main(minutes: str = "3", seed: str = "") -> int:
    """Run, print, and return the exit status."""
    first = int(seed or time.time_ns() % 10**9)
    made = run(60 * float(minutes), seed=first)
    kinds: Counter[str] = Counter()
    for outcome, count in made.outcomes.items():
        kinds[outcome.split(", ")[-1].split(" by ")[0]] += count
    refused = sum(count for outcome, count in made.outcomes.items() if outcome.startswith("header"))
    print(
        f"{made.outcomes.total()} files in {minutes} minutes from seed {first}: {len(made.escaped)} escaped; {dict(kinds)}; "
        f"refused by the receiver's reader {refused}; longest {made.longest_s:.2f} s; parent grew {made.grown_bytes / 2**20:.1f} MiB"
    )
    print(*made.escaped, *made.died, sep="\n")
    return bool(made.escaped)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
