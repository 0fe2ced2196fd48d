"""What one key of the configuration says against another: refused at the start, not at night."""

from __future__ import annotations

import base64
import dataclasses
import ipaddress
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from worker.config_tables import ConfigError
from worker.domain import DICOM_KINDS, KINDS_OF_DOOR, ROLES

if TYPE_CHECKING:
    from worker.config import Config, Destination, Sender, Web

#: Hosts to which nothing travels that somebody else could read.
_NEAR: Final = ("localhost", "127.0.0.1", "::1")


def check(config: Config) -> None:
    """Refuse what is half said or contradicts itself.

    Raises
    ------
    ConfigError
        Naming the section, the key and what it may be.
    """
    for peer in config.destinations:
        _check_door(peer)
    _check_notes(config.destinations)
    titles = [("receive.ae_title", config.receive.ae_title)]
    titles += [("senders.ae_title", sender.ae_title) for sender in config.senders]
    titles += [("destinations.ae_title", peer.ae_title) for peer in config.destinations if peer.door == "dicom"]
    for where, title in titles:
        # PS3.5 §6.2, VR AE: at most 16 characters, not all spaces, no backslash or control characters.
        if not title.strip() or len(title) > 16 or "\\" in title or not title.isprintable() or not title.isascii():
            raise ConfigError(f"{where}: {title!r} is no AE title: 1 to 16 printable ASCII characters, no backslash.")
    _check_ports(config)
    _check_addresses("records", config.records.addresses)
    for sender in config.senders:
        _check_addresses(f"senders {sender.ae_title}", sender.addresses)
    names = [peer.name for peer in config.destinations]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"destinations: two have the same name, {twice!r}; each needs one of its own.")
    if config.receive.processes < 1 or config.run.processes < 1:
        raise ConfigError("receive.processes and run.processes are at least 1.")
    _check_commitment(config)
    _check_records(config)
    _check_tls(config)
    _check_web(config.web)
    _check_numbers(config)


def _check_door(peer: Destination) -> None:
    """A destination has one door, and a secret goes only where it cannot be read on the way."""
    where = f"destinations {peer.name}"
    keys = {
        "ae_title, host, port or commitment": peer.ae_title or peer.host or peer.port or peer.commitment,
        "stow_url": peer.stow_url,
        "hl7_host": peer.hl7_host,
        "fhir_url": peer.fhir_url,
        "webhook_url": peer.webhook_url,
        "mail_to": peer.mail_to,
    }
    given = [key for key, value in keys.items() if value]
    if not given or (peer.door == "dicom" and not (peer.ae_title and peer.host)):
        raise ConfigError(f"{where} needs ae_title, host and port, or stow_url, hl7_host, fhir_url, webhook_url or mail_to.")
    if len(given) > 1:
        raise ConfigError(f"{where}: with {given[1]} there is no {given[0]}: a destination has one door, write one for each.")
    _check_secrets(peer, where)
    known = KINDS_OF_DOOR[peer.door]
    if strange := [kind for kind in peer.documents if kind not in known]:
        choice = f"none of {', '.join(known)}" if len(known) > 1 else f"not {known[0]!r}, the one kind for this door; leave `documents` out"
        raise ConfigError(f"{where}: documents: {strange[0]!r} is {choice}.")


def _check_notes(destinations: tuple[Destination, ...]) -> None:
    """A note names the old report and all that was made with it; dcm4chee, unless told otherwise, refuses one that names what it lacks."""
    made = {"sr", *(kind for peer in destinations if peer.is_archive for kind in peer.wanted)}
    for peer in destinations:
        if "rejection" in peer.wanted and (lacking := [kind for kind in DICOM_KINDS if kind in made - set(peer.wanted)]):
            raise ConfigError(f"destinations {peer.name}: documents: with 'rejection' it must be sent {', '.join(lacking)}, too.")


def _check_secrets(peer: Destination, where: str) -> None:
    for key in ("stow", "fhir", "webhook", "smtp"):
        secret = getattr(peer, f"{key}_secret")
        door = "mail_to" if key == "smtp" else f"{key}_url"
        if secret and not getattr(peer, door):
            raise ConfigError(f"{where}: {key}_secret without {door}.")
        if not (secret.isprintable() and secret.isascii()):
            raise ConfigError(f"{where}: {key}_secret is a token, or user:password, in printable ASCII.")
    _check_key(peer.webhook_secret, where)
    for door in ("stow", "fhir", "webhook"):
        if url := getattr(peer, f"{door}_url"):
            _check_url(f"{where}: {door}_url", url, ends_with="/studies" if door == "stow" else "", secret=f"{door}_secret")
    _check_mail(peer, where)


def _check_key(secret: str, where: str) -> None:
    """A key that cannot be read would be found out by the first critical finding, and nobody be told of it."""
    if not secret.startswith("whsec_"):
        return
    try:
        key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except ValueError:
        key = b""
    if not key:
        raise ConfigError(f"{where}: webhook_secret begins with whsec_, and what follows is no key in Base64.")


def _check_mail(peer: Destination, where: str) -> None:
    if peer.mail_to and not (peer.mail_from and peer.smtp_host):
        raise ConfigError(f"{where}: mail_to needs mail_from and smtp_host.")
    if peer.mail_to and not (peer.tls or peer.smtp_host in _NEAR):
        raise ConfigError(f"{where}: mail_to needs tls = true (STARTTLS); without it only smtp_host on this very machine.")
    if peer.smtp_secret and ":" not in peer.smtp_secret:
        raise ConfigError(f"{where}: smtp_secret is user:password.")


def _check_url(where: str, text: str, *, ends_with: str, secret: str) -> None:
    try:
        url = urlsplit(text)
        is_url = bool(url.hostname) and url.port != 0
    except ValueError:
        is_url = False
    is_near = is_url and url.scheme == "http" and url.hostname in _NEAR
    if not is_url or not (text.startswith("https:") or is_near):  # as written: peers.py and tls.py go by it
        raise ConfigError(f"{where} must begin with https://; http:// is for a server on this very machine.")
    if "@" in url.netloc or url.query or url.fragment or not url.path.endswith(ends_with) or not text.isascii() or " " in text:
        ending = f"must end with {ends_with}" if ends_with else "is a plain address"
        raise ConfigError(f"{where} {ending}; user name and password belong in {secret}.")


def _check_commitment(config: Config) -> None:
    """The archive opens an association to our receiver, to whom we called ourselves, as one of the senders."""
    titles = {sender.ae_title for sender in config.senders}
    for peer in config.destinations:
        if not peer.commitment:
            continue
        if peer.commitment_wait_s <= 0:
            raise ConfigError(f"destinations {peer.name}: commitment_wait_s is more than 0.")
        if not titles & {peer.ae_title, "*"}:
            raise ConfigError(
                f"destinations {peer.name}: commitment needs {peer.ae_title!r} in [[senders]], for the PACS reports by calling us."
            )
        if peer.own_ae_title not in ("", config.receive.ae_title):
            raise ConfigError(f"destinations {peer.name}: with commitment own_ae_title must be [receive] ae_title, which the PACS calls.")


def _check_records(config: Config) -> None:
    if strange := sorted(set(config.records.must_agree) - {"birth_date", "sex", "name"}):
        raise ConfigError(f"records.must_agree: {strange[0]!r} is none of birth_date, sex, name.")
    for one in config.records.mappings:
        if len(one.local) != 2 or len(one.standard) != 3:
            raise ConfigError("records.mappings: local is [code, scheme], standard is [code, scheme, meaning].")
    if config.records.max_connections < 1 or config.records.idle_s <= 0:
        raise ConfigError("records.max_connections is at least 1; records.idle_s is more than 0.")
    if config.fhir.url and not config.fhir.issuer_system:
        raise ConfigError("fhir.issuer_system must name the Identifier.system under which the FHIR server keeps patient IDs.")


def _check_tls(config: Config) -> None:
    """No half a configuration: who names an authority does not expect a plain connection."""
    for section, one in (("receive", config.receive), ("records", config.records)):
        if not one.tls_certificate and (one.tls_key or one.tls_client_ca):
            raise ConfigError(f"{section}: tls_key or tls_client_ca without tls_certificate; the port would be plain.")
    called: list[tuple[str, str, bool, Destination | Sender]]
    called = [(f"destinations {peer.name}", "tls", peer.is_tls, peer) for peer in config.destinations]
    called += [(f"senders {sender.ae_title}", "query_tls", sender.query_tls, sender) for sender in config.senders]
    for where, key, is_on, given in called:
        if not is_on and (given.tls_ca or given.tls_certificate or given.tls_key or given.tls_server_name):
            raise ConfigError(f"{where}: the keys tls_… need {key} = true; the connection would be plain.")
        if given.tls_key and not given.tls_certificate:
            raise ConfigError(f"{where}: tls_key without tls_certificate.")
    if any(sender.tls_names for sender in config.senders) and not config.receive.tls_client_ca:
        raise ConfigError("senders: tls_names need [receive] tls_client_ca; without it no sender is asked for a certificate.")
    audit = config.audit
    if (audit.tls_key and not audit.tls_certificate) or (not audit.syslog_host and (audit.tls_ca or audit.tls_certificate)):
        raise ConfigError("audit: tls_key needs tls_certificate, and the keys tls_… need syslog_host.")


def _check_web(web: Web) -> None:
    """Who may see patients' names may not be asked for a password on an open line."""
    try:
        url = urlsplit(web.url)
        is_url = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        is_url = False
    if not is_url or url.path or url.query or url.fragment or "@" in url.netloc:
        raise ConfigError("web.base_url is how a browser calls the page: https://synoptic.hospital.example, with nothing behind the host.")
    if web.host in ("0.0.0.0", "::") and not web.base_url:  # noqa: S104  what is refused
        raise ConfigError("web.base_url is needed where host is every address of this one: under another name the page does not answer.")
    is_closed = web.tls_certificate or (_is_near(url.hostname) or url.scheme == "https" if web.base_url else _is_near(web.host))
    if not is_closed:
        raise ConfigError(
            'web: host is not this machine alone, so tls_certificate is needed, or base_url = "https://…" where a proxy before it has one.'
        )
    if web.tls_key and not web.tls_certificate:
        raise ConfigError("web: tls_key without tls_certificate.")
    _check_addresses("web.monitors", web.monitors)
    _check_log_in(web)


def _check_log_in(web: Web) -> None:
    if min(web.session_h, web.idle_min) <= 0:
        raise ConfigError("web.session_h and web.idle_min are more than 0.")
    if bool(web.oidc_issuer) != bool(web.oidc_client_id) or (web.oidc_client_secret and not web.oidc_issuer):
        raise ConfigError("web: oidc_issuer, oidc_client_id and, where there is one, oidc_client_secret belong together.")
    if web.oidc_issuer and not (web.oidc_issuer.startswith("https://") or _is_near(urlsplit(web.oidc_issuer).hostname)):
        raise ConfigError("web.oidc_issuer must begin with https://; http:// is for a server on this very machine.")
    if strange := sorted(set(web.oidc_roles.values()) - set(ROLES)):
        raise ConfigError(f"web.oidc_roles: {strange[0]!r} is none of {', '.join(ROLES)}.")


def _is_near(host: str | None) -> bool:
    return host in ("localhost", "127.0.0.1", "::1")


def _check_numbers(config: Config) -> None:
    if min(config.run.batch, config.deliver.batch, config.run.decoders) < 1 or min(config.run.lease_s, config.deliver.lease_s) < 3:
        raise ConfigError("run.batch, deliver.batch and run.decoders are at least 1; run.lease_s and deliver.lease_s at least 3.")
    if config.audit.limit_mb < 1 or config.audit.keep_days < 0:
        raise ConfigError("audit: limit_mb is at least 1; keep_days is 0 (as long as limit_mb allows) or more.")
    if config.run.study_limit_s <= 0:
        raise ConfigError("run.study_limit_s is more than 0.")
    if min(config.receive.verify_mb_per_h, *dataclasses.astuple(config.retention)) < 0:
        raise ConfigError("retention: days are 0 (never) or more, and so is receive.verify_mb_per_h.")
    if config.log.level.upper() not in {"DEBUG", "INFO", "WARNING", "ERROR"} or config.log.format not in {"json", "human"}:
        raise ConfigError("log.level is DEBUG, INFO, WARNING or ERROR; log.format is json or human.")


def _check_ports(config: Config) -> None:
    ports = [("receive", config.receive.port), ("records", config.records.port), ("web", config.web.port)]
    ports += [(f"destinations {peer.name}", peer.port) for peer in config.destinations if peer.door == "dicom"]
    ports += [(f"destinations {peer.name}", peer.hl7_port) for peer in config.destinations]
    ports += [(f"destinations {peer.name}", peer.smtp_port) for peer in config.destinations]
    ports += [(f"senders {sender.ae_title}", sender.commitment_port) for sender in config.senders if sender.commitment_port]
    for where, port in ports:
        if not 1 <= port <= 65535:
            raise ConfigError(f"{where}: {port} is no TCP port; ports are 1 to 65535.")


def _check_addresses(where: str, addresses: tuple[str, ...]) -> None:
    for address in addresses:
        try:
            ipaddress.ip_network(address, strict=False)
        except ValueError as exc:
            raise ConfigError(f"{where}: {address!r} is no IP address or network; write 10.1.2.3 or 10.1.2.0/24.") from exc
