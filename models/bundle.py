"""What a bundle is: a folder of configuration and weights, read strictly, executed never.

::

    bundles/<name>/
    ├── bundle.toml            what spec.py holds, as plain values; unknown or missing keys are errors
    ├── weights.safetensors    tensors only; its sha256 stands in bundle.toml
    ├── LICENSE
    └── README.md              the card: what it was trained on, what it can and cannot do

Not here: the network (network.py) and how its inputs are made (transforms.py). Reading a bundle needs the
standard library alone, so that processes without torch can ask what a bundle wants; only
`Bundle.tensors` opens safetensors and torch.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from models.spec import Code, FindingSpec, ImageSpec, NetworkConfig, RecordRule, TrainingConfig, WeightsFile, broken_rules

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


class InvalidBundleError(ValueError):
    """A bundle's folder, metadata or weights are not what they should be; the message names file and key."""


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
    images: tuple[ImageSpec, ...]
    record: RecordRule
    findings: tuple[FindingSpec, ...]
    network: NetworkConfig
    training: TrainingConfig
    weights: WeightsFile
    folder: Path
    digest: str
    #: For the card alone.
    learned_from: str = ""
    limits: tuple[str, ...] = ()
    citation: str = ""

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
        language = str(data.get("network", {}).get("bert", ""))
        bert_sha256 = _digest_of(folder / language) if language else ""
        if language:
            digest = hashlib.sha256(f"{digest}\0{bert_sha256}".encode()).hexdigest()
        bundle = _table(cls, {**identity, **data}, where, given={"folder": folder, "digest": digest})
        _check(bundle, where)
        if verify:
            bundle._verify()
            if bert_sha256 != bundle.weights.bert_sha256:
                told = bundle.weights.bert_sha256 or "nothing"
                raise InvalidBundleError(
                    f"{language} of bundle {bundle.name} has sha256 {bert_sha256}, bundle.toml says {told} (bert_sha256)."
                )
        return bundle

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the network fuses, in the order of its tokens."""
        record = self.record
        wanted = {"values": record.values, "history": record.histories, "text": record.notes, "genes": record.genomics}
        return (*(image.name for image in self.images), *(name for name, specs in wanted.items() if specs))

    @property
    def weights_path(self) -> Path:
        """The safetensors file."""
        return self.folder / self.weights.file

    def tensors(self) -> dict[str, Tensor]:
        """Load the weights, on the CPU, from the very bytes whose sha256 is checked here."""
        from safetensors import SafetensorError  # here, because readers of metadata must start without torch
        from safetensors.torch import load

        try:
            return load(self._verify())
        except SafetensorError as exc:
            raise InvalidBundleError(
                f"{self.weights.file} of bundle {self.name} is no safetensors file ({exc}); pickles and other formats are never opened."
            ) from exc

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


def _digest_of(folder: Path) -> str:
    """The sha256 over names and bytes of the files below a folder."""
    whole = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        whole.update(f"{file.relative_to(folder)}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\0".encode())
    return whole.hexdigest()


def settle(folder: Path, findings: Mapping[str, Mapping[str, float]], *, sha256: str = "") -> Bundle:
    """Write numbers (temperature, threshold, …) into each finding's table of bundle.toml and, if given, the weights' sha256.

    Comments and everything else there survive.
    """
    file = folder / "bundle.toml"
    bundle = Bundle.read(folder, verify=False)
    text = file.read_text("utf-8")
    if sha256:
        text, count = re.subn(r'(?m)^sha256 = "[^"]*"', f'sha256 = "{sha256}"', text)
        if count != 1:
            raise InvalidBundleError(f"{folder.name}/bundle.toml must hold one line 'sha256 = \"…\"', found {count}.")
        if bundle.network.bert:
            text = re.sub(r"(?m)^bert_sha256 = .*\n", "", text)
            line = f'bert_sha256 = "{_digest_of(folder / bundle.network.bert)}"'
            text = re.sub(r'(?m)^(sha256 = "[^"]*")$', rf"\1\n{line}", text)
    head, *tables = re.split(r"(?m)^(?=\[\[findings\]\])", text)
    if len(tables) != len(bundle.findings):
        raise InvalidBundleError(f"{folder.name}/bundle.toml must write each finding as its own [[findings]] table.")
    for index, finding in enumerate(bundle.findings):
        for key, value in findings.get(finding.name, {}).items():
            tables[index] = _with_number(tables[index], key, f"{key} = {value:.4f}")
    part = file.with_suffix(".part")
    part.write_text("".join((head, *tables)), "utf-8")
    part.replace(file)
    return Bundle.read(folder, verify=bool(sha256))


def _with_number(table: str, key: str, line: str) -> str:
    replaced, count = re.subn(rf"(?m)^{key} = .*$", line, table)
    # Every finding has a threshold: a key that is new stands below it.
    return replaced if count else re.sub(r"(?m)^(threshold = .*)$", rf"\1\n{line}", table, count=1)


def _check(bundle: Bundle, where: str) -> None:
    for rule in broken_rules(bundle.images, bundle.record, bundle.findings, bundle.network, bundle.weights):
        raise InvalidBundleError(f"{where}: {rule}.")
    alone = bundle.network.fusion.removeprefix("single:")
    if bundle.network.fusion != alone and alone not in bundle.modalities:
        raise InvalidBundleError(f"{where}: network.fusion: {alone!r} is none of {', '.join(bundle.modalities)}.")


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
