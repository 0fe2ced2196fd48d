"""A file that is whole at every moment: written beside its place, on the disk before it takes it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(file: Path) -> Iterator[BinaryIO]:
    """Open a stream whose bytes become `file` at the end; where something fails, the old file stays and nothing lies beside it.

    Raises
    ------
    OSError
        It cannot be written; names the folder.
    """
    part = file.with_name(f"{file.name}.part")
    try:
        with part.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)
    except (OSError, RuntimeError) as exc:  # a full disk is a RuntimeError to torch.save
        why = os.strerror(exc.errno) if isinstance(exc, OSError) and exc.errno else "the disk may be full"
        raise OSError(f"{file.name} cannot be written into {file.parent}: {why}.") from exc
    finally:
        part.unlink(missing_ok=True)
