"""`synoptic retry --anew` on a real database: what is done is queued again as a new version, once, and only where a bundle did it."""

from __future__ import annotations

import getpass
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.integration.test_select import AT, FILM
from tests.record_site import Site, installed
from worker.intake import assembly
from worker.store import history, queue, studies


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with installed(tmp_path) as made:
        one = replace(FILM, series_instance_uid="2.25.1.1", sop_instance_uid="2.25.1.1.1")
        with made.store.begin() as conn:
            studies.add_instance(conn, one, path=Path("1"), sha256="1", size_bytes=1, calling_ae="CT", address="", study_at=AT, quiet_s=0,
                                 now=AT)  # fmt: skip
        yield made


def test_a_study_that_is_done_is_analysed_anew_as_a_new_version(site: Site) -> None:
    """After a new version of a bundle; without the option there is nothing to retry."""
    assert "Nothing to retry: no bundle that is configured has analysed it." in site.run("retry", "1", "--anew")[1]
    assembly.sweep(site.store, wants=[assembly.Wants("cxr-severity", frozenset({"CR"}))], limit_s=1, now=AT)
    with site.store.begin() as conn:
        (job,) = queue.lease(conn, "infer", owner="me", limit=9, lease_s=60, now=AT)
        queue.complete(conn, job, now=AT)
    assert "Nothing to retry: no job is discarded, cancelled or waiting." in site.run("retry", "1")[1]
    assert "1 job put back." in site.run("retry", "1", "--anew", "--stat")[1]
    with site.store.read() as conn:
        assert [(one.bundle, one.state, one.priority) for one in queue.of_version(conn, 1, input_version=2)] == [
            ("cxr-severity", "available", 0)
        ]
        (renewed,) = [one for one in history.of_study(conn, 1) if one.name == "study.renewed"]
        assert renewed.facts["cause"] == "An operator asked for it."
        (asked,) = [one for one in history.of_study(conn, 1) if one.name == "operator.prioritized"]
    assert asked.facts["by"] == getpass.getuser()


def test_the_trail_says_who_put_back_or_cancelled_what(site: Site) -> None:
    """Also of whoever uses the command line, and not the page."""
    assembly.sweep(site.store, wants=[assembly.Wants("cxr-severity", frozenset({"CR"}))], limit_s=1, now=AT)
    assert "1 job put back." in site.run("retry", "1")[1]
    assert "1 job cancelled." in site.run("cancel", "1")[1]
    told = [line for line in site.run("audit")[1].splitlines() if "Accessed, changed" in line]
    assert [line.partition("  ")[2].split("  ")[1] for line in told] == [f"{getpass.getuser()} > SYNOPTIC"] * 2
    assert [line.rpartition("  ")[2] for line in told] == ["retry: 1 job put back.", "cancel: 1 job cancelled."]


def test_the_list_says_where_each_study_stands(site: Site) -> None:
    """As the ledger and the page do."""
    assert " receiving " in site.run("studies")[1]
    assembly.sweep(site.store, wants=[assembly.Wants("cxr-severity", frozenset({"CR"}))], limit_s=1, now=AT)
    assert " in flight " in site.run("studies")[1]
    site.run("cancel", "1")
    assert " failed " in site.run("studies")[1]
