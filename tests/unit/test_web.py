"""The page's small parts: words, passwords, plots, what is vendored, and that each metric that an alert names exists."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml

from tests import ward
from worker import events
from worker.config import Config, Site
from worker.store import accounts, worklist
from worker.store.database import Store
from worker.web import words
from worker.web.metrics import Numbers
from worker.web.site import HERE

DEPLOY = Path(__file__).parents[2] / "deploy"


def test_htmx_is_the_file_that_was_published() -> None:
    said = re.search(r"sha256 ([0-9a-f]{64})", (HERE / "static" / "htmx.LICENSE.txt").read_text("utf-8"))
    assert said
    assert hashlib.sha256((HERE / "static" / "htmx.min.js").read_bytes()).hexdigest() == said[1]


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("Doe^Jane", "Doe, Jane"),
        ("Doe^Jane^M.^Dr.^MD", "Doe, Dr. Jane M. MD"),
        ("Wang^XiaoDong=王^小東=", "Wang, XiaoDong (王, 小東)"),
        ("Doe", "Doe"),
        ("^Jane", "Jane"),
        ("=王^小東", "王, 小東"),
        ("", "No name"),
        ("^^^^", "No name"),
    ],
)
def test_a_name_is_written_as_people_write_it(name: str, written: str) -> None:
    assert words.person(name) == written


def test_an_age_is_years_months_or_days_and_nothing_where_it_is_not_known() -> None:
    on = datetime(2026, 11, 29, tzinfo=UTC)
    told = [words.age(born, on) for born in ("19700101", "19701130", "20260129", "20261101", "20270101", "", "abc", "20269999")]
    assert told == ["56 y", "55 y", "10 mo", "28 d", "", "", "", ""]
    assert words.age("19700101", datetime(1900, 1, 1, tzinfo=UTC)) == ""


def test_a_probability_is_never_rounded_to_certainty() -> None:
    assert [words.percent(one) for one in (0.0, 0.0003, 0.031, 0.7321, 0.9999, 1.0)] == [
        "0.0 %",
        "< 0.1 %",
        "3.1 %",
        "73 %",
        "> 99.9 %",
        "100.0 %",
    ]
    assert [words.lasted(one) for one in (0, 0.4, 12, 200, 18000, 200000)] == ["0", "0.4 s", "12 s", "3 min", "5 h", "2 d"]


def test_every_event_of_a_history_has_words_and_no_fact_breaks_them() -> None:
    source = "".join(path.read_text("utf-8") for path in (HERE.parent).rglob("*.py") if "web" not in path.parts)
    named = set(re.findall(r'history\.note\([^)]*?name="([a-z.]+)"', source, re.DOTALL))
    named |= {
        f"{kind}.{verdict}"
        for kind in ("infer", "deliver")
        for verdict in ("completed", "retried", "snoozed", "discarded", "cancelled", "rescued")
    }
    named |= {f"commitment.{state}" for state in ("committed", "refused", "found", "unproven")} | {"deliver.reopened"}
    named -= {"patient.erased", "commitment.promised"}  # of no study
    for name in sorted(named):
        text, _, _ = words.event(name, {})
        assert text != name, name
    text, tone, beside = words.event("infer.completed", {"bundle": "{0.__class__}", "attempt": 2, "failure": "no series fits"})
    assert (text, tone) == ("Analysed by {0.__class__}", "bad")
    assert beside == "attempt 2 · reported that it could not be analysed: no series fits"
    assert words.event("operator.retried", {"jobs": 2})[0] == "An operator put jobs back: 2"


def test_a_password_is_stored_with_its_parameters_and_a_salt_of_its_own() -> None:
    first, second = (accounts.hashed(ward.PASSWORD, cost=ward.CHEAP) for _ in range(2))
    assert first.startswith("scrypt$16$8$1$")
    assert first.split("$")[4] != second.split("$")[4]
    assert accounts.is_right(ward.PASSWORD, first)
    assert not accounts.is_right(ward.PASSWORD + "x", first)
    for wrong in ("", "short", "x" * 257):
        with pytest.raises(accounts.AccountRefused, match=f"has {len(wrong)}"):
            accounts.hashed(wrong)


def test_an_unknown_account_takes_as_long_as_a_wrong_password() -> None:
    """By the work, not by a clock: both derive one key at the full cost."""
    n, r, _ = accounts.COST
    assert 128 * n * r >= 32 * 2**20
    assert accounts.hashed(ward.PASSWORD).startswith("scrypt$" + "$".join(map(str, accounts.COST)) + "$")
    assert not accounts.is_right(ward.PASSWORD, "")


@pytest.fixture(scope="module")
def exposed(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names of every series that /metrics may give."""
    folder = tmp_path_factory.mktemp("metrics")
    store = Store(f"sqlite:///{folder / 'synoptic.db'}")
    store.migrate()
    numbers = Numbers(Config(site=Site(data=folder)), store)
    numbers.text()
    numbers._count_ledger()
    numbers._made_at = -100.0
    text = numbers.text().decode()
    store.close()
    found = set()
    for name, kind in re.findall(r"^# TYPE (\w+) (\w+)", text, re.MULTILINE):
        found |= {f"{name}{end}" for end in ("_bucket", "_count", "_sum")} if kind == "histogram" else {name}
    return found


def test_each_metric_of_the_dashboard_and_of_the_alerts_exists(exposed: set[str]) -> None:
    alerts = yaml.safe_load((DEPLOY / "grafana" / "alerts.yaml").read_text("utf-8"))
    rules = [rule for group in alerts["groups"] for rule in group["rules"]]
    board = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text("utf-8"))
    asked = [rule["expr"] for rule in rules] + [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    named = {name for expr in asked for name in re.findall(r"synoptic_\w+", expr)}
    assert named - exposed == set()
    assert len(rules) == len({rule["alert"] for rule in rules})
    assert all(rule["annotations"]["summary"] for rule in rules)
    places = [tuple(panel["gridPos"].values()) for panel in board["panels"]]
    assert len(set(places)) == len(places)


def test_counters_grow_by_what_ends_and_a_second_scrape_at_once_is_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(f"sqlite:///{tmp_path / 'synoptic.db'}")
    store.migrate()
    now = ward.NOW
    monkeypatch.setattr("worker.web.metrics.clock", lambda: now)
    monkeypatch.setattr("worker.web.metrics.FRESH_S", 1e6)
    numbers = Numbers(Config(site=Site(data=tmp_path)), store)
    first = numbers.text()
    ward.furnish(store, tmp_path, now=ward.NOW)
    assert numbers.text() == first
    numbers._made_at, numbers._seen, now = -1e7, ward.NOW - timedelta(hours=2), ward.NOW + timedelta(minutes=1)
    text = numbers.text().decode()
    store.close()
    assert "synoptic_instances_received_total 12.0" in text
    assert 'synoptic_jobs_finished_total{bundle="cxr-severity",destination="pacs",kind="deliver",state="discarded"} 2.0' in text
    # 20 s after the last image each; of the report that was replaced it is not known.
    assert 'synoptic_report_lag_seconds_count{destination="pacs"} 3.0' in text
    assert 'synoptic_report_lag_seconds_bucket{destination="pacs",le="10.0"} 0.0' in text


def test_no_other_role_imports_the_page() -> None:
    code = (
        "import sys, worker.cli, worker.daemon, worker.reception, worker.roles; "
        "print([name for name in ('fastapi', 'uvicorn', 'prometheus_client') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_states_that_are_shown_are_those_that_have_a_name() -> None:
    assert set(words.STATES) == set(worklist.STATES)
    assert "page.failed" in events.NAMES
