"""Receive rate of the real `synoptic receive`, SQLite and fsync on, beside Orthanc, DCMTK and the bare disk.

usage: python -m tests.bench.receive [--processes 1 2] [--instances 160] [--rounds 3] [--associations 1 4]

One receiver installation for each number of processes is given to ../shared/tools/receive_bench.py as a
target; it sends fresh studies by storescu to all of them in turn and prints instances/s and the ratio to Orthanc.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.installation import Installation, wait_until
from tests.peers import require_shared


@contextmanager
def receiving(made: Installation) -> Iterator[Installation]:
    """Run `synoptic receive` of an installation whose configuration is written."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SYNOPTIC_")}
    with made.log.open("ab") as log:
        command = [sys.executable, "-m", "worker", "receive", "--config", str(made.config)]
        made.process = subprocess.Popen(command, stdout=log, stderr=log, env=environ, start_new_session=True)
    try:
        wait_until(
            lambda: sum(one["role"] == "receive" for one in made.events("role.started")) == made.processes, timeout_s=60, what="receivers"
        )
        yield made
    finally:
        made.stop()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the bench; the exit code is receive_bench.py's."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--instances", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--associations", type=int, nargs="+", default=[1, 4])
    given = parser.parse_args(arguments)
    bench = require_shared("tools/receive_bench.py")
    with tempfile.TemporaryDirectory(prefix="bench") as root, ExitStack() as stack:
        command = [sys.executable, str(bench), "--instances", str(given.instances), "--rounds", str(given.rounds)]
        command += ["--associations", *map(str, given.associations)]
        for processes in given.processes:
            made = Installation(Path(root, str(processes)), senders=("BENCH",), processes=processes, quiet_s=3600.0, ask_sender=False)
            made.write_config()
            stack.enter_context(receiving(made))
            rss = [f"{one['rss_mb']} MB, {one['seconds']} s to ready" for one in made.events("role.started") if one["role"] == "receive"]
            print(f"ours{processes}: {'; '.join(rss)}", flush=True)
            command += ["--target", f"ours{processes}=WORKER@127.0.0.1:{made.port}"]
        return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
