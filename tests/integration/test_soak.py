"""The soak of tests/bench/soak.py, shortened: fifty studies through every process. `make soak` is the long one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench import soak


@pytest.mark.slow
@pytest.mark.requirement("R17")
@pytest.mark.requirement("M10")
@pytest.mark.timeout(300)
def test_fifty_studies_at_line_rate_leave_every_process_as_large_as_it_was(tmp_path: Path) -> None:
    table, whole = soak.run(tmp_path, instances=96, slices=12, rows=128, every_s=0.3)
    for one in [*table, whole]:
        print(json.dumps(one))
    assert {"receive", "run", "deliver", "supervisor"} <= {one["process"] for one in table}
    assert soak.faults(table, whole) == []
