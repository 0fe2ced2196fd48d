"""A receiver ends on its signal, whichever of its threads the kernel gives it to."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.installation import Installation, wait_until

#: A main thread that holds the lock of `stop` when it is told to end, as it does for an instant each time `stop.wait` runs out.
HOLDING = """
import os, signal, threading
from worker.daemon import on_signal
stop = threading.Event()
on_signal(stop)
with stop._cond:
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(1000):
        pass
raise SystemExit(0 if stop.wait(30) else 3)
"""


@pytest.mark.requirement("S1")
def test_a_signal_in_the_midst_of_a_wait_is_no_deadlock() -> None:
    """A receiver stood still in its own handler, served on and held the port for three quarters of an hour: found by `make crash`."""
    assert subprocess.run([sys.executable, "-c", HOLDING], timeout=90, check=False).returncode == 0


@pytest.mark.requirement("S1")
def test_a_receiver_ends_on_a_signal_that_another_thread_takes(tmp_path: Path) -> None:
    """It served on after its supervisor had been killed, held the port, and no daemon could start: found by `make crash`."""
    with Installation(tmp_path, bundles=(), processes=1) as installation:
        assert installation.process is not None
        children = psutil.Process(installation.process.pid).children()
        receiver = next(child for child in children if "receive" in child.cmdline())
        other = next(thread.id for thread in receiver.threads() if thread.id != receiver.pid)
        assert ctypes.CDLL(None).tgkill(receiver.pid, other, signal.SIGTERM) == 0
        wait_until(
            lambda: any(one["role"] == "receive" for one in installation.events("role.stopped")), timeout_s=60, what="the receiver's end"
        )
