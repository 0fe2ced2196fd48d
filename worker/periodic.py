"""Functions again and again, by APScheduler, whatever becomes of the wall clock.

APScheduler plans by that clock. Put back by a day, it sleeps for a day; put ahead by a year, its own interval makes a list of every run
that was missed, minutes of work. So a run is planned from the one that is due, and after a jump everything is planned anew.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.base import BaseTrigger


class _Every(BaseTrigger):  # type: ignore[misc]  # APScheduler has no types
    """So long after the last run was due, however many were missed."""

    def __init__(self, seconds: float) -> None:
        self._interval = timedelta(seconds=seconds)

    def get_next_fire_time(self, _previous: datetime | None, now: datetime) -> datetime:
        return now + self._interval


class Periodic:
    """Runs functions in threads, none of them twice at once; and `watch`, by a clock that nobody sets."""

    def __init__(self, watch: Callable[[], None], *, every_s: float, threads: int) -> None:
        defaults = {"coalesce": True, "max_instances": 1, "misfire_grace_time": None}
        self._scheduler = BackgroundScheduler(executors={"default": ThreadPoolExecutor(threads)}, timezone=UTC, job_defaults=defaults)
        self._watch, self._every_s = watch, every_s
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="clock", daemon=True)

    def add(self, do: Callable[[], None], *, every_s: float, is_first_at_once: bool = False) -> None:
        """`do` every so many seconds."""
        self._scheduler.add_job(do, _Every(every_s), **({"next_run_time": datetime.now(UTC)} if is_first_at_once else {}))

    def start(self) -> None:
        """Returns at once."""
        self._scheduler.start()
        self._thread.start()

    def begin_anew(self) -> None:
        """Everything at once, and then at its interval: for when the clock was set."""
        for job in self._scheduler.get_jobs():
            job.modify(next_run_time=datetime.now(UTC))

    def stop(self, *, wait: bool = False) -> None:
        """Begin no more; what runs goes on to its end, which may be waited for."""
        self._is_over.set()
        self._scheduler.shutdown(wait=wait)
        if wait:
            self._thread.join()

    def _run(self) -> None:
        while not self._is_over.wait(self._every_s):
            self._watch()
