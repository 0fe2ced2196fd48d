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
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from models.files import replacing
from models.spec import Code, FindingSpec, ImageSpec, NetworkConfig, PatientRule, RecordRule, TrainingConfig, WeightsFile, broken_rules

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
    patients: PatientRule = field(default_factory=PatientRule)
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
        try:
            raw = (folder / "bundle.toml").read_bytes()
        except OSError as exc:
            raise InvalidBundleError(f"{folder / 'bundle.toml'} cannot be read: {exc.strerror}.") from exc
        bundle = cls._of(raw, folder)
        if verify:
            bundle._verify()
        return bundle

    @classmethod
    def _of(cls, raw: bytes, folder: Path) -> Self:
        """The bundle that bundle.toml would be if it held these bytes."""
        where = f"{folder.name}/bundle.toml"
        data = _parsed(raw, where)
        identity = data.pop("bundle", None)
        if not isinstance(identity, dict):
            raise InvalidBundleError(f"{where}: it has no [bundle] table.")
        bundle = _table(cls, {**identity, **data}, where, given={"folder": folder, "digest": ""})
        _check(bundle, where)
        digest = hashlib.sha256(raw + b"\0" + bundle.weights.sha256.encode()).hexdigest()
        if bundle.network.bert:
            digest = hashlib.sha256(f"{digest}\0{bundle.language_sha256}".encode()).hexdigest()
        return replace(bundle, digest=digest)

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

    @property
    def language_sha256(self) -> str:
        """Of the names and bytes of the language model's files; '' without one."""
        return _digest_of(self.folder, self.network.bert) if self.network.bert else ""

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
        if language := self.network.bert:
            found, told = self.language_sha256, self.weights.bert_sha256
            if found != told:
                raise InvalidBundleError(
                    f"{language} of bundle {self.name} has sha256 {found}, bundle.toml says {told or 'nothing'} (bert_sha256)."
                )
        return raw


def _digest_of(folder: Path, name: str) -> str:
    """The sha256 over names and bytes of the files in a folder of the bundle; a link that leads out of it is refused."""
    root, whole = (folder / name).resolve(), hashlib.sha256()
    try:
        if root.parent != folder.resolve() or any(not one.resolve().is_relative_to(root) for one in root.rglob("*")):
            raise InvalidBundleError(f"{name} of bundle {folder.name} holds a link that leads out of it; put the files themselves there.")
        for file in sorted(file for file in root.rglob("*") if file.is_file()):
            whole.update(f"{file.relative_to(root)}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\0".encode())
    except (OSError, RuntimeError) as exc:  # RuntimeError: a link to itself
        raise InvalidBundleError(f"{name} of bundle {folder.name} cannot be read ({type(exc).__name__}).") from exc
    return whole.hexdigest()


def settle(folder: Path, findings: Mapping[str, Mapping[str, float]], *, sha256: str = "") -> Bundle:
    """Write numbers (temperature, threshold, …) into each finding's table of bundle.toml and, if given, the weights' sha256.

    Comments and everything else there survive. All is written or nothing.

    Raises
    ------
    InvalidBundleError
        The file is written in a way that this cannot change for certain, the numbers cannot be, or the weights have another sha256.
    OSError
        The file cannot be written.
    """
    text = _settled(Bundle.read(folder, verify=False), findings, sha256)
    bundle = Bundle._of(text.encode(), folder)
    if sha256:
        bundle._verify()
    with replacing(folder / "bundle.toml") as stream:
        stream.write(text.encode())
    return bundle


def check_writable(folder: Path) -> None:
    """Refuse, before hours of training, a bundle.toml that `settle` would refuse after them (InvalidBundleError)."""
    bundle = Bundle.read(folder, verify=False)
    _settled(bundle, {finding.name: {"temperature": finding.temperature, "alpha": 0.0} for finding in bundle.findings}, "0" * 64)


def _settled(bundle: Bundle, findings: Mapping[str, Mapping[str, float]], sha256: str) -> str:
    """The text of bundle.toml with these numbers, read again to be sure that they, and nothing else, have changed."""
    where = f"{bundle.folder.name}/bundle.toml"
    text = (bundle.folder / "bundle.toml").read_text("utf-8")
    meant = _parsed(text.encode(), where)
    new = [{key: f"{value:.4f}" for key, value in findings.get(finding.name, {}).items()} for finding in bundle.findings]
    hashes = {"sha256": f'"{sha256}"'} if sha256 else {}
    if sha256 and bundle.network.bert:
        hashes["bert_sha256"] = f'"{bundle.language_sha256}"'
    text = _rewritten(text, new, hashes)
    for table, told in zip((*meant["findings"], meant["weights"]), (*new, hashes), strict=True):
        table |= tomllib.loads("".join(f"{key} = {value}\n" for key, value in told.items()))
    try:
        is_meant = tomllib.loads(text) == meant
    except tomllib.TOMLDecodeError:
        is_meant = False
    if not is_meant:
        raise InvalidBundleError(
            f"{where} is left as it is, for numbers cannot be written into it for certain. Write each finding as its own [[findings]] "
            'table with a line "threshold = 0.5", its other numbers likewise, and below [weights] a line "sha256 = \'\'".'
        )
    return text


def _rewritten(text: str, findings: Sequence[Mapping[str, str]], weights: Mapping[str, str]) -> str:
    # Every line that opens a table begins a part; a line within an array may, too, and changes nothing by it.
    parts = re.split(r"(?m)^(?=[ \t]*\[)", text)
    tables = [index for index, part in enumerate(parts) if re.match(r"[ \t]*\[\[[ \t]*findings[ \t]*\]\]", part)]
    lasts = [index for index, part in enumerate(parts) if re.match(r"[ \t]*\[[ \t]*weights[ \t]*\]", part)]
    for index, told in (*zip(tables, findings, strict=False), *((last, weights) for last in lasts)):
        for key, value in told.items():
            parts[index] = _with(parts[index], key, value)
    return "".join(parts)


def _with(table: str, key: str, value: str) -> str:
    """The text of a table with another value of `key`; one that is new stands below a line that every such table has."""
    told = r"""("[^"\n]*"|'[^'\n]*'|[^\s#]+)"""
    replaced, count = re.subn(rf"(?m)^([ \t]*{key}[ \t]*=[ \t]*){told}", lambda found: found[1] + value, table)
    above = "sha256" if key == "bert_sha256" else "threshold"
    added = rf"(?m)^([ \t]*){above}[ \t]*=.*$"
    return replaced if count else re.sub(added, lambda found: f"{found[0]}\n{found[1]}{key} = {value}", table, count=1)


def _parsed(raw: bytes, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as exc:  # a number of more digits than Python reads, arrays a thousand deep
        raise InvalidBundleError(f"{where} cannot be read: {exc}.") from exc


def _check(bundle: Bundle, where: str) -> None:
    said = (bundle.images, bundle.record, bundle.findings, bundle.network, bundle.training, bundle.weights, bundle.patients)
    for rule in broken_rules(*said):
        raise InvalidBundleError(f"{where}: {rule}.")
    alone = bundle.network.fusion.removeprefix("single:")
    if bundle.network.fusion != alone and alone not in bundle.modalities:
        raise InvalidBundleError(f"{where}: network.fusion: {alone!r} is none of {', '.join(bundle.modalities)}.")


def _table(cls: type[T], raw: object, where: str, *, given: Mapping[str, object] | None = None) -> T:
    """Turn a TOML table into the dataclass `cls`: no unknown key, no missing key, no coercion but int to float."""
    if not isinstance(raw, dict):
        raise InvalidBundleError(f"{where}: a table is expected, found {_shown(raw)}.")
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
    if type(value) is int and abs(value) >= 2**63:  # more than TOML promises, and than a float or a tensor's size can be
        raise InvalidBundleError(f"{where}: a number of at most 64 bits is expected.")
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
        raise InvalidBundleError(f"{where}: a code is [value, scheme, meaning], found {_shown(value)}.")
    return Code(*value)


def _unexpected(kind: Any, value: object, where: str) -> InvalidBundleError:
    return InvalidBundleError(f"{where}: {getattr(kind, '__name__', kind)} is expected, found {_shown(value)}.")


def _shown(value: object) -> str:
    """What was found, for a message: its beginning, for it may be of any size and depth."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:80] + "…"
