"""The runbook's installation, to the letter, on a bare Debian that systemd runs, an Orthanc beside: `make runbook`, as root."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.container.engine import ROOT, Engine, pip_of_host

DEBIAN = "docker.io/library/debian:bookworm-slim"
NAME = "synoptic-runbook"
SPLIT = ("synoptic-receive", "synoptic-run", "synoptic-deliver", "synoptic-serve")
#: What `$EDITOR` does for an administrator whose PACS is the Orthanc of this host.
EDITOR = r"""#!/bin/sh
exec sed -i -e 's/^ae_title = "PACS"/ae_title = "ORTHANC"/' -e 's/^query_port = 0/query_port = 4242/' \
    -e 's|^bundles = \[\]|bundles = ["/opt/synoptic/models/bundles/phantom"]|' -e 's/^issuer = ""/issuer = "SYNOPTIC-DEMO"/' "$1"
"""
#: The repository is somebody's, and root clones it.
CONTAINERFILE = """FROM scratch
RUN printf '[safe]\\n\\tdirectory = *\\n' >/etc/gitconfig
RUN apt-get update && apt-get install -y --no-install-recommends systemd-sysv dbus orthanc ca-certificates && rm -rf /etc/orthanc/*
COPY deploy/orthanc.json /etc/orthanc/
RUN sed -i 's/"Host": "worker"/"Host": "127.0.0.1"/' /etc/orthanc/orthanc.json \
    && echo '{"StorageDirectory": "/var/lib/orthanc/db-v6", "IndexDirectory": "/var/lib/orthanc/db-v6"}' >/etc/orthanc/debian.json
CMD ["/sbin/init"]
"""


@dataclass(frozen=True, slots=True)
class Host:
    """A Debian of its own."""

    engine: Engine

    def run(self, script: str, *, timeout_s: float = 120, check: bool = True) -> str:
        """Run a script of bash as root in it; what it printed."""
        return self.engine.run(
            "podman", "exec", "--env=EDITOR=/usr/local/bin/editor", NAME, "bash", "-euo", "pipefail", "-c", script,
            timeout_s=timeout_s, check=check,
        )  # fmt: skip

    def wait_until(self, holds: Callable[[], bool], *, timeout_s: float, what: str) -> None:
        """See Engine.wait_until."""
        log = ("podman", "exec", NAME, "sh", "-c", "journalctl --no-pager | tail -60")
        self.engine.wait_until(holds, timeout_s=timeout_s, what=what, log=log)

    def said(self, event: str, unit: str = "synoptic") -> list[str]:
        """The roles that told of an event since the unit's last start."""
        told = f"journalctl --output cat _SYSTEMD_INVOCATION_ID=$(systemctl show -P InvocationID {unit})"
        events = [json.loads(line) for line in self.run(told, check=False).splitlines() if line.startswith("{")]
        return [str(one["role"]) for one in events if one["event"] == event]

    @contextmanager
    def starting(self, unit: str = "synoptic") -> Iterator[None]:
        """What is done within starts the unit; wait afterwards until the role that is ready last is so."""
        show = f"systemctl show -P InvocationID {unit}"
        before = self.run(show)
        yield
        self.wait_until(
            lambda: self.run(show, check=False) not in ("", before) and "run" in self.said("role.started", unit),
            timeout_s=120,
            what="the role `run`",
        )

    def round_trip(self, first_seed: int, count: int) -> str:
        """See tests/container/round_trip.py."""
        return self.run(f"cd /opt/synoptic && .venv/bin/python -m tests.container.round_trip {first_seed} {count}", timeout_s=300)

    def shown(self, name: str) -> str:
        """A property of the unit."""
        return self.run(f"systemctl show --property {name} --value synoptic")


def installation() -> str:
    """The first shell block of the runbook, with the repository of this test."""
    found = re.search(r"## Install \(one host\)\n\n```sh\n(.*?)```", (ROOT / "deploy" / "README.md").read_text("utf-8"), re.DOTALL)
    assert found
    assert found[1].count("<this repository>") == 1
    return found[1].replace("<this repository>", "/src")


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    """Do what the runbook says, line for line; each must succeed."""
    assert os.geteuid() == 0, "A host with systemd in a container is root's to run: sudo make runbook"
    with tempfile.TemporaryDirectory(prefix="synoptic-runbook-") as name:
        folder = Path(name)
        engine = Engine(folder)
        debian = engine.image(DEBIAN, packages=("ca-certificates",))
        (folder / "Containerfile").write_text(CONTAINERFILE.replace("scratch", debian, 1))
        engine.run("podman", "build", "--quiet", "--network=host", f"--file={folder / 'Containerfile'}", f"--tag=localhost/{NAME}", ROOT)
        (folder / "editor").write_text(EDITOR)
        (folder / "editor").chmod(0o755)
        mounts = [f"--volume={ROOT}:/src:ro", f"--volume={folder / 'editor'}:/usr/local/bin/editor:ro", *pip_of_host(folder)]
        engine.run("podman", "rm", "--force", NAME, check=False)
        try:
            engine.run("podman", "run", "--detach", f"--name={NAME}", "--systemd=always", "--privileged", *mounts, f"localhost/{NAME}")
            running = Host(engine)
            running.wait_until(lambda: running.run("systemctl is-active orthanc", check=False) == "active", timeout_s=60, what="Orthanc")
            with running.starting():
                print(running.run(installation(), timeout_s=1800))
            yield running
        finally:
            engine.run("podman", "rm", "--force", "--time=10", NAME, check=False)


def test_after_the_last_line_of_the_runbook_reports_come_back(host: Host) -> None:
    assert host.round_trip(5_000_000, 4) == "all right"


def test_the_unit_runs_in_the_sandbox_that_it_asks_for(host: Host) -> None:
    stated = re.search(r"score (\d\.\d) in `systemd-analyze", (ROOT / "deploy" / "README.md").read_text("utf-8"))
    scored = re.search(r"exposure level for \S+: (\d+\.\d)", host.run("systemd-analyze security synoptic.service --no-pager"))
    assert stated
    assert scored
    assert float(scored[1]) <= float(stated[1])
    pids = host.run("cat $(find /sys/fs/cgroup -path '*/synoptic.service/cgroup.procs' -print -quit)").split()  # of version 1 or 2
    assert len(pids) >= 4
    for pid in pids:
        status = host.run(f"cat /proc/{pid}/status")
        assert re.search(r"^Uid:\s+([1-9]\d*)\s+\1\s+\1\s+\1$", status, re.MULTILINE)
        assert re.findall(r"^Cap\w+:\s+(\w+)$", status, re.MULTILINE) == ["0" * 16] * 5
        assert re.search(r"^NoNewPrivs:\s+1$", status, re.MULTILINE)
        assert re.search(r"^Seccomp:\s+2$", status, re.MULTILINE)
    inside = f"nsenter --target {host.shown('MainPID')} --mount touch"
    assert "Read-only file system" in host.run(f"{inside} /opt/synoptic/README.md 2>&1", check=False)
    assert host.run(f"{inside} /var/lib/synoptic/probe && rm /var/lib/synoptic/probe && echo done") == "done"


def test_a_killed_daemon_is_started_anew(host: Host) -> None:
    with host.starting():
        host.run("kill -9 $(systemctl show -P MainPID synoptic)")
    assert host.shown("NRestarts") == "1"
    assert host.round_trip(5_100_000, 1) == "all right"


def test_it_ends_in_order(host: Host) -> None:
    host.run("systemctl stop synoptic")
    assert (host.shown("Result"), host.shown("ExecMainStatus")) == ("success", "0")
    assert sorted(host.said("role.stopped")) == ["deliver", "receive", "run", "supervisor"]


def test_it_comes_again_with_the_host(host: Host) -> None:
    with host.starting():
        host.engine.run("podman", "restart", "--time=60", NAME)
    assert host.round_trip(5_200_000, 1) == "all right"
    host.run("runuser -u synoptic -- /opt/synoptic/.venv/bin/synoptic status --ledger")


def test_each_role_may_have_a_unit_of_its_own(host: Host) -> None:
    units = " ".join(SPLIT)
    host.run("cp /opt/synoptic/deploy/systemd/*.service /etc/systemd/system/ && systemctl disable --now synoptic")
    with host.starting("synoptic-run"):
        host.run(f"systemctl start {units}")
    assert host.round_trip(5_300_000, 1) == "all right"
    assert host.run(f"systemctl is-active {units}").split() == ["active"] * 4
    host.run(f"systemctl stop {units}")
    assert set(host.run(f"systemctl show -P Result {units}").split()) == {"success"}
