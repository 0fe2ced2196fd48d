"""Throughput and lag as SVG: bars and lines drawn here, styled by the page's own style sheet, light and dark."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, tzinfo
from typing import Final

from markupsafe import Markup

from worker.store import measures
from worker.store.database import Connection
from worker.web import words

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 1100, 260, 64, 8, 10, 28
#: Jobs of one picture, at most, the newest; a month of a large hospital.
_MOST: Final = 100_000


@dataclass(frozen=True, slots=True)
class Row:
    """One stretch of time: what came, what went, and seconds from the last image to the report."""

    begin: datetime
    received: int
    delivered: int
    failed: int
    median: float | None
    p95: float | None


@dataclass(frozen=True, slots=True)
class Told:
    """What the page shows."""

    rows: Sequence[Row]
    received: int
    delivered: int
    median: str
    p95: str
    bars: Markup
    lag: Markup


def look(conn: Connection, *, now: datetime, days: int, zone: tzinfo) -> Told:
    """What came and went in the last days: of one day by the hour, of a week by six hours, of more by the day."""
    hours = 1 if days == 1 else 6 if days <= 7 else 24
    end = now.astimezone(zone).replace(minute=0, second=0, microsecond=0) + timedelta(hours=1)
    if hours > 1:
        end += timedelta(hours=-end.hour % hours)
    begins = [end - timedelta(hours=hours * ago) for ago in range(24 * days // hours, 0, -1)]
    received = [0] * len(begins)
    for at in measures.begun(conn, begins[0]):
        received[bisect_right(begins, at) - 1] += 1
    delivered, failed = [0] * len(begins), [0] * len(begins)
    lags: list[list[float]] = [[] for _ in begins]
    for at in measures.given_up(conn, begins[0]):
        failed[bisect_right(begins, at) - 1] += 1
    for at, came in measures.ended(conn, begins[0], limit=_MOST):
        one = bisect_right(begins, at) - 1
        delivered[one] += 1
        if came is not None:
            lags[one].append((at - came).total_seconds())
    rows = [Row(begins[n], received[n], delivered[n], failed[n], _share(lags[n], 0.5), _share(lags[n], 0.95)) for n in range(len(begins))]
    all_lags = [one for several in lags for one in several]
    median, p95 = _share(all_lags, 0.5), _share(all_lags, 0.95)
    return Told(
        rows,
        sum(received),
        sum(delivered),
        "" if median is None else words.lasted(median),
        "" if p95 is None else words.lasted(p95),
        _bars(rows, hours),
        _lines(rows, hours),
    )


def _share(values: Sequence[float], share: float) -> float | None:
    """The smallest value that so many are not above; None of none."""
    ordered = sorted(max(0.0, one) for one in values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


def _bars(rows: Sequence[Row], hours: int) -> Markup:
    top = max((max(row.received, row.delivered, row.failed) for row in rows), default=0)
    step = _WIDTH_OF / len(rows)
    drawn = []
    for n, row in enumerate(rows):
        for place, (name, value) in enumerate((("received", row.received), ("delivered", row.delivered), ("failed", row.failed))):
            height = (_HEIGHT_OF) * value / _nice(top)
            x, width = _LEFT + n * step + step * (0.12 + 0.26 * place), step * 0.24
            drawn.append(
                f'<rect class="{name}" x="{x:.1f}" y="{_TOP + _HEIGHT_OF - height:.1f}" width="{width:.1f}" height="{height:.1f}"/>'
            )
    words_said = f"Bars: {sum(row.received for row in rows)} studies received, {sum(row.delivered for row in rows)} reports delivered."
    return _plot(words_said, rows, hours, _nice(top), lambda value: f"{value:g}", "".join(drawn))


def _lines(rows: Sequence[Row], hours: int) -> Markup:
    top = max((row.p95 or 0.0 for row in rows), default=0.0)
    whole = _nice(top)
    step = _WIDTH_OF / len(rows)
    drawn = []
    for name in ("p95", "median"):
        found = [(_LEFT + (n + 0.5) * step, getattr(row, name)) for n, row in enumerate(rows) if getattr(row, name) is not None]
        points = [(x, _TOP + _HEIGHT_OF * (1 - value / whole)) for x, value in found]
        drawn.append(f'<polyline class="{name}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>')
        drawn += [f'<circle class="{name}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points]
    return _plot(
        "Lines: median and 95th percentile of the time from last image to report.", rows, hours, whole, words.lasted, "".join(drawn)
    )


_WIDTH_OF: Final = _WIDTH - _LEFT - _RIGHT
_HEIGHT_OF: Final = _HEIGHT - _TOP - _BOTTOM


def _nice(top: float) -> float:
    """The next of 4, 8, 12, 20, 40, 80 …, so that the four lines of a grid have short names."""
    power = 1.0
    while True:
        for factor in (4, 8, 12, 20):
            if factor * power >= top:
                return factor * power
        power *= 10


def _plot(said: str, rows: Sequence[Row], hours: int, whole: float, name: Callable[[float], str], drawn: str) -> Markup:
    step = _WIDTH_OF / len(rows)
    parts = []
    for part in range(5):
        y = _TOP + _HEIGHT_OF * (1 - part / 4)
        parts.append(f'<line class="{"grid" if part else "axis"}" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{name(whole * part / 4)}</text>')
    every = max(1, -(-len(rows) // 12))
    for n in range(0, len(rows), every):
        text = (
            f"{rows[n].begin:%H:%M}"
            if hours == 1
            else f"{rows[n].begin:%m-%d}"
            if hours == 24 or rows[n].begin.hour == 0
            else f"{rows[n].begin:%H:%M}"
        )
        parts.append(f'<text x="{_LEFT + n * step:.1f}" y="{_HEIGHT - 8}">{text}</text>')
    # Numbers and words of ours alone.
    return Markup(  # noqa: S704
        f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{said}">{"".join(parts)}{drawn}</svg>'
    )
