"""What the network and its device can do wrong, injected into a real line: no wrong report, no lost study, and the next one is fine."""

from __future__ import annotations

import hashlib
import math
import operator
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.dataset import Dataset
from safetensors.torch import load, save

from models import stages
from models.bundle import settle
from models.network import FusionNetwork
from tests.conftest import Captured
from tests.phantom_line import PHANTOM, PhantomLine, phantom_line, told
from worker import __version__, doctor, pipeline, roles
from worker.errors import BundleError, DeviceLost, NoSuitableSeries, Reject
from worker.fingerprint import code_digest
from worker.imaging.decoding import DecoderPool
from worker.infer import Model
from worker.record_feeds import clock
from worker.report.codes import RECORD_MISSING
from worker.report.content import percent
from worker.store import queue, schema

Tensors = dict[str, Any]
#: What the phantom can lack, by the LOINC code that its bundle asks for.
CODE_OF = {"marker": "2039-6", "note": "34109-9"}


@pytest.fixture
def site(tmp_path: Path, pool: DecoderPool) -> Iterator[PhantomLine]:
    """An installation without a daemon."""
    with phantom_line(tmp_path / "site", pool) as made:
        yield made


@pytest.fixture
def model() -> Model:
    """The shipped phantom bundle, to be broken."""
    return Model(PHANTOM)


@pytest.fixture(scope="module")
def shipped() -> Model:
    """The same, left whole."""
    return Model(PHANTOM)


def faulty(model: Model, fault: Callable[[Tensors], None]) -> None:
    """Have each forward of the network begin with `fault`, which is given the batch."""
    healthy = model.network.encode

    def encode(batch: Tensors) -> Any:
        fault(batch)
        return healthy(batch)

    model.network.encode = encode  # type: ignore[method-assign]


def answering(model: Model, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Have the network's head give `change` of its logits (B, L)."""
    model.network.head.register_forward_hook(lambda _module, _given, logits: change(logits))


# --- M1, M2: the device


@pytest.mark.requirement("M1")
def test_a_full_device_costs_smaller_batches_then_the_study_alone_and_nothing_after_it(
    site: PhantomLine, model: Model, captured: Captured
) -> None:
    """Two do not fit: each goes alone. Not even one fits: it is tried again, at last a dead letter that says why; the next one is fine."""
    sizes, room = [], 1

    def fault(batch: Tensors) -> None:
        sizes.append(len(batch["image_mask"]))
        if sizes[-1] > room:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    faulty(model, fault)
    site.receive(1, 2)
    assert [case.error for case in site.analyse(model)] == [None, None]
    assert sizes[:3] == [2, 1, 1]
    room = 0
    (poor,) = site.receive(3)
    for attempt in range(1, queue.INFER_ATTEMPTS + 1):
        site.now += timedelta(hours=1)
        (case,) = site.analyse(model)
        state, attempts, reason = site.jobs()[-1]
        assert attempts == attempt
        assert reason == "cpu cannot hold one study of bundle phantom."
        assert state == ("discarded" if attempt == queue.INFER_ATTEMPTS else "available")
    assert len(captured.named("job.discarded")) == 1
    room = 9
    site.receive(4)
    (case,) = site.analyse(model)
    assert case.error is None
    assert set(site.reports()) & {poor} == set()
    assert len(site.reports()) == 3


@pytest.mark.requirement("M2")
@pytest.mark.parametrize("device", ["cuda", "cuda:7"])
def test_a_configured_device_that_is_not_here_is_refused_and_the_cpu_does_not_take_its_place(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Reject, match=f"The device '{device}' cannot be used here: there is cpu; torch finds no CUDA device"):
        Model(PHANTOM, device=device)
    config = PhantomLine(tmp_path, None, None).config  # type: ignore[arg-type]
    config = replace(config, run=replace(config.run, device=device))
    ((found, is_well),) = [(found, is_well) for what, found, is_well in doctor.checks(config, None) if what == "bundle"]
    assert (is_well, "torch finds no CUDA device" in found) == (False, True)


@pytest.mark.requirement("M2")
def test_a_device_lost_in_the_middle_ends_the_process_and_gives_the_study_back(site: PhantomLine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An accelerator that fell off the bus answers no later call of the same process either: only a new one may find it again."""
    site.receive(1)
    with site.store.begin() as conn:  # the role has a clock of its own
        conn.execute(sa.update(schema.job).values(not_before=clock()))
    healthy = FusionNetwork.encode
    is_warm: list[bool] = []

    def encode(network: FusionNetwork, batch: Tensors) -> Any:
        if is_warm:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        is_warm.append(True)
        return healthy(network, batch)

    monkeypatch.setattr(FusionNetwork, "encode", encode)
    with pytest.raises(DeviceLost, match="cpu answers no more"):
        roles.run(site.config, site.store, threading.Event())
    ((state, attempt, reason),) = site.jobs()
    assert (state, attempt) == ("available", 1)
    assert reason == "cpu answers no more (AcceleratorError); its process must end."
    monkeypatch.undo()
    site.now += timedelta(hours=1)
    (case,) = site.analyse(Model(PHANTOM))
    assert case.error is None


# --- M6: a network that never answers

#: A `run` role whose network hangs on its first study: asleep, so that its leases are renewed, or with the interpreter's lock held.
HANGING = """
import re, sys, threading, time
from pathlib import Path
from models.network import FusionNetwork
from tests.phantom_line import PhantomLine
from worker import roles
from worker.store.database import Store

healthy, is_warm = FusionNetwork.encode, []
hang = {"asleep": lambda: time.sleep(3600), "locked": lambda: re.match("(a+)+$", "a" * 99 + "b")}[sys.argv[2]]

def encode(network, batch):
    if is_warm:
        hang()
    is_warm.append(True)
    return healthy(network, batch)

FusionNetwork.encode = encode
folder = Path(sys.argv[1])
store = Store(f"sqlite:///{folder / 'data' / 'synoptic.db'}")
config = PhantomLine(folder, None, None).config
object.__setattr__(config.run, "study_limit_s", 4.0)
object.__setattr__(config.run, "batch", 1)
roles.run(config, store, threading.Event())
"""


@pytest.mark.requirement("M6")
@pytest.mark.parametrize("how", ["asleep", "locked"])
def test_a_network_that_hangs_ends_its_process_gives_its_study_back_and_the_others_go_on(
    tmp_path: Path, site: PhantomLine, shipped: Model, how: str
) -> None:
    poor, other = site.receive(30, 31)
    with site.store.begin() as conn:  # the role has a clock of its own
        conn.execute(sa.update(schema.job).values(not_before=clock()))
    command = [sys.executable, "-c", HANGING, str(tmp_path / "site"), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1
    assert re.search(r"Timeout .*in encode", done.stderr, re.DOTALL), "where it hung, for whoever must find out why"
    assert [state for state, *_ in site.jobs()] == ["leased", "available"]
    site.now += timedelta(hours=1)
    with site.store.begin() as conn:
        assert len(queue.rescue(conn, now=site.now)) == 1
    assert site.jobs()[0] == ("available", 1, "The worker stopped without a verdict in attempt 1.")
    both = site.analyse(shipped) + site.analyse(shipped)  # what a process died of goes alone
    assert [case.error for case in both] == [None, None]
    assert set(site.reports()) == {poor, other}


# --- M5: answers that are none


@pytest.mark.requirement("M5")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(lambda logits: logits * math.nan, "not finite", id="nan"),
        pytest.param(lambda logits: logits - math.inf, "not finite", id="infinite"),
        pytest.param(lambda logits: torch.cat([logits, logits[:, :1]], dim=1), r"shape \(1, 3\) where \(1, 2\)", id="one more"),
        pytest.param(lambda logits: logits[:, :1], r"shape \(1, 1\) where \(1, 2\)", id="one fewer"),
        pytest.param(lambda logits: torch.full_like(logits, 2.0), "2 of 2 answers that its input had no part in", id="constant"),
        pytest.param(lambda logits: logits * torch.tensor([1.0, 0.0]), "1 of 2 answers that its input", id="one constant"),
    ],
)
def test_an_answer_that_is_none_makes_no_report_and_an_alarm(
    site: PhantomLine, model: Model, captured: Captured, change: Callable[[torch.Tensor], torch.Tensor], words: str
) -> None:
    answering(model, change)
    site.receive(1)
    (case,) = site.analyse(model)
    assert isinstance(case.error, BundleError)
    assert site.reports() == {}
    assert site.jobs("deliver") == []
    assert site.jobs()[0][0] == "discarded"
    (alarm,) = captured.named("job.discarded")
    assert re.search(words, str(alarm["reason"]))


@pytest.mark.requirement("M5")
@given(logit=st.floats(allow_nan=False, allow_infinity=False))
def test_no_output_of_a_network_becomes_a_probability_above_one_or_below_zero(shipped: Model, logit: float) -> None:
    """A network gives log-odds: 1.2 and -0.3 are answers like any other, and what is printed lies between 0 and 100 %."""
    finding = shipped._finding(shipped.bundle.findings[0], logit, np.zeros(len(shipped.bundle.modalities)), is_atypical=False)
    assert 0 <= finding.probability <= 1
    assert 0 <= percent(finding.probability) <= 100


@pytest.mark.requirement("M5")
@pytest.mark.parametrize("probability", [1.2, -0.3, math.nan])
def test_a_probability_that_is_none_cannot_be_printed(probability: float) -> None:
    with pytest.raises(ValueError, match="is no probability"):
        percent(probability)


# --- M3, M4: the weights


class Canary:
    """Whoever unpickles it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.requirement("M3")
@pytest.mark.parametrize("at", [0, 40, -1], ids=["length", "header", "numbers"])
def test_weights_of_which_one_byte_changed_are_refused_by_the_supervisor_and_by_the_role(tmp_path: Path, at: int) -> None:
    folder = shutil.copytree(PHANTOM, tmp_path / "phantom")
    raw = bytearray((folder / "weights.safetensors").read_bytes())
    raw[at] ^= 1
    (folder / "weights.safetensors").write_bytes(raw)
    config = PhantomLine(tmp_path, None, None, (folder,)).config  # type: ignore[arg-type]
    with pytest.raises(BundleError, match=r"weights\.safetensors of bundle phantom has sha256"):
        roles.read_bundles(config)  # the supervisor, before any child
    with pytest.raises(BundleError, match=r"weights\.safetensors of bundle phantom has sha256"):
        Model(folder)  # the role: the file may have changed since


@pytest.mark.requirement("M4")
@pytest.mark.parametrize("is_zip", [True, False], ids=["torch.save of today", "of old"])
def test_a_pickle_in_the_place_of_weights_is_refused_and_not_run_though_its_sha256_is_stated(tmp_path: Path, *, is_zip: bool) -> None:
    """Nor is another file of the folder opened in its place."""
    canary, folder = tmp_path / "canary", shutil.copytree(PHANTOM, tmp_path / "phantom")
    torch.save({"head.bias": Canary(canary)}, folder / "weights.safetensors", _use_new_zipfile_serialization=is_zip)
    shutil.copy(PHANTOM / "weights.safetensors", folder / "other.safetensors")
    raw = (folder / "weights.safetensors").read_bytes()
    settle(folder, {}, sha256=hashlib.sha256(raw).hexdigest())
    with pytest.raises(BundleError, match=r"no safetensors file .* pickles and other formats are never opened"):
        Model(folder)
    assert not canary.exists()
    shutil.copy(folder / "weights.safetensors", tmp_path / "weights.pt")  # by this name torch opens it
    torch.load(tmp_path / "weights.pt", weights_only=False)
    assert canary.exists(), "the canary is one"


@pytest.mark.requirement("M4")
def test_a_checkpoint_of_the_training_that_would_run_something_is_refused_and_not_run(tmp_path: Path) -> None:
    canary, file = tmp_path / "canary", tmp_path / "checkpoint.pt"
    torch.save({"parts": Canary(canary)}, file)
    with pytest.raises(ValueError, match=r"checkpoint\.pt is no checkpoint that can be read"):
        stages._read(file)
    assert not canary.exists()


# --- M7, M8, M9: what a report says of how it was made


@pytest.mark.requirement("M7")
def test_what_a_report_rests_on_is_in_it_by_hash_and_makes_the_same_report_again(
    tmp_path: Path, pool: DecoderPool, site: PhantomLine, shipped: Model
) -> None:
    """Weights, bundle (network, preprocessing, thresholds), code and input; another installation, another process's model."""
    (uid,) = site.receive(5)
    (case,) = site.analyse(shipped)
    report = site.reports()[uid]
    weights = hashlib.sha256((PHANTOM / "weights.safetensors").read_bytes()).hexdigest()
    lines = told(report)
    for digest in (shipped.digest, weights, case.input_sha256, f"code {__version__}"):
        assert digest in lines
    with phantom_line(tmp_path / "other", pool) as other:
        other.now = site.now
        other.receive(5)
        (again,) = other.analyse(Model(PHANTOM))
        assert again.input_sha256 == case.input_sha256
        assert [f.probability for f in again.findings] == [f.probability for f in case.findings]
        assert other.reports()[uid] == report
        other.receive(6)
        (another,) = other.analyse(shipped)
        assert another.input_sha256 != case.input_sha256


@pytest.mark.requirement("M8")
@pytest.mark.parametrize("absent", [(), ("marker",), ("note",), ("marker", "note")], ids=" and ".join)
def test_what_of_the_record_is_lacking_is_named_in_the_report_and_has_no_part_in_the_answer(
    site: PhantomLine, shipped: Model, absent: tuple[str, ...]
) -> None:
    (uid,) = site.receive(7, absent=frozenset(absent))
    (case,) = site.analyse(shipped)
    assert case.error is None
    assert case.inputs is not None
    lacking = {code.value for code in case.inputs.missing}
    assert lacking == {CODE_OF[one] for one in absent}
    content = dcmread(BytesIO(site.reports()[uid])).ContentSequence
    named = [item for item in _items(content) if item.ConceptNameCodeSequence[0].CodeValue == RECORD_MISSING.value]
    assert {item.ConceptCodeSequence[0].CodeValue for item in named} == lacking
    for finding in case.findings:
        assert (finding.shapley["text"] == 0) == ("note" in absent)
        assert ("cea" in finding.attributions) == ("marker" not in absent)


@pytest.mark.requirement("M8")
def test_without_its_image_a_study_has_no_answer_and_its_report_says_why(site: PhantomLine, shipped: Model) -> None:
    (uid,) = site.receive(8)
    with site.store.begin() as conn:
        conn.execute(sa.update(schema.series).values(description="Scout"))
    (case,) = site.analyse(shipped)
    assert isinstance(case.error, NoSuitableSeries)
    assert case.findings == ()
    assert str(case.error) in told(site.reports()[uid])


@pytest.mark.requirement("M9")
def test_a_bundle_that_is_exchanged_while_studies_wait_is_named_by_those_it_answered_and_by_no_other(
    tmp_path: Path, site: PhantomLine
) -> None:
    """The files change under a running process, which goes on with what it loaded; the next process takes the new ones."""
    folder = shutil.copytree(PHANTOM, tmp_path / "phantom")
    file = folder / "bundle.toml"
    file.write_text(file.read_text("utf-8").replace('version = "0.1.0"', 'version = "7.1.0"'), "utf-8")  # 0.1.0 is the code's, too
    old = Model(folder)
    uids = site.receive(*range(10, 16))
    site.analyse(old, limit=2)
    tensors = load((folder / "weights.safetensors").read_bytes())
    raw = save({**tensors, "head.bias": tensors["head.bias"] + 0.5})
    (folder / "weights.safetensors").write_bytes(raw)
    file.write_text(file.read_text("utf-8").replace('version = "7.1.0"', 'version = "7.2.0"'), "utf-8")
    settle(folder, {}, sha256=hashlib.sha256(raw).hexdigest())
    site.analyse(old, limit=2)
    new = Model(folder)
    site.analyse(new, limit=2)
    reports = site.reports()
    assert set(reports) == set(uids)
    by = dict.fromkeys(uids[:4], (old, new)) | dict.fromkeys(uids[4:], (new, old))
    for uid, (answered, other) in by.items():
        lines = told(reports[uid])
        for said in ("bundle.weights.sha256", "digest", "version"):
            mine, others = operator.attrgetter(said)(answered), operator.attrgetter(said)(other)
            assert mine in lines
            assert not re.search(rf"(?<![0-9.]){re.escape(others)}(?![0-9.])", lines), said
        assert f"code-sha256:{code_digest()}" in lines


@pytest.mark.requirement("Q6")
def test_a_report_that_the_database_refuses_costs_its_own_job_a_try_and_no_other_study(site: PhantomLine, shipped: Model) -> None:
    """Nor the process: the error is that job's verdict, by its type alone."""
    refused, other = site.receive(50, 51)
    with site.store.begin() as conn:
        conn.exec_driver_sql("CREATE TRIGGER no BEFORE INSERT ON document WHEN NEW.study_id = 1 BEGIN SELECT RAISE(ABORT, 'JANE'); END")
    site.analyse(shipped)
    assert set(site.reports()) == {other}
    (first, second) = site.jobs()
    assert (first[:2], second[:2]) == (("available", 1), ("completed", 1))
    assert "IntegrityError" in first[2]
    assert "JANE" not in first[2]
    with site.store.begin() as conn:
        conn.exec_driver_sql("DROP TRIGGER no")
    site.now += timedelta(hours=1)
    site.analyse(shipped)
    assert set(site.reports()) == {refused, other}


# --- M11: the golden set

#: Of the shipped bundle and phantoms 40 to 47: what the line answered on 2026-11-29, in the bundle's order of findings.
#: A change of code that moves them is a change of what radiologists read: it is said in its commit, with the new numbers.
GOLDEN: tuple[tuple[float, float], ...] = (
    (0.012110, 0.000001),
    (0.993923, 0.000001),
    (0.055986, 0.999999),
    (0.996440, 1.000000),
    (0.996873, 1.000000),
    (0.003554, 0.000001),
    (0.003725, 0.000002),
    (0.978837, 0.999999),
)
#: Kernels of other processors round float32 otherwise; what a report prints is a whole per cent.
TOLERANCE = 1e-3


def drifted(cases: Iterable[pipeline.Case]) -> list[int]:
    """Which of the golden studies have another answer than before, by their place."""
    found = [[finding.probability for finding in case.findings] for case in cases]
    assert len(found) == len(GOLDEN)
    return [n for n, (now, was) in enumerate(zip(found, GOLDEN, strict=True)) if np.abs(np.subtract(now, was)).max() > TOLERANCE]


@pytest.mark.requirement("M11")
def test_the_golden_set_is_answered_as_before(site: PhantomLine, shipped: Model) -> None:
    """From files and messages through decoding, selection and preprocessing to the printed probability."""
    site.receive(*range(40, 48))
    assert drifted(site.analyse(shipped)) == []


@pytest.mark.requirement("M11")
def test_a_drift_that_would_move_a_printed_per_cent_is_seen(site: PhantomLine, model: Model) -> None:
    """0.05 of log-odds is 1 % where a study is uncertain."""
    answering(model, lambda logits: logits + 0.05)
    site.receive(*range(40, 48))
    assert drifted(site.analyse(model))


def _items(content: Iterable[Dataset]) -> Iterator[Dataset]:
    for item in content:
        yield item
        yield from _items(item.get("ContentSequence", ()))
