"""What a bundle says, as plain values: which images, which facts of the record, which findings, which network.

Everything here is configuration; nothing is code. Reading it from TOML is bundle.py's, and needs no torch:
processes without a network can ask what a bundle wants.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from models.image_spec import ImageSpec as ImageSpec
from models.image_spec import broken_image

#: How much a study needs of its record: what is there, what is worth waiting for, what it is not analysed without.
Need = Literal["optional", "wanted", "required"]

#: Least and greatest value of numbers that have one; a greatest one that no network needs keeps a slip of the pen from taking all memory.
NETWORK_RANGES: Final = {
    "width": (1, 8192),
    "heads": (1, 256),
    "layers": (1, 256),
    "bins": (1, 1024),
    "steps": (1, 2**16),
    "words": (1, 2**16),
    "buckets": (2, 2**24),
    "variants": (1, 2**16),
}
#: "validation" and "learning_rate" are above 0, "average" and what is dropped below 1.
TRAINING_RANGES: Final = {
    "epochs": (1, 10**6),
    "batch": (1, 10**6),
    "learning_rate": (1e-12, 1e3),
    "fusion_epochs": (0, 10**6),
    "weight_decay": (0, 1e3),
    "drop_modality": (0, 1),
    "drop_value": (0, 1),
    "auxiliary": (0, 1e6),
    "dropout": (0, 0.99),
    "patience": (1, 10**6),
    "average": (0, 0.999999),
    "validation": (1e-6, 0.99),
    "positive_weight": (0, 1e6),
    "copies": (0, 1000),
    "shift": (0, 1),
    "zoom": (0, 0.99),
    "rotate_deg": (0, 180),
    "contrast": (0, 1),
}


@dataclass(frozen=True, slots=True)
class Code:
    """A coded concept; in TOML ``["1988-5", "LN", "C reactive protein"]``, the meaning may be left out of synonyms."""

    value: str
    scheme: str
    meaning: str = ""


@dataclass(frozen=True, slots=True)
class ValueSpec:
    """One laboratory value the network can use.

    `conversions` maps a foreign unit to the factor that turns it into `unit` (UCUM); units of the same kind are converted anyway.
    Outside `plausible` (in `unit`) a value is taken as missing. `need`: a study waits for what is "wanted" as long as the record's
    `wait_s`; without what is "required" it is not analysed even then, and the report says so.
    """

    name: str
    code: Code
    unit: str
    plausible: tuple[float, float]
    synonyms: tuple[Code, ...] = ()
    conversions: Mapping[str, float] = field(default_factory=dict)
    transform: Literal["none", "log"] = "none"
    need: Need = "optional"


@dataclass(frozen=True, slots=True)
class TextSpec:
    """One kind of text the network can read.

    `kind` "note" is words; "variants" a list of variant or cluster codes; "expression" numbers by gene, ``TP53=1.2;EGFR=0.3``, of
    which those of `genes` are read. `attribute` takes the text from the images instead of the record.
    """

    name: str
    code: Code
    synonyms: tuple[Code, ...] = ()
    kind: Literal["note", "variants", "expression"] = "note"
    genes: tuple[str, ...] = ()
    attribute: Literal["", "StudyDescription", "SeriesDescription"] = ""
    need: Need = "optional"


@dataclass(frozen=True, slots=True)
class RecordRule:
    """What the network wants of the patient's record, how far back and how long after the study, and how long a study waits for it.

    `values` are the latest of each, `histories` all of each in their own look-back, oldest first. `pull`: the site's FHIR server is
    asked anew just before.
    """

    wait_s: float
    look_back_h: float
    horizon_h: float = 0.0
    history_h: float = 0.0
    values: tuple[ValueSpec, ...] = ()
    histories: tuple[ValueSpec, ...] = ()
    texts: tuple[TextSpec, ...] = ()
    pull: bool = False

    @property
    def record_texts(self) -> tuple[TextSpec, ...]:
        """The texts that are not of the images."""
        return tuple(text for text in self.texts if not text.attribute)

    @property
    def notes(self) -> tuple[TextSpec, ...]:
        """The texts that are words."""
        return tuple(text for text in self.texts if text.kind == "note")

    @property
    def genomics(self) -> tuple[TextSpec, ...]:
        """The texts that are variants or expression."""
        return tuple(text for text in self.texts if text.kind != "note")

    @property
    def genes(self) -> tuple[str, ...]:
        """Every gene whose expression is read, in order."""
        return tuple(dict.fromkeys(gene for text in self.texts for gene in text.genes))


@dataclass(frozen=True, slots=True)
class PatientRule:
    """Whom the bundle is meant for; an empty tuple means anybody. `unknown` decides for those whose age or sex nobody says.

    `age_years` are the least and the greatest age in full years at the study: [18, 120] holds who is 18 that day.
    """

    age_years: tuple[float, ...] = ()
    sexes: tuple[Literal["F", "M", "O"], ...] = ()
    unknown: Literal["accept", "refuse"] = "accept"


@dataclass(frozen=True, slots=True)
class FindingSpec:
    """One answer: positive from `threshold`, negative below `negative_below` (by default the same), uncertain between.

    `temperature` divides the logit; training sets it on studies the network did not learn from. `alpha` is the share of
    truly positive patients called negative, and the reverse, that the two thresholds were chosen to keep to; 0: no such claim.
    `critical`: where it is positive, its documents go before others and people are notified.
    """

    name: str
    code: Code
    threshold: float
    negative_below: float | None = None
    temperature: float = 1.0
    alpha: float = 0.0
    critical: bool = False


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """The network's shape: with other numbers than these the weights fit no more."""

    #: Numbers in a token, divisible by `heads`.
    width: int
    #: Heads of each attention.
    heads: int
    #: Layers of self-attention in ``fusion = "tokens"``; other fusions get as many parameters.
    layers: int
    #: A name of ``fusion.FUSIONS``, or ``single:<modality>``.
    fusion: str = "tokens"
    #: How a value becomes a token.
    values: Literal["piecewise", "periodic"] = "piecewise"
    #: Whether a value's token also says how many hours before the study it was taken.
    value_age: bool = False
    #: What reads the points of value histories.
    history: Literal["lstm", "transformer"] = "lstm"
    #: What reads words.
    text: Literal["gru", "lstm", "bert"] = "gru"
    #: Folder of a Hugging Face encoder beside bundle.toml, for ``text = "bert"`` and only for it.
    bert: str = ""
    #: Bins (piecewise) or frequencies (periodic) of each value.
    bins: int = 8
    #: Points read of all value histories together, the latest.
    steps: int = 32
    #: Words (BERT: pieces of words) read of a text, the first.
    words: int = 96
    #: Numbers that hashed words and variant codes share; the first means none.
    buckets: int = 4096
    #: Variant codes read.
    variants: int = 32


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """How the weights are learned: all that `fit` takes besides the data, the seed and the device."""

    #: Passes over the studies, at most, of each stage.
    epochs: int
    #: Studies in one step of one process.
    batch: int
    #: Of AdamW, at its highest: it rises over the first twentieth of the steps and falls as a cosine.
    learning_rate: float
    #: "joint" learns encoders and fusion together; "frozen" learns each image's encoder alone first, keeps it, and then the rest on
    #: its tokens: for small cohorts.
    stages: Literal["joint", "frozen"] = "joint"
    #: Epochs, at most, of the fusion on frozen encoders; 0: as `epochs`.
    fusion_epochs: int = 0
    #: Of AdamW, on matrices only.
    weight_decay: float = 0.05
    #: Chance that a modality is hidden from the fusion in a step.
    drop_modality: float = 0.3
    #: Chance that a present value is hidden in a step.
    drop_value: float = 0.15
    #: Weight of the loss of each modality alone, beside 1 of the fusion's.
    auxiliary: float = 0.3
    #: Chance that a number inside the network is zeroed in a step.
    dropout: float = 0.1
    #: Epochs without a lower held-out loss after which a stage ends.
    patience: int = 10
    #: Share of the averaged weights that stays in each step; the rest is of the new weights.
    average: float = 0.98
    #: Share of the groups held out to choose the epoch and the temperatures.
    validation: float = 0.2
    #: The highest weight of a positive; below it, negatives per positive.
    positive_weight: float = 1.0
    #: Changed versions of each image beside itself whose tokens are kept for the fusion on frozen encoders.
    copies: int = 1
    #: Largest move of an image, as a share of its field of view.
    shift: float = 0.0
    #: Largest change of an image's scale, each axis apart, as a share of 1.
    zoom: float = 0.0
    #: Largest turn of an image in the plane of its first two axes, in degrees.
    rotate_deg: float = 0.0
    #: Largest change of an image's contrast, as a share of 1.
    contrast: float = 0.0


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """Where the tensors are, and what they must hash to; `bert_sha256` is of the folder that `network.bert` names."""

    file: str
    sha256: str
    bert_sha256: str = ""


def broken_rules(
    images: Sequence[ImageSpec],
    record: RecordRule,
    findings: Sequence[FindingSpec],
    network: NetworkConfig,
    training: TrainingConfig,
    weights: WeightsFile,
    patients: PatientRule,
) -> list[str]:
    """What a bundle says that cannot be, each as "key: the rule"; types are right already, NaN keeps no rule."""
    values = (*record.values, *record.histories)
    asked: tuple[ValueSpec | TextSpec, ...] = (*values, *record.texts)
    hours = {"wait_s": record.wait_s, "look_back_h": record.look_back_h, "horizon_h": record.horizon_h, "history_h": record.history_h}
    rules = {
        "findings: at least one is needed": bool(findings),
        "findings: names must differ": _differ(f.name for f in findings),
        "record.values: names must differ": _differ(v.name for v in record.values),
        "record.histories: names must differ": _differ(v.name for v in record.histories),
        "record.texts: names must differ": _differ(t.name for t in record.texts),
        **{f"record.{key} must be finite and not negative": 0 <= hour < math.inf for key, hour in hours.items()},
        "record.history_h must be above 0 where there are histories": not record.histories or record.history_h > 0,
        "record.wait_s must be above 0 where something is wanted: wanted is what a study waits for": record.wait_s > 0
        or all(one.need != "wanted" for one in asked),
        "record.texts: need belongs to the record, a text of the images does not come later": all(
            t.need == "optional" or not t.attribute for t in record.texts
        ),
        "record: conversions must be above 0": all(times > 0 for v in values for times in v.conversions.values()),
        "record.texts: genes belong to kind expression, and it needs some": all(
            (t.kind == "expression") == bool(t.genes) for t in record.texts
        ),
        "findings.threshold must lie in (0, 1]": all(0 < f.threshold <= 1 for f in findings),
        "findings.negative_below must lie in [0, threshold]; it must not exceed threshold": all(
            f.negative_below is None or 0 <= f.negative_below <= f.threshold for f in findings
        ),
        "findings.temperature must be positive and finite": all(0 < f.temperature < math.inf for f in findings),
        "findings.alpha must lie in [0, 0.5)": all(0 <= f.alpha < 0.5 for f in findings),
        "record: plausible must be [low, high]": all(v.plausible[0] < v.plausible[1] for v in values),
        "record: plausible must be above 0 for a log transform": all(v.transform == "none" or v.plausible[0] > 0 for v in values),
        "record: conversions must be positive and finite": all(0 < factor < math.inf for v in values for factor in v.conversions.values()),
        "network.bert must name a folder beside bundle.toml, for text bert and only for it": (network.text == "bert") == bool(network.bert)
        and _is_plain(network.bert or "-"),
        "weights.file must be a plain file name that ends in .safetensors": _is_plain(weights.file)
        and weights.file.endswith(".safetensors"),
        "images: at least one is needed, and one must be required": any(i.required for i in images),
        "images: names must differ": _differ(i.name for i in images),
        "patients.age_years must be [least, greatest]": not patients.age_years
        or (len(patients.age_years) == 2 and 0 <= patients.age_years[0] <= patients.age_years[1] <= 150),
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    broken += _beyond("network", network, NETWORK_RANGES) + _beyond("training", training, TRAINING_RANGES)
    if network.heads >= 1 and network.width % network.heads:
        broken.append("network.width must divide by heads")
    for index, image in enumerate(images):
        broken += [f"images {image.name}: {rule}" for rule in broken_image(image, images[:index])]
    return broken


def _beyond(table: str, config: NetworkConfig | TrainingConfig, ranges: Mapping[str, tuple[float, float]]) -> list[str]:
    held = {name: (getattr(config, name), low, high) for name, (low, high) in ranges.items()}
    return [f"{table}.{name} must lie from {low:g} to {high:g}" for name, (value, low, high) in held.items() if not low <= value <= high]


def _is_plain(name: str) -> bool:
    return name not in ("", ".", "..") and name.isprintable() and not {"/", "\\"} & set(name)


def _differ(names: Iterable[str]) -> bool:
    found = list(names)
    return len(set(found)) == len(found)
