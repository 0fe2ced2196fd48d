"""The fuzzing corpus whole, byte for byte, into a running installation: every file a status, every study an end in words."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import psutil
import pytest
import sqlalchemy as sa

from tests.files import Sendable, below, sendable
from tests.installation import BUNDLES, Installation
from tests.peers import require_shared
from tests.scu import IMPLICIT, VERIFICATION, Scu, command_set, pdu, pdv

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

_FRAGMENT: Final = 16000
#: Of the corpus as it is, all under one study.
HELD: Final = "The images of this study name two different patients; nothing was analysed."
_PREFIX: Final = b"1.2.3.4.5.99999."
#: What a receiver that has seen the corpus may have grown by: its database cache and buffers of one PDU a thread.
GROWTH_BYTES: Final = 32 * 2**20


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """One installation for both: no role may end before it is told to."""
    folder = tmp_path_factory.mktemp("hostile")
    with Installation(folder, bundles=(str(of_single_slices(folder)),), quiet_s=0.5, processes=1) as installation:
        yield installation
        assert "Traceback" not in installation.log.read_text("utf-8")
        assert installation.events("role.restarted") == []


@pytest.fixture(scope="module")
def corpus() -> list[Sendable]:
    """Every file of the corpus, with what it lacks to be sent filled in."""
    folder = require_shared("data/hostile/fuzz_corpus_v2")
    return [sendable(path.read_bytes()).plausible(number) for number, path in enumerate(below(folder))]


def of_single_slices(folder: Path) -> Path:
    """A bundle that takes what the corpus is made of, single images of modality CT, and waits for no record."""
    made = folder / "bundle"
    shutil.copytree(BUNDLES / "cxr-severity", made)
    text = (made / "bundle.toml").read_text("utf-8")
    for pattern, new in ((r"modalities = .*", 'modalities = ["CT"]'), (r"wait_s = .*", "wait_s = 0"), (r"(intensity|tensor) = .*\n", "")):
        text, count = re.subn(pattern, new, text)
        assert count or "intensity" in pattern
    (made / "bundle.toml").write_text(text, "utf-8")
    return made


def receiver_of(installation: Installation) -> psutil.Process:
    assert installation.process is not None
    (one,) = [child for child in psutil.Process(installation.process.pid).children() if "receive" in child.cmdline()]
    return one


def send(installation: Installation, files: Sequence[Sendable]) -> list[int]:
    """Send each file in an association of its own, between two C-ECHOs; return the statuses."""
    statuses = []
    for one in files:
        with Scu(("127.0.0.1", installation.port)) as scu:
            scu.associate(
                [(one.sop_class_uid, (one.transfer_syntax_uid,)), (VERIFICATION, (IMPLICIT,))], called="WORKER", calling="MODALITY"
            )
            result, syntax = scu.contexts[1]
            assert (result, syntax) == (0, one.transfer_syntax_uid)
            assert scu.echo(context_id=3) == 0
            command = command_set(1, has_data_set=True, sop_class=one.sop_class_uid, sop_instance=one.sop_instance_uid)
            scu.sock.sendall(pdu(4, pdv(1, 3, command)))
            parts = [one.data[at : at + _FRAGMENT] for at in range(0, len(one.data), _FRAGMENT)] or [b""]
            for number, part in enumerate(parts, start=1):
                scu.send_data(part, is_last=number == len(parts))
            statuses.append(scu.status())
            assert scu.echo(context_id=3) == 0
            assert scu.release()
    return statuses


@pytest.mark.requirement("P2")
@pytest.mark.requirement("P3")
@pytest.mark.requirement("P18")
def test_every_hostile_file_gets_a_status_and_the_receiver_neither_ends_nor_grows(running: Installation, corpus: list[Sendable]) -> None:
    receiver = receiver_of(running)
    send(running, corpus[:20])
    before, descriptors, pid = receiver.memory_info().rss, receiver.num_fds(), receiver.pid
    statuses = Counter(send(running, corpus))
    grown = receiver.memory_info().rss - before
    print(f"hostile corpus: {dict(sorted((f'{status:#06x}', n) for status, n in statuses.items()))}, receiver grew by {grown >> 10} KiB")
    assert statuses.total() == len(corpus) > 350
    assert statuses.keys() <= {0x0000, 0xA900, 0xC001, 0xC002, 0xC003, 0xC010, 0xC011, 0xC012, 0xC020, 0xC021}
    assert statuses[0x0000] > 200
    assert statuses.total() - statuses[0x0000] > 100
    assert grown < GROWTH_BYTES
    assert receiver_of(running).pid == pid
    assert receiver.num_fds() <= descriptors + 4


@pytest.mark.requirement("P1")
@pytest.mark.requirement("P18")
def test_every_study_of_a_hostile_file_that_was_taken_ends_in_words(running: Installation, corpus: list[Sendable]) -> None:
    """Each file as a study of its own, by other digits in its UIDs: not one job is left, and each report says why."""
    apart = [renumbered(one, number) for number, one in enumerate(corpus, start=10_000)]
    taken = sum(status == 0 for status in send(running, apart))
    assert taken > 200
    running.wait_idle(timeout_s=120)
    store = running.store
    with store.read() as conn:
        jobs = Counter(conn.execute(sa.text("SELECT kind, state, reason FROM job")).tuples())
        reports = Counter(conn.execute(sa.text("SELECT failure FROM document")).scalars())
        studies = conn.execute(sa.text("SELECT count(*) FROM study WHERE state = 'receiving'")).scalar_one()
    store.close()
    print(f"hostile studies: {dict(jobs)}, reports: {dict(reports.most_common(12))}")
    assert studies == 0
    assert set(jobs) <= {("infer", "completed", ""), ("infer", "discarded", HELD)}
    assert jobs["infer", "completed", ""] == reports.total() > 200
    assert not reports[""]
    assert all(failure.endswith(".") for failure in reports)


def renumbered(one: Sendable, number: int) -> Sendable:
    """The same bytes with other digits in the UIDs that the corpus gives its files: of the study, the series and the instance."""
    uid = one.sop_instance_uid
    other = uid[:-5] + str(number) if len(uid) > 30 else uid
    data = one.data.replace(_PREFIX, f"1.2.3.4.5.{number}.".encode()).replace(uid.encode(), other.encode())
    assert len(data) == len(one.data)
    return Sendable(one.sop_class_uid, other, one.transfer_syntax_uid, data, one.has_prefix)
