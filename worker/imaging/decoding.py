"""Files to stored pixel values, in child processes with a memory and a time limit.

::

    read(paths, digests) ─▶ chunks ─▶ thread ◀─ socket: one JSON line a file ─▶ child.py: pixels.py
                                         └──◀── memfd: the pixels ──────────┘

A decoder is C code fed by strangers: it may crash, loop or swell. So it runs in a child that can be killed, and what
comes back is JSON and bytes, never a pickle. This module is light (numpy only): the receiver asks it which codecs there are.
Not here: what a file must look like (pixels.py), what the values mean (volume.py).

A child that dies or overruns a limit is replaced. The input it was working on gets `DecoderDied` (Retry) the first time
and `PixelError` (Reject) the second: once may be the machine's fault, twice is the file's. The count is this pool's.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np

from worker.errors import DecoderDied, GeometryError, PixelError, Retry, StoredFileLost, WorkerError
from worker.imaging.codecs import CODECS
from worker.imaging.frame import Frame

#: Files per request: enough to hide the round trip, few enough that two children share a short series.
CHUNK: Final = 8
#: Longest answer about one file without its pixels.
MAX_ANSWER_BYTES: Final = 1 << 25
#: How many inputs that killed a child are remembered.
_REMEMBERED: Final = 1024
_ERRORS: Final[Mapping[str, type[WorkerError]]] = {error.__name__: error for error in (PixelError, GeometryError, Retry, StoredFileLost)}


def codec_versions() -> Mapping[str, str]:
    """Return what each decoder's library calls its version, '' if it cannot be loaded; asked of a child that then ends.

    Raises
    ------
    DecoderDied
        A child cannot be started.
    """
    with DecoderPool(processes=1) as pool:
        return pool.warm()


class _Died(Exception):
    """The child is gone, or has to go; the text says why."""


class _Child:
    """One decoding process and the socket to it. Owned by one thread at a time."""

    def __init__(self, *, memory_bytes: int) -> None:
        #: Answers still to come; a child with some left is out of step and may not be asked again.
        self.left = 0
        self._socket, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-P", "-m", "worker.imaging.child", str(theirs.fileno()), str(memory_bytes), str(os.getpid())]
            # A small, known environment: our own package first, one thread per library, nothing of the operator's.
            environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
            # Codecs write what they find in a file to stderr: nobody may read it.
            self._process = subprocess.Popen(  # noqa: S603  our own interpreter, our own module
                command,
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C is the parent's to handle: it finishes what it has in hand
            )
        self.pid = self._process.pid

    def is_alive(self) -> bool:
        """Tell whether the process still runs; an idle one may have been killed for the host's memory."""
        return self._process.poll() is None

    def ask(self, request: Mapping[str, object], *, answers: int) -> None:
        """Send one request, a length and JSON, that has so many answers."""
        self.left = answers
        text = json.dumps(request).encode()
        try:
            self._socket.settimeout(10.0)
            self._socket.sendall(struct.pack("<I", len(text)) + text)
        except OSError as exc:
            raise _Died(self._cause(f"did not take a request ({type(exc).__name__})")) from exc

    def answer(self, *, timeout_s: float) -> tuple[dict[str, Any], int]:
        """Return the next answer and the descriptor of its pixels, -1 if it has none."""
        deadline = time.monotonic() + timeout_s
        fds: list[int] = []
        try:
            (size,) = struct.unpack("<I", self._take(4, deadline, fds))
            if size > MAX_ANSWER_BYTES:
                raise _Died(f"answered {size} bytes where at most {MAX_ANSWER_BYTES} are expected")
            answer: dict[str, Any] = json.loads(self._take(size, deadline, fds))
            self.left = 0 if "error" in answer else self.left - 1
            return answer, fds.pop() if fds else -1
        except TimeoutError as exc:
            raise _Died(f"took longer than {timeout_s:g} s") from exc
        except (OSError, ValueError) as exc:
            raise _Died(self._cause(f"broke off ({type(exc).__name__})")) from exc
        finally:
            for fd in fds:
                os.close(fd)

    def _take(self, size: int, deadline: float, fds: list[int]) -> bytes:
        taken = b""
        while len(taken) < size:
            self._socket.settimeout(max(deadline - time.monotonic(), 1e-3))
            part, received, _, _ = socket.recv_fds(self._socket, size - len(taken), 1, socket.MSG_CMSG_CLOEXEC)
            fds.extend(received)
            if not part:
                raise _Died(self._cause("ended"))
            taken += part
        return taken

    def _cause(self, otherwise: str) -> str:
        try:
            code = self._process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            return otherwise
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"

    def close(self) -> None:
        """End the process at once; it holds nothing that could be lost."""
        self._socket.close()
        self._process.kill()
        self._process.wait()


class DecoderPool:
    """Warm child processes that turn files into `Frame` values; safe to use from several threads.

    Parameters
    ----------
    processes
        How many children; they start when first needed, or in `warm`.
    memory_bytes
        Address space of one child, and the most stored pixels that one `read` may return.
    timeout_s
        How long one file may take.
    """

    def __init__(self, *, processes: int = 2, memory_bytes: int = 2 * 2**30, timeout_s: float = 60) -> None:
        self._processes = processes
        self._memory_bytes = memory_bytes
        self._timeout_s = timeout_s
        # Last in, first out: a lone radiograph meets the child that is warm.
        self._idle: queue.LifoQueue[_Child | None] = queue.LifoQueue()
        for _ in range(processes):
            self._idle.put(None)
        # These threads live as long as the pool: PR_SET_PDEATHSIG kills a child when the thread that started it ends.
        self._threads = ThreadPoolExecutor(max_workers=processes, thread_name_prefix="decoder")
        self._lock = threading.Lock()
        self._deaths: OrderedDict[str, int] = OrderedDict()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the children; the pool is of no use afterwards."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        while not self._idle.empty():
            child = self._idle.get_nowait()
            if child is not None:
                child.close()

    def pids(self) -> tuple[int, ...]:
        """Return the process ids of the children that are idle now, for `doctor` and the tests."""
        with self._idle.mutex:
            return tuple(child.pid for child in self._idle.queue if child is not None)

    def warm(self) -> Mapping[str, str]:
        """Start every child and return what each decoder's library calls its version; '' if it cannot be loaded.

        Raises
        ------
        DecoderDied
            A child cannot be started.
        """
        meet = threading.Barrier(self._processes)
        found = [self._threads.submit(self._versions, meet) for _ in range(self._processes)]
        versions = [future.result() for future in found]
        return versions[0]

    def _versions(self, meet: threading.Barrier) -> Mapping[str, str]:
        child = self._lease()
        try:
            meet.wait(timeout=self._timeout_s)  # so that each task holds a child of its own
            child.ask({"codecs": sorted(set(CODECS.values()) - {""})}, answers=1)
            answer, _ = child.answer(timeout_s=self._timeout_s)
        except (_Died, threading.BrokenBarrierError) as exc:
            raise DecoderDied(f"A decoding process {exc} when it was asked for its codecs.") from exc
        finally:
            self._give_back(child)
        return {str(name): str(version) for name, version in answer.items()}

    def _lease(self) -> _Child:
        child = self._idle.get()
        if child is not None:
            if child.is_alive():
                return child
            child.close()
        try:
            return _Child(memory_bytes=self._memory_bytes)
        except OSError as exc:
            self._idle.put(None)
            raise DecoderDied(f"A decoding process cannot be started (errno {exc.errno}).") from exc

    def _give_back(self, child: _Child) -> None:
        """Keep a child that is in step; replace any other: a child is cheap, a mixed-up answer is not."""
        if child.left:
            child.close()
        self._idle.put(None if child.left else child)

    def read(self, paths: Sequence[Path], digests: Sequence[str], *, color: str = "refuse") -> tuple[tuple[Frame, ...], ...]:
        """Read every file once, check it against its digest and decode it.

        Parameters
        ----------
        digests
            The sha256 of each whole file, lower hex, in the order of `paths`.
        color
            "refuse" images with colours, or reduce them to their "luminance" (PS3.3 §C.7.6.3.1.2).

        Returns
        -------
        tuple of tuple of Frame
            For each of `paths` in turn, its frames in the order of the file.

        Raises
        ------
        PixelError
            A file is malformed, has colours that are not wanted, is in a transfer syntax that is not decoded, larger than
            the limits, or has killed a decoding process before.
        GeometryError
            A spacing, position or orientation is not what the standard says.
        DecoderDied
            A decoding process met its memory or time limit, or crashed, on a file that had not done so before.
        Retry
            A stored file cannot be read now.
        """
        files = [(str(path), digest) for path, digest in zip(paths, digests, strict=True)]
        size = min(CHUNK, -(-len(files) // self._processes) or 1)
        budget = _Budget(self._memory_bytes)
        chunks = [self._threads.submit(self._read_chunk, files[at : at + size], budget, color) for at in range(0, len(files), size)]
        try:
            return tuple(one for chunk in chunks for one in chunk.result())
        except WorkerError:
            budget.stop()
            raise

    def _read_chunk(self, files: Sequence[tuple[str, str]], budget: _Budget, color: str) -> list[tuple[Frame, ...]]:
        if budget.is_stopped:
            return []
        child = self._lease()
        done: list[tuple[Frame, ...]] = []
        try:
            child.ask({"files": files, "color": color}, answers=len(files))
            while len(done) < len(files):
                answer, fd = child.answer(timeout_s=self._timeout_s)
                if "error" in answer:
                    raise _ERRORS.get(str(answer["error"]), PixelError)(str(answer.get("message")))
                done.append(_frames(answer, fd, budget))
        except _Died as exc:
            child.left = max(child.left, 1)
            raise self._death(files[len(done)][1], str(exc)) from exc
        finally:
            self._give_back(child)
        return done

    def _death(self, digest: str, cause: str) -> WorkerError:
        with self._lock:
            deaths = self._deaths.pop(digest, 0) + 1
            self._deaths[digest] = deaths
            while len(self._deaths) > _REMEMBERED:
                self._deaths.popitem(last=False)
        which = f"on the file with sha256 {digest[:12]}…"
        if deaths == 1:
            return DecoderDied(f"The decoding process {cause} {which}")
        return PixelError(f"The decoding process {cause} {which} This file has done so {deaths} times.")


class _Budget:
    """How many bytes of pixels one `read` may still take, and whether it has been given up; shared by its threads."""

    def __init__(self, size: int) -> None:
        self._left = self._size = size
        self._lock = threading.Lock()
        self.is_stopped = False

    def take(self, size: int) -> None:
        with self._lock:
            self._left -= size
            if self._left < 0:
                raise PixelError(f"The series has more than {self._size} bytes of pixels, which is the limit.")

    def stop(self) -> None:
        self.is_stopped = True


def _frames(answer: dict[str, Any], fd: int, budget: _Budget) -> tuple[Frame, ...]:
    """Take the pixels that belong to one answer over, and make a `Frame` of each plane of them."""
    try:
        if "limit" in answer:
            raise _Died(str(answer["limit"]))
        shared = {name: _frozen(value) for name, value in answer["shared"].items()}
        each = [{name: _frozen(value) for name, value in one.items()} for one in answer["frames"]]
        (count, rows, columns), dtype = answer["shape"], np.dtype(answer["dtype"])
        budget.take(count * rows * columns * dtype.itemsize)
        pixels = np.empty((count, rows, columns), dtype)
        # A copy, not a map: a child cannot take away or change what has been copied. 200 slices of 512 x 512 x 16: 0.1 s.
        if os.preadv(fd, [pixels.data], 0) != pixels.nbytes:
            raise _Died("handed over fewer pixels than it said")
        return tuple(Frame(**(shared | facts), pixels=plane) for facts, plane in zip(each, pixels, strict=True))
    except (TypeError, ValueError, KeyError, OSError) as exc:
        raise _Died(f"answered something else than frames ({type(exc).__name__})") from exc
    finally:
        if fd >= 0:
            os.close(fd)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
