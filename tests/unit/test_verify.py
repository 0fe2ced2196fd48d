"""`make verify`: the list of faults and the tests agree, and the table says no fault is proven that is not."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import FAULTS, NOT_INJECTED, PART_NOT_INJECTED
from tests.verify import rows

TESTS = Path(__file__).parents[1]


def marked() -> set[str]:
    """Every id that a test carries."""
    found = (
        re.findall(r'requirement\("([^"]+)"\)', path.read_text("utf-8")) for path in TESTS.rglob("test_*.py") if path != Path(__file__)
    )
    return {fault for several in found for fault in several}


def test_the_list_has_every_fault_of_each_kind_in_order() -> None:
    kinds = {"R": 20, "S": 10, "D": 8, "Q": 11, "P": 18, "M": 11, "L": 16, "F": 13, "X": 15}
    assert list(FAULTS) == [f"{kind}{number}" for kind, count in kinds.items() for number in range(1, count + 1)]


def test_every_id_that_a_test_carries_is_in_the_list() -> None:
    assert sorted(marked() - set(FAULTS)) == []


def test_every_fault_has_a_test_or_a_reason_why_not() -> None:
    assert sorted(set(FAULTS) - marked() - set(NOT_INJECTED)) == []


def test_a_reason_stands_only_where_there_is_no_test_and_part_of_one_only_where_there_is() -> None:
    assert sorted(set(NOT_INJECTED) & marked()) == []
    assert sorted(set(PART_NOT_INJECTED) - marked()) == []


def test_the_worst_of_a_faults_tests_counts_and_a_reason_is_no_proof() -> None:
    outcomes = {
        ("D1", "tests/unit/test_a.py::one"): "passed",
        ("D1", "tests/unit/test_a.py::two[x]"): "passed",
        ("D2", "tests/unit/test_a.py::one"): "passed",
        ("D2", "tests/crash/test_b.py::three"): "failed",
        ("D3", "tests/unit/test_a.py::one"): "passed",
        ("D3", "tests/unit/test_a.py::four"): "skipped",
    }
    told = rows(outcomes, ["D1", "D2", "D3", "D4", "D5"], {"D5": "one machine"}, {"D1": "the other half"})
    assert [(row.fault, row.result, row.is_proven) for row in told] == [
        ("D1", "green", True),
        ("D2", "red", False),
        ("D3", "skipped", False),
        ("D4", "no test", False),
        ("D5", "not injected here", True),
    ]
    assert [row.tests for row in told[:3]] == ["a 2", "a, b", "a 2"]
    assert [row.note for row in told] == ["not injected here: the other half", "tests/crash/test_b.py::three", "", "", "one machine"]


MADE_UP = """
import pytest

@pytest.fixture
def broken():
    yield
    raise RuntimeError("in the end")

@pytest.mark.requirement("D1")
def test_good(): pass

@pytest.mark.requirement("D2")
def test_bad_in_the_end(broken): pass

@pytest.mark.requirement("D3")
def test_skipped(): pytest.skip("not here")

def test_of_no_fault(): pass
"""


def test_a_run_prints_the_table_and_fails_where_a_fault_is_not_proven(tmp_path: Path) -> None:
    (tmp_path / "test_made_up.py").write_text(MADE_UP)
    base = [sys.executable, "-m", "pytest", "-q", "-p", "tests.verify", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    command = [*base, "-o", "markers=requirement(id)", "-W", "ignore", str(tmp_path)]

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *options], capture_output=True, text=True, cwd=TESTS.parent, env={"PATH": ""}, check=False)

    told = run("--verify", "-m", "requirement")
    assert told.returncode == pytest.ExitCode.TESTS_FAILED
    assert re.search(r"^D1   green    the database stopped .* \[made_up\]$", told.stdout, re.MULTILINE)
    assert re.search(r"^D2   red .*\n +test_made_up.py::test_bad_in_the_end$", told.stdout, re.MULTILINE)
    assert re.search(r"^D3   skipped ", told.stdout, re.MULTILINE)
    assert "122 faults: 119 no test, 1 green, 1 red, 1 skipped." in told.stdout
    alone = run("--verify", "-k", "good")
    assert alone.returncode == pytest.ExitCode.TESTS_FAILED, "one test proves one fault, not all"
    assert "122 faults" not in run("-k", "good").stdout
