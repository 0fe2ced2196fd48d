"""The units' sandbox scores what the runbook says."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

DEPLOY = Path(__file__).parents[2] / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_no_unit_is_more_exposed_than_the_runbook_states(unit: Path) -> None:
    found = re.search(r"score (\d\.\d) in `systemd-analyze", (DEPLOY / "README.md").read_text("utf-8"))
    assert found
    assert "LimitCORE=0" in unit.read_text("utf-8")
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed.")
    done = subprocess.run([program, "security", "--offline=true", str(unit)], capture_output=True, text=True, timeout=60, check=False)
    scored = re.search(r"exposure level for \S+: (\d+\.\d)", done.stdout)
    assert scored, done.stderr
    assert float(scored[1]) <= float(found[1])
