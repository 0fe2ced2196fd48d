"""The log: one JSON line for each thing that happened (worker/events.py), on standard output.

Patient data never pass: events carry none, and the libraries that print some are silenced here
(measured: pynetdicom logs C-FIND identifiers at INFO, pydicom's warnings quote values, tracebacks
quote elements). Of an exception that nobody foresaw, its type and the places it passed are kept, not its words.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback
import warnings
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
        "explanation.failed",
        "feed.silent",
        "commitment.denied",
        "commitment.missing",
        "commitment.turned_away",
        "commitment.unreported",
        "certificate.expires",
        "destination.down",
    }
)
ERRORS: Final = frozenset({"job.discarded", "sweep.failed", "certificate.unusable", "heartbeat.died", "file.damaged"})

#: Libraries whose words may hold patient data, at any level.
SILENCED: Final = ("pynetdicom", "pydicom", "highdicom", "sqlalchemy", "alembic", "apscheduler", "hl7", "py.warnings", "monai", "ignite")


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
        say(name, **facts)

    events.listen(write)
    silence()
    sys.excepthook = _hook
    threading.excepthook = lambda args: _hook(args.exc_type, args.exc_value or args.exc_type(), args.exc_traceback)


def silence() -> None:
    """Take the voice of every library that may speak of patients."""
    warnings.simplefilter("ignore")
    logging.captureWarnings(True)
    logging.getLogger().handlers[:] = [logging.NullHandler()]
    for name in SILENCED:
        logger = logging.getLogger(name)
        logger.handlers[:] = [logging.NullHandler()]
        logger.propagate = False
        logger.setLevel(logging.CRITICAL + 1)


def places(error: BaseException, *, limit: int = 6) -> list[str]:
    """Where an exception passed, innermost last: ``file.py:12 in name``. Its message is left out on purpose."""
    frames = traceback.extract_tb(error.__traceback__)[-limit:]
    return [f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} in {frame.name}" for frame in frames]


def _hook(kind: type[BaseException], error: BaseException, _trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    structlog.get_logger().error("crashed", error=kind.__name__, places=places(error))
