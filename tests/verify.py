"""A pytest plugin: which faults of tests/faults.py were injected in this run, by which tests, and what came of it.

The table is printed with ``--verify`` (`make verify`), which fails the run where a fault is not proven, and in CI, where `make test` runs
everything anyway. Ids travel in the tests' reports, so that it does not matter in which process a test ran.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import pytest

from tests.faults import FAULTS, NOT_INJECTED, PART_NOT_INJECTED

#: Of a fault's tests, the worst outcome counts.
GREEN, SKIPPED, RED, MISSING, NOT_HERE = "green", "skipped", "red", "no test", "not injected here"
_PROVEN: Final = (GREEN, NOT_HERE)
_OUTCOMES: Final = pytest.StashKey[dict[tuple[str, str], str]]()


@dataclass(frozen=True, slots=True)
class Row:
    """One fault, and what became of it."""

    fault: str
    result: str
    #: Where its tests are, and how many there.
    tests: str
    note: str = ""

    @property
    def is_proven(self) -> bool:
        """Whether nobody needs to look at it."""
        return self.result in _PROVEN


def rows(
    outcomes: Mapping[tuple[str, str], str],
    faults: Iterable[str] = tuple(FAULTS),
    reasons: Mapping[str, str] = NOT_INJECTED,
    in_part: Mapping[str, str] = PART_NOT_INJECTED,
) -> list[Row]:
    """Each fault's row; `outcomes` holds (fault, node id of a test) → "passed", "failed" or "skipped"."""
    of: dict[str, dict[str, str]] = defaultdict(dict)
    for (fault, test), outcome in outcomes.items():
        of[fault][test] = outcome
    return [_row(fault, of[fault], reasons.get(fault, ""), in_part.get(fault, "")) for fault in faults]


def _row(fault: str, tests: Mapping[str, str], reason: str, missing_part: str) -> Row:
    modules = Counter(test.partition("::")[0].rpartition("/")[2].removeprefix("test_").removesuffix(".py") for test in tests)
    where = ", ".join(f"{module} {count}" if count > 1 else module for module, count in sorted(modules.items()))
    if not tests:
        return Row(fault, NOT_HERE if reason else MISSING, "", reason)
    if failed := sorted(test for test, outcome in tests.items() if outcome == "failed"):
        return Row(fault, RED, where, "; ".join(failed))
    result = SKIPPED if "skipped" in tests.values() else GREEN
    return Row(fault, result, where, f"not injected here: {missing_part}" if missing_part else "")


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--verify``."""
    parser.addoption("--verify", action="store_true", help="print the table of faults; fail where one is not proven")


def pytest_configure(config: pytest.Config) -> None:
    """Begin with no outcome."""
    config.stash[_OUTCOMES] = {}
    config.pluginmanager.register(_Outcomes(config.stash[_OUTCOMES]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Write a test's ids where its reports carry them, from whatever process."""
    for item in items:
        item.user_properties += [("requirement", mark.args[0]) for mark in item.iter_markers("requirement")]


class _Outcomes:
    """Listens to the reports of all tests."""

    def __init__(self, outcomes: dict[tuple[str, str], str]) -> None:
        self._outcomes = outcomes

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Of set-up, call and tear-down keep the worst."""
        if report.when != "call" and report.passed:
            return
        for name, fault in report.user_properties:
            if name == "requirement" and self._outcomes.get((str(fault), report.nodeid)) != "failed":
                self._outcomes[str(fault), report.nodeid] = report.outcome


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Under ``--verify`` a fault that is not proven fails the run."""
    config = session.config
    is_controller = not hasattr(config, "workerinput")  # a process of pytest-xdist sees its own part only
    outcomes = config.stash[_OUTCOMES]
    if config.getoption("verify") and is_controller and not all(row.is_proven for row in rows(outcomes)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table."""
    outcomes = config.stash[_OUTCOMES]
    if not config.getoption("verify") and not (os.environ.get("CI") and outcomes):  # what viewers show proves no fault
        return
    table = rows(outcomes)
    terminalreporter.section("faults")
    for row in table:
        terminalreporter.write_line(f"{row.fault:4} {row.result:8} {FAULTS[row.fault]} [{row.tests}]", red=not row.is_proven)
        if row.note:
            terminalreporter.write_line(f"{'':13} {row.note}")
    counts = Counter(row.result for row in table)
    terminalreporter.write_line(f"{len(table)} faults: " + ", ".join(f"{count} {result}" for result, count in counts.most_common()) + ".")
