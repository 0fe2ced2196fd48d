"""Who may use the page, and as what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

#: What somebody may: see; also retry, cancel and move forward; also say whether a finding is right; what the first two may.
ROLES: Final = ("viewer", "operator", "radiologist", "admin")


@dataclass(frozen=True, slots=True)
class Account:
    """Somebody who may log in."""

    id: int
    name: str
    roles: frozenset[str]
