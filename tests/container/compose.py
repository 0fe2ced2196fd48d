"""deploy/Containerfile and compose.yaml as a trial runs them: rootless, read-only, with an Orthanc and a PostgreSQL: `make container`."""

from __future__ import annotations

import json
import re
import socket
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest

from tests.container.engine import Engine, pip_of_host, rootless, work_tree
from tests.container.round_trip import round_trip

PYTHON = "docker.io/library/python:3.11-slim-bookworm"
#: Not compose.yaml's own name, whose volumes may be somebody's trial.
PROJECT = "synoptic-test"
WORKER = f"{PROJECT}_worker_1"
PORTS = (11112, 2575, 8080, 8042, 4242)
#: Where whoever is in the container may write: the spool, and folders that are gone with it.
WRITABLE = {"/var/lib/synoptic", "/tmp", "/var/tmp", "/dev/shm", "/dev/mqueue"}
ROLES = {"receive", "run", "deliver", "serve", "supervisor"}


@dataclass(frozen=True, slots=True)
class Trial:
    """The three containers, running."""

    engine: Engine
    files: tuple[str, ...]

    def compose(self, *words: str) -> str:
        """Run compose on the file; its own words are many, and left out."""
        return self.engine.run("podman-compose", "--project-name", PROJECT, *self.files, *words, POSTGRES_PASSWORD="trial")

    def inside(self, *words: str, stdin: str = "", check: bool = True) -> str:
        """Run a command in the worker's container; what it printed."""
        return self.engine.run("podman", "exec", "--interactive", WORKER, *words, stdin=stdin, check=check)

    def events(self) -> list[dict[str, object]]:
        """Every line of the worker's log so far."""
        said = self.engine.run("podman", "logs", WORKER)
        return [json.loads(line) for line in said.splitlines() if line.startswith("{")]

    def started(self) -> list[str]:
        """The roles, each as often as it became ready."""
        return [str(event["role"]) for event in self.events() if event["event"] == "role.started"]

    def wait_until(self, holds: Callable[[], bool], *, timeout_s: float, what: str) -> None:
        """See Engine.wait_until."""
        self.engine.wait_until(holds, timeout_s=timeout_s, what=what, log=("podman", "logs", "--tail", "40", WORKER))

    def running(self) -> int:
        """How many containers of the project run."""
        return len(self.engine.run("podman", "ps", "--quiet", f"--filter=label=io.podman.compose.project={PROJECT}").split())

    def is_ready(self) -> bool:
        """What /ready answers at the published port."""
        try:
            with urllib.request.urlopen("http://127.0.0.1:8080/ready", timeout=5) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def processes(self) -> dict[int, str]:
        """Process id within the worker's container → /proc/<pid>/status; of all but the one that asks."""
        told = self.inside("sh", "-c", "for p in /proc/[0-9]*; do [ $p = /proc/$$ ] || cat $p/status 2>/dev/null; done; true")
        found = re.findall(r"^Name:.*?(?=^Name:|\Z)", told, re.DOTALL | re.MULTILINE)
        return {int(value(status, "Pid")): status for status in found if value(status, "Name") != "cat"}


def value(status: str, key: str) -> str:
    """One line of /proc/<pid>/status."""
    found = re.search(rf"^{key}:\s*(.*)$", status, re.MULTILINE)
    assert found, key
    return found[1]


def refuse_taken_ports() -> None:
    """What listens there already, perhaps somebody's PACS, must not be sent phantoms."""
    for port in PORTS:
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            pytest.exit(f"Port {port} of this host, which deploy/compose.yaml publishes, is taken: stop what listens there first.", 1)


@pytest.fixture(scope="module")
def trial() -> Iterator[Trial]:
    """Build both images, start, wait until the worker says that it is ready."""
    refuse_taken_ports()
    with tempfile.TemporaryDirectory(prefix="synoptic-container-") as name:
        folder = Path(name)
        work_tree(folder)
        settings = pip_of_host(folder)
        engine = rootless(folder)
        python = engine.image(PYTHON, packages=("python3", "python3-pip", "ca-certificates"))
        build = ("podman", "build", "--quiet", "--network=host", f"--from={python}")
        engine.run(*build, *settings, "--file=deploy/Containerfile", "--tag=localhost/synoptic-test", ".", timeout_s=1500)
        files = ["--file=deploy/compose.yaml", "--file=tests/container/image.yaml"]
        if python != PYTHON:  # then the other two are not to be had, either
            engine.run(*build, "--file=tests/container/peers.Containerfile", "--tag=localhost/synoptic-test-peers", "tests/container")
            files += ["--file=tests/container/peers.yaml"]
        running = Trial(engine, tuple(files))
        running.compose("down", "--volumes")
        try:
            running.compose("up", "--detach", "--no-build")  # what it starts may fail without its telling
            running.wait_until(lambda: running.running() == 3, timeout_s=30, what="a third container")
            running.wait_until(running.is_ready, timeout_s=120, what="/ready")
            yield running
        finally:
            running.compose("down", "--volumes")


def test_phantom_patients_go_through_the_containers_and_their_reports_come_back(trial: Trial) -> None:
    assert round_trip(4_000_000, 4) == []
    told = json.loads(trial.inside("synoptic", "status", "--ledger", "--json"))["all"]
    assert (told["received"], told["delivered"]) == (4, 4)


def test_the_engine_has_no_root_and_no_process_may_become_it(trial: Trial) -> None:
    assert trial.engine.run("podman", "info", "--format", "{{.Host.Security.Rootless}}") == "true"
    statuses = trial.processes()
    assert len(statuses) >= len(ROLES)
    own = trial.inside("id", "-u")
    assert own != "0"
    for status in statuses.values():
        assert value(status, "Uid").split() == [own] * 4
        assert {value(status, f"Cap{name}") for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
        assert value(status, "NoNewPrivs") == "1"
        assert value(status, "Seccomp") == "2"


def test_nothing_can_be_written_but_the_spool_and_what_goes_with_the_container(trial: Trial) -> None:
    within = "find / -path /proc -prune -o -path /dev -prune -o ! -type l -writable -print 2>/dev/null; find /dev -type d -writable; true"
    found = trial.inside("sh", "-c", within).splitlines()
    outside = {folder for folder in found if not any(folder == one or folder.startswith(f"{one}/") for one in WRITABLE)}
    assert outside == set()
    assert "/var/lib/synoptic/spool" in found  # the search finds what there is
    assert "Read-only file system" in trial.inside("sh", "-c", "touch /opt/synoptic/new 2>&1", check=False)


def test_a_killed_role_comes_again_and_leaves_no_dead_process(trial: Trial) -> None:
    before = trial.started().count("run")
    pid = next(pid for pid in trial.processes() if "\0run\0" in trial.inside("cat", f"/proc/{pid}/cmdline"))
    trial.inside("python", "-c", f"import os; os.kill({pid}, 9)")
    trial.wait_until(lambda: trial.started().count("run") > before, timeout_s=60, what="the role's next start")
    assert [status for status in trial.processes().values() if value(status, "State").startswith("Z")] == []
    assert round_trip(4_100_000, 1) == []


def test_doctor_is_content_and_an_account_logs_in(trial: Trial) -> None:
    trial.inside("synoptic", "user", "add", "trial", "--role", "operator", stdin="a-long-password-for-a-trial\n")
    assert "ORTHANC at orthanc:4242" in trial.inside("synoptic", "doctor")  # ends with 1 where a line of it fails
    with httpx2.Client(base_url="http://localhost:8080", headers={"sec-fetch-site": "same-origin"}, timeout=30) as browser:
        assert browser.post("/login", data={"name": "trial", "password": "another"}).status_code == 401
        assert browser.post("/login", data={"name": "trial", "password": "a-long-password-for-a-trial"}).status_code == 303
        assert "delivered" in browser.get("/").text


def test_it_ends_in_order_and_begins_again_where_it_was(trial: Trial) -> None:
    begun = time.monotonic()
    trial.engine.run("podman", "stop", "--time", "60", WORKER)
    assert time.monotonic() - begun < 10  # what engines wait before they kill
    assert trial.engine.run("podman", "inspect", "--format", "{{.State.ExitCode}}", WORKER) == "0"
    assert {str(event["role"]) for event in trial.events() if event["event"] == "role.stopped"} == ROLES
    trial.engine.run("podman", "start", WORKER)
    trial.wait_until(trial.is_ready, timeout_s=60, what="/ready")
    assert round_trip(4_200_000, 1) == []
    trial.inside("synoptic", "status", "--ledger")
