"""One configuration: strict, complete, and an error names what would be right."""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from worker import config
from worker.config import Config, ConfigError

ROOT = Path(__file__).parents[2]


def read(tmp_path: Path, text: str, **environ: str) -> Config:
    path = tmp_path / "synoptic.toml"
    path.write_text(text, "utf-8")
    return config.read(path, environ)


def sections() -> dict[str, type]:
    hints = typing.get_type_hints(Config)
    return {name: typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint for name, hint in hints.items()}


def test_the_example_shows_every_key_with_its_default() -> None:
    """An administrator reads the example, not the source: nothing may be missing there, and no default may lie."""
    example = tomllib.loads((ROOT / "deploy" / "synoptic.toml").read_text("utf-8"))
    assert set(example) == set(sections())
    for name, cls in sections().items():
        table = example[name][0] if isinstance(example[name], list) else example[name]
        assert set(table) == {field.name for field in dataclasses.fields(cls)}, name
    read_back = config.read(ROOT / "deploy" / "synoptic.toml", {})
    for name in ("receive", "assembly", "records", "run", "deliver", "log", "audit"):
        assert getattr(read_back, name) == getattr(Config(), name), name


COMMITTING = "[[destinations]]\nname = 'pacs'\nae_title = 'P'\nhost = 'h'\nport = 1\ncommitment = true\n"
HOOK = "[[destinations]]\nname = 'ward'\nwebhook_url = 'https://ward/hook'\n"
STOW = "[[destinations]]\nname = 'web'\nstow_url = '{}'\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[recieve]\nport = 1", "Unknown key 'recieve' in [top level]. Did you mean 'receive'?"),
        ("[receive]\nprot = 1", "Unknown key 'prot' in [receive]. Did you mean 'port'?"),
        ('[receive]\nport = "eleven"', "receive.port must be a whole number, not text in quotes."),
        ('[receive]\nae_title = "MUCH-TOO-LONG-A-TITLE"', "is no AE title"),
        ("[[destinations]]\nname = 'x'", "destinations x needs ae_title, host and port, or stow_url, hl7_host"),
        (STOW.format("https://a/studies") + "documents = ['basic', 'rejection']", "with 'rejection' it must be sent sr, too."),
        (
            STOW.format("https://a/studies")
            + "documents = ['sr', 'rejection']\n"
            + STOW.format("https://b/studies").replace("web", "other")
            + "documents = ['seg', 'keys']",
            "destinations web: documents: with 'rejection' it must be sent seg, keys, too.",
        ),
        (STOW.format("http://pacs.example/studies"), "stow_url must begin with https://"),
        (STOW.format("https://user:secret@pacs/studies"), "user name and password belong in stow_secret"),
        (STOW.format("HTTPS://pacs.example/studies"), "stow_url must begin with https://"),
        (STOW.format("https://pacs/dicom-web"), "stow_url must end with /studies"),
        (STOW.format("https://[pacs/studies"), "stow_url must begin with https://"),
        (STOW.format("https://pacs:99999/studies"), "stow_url must begin with https://"),
        (STOW.format("https://pacs/studies") + "commitment = true", "with stow_url there is no ae_title, host, port or commitment"),
        (STOW.format("https://pacs/studies") + "stow_secret = 'a\\nb'".replace("'", '"'), "printable ASCII"),
        (HOOK + "webhook_secret = 'whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaS'", "what follows is no key in Base64"),
        (HOOK + "webhook_secret = 'whsec_'", "what follows is no key in Base64"),
        (STOW.format("http://localhost/studies") + "tls_ca = 'x'", "the connection would be plain"),
        (COMMITTING.replace("commitment = true", "stow_secret = 'x'"), "stow_secret without stow_url"),
        ('[site]\ntimezone = "Mars/Olympus"', "there is no zone 'Mars/Olympus'"),
        ('[records]\naddresses = ["his.local"]', "is no IP address or network"),
        ("[records]\nmax_connections = 0", "records.max_connections is at least 1"),
        ("[records]\nidle_s = 0", "records.idle_s is more than 0"),
        (COMMITTING, "commitment needs 'P' in [[senders]]"),
        (COMMITTING + "commitment_wait_s = 0", "destinations pacs: commitment_wait_s is more than 0"),
        (COMMITTING + "own_ae_title = 'US'\n[[senders]]\nae_title = 'P'", "own_ae_title must be [receive] ae_title"),
        ("[[senders]]\nae_title = 'CT1'\ntls_names = ['ct1']", "tls_names need [receive] tls_client_ca"),
        ("[audit]\nsyslog_host = 'arr'\ntls_key = 'k.pem'", "audit: tls_key needs tls_certificate"),
        ("[audit]\ntls_ca = 'ca.pem'", "the keys tls_… need syslog_host"),
        ("[audit]\nlimit_mb = 0", "audit: limit_mb is at least 1"),
        ("[audit]\nkeep_days = -1", "keep_days is 0 (as long as limit_mb allows) or more"),
        ("x = [", "is not TOML"),
    ],
)
def test_a_mistake_is_one_sentence_that_says_what_would_be_right(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert said in str(caught.value)


def test_the_environment_overrides_single_keys_and_secrets_need_no_file(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        "[receive]\nport = 1",
        SYNOPTIC_RECEIVE__PORT="2",
        SYNOPTIC_SITE__DATABASE="postgresql+psycopg://x",
        SYNOPTIC_RUN__BUNDLES="a, b",
        SYNOPTIC_RECORDS__ENABLED="false",
        OTHER="1",
    )
    assert found.receive.port == 2
    assert found.database_url == "postgresql+psycopg://x"
    assert [path.name for path in found.run.bundles] == ["a", "b"]
    assert found.records.enabled is False


def test_relative_folders_are_relative_to_the_file(tmp_path: Path) -> None:
    found = read(tmp_path, '[site]\ndata = "d"\n[run]\nbundles = ["b"]')
    assert found.site.data == tmp_path / "d"
    assert found.run.bundles == (tmp_path / "b",)
    assert str(tmp_path / "d" / "synoptic.db") in found.database_url


def test_zones_are_names_or_fixed_offsets() -> None:
    assert config.parse_zone("Europe/Berlin") == ZoneInfo("Europe/Berlin")
    assert str(config.parse_zone("+01:00")) == "UTC+01:00"
    with pytest.raises(ConfigError, match="no offset"):
        config.parse_zone("+1")


def test_the_environment_reaches_an_entry_of_a_list_by_its_name(tmp_path: Path) -> None:
    """A secret of one destination must not have to be in the file."""
    text = STOW.format("https://pacs/studies") + STOW.format("https://pacs/studies").replace("'web'", "'web-2'")
    found = read(tmp_path, text, SYNOPTIC_DESTINATIONS__WEB_2__STOW_SECRET="t0ken", SYNOPTIC_DESTINATIONS__WEB__TIMEOUT_S="7")
    assert [(one.stow_secret, one.timeout_s) for one in found.destinations] == [("", 7.0), ("t0ken", 30.0)]
    for name in ("NOBODY__STOW_SECRET", "WEB"):
        with pytest.raises(ConfigError, match="NAME that of one of its entries"):
            read(tmp_path, text, **{f"SYNOPTIC_DESTINATIONS__{name}": "x"})
