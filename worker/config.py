"""The one configuration: a TOML file and the environment, read once, frozen.

Every key of a section is a field of its class (config_sections.py), so the class is the reference; deploy/synoptic.toml
shows each with a comment. An unknown key is an error that names the nearest right one. The environment overrides single
keys: ``SYNOPTIC_RECEIVE__PORT=11112`` is ``[receive] port``, ``SYNOPTIC_DESTINATIONS__PACS__STOW_SECRET`` a key of the destination "pacs".
Secrets belong there. Nothing here reads a database or opens a socket.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from pathlib import Path
from typing import Any, Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from worker.config_checks import check
from worker.config_sections import (
    Assembly,
    Audit,
    CodeMapping,
    Deliver,
    Destination,
    FhirServer,
    Log,
    PatientIds,
    Receive,
    Records,
    Retention,
    Run,
    Sender,
    Site,
    Table,
    Web,
)
from worker.config_tables import ConfigError, Text, build

__all__ = [
    "ENVIRONMENT_PREFIX",
    "Assembly",
    "Audit",
    "CodeMapping",
    "Config",
    "ConfigError",
    "Deliver",
    "Destination",
    "FhirServer",
    "Log",
    "PatientIds",
    "Receive",
    "Records",
    "Retention",
    "Run",
    "Sender",
    "Site",
    "Table",
    "Web",
    "config_file",
    "parse_zone",
    "read",
]

ENVIRONMENT_PREFIX: Final = "SYNOPTIC_"


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything, frozen."""

    site: Site = field(default_factory=Site)
    receive: Receive = field(default_factory=Receive)
    senders: tuple[Sender, ...] = ()
    assembly: Assembly = field(default_factory=Assembly)
    records: Records = field(default_factory=Records)
    fhir: FhirServer = field(default_factory=FhirServer)
    tables: tuple[Table, ...] = ()
    run: Run = field(default_factory=Run)
    destinations: tuple[Destination, ...] = ()
    deliver: Deliver = field(default_factory=Deliver)
    retention: Retention = field(default_factory=Retention)
    web: Web = field(default_factory=Web)
    log: Log = field(default_factory=Log)
    audit: Audit = field(default_factory=Audit)

    @property
    def database_url(self) -> str:
        """The configured database, else SQLite in the data folder."""
        return self.site.database or f"sqlite:///{self.site.data / 'synoptic.db'}"

    @property
    def zone(self) -> tzinfo:
        """The zone of times that come without one."""
        return parse_zone(self.site.timezone)

    @property
    def spool(self) -> Path:
        """The spool folder."""
        return self.site.data / "spool"

    @property
    def trail(self) -> Path:
        """The folder of the audit trail."""
        return self.site.data / "audit"


def parse_zone(text: str) -> tzinfo:
    """Read ``Europe/Berlin``, ``UTC`` or a fixed ``+01:00``."""
    if text[:1] in "+-" and text:
        try:
            return timezone(datetime.strptime(text, "%z").utcoffset() or timedelta())  # only the offset is read
        except ValueError as exc:
            raise ConfigError(f"[site] timezone: {text!r} is no offset; write it as +01:00.") from exc
    try:
        return UTC if text == "UTC" else ZoneInfo(text)
    except (ZoneInfoNotFoundError, ValueError) as exc:
        raise ConfigError(f"[site] timezone: there is no zone {text!r}; write one like Europe/Berlin, or +01:00.") from exc


def config_file(given: Path | None) -> Path | None:
    """The file that counts: the one given, else the first that exists."""
    if given is not None:
        return given
    return next((path for path in (Path("synoptic.toml"), Path("/etc/synoptic/synoptic.toml")) if path.exists()), None)


def read(path: Path | None, environ: Mapping[str, str] = os.environ) -> Config:
    """Read the file (if any) and the environment.

    Raises
    ------
    ConfigError
        Naming the file, the section and the key.
    """
    table: dict[str, Any] = {}
    if path is not None:
        try:
            table = tomllib.loads(path.read_text("utf-8"))
        except FileNotFoundError as exc:
            raise ConfigError(f"There is no configuration file at {path}.") from exc
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
            raise ConfigError(f"{path} is not TOML: {exc}.") from exc
    _add_environment(table, environ)
    config: Config = build(Config, table, where="")
    # Relative folders are relative to the file, so that the daemon may be started anywhere.
    base = path.resolve().parent if path else Path.cwd()
    site = dataclasses.replace(config.site, data=base / config.site.data)
    run = dataclasses.replace(config.run, bundles=tuple(base / folder for folder in config.run.bundles))
    tables = tuple(dataclasses.replace(table, mapping=base / table.mapping) for table in config.tables)
    config = dataclasses.replace(config, site=site, run=run, tables=tables)
    check(config)
    parse_zone(config.site.timezone)
    return config


def _add_environment(table: dict[str, Any], environ: Mapping[str, str]) -> None:
    for name, value in environ.items():
        if not name.startswith(ENVIRONMENT_PREFIX) or "__" not in name:
            continue
        section, key = name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__", 1)
        if isinstance(found := table.setdefault(section, {}), list):
            found, key = _named(found, key, name=name, section=section)
        found[key] = Text(value)


def _named(entries: list[dict[str, Any]], key: str, *, name: str, section: str) -> tuple[dict[str, Any], str]:
    """The entry of a list that a variable means by its name, and what is left of the key: ``PACS_2__STOW_SECRET`` is of "pacs-2"."""
    meant, _, key = key.partition("__")
    found = [one for one in entries if re.sub(r"\W", "_", str(one.get("name", ""))).lower() == meant]
    if len(found) != 1 or not key:
        raise ConfigError(f"{name}: [[{section}]] is a list; write SYNOPTIC_{section.upper()}__NAME__KEY, NAME that of one of its entries.")
    return found[0], key
