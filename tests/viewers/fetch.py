"""Fetch OHIF's build: `python -m tests.viewers.fetch`. Does nothing where the very build is there already."""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
from pathlib import Path
from typing import Final

FOLDER: Final = Path(__file__).parents[2] / "var" / "viewers"
VERSION: Final = "3.13.2"
#: Of the tarball, as npm's package-lock.json writes it.
INTEGRITY: Final = "sha512-WZdxmpmG7rqFgW9ZJLcbgr3XCtLi1KDNPoMaeY5PPe6j4G4fjEjjkycZM6C6Zk2F87BKxFfpq+jd5xXZB9E8EA=="
DIST: Final = FOLDER / f"ohif-{VERSION}"


def fetch() -> Path:
    """Return the folder of OHIF's build; fetch it by npm and unpack it where it is not there.

    Raises
    ------
    SystemExit
        npm is missing or fails, or what it brought is not the pinned tarball.
    """
    if (DIST / "index.html").exists():
        return DIST
    npm = shutil.which("npm") or exit_with("npm is not installed; on Debian: apt-get install npm")
    FOLDER.mkdir(parents=True, exist_ok=True)
    subprocess.run([npm, "pack", "--silent", f"@ohif/app@{VERSION}"], cwd=FOLDER, check=True, stdout=subprocess.DEVNULL)
    tarball = FOLDER / f"ohif-app-{VERSION}.tgz"
    got = "sha512-" + base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
    if got != INTEGRITY:
        tarball.unlink()
        exit_with(f"@ohif/app {VERSION} has the integrity {got}; {INTEGRITY} was expected. It is deleted.")
    part = DIST.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    subprocess.run(["tar", "-xzf", tarball, "-C", part], check=True)  # what it holds is pinned; Python 3.11.2 has no safe way of its own
    (part / "package" / "dist").rename(DIST)
    shutil.rmtree(part)
    tarball.unlink()
    return DIST


def exit_with(sentence: str) -> str:
    """End the program with `sentence`."""
    raise SystemExit(sentence)


if __name__ == "__main__":
    print(fetch())
