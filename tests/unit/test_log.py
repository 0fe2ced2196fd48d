"""The log says what happened, never of whom."""

from __future__ import annotations

import errno
import faulthandler
import io
import json
import logging
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from worker import events
from worker.ops import log
from worker.store.database import DatabaseUnavailable, Store

PLANTED = "Zyx^Planted"


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """The log as a text; the process's hooks are put back afterwards."""
    hooks, listeners = (sys.excepthook, threading.excepthook, sys.unraisablehook), list(events._listeners)
    out = io.StringIO()
    log.setup(level="DEBUG", stream=out)
    yield out
    sys.excepthook, threading.excepthook, sys.unraisablehook = hooks
    events._listeners[:] = listeners
    logging.captureWarnings(False)
    logging.disable(logging.NOTSET)


def test_an_event_is_one_json_line_with_its_level(stream: io.StringIO) -> None:
    events.emit("job.discarded", study=1, reason="a sentence")
    found = json.loads(stream.getvalue())
    assert (found["event"], found["level"], found["study"]) == ("job.discarded", "error", 1)


@pytest.mark.requirement("S3")
def test_a_log_whose_disk_is_full_stops_nobody_and_goes_on_when_there_is_room(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(stream, "write", full)
        log.setup(stream=stream)  # a listener more, whose logger is bound to what is full
        events.emit("job.rescued", job=1)
    log.setup(stream=stream)
    events.emit("job.rescued", job=2)
    assert [json.loads(line)["job"] for line in stream.getvalue().splitlines()][-1:] == [2]


def test_an_unknown_event_is_a_bug_at_once() -> None:
    with pytest.raises(ValueError, match="Unknown event"):
        events.emit("something.happened")


#: Whoever of our dependencies speaks by `logging`, some with handlers of their own.
LIBRARIES = (
    "pynetdicom", "pydicom", "highdicom", "sqlalchemy.engine", "sqlalchemy.pool", "alembic", "apscheduler", "hl7", "py.warnings", "monai",
    "ignite", "httpx2", "httpcore2", "psycopg", "transformers", "matplotlib", "asyncio", "concurrent.futures", "urllib3", "anything",
)  # fmt: skip


@pytest.mark.requirement("X2")
@pytest.mark.parametrize("name", LIBRARIES)
def test_no_library_has_a_voice_whatever_its_level_and_handlers(stream: io.StringIO, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """Handlers and levels that a library sets for itself when it is imported later do not matter."""
    heard = io.StringIO()
    handler, logger = logging.StreamHandler(heard), logging.getLogger(name)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        for say in (logger.debug, logger.info, logger.warning, logger.critical, logging.getLogger(f"{name}.child").critical):
            say(PLANTED)
        logging.disable(logging.NOTSET)
        logger.warning("heard")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert heard.getvalue() == "heard\n", "the handler hears nothing: the test would prove nothing"
    assert PLANTED not in stream.getvalue() + "".join(capsys.readouterr())


@pytest.mark.requirement("X2")
def test_warnings_and_what_nobody_foresaw_say_nothing_of_a_patient(stream: io.StringIO, capsys: pytest.CaptureFixture[str]) -> None:
    """In the main thread, in another and in a finalizer: the type and the places, never the words."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn(PLANTED, stacklevel=1)

    def crash() -> None:
        raise ValueError(PLANTED)

    class Finalized:
        def __del__(self) -> None:
            crash()

    thread = threading.Thread(target=crash)
    thread.start()
    thread.join()
    one = Finalized()
    del one
    try:
        crash()
    except ValueError as exc:
        sys.excepthook(ValueError, exc, exc.__traceback__)
    said = stream.getvalue() + "".join(capsys.readouterr())
    assert PLANTED not in said
    assert said.count('"crashed"') == 3
    assert said.count("in crash") == 3


@pytest.mark.requirement("X2")
def test_a_dump_of_the_interpreter_names_places_only(tmp_path: Path) -> None:
    """The interpreter writes files, lines and functions; a value there would be a patient's."""
    told = tmp_path / "dump"
    with told.open("w") as file:

        def look(name: str) -> None:
            faulthandler.dump_traceback(file)

        look(PLANTED)
    assert "in look" in told.read_text()
    assert PLANTED not in told.read_text()


@pytest.mark.requirement("X2")
def test_the_database_repeats_no_value_in_its_errors_and_echoes_nothing(store: Store) -> None:
    assert store.engine.hide_parameters
    assert not store.engine.echo
    with pytest.raises((sa.exc.StatementError, DatabaseUnavailable)) as caught, store.begin() as conn:
        conn.execute(sa.text("SELECT no_such_column FROM patient WHERE patient_id = :one"), {"one": PLANTED})
    assert PLANTED not in str(caught.value)


@pytest.mark.requirement("X1")
def test_a_fault_of_ours_in_a_verb_tells_its_type_and_places_and_none_of_its_words(tmp_path: Path) -> None:
    """Typer sets a hook of its own, which prints a traceback with all that an exception quotes."""
    (tmp_path / "c.toml").write_text("[site]\ndata = '.'\n")
    Store(f"sqlite:///{tmp_path}/synoptic.db").migrate()
    script = f"import worker.cli as c, worker.store.studies as s\ndef counts(_): raise KeyError({PLANTED!r})\ns.counts = counts\nc.main()"
    done = subprocess.run(
        [sys.executable, "-c", script, "status", "-c", str(tmp_path / "c.toml")], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "A fault of ours, KeyError" in done.stderr
    assert PLANTED not in done.stdout + done.stderr
