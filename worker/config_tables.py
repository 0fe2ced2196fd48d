"""A table of TOML as a frozen dataclass: no unknown key, no missing one, no value of another kind.

Not here: which keys there are (config.py).
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final


class ConfigError(Exception):
    """A key or value of the configuration is wrong; the text names it and what would be right."""


class Text(str):
    """A value of the environment: to be converted to the field's type."""

    __slots__ = ()


def build(cls: type[Any], table: Mapping[str, Any], *, where: str) -> Any:
    """Make a `cls` of a table; `where` is the section's name, for errors (ConfigError)."""
    hints = typing.get_type_hints(cls)
    for key in table:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1, cutoff=0.4)
            hint = f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(hints)}."
            raise ConfigError(f"Unknown key {key!r} in [{where or 'top level'}].{hint}")
    values = {key: _convert(hints[key], value, where=f"{where}.{key}".strip(".")) for key, value in table.items()}
    needed = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    for key in needed:
        if key not in values:
            raise ConfigError(f"[{where}] needs the key {key!r}.")
    return cls(**values)


def _convert(hint: Any, value: Any, *, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a section: [{where}].")
        return build(typing.cast("type[Any]", hint), value, where=where)
    origin = typing.get_origin(hint)
    if origin is tuple:
        item = typing.get_args(hint)[0]
        if isinstance(value, Text):
            value = [Text(part.strip()) for part in value.split(",") if part.strip()]
        if not isinstance(value, list):
            raise ConfigError(f"{where} must be a list.")
        return tuple(_convert(item, one, where=where) for one in value)
    if origin in (Mapping, dict, types.MappingProxyType) or (origin is not None and issubclass(origin, Mapping)):
        item = typing.get_args(hint)[1]
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a table: {{ name = value }}.")
        return {str(key): _convert(item, one, where=f"{where}.{key}") for key, one in value.items()}
    return _scalar(hint, value, where=where)


_WORDS: Final[Mapping[type, str]] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text in quotes",
    Path: "a path in quotes",
    list: "a list",
    dict: "a table",
}


def _scalar(hint: Any, value: Any, *, where: str) -> Any:
    try:
        if isinstance(value, Text):
            return value.lower() in {"1", "true", "yes", "on"} if hint is bool else hint(str(value))
        if hint is Path and isinstance(value, str):
            return Path(value)
        if hint is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
            return value
    except ValueError as exc:
        raise ConfigError(f"{where}: {str(value)!r} is not {_WORDS[hint]}.") from exc
    raise ConfigError(f"{where} must be {_WORDS[hint]}, not {_WORDS.get(type(value), type(value).__name__)}.")
