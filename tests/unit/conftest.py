"""What unit tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from models.bundle import Bundle
from tests.unit import small_bundle
from worker.imaging.decoding import DecoderPool


@pytest.fixture(scope="module")
def pool() -> Iterator[DecoderPool]:
    """Two warm children, as in service."""
    with DecoderPool(processes=2) as made:
        made.warm()
        yield made


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks as small as the tests' are slower on several threads: these wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """The small bundle, not trained."""
    return Bundle.read(small_bundle.write(tmp_path / "small"), verify=False)
