"""Random `kill -9` under load: of each process of the whole line, then of the receiver alone beside Orthanc's.

usage: python -m tests.crash.campaign [--kills 200] [--within-s S] [--receive-s 240] [--seed 1] [--folder DIR]

``make crash KILLS=200`` runs it, for three quarters of an hour on two cores. It prints figures as JSON lines and tables, and exits 1
where a promise was broken: anything acknowledged is missing, a report is missing or there twice, or a study is in no account of the ledger.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.crash.line import complaints, killing, shuffled
from tests.crash.receivers import ours, receive, theirs
from tests.peers import SHARED


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign; the exit code is 1 where a promise of ours was broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="of the whole line")
    parser.add_argument("--within-s", type=float, default=math.inf, help="no more kills of the whole line after so long")
    parser.add_argument("--receive-s", type=float, default=240, help="so long each receiver alone is killed again and again")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where to work; else a temporary folder that goes afterwards")
    given = parser.parse_args(arguments)
    broken: list[str] = []
    with contextlib.ExitStack() as stack:
        folder = given.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="crash-")))
        if given.kills:
            with killing(folder / "line", SHARED, shuffled(given.kills, given.seed), seed=given.seed, within_s=given.within_s) as campaign:
                for name, value in campaign.figures.items():
                    print(f"{name:<30}{value}")
                broken += complaints(campaign.figures)
        if given.receive_s:
            with ours(folder / "ours") as target:
                own = receive(target, for_s=given.receive_s, seed=given.seed)
            with theirs(folder / "theirs") as target:
                other = receive(target, for_s=given.receive_s, seed=given.seed)
            for name in own:
                print(f"{name:<30}{own[name]!s:<34}{other[name]}")
            broken += ["acknowledged images are absent of the receiver alone"] if own["acknowledged_but_absent"] else []
    for words in broken:
        print(f"BROKEN: {words}", flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
