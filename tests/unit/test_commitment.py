"""Reports on storage commitment as bytes: what is read of them, and that nothing but a ValueError comes of what is none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from tests.scu import EXPLICIT, IMPLICIT, encoded
from worker.domain import CommitmentReport
from worker.intake.commitment import read_report

pytestmark = pytest.mark.requirement("L8")


def made(**changes: object) -> Dataset:
    """Return a report on three instances, two of which are kept."""
    ds = Dataset()
    ds.TransactionUID = "2.25.7"
    ds.RetrieveAETitle = "PACS"
    ds.FailedSOPSequence, ds.ReferencedSOPSequence = [Dataset()], [Dataset(), Dataset()]
    ds.FailedSOPSequence[0].ReferencedSOPInstanceUID, ds.FailedSOPSequence[0].FailureReason = "1.2.3", 0x0112
    ds.ReferencedSOPSequence[0].ReferencedSOPInstanceUID = "1.2.4"
    ds.ReferencedSOPSequence[1].ReferencedSOPInstanceUID = "1.2.5"
    for keyword, value in changes.items():
        setattr(ds, keyword, value)
    return ds


@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT])
def test_a_report_says_what_is_kept_and_why_the_rest_is_not(syntax: str) -> None:
    said = read_report(encoded(made(), is_implicit=syntax == IMPLICIT), syntax)
    assert said == CommitmentReport("2.25.7", frozenset({"1.2.4", "1.2.5"}), {"1.2.3": 0x0112})


def test_an_instance_that_is_both_kept_and_lost_is_lost() -> None:
    ds = made()
    ds.ReferencedSOPSequence[0].ReferencedSOPInstanceUID = "1.2.3"
    said = read_report(encoded(ds), EXPLICIT)
    assert (said.committed, said.failed) == (frozenset({"1.2.5"}), {"1.2.3": 0x0112})


@given(
    data=st.one_of(st.binary(max_size=400), st.integers(0, 200).map(lambda at: encoded(made())[:at])),
    syntax=st.sampled_from([IMPLICIT, EXPLICIT]),
)
def test_bytes_that_are_no_report_end_in_one_error(data: bytes, syntax: str) -> None:
    try:
        said = read_report(data, syntax)
    except ValueError:
        return
    assert said.transaction_uid == "2.25.7"


def test_nested_sequences_without_end_are_no_report() -> None:
    """The longest data set taken, made of nothing but openings of sequences."""
    opening = b"\x08\x00\x99\x11SQ\x00\x00\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    with pytest.raises(ValueError, match="cannot be decoded"):
        read_report(opening * (256 * 1024 // len(opening)), EXPLICIT)
