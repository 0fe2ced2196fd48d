"""FHIR resources as fhir.resources takes them: types, cardinalities and formats by its models, codes by their required bindings.

Its package R4B (4.3.0) is R4 (4.0.1) for all resources that we write; it leaves out R4 itself. What its models only note, the codes that a
required binding allows, is checked here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fhir.resources.R4B import get_fhir_model_class
from pydantic import BaseModel

Json = dict[str, Any]

#: Of these the library knows the first alone, "and others" (R4 observation-status, diagnostic-report-status).
_STATUSES = {"registered", "preliminary", "final", "amended", "corrected", "cancelled", "entered-in-error", "unknown"}
_LONGER = {("Observation", "status"): _STATUSES, ("DiagnosticReport", "status"): _STATUSES | {"partial", "appended"}}


def validated(resource: Json) -> BaseModel:
    """The resource as the library reads it; ValueError says what is wrong, with the place."""
    model: BaseModel = get_fhir_model_class(resource["resourceType"]).model_validate(resource)
    if wrong := list(_wrong(model, resource["resourceType"])):
        raise ValueError("; ".join(wrong))
    return model


def _wrong(model: BaseModel, where: str) -> Iterator[str]:
    for name, about in type(model).model_fields.items():
        value = getattr(model, name)
        extra = about.json_schema_extra if isinstance(about.json_schema_extra, dict) else {}
        allowed = _LONGER.get((type(model).__name__, name), extra.get("enum_values"))
        for one in value if isinstance(value, list) else [value]:
            if isinstance(allowed, (list, set)) and one is not None and one not in allowed:
                yield f"{where}.{name}: {one!r} is none of {allowed}"
            if isinstance(one, BaseModel):
                yield from _wrong(one, f"{where}.{name}")
