"""What one answer is made from, and the answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from worker.domain.images import Series
from worker.domain.record import Code

Verdict = Literal["positive", "negative", "uncertain"]


@dataclass(frozen=True, slots=True)
class UsedValue:
    """A value the network was given, and where it came from: who said it, in which message (its control ID, which the sender knows too).

    `age_h` is hours before the study, negative after it.
    """

    name: str
    code: Code
    value: float
    comparator: str
    unit: str
    at: datetime
    source: str
    age_h: float = 0.0
    message: str = ""


@dataclass(frozen=True, slots=True)
class UsedHistory:
    """How one value went before the study: every point the network was given, oldest first."""

    name: str
    code: Code
    points: tuple[UsedValue, ...]


@dataclass(frozen=True, slots=True)
class UsedText:
    """A text the network was given."""

    name: str
    code: Code
    text: str
    at: datetime
    source: str
    message: str = ""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What one prediction is made from: the chosen series and the record's view at the study.

    ``series`` is by image name, in the bundle's order; ``missing_images`` names the images without one.
    ``missing_causes`` says, entry by entry, why each code of ``missing`` is missing.
    """

    series: Mapping[str, Series]
    values: tuple[UsedValue, ...] = ()
    texts: tuple[UsedText, ...] = ()
    missing: tuple[Code, ...] = ()
    record_found: bool = False
    missing_causes: tuple[str, ...] = ()
    histories: tuple[UsedHistory, ...] = ()
    missing_images: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Saliency:
    """Where in one image a finding comes from; equal only to itself, as arrays are.

    ``array`` (K, J, I) of a volume, (rows, columns) of a radiograph or (T, rows, columns) of a clip, float16 or float32, in [0, 1].
    ``affine``: (4, 4), index (i, j, k, 1) of `array` → LPS mm. Without patient coordinates (row, column, 1) → row and column of a
    radiograph (3, 3), (t, row, column, 1) → frame, row and column of a clip (4, 4).
    """

    array: NDArray[np.floating]
    affine: NDArray[np.float64] | None
    image: str
    sop_instance_uids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Finding:
    """One coded answer of the network: how probable, what that means, what it rests on.

    ``shapley`` holds each modality's exact share of the log-odds ("image", "values", "text"), ``attributions`` that of each
    used value and text by its name. ``is_atypical``: the study is unlike those the network learned from.
    """

    name: str
    code: Code
    probability: float
    threshold: float
    verdict: Verdict
    shapley: Mapping[str, float] = field(default_factory=dict)
    attributions: Mapping[str, float] = field(default_factory=dict)
    is_atypical: bool = False
    saliency: tuple[Saliency, ...] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Document:
    """An object we authored: encoded DICOM, ready to be sent as it is."""

    sop_instance_uid: str
    sop_class_uid: str
    kind: str
    data: bytes
    predecessor_uid: str = ""


@dataclass(frozen=True, slots=True)
class CommitmentRequest:
    """What a sender asks us to keep (PS3.4 §J.3.2): SOP class and instance UID of each instance."""

    transaction_uid: str
    instances: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class CommitmentReport:
    """What an archive says of the instances of one transaction (PS3.4 §J.3.3): those it keeps, and why not the others."""

    transaction_uid: str
    committed: frozenset[str]
    failed: Mapping[str, int]
