"""Every file of the shared real data on the way of a received one: header, spool, decoder, volume; the tables of deploy/IMAGES.md.

``UPDATE_TABLES=1 pytest tests/unit/test_every_file.py`` writes the tables again.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import pydicom
import pytest

from tests.files import below, receive, sendable
from tests.tables import keep
from worker.domain import Header, Instance, Series, Volume
from worker.errors import Unanalysable
from worker.imaging import volume
from worker.imaging.codecs import decodable_transfer_syntaxes
from worker.imaging.decoding import DecoderPool
from worker.imaging.geometry import MIN_SLICES
from worker.imaging.volume import ENHANCED
from worker.intake.header import InstanceRefused
from worker.intake.negotiation import STORAGE_SOP_CLASSES
from worker.selection import takes
from worker.store.spool import Spool

#: Modalities of which three images make a volume, if anything does.
SLICES: Final = {"CT", "MR", "PT", "NM"}
NEGOTIATED: Final = frozenset(decodable_transfer_syntaxes())
#: Status of what is no data set of either encoding.
NOT_PARSED: Final = (0xC001, 0xC002)
OUTCOMES: Final = ("volume", "frame stack", "radiograph", "refused by the loader", "no image", "refused by the receiver", "no DICOM file")


def kind_of(images: list[tuple[Header, Instance]]) -> volume.Kind:
    """What a bundle would ask of such a series."""
    header, _ = images[0]
    frames = sum(one.number_of_frames for one, _ in images)
    if header.sop_class_uid in ENHANCED or (header.modality in SLICES and len(images) == frames >= MIN_SLICES):
        return "volume"
    return "frames" if header.number_of_frames > 1 else "radiograph"


def loaded(images: list[tuple[Header, Instance]], kind: volume.Kind, pool: DecoderPool) -> list[tuple[str, str]]:
    """Outcome and cause of each image of one series."""
    header, _ = images[0]
    series = Series(header.series_instance_uid, header.modality, "", "", tuple(one for _, one in images))
    try:
        made = volume.load(series, kind=kind, pool=pool, color="luminance")
    except Unanalysable as exc:
        return [("refused by the loader", f"{type(exc).__name__}: {cause(str(exc))}")] * len(images)
    check(made, kind)
    used = set(made.sop_instance_uids)
    outcome = {"frames": "frame stack"}.get(kind, kind)
    return [(outcome, "" if one.sop_instance_uid in used else "beside it, a localizer") for _, one in images]


def check(made: Volume, kind: volume.Kind) -> None:
    assert np.isfinite(made.array).all()
    assert made.array.ndim == 3
    assert (made.affine is None) == (kind != "volume")
    if made.affine is not None:
        assert len(made.array) >= MIN_SLICES
        assert abs(np.linalg.det(made.affine[:3, :3])) == pytest.approx(np.prod(made.spacing_mm), rel=1e-3)


def cause(sentence: str) -> str:
    """A sentence without its numbers, as far as its first colon."""
    first = re.split(r"(?<=[a-z])\. |: ", sentence.rstrip("."))[0]
    return re.sub(r"-?\d+(\.\d+)?(e[+-]?\d+)?", "n", re.sub(r" \([0-9A-F]{4},[0-9A-F]{4}\)", "", first))


def received(path: Path, spool: Spool) -> tuple[Header, Instance] | tuple[str, str]:
    """Take one file as the receiver would; else outcome and cause."""
    one = sendable(path.read_bytes())
    for uid, known, what in (
        (one.transfer_syntax_uid, NEGOTIATED, "transfer syntax"),
        (one.sop_class_uid, STORAGE_SOP_CLASSES, "SOP class"),
    ):
        if uid and uid not in known:
            return "refused by the receiver", f"the {what}, {pydicom.uid.UID(uid).name}, is not negotiated"
    if not one.transfer_syntax_uid:
        return "refused by the receiver", "the file does not say its transfer syntax, so that none can be proposed"
    try:
        return receive(one, spool)
    except InstanceRefused as exc:
        if one.has_prefix or exc.status not in NOT_PARSED:
            return "refused by the receiver", f"{exc.status:#06x} {exc.comment}"
        return "no DICOM file", f"no prefix and no data set, {path.suffix or 'without suffix'}"


def outcomes(root: Path, spool: Spool, pool: DecoderPool) -> Iterator[tuple[Path, str, str]]:
    """Each file below `root`, its outcome and its cause."""
    series: dict[tuple[Path, str, int], list[tuple[Path, Header, Instance]]] = defaultdict(list)
    known: Counter[tuple[Path, str]] = Counter()
    for path in below(root):
        taken = received(path, spool)
        if isinstance(taken[0], str):
            yield path, taken[0], str(taken[1])
            continue
        header, instance = taken
        assert isinstance(instance, Instance)
        if not takes((), header.modality):
            yield path, "no image", f"modality {header.modality}"
            continue
        # Another file of the same instance, in another encoding or with another fault, is of a series of its own.
        number = known[path.parent, header.sop_instance_uid]
        known[path.parent, header.sop_instance_uid] += 1
        series[path.parent, header.series_instance_uid, number].append((path, header, instance))
    for entries in series.values():
        images = [(header, instance) for _, header, instance in entries]
        kind = kind_of(images)
        # Pictures are judged one by one: of several in a series only one would be taken.
        parts = [images] if kind == "volume" else [[one] for one in images]
        found = [outcome for part in parts for outcome in loaded(part, kind, pool)]
        yield from ((path, *outcome) for (path, _, _), outcome in zip(entries, found, strict=True))


@pytest.mark.requirement("P18")
@pytest.mark.slow
def test_every_real_file_is_an_image_or_has_a_typed_reason(pool: DecoderPool, shared: Path, tmp_path: Path) -> None:
    root = shared / "data" / "dicom"
    found = list(outcomes(root, Spool(tmp_path / "spool", low_water_bytes=0), pool))
    assert sorted(path for path, _, _ in found) == below(root)
    count = Counter((path.relative_to(root).parts[0], outcome) for path, outcome, _ in found)
    sources = sorted({source for source, _ in count})
    lines = ["| source | files | " + " | ".join(OUTCOMES) + " |", "|---" * (len(OUTCOMES) + 2) + "|"]
    for source in [*sources, "all"]:
        row = [sum(n for (of, outcome), n in count.items() if outcome == wanted and source in {of, "all"}) for wanted in OUTCOMES]
        lines.append(f"| {source} | {sum(row)} | " + " | ".join(map(str, row)) + " |")
    keep("every-file", lines)
    causes = Counter((outcome, why) for _, outcome, why in found if why)
    ordered = sorted(causes.items(), key=lambda one: (OUTCOMES.index(one[0][0]), -one[1], one[0][1]))
    keep(
        "every-cause", ["| outcome | cause | files |", "|---|---|---|", *(f"| {outcome} | {why} | {n} |" for (outcome, why), n in ordered)]
    )
