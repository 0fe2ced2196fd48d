"""What the verbs of the command line share: the installation that is meant, a study by what people call it, how one speaks and ends.

Not here: the verbs (cli.py and the files that it registers).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Final, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from worker import config
from worker.config import Config, ConfigError
from worker.store import studies
from worker.store.database import Store

#: Exit codes (sysexits.h where one fits); deploy/README.md has them as a table.
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_NOT_FOUND: Final = 3
EXIT_UNAVAILABLE: Final = 69
EXIT_CONFIG: Final = 78

out, err = Console(highlight=False), Console(stderr=True, highlight=False)

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", envvar="SYNOPTIC_CONFIG", help="The TOML file; else ./synoptic.toml, else /etc/synoptic/synoptic.toml."),
]
StudyArg = Annotated[str, typer.Argument(help="Its number in `synoptic studies`, its accession number or its Study Instance UID.")]
AsJson = Annotated[bool, typer.Option("--json", help="For a program.")]


def fail(sentence: str, code: int) -> NoReturn:
    """Say `sentence` in red and end the program with `code`."""
    err.print(f"[red]{escape(sentence)}[/red]", soft_wrap=True)
    sys.exit(code)


def needed(given: Path | None) -> Path | None:
    """The configuration file that counts; None where the environment alone configures.

    Raises
    ------
    ConfigError
        There is neither: that is an error, and not an empty installation.
    """
    path = config.config_file(given)
    if path is None and not any(name.startswith(config.ENVIRONMENT_PREFIX) for name in os.environ):
        raise ConfigError(
            "there is none at ./synoptic.toml or /etc/synoptic/synoptic.toml. Start from deploy/synoptic.toml, or say --config FILE."
        )
    return path


def installation(given: Path | None) -> tuple[Config, Store]:
    """The configuration and its database, open and of this program's version.

    Raises
    ------
    ConfigError, DatabaseUnavailable
        With a sentence that says what to do.
    """
    settings = config.read(needed(given))
    store = Store(settings.database_url)
    store.check()
    return settings, store


def find(store: Store, wanted: str) -> int:
    """The row of the study that a person calls `wanted`; ends the program where there is none, or several."""
    with store.read() as conn:
        found = studies.find(conn, wanted)
    if not found:
        fail("There is no such study here. `synoptic studies` lists those there are.", EXIT_NOT_FOUND)
    if len(found) > 1:
        several = ", ".join(f"No. {number} {one.study_instance_uid}" for number, one in found)
        fail(f"This is the number or accession number of {len(found)} studies: say a Study Instance UID ({several}).", EXIT_NOT_FOUND)
    return found[0][0]
