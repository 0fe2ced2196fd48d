"""An honest modality's rate while hundreds of peers stall, beside its rate without them; the HL7 listener likewise.

``python -m tests.bench.abuse [--rounds 5] [--instances 100] [--stalled 200]`` prints one JSON line a round and one of medians.

One real `synoptic receive` with the limits of the defaults, plain and then with TLS; rounds with and without the abusers alternate.
The abusers are one process: `stalled` peers at two other addresses that send half a PDU, as many that send half an HL7 message, and wait;
50 that connect and say nothing, so that with TLS they never shake hands; one that claims a PDU of 4 GB again and again; one that sends
10 bytes a second. Who is cut or turned away comes again after a second. The modality opens one association a round, and comes again
after half a second while it is turned away.
"""

from __future__ import annotations

import argparse
import json
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil
from pydicom import Dataset
from pydicom.uid import generate_uid
from pynetdicom.pdu import A_ASSOCIATE_AC

from tests.bench.receive import receiving
from tests.installation import Installation, wait_until
from tests.pki import Authority
from tests.scu import P_DATA, Scu, encoded, pdu, pdv, slice_of
from worker.errors import PeerUnavailable
from worker.intake import mllp

MUTE: Final = 50
#: Loopback is a whole network: each address is another peer.
ELSEWHERE: Final = ("127.0.0.2", "127.0.0.3")
AGAIN_S, HONEST_AGAIN_S = 1.0, 0.5
MESSAGES: Final = 50


@dataclass(frozen=True, slots=True)
class Target:
    """The installation's two ports, and whom its certificate is from, if it has one."""

    port: int
    mllp_port: int
    ca: str = ""

    def scu(self, source: str = "") -> Scu:
        """Connect, and shake hands."""
        scu = Scu(("127.0.0.1", self.port), timeout_s=120, source=source)
        if self.ca:
            context = ssl.create_default_context(cafile=self.ca)
            context.check_hostname = False
            scu.sock = context.wrap_socket(scu.sock)
        return scu


# --- the abusers, a process of their own


def stall(target: Target, source: str) -> None:
    """Associate, send half of an instance's PDU, and wait until cut."""
    ds = slice_of(rows=256)
    with target.scu(source) as scu:
        if isinstance(scu.associate(called="WORKER", calling="BENCH"), A_ASSOCIATE_AC):
            scu.begin_store(ds)
            scu.sock.sendall(pdu(P_DATA, pdv(1, 2, encoded(ds)))[:60_000])
            scu.read_pdu()


def stall_hl7(target: Target, source: str) -> None:
    """Send half a message, and wait until cut."""
    with socket.create_connection(("127.0.0.1", target.mllp_port), timeout=120, source_address=(source, 0)) as sock:
        sock.sendall(b"\x0bMSH|^~\\&|HIS|A|SYNOPTIC|B|20260101||ADT^A08^ADT_A01|1|P|2.5.1\r")
        sock.recv(1)


def mute(target: Target, source: str) -> None:
    """Connect, say nothing."""
    with socket.create_connection(("127.0.0.1", target.port), timeout=120, source_address=(source, 0)) as sock:
        sock.recv(1)


def claim(target: Target, source: str) -> None:
    """Claim that 4 GB follow."""
    with target.scu(source) as scu:
        if isinstance(scu.associate(called="WORKER", calling="BENCH"), A_ASSOCIATE_AC):
            scu.sock.sendall(struct.pack(">BxL", P_DATA, 0xFFFFFFF0) + bytes(10_000))
            scu.read_pdu()


def trickle(target: Target, source: str) -> None:
    """Send an instance at 10 bytes a second."""
    ds = slice_of(rows=256)
    with target.scu(source) as scu:
        if isinstance(scu.associate(called="WORKER", calling="BENCH"), A_ASSOCIATE_AC):
            scu.begin_store(ds)
            scu.sock.sendall(pdu(P_DATA, pdv(1, 2, encoded(ds)))[:20])
            scu.is_closed_after_trickle(every_s=0.1, limit_s=3600)


def abuse(target: Target, stalled: int) -> None:
    """Start all; print a line once as many as ever will be have stalled; never return."""
    acts: list[tuple[Callable[[Target, str], None], str]] = [(claim, ELSEWHERE[0]), (trickle, ELSEWHERE[1])]
    for number in range(max(stalled, MUTE)):
        source = ELSEWHERE[number % 2]
        acts += [(stall, source), (stall_hl7, source)] if number < stalled else []
        acts += [(mute, source)] if number < MUTE else []
    tried = threading.Semaphore(0)

    def again(act: Callable[[Target, str], None], source: str) -> None:
        while True:
            with suppress(OSError, struct.error):  # cut or turned away, which is what we are here for
                act(target, source)
            tried.release()
            time.sleep(AGAIN_S)

    for act, source in acts:
        threading.Thread(target=again, args=(act, source), daemon=True).start()
    for _ in range(max(1, stalled - 60)):
        tried.acquire(timeout=30)
    print("stalled", flush=True)
    threading.Event().wait()


@contextmanager
def abusers(target: Target, stalled: int) -> Iterator[None]:
    """Run the abusers while the block runs."""
    command = [
        sys.executable,
        "-m",
        "tests.bench.abuse",
        "--abuse",
        str(target.port),
        str(target.mllp_port),
        target.ca,
        "--stalled",
        str(stalled),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"stalled\n"
            yield
        finally:
            process.kill()


# --- the honest


def store(scu: Scu, ds: Dataset, data: bytes) -> int:
    """Store in PDUs of 128 KiB; return the status."""
    scu.begin_store(ds)
    step = 131072 - 6
    for start in range(0, len(data), step):
        scu.send_data(data[start : start + step], is_last=start + step >= len(data))
    return scu.status()


@dataclass
class Honest:
    """What a modality and a hospital system got through, round by round."""

    rates: list[float] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)
    hl7_rates: list[float] = field(default_factory=list)
    hl7_waits_s: list[float] = field(default_factory=list)

    def round(self, target: Target, instances: int) -> dict[str, float]:
        """Store on one association, then send HL7 on one connection; both come again until they are let in."""
        study, slices = generate_uid(), []
        for _ in range(instances):
            ds = slice_of(study, rows=512)
            slices.append((ds, encoded(ds)))
        waits_s, rate = self._store(target, slices)
        self.waits_s.append(waits_s)
        self.rates.append(rate)
        waits_s, rate = self._talk(target)
        self.hl7_waits_s.append(waits_s)
        self.hl7_rates.append(rate)
        return {name: round(getattr(self, name)[-1], 2) for name in ("waits_s", "rates", "hl7_waits_s", "hl7_rates")}

    def _store(self, target: Target, slices: Sequence[tuple[Dataset, bytes]]) -> tuple[float, float]:
        began = time.monotonic()
        while True:
            with suppress(OSError, struct.error), target.scu() as scu:
                if isinstance(scu.associate(called="WORKER", calling="BENCH"), A_ASSOCIATE_AC):
                    let_in = time.monotonic()
                    assert {store(scu, ds, data) for ds, data in slices} == {0}
                    done = time.monotonic()
                    scu.release()
                    return let_in - began, len(slices) / (done - let_in)
            time.sleep(HONEST_AGAIN_S)

    def _talk(self, target: Target) -> tuple[float, float]:
        began, stamp = time.monotonic(), time.time_ns()
        head = "MSH|^~\\&|HIS|A|SYNOPTIC|B|20260101||ADT^A08^ADT_A01|{0}|P|2.5.1\rEVN||20260101\rPID|||{0}^^^SITE^MR||Made^Up\r"
        messages = [head.format(f"{stamp}-{number}").encode() for number in range(MESSAGES)]
        while True:
            try:
                let_in = time.monotonic()
                codes = mllp.send(("127.0.0.1", target.mllp_port), messages)
            except PeerUnavailable:
                time.sleep(HONEST_AGAIN_S)
                continue
            assert set(codes) == {"AA"}, codes
            return let_in - began, len(codes) / (time.monotonic() - let_in)


def configured(folder: Path, *, is_tls: bool) -> tuple[Installation, str]:
    """Write the configuration of a hospital with several addresses; returns also the authority's file where there is one."""
    made = Installation(folder, senders=(), processes=1, quiet_s=3600.0, ask_sender=False)
    made.extra = '[[senders]]\nae_title = "BENCH"\naddresses = ["127.0.0.0/8"]\n'
    made.write_config()
    text, ca = made.config.read_text("utf-8").replace("[records]\n", '[records]\naddresses = ["127.0.0.0/8"]\n'), ""
    if is_tls:
        authority = Authority(folder / "pki")
        pair, ca = authority.issue("receiver"), str(authority.certificate)
        text = text.replace("[receive]\n", f'[receive]\ntls_certificate = "{pair.certificate}"\ntls_key = "{pair.key}"\n')
    made.config.write_text(text, "utf-8")
    return made, ca


def run(folder: Path, *, is_tls: bool, rounds: int, instances: int, stalled: int) -> dict[str, object]:
    """Alternate rounds without and with the abusers; return medians, ratios and the receiver's growth."""
    made, ca = configured(folder, is_tls=is_tls)
    alone, beset = Honest(), Honest()
    with receiving(made):
        target = Target(made.port, made.mllp_port, ca)
        (receiver,) = [psutil.Process(one["pid"]) for one in made.events("role.started") if one["role"] == "receive"]
        Honest().round(target, instances)  # warm
        before = receiver.memory_info().rss
        for _ in range(rounds):
            quiet = alone.round(target, instances)
            with abusers(target, stalled):
                print(json.dumps({"tls": is_tls, "alone": quiet, "beset": beset.round(target, instances)}), flush=True)
            # Their connections end with their process: what is measured next is a receiver alone.
            wait_until(lambda: receiver.num_threads() < 10, timeout_s=60, what="all abusers gone")
        grown_mb = round((receiver.memory_info().rss - before) / 2**20, 1)
    summary: dict[str, object] = {"bench": "abuse", "tls": is_tls, "rounds": rounds, "instances": instances, "stalled": stalled}
    for name in ("rates", "hl7_rates"):
        ours, theirs = statistics.median(getattr(alone, name)), statistics.median(getattr(beset, name))
        summary[name] = {"alone": round(ours, 1), "beset": round(theirs, 1), "ratio": round(theirs / ours, 2)}
    for name in ("waits_s", "hl7_waits_s"):
        summary[name] = {"median": round(statistics.median(getattr(beset, name)), 2), "longest": round(max(getattr(beset, name)), 2)}
    return summary | {"receiver_grown_mb": grown_mb}


def main() -> None:
    """Run plain, then with TLS."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--instances", type=int, default=100)
    parser.add_argument("--stalled", type=int, default=200)
    parser.add_argument("--abuse", nargs=3, metavar=("PORT", "HL7_PORT", "CA"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.abuse:
        port, mllp_port, ca = asked.abuse
        abuse(Target(int(port), int(mllp_port), ca), asked.stalled)
    for is_tls in (False, True):
        with tempfile.TemporaryDirectory(prefix="synoptic-abuse-") as folder:
            found = run(Path(folder), is_tls=is_tls, rounds=asked.rounds, instances=asked.instances, stalled=asked.stalled)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
