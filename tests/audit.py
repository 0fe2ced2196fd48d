"""Ask pip-audit about each version of .constraints.lock, and say how many were really looked up: `make audit-deps`.

pip-audit calls what it could not look up "skipped" and then says that no vulnerability is known; that is no audit.
Exit code 1: a version has a known hole. 0: none has, or the service was not reached, which is said.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def verdict(answer: dict[str, Any] | None) -> tuple[str, bool]:
    """One sentence on what pip-audit wrote (None: nothing), and whether it is bad news."""
    found = answer["dependencies"] if answer else []
    asked = [one for one in found if "skip_reason" not in one]
    bad = [f"{one['name']} {one['version']} ({', '.join(v['id'] for v in one['vulns'])})" for one in asked if one["vulns"]]
    if bad:
        return f"Known vulnerabilities: {'; '.join(bad)}.", True
    if not asked:
        return "NOT AUDITED: the advisory service was not reached; only the pins of tests/unit/test_supply.py were checked.", False
    return f"{len(asked)} of {len(found)} versions were looked up; none of these has a known vulnerability.", False


def main(tool: str) -> int:
    """Run `tool` and print the sentence."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "audit.json"
        options = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--timeout", "10", "--format", "json"]
        subprocess.run([tool, "-r", ".constraints.lock", *options, "-o", str(out)], check=False, capture_output=True)
        text = out.read_text("utf-8") if out.exists() else ""
    said, is_bad = verdict(json.loads(text) if text else None)
    sys.stdout.write(f"{said}\n")
    return int(is_bad)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
