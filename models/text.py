"""Texts to tokens: hashed words through a GRU or LSTM, or a BERT-type encoder from a folder on this disk.

::

    (B, T, K) ids of pieces ─ mean of a word's pieces ─ GRU | LSTM both ways ─▶ (B, T', d) and mask
    (B, T) ids of a tokenizer, mask ─ frozen BERT ─ linear ─▶ (B, T, d) and mask

Hashed ids are made in transforms.py. Nothing is ever downloaded and no code of the folder is run.
Shapes: B batch, T words, K pieces of a word, d width.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Self

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class TextEncoder(nn.Module):
    """Words as the mean of their hashed pieces, then a GRU or LSTM in both directions."""

    def __init__(self, buckets: int, width: int, *, kind: Literal["gru", "lstm"] = "gru", dropout: float) -> None:
        super().__init__()
        if kind not in ("gru", "lstm"):
            raise ValueError(f"There is no text encoder {kind!r}; there are gru and lstm.")
        self.kind = kind
        self.embed = nn.Embedding(buckets, width, padding_idx=0)
        if kind == "gru":
            self.gru = nn.GRU(width, width // 2, batch_first=True, bidirectional=True)
        else:
            self.lstm = nn.LSTM(width, width // 2, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, K) ids → (B, T', d) and mask (B, T'); words stand at the front, T' is the longest text here."""
        longest = int((ids[..., 0] > 0).sum(1).max().clamp(min=1))
        ids = ids[:, :longest]
        pieces = (ids > 0).sum(-1)  # (B, T')
        mask = pieces > 0
        words = self.dropout(self.embed(ids).sum(2) / pieces.clamp(min=1)[..., None])  # (B, T', d)
        # Packed, so that the backward direction starts at the last word, not in the padding.
        lengths = mask.sum(1).clamp(min=1).cpu()
        packed = pack_padded_sequence(words, lengths, batch_first=True, enforce_sorted=False)
        recurrent = self.gru if self.kind == "gru" else self.lstm
        states, _ = pad_packed_sequence(recurrent(packed)[0], batch_first=True, total_length=longest)
        return states, mask


class BertEncoder(nn.Module):
    """A Hugging Face encoder (BERT, ModernBERT and their like) out of a local folder, then one linear layer to the width.

    Unless `frozen` is off it learns nothing, never drops out, and stays out of the state dict: its weights are the folder's.

    Raises
    ------
    ValueError
        The package transformers or a file is missing, or the folder holds something else than a safetensors encoder.
    """

    def __init__(self, folder: Path, width: int, *, dropout: float, frozen: bool = True) -> None:
        super().__init__()
        self.frozen = frozen
        language = _load(folder)
        self.language: nn.Module = language
        self.project = nn.Linear(int(language.config.hidden_size), width)
        self.dropout = nn.Dropout(dropout)
        if frozen:
            self.language.requires_grad_(False).eval()
            self.register_state_dict_post_hook(_leave_out)  # type: ignore[no-untyped-call]  # of torch
            self.register_load_state_dict_post_hook(_not_missing)  # type: ignore[no-untyped-call]  # of torch

    def train(self, mode: bool = True) -> Self:
        """Switch dropout on or off; a frozen encoder's own stays off."""
        super().train(mode)
        if self.frozen:
            self.language.eval()
        return self

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T) ids of `bert_ids` and their mask → (B, T, d) and the mask."""
        # Attention over nothing is NaN in some versions: an absent text looks at its first place, which is masked after.
        first = torch.zeros_like(mask)
        first[:, 0] = True
        seen = mask | (first & ~mask.any(1, keepdim=True))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            states = self.language(input_ids=torch.where(mask, ids, 0), attention_mask=seen.long()).last_hidden_state  # (B, T, h)
        tokens = self.project(self.dropout(states))
        return torch.where(mask[..., None], tokens, 0.0), mask


def bert_ids(text: str, folder: Path, *, words: int) -> tuple[Tensor, Tensor]:
    """Make ids (T,) and mask (T,), T = `words` pieces, with the tokenizer of `folder`; of a longer text the start is read.

    A blank text has an empty mask, not one of two special tokens: it is absent.
    """
    tokenizer = _tokenizer(folder)
    coded = tokenizer(text.strip(), truncation=True, max_length=words, padding="max_length", return_tensors="pt")
    mask = coded["attention_mask"][0].bool() & bool(text.strip())
    return coded["input_ids"][0], mask


def _load(folder: Path) -> Any:
    transformers = _transformers()
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"The BERT folder {folder.name} holds no .safetensors file; convert its weights, other kinds are never opened.")
    transformers.utils.logging.disable_progress_bar()
    try:
        model, info = transformers.AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, SafetensorError) as exc:
        raise ValueError(f"The BERT folder {folder.name} cannot be loaded: {exc}") from exc
    # What the file does not hold is drawn at random: harmless in the pooler, which is not used, and nowhere else.
    if lacking := sorted(key for key in (*info["missing_keys"], *info["mismatched_keys"]) if not str(key).startswith("pooler.")):
        raise ValueError(
            f"The weights of the BERT folder {folder.name} lack {lacking[0]} and {len(lacking) - 1} more, or hold them in another shape."
        )
    return model


@lru_cache(maxsize=4)
def _tokenizer(folder: Path) -> Any:
    transformers = _transformers()
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt", "vocab.json")):
        raise ValueError(
            f"The BERT folder {folder.name} holds no tokenizer.json and no vocab.txt; copy them from where its weights came from."
        )
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as exc:
        raise ValueError(f"The tokenizer of the BERT folder {folder.name} cannot be loaded: {exc}") from exc


def _transformers() -> ModuleType:
    """The optional package: a second of import, so only where a bundle asks for it."""
    try:
        return import_module("transformers")
    except ImportError as exc:
        raise ValueError('A BERT-type text encoder needs the package transformers: say pip install "synoptic[text]".') from exc


def _leave_out(_module: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: object) -> None:
    for name in [key for key in state if key.startswith(f"{prefix}language.")]:
        del state[name]


def _not_missing(module: nn.Module, keys: Any) -> None:
    own = tuple(f"language.{name}" for name in module.get_submodule("language").state_dict())
    keys.missing_keys[:] = [key for key in keys.missing_keys if not key.endswith(own)]
