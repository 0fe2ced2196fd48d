"""The decoding processes: what they survive, how they die, and what they cost. Real files, real children."""

from __future__ import annotations

import gc
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pydicom
import pytest
from pydicom.uid import (
    JPEG2000Lossless,
)

from tests import factories
from tests.decoders import read, refused
from worker import doctor, doctor_peers, events, reception
from worker.errors import DecoderDied, GeometryError, PixelError, StoredFileLost, WorkerError
from worker.imaging import child, decoding
from worker.imaging.codecs import CODECS, NOT_OFFERED, decodable_transfer_syntaxes, unloadable, why_not_decoded
from worker.imaging.decoding import DecoderPool

ROOT = Path(__file__).parents[2]


@pytest.mark.requirement("P1")
@pytest.mark.requirement("P2")
@pytest.mark.requirement("P3")
@pytest.mark.requirement("P18")
def test_every_hostile_file_has_a_typed_outcome_and_the_parent_does_not_grow(pool: DecoderPool, shared: Path) -> None:
    """357 files of a fuzzing corpus: none crashes, hangs or swells anything, none kills a child."""
    files = sorted(path for path in (shared / "data" / "hostile" / "fuzz_corpus_v2").rglob("*") if path.is_file())
    assert len(files) > 300
    this, before = psutil.Process(), pool.pids()
    gc.collect()  # what other tests left open would be closed meanwhile
    resident, descriptors = this.memory_info().rss, this.num_fds()
    outcomes: Counter[str] = Counter()
    for path in files:
        try:
            read(pool, path)
            outcomes["ok"] += 1
        except (PixelError, GeometryError) as exc:
            outcomes[type(exc).__name__] += 1
    assert outcomes.total() == len(files)
    assert outcomes["ok"] > 100
    assert outcomes["PixelError"] > 100
    assert this.memory_info().rss - resident < 50 * 2**20
    assert this.num_fds() == descriptors
    assert set(pool.pids()) == set(before)


@pytest.mark.requirement("P1")
@pytest.mark.requirement("P18")
def test_where_every_hostile_file_costs_a_child_each_has_a_typed_outcome_and_none_is_left_over(shared: Path) -> None:
    """No child starts within the limit, so that each is ended and replaced: the parent keeps neither memory, sockets nor zombies."""
    files = sorted((shared / "data" / "hostile" / "fuzz_corpus_v2").rglob("*.dcm"))
    this, outcomes, longest = psutil.Process(), Counter[str](), 0.0
    children = {child.pid for child in this.children()}
    resident, descriptors = this.memory_info().rss, this.num_fds()
    with DecoderPool(processes=1, timeout_s=0.0025) as pool:
        for path in files:
            started = time.perf_counter()
            with pytest.raises(WorkerError) as caught:
                read(pool, path)
            outcomes[type(caught.value).__name__] += 1
            longest = max(longest, time.perf_counter() - started)
    assert outcomes.total() == len(files) > 350
    # Some files of the corpus are the same bytes: the second time it is the file's fault.
    assert outcomes.keys() == {"DecoderDied", "PixelError"}
    assert outcomes["DecoderDied"] > 300
    assert longest < 5
    assert this.memory_info().rss - resident < 50 * 2**20
    assert this.num_fds() == descriptors
    assert {child.pid for child in this.children()} == children


def test_every_codec_loads_and_says_its_version(pool: DecoderPool) -> None:
    versions = pool.warm()
    assert set(versions) == set(CODECS.values()) - {""}
    assert all(re.match(r"\d+\.\d+", version) for version in versions.values())


@pytest.mark.requirement("P12")
def test_what_is_negotiated_is_what_is_installed() -> None:
    assert set(decodable_transfer_syntaxes()) == CODECS.keys() - NOT_OFFERED


@pytest.mark.requirement("P12")
@pytest.mark.parametrize("module", sorted(set(CODECS.values()) - {""}))
def test_a_decoder_that_cannot_be_loaded_is_told_at_start_and_its_transfer_syntaxes_are_not_negotiated(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # makes its import fail
    versions = {name: child._version(name) for name in set(CODECS.values()) - {""}}
    assert [name for name, version in versions.items() if not version] == [module]
    theirs = {uid for uid, by in CODECS.items() if by == module}
    assert set(decodable_transfer_syntaxes(versions)) == CODECS.keys() - NOT_OFFERED - theirs
    (sentence,) = unloadable(versions)
    assert sentence.startswith(
        f"The decoder {module} cannot be loaded: images in {', '.join(sorted(theirs, key=list(CODECS).index))} are not"
    )
    monkeypatch.setattr(doctor, "codec_versions", lambda: versions)
    found = {what: (words, is_well) for what, words, is_well in [doctor_peers.tried("codecs", doctor._codecs)]}
    assert found == {"codecs": (sentence, False)}


@pytest.mark.requirement("P12")
@pytest.mark.parametrize("versions", [{"gdcm": "3", "jpeg_ls": "", "openjpeg": "2", "rle": "2"}, DecoderDied("It ended.")])
def test_a_receiver_says_at_start_what_it_cannot_load_and_receives_the_rest(
    versions: dict[str, str] | DecoderDied, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked() -> dict[str, str]:
        if isinstance(versions, DecoderDied):
            raise versions
        return versions

    heard: list[str] = []
    monkeypatch.setattr(decoding, "codec_versions", asked)
    monkeypatch.setattr(events, "_listeners", [lambda name, facts: heard.append(f"{name}: {facts['reason']}")])
    offered = decodable_transfer_syntaxes(reception._loadable_codecs())
    (sentence,) = heard
    if isinstance(versions, DecoderDied):
        assert sentence == "codec.missing: It is not known which decoders can be loaded. It ended."
        assert set(offered) == CODECS.keys() - NOT_OFFERED
    else:
        assert sentence.startswith("codec.missing: The decoder jpeg_ls cannot be loaded")
        assert not {uid for uid in offered if CODECS[uid] == "jpeg_ls"}


@pytest.mark.requirement("P11")
def test_every_transfer_syntax_of_the_library_is_decoded_or_refused_with_a_reason() -> None:
    assert {str(uid) for uid in pydicom.uid.AllTransferSyntaxes if bool(why_not_decoded(uid)) == (uid in CODECS)} == set()


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("worker.imaging.decoding", {"torch", "sqlalchemy", "pynetdicom", "pydicom", "gdcm", "openjpeg", "jpeg_ls", "rle"}),
        ("worker.imaging.child", {"torch", "sqlalchemy", "pynetdicom", "monai", "highdicom", "psutil"}),
    ],
)
def test_the_module_is_light(module: str, absent: set[str]) -> None:
    """The receiver asks decoding.py what to negotiate; a child starts in half a second and 40 MB."""
    script = f"import sys, {module}; print(' '.join({sorted(absent)!r} & sys.modules.keys()))".replace("['", "{'").replace("']", "'}")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == ""


def test_an_error_does_not_cost_the_child(pool: DecoderPool, tmp_path: Path) -> None:
    before = set(pool.pids())
    ds = factories.make_radiograph()
    ds.Rows = 1
    refused(pool, ds, tmp_path)
    assert set(pool.pids()) == before
    good = factories.spool(factories.make_ct(slices=12), tmp_path / "good")
    assert len(pool.read([one.path for one in good.instances], [one.sha256 for one in good.instances])) == 12


def test_one_bad_file_refuses_the_whole_read_and_the_next_read_is_right(pool: DecoderPool, tmp_path: Path) -> None:
    series = factories.spool(factories.make_ct(slices=40), tmp_path)
    paths, digests = [one.path for one in series.instances], [one.sha256 for one in series.instances]
    for bad in (0, 7, 8, 20, 39):
        with pytest.raises(StoredFileLost, match="changed"):
            pool.read(paths, [*digests[:bad], "0" * 64, *digests[bad + 1 :]])
        slices = pool.read(paths, digests)
        assert [one.instance_number for (one,) in slices] == list(range(1, 41))


def test_an_idle_child_that_was_killed_is_replaced_without_a_word(tmp_path: Path) -> None:
    path = factories.write(factories.make_radiograph(), tmp_path / "one.dcm")
    with DecoderPool(processes=1) as pool:
        pool.warm()
        (pid,) = pool.pids()
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        read(pool, path)
        assert pool.pids() != (pid,)


@pytest.mark.requirement("P1")
def test_a_file_that_overruns_the_time_limit_is_retried_once_then_refused(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 4095, (1500, 1500)).astype(np.uint16)
    slow = factories.write(factories.make_radiograph(stored=noise, transfer_syntax=JPEG2000Lossless), tmp_path / "slow.dcm")
    with DecoderPool(processes=1, timeout_s=0.02) as pool:
        with pytest.raises(DecoderDied, match=r"took longer than 0.02 s on the file with sha256 [0-9a-f]{12}…"):
            read(pool, slow)
        assert pool.pids() == ()
        with pytest.raises(PixelError, match="has done so 2 times"):
            read(pool, slow)
    with DecoderPool(processes=1) as pool:
        assert read(pool, slow).pixels.shape == (1500, 1500)


@pytest.mark.requirement("P1")
def test_a_file_that_needs_more_memory_than_the_child_has_is_retried_once_then_refused(tmp_path: Path) -> None:
    """22 MB in a child of 176 MiB: within its share of pixels and file, but parsing copies them."""
    large = factories.write(factories.make_radiograph(stored=np.zeros((3300, 3300), np.uint16)), tmp_path / "large.dcm")
    this = psutil.Process()
    with DecoderPool(processes=1, memory_bytes=176 * 2**20) as pool:
        before = this.memory_info().rss
        with pytest.raises(DecoderDied, match="needed more than its 184549376 bytes of memory"):
            read(pool, large)
        with pytest.raises(PixelError, match="has done so 2 times"):
            read(pool, large)
        assert this.memory_info().rss - before < 40 * 2**20


@pytest.mark.requirement("P1")
def test_a_series_larger_than_the_limit_is_refused(tmp_path: Path) -> None:
    series = factories.spool(factories.make_ct(hu=np.zeros((2, 1024, 1024), np.float32)), tmp_path)
    paths, digests = [one.path for one in series.instances] * 65, [one.sha256 for one in series.instances] * 65
    with DecoderPool(processes=2, memory_bytes=256 * 2**20) as pool:
        with pytest.raises(PixelError, match="more than 268435456 bytes of pixels"):
            pool.read(paths, digests)
        assert len(pool.read(paths[:4], digests[:4])) == 4


def test_children_die_with_their_parent(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom worker.imaging.decoding import DecoderPool\n"
        "pool = DecoderPool(processes=2)\npool.warm()\nprint(*pool.pids(), flush=True)\nsys.stdin.read()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    children = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    assert len(children) == 2
    parent.kill()
    parent.communicate()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


def test_a_child_is_confined(pool: DecoderPool) -> None:
    for pid in pool.pids():
        child = psutil.Process(pid)
        assert child.rlimit(psutil.RLIMIT_CORE) == (0, 0)
        assert child.rlimit(psutil.RLIMIT_AS) == (2 * 2**30, 2 * 2**30)
        assert "worker.imaging.child" in child.cmdline()
        assert not [name for name in child.environ() if name.startswith(("SYNOPTIC", "DATABASE", "PG"))]


@pytest.mark.slow
def test_bench_a_chest_radiograph_in_jpeg_2000(pool: DecoderPool, shared: Path) -> None:
    """Print the median milliseconds of reading one real film of 691 x 640 or so; the bound is ten times what was measured."""
    files = sorted((shared / "data" / "cxr-severity" / "dicom").rglob("*.dcm"))
    files = [path for path in files if pydicom.dcmread(path, stop_before_pixels=True).file_meta.TransferSyntaxUID == JPEG2000Lossless][:20]
    took = []
    for path in files:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        started = time.perf_counter()
        pool.read([path], [digest])
        took.append(time.perf_counter() - started)
    median = sorted(took)[len(took) // 2]
    print(f"radiograph, JPEG 2000: {1000 * median:.0f} ms (median of {len(took)})")
    assert median < 0.5
