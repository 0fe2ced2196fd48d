"""The sections of the configuration: every key of a section is a field of its class.

deploy/synoptic.toml shows each with a comment. Not here: how they are read (config.py), what they may not say together (config_checks.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from worker.domain import KINDS_OF_DOOR


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
    """Who gets results, by one door: a PACS by C-STORE or STOW-RS, a RIS by HL7, an EHR by FHIR, people by webhook or e-mail.

    ``documents`` are kinds of worker/domain/answers.py; empty: what is usual for the door. Secrets belong in the environment.
    """

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
    documents: tuple[str, ...] = ()
    hl7_host: str = ""
    hl7_port: int = 2575
    fhir_url: str = ""
    fhir_secret: str = field(default="", repr=False)
    webhook_url: str = ""
    webhook_secret: str = field(default="", repr=False)
    mail_to: tuple[str, ...] = ()
    mail_from: str = ""
    smtp_host: str = ""
    smtp_port: int = 25
    smtp_secret: str = field(default="", repr=False)

    @property
    def door(self) -> str:
        """Which of its doors is configured (config_checks.py sees to it that it is one)."""
        doors = {"stow": self.stow_url, "hl7": self.hl7_host, "fhir": self.fhir_url, "webhook": self.webhook_url, "mail": self.mail_to}
        return next((door for door, value in doors.items() if value), "dicom")

    @property
    def secrets(self) -> tuple[str, ...]:
        """All that must never be shown."""
        return (self.stow_secret, self.fhir_secret, self.webhook_secret, self.smtp_secret)

    @property
    def is_tls(self) -> bool:
        """Whether it is called by TLS: as `tls` says, or as its URL does."""
        return self.tls or self.url.startswith("https:")

    @property
    def own_port(self) -> int:
        """The port of a door without a URL."""
        return {"hl7": self.hl7_port, "mail": self.smtp_port}.get(self.door, self.port)

    @property
    def url(self) -> str:
        """That of its door; '' where that has none."""
        return self.stow_url or self.fhir_url or self.webhook_url

    @property
    def is_archive(self) -> bool:
        """Whether it takes DICOM objects, and can be asked for them."""
        return self.door in ("dicom", "stow")

    @property
    def wanted(self) -> tuple[str, ...]:
        """The kinds of documents that it is sent."""
        return self.documents or KINDS_OF_DOOR[self.door][:1]


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
