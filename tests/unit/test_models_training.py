"""Training learns what is there, forgets what is not labeled, goes on where it was killed, and does the same thing twice."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from models import saving
from models.bundle import Bundle, InvalidBundleError, settle
from models.loading import load_network
from models.network import FusionNetwork
from models.saving import save_fit
from models.stages import Checkpoint, Learned, learn
from models.table import digest
from models.training import (
    Fit,
    Labeled,
    cache_tokens,
    embeddings,
    fit,
    fit_temperatures,
    masked_loss,
    predict,
    pretrain,
    split_groups,
    step_loss,
)
from models.transforms import collate
from tests.unit import small_bundle

ROOT = Path(__file__).parents[2]


@pytest.fixture
def frozen(bundle: Bundle) -> Bundle:
    return with_training(bundle, stages="frozen", fusion_epochs=2, shift=0.1, contrast=0.2)


def with_training(bundle: Bundle, **changes: object) -> Bundle:
    return dataclasses.replace(bundle, training=dataclasses.replace(bundle.training, **changes))  # type: ignore[arg-type]


#: A second image, of an encoder of its own; nobody must have it.
SECOND = small_bundle.IMAGE.replace('"image"', '"second"') + "required = false\n"


@pytest.fixture
def two_images(tmp_path: Path) -> Bundle:
    folder = small_bundle.write(tmp_path / "two", small_bundle.TOML.replace(small_bundle.IMAGE, f"{small_bundle.IMAGE}\n{SECOND}", 1))
    return with_training(Bundle.read(folder, verify=False), stages="frozen", fusion_epochs=2, epochs=2)


def with_second(studies: list[Labeled], *, absent: Sequence[str] = ()) -> list[Labeled]:
    """Their image upside down as the second one, for all but the groups `absent`."""
    return [
        dataclasses.replace(s, sample=s.sample | {"second": s.sample["image"].flip(1), "second_mask": torch.tensor(s.group not in absent)})
        for s in studies
    ]


def weights(result: Fit) -> str:
    return digest(result.network.state_dict())


def test_training_twice_with_one_seed_gives_the_same_bits(bundle: Bundle) -> None:
    studies = small_bundle.studies(bundle, 16)
    moving = with_training(bundle, shift=0.1)
    first, second, other = (weights(fit(moving, studies, seed=seed, epochs=2)) for seed in (1, 1, 2))
    assert first == second
    assert first != other


def test_a_network_learns_the_value_that_decides(bundle: Bundle) -> None:
    result = fit(bundle, small_bundle.studies(bundle, 80), seed=0, epochs=8)
    others = small_bundle.studies(bundle, 60, seed=9)
    logits, labels = predict(result.network, others)
    assert roc_auc_score(labels[:, 0], logits[:, 0]) > 0.95
    blind, _ = predict(result.network, others, keep=("image", "text"))
    assert roc_auc_score(labels[:, 0], blind[:, 0]) < 0.8


def test_what_fit_saves_is_what_a_bundle_loads(bundle: Bundle) -> None:
    result = fit(bundle, small_bundle.studies(bundle, 16), seed=0, epochs=1)
    settled = save_fit(bundle, result)
    loaded = Bundle.read(bundle.folder).tensors()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in result.network.state_dict().items())
    assert settled.findings[0].temperature == pytest.approx(float(result.temperatures[0]), abs=1e-4)


def test_a_fit_tells_what_it_held_out_and_how_it_went(bundle: Bundle) -> None:
    """Conformal thresholds are set on the held-out studies: their logits must be the saved network's."""
    studies = small_bundle.studies(bundle, 24)
    result = fit(bundle, studies, seed=0, epochs=3)
    _, held_out = split_groups(sorted(studies, key=lambda s: s.group), share=0.2, seed=0)
    logits, labels = predict(result.network, held_out)
    assert torch.equal(result.held_logits, logits)
    assert torch.equal(result.held_labels.nan_to_num(9), labels.nan_to_num(9))
    assert result.held_groups == tuple(s.group for s in held_out)
    assert [row["epoch"] for row in result.history] == list(range(1, result.epochs + 1))
    assert result.validation_loss == min(row["validation_loss"] for row in result.history)
    assert result.validation_loss == pytest.approx(float(masked_loss(logits, labels)))
    assert embeddings(result.network, studies[:3]).shape[0] == 3


def test_a_study_without_a_label_moves_no_weight(bundle: Bundle) -> None:
    network = FusionNetwork(bundle).eval()
    tokens = network.encode(collate([s.sample for s in small_bundle.studies(bundle, 8)]))
    nothing = torch.full((8, 2), torch.nan)
    loss = step_loss(network, tokens, nothing, bundle.training, lambda *shape: torch.rand(8, *shape), weight=torch.ones(2))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in network.parameters())


def test_a_positive_weighs_as_its_weight_says_and_an_unknown_label_nothing() -> None:
    logits, labels = torch.tensor([[0.3, 2.0], [-0.5, 1.0]]), torch.tensor([[1.0, torch.nan], [0.0, 1.0]])
    each = [
        3 * torch.log1p(torch.exp(torch.tensor(-0.3))),
        torch.log1p(torch.exp(torch.tensor(-0.5))),
        torch.log1p(torch.exp(torch.tensor(-1.0))),
    ]
    assert masked_loss(logits, labels, weight=torch.tensor([3.0, 1.0])).item() == pytest.approx(float(sum(each)) / 3, rel=1e-5)


def test_the_positives_weight_is_learned_of_the_training_part_and_one_turns_it_off(bundle: Bundle) -> None:
    """A cap no class reaches changes nothing more; a cap of 1 is no weight."""
    rare = [
        dataclasses.replace(s, labels=torch.tensor([float(i % 8 < 2), torch.nan])) for i, s in enumerate(small_bundle.studies(bundle, 32))
    ]
    off, on, more = (weights(fit(with_training(bundle, positive_weight=cap), rare, seed=0, epochs=1)) for cap in (1.0, 10.0, 99.0))
    assert off != on
    assert on == more


def test_what_lies_where_an_image_is_absent_moves_no_weight(bundle: Bundle) -> None:
    def without_images(content: float) -> list[Labeled]:
        absent = {"image": torch.full((1, 12, 10, 8), content), "image_mask": torch.tensor(False)}
        return [
            dataclasses.replace(s, sample=s.sample | (absent if i % 3 == 0 else {})) for i, s in enumerate(small_bundle.studies(bundle, 16))
        ]

    for stages in ("joint", "frozen"):
        trained = with_training(bundle, stages=stages, contrast=0.1)
        black, nothing = (fit(trained, without_images(content), seed=0, epochs=1) for content in (0.0, torch.nan))
        assert weights(black) == weights(nothing)
        assert all(t.isfinite().all() for t in nothing.network.state_dict().values())


def test_frozen_stages_learn_the_images_first_and_never_touch_them_again(frozen: Bundle) -> None:
    studies = small_bundle.studies(frozen, 24)
    encoders = pretrain(frozen, studies, seed=3, epochs=2)
    whole = fit(frozen, studies, seed=3, epochs=2)
    assert digest(whole.network.images.state_dict()) == digest(encoders)
    assert [row["stage"] for row in whole.history] == ["image:image"] * 2 + ["fusion"] * 2
    assert all(p.requires_grad for p in whole.network.parameters())
    fresh = FusionNetwork(frozen).images.state_dict()
    assert digest(fresh) != digest(encoders)


def test_many_heads_on_one_cache_are_as_if_each_had_trained_alone(frozen: Bundle) -> None:
    studies = small_bundle.studies(frozen, 24)
    encoders = pretrain(frozen, studies, seed=3, epochs=1)
    cache = cache_tokens(frozen, studies, encoders, seed=3)
    for fusion in ("tokens", "concat", "single:values"):
        alone = fit(frozen, studies, seed=3, fusion=fusion, encoders=encoders)
        shared = fit(frozen, studies, seed=3, fusion=fusion, tokens=cache)
        assert weights(alone) == weights(shared)
        assert shared.epochs <= frozen.training.fusion_epochs
        from_images, from_cache = (predict(shared.network, studies, tokens=tokens)[0] for tokens in (None, cache))
        assert torch.allclose(from_images, from_cache, atol=1e-5)
    with pytest.raises(ValueError, match="of other studies, or of these in another order"):
        fit(frozen, studies[::-1], seed=3, tokens=cache)


def test_a_cache_holds_each_image_as_it_is_and_its_augmented_copies(frozen: Bundle) -> None:
    studies = small_bundle.studies(frozen, 5)
    encoders = FusionNetwork(frozen).images.state_dict()
    first, again = (cache_tokens(frozen, studies, encoders, seed=0, copies=2).tokens["image"] for _ in range(2))
    assert first.shape == (5, 3, 8, 16)
    assert torch.equal(first, again)
    network = FusionNetwork(frozen).eval()
    network.images.load_state_dict(encoders)
    plain = network.encode(collate([s.sample for s in studies]))["image"][0]
    assert torch.allclose(first[:, 0], plain, atol=1e-6)
    assert not torch.allclose(first[:, 1], first[:, 0], atol=1e-3)
    assert not torch.allclose(first[:, 1], first[:, 2], atol=1e-3)


class PowerCut(Exception):
    """What a progress callback raises to end a run."""


@pytest.mark.parametrize("stages", ["joint", "frozen"])
def test_a_run_cut_off_after_any_epoch_goes_on_to_the_same_bits(bundle: Bundle, stages: str, tmp_path: Path) -> None:
    moving = with_training(bundle, stages=stages, fusion_epochs=3, contrast=0.1)
    studies = small_bundle.studies(bundle, 16)
    whole = fit(moving, studies, seed=4)
    folder = tmp_path / "run"
    calls = 0

    def cut(_epoch: int, _epochs: int, _loss: float) -> None:
        nonlocal calls
        calls += 1
        raise PowerCut

    for _ in range(9):
        try:
            resumed = fit(moving, studies, seed=4, folder=folder, progress=cut)
            break
        except PowerCut:
            assert [file.name for file in folder.iterdir()] == ["checkpoint.pt"]
    assert calls == len(whole.history), "each epoch was learned once"
    assert weights(resumed) == weights(whole)
    assert resumed.history == whole.history


def test_a_run_cut_off_between_two_images_goes_on_to_the_same_bits(two_images: Bundle, tmp_path: Path) -> None:
    """The second image's head is drawn at random: it must not matter how many numbers the first one's epochs drew."""
    studies = with_second(small_bundle.studies(two_images, 16))
    whole = fit(two_images, studies, seed=4)
    assert [row["stage"] for row in whole.history] == ["image:image"] * 2 + ["image:second"] * 2 + ["fusion"] * 2

    def cut(epoch: int, _epochs: int, _loss: float) -> None:
        if epoch == 2:
            raise PowerCut

    with pytest.raises(PowerCut):
        fit(two_images, studies, seed=4, folder=tmp_path / "run", progress=cut)
    resumed = fit(two_images, studies, seed=4, folder=tmp_path / "run")
    assert weights(resumed) == weights(whole)
    assert resumed.history == whole.history


def test_an_image_that_nobody_held_out_has_is_learned_to_the_last_epoch(two_images: Bundle) -> None:
    """A loss of nothing is undefined, not 0: that would make the first epoch the best."""
    studies = small_bundle.studies(two_images, 16)
    impatient = with_training(two_images, epochs=4, patience=1)
    _, held_out = split_groups(sorted(studies, key=lambda s: s.group), share=0.2, seed=4)
    result = fit(impatient, with_second(studies, absent=[s.group for s in held_out]), seed=4)
    losses = [float(row["validation_loss"]) for row in result.history if row["stage"] == "image:second"]
    assert len(losses) == 4
    assert all(map(math.isnan, losses))
    assert all(math.isfinite(row["validation_loss"]) for row in result.history if row["stage"] != "image:second")  # type: ignore[arg-type]
    assert math.isfinite(result.validation_loss)


def test_where_no_held_out_label_is_known_all_epochs_are_learned(bundle: Bundle) -> None:
    # All of them healthy: the split then is by name alone, and does not change with what is known.
    studies = [dataclasses.replace(s, labels=torch.tensor([0.0, s.labels[0]])) for s in small_bundle.studies(bundle, 24)]
    _, held_out = split_groups(studies, share=0.2, seed=0)
    unknown = {s.group for s in held_out}
    studies = [dataclasses.replace(s, labels=s.labels * torch.nan) if s.group in unknown else s for s in studies]
    result = fit(with_training(bundle, patience=1), studies, seed=0)
    assert set(result.held_groups) == unknown
    assert math.isnan(result.validation_loss)
    assert (result.epochs, result.best_epoch) == (3, 3)
    assert result.temperatures.tolist() == [1, 1]


def stage(bundle: Bundle, validate: Callable[[nn.Module], float] | None, *, loss: float = 1.0) -> Learned:
    """Three epochs of a line of one weight."""
    torch.manual_seed(0)
    line = nn.Linear(1, 1)
    return learn(
        "line",
        line,
        loss=lambda rows, _draw: line(torch.ones(len(rows), 1)).sum() * loss,
        validate=validate,
        studies=8,
        config=dataclasses.replace(bundle.training, patience=1),
        epochs=3,
        seed=0,
        checkpoint=Checkpoint(None, {}),
        progress=None,
    )


def test_without_a_judge_the_last_averaged_weights_are_taken_and_a_diverged_run_is_still_refused(bundle: Bundle) -> None:
    better = iter((3.0, 2.0, 1.0))
    last, unjudged, first = (stage(bundle, judge) for judge in (lambda _: next(better), None, lambda _: 1.0))
    assert digest(unjudged.weights) == digest(last.weights) != digest(first.weights)
    assert (unjudged.epochs, unjudged.best_epoch, first.best_epoch) == (3, 3, 1)
    with pytest.raises(ValueError, match="never finite"):
        stage(bundle, None, loss=math.nan)


def test_a_run_killed_while_it_is_saved_leaves_no_wrong_bundle_and_is_not_learned_again(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object, **__: object) -> None:
        raise PowerCut

    def settle_and_die(folder: Path, findings: Mapping[str, Mapping[str, float]], *, sha256: str) -> None:
        settle(folder, findings, sha256=sha256)
        raise PowerCut

    def again() -> Fit:
        return fit(Bundle.read(bundle.folder, verify=False), studies, seed=0, folder=tmp_path / "run", progress=die)

    studies = small_bundle.studies(bundle, 12)
    before = save_fit(bundle, fit(bundle, studies, seed=1, epochs=1))
    done = fit(before, studies, seed=0, folder=tmp_path / "run")
    for module, name, fault in ((os, "fsync", die), (saving, "settle", die), (saving, "settle", settle_and_die)):
        found = again()
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fault)
            with pytest.raises(PowerCut):
                save_fit(before, found)
        assert (tmp_path / "run" / "checkpoint.pt").exists()
        if name == "fsync":
            assert Bundle.read(bundle.folder) == before
        elif fault is die:
            with pytest.raises(InvalidBundleError, match="sha256"):
                Bundle.read(bundle.folder)
        else:
            assert Bundle.read(bundle.folder).weights.sha256 != before.weights.sha256
    resumed = again()
    assert weights(resumed) == weights(done)
    assert resumed.history == done.history
    settled = save_fit(before, resumed)
    assert all(torch.equal(settled.tensors()[name], tensor) for name, tensor in done.network.state_dict().items())
    assert not list((tmp_path / "run").iterdir())
    assert sorted(file.name for file in bundle.folder.iterdir()) == ["bundle.toml", "weights.safetensors"]


def test_new_weights_carry_no_guarantee_of_the_old_ones(bundle: Bundle) -> None:
    settle(bundle.folder, {"ill": {"alpha": 0.1}})
    settled = save_fit(bundle, fit(bundle, small_bundle.studies(bundle, 12), seed=0, epochs=1))
    assert [f.alpha for f in settled.findings] == [0, 0]
    assert (bundle.folder / "bundle.toml").read_text("utf-8").count("alpha") == 1, "a finding that never had one gets no line"


def test_a_full_disk_is_said_of_which_folder_and_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(state: object, stream: BinaryIO) -> None:
        stream.write(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file")

    kept = Checkpoint(tmp_path, {"seed": "0"})
    kept.keep("joint", {"epoch": 1})
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=rf"checkpoint\.pt cannot be written into {tmp_path}: the disk may be full"):
        kept.keep("joint", {"epoch": 2})
    assert [one.name for one in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert Checkpoint(tmp_path, {"seed": "0"}).stage("joint") == {"epoch": 1}


def test_weights_stay_where_bundle_toml_cannot_be_settled(bundle: Bundle) -> None:
    result = fit(bundle, small_bundle.studies(bundle, 8), seed=0, epochs=1)
    save_fit(bundle, result)
    file = bundle.folder / "bundle.toml"
    file.write_text(file.read_text("utf-8").replace("temperature =", '"temperature" ='), "utf-8")
    before = Bundle.read(bundle.folder)
    with pytest.raises(InvalidBundleError, match="left as it is"):
        save_fit(bundle, fit(bundle, small_bundle.studies(bundle, 8), seed=1, epochs=1))
    assert Bundle.read(bundle.folder) == before


def loaded(bundle: Bundle, **changes: Tensor | None) -> None:
    """Load the network of a bundle whose file holds these tensors besides or instead, without those that are None."""
    size = 3
    right = {"mean": torch.zeros(size), "precision": torch.eye(size), "limit": torch.tensor(1.0)}
    network = FusionNetwork(bundle).state_dict()
    tensors = {**network, **{f"atypical.{name}": tensor for name, tensor in right.items()}, **changes}
    raw = save({name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None})
    bundle.weights_path.write_bytes(raw)
    load_network(settle(bundle.folder, {}, sha256=hashlib.sha256(raw).hexdigest()))


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        ("atypical.limit", None, "holds mean, precision of"),
        ("atypical.other", torch.zeros(3), "holds limit, mean, other, precision of"),
        ("atypical.mean", torch.zeros(3, 1), r"atypical\.mean .* float32 of shape \(3,\)"),
        ("atypical.precision", torch.eye(4), r"atypical\.precision .* float32 of shape \(3, 3\)"),
        ("atypical.limit", torch.ones(2), r"atypical\.limit .* float32 of shape \(\)"),
        ("atypical.limit", torch.tensor(1), r"atypical\.limit .* float32"),
        ("atypical.mean", torch.full((3,), math.nan), r"atypical\.mean .* finite"),
        ("head.bias", torch.zeros(2, dtype=torch.float64), r"head\.bias .* is torch\.float64; the network's is torch\.float32"),
        ("head.bias", torch.zeros(2, dtype=torch.int64), r"head\.bias .* is torch\.int64"),
    ],
)
def test_tensors_of_another_name_shape_or_kind_are_refused(bundle: Bundle, name: str, tensor: Tensor | None, says: str) -> None:
    loaded(bundle)
    with pytest.raises(InvalidBundleError, match=says):
        loaded(bundle, **{name: tensor})


def test_a_checkpoint_of_another_run_is_refused_and_says_of_what(bundle: Bundle, tmp_path: Path) -> None:
    def cut(*_: object) -> None:
        raise PowerCut

    studies = small_bundle.studies(bundle, 8)
    with pytest.raises(PowerCut):
        fit(bundle, studies, seed=1, folder=tmp_path, progress=cut)
    with pytest.raises(ValueError, match=r"with other data: bundle"):
        fit(bundle, studies[::-1], seed=1, folder=tmp_path)
    with pytest.raises(ValueError, match=r"with other bundle: bundle"):
        fit(with_training(bundle, dropout=0.2), studies, seed=1, folder=tmp_path)
    with pytest.raises(ValueError, match=r"with other seed: bundle"):
        fit(bundle, studies, seed=2, folder=tmp_path)
    with pytest.raises(ValueError, match=r"with other arguments: bundle"):
        fit(bundle, studies, seed=1, epochs=2, folder=tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"no checkpoint that can be read"):
        fit(bundle, studies, seed=1, folder=tmp_path)


#: A run in a process of its own: kill itself after an epoch, or write what each process came to.
RUN = """
import dataclasses, json, os, signal, sys
from pathlib import Path
import torch
from models.bundle import Bundle
from models.stages import processes
from models.table import digest
from models.training import fit
from tests.unit import small_bundle

torch.set_num_threads(1)
folder, out, kill_after, changes = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
bundle = Bundle.read(folder / "small", verify=False)
bundle = dataclasses.replace(bundle, training=dataclasses.replace(bundle.training, **changes))


def progress(epoch, epochs, loss):
    if epoch == kill_after:
        os.kill(os.getpid(), signal.SIGKILL)


result = fit(bundle, small_bundle.studies(bundle, 20), seed=1, folder=folder / "run", progress=progress)
found = {"weights": digest(result.network.state_dict()), "history": result.history}
(folder / f"{out}{processes()[0]}.json").write_text(json.dumps(found))
"""


def run(folder: Path, out: str, changes: Mapping[str, float], *, kill_after: int = 0, launcher: tuple[str, ...] = ()) -> int:
    script = folder / "run.py"
    script.write_text(RUN, "utf-8")
    command = [sys.executable, *launcher, str(script), str(folder), out, str(kill_after), json.dumps(changes)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, cwd=ROOT, check=False, timeout=120, capture_output=True).returncode


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_to_the_same_bits(bundle: Bundle, tmp_path: Path) -> None:
    assert run(tmp_path, "never", {}, kill_after=2) == -signal.SIGKILL
    assert (tmp_path / "run" / "checkpoint.pt").exists()
    studies = small_bundle.studies(bundle, 20)
    epochs: list[int] = []
    resumed = fit(bundle, studies, seed=1, folder=tmp_path / "run", progress=lambda epoch, *_: epochs.append(epoch))
    assert epochs == [3]
    assert weights(resumed) == weights(fit(bundle, studies, seed=1))


@pytest.mark.slow
def test_two_processes_learn_as_one_with_a_batch_twice_as_large(bundle: Bundle, tmp_path: Path) -> None:
    """Modalities and values are dropped, images moved, labels missing: all of it falls alike on any number of processes."""
    changes = {"dropout": 0.0, "shift": 0.1, "contrast": 0.1, "epochs": 2}
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert run(tmp_path, "rank", changes | {"batch": 4}, launcher=launcher) == 0
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    alone = fit(with_training(bundle, **changes), small_bundle.studies(bundle, 20), seed=1)
    for one, two in zip(alone.history, ranks[0]["history"], strict=True):
        assert one["train_loss"] == pytest.approx(two["train_loss"], abs=1e-4)
        assert one["validation_loss"] == pytest.approx(two["validation_loss"], abs=1e-4)


@given(st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=4, max_size=40), st.integers(0, 99))
def test_no_patient_is_on_both_sides_of_a_split(drawn: list[tuple[int, bool]], seed: int) -> None:
    studies = [Labeled({}, torch.tensor([float(ill)]), f"p{group}") for group, ill in [*drawn, (97, True), (98, False)]]
    train, held_out = split_groups(studies, share=0.2, seed=seed)
    assert {s.group for s in train}.isdisjoint({s.group for s in held_out})
    assert len(train) + len(held_out) == len(studies)
    assert train
    assert held_out


@pytest.mark.parametrize(("positives", "negatives", "expected"), [(2, 30, (1, 6)), (2, 2, (1, 1)), (1, 10, (0, 2)), (10, 10, (2, 2))])
def test_of_each_kind_of_patient_at_least_one_is_held_out_where_there_are_two(
    positives: int, negatives: int, expected: tuple[int, int]
) -> None:
    kinds = [1.0] * positives + [0.0] * negatives
    _, held_out = split_groups([Labeled({}, torch.tensor([kind]), f"p{i}") for i, kind in enumerate(kinds)], share=0.2, seed=0)
    found = [s.labels.item() for s in held_out]
    assert (found.count(1.0), found.count(0.0)) == expected


def test_one_patient_alone_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="1 group"):
        split_groups([Labeled({}, torch.tensor([1.0]), "p")] * 5, share=0.2, seed=0)


def test_an_overconfident_network_is_cooled_and_a_calibrated_one_left_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 1, generator=generator) * 2
    labels: Tensor = (torch.rand(4000, 1, generator=generator) < torch.sigmoid(logits)).float()
    assert fit_temperatures(logits, labels).item() == pytest.approx(1, abs=0.12)
    assert fit_temperatures(logits * 3, labels).item() == pytest.approx(3, abs=0.35)
    assert fit_temperatures(logits, torch.ones(4000, 1)).item() == 1
