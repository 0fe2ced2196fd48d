"""What a bundle is: a folder of configuration and weights, read strictly, executed never.

::

    bundles/<name>/
    ├── bundle.toml            everything below, as plain values; unknown or missing keys are errors
    ├── weights.safetensors    tensors only; its sha256 stands in bundle.toml
    ├── LICENSE
    └── README.md              the card: what it was trained on, what it can and cannot do

Not here: the network (fusion.py) and how its inputs are made (transforms.py). Reading a bundle needs the
standard library alone, so that processes without torch can ask what a bundle wants; only
`Bundle.tensors` opens safetensors and torch.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


class InvalidBundleError(ValueError):
    """A bundle's folder, metadata or weights are not what they should be; the message names file and key."""


@dataclass(frozen=True, slots=True)
class Code:
    """A coded concept; in TOML ``["1988-5", "LN", "C reactive protein"]``, the meaning may be left out of synonyms."""

    value: str
    scheme: str
    meaning: str = ""


@dataclass(frozen=True, slots=True)
class SeriesRule:
    """Which series the network reads; an empty tuple allows any."""

    kind: Literal["volume", "radiograph"]
    modalities: tuple[str, ...]
    body_parts: tuple[str, ...] = ()
    exclude_descriptions: tuple[str, ...] = ()
    views: tuple[str, ...] = ()
    min_instances: int = 1
    required: int = 1


@dataclass(frozen=True, slots=True)
class ValueSpec:
    """One laboratory value the network can use.

    `conversions` maps a foreign unit to the factor that turns it into `unit` (UCUM). Outside
    `plausible` (in `unit`) a value is taken as missing.
    """

    name: str
    code: Code
    unit: str
    plausible: tuple[float, float]
    synonyms: tuple[Code, ...] = ()
    conversions: Mapping[str, float] = field(default_factory=dict)
    transform: Literal["none", "log"] = "none"


@dataclass(frozen=True, slots=True)
class TextSpec:
    """One kind of text the network can read."""

    name: str
    code: Code
    synonyms: tuple[Code, ...] = ()


@dataclass(frozen=True, slots=True)
class RecordRule:
    """What the network wants of the patient's record, and how long a study waits for it."""

    wait_s: float
    look_back_h: float
    values: tuple[ValueSpec, ...] = ()
    texts: tuple[TextSpec, ...] = ()


@dataclass(frozen=True, slots=True)
class FindingSpec:
    """One answer: positive from `threshold`, negative below `negative_below` (by default the same), uncertain between.

    `temperature` divides the logit; training sets it on studies the network did not learn from.
    """

    name: str
    code: Code
    threshold: float
    negative_below: float | None = None
    temperature: float = 1.0


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """The network's shape.

    `image_size` is (H, W) of a radiograph or (X, Y, Z) of a volume in RAS; `spacing_mm` (volumes only) is
    the spacing those voxels stand for, and `window_hu` what becomes 0 and 1.
    """

    image_size: tuple[int, ...]
    image_grid: int
    channels: tuple[int, ...]
    width: int
    heads: int
    layers: int
    spacing_mm: tuple[float, ...] = ()
    window_hu: tuple[float, ...] = ()
    bins: int = 8
    words: int = 96
    buckets: int = 4096


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """How the weights are learned: all that `fit` takes besides the data, the seed and the device."""

    epochs: int
    batch: int
    learning_rate: float
    weight_decay: float = 0.05
    drop_modality: float = 0.3
    drop_value: float = 0.15
    auxiliary: float = 0.3
    dropout: float = 0.1
    patience: int = 10
    average: float = 0.98
    validation: float = 0.2
    shift: float = 0.0
    zoom: float = 0.0
    rotate_deg: float = 0.0
    contrast: float = 0.0


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """Where the tensors are, and what they must hash to."""

    file: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Bundle:
    """A network as a folder; `digest` changes with any byte of its metadata or weights."""

    name: str
    version: str
    title: str
    intended_use: str
    quality_statement: str
    license: str
    authors: tuple[str, ...]
    research_use: bool
    procedure: Code
    series: SeriesRule
    record: RecordRule
    findings: tuple[FindingSpec, ...]
    network: NetworkConfig
    training: TrainingConfig
    weights: WeightsFile
    folder: Path
    digest: str

    @classmethod
    def read(cls, folder: Path, *, verify: bool = True) -> Self:
        """Read and check ``folder/bundle.toml`` and, unless `verify` is off (training), the weights' sha256.

        Raises
        ------
        InvalidBundleError
            A file is absent, a key is unknown, missing or of the wrong kind, or the weights hash to something else.
        """
        file = folder / "bundle.toml"
        try:
            raw = file.read_bytes()
            data = tomllib.loads(raw.decode("utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
            raise InvalidBundleError(f"{file.name} of bundle {folder.name} cannot be read: {exc}.") from exc
        identity = data.pop("bundle", None)
        if not isinstance(identity, dict):
            raise InvalidBundleError(f"{file.name} of bundle {folder.name} has no [bundle] table.")
        weights_sha256 = str(data.get("weights", {}).get("sha256", ""))
        digest = hashlib.sha256(raw + b"\0" + weights_sha256.encode()).hexdigest()
        where = f"{folder.name}/bundle.toml"
        bundle = _table(cls, {**identity, **data}, where, given={"folder": folder, "digest": digest})
        _check(bundle, where)
        if verify:
            bundle._verify()
        return bundle

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the network fuses, in the order of its tokens."""
        values = ("values",) if self.record.values else ()
        texts = ("text",) if self.record.texts else ()
        return ("image", *values, *texts)

    @property
    def weights_path(self) -> Path:
        """The safetensors file."""
        return self.folder / self.weights.file

    def tensors(self) -> dict[str, Tensor]:
        """Load the weights, on the CPU, from the very bytes whose sha256 is checked here."""
        from safetensors.torch import load  # here, because readers of metadata must start without torch

        return load(self._verify())

    def _verify(self) -> bytes:
        try:
            raw = self.weights_path.read_bytes()
        except OSError as exc:
            raise InvalidBundleError(f"Bundle {self.name} has no {self.weights.file}: {exc.strerror}.") from exc
        found = hashlib.sha256(raw).hexdigest()
        if found != self.weights.sha256:
            raise InvalidBundleError(
                f"{self.weights.file} of bundle {self.name} has sha256 {found}, bundle.toml says {self.weights.sha256}."
            )
        return raw


def settle_weights(folder: Path, *, sha256: str, temperatures: Mapping[str, float]) -> Bundle:
    """Write the new weights' sha256 and each finding's temperature into bundle.toml; comments there survive."""
    file = folder / "bundle.toml"
    bundle = Bundle.read(folder, verify=False)
    text, count = re.subn(r'(?m)^sha256 = "[^"]*"', f'sha256 = "{sha256}"', file.read_text("utf-8"))
    if count != 1:
        raise InvalidBundleError(f"{folder.name}/bundle.toml must hold one line 'sha256 = \"…\"', found {count}.")
    head, *tables = re.split(r"(?m)^(?=\[\[findings\]\])", text)
    if len(tables) != len(bundle.findings):
        raise InvalidBundleError(f"{folder.name}/bundle.toml must write each finding as its own [[findings]] table.")
    for index, finding in enumerate(bundle.findings):
        line = f"temperature = {temperatures[finding.name]:.4f}"
        tables[index], count = re.subn(r"(?m)^temperature = .*$", line, tables[index])
        if count != 1:
            raise InvalidBundleError(f"{folder.name}/bundle.toml: finding {finding.name} needs one temperature line.")
    file.write_text("".join((head, *tables)), "utf-8")
    return Bundle.read(folder)


def _check(bundle: Bundle, where: str) -> None:
    volume = bundle.series.kind == "volume"
    network = bundle.network
    rules = {
        "findings: at least one is needed": bool(bundle.findings),
        "findings: names must differ": len({f.name for f in bundle.findings}) == len(bundle.findings),
        "record.values: names must differ": len({v.name for v in bundle.record.values}) == len(bundle.record.values),
        "findings.threshold must lie in (0, 1]": all(0 < f.threshold <= 1 for f in bundle.findings),
        "findings.negative_below must not exceed threshold": all(
            f.negative_below is None or 0 <= f.negative_below <= f.threshold for f in bundle.findings
        ),
        "findings.temperature must be positive": all(f.temperature > 0 for f in bundle.findings),
        "record.values.plausible must be [low, high]": all(v.plausible[0] < v.plausible[1] for v in bundle.record.values),
        "record.values.plausible must be above 0 for a log transform": all(
            v.transform == "none" or v.plausible[0] > 0 for v in bundle.record.values
        ),
        "network.image_size needs 2 numbers for a radiograph, 3 for a volume": len(network.image_size) == 2 + volume,
        "network.spacing_mm and window_hu belong to a volume, and it needs both": (
            (len(network.spacing_mm), len(network.window_hu)) == ((3, 2) if volume else (0, 0))
        ),
        "network.width must divide by heads": network.width % network.heads == 0,
        "series.required and min_instances must be at least 1": min(bundle.series.required, bundle.series.min_instances) > 0,
        "weights.file must be a plain file name": Path(bundle.weights.file).name == bundle.weights.file,
    }
    for rule, holds in rules.items():
        if not holds:
            raise InvalidBundleError(f"{where}: {rule}.")


def _table(cls: type[T], raw: object, where: str, *, given: Mapping[str, object] | None = None) -> T:
    """Turn a TOML table into the dataclass `cls`: no unknown key, no missing key, no coercion but int to float."""
    if not isinstance(raw, dict):
        raise InvalidBundleError(f"{where}: a table is expected, found {raw!r}.")
    given = given or {}
    assert is_dataclass(cls)  # noqa: S101  a bug of ours, not of the file
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls) if f.name not in given}
    if unknown := sorted(set(raw) - set(known)):
        raise InvalidBundleError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(known)}.")
    needed = {n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING}
    if missing := sorted(needed - set(raw)):
        raise InvalidBundleError(f"{where}: key {missing[0]!r} is missing.")
    return cls(**given, **{key: _convert(hints[key], value, f"{where}: {key}") for key, value in raw.items()})


def _convert(kind: Any, value: Any, where: str) -> Any:
    """One TOML value as `kind`; the only place of this package where types are not static."""
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(a for a in get_args(kind) if a is not type(None))
    if kind is Code:
        return _code(value, where)
    if is_dataclass(kind) and isinstance(kind, type):
        return _table(kind, value, where)
    if get_origin(kind) is not None:
        return _container(kind, value, where)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise _unexpected(kind, value, where)
    return value


def _container(kind: Any, value: Any, where: str) -> Any:
    """One TOML array, table of numbers or word out of a fixed list as `kind`."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal and value in args:
        return value
    if origin is Mapping and isinstance(value, dict):
        return {key: _convert(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is tuple and isinstance(value, list):
        if args[-1] is not Ellipsis and len(args) != len(value):
            raise InvalidBundleError(f"{where}: {len(args)} entries are expected, found {len(value)}.")
        return tuple(_convert(args[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    raise _unexpected(kind, value, where)


def _code(value: object, where: str) -> Code:
    if not (isinstance(value, list) and len(value) in (2, 3) and all(isinstance(v, str) and v for v in value)):
        raise InvalidBundleError(f"{where}: a code is [value, scheme, meaning], found {value!r}.")
    return Code(*value)


def _unexpected(kind: Any, value: object, where: str) -> InvalidBundleError:
    return InvalidBundleError(f"{where}: {getattr(kind, '__name__', kind)} is expected, found {value!r}.")
