"""`synoptic doctor`: everything an installation needs, checked and printed, one line a check.

Its output is made to be pasted into a bug report: no patient data, no secrets.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import platform
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil
from pydicom.uid import UID
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from worker import __version__, daemon, guards, host, peers, tls
from worker.config import ENVIRONMENT_PREFIX, Config, ConfigError
from worker.errors import BundleError, PeerRefused, PeerUnavailable, WorkerError
from worker.imaging.codecs import unloadable
from worker.imaging.decoding import codec_versions
from worker.record_feeds import clock
from worker.roles import read_bundles
from worker.store import accounts, measures
from worker.store.database import DatabaseUnavailable, Store
from worker.store.spool import Spool, SpoolError

if TYPE_CHECKING:
    from worker.deliver.cstore import Peer
    from worker.intake import fhir_http

#: So long a role may take until it is ready.
READY_S: Final = 120.0
#: So long and so much a FHIR server may take to say what it is; a large one's statement is a few megabytes.
FHIR_S: Final = 5.0
_FHIR_BYTES: Final = 32 * 2**20


class DecoderMissing(WorkerError):
    """A decoder cannot be loaded; raised and told here only."""


#: (what, found, is it well)
Check = tuple[str, str, bool]

LIBRARIES: Final = ("pydicom", "pynetdicom", "highdicom", "torch", "monai", "sqlalchemy", "apscheduler", "numpy")


def report(out: Console, config: Config, config_file: Path | None) -> bool:
    """Run all checks and print them; returns whether all are well."""
    table = Table("check", "found", "")
    well = True
    with out.status("checking …") as status:  # on a terminal alone: loading and starting take a minute
        for what, found, is_well in checks(config, config_file):
            table.add_row(escape(what), escape(found), "[green]ok[/green]" if is_well else "[red]look here[/red]")
            status.update(f"checked {escape(what)} …")
            well &= is_well
    out.print(table)
    return well


def checks(config: Config, config_file: Path | None) -> Iterator[Check]:
    """Every check, in the order in which a failure explains the next."""
    yield "synoptic", f"{__version__} on Python {platform.python_version()}, {platform.platform()}", True
    yield "libraries", ", ".join(f"{name} {version(name)}" for name in LIBRARIES), True
    is_said = config_file is not None or any(name.startswith(ENVIRONMENT_PREFIX) for name in os.environ)
    none = "no file, the environment alone" if is_said else "none: start from deploy/synoptic.toml, or say --config FILE"
    yield "configuration", str(config_file or none), is_said
    risks = [*host.changeable(config, config_file), *host.exposed(config, config_file)]
    yield "protection", " ".join(risks) or "no core dumps; a user of its own; nothing here that other users may change", not risks
    yield _tried("codecs", _codecs)
    yield _tried("database", lambda: _database(config))
    yield _tried("spool", lambda: _spool(config))
    yield from _bundles(config)
    yield from _reached(config)
    if any({"summary", "pdf"} & {*one.documents} for one in config.destinations):
        yield _tried("fonts", _fonts)
    yield from _peers(config)
    yield from _listeners(config, config_file)
    yield from _stored(config)
    yield from _certificates(config)
    if config.fhir.url:
        yield _tried("FHIR server", lambda: _fhir(config))
    yield from _roles(config_file)
    yield from _idle(config, config_file)


def _tried(what: str, check: Callable[[], str]) -> Check:
    try:
        return what, check(), True
    except (WorkerError, ConfigError, SpoolError, OSError, ValueError, RuntimeError) as exc:  # RuntimeError: torch, a device that is full
        return what, str(exc), False


def _codecs() -> str:
    versions = codec_versions()
    if missing := unloadable(versions):
        raise DecoderMissing(" ".join(missing))
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _fonts() -> str:
    """Whether summary pages can say any name."""
    from worker.report import page

    if missing := page.scripts_without_font():
        raise ValueError(f"no installed font shows {', '.join(missing)}: names in it become � on summary pages. Install the Noto fonts.")
    return f"summary pages are set in {page.families()[0]}; every script that is tried has a font"


def _database(config: Config) -> str:
    store = Store(config.database_url)
    if config.site.database or (config.site.data / "synoptic.db").exists():
        store.check()
        return f"{store.url.render_as_string(hide_password=True)}, at this program's version"
    return f"{store.url.database}: will be made at the first start"


def _spool(config: Config) -> str:
    spool = Spool(config.spool, low_water_bytes=config.receive.low_water_mb * 2**20)
    free = f"{spool.free_bytes / 2**30:.1f} GB free, refuses below {spool.low_water_bytes / 2**30:.1f} GB"
    if spool.is_low:
        raise SpoolError(f"{config.spool}: {free}. C-STORE is answered 0xA700 until there is room.")
    try:
        with tempfile.TemporaryFile(dir=config.spool / "incoming", buffering=0) as probe:
            probe.write(bytes(4096))
            os.fsync(probe.fileno())
    except OSError as exc:
        raise SpoolError(f"{config.spool} cannot be written (errno {exc.errno}). C-STORE is answered 0xA700 until it can.") from exc
    return f"{config.spool}: {free}"


def _bundles(config: Config) -> Iterator[Check]:
    if not config.run.bundles:
        yield "bundles", "none is configured: studies will be received and excluded. Set [run] bundles.", False
        return
    from worker.infer import Model

    for folder in config.run.bundles:

        def load(folder: Path = folder) -> str:
            started = time.perf_counter()
            with guards.advising(folder):
                model = Model(folder, device=config.run.device)
            seconds = time.perf_counter() - started
            sha256 = model.bundle.weights.sha256
            return (
                f"{model.name} {model.version} on {config.run.device}, weights sha256 {sha256[:16]}… as stated, loaded in {seconds:.1f} s"
            )

        yield _tried("bundle", load)


def _reached(config: Config) -> Iterator[Check]:
    """Whether those who may call from another machine can: the defaults listen on this one alone."""
    doors = [("receive", config.receive.host, [address for one in config.senders for address in one.addresses])]
    doors += [("records", config.records.host, list(config.records.addresses))] if config.records.enabled else []
    for section, listens, callers in doors:
        away = [one for one in callers if not _is_loopback(one)]
        if away and _is_loopback(listens):
            yield (
                f"[{section}] host",
                f"{listens} is reached from this machine alone, and {away[0]} may call: set it to this host's address, or to 0.0.0.0.",
                False,
            )


def _is_loopback(address: str) -> bool:
    try:
        return address == "localhost" or ipaddress.ip_network(address, strict=False).is_loopback
    except ValueError:
        return False


def _listeners(config: Config, config_file: Path | None) -> Iterator[Check]:
    """Whether the ports that the roles listen on are theirs, or free to be."""
    running = {name for name, _ in _running(config_file)}
    doors = [("receive", "receive", config.receive.host, config.receive.port)]
    doors += [("records", "receive", config.records.host, config.records.port)] if config.records.enabled else []
    doors += [("web", "serve", config.web.host, config.web.port)] if config.web.enabled else []
    for section, role, listens, port in doors:
        if role not in running:
            yield _tried(f"[{section}] port", partial(_free, listens, port))


def _free(listens: str, port: int) -> str:
    try:
        family = socket.AF_INET6 if ":" in listens else socket.AF_INET
        socket.create_server((listens, port), family=family).close()
    except OSError as exc:
        raise PeerRefused(
            f"{listens}:{port} cannot be listened on, {exc.strerror or exc}: another program has it, or set another."
        ) from exc
    return f"{listens}:{port} is free"


def _stored(config: Config) -> Iterator[Check]:
    """What only the database and the bundles tell; where they cannot be read their own lines have said so."""
    store = Store(config.database_url)
    with contextlib.suppress(DatabaseUnavailable, BundleError):
        store.check()
        bundles = read_bundles(config)
        yield from _page(config, store)
        yield from _unwanted(config, store, {one.name for one in bundles})
        is_told = any("notice" in one.wanted for one in config.destinations)
        if is_told and bundles and not any(finding.critical for one in bundles for finding in one.findings):
            yield "notices", "none will ever go: no bundle here calls a finding critical. Its bundle.toml says which is.", False


def _page(config: Config, store: Store) -> Iterator[Check]:
    """Whether anybody can log in."""
    if config.web.enabled:
        with store.read() as conn:
            count = len(accounts.all_of(conn))
        is_known = bool(count or config.web.oidc_issuer)
        nobody = "nobody can log in yet: `synoptic user add NAME --role admin`"
        yield "page", f"{config.web.url}, {count} accounts here" if is_known else nobody, is_known


def _unwanted(config: Config, store: Store, bundles: Collection[str]) -> Iterator[Check]:
    """What waits for a destination or a bundle that the configuration does not name: nobody takes it."""
    named = {one.name for one in config.destinations}
    with store.read() as conn:
        waiting = [row for row in measures.open_jobs(conn) if row.state == "available"]
    for row in waiting:
        what, whom = ("documents", row.destination) if row.kind == "deliver" else ("analyses", row.bundle)
        if whom not in (named if row.kind == "deliver" else bundles):
            advice = "name it again, or `synoptic cancel` their studies"
            yield f"waiting {what}", f"{row.jobs} wait for {whom}, which the configuration does not name: {advice}.", False


def _peers(config: Config) -> Iterator[Check]:
    own = config.receive.ae_title
    if not config.destinations:
        yield "destinations", "none is configured: reports stay in the database. Add [[destinations]].", False
    for one in config.destinations:
        peer = partial(peers.peer_of, one, own_ae_title=own)
        said = _tried(f"{_QUESTIONS[one.door]} {one.name}", partial(_echo, peer))
        yield said
        if said[2] and one.door == "dicom":
            yield _tried(f"documents for {one.name}", partial(_accepted, peer, one.wanted))
    for sender in config.senders:
        if sender.query_port:
            peer = partial(peers.peer_to_ask, sender, host=sender.addresses[0], own_ae_title=own)
            yield _tried(f"C-ECHO {sender.ae_title}", partial(_echo, peer))
    if not config.senders:
        yield "senders", "none is configured: nobody may store. Add [[senders]].", False


#: What each door is asked; HL7 and webhooks have no question without consequences, and are only connected to.
_QUESTIONS: Final = {"dicom": "C-ECHO", "stow": "DICOMweb", "hl7": "HL7", "fhir": "FHIR", "webhook": "webhook", "mail": "mail"}


def _echo(peer_of: Callable[[], Peer]) -> str:
    from worker.deliver import cstore, fhir, mllp, notice, stow

    peer = peer_of()
    if peer.stow_url:
        return f"{peer.stow_url} answers QIDO-RS, {stow.ask(peer) * 1000:.0f} ms"
    ask = {"hl7": mllp.reach, "fhir": fhir.ask, "webhook": mllp.reach, "mail": notice.ask}.get(peer.door, cstore.echo)
    who = f"{peer.ae_title} at " if peer.ae_title else ""
    return f"{who}{peer.host}:{peer.port}{', by TLS' if peer.tls else ''}, {ask(peer) * 1000:.0f} ms"


def _accepted(peer_of: Callable[[], Peer], kinds: Sequence[str]) -> str:
    """Whether an archive would take each kind of document that it is to get: what it does not take becomes dead letters."""
    from worker.deliver import cstore
    from worker.report.forms import SOP_CLASSES

    classes = {kind: SOP_CLASSES[kind] for kind in kinds}
    refused = cstore.unaccepted(peer_of(), dict.fromkeys(classes.values()))
    lacking = [f"{UID(uid).name} ({kind})" for kind, uid in classes.items() if uid in refused]
    if lacking:
        raise PeerRefused(f"it accepts no {', no '.join(lacking)}: let it, or leave that out of `documents`.")
    if refused:  # the query
        raise PeerRefused("it does not accept C-FIND, by which we see that it has what it took: let it, or set read_back = false.")
    return f"it accepts {', '.join(kinds)}"


def _certificates(config: Config) -> Iterator[Check]:
    """Whether each certificate can be used and lasts; of a peer that is away its C-ECHO has told."""
    try:
        tls.check(config)
        named = list(tls.ends(config, peers.peers_of(config)))
    except ConfigError as exc:
        yield "certificates", str(exc), False
        return
    for what, end_of in named:
        try:
            yield what, *tls.lifetime(end_of(), now=clock())
        except PeerUnavailable:
            continue
        except (WorkerError, ConfigError) as exc:
            yield what, str(exc), False


def _fhir(config: Config) -> str:
    """Ask the FHIR server what it is (R4 §3.1.0.9), without a token, which that may not need; no patient is asked for."""
    from worker.fhir_feed import Puller
    from worker.intake import fhir_http

    Puller(config, Store(config.database_url))  # reads keys and certificates, connects to nothing
    url = fhir_http.checked_url(f"{config.fhir.url.rstrip('/')}/metadata", "fhir.url")
    transport = fhir_http.Transport(fhir_http.tls_context(config.fhir.ca), FHIR_S, attempts=1)
    budget = fhir_http.Budget(_FHIR_BYTES, time.monotonic() + FHIR_S)
    try:
        answer = transport.ask("GET", url, budget=budget, headers={"Accept": "application/fhir+json"})
    except WorkerError as exc:
        raise PeerUnavailable(f"{exc} Check fhir.url and fhir.ca, and that this host may reach {url.host}.") from exc
    finally:
        transport.close()
    return _said(answer, url.host)


def _said(answer: fhir_http.Answer, host: str) -> str:
    """What a FHIR server is by its answer to /metadata."""
    if answer.status in (401, 403):
        return f"{host} answers, and shows what it is only to who has a token; the first study asks for one"
    if answer.status != 200:
        raise PeerRefused(f"{host} answers /metadata with status {answer.status}: fhir.url must be the base URL, without /metadata.")
    release = answer.content.get("fhirVersion")
    if answer.content.get("resourceType") != "CapabilityStatement" or not isinstance(release, str):
        raise PeerRefused(f"{host} answers /metadata with no CapabilityStatement: fhir.url must be a FHIR server's base URL.")
    if not release.startswith("4."):
        raise PeerRefused(f"{host} does not speak FHIR R4: set fhir.url to the server's R4 base URL.")
    return f"{host} speaks FHIR {release if len(release) < 16 else 'R4'}"


def _running(config_file: Path | None) -> Iterator[tuple[str, psutil.Process]]:
    """The roles of this configuration that are running on this host now."""
    for process in psutil.process_iter(["cmdline", "memory_info", "create_time"]):
        line = process.info["cmdline"] or []
        if "worker" in line and "role" in line and (str(config_file) in line if config_file else "--config" not in line):
            yield line[line.index("role") + 1], process


def _roles(config_file: Path | None) -> Iterator[Check]:
    """What runs, with its memory."""
    for name, process in _running(config_file):
        minutes = (time.time() - process.info["create_time"]) / 60
        yield f"running: {name}", f"{process.info['memory_info'].rss / 2**20:.0f} MB, for {minutes:.0f} min", True


def _idle(config: Config, config_file: Path | None) -> Iterator[Check]:
    """Start each role for a moment, on a port of its own, and read its own words: seconds to ready and memory."""
    try:
        Store(config.database_url).check()
    except DatabaseUnavailable:
        return  # its own line has said so
    is_wanted = {"receive": True, "run": config.run.bundles, "deliver": config.destinations, "serve": config.web.enabled}
    wanted = [name for name, is_so in is_wanted.items() if is_so]
    for name in wanted:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.set_inheritable(True)
            line = daemon.command(name, config_file, descriptor=listener.fileno(), is_check=True)
            try:
                done = subprocess.run(line, capture_output=True, pass_fds=(listener.fileno(),), timeout=READY_S, check=False)  # noqa: S603  our own
                written = done.stdout
            except subprocess.TimeoutExpired as exc:
                written = exc.stdout or b""
        said = next((fact for fact in map(_json, written.splitlines()) if fact.get("event") == "role.started"), {})
        found = f"ready after {said['seconds']} s, {said['rss_mb']} MB idle" if said else "did not start; see its log"
        yield f"role {name}", found, bool(said)


def _json(line: bytes) -> dict[str, object]:
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
