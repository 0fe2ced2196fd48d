"""What the worker is made of: no pickle is read, no GPL is imported, no version with a known hole is pinned, each file has its hash."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.audit import verdict

ROOT = Path(__file__).parents[2]
#: The oldest version without the named holes, of what reads what strangers send or holds weights.
FLOORS = {
    "pydicom": ("3.0.2", "CVE-2026-32711"),
    "torch": ("2.10", "CVE-2025-32434, CVE-2026-24747"),
    "monai": ("1.6", "CVE-2025-58755, CVE-2025-58756, CVE-2025-58757, CVE-2026-21851, GHSA-89gg-p5r5-q6r4"),
}
#: GPL, AGPL, LGPL in the words that distributions use; LGPL is taken of psycopg alone, which is used as the library that it is.
COPYLEFT = re.compile(r"GPL|General Public License", re.IGNORECASE)
LGPL = {"psycopg", "psycopg-binary"}
#: Say nothing of their license: of CUDA's builds of torch, NVIDIA's own.
SILENT = {"cuda-toolkit"}
#: Modules that run what they read.
UNPICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle"}


def name_of(requirement: str) -> str:
    """PEP 503."""
    return re.sub(r"[-_.]+", "-", requirement).lower()


def pinned() -> dict[str, str]:
    """Name → version of .constraints.txt."""
    lines = (ROOT / ".constraints.txt").read_text("utf-8").split()
    return {name_of(name): version for name, _, version in (line.partition("==") for line in lines)}


def unpicklings(source: str) -> list[str]:
    """Each call in `source` that may run what it reads, and each name imported from a module that does but an error of it."""
    return [found for node in ast.walk(ast.parse(source)) for found in _unpicklings(node)]


def _unpicklings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in UNPICKLERS:
        yield from (f"{node.module}.{one.name}" for one in node.names if not one.name.endswith("Error"))
    if isinstance(node, ast.Import):  # `import pickle` for its errors is allowed, by its own name, so that its calls are seen
        yield from (f"{one.name} as {one.asname}" for one in node.names if one.name.partition(".")[0] in UNPICKLERS and one.asname)
    if not isinstance(node, ast.Call):
        return
    called, options = ast.unparse(node.func), {one.arg: ast.unparse(one.value) for one in node.keywords}
    if called.partition(".")[0] in UNPICKLERS:
        yield called
    if called == "torch.load" and options.get("weights_only") != "True":
        yield called
    if options.get("allow_pickle", "False") != "False" or called.endswith(("read_pickle", "load_from_checkpoint")):
        yield called


@pytest.mark.requirement("X12")
def test_nothing_of_ours_reads_what_would_run() -> None:
    files = [*(ROOT / "worker").rglob("*.py"), *(ROOT / "models").rglob("*.py")]
    assert len(files) > 100
    assert {str(file.relative_to(ROOT)): found for file in files if (found := unpicklings(file.read_text("utf-8")))} == {}


@pytest.mark.requirement("X12")
@pytest.mark.parametrize(
    "source",
    [
        "pickle.loads(raw)",
        "from pickle import loads",
        "import pickle as data",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "torch.load(file, weights_only=is_safe)",
        "np.load(file, allow_pickle=True)",
        "numpy.load(file, allow_pickle=given)",
        "import joblib\njoblib.load(file)",
        "pandas.read_pickle(file)",
    ],
)
def test_what_would_run_what_it_reads_is_seen(source: str) -> None:
    assert len(unpicklings(source)) == 1


def closure(name: str, extras: tuple[str, ...], found: dict[str, metadata.Distribution]) -> None:
    """Put into `found` the distribution, and all that it needs here with these extras."""
    found[name_of(name)] = distribution = metadata.distribution(name)
    for line in distribution.requires or []:
        needed = Requirement(line)
        is_here = needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in ("", *extras))
        if is_here and name_of(needed.name) not in found:
            closure(needed.name, tuple(needed.extras), found)


def license_of(distribution: metadata.Distribution) -> str:
    """Its SPDX expression, else its classifiers, else the first line of its own words."""
    about = distribution.metadata
    classifiers = [one for one in about.get_all("Classifier", []) if one.startswith("License ::")]
    return about["License-Expression"] or "; ".join(classifiers) or (about["License"] or "").strip().partition("\n")[0]


@pytest.mark.requirement("X12")
def test_nothing_that_runs_in_service_is_under_the_gpl() -> None:
    found: dict[str, metadata.Distribution] = {}
    closure("synoptic", ("text", "export"), found)
    said = {name: license_of(distribution) for name, distribution in found.items()}
    assert {name for name, words in said.items() if not words} <= SILENT
    copyleft = {name: words for name, words in said.items() if COPYLEFT.search(words)}
    assert set(copyleft) == LGPL
    assert set(copyleft.values()) == {"LGPL-3.0-only"}


@pytest.mark.requirement("X12")
@pytest.mark.parametrize(("name", "floor", "holes"), [(name, *said) for name, said in FLOORS.items()], ids=list(FLOORS))
def test_a_version_with_a_known_hole_is_neither_pinned_nor_allowed_nor_here(name: str, floor: str, holes: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    (asked,) = [one for one in map(Requirement, project["dependencies"]) if name_of(one.name) == name]
    lowest = [Version(one.version) for one in asked.specifier if one.operator == ">="]
    assert lowest
    assert min([*lowest, Version(pinned()[name]), Version(metadata.version(name))]) >= Version(floor), holes


@pytest.mark.requirement("X12")
def test_each_pinned_version_but_torchs_has_its_files_hashes() -> None:
    """Torch comes as a CPU wheel from another index, a disk or as a CUDA build: each has a hash of its own."""
    text = (ROOT / ".constraints.lock").read_text("utf-8")
    locked = re.findall(r"^([\w.-]+)==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n?)+)", text, re.MULTILINE)
    assert {name_of(name): version for name, version, _ in locked} == {k: v for k, v in pinned().items() if k != "torch"}
    assert "://" not in text


@pytest.mark.requirement("X12")
def test_an_audit_that_asked_nobody_does_not_say_that_all_is_well() -> None:
    skipped = {"name": "a", "skip_reason": "Dependency not found on PyPI"}
    well = {"name": "b", "version": "1", "vulns": []}
    holed = {"name": "c", "version": "2", "vulns": [{"id": "CVE-1"}]}
    for nothing in (None, {"dependencies": [skipped]}):
        said, is_bad = verdict(nothing)
        assert (said.startswith("NOT AUDITED"), is_bad) == (True, False)
    assert verdict({"dependencies": [skipped, well]}) == ("1 of 2 versions were looked up; none of these has a known vulnerability.", False)
    assert verdict({"dependencies": [well, holed]}) == ("Known vulnerabilities: c 2 (CVE-1).", True)
