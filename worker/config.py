"""The one configuration: a TOML file and the environment, read once, frozen.

Every key of a section is a field of its class, so the class is the reference; deploy/synoptic.toml
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
from worker.config_tables import ConfigError as ConfigError
from worker.config_tables import Text, build

ENVIRONMENT_PREFIX: Final = "SYNOPTIC_"


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What is true of the whole installation."""

    data: Path = Path("var")
    database: str = field(default="", repr=False)
    timezone: str = "UTC"
    issuer: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Receive:
    """The Storage SCP."""

    host: str = "127.0.0.1"
    port: int = 11112
    ae_title: str = "SYNOPTIC"
    processes: int = 1
    max_associations: int = 50
    max_per_address: int = 25
    max_pdu_bytes: int = 131072
    pdu_deadline_s: float = 30.0
    idle_s: float = 60.0
    accept_unknown_sop_classes: bool = False
    low_water_mb: int = 2048
    tls_certificate: str = ""
    tls_key: str = ""
    tls_client_ca: str = ""
    verify_mb_per_h: float = 1024.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sender:
    """Somebody who may send to us; with ports, it is asked how many images a study has, and may ask us to commit to what it sent."""

    ae_title: str
    addresses: tuple[str, ...] = ("127.0.0.1",)
    query_host: str = ""
    query_port: int = 0
    query_tls: bool = False
    tls_ca: str = ""
    tls_certificate: str = ""
    tls_key: str = ""
    tls_server_name: str = ""
    tls_names: tuple[str, ...] = ()
    commitment_port: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembly:
    """When a study is complete."""

    quiet_s: float = 60.0
    quiet_by_modality: Mapping[str, float] = field(default_factory=lambda: {"CR": 15.0, "DX": 15.0})
    sweep_s: float = 0.25
    ask_sender_after_s: float = 0.5
    incomplete_limit_s: float = 1800.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PatientIds:
    """How patient IDs are compared: exactly, unless this says otherwise. A change counts for what comes after it."""

    strip_leading_zeros: bool = False
    upper_case: bool = False
    narrow_digits: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeMapping:
    """One code of the site's own and the code that bundles ask for."""

    local: tuple[str, ...]
    standard: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """The HL7 v2 listener, how identifiers are read, and what follows from a change."""

    enabled: bool = True
    host: str = "127.0.0.1"
    port: int = 2575
    addresses: tuple[str, ...] = ("127.0.0.1",)
    encoding: str = "utf-8"
    issuers: Mapping[str, str] = field(default_factory=dict)
    schemes: Mapping[str, str] = field(default_factory=dict)
    mappings: tuple[CodeMapping, ...] = ()
    patient_ids: PatientIds = field(default_factory=PatientIds)
    must_agree: tuple[str, ...] = ("birth_date", "sex", "name")
    max_message_mb: int = 8
    max_connections: int = 32
    idle_s: float = 600.0
    tls_certificate: str = ""
    tls_key: str = ""
    tls_client_ca: str = ""
    silent_after_s: float = 0.0
    reissue: bool = True
    reissue_within_h: float = 720.0
    keep_raw_days: int = 30
    keep_values_days: int = 0
    keep_texts_days: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FhirServer:
    """A FHIR R4 server that is asked for a patient's record just before a study is analysed. The secret belongs in the environment."""

    url: str = ""
    issuer_system: str = ""
    token_url: str = ""
    client_id: str = ""
    client_secret: str = field(default="", repr=False)
    key_file: str = ""
    key_id: str = ""
    scope: str = "system/*.read"
    ca: str = ""
    timeout_s: float = 10.0
    fresh_s: float = 300.0
    full_every_h: float = 24.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A view or query of the site's data warehouse, read again and again from where it ended; not at all where `every_s` is 0."""

    name: str
    database: str = field(repr=False)
    query: str
    mapping: Path
    every_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Inference."""

    bundles: tuple[Path, ...] = ()
    device: str = "cpu"
    processes: int = 1
    threads: int = 1
    batch: int = 8
    decoders: int = 2
    decoder_memory_mb: int = 2048
    decoder_timeout_s: float = 60.0
    lease_s: float = 60.0
    poll_s: float = 0.1
    study_limit_s: float = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Web:
    """The page for people, and the numbers for monitoring. The secret belongs in the environment."""

    enabled: bool = False
    host: str = "127.0.0.1"
    port: int = 8080
    base_url: str = ""
    tls_certificate: str = ""
    tls_key: str = ""
    session_h: float = 8.0
    idle_min: float = 30.0
    monitors: tuple[str, ...] = ("127.0.0.1", "::1")
    oidc_issuer: str = ""
    oidc_client_id: str = ""
    oidc_client_secret: str = field(default="", repr=False)
    oidc_ca: str = ""
    oidc_claim: str = "groups"
    oidc_roles: Mapping[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """How a browser calls us, without a slash at the end."""
        near = f"[{self.host}]" if ":" in self.host else self.host
        return (self.base_url or f"{'https' if self.tls_certificate else 'http'}://{near}:{self.port}").rstrip("/")


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """After how many days the files of a study go, by where it stands; 0: never."""

    delivered_days: int = 0
    excluded_days: int = 0
    failed_days: int = 0
    quarantine_days: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """A PACS that gets the reports: by C-STORE to AE title, host and port, or by STOW-RS. The secret belongs in the environment."""

    name: str
    ae_title: str = ""
    host: str = ""
    port: int = 0
    own_ae_title: str = ""
    read_back: bool = True
    commitment: bool = False
    commitment_wait_s: float = 600.0
    timeout_s: float = 30.0
    tls: bool = False
    tls_ca: str = ""
    tls_certificate: str = ""
    tls_key: str = ""
    tls_server_name: str = ""
    stow_url: str = ""
    stow_secret: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Deliver:
    """Delivery."""

    lease_s: float = 120.0
    poll_s: float = 0.1
    batch: int = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """The log: JSON lines on standard output."""

    level: str = "INFO"
    format: str = "json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """The audit trail, apart from the log: files, and an Audit Record Repository where a host is named."""

    enabled: bool = True
    limit_mb: int = 4096
    keep_days: int = 0
    syslog_host: str = ""
    syslog_port: int = 6514
    tls_ca: str = ""
    tls_certificate: str = ""
    tls_key: str = ""
    tls_server_name: str = ""


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
