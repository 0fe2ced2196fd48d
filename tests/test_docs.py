"""What is written is so: commands, keys, states, links."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import typer
import yaml

from worker import errors, events
from worker.cli import app
from worker.store import schema

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "worker/README.md", "models/README.md", "deploy/README.md")


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text("utf-8"))
    missing = [link for link in links if not ((ROOT / page).parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_every_verb_a_page_names_exists(page: str) -> None:
    verbs = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    named = set(re.findall(r"`(?:\.venv/bin/)?synoptic ([a-z-]+)", (ROOT / page).read_text("utf-8")))
    assert named <= verbs


def test_the_runbook_explains_every_warning_and_error_of_the_log() -> None:
    from worker.ops.log import ERRORS, WARNINGS

    runbook = (ROOT / "deploy" / "README.md").read_text("utf-8")
    assert ERRORS | WARNINGS <= events.NAMES
    assert [name for name in sorted(ERRORS | WARNINGS) if f"`{name}`" not in runbook] == []


def test_the_states_drawn_are_the_states_there_are() -> None:
    for page in ("worker/README.md", "worker/store/queue.py"):
        drawn = (ROOT / page).read_text("utf-8")
        assert [state for state in schema.JOB_STATES if state not in drawn] == []


def test_the_tree_of_errors_is_the_one_drawn_above_it() -> None:
    drawn = set(re.findall(r"[├└]── (\w+)", errors.__doc__ or ""))
    there = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.WorkerError)}
    assert drawn | {"WorkerError"} == there


def test_the_container_runs_our_verbs_without_a_privilege() -> None:
    services = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text("utf-8"))["services"]
    worker = services["worker"]
    verbs = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert {*re.findall(r"synoptic (\w+)", worker["entrypoint"][-1])} == {"migrate", "all"} <= verbs
    assert tomllib.loads((ROOT / "deploy" / "compose.toml").read_text("utf-8"))["run"]["bundles"]
    sandbox = {"user": "synoptic", "read_only": True, "cap_drop": ["ALL"], "security_opt": ["no-new-privileges:true"]}
    assert sandbox.items() <= worker.items()
    assert all(port.startswith("127.0.0.1:") for one in services.values() for port in one.get("ports", ()))


def test_no_page_holds_a_path_of_one_machine() -> None:
    for page in PAGES:
        assert not re.search(r"/(root|home|Users|tmp|work)/\w", (ROOT / page).read_text("utf-8"))
