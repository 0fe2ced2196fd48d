"""What `synoptic select` prints: each series of a study, taken or not by each image of a bundle, and the rule that decided.

Nothing a sender wrote freely is shown: no description, no name. Not here: the rules (selection.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from worker import selection
from worker.domain import Series, Study
from worker.store import studies
from worker.store.database import Store

if TYPE_CHECKING:
    from models.bundle import Bundle


def show(out: Console, store: Store, study_id: int, bundles: Sequence[Bundle], *, as_json: bool) -> None:
    """What each bundle takes of a study, for a person or for a program."""
    with store.read() as conn:
        facts = gather(studies.load(conn, study_id), bundles)
    if as_json:
        out.file.write(json.dumps(facts, indent=2) + "\n")  # plain, not rich's: nothing may be wrapped
    else:
        print_choices(out, facts)


def gather(study: Study, bundles: Sequence[Bundle]) -> dict[str, Any]:
    """The choices of each bundle as plain values, for a program or for `print_choices`."""
    return {
        "study_instance_uid": study.study_instance_uid,
        "version": study.version,
        "is_complete": study.is_complete,
        "bundles": [
            {"bundle": bundle.name, "version": bundle.version, "images": [_image(one) for one in selection.choices(study, bundle.images)]}
            for bundle in bundles
        ],
    }


def _image(choice: selection.Choice) -> dict[str, Any]:
    return {
        "image": choice.image.name,
        "kind": choice.image.kind,
        "required": choice.image.required,
        "taken": choice.taken.number if choice.taken else None,
        "series": [
            {
                "number": one.number,
                "series_instance_uid": one.series.series_instance_uid,
                "modality": one.series.modality if one.series.modality.isalnum() else "",
                "instances": len(one.series.instances),
                **_geometry(one.series),
                "fits": not one.reason,
                "taken": one is choice.taken,
                "preferences": one.preferred,
                "images": one.images,
                "because": choice.words(one),
            }
            for one in choice.judged
        ],
    }


def _geometry(series: Series) -> dict[str, Any]:
    """Of the first instance that fits, or else of the first."""
    facts = series.instances[0].facts if series.instances else None
    return {
        "orientation": (facts.orientation if facts else "") or series.orientation,
        "slice_mm": (facts.slice_mm if facts else 0.0) or series.slice_mm,
    }


def print_choices(out: Console, facts: dict[str, Any]) -> None:
    """The facts of `gather`, a table for each image, in 80 columns."""
    state = "" if facts["is_complete"] else "; not complete yet"
    out.print(f"study {facts['study_instance_uid']}  version {facts['version']}{state}", soft_wrap=True)
    for bundle in facts["bundles"]:
        for image in bundle["images"]:
            taken = f"series {image['taken']}" if image["taken"] else "none" + (", and it is required" if image["required"] else "")
            table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), title_justify="left", title_style="")
            table.title = escape(f"{bundle['bundle']} {bundle['version']}, image {image['image']!r} ({image['kind']}): {taken}")
            for name in ("No.", "mod.", "inst.", "plane", "mm"):
                table.add_column(name, no_wrap=True, justify="left" if name in ("mod.", "plane") else "right")
            table.add_column("taken?")
            table.add_column("because", overflow="fold")
            for one in image["series"]:
                mm = f"{one['slice_mm']:.4g}" if one["slice_mm"] else ""
                told = (str(one["number"]), one["modality"], str(one["instances"]), one["orientation"], mm)
                table.add_row(*told, "[bold]yes[/bold]" if one["taken"] else "no", escape(one["because"].removeprefix("taken: ")))
            out.print()
            out.print(table)
    if not facts["bundles"]:
        out.print("No bundle is configured: name their folders in [run] bundles.")
