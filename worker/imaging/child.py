"""The decoding process: the other end of `decoding.DecoderPool`'s socket, started as ``python -m worker.imaging.child``.

Reads requests, answers each file with one JSON object and a memfd of its pixels. Confined before it reads the first byte.
Not here: what a file must look like (pixels.py). Nothing of a file's text leaves this process but the facts of `Frame`.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import resource
import signal
import socket
import struct
import sys
import warnings
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import version
from typing import Any, Final

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.pixels.decoders.base import get_decoder

from worker.errors import WorkerError
from worker.imaging import pixels
from worker.imaging.codecs import CODECS, DISTRIBUTIONS, PLUGINS

_PR_SET_PDEATHSIG: Final = 1  # prctl(2)
_PR_SET_DUMPABLE: Final = 4


def main(fd: int, memory_bytes: int, parent: int) -> None:
    """Answer requests on the socket `fd` until it closes."""
    _confine(memory_bytes, parent)
    link = socket.socket(fileno=fd)
    while head := link.recv(4, socket.MSG_WAITALL):
        (size,) = struct.unpack("<I", head)
        request = json.loads(link.recv(size, socket.MSG_WAITALL))
        if "codecs" in request:
            _send(link, {name: _version(name) for name in request["codecs"]})
            continue
        for path, digest in request["files"]:
            if not _answer(link, path, digest, memory_bytes=memory_bytes, color=request["color"]):
                break  # the parent knows: after an error nothing more comes


def _confine(memory_bytes: int, parent: int) -> None:
    """Die with the parent, leave no core, take no more memory than allowed, and say nothing of what is read."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    libc.prctl(_PR_SET_DUMPABLE, 0)
    if os.getppid() != parent:
        sys.exit(1)
    for what, most in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_AS, memory_bytes), (resource.RLIMIT_FSIZE, memory_bytes)):
        resource.setrlimit(what, (most, most))
    # pydicom's warnings and log lines quote values.
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE


def _answer(link: socket.socket, path: str, digest: str, *, memory_bytes: int, color: str) -> bool:
    """Answer for one file; False after an error."""
    try:
        shared, frames, stored = pixels.read(path, digest, memory_bytes=memory_bytes, color=color)
    except WorkerError as exc:
        _send(link, {"error": type(exc).__name__, "message": str(exc)})
    except MemoryError:
        _send(link, {"limit": f"needed more than its {memory_bytes} bytes of memory"})
    except RecursionError:
        _send(link, {"error": "PixelError", "message": "The data set is nested deeper than can be read."})
    except Exception as exc:  # noqa: BLE001  hostile headers make pydicom raise anything; its text quotes them
        _send(link, {"error": "PixelError", "message": f"The stored file cannot be parsed ({type(exc).__name__})."})
    else:
        answer = {"shared": shared, "frames": frames, "shape": stored.shape, "dtype": stored.dtype.str}
        _send(link, answer, np.ascontiguousarray(stored))
        return True
    return False


def _send(link: socket.socket, answer: Mapping[str, object], stored: NDArray[Any] | None = None) -> None:
    text = json.dumps(answer).encode()
    data, fds = struct.pack("<I", len(text)) + text, []
    if stored is not None:
        fds.append(os.memfd_create("pixels", os.MFD_CLOEXEC))
        os.write(fds[0], stored.data)
    sent = socket.send_fds(link, [data], fds)
    link.sendall(data[sent:])
    for fd in fds:
        os.close(fd)


def _version(module: str) -> str:
    """Return the version of a decoding module; '' if it cannot be loaded, or pydicom does not find its way to it."""
    uid = next(uid for uid, by in CODECS.items() if by == module)
    try:
        import_module(module)
        is_reached = PLUGINS[module] in get_decoder(pydicom.uid.UID(uid)).available_plugins
        return version(DISTRIBUTIONS[module]) if is_reached else ""
    except (ImportError, OSError):  # OSError: a shared library of another build
        return ""


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:4]))
