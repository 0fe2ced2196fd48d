"""What other users of the host may change or read, what a process leaves of its memory, and what of a secret is ever shown."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from worker import config, daemon, doctor, host
from worker.config import Config, ConfigError, Destination, FhirServer, Receive, Run, Site, Table
from worker.errors import WorkerError
from worker.store.database import DatabaseUnavailable, Store

SECRET = "plant-s3cret"
PASSWORD = "plant-passw0rd"
NAMES = ("bundle/metadata.json", "mappings/labs.toml", "keys/receive.pem", "keys/pacs.pem", "keys/fhir.pem", "etc/synoptic.toml")


@pytest.fixture
def safe(tmp_path: Path) -> Config:
    """A configuration whose files are nobody else's: a bundle, a mapping, three keys, two passwords."""
    tmp_path.chmod(0o700)
    for name in NAMES:
        (tmp_path / name).parent.mkdir(exist_ok=True, mode=0o750)
        (tmp_path / name).write_text(f'client_secret = "{SECRET}"\n')
        (tmp_path / name).chmod(0o640)
    return replace(
        Config(),
        site=Site(data=tmp_path / "data", database=f"postgresql+psycopg://us:{PASSWORD}@localhost/synoptic"),
        run=Run(bundles=(tmp_path / "bundle",)),
        receive=Receive(tls_certificate=str(tmp_path / "keys/receive.pem")),
        destinations=(
            Destination(
                name="pacs", ae_title="P", host="h", port=1, tls=True, tls_key=str(tmp_path / "keys/pacs.pem"), stow_secret=f"{SECRET}3"
            ),
        ),
        fhir=FhirServer(url="https://f", client_id="me", client_secret=SECRET, key_file=str(tmp_path / "keys/fhir.pem")),
        tables=(Table(name="labs", database=f"postgresql://t:{SECRET}2@h/w", query="q", mapping=tmp_path / "mappings/labs.toml"),),
    )


@pytest.mark.requirement("X9")
@pytest.mark.parametrize("name", NAMES)
def test_what_every_user_may_change_is_refused_at_the_start_and_told_by_doctor(safe: Config, tmp_path: Path, name: str) -> None:
    """The file, and the folder in which another could take its place; a sticky folder's files are their owners'."""
    given = tmp_path / "etc/synoptic.toml"
    assert host.changeable(safe, given) == []
    for path, mode in ((tmp_path / name, 0o646), ((tmp_path / name).parent, 0o757)):
        before = path.stat().st_mode
        path.chmod(mode)
        (sentence,) = host.changeable(safe, given)
        assert sentence.startswith(f"{path} can be changed by every user of this host")
        with pytest.raises(ConfigError, match="can be changed by every user"):
            daemon.supervise(safe, given, wanted=("deliver",))
        path.chmod(before)
    (tmp_path / name).parent.chmod(0o1757)
    assert host.changeable(safe, given) == []


@pytest.mark.requirement("X9")
def test_doctor_fails_where_files_may_be_changed(safe: Config, tmp_path: Path) -> None:
    given = tmp_path / "etc/synoptic.toml"
    given.chmod(0o666)
    local = replace(safe, site=Site(data=tmp_path / "data"), run=Run(), fhir=FhirServer(), destinations=(), receive=Receive())
    found = {what: (words, is_well) for what, words, is_well in doctor.checks(local, given) if what == "protection"}
    assert found["protection"][1] is False
    assert "chmod o-w" in found["protection"][0]


@pytest.mark.requirement("X9")
@pytest.mark.parametrize("user", [0, 1000])
def test_root_and_keys_and_secrets_that_all_may_read_are_told_and_do_not_stop_reception(
    safe: Config, tmp_path: Path, user: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    given = tmp_path / "etc/synoptic.toml"
    as_root = ["This runs as root: run it as a user of its own (deploy/README.md)."] if user == 0 else []
    assert host.exposed(safe, given) == as_root
    (tmp_path / "keys/fhir.pem").chmod(0o644)
    given.chmod(0o644)
    key, secret, *rest = host.exposed(safe, given)
    assert "fhir.pem holds a key and can be read" in key
    assert "synoptic.toml holds a secret and can be read" in secret
    assert SECRET not in key + secret
    assert rest == as_root
    given.write_text("[site]\n")  # the secret is in the environment
    assert len(host.exposed(safe, given)) == 1 + len(as_root)


@pytest.mark.requirement("X1")
def test_a_process_of_ours_leaves_no_core_and_no_memory_for_its_neighbors() -> None:
    """Each child of the supervisor begins in the same `main`: an exec makes a process dumpable again (prctl(2))."""
    seen = "import ctypes, resource; print(resource.getrlimit(resource.RLIMIT_CORE), ctypes.CDLL(None).prctl(3))"
    script = f"from worker import cli\ncli.typer.main.get_command = lambda _: lambda: exec({seen!r})\ncli.main()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "(0, 0) 0\n", done.stderr


def _of_the_file(_: Config, folder: Path) -> object:
    (folder / "c.toml").write_text(
        f'[site]\ndatabase = "postgresql+psycopg://us:{PASSWORD}@[bad/x"\n[fhir]\nclient_secret = ["{SECRET}"]\n'
    )
    return config.read(folder / "c.toml")


def _of_the_environment(_: Config, _folder: Path) -> object:
    os.environ["SYNOPTIC_FHIR__CLIENT_SECRET"] = SECRET
    os.environ["SYNOPTIC_SITE__DATABASE"] = f"nodriver://us:{PASSWORD}@h/x"
    try:
        return Store(config.read(None).database_url)
    finally:
        del os.environ["SYNOPTIC_FHIR__CLIENT_SECRET"], os.environ["SYNOPTIC_SITE__DATABASE"]


@pytest.mark.requirement("X10")
@pytest.mark.parametrize(
    "make",
    [
        _of_the_file,
        _of_the_environment,
        lambda _safe, _folder: Store(f"postgresql+psycopg://us:{PASSWORD}@127.0.0.1:1/x").check(),
        lambda _safe, _folder: Store(f"postgresql+psycopg://us:{PASSWORD}@x@127.0.0.1:1/x").check(),
        lambda _safe, _folder: Store(f"mysql:{PASSWORD}@@@"),
        lambda safe, _folder: Store(replace(safe, site=Site(database=f"postgresql+psycopg://us:{PASSWORD}@h:port/x")).database_url),
    ],
)
def test_no_error_repeats_a_secret(safe: Config, tmp_path: Path, make: Callable[[Config, Path], object]) -> None:
    """The causes behind an error included: whoever prints a traceback prints them."""
    with pytest.raises((ConfigError, WorkerError, DatabaseUnavailable)) as caught:
        make(safe, tmp_path)
    error: BaseException | None = caught.value
    while error is not None:
        assert SECRET not in f"{error}{error!r}"
        assert PASSWORD not in f"{error}{error!r}"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


@pytest.mark.requirement("X10")
def test_a_configuration_that_is_shown_shows_no_secret(safe: Config) -> None:
    """In a debugger, a traceback with values, a test's report."""
    assert host.secrets(safe) == {SECRET, f"{SECRET}2", f"{SECRET}3", PASSWORD}
    assert SECRET not in repr(safe)
    assert PASSWORD not in repr(safe)


@pytest.mark.requirement("X10")
@pytest.mark.parametrize("password", ["p[a", "p]a", "p[a]b", "p/a", "p#a", "p?a", "p:a"])
def test_a_password_that_only_the_database_can_read_is_a_secret_too_and_stops_no_start(safe: Config, tmp_path: Path, password: str) -> None:
    """SQLAlchemy takes what the standard library refuses or cuts off: an installation that ran before must start."""
    local = replace(Config(), site=Site(data=tmp_path / "data", database=f"postgresql+psycopg://us:{password}@db.klinik/synoptic"))
    assert Store(local.database_url).url.password == password
    assert host.secrets(local) == {password}
    host.exposed(local, None)


@pytest.mark.requirement("X9")
def test_a_password_that_the_file_spells_with_percent_signs_is_told_of_where_all_may_read_it(safe: Config, tmp_path: Path) -> None:
    given = tmp_path / "etc/synoptic.toml"
    local = replace(Config(), site=Site(data=tmp_path / "data", database="postgresql+psycopg://us:p%40ss%2Fw@h/x"))
    given.write_text(f'[site]\ndatabase = "{local.site.database}"\n')
    given.chmod(0o644)
    assert any("holds a secret" in sentence for sentence in host.exposed(local, given))


@pytest.mark.requirement("X10")
def test_neither_the_version_nor_doctor_nor_help_shows_a_secret(tmp_path: Path) -> None:
    given = tmp_path / "synoptic.toml"
    given.write_text(
        f'[site]\ndata = "data"\ndatabase = "postgresql+psycopg://us:{PASSWORD}@127.0.0.1:1/x"\n'
        f'[fhir]\nurl = "http://127.0.0.1:1/r4"\nissuer_system = "urn:x"\ntoken_url = "http://127.0.0.1:1/t"\n'
        f'client_id = "me"\nclient_secret = "{SECRET}"\n'
    )
    said = ""
    for words in (["--version"], ["doctor", "--config", str(given)], ["all", "--config", str(given)], ["all", "--help"]):
        done = subprocess.run([sys.executable, "-m", "worker", *words], capture_output=True, text=True, timeout=100, check=False)
        said += done.stdout + done.stderr
    assert "protection" in said
    assert "database" in said
    assert SECRET not in said
    assert PASSWORD not in said


def test_who_runs_a_command_is_said_also_where_the_host_knows_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rootless container's user has a number alone."""
    for name in ("SUDO_USER", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 987_654)
    assert host.caller() == "uid 987654"
    monkeypatch.setenv("SUDO_USER", "ada")
    assert host.caller() == "ada"
