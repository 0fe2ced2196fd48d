"""Words through an own small network, or through a BERT-type encoder of which nothing is downloaded or run."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import nn

from models.text import BertEncoder, TextEncoder, bert_ids

torch.set_num_threads(1)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cough", "and", "fever", "since", "friday", "no", "##s"]


@pytest.fixture(params=["gru", "lstm"])
def encoder(request: pytest.FixtureRequest) -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(64, 16, kind=request.param, dropout=0.5).eval()


def notes(words: int = 7) -> torch.Tensor:
    """Ids (4, T, 3) of notes of 7, 3, 0 and 1 words."""
    ids = torch.randint(1, 64, (4, words, 3), generator=torch.Generator().manual_seed(1))
    for row, length in enumerate((7, 3, 0, 1)):
        ids[row, length:] = 0
    ids[:, :, 2][torch.rand(4, words, generator=torch.Generator().manual_seed(2)) > 0.5] = 0
    return ids


@torch.inference_mode()
def test_each_word_becomes_a_token_and_a_note_without_words_has_none(encoder: TextEncoder) -> None:
    tokens, mask = encoder(notes())
    assert tokens.shape == (4, 7, 16)
    assert mask.sum(1).tolist() == [7, 3, 0, 1]
    assert tokens.isfinite().all()
    assert encoder(torch.zeros(2, 5, 3, dtype=torch.long))[1].any().item() is False


@torch.inference_mode()
def test_a_note_is_read_alike_alone_in_company_and_with_more_padding(encoder: TextEncoder) -> None:
    tokens, mask = encoder(notes())
    padded, longer_mask = encoder(torch.cat([notes(), torch.zeros(4, 5, 3, dtype=torch.long)], dim=1))
    assert torch.equal(tokens, padded)
    assert torch.equal(mask, longer_mask)
    for row, length in enumerate((7, 3, 0, 1)):
        alone, _ = encoder(notes()[row : row + 1])
        assert torch.allclose(alone[0, :length], tokens[row, :length], atol=1e-6)


@torch.inference_mode()
def test_the_order_of_words_counts_in_both_directions(encoder: TextEncoder) -> None:
    ids = notes()[:1]
    turned = encoder(ids.flip(1))[0].flip(1)
    assert not torch.allclose(encoder(ids)[0], turned, atol=1e-3)
    last = ids.clone()
    last[:, -1] = 1 + last[:, -1] % 63
    assert (encoder(last)[0][:, 0] - encoder(ids)[0][:, 0]).abs().max() > 0, "the first word knows of the last"


def test_every_parameter_of_the_text_encoder_gets_a_gradient(encoder: TextEncoder) -> None:
    tokens, mask = encoder(notes())
    tokens[mask].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in encoder.parameters())


def test_the_text_encoder_keeps_the_names_that_weights_were_saved_under() -> None:
    assert {name.split(".")[0] for name in TextEncoder(8, 4, dropout=0.0).state_dict()} == {"embed", "gru"}
    assert {name.split(".")[0] for name in TextEncoder(8, 4, kind="lstm", dropout=0.0).state_dict()} == {"embed", "lstm"}


def test_an_unknown_kind_of_text_encoder_is_refused() -> None:
    kind: Any = "elmo"
    with pytest.raises(ValueError, match="no text encoder 'elmo'"):
        TextEncoder(8, 4, kind=kind, dropout=0.0)


# --- BERT ---


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A random BERT of two layers and twelve words; whoever opens a connection from now on fails."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(socket.socket, "connect", _no_network)
    monkeypatch.setattr(socket, "getaddrinfo", _no_network)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_position_embeddings=32
    )
    path = tmp_path / "bert"
    transformers.BertModel(config).save_pretrained(path)
    (path / "vocab.txt").write_text("\n".join(WORDS), "utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True}), "utf-8")
    return path


def _no_network(*_: object, **__: object) -> NoReturn:
    raise AssertionError("Something opened a connection.")


def batch(folder: Path, *texts: str, words: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = [bert_ids(text, folder, words=words) for text in texts]
    return torch.stack([ids for ids, _ in pairs]), torch.stack([mask for _, mask in pairs])


def test_the_folders_own_tokenizer_makes_the_ids_and_a_blank_text_is_absent(folder: Path) -> None:
    ids, mask = bert_ids("Fevers and COUGH", folder, words=8)
    assert [WORDS[i] for i in ids] == ["[CLS]", "fever", "##s", "and", "cough", "[SEP]", "[PAD]", "[PAD]"]
    assert mask.tolist() == [True] * 6 + [False] * 2
    assert bert_ids(" \n", folder, words=8)[1].any().item() is False
    cut, whole = bert_ids("no " * 50, folder, words=8)
    assert cut.shape == (8,)
    assert whole.all()


@torch.inference_mode()
def test_a_text_is_read_alike_alone_in_company_and_with_more_padding_whatever_lies_there(folder: Path) -> None:
    encoder = BertEncoder(folder, 12, dropout=0.5).eval()
    ids, mask = batch(folder, "cough and fever since friday", "no cough", "")
    tokens, returned = encoder(ids, mask)
    assert tokens.shape == (3, 10, 12)
    assert torch.equal(returned, mask)
    assert tokens.isfinite().all()
    assert torch.equal(tokens[~mask], torch.zeros_like(tokens[~mask]))
    assert torch.equal(tokens, encoder(torch.where(mask, ids, 10**6), mask)[0]), "garbage behind the last word"
    longer, _ = encoder(*batch(folder, "cough and fever since friday", "no cough", "", words=20))
    assert torch.allclose(longer[:, :10], tokens, atol=1e-5)
    assert torch.allclose(encoder(ids[1:2], mask[1:2])[0][0], tokens[1], atol=1e-5)
    assert not torch.allclose(tokens[0, 1], tokens[1, 2], atol=1e-3), "cough in another sentence"


def test_the_states_are_those_of_the_library(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    encoder = BertEncoder(folder, 12, dropout=0.0).eval()
    ids, mask = batch(folder, "cough and fever", words=5)
    assert mask.all()
    model = transformers.BertModel.from_pretrained(folder, local_files_only=True).eval()
    with torch.no_grad():
        expected = encoder.project(model(input_ids=ids).last_hidden_state)
        assert torch.allclose(encoder(ids, mask)[0], expected, atol=1e-5)


def test_a_frozen_encoder_learns_nothing_and_drops_nothing_but_its_projection_learns(folder: Path) -> None:
    encoder = BertEncoder(folder, 12, dropout=0.0).train()
    ids, mask = batch(folder, "cough and fever", "no cough")
    assert torch.equal(encoder(ids, mask)[0], encoder(ids, mask)[0]), "BERT's own dropout is off"
    encoder(ids, mask)[0].square().sum().backward()
    assert {name for name, p in encoder.named_parameters() if p.requires_grad} == {"project.weight", "project.bias"}
    assert encoder.project.weight.grad is not None
    assert all(p.grad is None for p in encoder.language.parameters())
    free = BertEncoder(folder, 12, dropout=0.0, frozen=False).train()
    free(ids, mask)[0].square().sum().backward()
    assert free.get_parameter("language.encoder.layer.0.attention.self.query.weight").grad is not None


def test_frozen_weights_stay_in_their_folder_and_the_rest_loads_strictly(folder: Path) -> None:
    """Half a gigabyte that the folder's digest covers need not be in the bundle's weights once more."""
    network = nn.ModuleDict({"text": BertEncoder(folder, 12, dropout=0.0), "other": nn.Linear(2, 2)})
    state = network.state_dict()
    assert set(state) == {"text.project.weight", "text.project.bias", "other.weight", "other.bias"}
    second = nn.ModuleDict({"text": BertEncoder(folder, 12, dropout=0.0), "other": nn.Linear(2, 2)})
    second.load_state_dict(state)
    ids, mask = batch(folder, "cough and fever")
    assert torch.equal(second["text"](ids, mask)[0], network["text"](ids, mask)[0])
    del state["text.project.bias"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "text.project.bias"'):
        second.load_state_dict(state)
    assert any("language" in name for name in BertEncoder(folder, 12, dropout=0.0, frozen=False).state_dict())


def test_pickled_weights_are_never_opened(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04would run")
    with pytest.raises(ValueError, match=r"bert holds no \.safetensors file"):
        BertEncoder(folder, 12, dropout=0.0)


def test_code_that_comes_with_the_folder_is_never_run(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config |= {"model_type": "made_up", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    (folder / "evil.py").write_text("raise SystemExit('run')\n", "utf-8")
    with pytest.raises(ValueError, match="bert cannot be loaded"):
        BertEncoder(folder, 12, dropout=0.0)
    assert not any(name.endswith("evil") for name in sys.modules)


def test_weights_that_lack_a_layer_are_refused_not_drawn_at_random(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}), "utf-8")
    with pytest.raises(ValueError, match=r"bert lack encoder\.layer\.2"):
        BertEncoder(folder, 12, dropout=0.0)


def test_a_missing_folder_tokenizer_or_package_is_said_in_a_sentence(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"nowhere holds no \.safetensors file"):
        BertEncoder(tmp_path / "nowhere", 12, dropout=0.0)
    with pytest.raises(ValueError, match=r"nowhere holds no tokenizer\.json"):
        bert_ids("cough", tmp_path / "nowhere", words=4)
    (folder / "model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(ValueError, match="bert cannot be loaded"):
        BertEncoder(folder, 12, dropout=0.0)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="bert cannot be loaded"):
        BertEncoder(folder, 12, dropout=0.0)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r'say pip install "synoptic\[text\]"'):
        BertEncoder(folder, 12, dropout=0.0)
