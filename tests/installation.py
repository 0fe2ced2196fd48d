"""A whole installation on loopback: the real `synoptic all` as a process group, its log, its database."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.peers import Orthanc, free_port
from worker.store import measures, studies
from worker.store.database import Store

BUNDLES = Path(os.environ.get("SYN_BUNDLES") or Path(__file__).parents[1] / "models" / "bundles")


def wait_until(predicate: Callable[[], bool], *, timeout_s: float, what: str, step_s: float = 0.1) -> None:
    """Other processes raise no events here: ask until true, bounded."""
    deadline = time.monotonic() + timeout_s
    while not predicate():
        if time.monotonic() > deadline:
            raise AssertionError(f"Not within {timeout_s} s: {what}.")
        time.sleep(step_s)


@dataclass(slots=True)
class Installation:
    """`synoptic all` for one or more bundles, delivering to an Orthanc, taking from AE titles in `senders`."""

    folder: Path
    orthanc: Orthanc | None = None
    bundles: Sequence[str] = ("phantom",)
    database: str = ""
    quiet_s: float = 2.0
    ask_sender: bool = True
    senders: Sequence[str] = ("TESTPACS", "MODALITY")
    timezone: str = "+01:00"
    processes: int = 2
    run_processes: int = 1
    extra: str = ""
    port: int = field(default_factory=free_port)
    mllp_port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def config(self) -> Path:
        """The configuration file."""
        return self.folder / "synoptic.toml"

    @property
    def log(self) -> Path:
        """What all processes wrote."""
        return self.folder / "daemon.log"

    @property
    def store(self) -> Store:
        """The daemon's database; close it after use."""
        return Store(self.database or f"sqlite:///{self.folder / 'data' / 'synoptic.db'}")

    def write_config(self) -> None:
        """Write synoptic.toml."""
        query = self.orthanc.dicom_port if self.orthanc and self.ask_sender else 0
        senders = "".join(
            f'[[senders]]\nae_title = "{ae}"\nquery_host = "127.0.0.1"\nquery_port = {query if ae == "TESTPACS" else 0}\n'
            for ae in self.senders
        )
        destination = (
            f'[[destinations]]\nname = "pacs"\nae_title = "{self.orthanc.ae_title}"\nhost = "127.0.0.1"\nport = {self.orthanc.dicom_port}\n'
            if self.orthanc
            else ""
        )
        bundles = ", ".join(f'"{BUNDLES / name}"' for name in self.bundles)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config.write_text(
            f'[site]\ndata = "data"\ntimezone = "{self.timezone}"\ndatabase = "{self.database}"\n'
            f'[receive]\nport = {self.port}\nae_title = "WORKER"\nprocesses = {self.processes}\nlow_water_mb = 16\n'
            f"[assembly]\nquiet_s = {self.quiet_s}\nask_sender_after_s = 0.1\nquiet_by_modality = {{}}\nincomplete_limit_s = 10\n"
            f"[records]\nport = {self.mllp_port}\n[run]\nbundles = [{bundles}]\nprocesses = {self.run_processes}\nlease_s = 10\n"
            f"[deliver]\nlease_s = 10\n{senders}{destination}{self.extra}",
            "utf-8",
        )

    def launch(self) -> None:
        """Start the daemon in a process group of its own."""
        if not self.config.exists():
            self.write_config()
        environ = {name: value for name, value in os.environ.items() if not name.startswith("SYNOPTIC_")}
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", "worker", "all", "--config", str(self.config)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environ, start_new_session=True)

    @property
    def roles(self) -> int:
        """How many processes say that they are ready."""
        return 2 + self.processes + (self.run_processes if self.bundles else 0)

    def start(self) -> None:
        """Launch the daemon; returns when all roles are ready."""
        ready = len(self.events("role.started"))
        self.launch()
        wait_until(lambda: len(self.events("role.started")) >= ready + self.roles or self._died(), timeout_s=90, what="roles ready")
        if self._died():
            raise AssertionError(f"The daemon ended: {self.log.read_text('utf-8')[-2000:]}")

    def _died(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def stop(self) -> int:
        """SIGTERM, as systemd does; returns the exit code."""
        if self.process is None:
            return 0
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        self.process = None
        return code

    def kill(self) -> None:
        """`kill -9` of every process at once."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None

    def events(self, name: str = "") -> list[dict[str, Any]]:
        """The log's lines, of one event or all."""
        if not self.log.exists():
            return []
        lines = (line for line in self.log.read_text("utf-8", "replace").splitlines() if line.startswith("{") and f'"{name}' in line)
        found = [json.loads(line) for line in lines if line.endswith("}")]
        return [one for one in found if not name or one.get("event") == name]

    def wait_for_event(self, name: str, *, timeout_s: float, count: int = 1) -> list[dict[str, Any]]:
        """Until the log holds so many lines of this event."""
        wait_until(lambda: len(self.events(name)) >= count, timeout_s=timeout_s, what=f"{count} {name} in the log")
        return self.events(name)

    def wait_idle(self, *, timeout_s: float = 120) -> None:
        """Until no study is being received and no job is unfinished."""
        store = self.store

        def is_idle() -> bool:
            with store.read() as conn:
                unfinished = [state for _, state in measures.counts(conn) if state in ("available", "leased")]
                return not studies.receiving(conn) and not unfinished

        wait_until(is_idle, timeout_s=timeout_s, what="no study on its way", step_s=0.3)
        store.close()

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a verb of `synoptic` against this installation."""
        command = [sys.executable, "-m", "worker", *arguments, "--config", str(self.config)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    def __enter__(self) -> Installation:
        """Start; a daemon that does not become ready is ended."""
        try:
            self.start()
        except BaseException:
            if self.process is not None and self.process.poll() is None:
                self.kill()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        """Stop, or make an end of it."""
        if self.process is not None and self.process.poll() is None:
            try:
                self.stop()
            except subprocess.TimeoutExpired:
                self.kill()
