"""Smaller networks: what they weigh, how far their answers move, and that an exported one answers the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from models import compression
from models.bundle import Bundle
from models.network import FusionNetwork
from models.tabular import HistoryEncoder
from models.text import TextEncoder
from models.training import Labeled, predict
from models.transforms import collate
from tests.unit import small_bundle


@pytest.fixture
def network(bundle: Bundle) -> FusionNetwork:
    torch.manual_seed(0)
    return FusionNetwork(bundle).eval()


@pytest.fixture
def studies(bundle: Bundle) -> list[Labeled]:
    return small_bundle.studies(bundle, 6)


@torch.no_grad()
def test_smaller_weights_move_the_answers_a_little_and_leave_the_network_as_it_was(
    network: FusionNetwork, bundle: Bundle, studies: list[Labeled]
) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    rows = {str(row["name"]): row for row in compression.compress(network, bundle, studies)}
    assert rows["float32"]["max_change"] == 0
    assert rows["float32"]["same_verdicts"] == 1
    for name in ("bfloat16", "int8"):
        assert 0 < float(str(rows[name]["max_change"])) < 0.05
        assert float(str(rows[name]["size_bytes"])) < 0.9 * float(str(rows["float32"]["size_bytes"]))
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


@torch.no_grad()
def test_a_changed_answer_is_seen_and_counted(network: FusionNetwork, bundle: Bundle, studies: list[Labeled]) -> None:
    other = FusionNetwork(bundle).eval()
    other.load_state_dict(network.state_dict())
    other.head.bias += torch.tensor([50.0, 0.0])  # type: ignore[operator]  # of the head of tokens
    found = compression.compare(network, other, studies, bundle)
    was = torch.sigmoid(predict(network, studies)[0])
    assert found["max_change"] == pytest.approx(float((1 - was[:, 0]).max()), abs=1e-4)
    assert found["same_verdicts"] == pytest.approx((1 + float((was[:, 0] >= 0.6).float().mean())) / 2)


def test_an_answer_that_is_no_number_is_compared_with_nothing_and_teaches_nothing(
    network: FusionNetwork, bundle: Bundle, studies: list[Labeled]
) -> None:
    with torch.no_grad():
        network.head.bias.fill_(torch.inf)  # type: ignore[operator]  # of the head of tokens
    with pytest.raises(ValueError, match="not a finite number"):
        compression.compress(network, bundle, studies)
    with pytest.raises(ValueError, match="not a finite number"):
        compression.distil(network, bundle, studies, seed=0, epochs=1)


def test_int8_weights_lie_within_half_a_step_of_their_row(network: FusionNetwork) -> None:
    held = dict(compression.to_int8(network).named_buffers())
    weight, step = held["text/embed/weight"], held["text/embed/weight/scale"]
    assert weight.dtype is torch.int8
    assert ((weight * step - network.state_dict()["text.embed.weight"]).abs() <= step / 2 + 1e-7).all()


def test_a_student_answers_as_its_teacher_from_the_image_alone(bundle: Bundle, network: FusionNetwork) -> None:
    """The teacher here rests on the image: what distilling can pass on. The labels are unknown, so all of it is the teacher's."""
    studies = []
    for index, one in enumerate(small_bundle.studies(bundle, 24)):
        image = 0.3 * one.sample["image"]
        image[:, : 3 + index % 6] += 0.6  # something to be seen: how far the bright part reaches
        studies.append(Labeled({**one.sample, "image": image}, one.labels * torch.nan, one.group))
    teacher = FusionNetwork(bundle, fusion="single:image").eval()
    with torch.no_grad():
        logits, _ = predict(teacher, studies)
        sharper = 2 / logits.std(0)  # so that its answers differ from one study to the next
        teacher.head.weight *= sharper[:, None]  # type: ignore[operator]
        teacher.head.bias -= logits.mean(0)  # type: ignore[operator]
        teacher.head.bias *= sharper
    student = compression.distil(teacher, bundle, studies, seed=1, epochs=60)
    again = compression.distil(teacher, bundle, studies, seed=1, epochs=60)
    assert student.modalities == ("image",)
    assert all(torch.equal(a, b) for a, b in zip(student.state_dict().values(), again.state_dict().values(), strict=True))
    wanted, found = (torch.sigmoid(predict(net, studies)[0]) for net in (teacher, student))
    assert (found - wanted).abs().mean() < 0.5 * (wanted.mean(0) - wanted).abs().mean()


def test_without_the_image_there_is_nothing_to_distil(bundle: Bundle, network: FusionNetwork, studies: list[Labeled]) -> None:
    blind = [Labeled({**s.sample, "image_mask": torch.tensor(False)}, s.labels, s.group) for s in studies]
    with pytest.raises(ValueError, match="No study has the image"):
        compression.distil(network, bundle, blind, seed=0)


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_a_padded_text_encoder_is_the_packed_one(kind: str) -> None:
    torch.manual_seed(0)
    packed = TextEncoder(64, 16, kind=kind, dropout=0.0).eval()  # type: ignore[arg-type]
    ids = torch.randint(1, 64, (4, 9, 3))
    for row, words in enumerate((9, 4, 1, 0)):
        ids[row, words:] = 0
    (wanted, mask), (found, same) = packed(ids), compression._PaddedText(packed)(ids)
    assert torch.equal(mask, same)
    torch.testing.assert_close(found[mask], wanted[mask])


def test_a_padded_history_is_the_packed_one_whatever_points_are_missing() -> None:
    torch.manual_seed(0)
    packed = HistoryEncoder(3, 8, kind="lstm", dropout=0.0).eval()
    points, mask = torch.randn(16, 7, 8), torch.rand(16, 7) > 0.4
    points = torch.where(mask[..., None], points, 0.0)
    wanted, found = packed._in_order(points, mask), compression._padded_history(packed, points, mask)
    torch.testing.assert_close(found[mask], wanted[mask])


@torch.no_grad()
def test_an_exported_program_answers_the_same_for_any_number_of_studies(
    network: FusionNetwork, studies: list[Labeled], tmp_path: Path
) -> None:
    batch = collate([s.sample for s in studies])
    compression.export_program(compression.exported(network, studies[0].sample), tmp_path / "network.pt2")
    program = torch.export.load(tmp_path / "network.pt2").module()
    for count in (1, 2, 6):
        tensors: list[Tensor] = [batch[key][:count] for key in sorted(batch)]
        torch.testing.assert_close(program(*tensors), network({key: t[:count] for key, t in batch.items()}), atol=1e-5, rtol=0)


@torch.no_grad()
def test_an_onnx_file_answers_the_same_in_another_runtime(network: FusionNetwork, studies: list[Labeled], tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    batch = collate([s.sample for s in studies])
    sample = studies[0].sample
    compression.export_onnx(compression.exported(network, sample), sample, tmp_path / "network.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "network.onnx")
    (logits,) = session.run(None, {one.name: batch[one.name].numpy() for one in session.get_inputs()})
    torch.testing.assert_close(torch.from_numpy(logits), network(batch), atol=1e-4, rtol=0)
