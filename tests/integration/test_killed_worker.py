"""`kill -9` of a worker in each state of its job by turns: another takes it up again; the outcome is one report, delivered once."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.peers import ScriptedPacs
from tests.phantom_line import PHANTOM, PhantomLine, phantom_line
from worker import events, pipeline
from worker.deliver import send
from worker.imaging.decoding import DecoderPool
from worker.infer import Model
from worker.store import queue
from worker.store.database import Store


@pytest.fixture(scope="module")
def model() -> Model:
    """The shipped phantom bundle, loaded once: each worker that is to die is forked with it."""
    return Model(PHANTOM)


@pytest.fixture
def site(tmp_path: Path, pool: DecoderPool) -> Iterator[PhantomLine]:
    """One study whose analysis is due, and no daemon."""
    with phantom_line(tmp_path / "site", pool) as made:
        made.receive(7)
        yield made


def killed(work: Callable[[Callable[[], None]], object]) -> None:
    """Run `work` in a process of its own, which is killed where it calls what it is given; fail where it never does."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(read)

        def reached() -> None:
            os.write(write, b"!")
            signal.pause()

        try:
            work(reached)
        finally:
            os._exit(1)
    os.close(write)
    try:
        assert os.read(read, 1) == b"!", "the worker ended before it was in the state that it was to be killed in"
    finally:
        os.close(read)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def after(owner: Any, name: str, reached: Callable[[], None]) -> None:
    """In a process that will die: stop when `name` of `owner` has done its work."""
    original = getattr(owner, name)

    def replaced(*args: Any, **named: Any) -> Any:
        result = original(*args, **named)
        reached()
        return result

    replaced.__name__ = name  # stages are named in what they took
    setattr(owner, name, replaced)


def before(owner: Any, name: str, reached: Callable[[], None]) -> None:
    """In a process that will die: stop before `name` of `owner` begins."""
    setattr(owner, name, lambda *_args, **_named: reached())


#: What the worker has done last when it is killed; before the first, the lease is all there is.
STAGES = ("gather", "load", "together", "explain", "report")


def analysed(site: PhantomLine, model: Model, state: str, reached: Callable[[], None]) -> None:
    """A worker of its own, which stops in `state`."""
    store = Store(str(site.store.url))
    with DecoderPool(processes=1) as pool:
        if state not in ("leased", "gather"):
            pool.warm()
        own = PhantomLine(site.folder, store, pool, now=site.now)
        jobs = own.lease()
        if state == "leased":
            reached()
        elif state in STAGES:
            after(pipeline, state, reached)
        elif state == "verdict given, not committed":
            after(queue, "complete", reached)
        else:
            events.listen(lambda name, _facts: reached() if name == "job.completed" else None)
        pipeline.process(own.line(model), jobs)


@pytest.mark.requirement("Q1")
@pytest.mark.parametrize("state", ["leased", *STAGES, "verdict given, not committed"])
def test_a_worker_that_is_killed_before_its_verdict_leaves_nothing_and_another_takes_over(
    state: str, site: PhantomLine, model: Model
) -> None:
    """Its lease must run out first; the attempt counts, for the study may have killed it."""
    killed(lambda reached: analysed(site, model, state, reached))
    assert site.jobs() == [("leased", 1, "")]
    assert (site.reports(), site.jobs("deliver")) == ({}, [])
    with site.store.begin() as conn:
        assert queue.rescue(conn, now=site.now + timedelta(seconds=59)) == []
    site.now += timedelta(seconds=61)
    with site.store.begin() as conn:
        assert len(queue.rescue(conn, now=site.now)) == 1
    assert [case.error for case in site.analyse(model)] == [None]
    assert [(state, attempt) for state, attempt, _ in site.jobs()] == [("completed", 2)]
    assert len(site.reports()) == 1
    assert [(state, attempt) for state, attempt, _ in site.jobs("deliver")] == [("available", 0)]


@pytest.mark.requirement("Q1")
def test_a_worker_that_is_killed_after_its_verdict_has_given_it(site: PhantomLine, model: Model) -> None:
    killed(lambda reached: analysed(site, model, "committed", reached))
    assert [(state, attempt) for state, attempt, _ in site.jobs()] == [("completed", 1)]
    assert len(site.reports()) == 1
    with site.store.begin() as conn:
        assert queue.rescue(conn, now=site.now + timedelta(seconds=61)) == []


def delivered(site: PhantomLine, pacs: ScriptedPacs, state: str, reached: Callable[[], None]) -> None:
    """A sender of its own, which stops in `state`; "" is none."""
    store = Store(str(site.store.url))
    if state == "leased":
        before(send, "_subject", reached)
    elif state == "the archive has it":
        stop = send.DOORS["dicom"]

        def sent(*args: Any, **named: Any) -> Any:
            result = stop(*args, **named)
            reached()
            return result

        send.DOORS = {"dicom": sent}  # type: ignore[misc]
    elif state == "verdict given, not committed":
        after(queue, "complete", reached)
    with store.begin() as conn:
        jobs = queue.lease(conn, "deliver", owner="me", limit=9, lease_s=60, now=site.now)
    send.deliver(jobs, store=store, peer=pacs.peer, clock=lambda: site.now)
    store.close()


@pytest.mark.requirement("Q1")
@pytest.mark.parametrize("state", ["leased", "the archive has it", "verdict given, not committed"])
def test_a_sender_that_is_killed_sends_again_and_the_archive_has_one_report(state: str, site: PhantomLine, model: Model) -> None:
    site.analyse(model)
    (report,) = site.reports().values()
    with ScriptedPacs() as pacs:
        killed(lambda reached: delivered(site, pacs, state, reached))
        assert len(pacs.kept) == (state != "leased")
        assert site.jobs("deliver") == [("leased", 1, "")]
        site.now += timedelta(seconds=61)
        with site.store.begin() as conn:
            assert len(queue.rescue(conn, now=site.now)) == 1
        delivered(site, pacs, "", lambda: sys.exit("nobody is killed here"))
        assert [(state, attempt) for state, attempt, _ in site.jobs("deliver")] == [("completed", 2)]
        assert len(pacs.kept) == 1
        assert all(uid.encode() in report for uid in pacs.kept)
