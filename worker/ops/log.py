"""The log: one JSON line for each thing that happened (worker/events.py), on standard output.

Patient data never pass: events carry none, and all libraries are silenced here
(measured: pynetdicom logs C-FIND identifiers at INFO, pydicom's warnings quote values, tracebacks
quote elements). Of an exception that nobody foresaw, its type and the places it passed are kept, not its words.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Final, TextIO

import structlog

from worker import events

#: Events that an operator should look at.
WARNINGS: Final = frozenset(
    {
        "association.rejected",
        "instance.refused",
        "instance.quarantined",
        "message.refused",
        "job.retried",
        "job.rescued",
        "job.fenced",
        "role.restarted",
        "clock.jumped",
        "document.failed",
        "explanation.failed",
        "glyphs.missing",
        "feed.silent",
        "commitment.denied",
        "commitment.missing",
        "commitment.turned_away",
        "commitment.unreported",
        "certificate.expires",
        "destination.down",
        "audit.unsent",
        "host.exposed",
    }
)
ERRORS: Final = frozenset(
    {
        "job.discarded",
        "sweep.failed",
        "certificate.unusable",
        "heartbeat.died",
        "file.damaged",
        "page.failed",
        "audit.failed",
        "audit.dropped",
    }
)


def setup(*, level: str = "INFO", human: bool = False, stream: TextIO | None = None) -> None:
    """Send events to the log; silence everything else."""
    out = stream or sys.stdout
    renderer: structlog.types.Processor = (
        structlog.dev.ConsoleRenderer(colors=out.isatty()) if human else structlog.processors.JSONRenderer(sort_keys=True, default=str)
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="at"),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.WriteLoggerFactory(out),
    )
    log = structlog.get_logger()

    def write(name: str, facts: dict[str, object]) -> None:
        say = log.error if name in ERRORS else log.warning if name in WARNINGS else log.info
        with contextlib.suppress(OSError):  # its disk is full, its reader is gone: no reason to stop receiving
            say(name, **facts)

    events.listen(write)
    silence()
    on_crash(lambda kind, where: log.error("crashed", error=kind, places=where))


def silence() -> None:
    """Take the voice of every library, whatever its level and handlers: none of them is asked to keep patients to itself."""
    warnings.simplefilter("ignore")
    logging.captureWarnings(True)
    logging.disable(logging.CRITICAL)


def on_crash(say: Callable[[str, list[str]], object]) -> None:
    """Give `say` the type and places of what nobody foresaw, in any thread and in finalizers, in place of a traceback with its words."""

    def hook(kind: type[BaseException], error: BaseException | None, _trace: TracebackType | None = None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            say(kind.__name__, places(error) if error else [])

    sys.excepthook = hook
    threading.excepthook = lambda args: hook(args.exc_type, args.exc_value)
    sys.unraisablehook = lambda args: hook(args.exc_type, args.exc_value)


def places(error: BaseException, *, limit: int = 6) -> list[str]:
    """Where an exception passed, innermost last: ``file.py:12 in name``. Its message is left out on purpose."""
    frames = traceback.extract_tb(error.__traceback__)[-limit:]
    return [f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} in {frame.name}" for frame in frames]
