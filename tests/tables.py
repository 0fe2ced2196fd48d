"""Tables of deploy/IMAGES.md that tests make and keep: ``UPDATE_TABLES=1`` writes them again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

DOCUMENT: Final = Path(__file__).parents[1] / "deploy" / "IMAGES.md"


def keep(name: str, made: Sequence[str]) -> None:
    """Compare one table of the document with what it is now; write it where that is asked for."""
    text = DOCUMENT.read_text()
    head, rest = text.split(f"<!-- {name} -->\n")[0], text.split(f"<!-- /{name} -->")[1]
    wanted = f"{head}<!-- {name} -->\n" + "\n".join(made) + f"\n<!-- /{name} -->{rest}"
    if os.environ.get("UPDATE_TABLES"):
        DOCUMENT.write_text(wanted)
    assert wanted == DOCUMENT.read_text(), "run again with UPDATE_TABLES=1 and read what changed"
