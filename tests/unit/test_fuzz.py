"""Faults put into real files: no outcome but typed errors. The long form is `make fuzz`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import fuzz

#: numpy's and pydicom's caches; the decoded pixels of one file are far more.
GROWTH_BYTES = 64 * 2**20


@pytest.mark.requirement("P18")
@pytest.mark.slow
def test_faults_in_real_files_end_in_typed_errors_and_in_time(shared: Path) -> None:
    """Each seed is one file and its faults: a seed that is named here can be run again alone."""
    assert fuzz.ROOT.samefile(shared / "data" / "dicom")
    made = fuzz.run(20, files=800)
    refused = sum(count for outcome, count in made.outcomes.items() if outcome.startswith("header"))
    print(f"{made.outcomes.total()} files, {refused} refused by the receiver's reader, longest {made.longest_s:.2f} s")
    assert made.escaped == []
    assert made.outcomes.total() > 200
    # The faults are neither all harmless nor all fatal.
    assert 0.05 < made.outcomes["read"] / made.outcomes.total() < 0.5
    assert 0.3 < refused / made.outcomes.total() < 0.9
    assert made.longest_s < fuzz.TIMEOUT_S
    assert made.grown_bytes < GROWTH_BYTES
