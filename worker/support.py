"""`synoptic support-bundle`: what a vendor needs to help, in one file, and nothing that says who, when or where (PS3.15 Table E.1-1).

::

    configuration ─▶ numbers and closed words stay, every other text becomes the name of its key ─┐ these names stand in for
    doctor, status, ledger, refusals ─▶ sentences ────────────────────────────────────────────────┤ the site's texts everywhere
    log ─▶ the last lines that are events of ours: numbers, closed words, sentences ──────────────┘
                 sentences, once more: no name behind a title, no date, no number of three digits but a status (redaction.py)

Times are seconds before the bundle was made. What is not known to be harmless is left out, so that a new fact or key is, too.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import socket
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Final

from worker import __version__, doctor, events, host, watch_cli
from worker.config import Config, ConfigError
from worker.errors import WorkerError
from worker.record_feeds import clock
from worker.redaction import redact
from worker.store import feeds, schema
from worker.store.database import Store, told_by
from worker.store.spool import Spool, SpoolError

#: Of a log, so much of its end is looked at; of a text, so much is kept.
TAIL_BYTES: Final = 8 * 2**20
_LONGEST: Final = 400
#: Keys of the configuration and facts of events whose texts are words of ours or of a standard.
_CLOSED_KEYS: Final = frozenset({"encoding", "device", "level", "format", "must_agree", "scope", "documents"})
_CLOSED_FACTS: Final = frozenset(
    {"event", "level", "role", "roles", "kind", "verdict", "state", "status", "result", "error", "cause", "places", "document"}
)
_SENTENCES: Final = frozenset({"reason", "sweep"})
#: A DIMSE status says what went wrong, and of nobody.
_STATUS: Final = re.compile(r"(\b0x[0-9A-F]{4}\b)")
_ADDRESS: Final = re.compile(r" at \S+:\d+\b")
_README: Final = """What this file holds, made by `synoptic support-bundle` {version} to be given to whoever helps:

{parts}

It names no patient: identifiers, names, dates and free texts are left out or replaced, and times are seconds before it was made.
It names no site: texts of the configuration are replaced by the name of their key, here and in all sentences. Look before you send it.
"""


def write(path: Path, config: Config, config_file: Path | None, *, log_file: Path | None, lines: int) -> list[tuple[str, str, int]]:
    """Write the bundle, readable by its owner alone; returns what is in it: name, meaning, bytes.

    Raises
    ------
    OSError
        There is such a file already, it cannot be written, or the log cannot be read.
    """
    folder = path.absolute().parent
    refusals = {errno.EEXIST: path.exists(), errno.ENOENT: not folder.is_dir(), errno.EACCES: not os.access(folder, os.W_OK)}
    for number in (number for number, is_so in refusals.items() if is_so):  # now, for the checks may take minutes
        raise OSError(number, os.strerror(number), str(path))
    mask = _Mask(config, config_file)
    now = clock()
    # Whatever may fail is asked before the file is made.
    parts: list[tuple[str, str, object]] = [
        ("versions.json", "every installed package, this program's schema and the database's", _tried(mask, lambda: _versions(config))),
        ("configuration.json", "numbers and closed words; other texts are the names of their keys", mask.configuration(config)),
        (
            "doctor.json",
            "`synoptic doctor`: check, found, is it well",
            [(mask(what), mask(found), ok) for what, found, ok in doctor.checks(config, config_file)],
        ),
        ("status.json", "`synoptic status` and the disk", _tried(mask, lambda: _status(config, mask))),
        ("ledger.json", "`synoptic status --ledger`, of all days together", _tried(mask, lambda: _ledger(config, mask))),
        ("refused.json", "messages that were refused, by cause", _tried(mask, lambda: _refused(config, mask))),
    ]
    if log_file is not None:
        parts.append(
            ("log.json", "the last events of the log; lines that are no events of ours are counted", _log(log_file, lines, mask, now))
        )
    texts = [(name, meaning, json.dumps(content, indent=1, default=str)) for name, meaning, content in parts]
    readme = _README.format(version=__version__, parts="\n".join(f"{name:20s} {meaning}" for name, meaning, _ in texts))
    with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file, zipfile.ZipFile(file, "w") as made:
        for name, text in [("README.txt", readme), *((name, text) for name, _, text in texts)]:
            made.writestr(zipfile.ZipInfo(name), text, zipfile.ZIP_DEFLATED)  # an entry without a date
    return [(name, meaning, len(text)) for name, meaning, text in texts]


class _Mask:
    """Replaces what the site's configuration names by the names of its keys; called with a text, or with a fact of an event."""

    def __init__(self, config: Config, config_file: Path | None) -> None:
        self._names = dict.fromkeys(host.secrets(config), "[secret]")
        urls = [config.site.database, *(one.database for one in config.tables), *(one.url for one in config.destinations)]
        for url in (*urls, config.fhir.url, config.fhir.token_url, config.web.base_url, config.web.oidc_issuer):
            self._names |= dict.fromkeys(told_by(url)[1], "[url]")
        self._learn("", dataclasses.asdict(config))
        for place in (config.site.data, config_file and config_file.resolve(), config_file and config_file.resolve().parent):
            self._names.setdefault(str(place or ""), "[folder]")
        self._names.setdefault(socket.gethostname(), "[host]")
        several = sorted((re.escape(name) for name in self._names if re.search(r"\w", name)), key=len, reverse=True)
        self._pattern = re.compile(rf"(?<!\w)(?:{'|'.join(several)})(?!\w)")

    def _learn(self, where: str, value: object) -> None:
        if isinstance(value, Mapping):
            for key, one in value.items():
                if key not in _CLOSED_KEYS:
                    self._learn(f"{where}.{key}".strip("."), one)
        elif isinstance(value, (list, tuple)):
            for number, one in enumerate(value):
                self._learn(f"{where}.{number}", one)
        elif isinstance(value, (str, Path)):
            self._names.setdefault(str(value), f"[{where}]")

    def __call__(self, text: str) -> str:
        return self._pattern.sub(lambda found: self._names[found[0]], text)[:_LONGEST]

    def sentence(self, text: str) -> str:
        """A sentence of ours that may hold a peer's words or a number that is somebody's."""
        text = _ADDRESS.sub(" at [address]", text)  # also of a peer that the configuration names no more
        return "".join(part if _STATUS.fullmatch(part) else redact(part) for part in _STATUS.split(self(text)))

    def counted(self, reasons: Iterable[tuple[str, int]]) -> dict[str, int]:
        """Sentences and how often; those that differed in what is masked are one."""
        counts: Counter[str] = Counter()
        for reason, count in reasons:
            counts[self.sentence(reason)] += count
        return dict(counts)

    def configuration(self, config: Config) -> object:
        """The configuration, each text replaced."""
        return self._shown("", dataclasses.asdict(config))

    def _shown(self, key: str, value: object) -> object:
        if isinstance(value, Mapping):
            if key in ("issuers", "schemes"):
                return f"{len(value)} entries"  # their keys are the site's words, too
            return {str(name): self._shown(str(name), one) for name, one in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._shown(key, one) for one in value]
        if isinstance(value, (str, Path)) and str(value) and key not in _CLOSED_KEYS:
            return self._names[str(value)]
        return value

    def fact(self, name: str, value: object) -> object:
        """A fact of an event."""
        if isinstance(value, Mapping):
            return {key: self.fact(str(key), one) for key, one in value.items() if isinstance(one, (int, float)) or key in _CLOSED_FACTS}
        if isinstance(value, list):
            return [self.fact(name, one) for one in value]
        if not isinstance(value, str) or name in _CLOSED_FACTS:
            return value
        if name in _SENTENCES:
            return self.sentence(value)
        return self._names.get(value, "[text]")


def _tried(mask: _Mask, make: Callable[[], object]) -> object:
    """What `make` gives, or why there is nothing: a bundle is made where something is broken."""
    try:
        return make()
    except (WorkerError, ConfigError, SpoolError, OSError) as exc:
        return {"unavailable": mask.sentence(str(exc))}


def _versions(config: Config) -> object:
    packages = {one.name: one.version for one in distributions()}
    is_ready = Store(config.database_url).is_ready()
    return {
        "synoptic": __version__,
        "schema": schema.REVISION,
        "database_is_of_it": is_ready,
        "packages": dict(sorted(packages.items())),
    }


def _status(config: Config, mask: _Mask) -> object:
    spool = Spool(config.spool, low_water_bytes=config.receive.low_water_mb * 2**20)
    facts = watch_cli.status_facts(Store(config.database_url), spool, config.trail)
    texts = {"waiting_because": mask.counted(facts["waiting_because"].items()), "audit_trouble": mask.sentence(facts["audit_trouble"])}
    return facts | texts | {"spool_low_water_mb": config.receive.low_water_mb}


def _ledger(config: Config, mask: _Mask) -> object:
    facts = watch_cli.ledger_facts(Store(config.database_url), config.zone, days=0)
    return {"all": facts["all"], "adds_up": facts["adds_up"], "failed_because": mask.counted(facts["failed_because"].items())}


def _refused(config: Config, mask: _Mask) -> object:
    with Store(config.database_url).read() as conn:
        return mask.counted(feeds.refused_because(conn, limit=100))


def _log(path: Path, lines: int, mask: _Mask, now: datetime) -> object:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        found = file.read(TAIL_BYTES).decode("utf-8", "replace").splitlines()[-lines:]
    told = [facts for line in found if (facts := _event(line, mask, now)) is not None]
    return {"events": told, "left_out": len(found) - len(told)}


def _event(line: str, mask: _Mask, now: datetime) -> dict[str, object] | None:
    try:
        facts = json.loads(line)
        if facts["event"] not in {*events.NAMES, "crashed"}:
            return None
        before_s = round((now - datetime.fromisoformat(facts.pop("at"))).total_seconds(), 1)
        return {"before_s": before_s} | {str(name): mask.fact(str(name), value) for name, value in facts.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
