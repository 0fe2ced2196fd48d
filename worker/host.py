"""What we owe the host and ask of it: no memory of a process outside it, no file of ours in everybody's hands.

Not here: the folders of patient data (store/spool.py, store/database.py), which keep their own modes; the sandbox (deploy/systemd/).
"""

from __future__ import annotations

import ctypes
import getpass
import os
import resource
import stat
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from worker.config import Config
from worker.store.database import told_by

_PR_SET_DUMPABLE: Final = 4  # prctl(2)


def confine() -> None:
    """Leave no core, and let no other process of this user read our memory or environment. A child says it anew after its exec.

    The limit alone is not enough: the kernel hands a core to systemd-coredump or apport whatever the limit is (core(5)).
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0)


def changeable(config: Config, config_file: Path | None) -> list[str]:
    """A sentence for each file that says what we do, or its folder, that every user of this host may change: refused at the start."""
    found = {}
    for path in chain(_orders(config, config_file), _keys(config)):
        for one in (path.resolve(), path.resolve().parent):
            mode = _mode(one)
            if mode & stat.S_IWOTH and not (stat.S_ISDIR(mode) and mode & stat.S_ISVTX):  # a sticky folder's files are their owners'
                found[one] = f"{one} can be changed by every user of this host: say chmod o-w, and look whether somebody did."
    return list(found.values())


def exposed(config: Config, config_file: Path | None) -> list[str]:
    """A sentence for whatever makes a break-in worse than it need be: said at the start, not refused."""
    found = [f"{path} holds a key and can be read by every user of this host: say chmod o-r." for path in _keys(config) if _is_read(path)]
    text = config_file.read_text("utf-8") if config_file is not None and _is_read(config_file) else ""
    if any(one in text or one in unquote(text) for one in secrets(config)):
        found.append(f"{config_file} holds a secret and can be read by every user of this host: put it into the environment, or chmod o-r.")
    if os.geteuid() == 0:
        found.append("This runs as root: run it as a user of its own (deploy/README.md).")
    return found


def secrets(config: Config) -> set[str]:
    """What must never be shown: passwords within URLs of databases, secrets for the FHIR server, destinations and the log-in elsewhere."""
    told = [secret for one in config.destinations for secret in one.secrets]
    urls = [config.site.database, *(table.database for table in config.tables)]
    told += [config.fhir.client_secret, config.web.oidc_client_secret, *(told_by(url)[0] for url in urls)]
    return {secret for secret in told if secret}


def _orders(config: Config, config_file: Path | None) -> Iterator[Path]:
    if config_file is not None:
        yield config_file
    for folder in config.run.bundles:
        yield folder
        yield from folder.rglob("*")
    yield from (table.mapping for table in config.tables)


def _keys(config: Config) -> Iterator[Path]:
    doors = [(one.tls_key, one.tls_certificate) for one in (config.receive, config.records, config.audit, config.web)]
    peers = [(one.tls_key, one.tls_certificate) for one in config.destinations]
    peers += [(one.tls_key, one.tls_certificate) for one in config.senders]
    for key, certificate in (*doors, *peers, (config.fhir.key_file, "")):
        if key or certificate:  # without a key of its own, a certificate's file holds it
            yield Path(key or certificate)


def _is_read(path: Path) -> bool:
    return bool(_mode(path) & stat.S_IROTH)


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except OSError:
        return 0  # whoever needs it says that it is missing


def caller() -> str:
    """Who runs this command, also behind sudo; where the host knows no name, as in a container, the number."""
    try:
        return os.environ.get("SUDO_USER") or getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"
