"""A bundle small enough to train in a second, for the tests of models/ and infer.py."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import torch

from models.bundle import Bundle
from models.training import Labeled
from models.transforms import text_ids, value_tensors

TOML: Final = """
[bundle]
name = "small"
version = "1.0.0"
title = "A small bundle"
intended_use = "Tests."
quality_statement = "None."
license = "Apache-2.0"
authors = ["Tests"]
research_use = true
procedure = ["25045-6", "LN", "CT unspecified body region"]

[[images]]
name = "image"
kind = "volume"
modalities = ["CT"]
size = [12, 10, 8]
spacing_mm = [2, 2, 3]
window_hu = [-1000, 400]
grid = 2
channels = [4, 8]

[record]
wait_s = 1
look_back_h = 24

[[record.values]]
name = "crp"
code = ["1988-5", "LN", "C reactive protein"]
unit = "mg/L"
conversions = { "mg/dL" = 10.0 }
plausible = [0.01, 1000]
transform = "log"

[[record.values]]
name = "ph"
code = ["2744-1", "LN", "pH of Arterial blood"]
unit = "[pH]"
plausible = [6.5, 8]

[[record.texts]]
name = "note"
code = ["34109-9", "LN", "Note"]

[[findings]]
name = "ill"
code = ["ILL", "99TEST", "Ill"]
threshold = 0.6
negative_below = 0.4
temperature = 1.0

[[findings]]
name = "rare"
code = ["RARE", "99TEST", "Rare"]
threshold = 0.5
temperature = 1.0

[network]
width = 16
heads = 2
layers = 1
bins = 4
words = 12
buckets = 64

[training]
epochs = 3
batch = 8
learning_rate = 0.01

[weights]
file = "weights.safetensors"
sha256 = ""
"""

#: Its one image, as it stands there.
IMAGE: Final = TOML[TOML.index("[[images]]") : TOML.index("\n[record]")]


def write(folder: Path, toml: str = TOML) -> Path:
    """Write bundle.toml alone into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bundle.toml").write_text(toml, "utf-8")
    return folder


def studies(bundle: Bundle, n: int, *, seed: int = 0) -> list[Labeled]:
    """`n` studies of n / 2 patients; "ill" is written in the CRP, "rare" is mostly unlabeled."""
    rng = np.random.default_rng(seed)
    result = []
    for index in range(n):
        ill = int(rng.integers(2))
        values = {"crp": (float(np.exp(rng.normal(5 if ill else 1, 0.5))), "", 2.0), "ph": (7.4, "<", 1.0)}
        sample = {
            "image": torch.from_numpy(rng.random((1, 12, 10, 8), dtype=np.float32)),
            "image_mask": torch.tensor(True),
            **value_tensors(values, bundle.record.values),
            "words": text_ids("a short note about nothing" if index % 3 else "", bundle.network),
        }
        rare = float("nan") if index % 4 else float(ill)
        result.append(Labeled(sample, torch.tensor([float(ill), rare]), f"p{index // 2}"))
    return result
