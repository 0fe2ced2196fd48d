"""What guards the verbs of the lab: against mistyped words, weights that do not fit, files that are half written or not readable."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from worker.errors import BundleError, Reject


@contextmanager
def advising(folder: Path) -> Iterator[None]:
    """Say what to do where the weights of the bundle in `folder` are missing, or are of another network."""
    try:
        yield
    except BundleError as exc:
        train = f"synoptic train --bundle {folder} --cohort COHORT"
        broken = getattr(exc.__cause__, "__cause__", None)
        if isinstance(broken, FileNotFoundError) and (folder / "bundle.toml").exists():
            raise BundleError(f"{exc} Put the file there, or train it: {train}") from exc
        if isinstance(exc.__cause__, RuntimeError):  # torch's list of tensors and sizes tells nobody what to do
            what = f"The weights of bundle {folder.name} do not fit its network: bundle.toml was changed after training"
            raise BundleError(f"{what}; train it again: {train}") from exc
        raise


def check_fusions(names: Iterable[str]) -> None:
    """Refuse a fusion that there is none of."""
    from models.fusion import FUSIONS

    if unknown := sorted(set(names) - set(FUSIONS)):
        raise Reject(f"{unknown[0]!r} is no fusion; known are {', '.join(FUSIONS)}.")


def mode_of(bundle: Path) -> int:
    """Who may read the bundle: what is written into it is no patient data, and the daemon may be another user."""
    return (bundle / "bundle.toml").stat().st_mode & 0o666


def share(mode: int, *written: Path) -> None:
    """Give files the mode that `mode_of` found before."""
    for path in written:
        path.chmod(mode)


@contextmanager
def whole(path: Path) -> Iterator[TextIO]:
    """A text file that is there when all of it is; that it cannot be written is known at once."""
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("w", encoding="utf-8", newline="") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
