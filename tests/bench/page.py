"""100,000 studies in the worklist: seconds a page, by the real application over a real socket; a JSON line for each kind of page.

    python -m tests.bench.page [--studies 100000] [--pages 100] [--postgres URL] [--keep FOLDER]

A page is the whole answer: log-in looked up, rows, the ledger's word on each, HTML. Fails where p95 is 0.3 s and more.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import httpx2

from tests import ward
from worker.config import Config, Site, Web
from worker.store.database import Store
from worker.web import serve

AIM_S = 0.3


def main() -> int:
    """Fill a database, serve it, ask."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--studies", type=int, default=100_000)
    parser.add_argument("--pages", type=int, default=100)
    parser.add_argument("--postgres", default="", help="URL of an empty database; else SQLite.")
    parser.add_argument("--keep", type=Path, help="A folder for the database, used again where it is there.")
    given = parser.parse_args()
    folder = given.keep or Path(tempfile.mkdtemp(prefix="synoptic-page-"))
    folder.mkdir(parents=True, exist_ok=True)
    store = Store(given.postgres or f"sqlite:///{folder / 'synoptic.db'}")
    if not store.is_ready():
        store.migrate()
        ward.people(store)
        ward.crowd(store, given.studies)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        config = Config(site=Site(data=folder), web=Web(port=port))
        stop = threading.Event()
        server = threading.Thread(target=serve, args=(config, store, listener, stop))
        server.start()
        try:
            return _measure(f"http://127.0.0.1:{port}", given.studies, given.pages, "PostgreSQL" if given.postgres else "SQLite")
        finally:
            stop.set()
            server.join()


def _measure(base: str, studies: int, pages: int, database: str) -> int:
    client = httpx2.Client(base_url=base, headers={"sec-fetch-site": "same-origin"}, timeout=60)
    assert client.post("/login", data={"name": "a.viewer", "password": ward.PASSWORD}).status_code == 303
    chance = random.Random(7)
    again = re.search(r'hx-get="(/rows[^"]*)"', client.get("/").text)
    assert again
    deep = iter(_deep(client, pages))
    kinds: dict[str, Callable[[], str]] = {
        "newest": lambda: "/",
        "looked at again": lambda: again[1],
        "somewhere deep": lambda: next(deep),
        **{f"only {state}": partial("/?state={}".format, state) for state in ("failed", "delivered", "waiting", "held", "excluded")},
        "urgent": lambda: "/?urgent=true",
        "one patient": lambda: f"/?patient={chance.randint(1, studies)}",
        "one order": lambda: f"/?order={chance.randint(1, studies)}",
        "dead letters": lambda: "/dead-letters",
        "metrics": lambda: "/metrics",
        "throughput of a week": lambda: "/throughput?days=7",
    }
    slow = 0
    for kind, path in kinds.items():
        taken = []
        for _ in range(pages if kind != "metrics" else 4):
            began = time.perf_counter()
            answer = client.get(path())
            taken.append(time.perf_counter() - began)
            assert answer.status_code == 200, (kind, answer.status_code)
            if kind == "metrics":
                time.sleep(5.1)
        p50, p95 = statistics.median(taken), sorted(taken)[int(0.95 * len(taken))]
        slow += p95 >= AIM_S
        told = {"bench": "page", "database": database, "studies": studies, "page": kind, "n": len(taken)}
        print(
            json.dumps(told | {"p50_ms": round(1000 * p50, 1), "p95_ms": round(1000 * p95, 1), "longest_ms": round(1000 * max(taken), 1)})
        )
    return 1 if slow else 0


def _deep(client: httpx2.Client, pages: int) -> list[str]:
    """The addresses of the pages behind the newest, each from the link of the one before."""
    found = ["/"]
    while len(found) < pages:
        text = client.get(found[-1]).text
        link = re.search(r'href="([^"]*)" rel="next"', text)
        found.append(link[1].replace("&amp;", "&") if link else "/")
    return found


if __name__ == "__main__":
    sys.exit(main())
