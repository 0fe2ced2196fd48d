"""The log says what happened, never of whom."""

from __future__ import annotations

import io
import json
import logging
import sys
import threading
import warnings
from collections.abc import Iterator

import pytest

from worker import events
from worker.ops import log

PLANTED = "Zyx^Planted"


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """The log as a text; the process's hooks are put back afterwards."""
    hooks, listeners = (sys.excepthook, threading.excepthook), list(events._listeners)
    out = io.StringIO()
    log.setup(level="DEBUG", stream=out)
    yield out
    sys.excepthook, threading.excepthook = hooks
    events._listeners[:] = listeners
    logging.captureWarnings(False)


def test_an_event_is_one_json_line_with_its_level(stream: io.StringIO) -> None:
    events.emit("job.discarded", study=1, reason="a sentence")
    found = json.loads(stream.getvalue())
    assert (found["event"], found["level"], found["study"]) == ("job.discarded", "error", 1)


def test_an_unknown_event_is_a_bug_at_once() -> None:
    with pytest.raises(ValueError, match="Unknown event"):
        events.emit("something.happened")


@pytest.mark.requirement("X2")
def test_libraries_warnings_and_crashes_say_nothing_of_a_patient(stream: io.StringIO, capsys: pytest.CaptureFixture[str]) -> None:
    for name in log.SILENCED:
        logging.getLogger(name).critical(PLANTED)
        logging.getLogger(f"{name}.child").critical(PLANTED)
    logging.getLogger("anything").error(PLANTED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.warn(PLANTED, stacklevel=1)

    def crash() -> None:
        raise ValueError(PLANTED)

    thread = threading.Thread(target=crash)
    thread.start()
    thread.join()
    try:
        crash()
    except ValueError as exc:
        sys.excepthook(ValueError, exc, exc.__traceback__)
    said = stream.getvalue() + "".join(capsys.readouterr())
    assert PLANTED not in said
    assert said.count('"crashed"') == 2
    assert "in crash" in said
