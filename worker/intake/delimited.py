"""A file of delimited text, cut into rows with their line numbers: encodings, byte order marks, quotes, half-written files.

RFC 4180 as `csv` of the standard library reads it in its strict mode. Line by line, so that a file of any size takes the memory of
its longest row, and a line that cannot be read costs only itself. Nothing is evaluated: "=cmd" is a text.
Not here: what the columns mean (tables.py).
"""

from __future__ import annotations

import codecs
import csv
import io
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Final

from worker.errors import RecordError

#: A report in one field has some 10 kB; a file without line ends must not be read as one line.
MAX_LINE_BYTES: Final = 2**20
# Longest first: UTF-32's little-endian mark begins with UTF-16's.
_MARKS: Final = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

#: A line's number, counted from 1, and its text or why it has none.
Line = tuple[int, str | RecordError]
#: The number of a row's first line, and its fields or why it has none.
NumberedRow = tuple[int, list[str] | RecordError]


class Unfinished(RecordError):
    """The file may still be being written: it is taken the next time."""


def unfinished(path: Path, *, encoding: str, quiet_s: float) -> str:
    """Why the file may still be being written, as a sentence; '' if it looks whole.

    Parameters
    ----------
    quiet_s
        Seconds for which nothing must have changed.

    Raises
    ------
    OSError
        The file cannot be read.
    """
    if time.time() - path.stat().st_mtime < quiet_s:
        return (
            f"The file changed less than {quiet_s:g} s ago, or its time is in the future; it may still be being written: import it again."
        )
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - 4))
        tail = file.read()
    if not size:
        return "The file is empty; it may still be being written."
    if not tail.endswith(_line_ends(encoding)):
        return "The last line has no line end; the file may be half written. If it is whole, add a line end."
    return ""


def _line_ends(encoding: str) -> tuple[bytes, ...]:
    name = codecs.lookup(encoding).name
    wide = name.startswith(("utf-16", "utf-32"))
    return tuple("\n".encode(name[:6] + end) for end in ("-le", "-be")) if wide else (b"\n",)


def rows(path: Path, *, delimiter: str, quote: str, encoding: str, progress: Callable[[int], None]) -> Iterator[NumberedRow]:
    """Cut a file into rows; empty lines are passed by.

    Parameters
    ----------
    progress
        Called with the number of bytes read since the last call.

    Raises
    ------
    RecordError
        The file is not in `encoding` at all, by its byte order mark.
    OSError
        The file cannot be read.
    """
    with path.open("rb") as file:
        source = _Source(_lines(file, _encoding(file, encoding), progress))
        reader = csv.reader(source, delimiter=delimiter, quotechar=quote, strict=True)
        while (line := source.peek()) is not None:
            number, text = line
            if isinstance(text, RecordError):
                source.drop()
                yield number, text
                continue
            try:
                row = next(reader)
            except csv.Error:
                source.keep_first()
                yield number, RecordError("A quoted field does not end, or goes on after its closing quote.")
            else:
                source.done()
                if any(row):
                    yield number, row


def _encoding(file: BinaryIO, encoding: str) -> str:
    """Pass over a UTF-8 mark; refuse a mark of another encoding than the mapping's."""
    head = file.read(4)
    name = codecs.lookup(encoding).name.replace("utf-8-sig", "utf-8")
    mark, marked = next((pair for pair in _MARKS if head.startswith(pair[0])), (b"", ""))
    if marked and not name.startswith(marked):
        raise RecordError(f'The file begins with the byte order mark of {marked}, the mapping says {encoding}. Set encoding = "{marked}".')
    # The UTF-16 and UTF-32 codecs need their mark, unless their name says the byte order.
    file.seek(len(mark) if marked == "utf-8" or name[6:] else 0)
    return name


def _lines(file: BinaryIO, encoding: str, progress: Callable[[int], None]) -> Iterator[Line]:
    if encoding.startswith(("utf-16", "utf-32")):
        return _wide_lines(file, encoding, progress)
    return _narrow_lines(file, encoding, progress)


def _narrow_lines(file: BinaryIO, encoding: str, progress: Callable[[int], None]) -> Iterator[Line]:
    """Lines of an encoding in which a line end is one byte, each decoded on its own: one bad line spares the others."""
    number = 0
    while raw := file.readline(MAX_LINE_BYTES):
        number += 1
        progress(len(raw))
        if not raw.endswith(b"\n"):
            reason = f"The line is longer than {MAX_LINE_BYTES} bytes." if len(raw) == MAX_LINE_BYTES else "The line has no line end."
            while raw and not raw.endswith(b"\n"):
                raw = file.readline(MAX_LINE_BYTES)
                progress(len(raw))
            yield number, RecordError(reason)
            continue
        try:
            yield number, raw.decode(encoding)
        except UnicodeDecodeError:
            yield number, RecordError(f"The line is not {encoding}, which the mapping says the file is.")


def _wide_lines(file: BinaryIO, encoding: str, progress: Callable[[int], None]) -> Iterator[Line]:
    """Lines of UTF-16 or UTF-32; what follows a bad one cannot be told apart."""
    number, told = 0, file.tell()
    # Only "\n" ends a line, as in the other encodings: line numbers must not depend on the encoding.
    with io.TextIOWrapper(file, encoding=encoding, newline="\n") as text:
        while True:
            number += 1
            try:
                line = text.readline(MAX_LINE_BYTES)
            except UnicodeError:
                yield number, RecordError(f"From some line near this one on the file is not {encoding}; nothing after it was read.")
                return
            if not line:
                return
            if (position := file.tell()) > told:
                progress(position - told)
                told = position
            if not line.endswith("\n"):
                yield number, RecordError("The line has no line end or is too long; nothing after it was read.")
                return
            yield number, line


class _Source:
    """Lines for `csv.reader`, which takes as many as a row has; those it took in vain can be given back."""

    def __init__(self, lines: Iterator[Line]) -> None:
        self._lines = lines
        self._next: deque[Line] = deque()
        self._taken: list[Line] = []

    def __iter__(self) -> _Source:
        return self

    def __next__(self) -> str:
        """The next line of a row; stops before a line that has no text."""
        line = self.peek()
        if line is None or isinstance(line[1], RecordError):
            raise StopIteration
        self._taken.append(self._next.popleft())
        return line[1]

    def peek(self) -> Line | None:
        """The next line, not taken; None at the end."""
        if not self._next:
            line = next(self._lines, None)
            if line is None:
                return None
            self._next.append(line)
        return self._next[0]

    def drop(self) -> None:
        """Pass by the next line."""
        self._next.popleft()

    def done(self) -> None:
        """The lines taken were a row."""
        self._taken.clear()

    def keep_first(self) -> None:
        """Only the first of the lines taken was at fault: an open quote must not cost the rows after it."""
        self._next.extendleft(reversed(self._taken[1:]))
        self._taken.clear()
