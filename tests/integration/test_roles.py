"""What each role weighs and how long it takes to be ready; the receiver and the sender never load torch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.installation import Installation, wait_until
from worker.roles import _OF_MONAI_ALONE

#: The aim of a receiver process, in MB.
RECEIVER_MB = 150

_RUN = """
import atexit, os, sys
atexit.register(lambda: print('{"imported": "%s"}' % " ".join(sorted({name.partition(".")[0] for name in sys.modules}))))
os._exit = sys.exit  # as inference ends, in a hurry
from worker.cli import main
sys.argv = ["synoptic", "role", sys.argv[1], "--parent", str(os.getppid()), "--check", "--config", sys.argv[2], "--descriptor", sys.argv[3]]
main()
"""


def started(tmp_path: Path, role: str) -> tuple[dict[str, Any], set[str]]:
    """What a role says when it is ready, and the packages that it has imported by its end."""
    installation = Installation(tmp_path, bundles=("cxr-severity",))
    installation.write_config()
    assert installation.cli("migrate").returncode == 0
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.set_inheritable(True)
        command = [sys.executable, "-c", _RUN, role, str(installation.config), str(listener.fileno())]
        done = subprocess.run(command, capture_output=True, text=True, pass_fds=(listener.fileno(),), timeout=60, check=True)
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    (event,) = [one for one in said if one.get("event") == "role.started"]
    (imported,) = [set(one["imported"].split()) for one in said if "imported" in one]
    assert "worker" in imported
    print(json.dumps({"bench": "role", "role": role, "rss_mb": event["rss_mb"], "seconds": event["seconds"]}))
    return event, imported


@pytest.mark.parametrize("role", ["receive", "deliver"])
def test_a_role_without_a_network_is_small_and_starts_without_torch(tmp_path: Path, role: str) -> None:
    event, imported = started(tmp_path, role)
    assert "torch" not in imported
    assert event["rss_mb"] <= RECEIVER_MB


def test_inference_starts_without_what_only_training_needs(tmp_path: Path) -> None:
    _, imported = started(tmp_path, "run")
    assert {"torch", "monai"} <= imported
    assert imported.isdisjoint(_OF_MONAI_ALONE)


def test_doctor_prints_each_roles_memory_and_seconds_and_fails_where_something_is_missing(tmp_path: Path) -> None:
    installation = Installation(tmp_path, bundles=("cxr-severity",))
    installation.write_config()
    assert installation.cli("migrate").returncode == 0
    done = installation.cli("doctor")
    said = " ".join(done.stdout.split())
    assert "role receive" in said
    assert "role run" in said
    assert "MB idle" in said
    assert "weights sha256" in said
    # No destination is configured: a person must look.
    assert done.returncode == 1
    assert "none is configured" in said


def test_a_broken_bundle_stops_the_daemon_in_one_sentence(tmp_path: Path) -> None:
    """Not a child that dies again and again: the administrator reads why at once."""
    import shutil

    from tests.installation import BUNDLES

    copy = tmp_path / "bundles" / "cxr-severity"
    shutil.copytree(BUNDLES / "cxr-severity", copy)
    weights = bytearray((copy / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "weights.safetensors").write_bytes(weights)
    installation = Installation(tmp_path / "worker")
    installation.write_config()
    text = installation.config.read_text().replace(str(BUNDLES / "phantom"), str(copy))
    installation.config.write_text(text)
    done = installation.cli("all")
    assert done.returncode == 1
    assert "sha256" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_command_needs_a_terminal(tmp_path: Path) -> None:
    environ = {**os.environ, "TERM": "dumb", "COLUMNS": "80"}
    done = subprocess.run([sys.executable, "-m", "worker", "--help"], capture_output=True, text=True, env=environ, check=True)
    for verb in (
        "all",
        "receive",
        "run",
        "deliver",
        "status",
        "studies",
        "show",
        "retry",
        "cancel",
        "import",
        "doctor",
        "migrate",
        "train",
        "demo",
    ):
        assert f" {verb} " in done.stdout


_HANGS = """
import sys, time
from worker import tables_feed
from worker.intake import assembly
def read_view(*_given, **_named):
    sys.stdout.write("hanging\\n")
    sys.stdout.flush()
    time.sleep(300)
def sweep(*given, **named):
    sys.stdout.write("swept\\n")
    sys.stdout.flush()
    return real(*given, **named)
tables_feed.read_view, assembly.sweep, real = read_view, sweep, assembly.sweep
from worker.cli import main
main()
"""


def test_a_warehouse_that_hangs_holds_up_no_study_and_no_end(tmp_path: Path) -> None:
    """A dozen of its views at once: as many threads as the scheduler has if nobody says otherwise, and Python joins them at its end."""
    views = "".join(
        f'[[tables]]\nname = "view{n}"\ndatabase = "sqlite:///none"\nquery = "SELECT 1"\nmapping = "none.toml"\nevery_s = 0.1\n'
        for n in range(12)
    )
    installation = Installation(tmp_path, bundles=(), processes=1, extra=views)
    installation.write_config()
    with installation.log.open("wb") as log:
        command = [sys.executable, "-c", _HANGS, "receive", "--config", str(installation.config)]
        process = subprocess.Popen(command, stdout=log, stderr=log)

    def is_going_on() -> bool:
        said = installation.log.read_text("utf-8")
        return said.count("hanging\n") == 12 and said.rpartition("hanging\n")[2].count("swept\n") > 3

    try:
        wait_until(is_going_on, timeout_s=90, what="studies are looked at beside twelve views that hang")
    finally:
        process.terminate()
    assert process.wait(60) == 0
