"""The worklist says of each study where the ledger has it, in whatever database, page after page, each study once."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from tests import ward
from worker.domain import Account
from worker.store import accounts, history, ledger, measures, queue, reviews, worklist
from worker.store.accounts import AccountRefused
from worker.store.database import Store
from worker.store.worklist import Wanted


@pytest.fixture
def furnished(store: Store, tmp_path: Path) -> dict[str, int]:
    return ward.furnish(store, tmp_path).studies


def test_each_study_is_in_the_state_that_its_jobs_and_the_ledger_say(store: Store, furnished: dict[str, int]) -> None:
    with store.read() as conn:
        lines, more = worklist.page(conn, Wanted())
        counted = worklist.counts(conn)
    states = {line.study.id: line.state for line in lines}
    assert more is None
    meant = {"replaced": "delivered", "unanalysable": "delivered"}
    assert states == {number: meant.get(state, state) for state, number in furnished.items()}
    assert counted == {"receiving": 1, "waiting": 1, "analysing": 1, "sending": 1, "held": 1, "failed": 1}
    for state in worklist.STATES:
        with store.read() as conn:
            found, _ = worklist.page(conn, Wanted(state))
        assert [line.study.id for line in found] == [line.study.id for line in lines if line.state == state], state
    by_state = {line.state: line for line in lines}
    assert by_state["failed"].reason == ward.WHY
    assert by_state["waiting"].reason == "The patient's record has not come yet."
    assert by_state["analysing"].is_urgent
    assert [one.verdict for one in by_state["failed"].said] == ["positive", "uncertain"]
    assert next(line.failure for line in lines if line.study.id == furnished["unanalysable"]).startswith("The series has no image")


def test_pages_follow_each_other_without_a_gap_or_a_repetition_while_studies_come(store: Store) -> None:
    ward.crowd(store, 230)
    seen: list[int] = []
    after = None
    for number in range(20):
        with store.read() as conn:
            lines, after = worklist.page(conn, Wanted(), after=after, size=20)
        seen += [line.study.id for line in lines]
        if number == 3:
            ward.furnish_one(store, ward.NOW + timedelta(hours=1))  # newer than all: no page after the first shows it
        if after is None:
            break
    assert seen == list(range(230, 0, -1))


def test_a_filter_finds_all_of_its_studies_and_no_other(store: Store) -> None:
    ward.crowd(store, 400)
    states = [{"undone": "failed"}.get(ward.state_of(n), ward.state_of(n)) for n in range(400)]
    for state in worklist.STATES:
        seen: list[int] = []
        after = None
        while True:
            with store.read() as conn:
                lines, after = worklist.page(conn, Wanted(state), after=after, size=120 if state == "delivered" else 3)
            seen += [line.study.id for line in lines]
            if after is None:
                break
        assert seen == [n + 1 for n in range(400) if states[n] == state][::-1], state


def test_a_search_is_exact_and_leads_to_a_row(store: Store, furnished: dict[str, int]) -> None:
    with store.read() as conn:
        assert worklist.search(conn, "A-1002") == ("order", furnished["failed"])
        assert worklist.search(conn, "4711") == ("patient", furnished["replaced"])
        for wrong in ("", "471", "4711 ", "a-1002", "%", "Müller^Änne"):
            assert worklist.search(conn, wrong) is None
        found, _ = worklist.page(conn, Wanted(patient_of=furnished["delivered"]))
        assert {line.study.id for line in found} == {furnished["delivered"], furnished["replaced"]}
        assert worklist.page(conn, Wanted(order_of=furnished["unanalysable"])) == ([], None)  # no accession number is nobody's
        assert [line.state for line in worklist.page(conn, Wanted(is_urgent=True))[0]] == ["analysing"]


def test_dead_letters_have_their_reason_and_what_they_were(store: Store, furnished: dict[str, int]) -> None:
    with store.read() as conn:
        rows = worklist.dead_letters(conn)
        assert {(row.study_id, row.document, row.reason) for row in rows} == {
            (furnished["failed"], kind, ward.WHY) for kind in ("sr", "summary")
        }
        assert [(one.reason, one.jobs) for one in worklist.reasons(conn, limit=5)] == [(ward.WHY, 2)]
        assert worklist.dead_letters(conn, before=min(row.id for row in rows)) == []


def test_a_study_is_moved_to_the_front_once_and_its_history_says_who_did(store: Store, furnished: dict[str, int]) -> None:
    waiting = furnished["waiting"]
    with store.begin() as conn:
        assert queue.prioritize(conn, waiting, now=ward.NOW, by="a.operator") == 1
        assert queue.prioritize(conn, waiting, now=ward.NOW, by="a.operator") == 0
        assert worklist.page(conn, Wanted("waiting"))[0][0].is_urgent
        last = history.of_study(conn, waiting)[-1]
    assert (last.name, last.facts) == ("operator.prioritized", {"jobs": 1, "by": "a.operator"})


def test_what_monitoring_counts_is_what_there_is(store: Store, furnished: dict[str, int]) -> None:
    with store.read() as conn:
        jobs = {(row.kind, row.state): row.jobs for row in measures.open_jobs(conn)}
        assert jobs == {("infer", "available"): 2, ("infer", "leased"): 1, ("deliver", "available"): 2, ("deliver", "discarded"): 2}
        assert measures.standing(conn) == {"receiving": 1, "held": 1}
        accounts_of = measures.accounts(conn)
        assert sum(accounts_of.values()) == len(furnished)
        assert accounts_of[ledger.LOST] == 0
        assert measures.instances_after(conn, 0)[0] == len(furnished) + 2
        since, until = ward.NOW - timedelta(days=1), ward.NOW + timedelta(days=1)
        ended = measures.finished(conn, since, until)
        assert sum(row.kind == "deliver" and row.state == "completed" and row.document == "sr" for row in ended) == 4
        assert measures.finished(conn, until, until) == []
        assert len(measures.begun(conn, since)) == len(furnished)


def test_what_a_radiologist_says_is_kept_and_the_last_counts(store: Store, furnished: dict[str, int]) -> None:
    study = furnished["delivered"]
    with store.begin() as conn:
        report = next(row for row in worklist.documents_of(conn, study) if row.kind == "sr")
        positive = worklist.findings_of(conn, study)[report.id][0]
        given = {"study_id": study, "author": "a.radiologist", "now": ward.NOW}
        assert reviews.add(conn, positive.id, verdict="positive", note="", **given) is True  # type: ignore[arg-type]
        assert reviews.add(conn, positive.id, verdict="negative", note=" old scar ", **given) is False  # type: ignore[arg-type]
        other = given | {"study_id": furnished["failed"]}
        assert reviews.add(conn, positive.id, verdict="negative", note="", **other) is None  # type: ignore[arg-type]
        said = reviews.of_study(conn, study)[positive.id]
        told = [one for one in history.of_study(conn, study) if one.name.startswith("finding.")]
    assert [(one.verdict, one.note, one.author) for one in said] == [
        ("negative", "old scar", "a.radiologist"),
        ("positive", "", "a.radiologist"),
    ]
    assert [one.name for one in told] == ["finding.agreed", "finding.corrected"]
    assert "scar" not in str(told)


# --- accounts


def made(store: Store, name: str = "ada", **more: object) -> Account:
    given = {"password": accounts.hashed(ward.PASSWORD, cost=ward.CHEAP), "roles": ["viewer"], "now": ward.NOW} | more
    with store.begin() as conn:
        return accounts.add(conn, name, **given)  # type: ignore[arg-type]


def test_a_session_ends_by_its_age_by_idleness_by_logging_out_and_by_a_new_password(store: Store) -> None:
    ada = made(store)
    idle, now = timedelta(minutes=30), ward.NOW
    with store.begin() as conn:
        tokens = [accounts.open_session(conn, ada.id, now=now, hours=1) for _ in range(3)]
        assert accounts.of_session(conn, tokens[0], now=now, idle=idle) == (ada, False)
        assert accounts.of_session(conn, tokens[0] + "x", now=now, idle=idle) is None
        later = now + timedelta(minutes=29)
        assert accounts.of_session(conn, tokens[0], now=later, idle=idle) == (ada, True)
        accounts.touch(conn, tokens[0], now=later)
        assert accounts.of_session(conn, tokens[0], now=now + timedelta(minutes=58), idle=idle) == (ada, True)
        assert accounts.of_session(conn, tokens[1], now=now + timedelta(minutes=31), idle=idle) is None
        accounts.touch(conn, tokens[0], now=now + timedelta(minutes=59))
        assert accounts.of_session(conn, tokens[0], now=now + timedelta(minutes=60), idle=idle) is None
        accounts.close_session(conn, tokens[1])
        assert accounts.of_session(conn, tokens[1], now=now, idle=idle) is None
        accounts.change(conn, ada.id, password=accounts.hashed("another long pass phrase", cost=ward.CHEAP))
        assert accounts.of_session(conn, tokens[2], now=now, idle=idle) is None
    stored = store.engine.connect().exec_driver_sql("SELECT * FROM session").all()
    assert not any(token in str(stored) for token in tokens)


def test_after_too_many_wrong_passwords_an_account_waits_longer_each_time_and_a_right_one_begins_anew(store: Store) -> None:
    made(store)
    now = ward.NOW
    with store.begin() as conn:
        for _ in range(accounts.TRIES):
            assert accounts.begin_try(conn, "ADA ", now=now) is not None
        assert accounts.begin_try(conn, "ada", now=now + timedelta(seconds=29)) is None
        assert accounts.begin_try(conn, "ada", now=now + timedelta(seconds=31)) is not None
        assert accounts.begin_try(conn, "ada", now=now + timedelta(seconds=31 + 59)) is None
        row = accounts.begin_try(conn, "ada", now=now + timedelta(seconds=31 + 61))
        assert row is not None
        accounts.succeed(conn, row)
        for _ in range(accounts.TRIES - 1):
            accounts.begin_try(conn, "ada", now=now + timedelta(hours=1))
        assert accounts.begin_try(conn, "ada", now=now + timedelta(hours=1)) is not None
        assert accounts.begin_try(conn, "nobody", now=now) is None


def test_an_account_of_elsewhere_has_no_password_here_and_the_roles_that_are_said_there_now(store: Store) -> None:
    made(store, "eve")
    with store.begin() as conn:
        first = accounts.external(conn, "bob", subject="there/1", roles=["viewer", "operator"], now=ward.NOW)
        again = accounts.external(conn, "robert", subject="there/1", roles=["viewer"], now=ward.NOW)
        assert (again.id, again.name, again.roles) == (first.id, "bob", frozenset({"viewer"}))
        assert accounts.begin_try(conn, "bob", now=ward.NOW) is None
    with pytest.raises(AccountRefused, match="of this name already"), store.begin() as conn:
        accounts.external(conn, "eve", subject="there/2", roles=["admin"], now=ward.NOW)


def test_a_name_that_is_none_is_refused(store: Store) -> None:
    for name in ("", " ", "Ada Lovelace", "a/b", "ä", "-x", "x" * 65):
        with pytest.raises(AccountRefused, match="small letters"):
            made(store, name)


def test_a_role_that_is_none_is_refused(store: Store) -> None:
    with pytest.raises(AccountRefused, match="Roles are viewer"):
        made(store, "ada", roles=["root"])
    with pytest.raises(AccountRefused, match="at least one"):
        made(store, "ada", roles=[])
