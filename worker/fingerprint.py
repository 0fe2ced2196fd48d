"""What an answer rests on, as a hash: the same input gives the same object, and a change of the record is seen without a network.

Not here: how inputs are chosen (inputs.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from worker.domain import Inputs


def digest(bundle: str, inputs: Inputs | None, instances: Sequence[tuple[str, str]], failure: str) -> str:
    """Hash all that an answer and its report rest on; `instances` are SOP Instance UIDs with their sha256."""
    facts: dict[str, object] = {"bundle": bundle, "instances": sorted(instances), "failure": failure}
    return _sha256(facts | _of_record(inputs) | _messages(inputs))


@cache
def code_digest(root: Path = Path(__file__).parents[1]) -> str:
    """Hash the program as it is here, worker/ and models/: a version alone does not tell a patched installation from another."""
    found = hashlib.sha256()
    for path in sorted(path for part in ("worker", "models") for path in (root / part).rglob("*.py")):
        found.update(f"{path.relative_to(root)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return found.hexdigest()


def record_digest(inputs: Inputs | None) -> str:
    """Hash the record's part of it; '' where there are no inputs. Saying the same again in another message changes nothing."""
    return _sha256(_of_record(inputs)) if inputs else ""


def _of_record(inputs: Inputs | None) -> dict[str, object]:
    if inputs is None:
        return {}
    return {
        "found": inputs.record_found,
        "lacking": sorted((code.scheme, code.value) for code in inputs.missing),
        "values": sorted((v.code.scheme, v.code.value, v.comparator, v.value, v.unit, v.at.isoformat(), v.source) for v in inputs.values),
        "histories": sorted(
            (h.code.scheme, h.code.value, p.comparator, p.value, p.unit, p.at.isoformat(), p.source)
            for h in inputs.histories
            for p in h.points
        ),
        "texts": sorted(
            (t.code.scheme, t.code.value, hashlib.sha256(t.text.encode()).hexdigest(), t.at.isoformat(), t.source) for t in inputs.texts
        ),
    }


def _messages(inputs: Inputs | None) -> dict[str, object]:
    """The report names them, so they are of its input."""
    if inputs is None:
        return {}
    points = (*inputs.values, *(point for history in inputs.histories for point in history.points))
    return {"messages": sorted([(p.source, p.message) for p in points] + [(t.source, t.message) for t in inputs.texts])}


def _sha256(facts: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
