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
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from worker import __version__, daemon, doctor_peers, guards, host
from worker.config import ENVIRONMENT_PREFIX, Config
from worker.doctor_peers import Check, tried
from worker.errors import BundleError, PeerRefused, WorkerError
from worker.imaging.codecs import unloadable
from worker.imaging.decoding import codec_versions
from worker.roles import read_bundles
from worker.store import accounts, measures, withdrawal
from worker.store.database import DatabaseUnavailable, Store
from worker.store.spool import Spool, SpoolError

if TYPE_CHECKING:
    from models.bundle import Bundle

#: So long a role may take until it is ready.
READY_S: Final = 120.0


class DecoderMissing(WorkerError):
    """A decoder cannot be loaded; raised and told here only."""


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
    yield tried("codecs", _codecs)
    yield tried("database", lambda: _database(config))
    yield tried("spool", lambda: _spool(config))
    yield from _bundles(config)
    yield from _reached(config)
    if any({"summary", "pdf"} & {*one.documents} for one in config.destinations):
        yield tried("fonts", _fonts)
    yield from doctor_peers.checks(config)
    yield from _listeners(config, config_file)
    yield from _stored(config)
    yield from _roles(config_file)
    yield from _idle(config, config_file)


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

        yield tried("bundle", load)


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
            yield tried(f"[{section}] port", partial(_free, section, listens, port))


def _free(section: str, listens: str, port: int) -> str:
    try:
        daemon.listener(section, listens, port).close()
    except OSError as exc:
        raise PeerRefused(f"{exc.strerror}: {exc.filename}") from exc
    return f"{listens}:{port} is free"


def _stored(config: Config) -> Iterator[Check]:
    """What the database and the bundles tell together; where they cannot be read their own lines have said so."""
    bundles: list[Bundle] | None = None
    with contextlib.suppress(BundleError):
        bundles = read_bundles(config)
    is_told = any("notice" in one.wanted for one in config.destinations)
    if is_told and bundles and not any(finding.critical for one in bundles for finding in one.findings):
        yield "notices", "none will ever go: no bundle here calls a finding critical. Its bundle.toml says which is.", False
    with contextlib.suppress(DatabaseUnavailable):
        store = Store(config.database_url)
        store.check()
        yield from _page(config, store)
        yield from _unnamed(config, store, None if bundles is None else {one.name for one in bundles})


def _page(config: Config, store: Store) -> Iterator[Check]:
    """Whether anybody can log in."""
    if config.web.enabled:
        with store.read() as conn:
            count = len(accounts.all_of(conn))
        is_known = bool(count or config.web.oidc_issuer)
        nobody = "nobody can log in yet: `synoptic user add NAME --role admin`"
        yield "page", f"{config.web.url}, {count} accounts here" if is_known else nobody, is_known


def _unnamed(config: Config, store: Store, bundles: Collection[str] | None) -> Iterator[Check]:
    """What waits for somebody whom the configuration does not name; who that is, is not said: this output goes to others."""
    with store.read() as conn:
        owed = withdrawal.unnamed(conn, {one.name: one.wanted for one in config.destinations})
        waiting = [row for row in measures.open_jobs(conn) if row.state == "available" and row.kind == "infer"]
    if count := sum(row.available + row.discarded for row in owed):
        where = "destinations, or in kinds of documents, that the configuration does not name"
        yield "deliveries", f"{count} are still owed to {where}: `synoptic withdraw` lists them.", False
    if bundles is not None and (count := sum(row.jobs for row in waiting if row.bundle not in bundles)):
        yield "analyses", f"{count} wait for bundles that [run] bundles does not name: name them, or `synoptic cancel` the studies.", False


def _running(config_file: Path | None) -> Iterator[tuple[str, psutil.Process]]:
    """The roles of this configuration that are running on this host now."""
    for process in psutil.process_iter(["cmdline", "memory_info", "create_time"]):
        line = process.info["cmdline"] or []
        if "worker" in line and "role" in line and _configured(process, line) == (config_file and config_file.resolve()):
            yield line[line.index("role") + 1], process


def _configured(process: psutil.Process, line: Sequence[str]) -> Path | None:
    """The file that a role was started with, as it saw it."""
    said = next((Path(value) for key, value in pairwise(line) if key == "--config"), None)
    if said is None:
        return None
    with contextlib.suppress(psutil.Error):  # another user's, or gone
        said = process.cwd() / said
    return said.resolve()


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
