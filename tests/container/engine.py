"""Podman, rootless or as root, and what of this host its builds must be told."""

from __future__ import annotations

import ast
import os
import pwd
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.installation import wait_until

ROOT: Final = Path(__file__).parents[2]
_USER_NEEDED: Final = (
    "Rootless podman needs a user that is not root, with subordinate ids. As root: "
    "useradd --system --create-home --add-subids-for-system NAME && make container CONTAINER_USER=NAME"
)
#: Of pip's settings on this host, those without which an index behind a proxy, or one of the house, is not reached.
_PIP: Final = ("cert", "find-links", "index-url", "extra-index-url", "trusted-host")
_PROXIES: Final = ("http_proxy", "https_proxy", "no_proxy")
#: Of the environment of who runs this, what the other user's podman is told.
_KEPT: Final = ("CONTAINERS_CONF", "STORAGE_DRIVER", "LANG", *_PROXIES, *(name.upper() for name in _PROXIES))


@dataclass(frozen=True, slots=True)
class Engine:
    """Runs podman in `folder`, as `user` where that is not who runs this."""

    folder: Path
    user: pwd.struct_passwd | None = None

    def run(self, *words: str | Path, timeout_s: float = 600, stdin: str = "", check: bool = True, **environment: str) -> str:
        """Run a command; what it printed on standard output. Where it fails, an AssertionError with the end of what it said."""
        environ = {**os.environ, **environment}
        if self.user is not None:
            environ = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "HOME": self.user.pw_dir, "USER": self.user.pw_name, **environment}
            environ["XDG_RUNTIME_DIR"] = f"/run/user/{self.user.pw_uid}"
            environ |= {name: os.environ[name] for name in _KEPT if name in os.environ}
        done = subprocess.run(
            [str(word) for word in words],
            cwd=self.folder,
            env=environ,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            user=self.user and self.user.pw_uid,
            group=self.user and self.user.pw_gid,
            extra_groups=None if self.user is None else [],
        )
        if check and done.returncode:
            said = "\n".join((done.stdout + done.stderr).splitlines()[-40:])
            raise AssertionError(f"{shlex.join(map(str, words))} ended with {done.returncode}:\n{said}")
        return done.stdout.strip()

    def wait_until(self, holds: Callable[[], bool], *, timeout_s: float, what: str, log: Sequence[str]) -> None:
        """Wait; where it takes too long, what the command `log` says is printed."""
        try:
            wait_until(holds, timeout_s=timeout_s, what=what, step_s=0.5)
        except AssertionError:
            print(self.run("podman", "ps", "--all"), self.run(*log, check=False), sep="\n")
            raise

    def image(self, name: str, *, packages: tuple[str, ...]) -> str:
        """Name of `name` here: pulled, or where no registry of images answers, a bare Debian with `packages`, under a name of its own."""
        try:
            self.run("podman", "pull", "--quiet", name, timeout_s=300)
        except (AssertionError, subprocess.TimeoutExpired):
            stand_in = "localhost/stand-in-" + re.sub(r"\W+", "-", name.rpartition("/")[2])
            print(f"{name} cannot be pulled here: {stand_in}, of Debian's packages, in its place.")
            hook = 'rm -f "$1"/usr/lib/python3*/EXTERNALLY-MANAGED; ln -sf python3 "$1"/usr/bin/python'
            archive = self.folder / "bare.tar"
            bootstrap = ("mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(packages)}", f"--customize-hook={hook}")
            self.run(*bootstrap, "bookworm", archive, "http://deb.debian.org/debian")
            self.run("podman", "import", "--quiet", archive, stand_in)
            archive.unlink()
            return stand_in
        return name


def rootless(folder: Path) -> Engine:
    """An engine in `folder` of who runs this, or where that is root, of $CONTAINER_USER, to whom `folder` is given.

    Raises
    ------
    SystemExit
        root runs this, and names nobody.
    """
    if os.geteuid():
        return Engine(folder)
    name = os.environ.get("CONTAINER_USER") or sys.exit(_USER_NEEDED)
    user = pwd.getpwnam(name)
    runtime = Path("/run/user") / str(user.pw_uid)  # as a login makes it; rootless networks need it
    runtime.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in (runtime, folder, *folder.rglob("*")):
        os.chown(path, user.pw_uid, user.pw_gid, follow_symlinks=False)
    return Engine(folder, user)


def work_tree(folder: Path) -> None:
    """Copy what git knows, or would take up, of the work tree to `folder`."""
    listed = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True).stdout
    there = b"\0".join(name for name in listed.split(b"\0") if name and (ROOT / os.fsdecode(name)).exists())
    subprocess.run(["xargs", "-0", "cp", "--parents", "-t", folder], cwd=ROOT, input=there, check=True)


def pip_of_host(folder: Path) -> list[str]:
    """Words for podman that give a container pip's settings of this host, with the files that they name; written into `folder`."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^(?:global|:env:)\.([\w-]+)=(.+)$", listed, re.MULTILINE)
    settings = {name: [one for one in str(ast.literal_eval(value)).split() if "file:" not in one] for name, value in found if name in _PIP}
    conf = folder / "pip.conf"
    conf.write_text("\n".join(["[global]", *(f"{name} = " + "\n  ".join(values) for name, values in settings.items() if values), ""]))
    conf.chmod(0o644)
    named = [path for values in settings.values() for path in values if path.startswith("/") and Path(path).exists()]
    # The system's own files are not relabelled for a container.
    return ["--security-opt=label=disable", *(f"--volume={path}:{path}:ro" for path in named), f"--volume={conf}:/etc/pip.conf:ro"]
