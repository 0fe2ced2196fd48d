"""A series that comes in pieces: over whatever associations and in whatever order, it is the same volume."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import FileDataset

from tests import factories
from tests.receivers import Receiver, receiving
from worker.domain import Instance, Series, Volume
from worker.imaging import volume
from worker.imaging.decoding import DecoderPool

SLICES, ASSOCIATIONS = 12, 3


@pytest.fixture(scope="module")
def pool() -> Iterator[DecoderPool]:
    with DecoderPool(processes=2) as made:
        yield made


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    """One receiver for all examples: a spool makes 256 folders."""
    with receiving(tmp_path_factory.mktemp("split") / "spool") as made:
        yield made


@pytest.mark.requirement("P8")
@settings(max_examples=12, deadline=None)
@given(
    order=st.permutations(range(SLICES)),
    over=st.lists(st.integers(0, ASSOCIATIONS - 1), min_size=SLICES, max_size=SLICES),
    again=st.lists(st.integers(0, SLICES - 1), max_size=3),
)
def test_any_split_over_associations_gives_the_same_volume(
    pool: DecoderPool, kept: Receiver, order: list[int], over: list[int], again: list[int]
) -> None:
    """Interleaved slice by slice, some of them sent twice."""
    with tempfile.TemporaryDirectory() as folder:
        sent = factories.make_ct(slices=SLICES, rows=16, columns=20)
        direct = volume.load(factories.spool(sent, Path(folder) / "direct"), kind="volume", pool=pool)
        received = through_receiver(kept, sent, [*order, *again], [*over, *over[: len(again)]])
        assert len(received.instances) == SLICES
        assert_same(volume.load(received, kind="volume", pool=pool), direct)


def through_receiver(receiver: Receiver, sent: Sequence[FileDataset], order: list[int], over: list[int]) -> Series:
    """Send each slice over its association, and return the series as what was kept says."""
    receiver.store.rows.clear()
    with ExitStack() as stack:
        scus = [stack.enter_context(receiver.scu()) for _ in range(ASSOCIATIONS)]
        for scu in scus:
            scu.associate()
        for number, association in zip(order, over, strict=True):
            assert scus[association].store(sent[number]) == 0
        assert all(scu.release() for scu in scus)
    rows = list(receiver.store.rows.values())
    (uid,) = {one.header.series_instance_uid for one in rows}
    instances = (
        Instance(
            one.header.sop_instance_uid, one.header.sop_class_uid, one.header.transfer_syntax_uid, one.stored.path, one.stored.sha256,
            one.stored.size_bytes,
        )
        for one in rows
    )  # fmt: skip
    return Series(uid, "CT", "", "", tuple(instances))


def assert_same(one: Volume, other: Volume) -> None:
    np.testing.assert_array_equal(one.array, other.array)
    assert one.affine is not None
    assert other.affine is not None
    np.testing.assert_array_equal(one.affine, other.affine)
    assert (one.spacing_mm, one.sop_instance_uids) == (other.spacing_mm, other.sop_instance_uids)
