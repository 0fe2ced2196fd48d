"""The figures of an evaluation and of a training, by matplotlib's objects, without pyplot and its global state.

Figures of the page are inline SVG: text stays text, the ink follows the page's color (dark mode, print), and the same
results give the same bytes. Colors are of Okabe and Ito (https://jfly.uni-koeln.de/color/); shape or dash says the same again.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from models.words import (
    ABOVE,
    FEWEST,
    GROUPS,
    Estimate,
    Results,
    Row,
    best,
    close_floors,
    counts,
    headline,
    image_alone,
    metric,
    number,
    of,
    rows,
    share,
)

INK, FAINT = "#010203", "#8b9099"  # INK becomes the page's own text color
VERMILION, BLUE, GREEN, ORANGE, SKY, PURPLE = "#D55E00", "#0072B2", "#009E73", "#E69F00", "#56B4E9", "#CC79A7"
STYLE = {"fusion": (VERMILION, "o"), "single": (BLUE, "s"), "late": (GREEN, "^"), "baseline": (PURPLE, "v"), "floor": (ORANGE, "D")}
DASHES = {"fusion": "-", "single": "--", "late": "-.", "baseline": (0, (4, 1, 1, 1, 1, 1)), "floor": ":"}
RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a "$" in a finding's name is a dollar
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.5,
    "grid.alpha": 0.35,
    "grid.color": FAINT,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


def svg(draw: Callable[[Figure], None], *, name: str, title: str, size: tuple[float, float]) -> str:
    """Draw one figure as inline SVG.

    Parameters
    ----------
    draw
        Fills the figure.
    name
        Unique within a page: prefixes every id, for a page is one document.
    title
        What a reader who cannot see it is told.
    size
        Width and height in inches; the page may show it smaller.
    """
    with mpl.rc_context(RC), warnings.catch_warnings():
        # The reader's browser has the glyphs that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        mpl.rcParams["svg.hashsalt"] = name
        figure, file = Figure(figsize=size), io.StringIO()
        draw(figure)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", bbox_inches="tight", pad_inches=0.06, metadata=nothing)
    text = file.getvalue()
    text = re.sub(r"<style.*?</style>", "", text[text.index("<svg") :], flags=re.DOTALL)

    def fit_in(tag: re.Match[str]) -> str:
        words = re.sub(r' xmlns(:xlink)?="[^"]*"|font-family: [^;"]*;', "", tag.group())
        return re.sub(r'\bid="|href="#|url\(#', lambda m: f"{m.group()}{name}-", words).replace(INK, "currentColor")

    # Only within tags: what a label says is the reader's.
    text = re.sub(r"<[^>]+>", fit_in, text)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)


def forest(results: Results, finding: str, *, name: str) -> str:
    """AUROC of every row with its interval, by group; the headline's interval is a band, chance a line."""
    found = rows(results, finding)
    close = {str(row["name"]): "above" if why == ABOVE else "close to" for row, why in close_floors(results, finding)}
    lines: list[Line] = []
    for group, members in groupby(found, key=lambda row: str(row["group"])):
        color, marker = STYLE.get(group, (FAINT, "o"))
        lines.append(Line(GROUPS.get(group, group)))
        for row in members:
            warn = f" · {close[row['name']]} the network" if row["name"] in close and group == "floor" else ""
            lines.append(Line(str(row["name"]), metric(row, "auroc"), color=color, marker=marker, hollow=group == "floor", note=warn))
    head = headline(results, finding)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        if band := metric(head, "auroc"):
            axes.axvspan(band.low, band.high, color=VERMILION, alpha=0.10, linewidth=0)
            axes.axvline(band.value, color=VERMILION, linewidth=0.8)
        _forest(axes, lines, bold=str((head or {}).get("name", "")))

    return svg(draw, name=name, title=f"AUROC of every row with 95 % intervals: {finding}", size=(6.2, 0.6 + 0.21 * len(lines)))


def subgroups(results: Results, finding: str, *, name: str) -> str:
    """AUROC by subgroup; groups too small for a claim are hollow and gray."""
    lines: list[Line] = []
    for by, members in groupby(of(results, "subgroups", finding), key=lambda row: str(row["by"])):
        lines.append(Line(by.capitalize()))
        for row in members:
            small = small_group(row)
            note = f" · {row['positives']}/{row['studies']}" + (" · too few" if small else "")
            label = str(row["group"])
            lines.append(Line(label, metric(row, "auroc"), color=FAINT if small else BLUE, marker="s", hollow=small, note=note))

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        if whole := metric(headline(results, finding), "auroc"):
            axes.axvline(whole.value, color=VERMILION, linewidth=0.8)
        _forest(axes, lines)

    return svg(draw, name=name, title=f"AUROC by subgroup: {finding}", size=(6.2, 0.6 + 0.23 * len(lines)))


def small_group(row: Row) -> bool:
    """Whether a subgroup, or one class of it, has too few patients to claim anything of."""
    # A class has no more patients than studies: those bound it where an older evaluation does not say.
    studies = (row["positives"], row["studies"] - row["positives"])
    patients = (row.get("patients_positive"), row.get("patients_negative"))
    return bool(min(n for n in (*studies, *patients) if n is not None) < FEWEST)


class Line:
    """One line of a forest plot: a heading where there is no marker."""

    def __init__(
        self, label: str, at: Estimate | None = None, *, color: str = INK, marker: str = "", hollow: bool = False, note: str = ""
    ) -> None:
        self.label, self.at, self.color, self.marker, self.hollow, self.note = label, at, color, marker, hollow, note


def _forest(axes: Axes, lines: Sequence[Line], *, bold: str = "") -> None:
    """Lines from the top down, what each says at the right."""
    known = [line.at for line in lines if line.at]
    axes.set_xlim(math.floor(10 * min([0.45, *(at.low for at in known)])) / 10, 1.0)
    axes.set_ylim(len(lines) - 0.4, -0.9)
    axes.axvline(0.5, color=INK, linewidth=0.9, linestyle=(0, (2, 2)))
    axes.text(0.5, -0.95, "chance", ha="center", va="bottom", fontsize=8)
    side = axes.get_yaxis_transform()
    left = -0.03 - 0.0135 * max([20, *(len(short(line.label)) for line in lines)])  # a letter's width, measured
    for y, line in enumerate(lines):
        if not line.marker:
            axes.text(left, y, short(line.label), va="center", weight="bold", transform=side)
            continue
        weight = "bold" if line.label == bold else "normal"
        axes.text(-0.03, y, short(line.label), ha="right", va="center", weight=weight, transform=side)
        axes.text(
            1.02, y, (str(line.at) if line.at else "not computed") + line.note, va="center", transform=side, fontsize=8, weight=weight
        )
        if line.at:
            face = "none" if line.hollow else line.color
            axes.plot([line.at.low, line.at.high], [y, y], color=line.color, linewidth=1.6, solid_capstyle="butt")
            axes.plot(line.at.value, y, marker=line.marker, color=line.color, markerfacecolor=face, markersize=5.5, markeredgewidth=1.4)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("AUROC with 95 % interval")


def short(label: str, most: int = 48) -> str:
    """A label no longer than the space for it."""
    label = " ".join(label.split())
    return label if len(label) <= most else label[: most - 1] + "…"


def operating(results: Results, finding: str, *, name: str) -> str:
    """ROC and precision–recall curves of the headline and the best of each group."""
    curves = (results.get("curves") or {}).get(finding) or {}
    positives, negatives = counts(results, finding)

    def draw(figure: Figure) -> None:
        (roc, pr), chance = figure.subplots(1, 2), ""
        roc.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=(0, (2, 2)))
        if positives and negatives:
            prevalence = positives / (positives + negatives)
            pr.axhline(prevalence, color=INK, linewidth=0.8, linestyle=(0, (2, 2)))
            chance = f" (dots: {share(prevalence)} have the finding)"
        for row, look in _drawn(results, finding):
            for axes, kind in ((roc, "roc"), (pr, "pr")):
                if line := (curves.get(kind) or {}).get(row["name"]):
                    axes.plot(line["x"], line["y"], **look)
        roc.set(xlabel="1 − specificity", ylabel="Sensitivity (recall)", title="ROC (dots: chance)")
        pr.set(xlabel="Recall (sensitivity)", ylabel="Precision", title=f"Precision–recall{chance}")
        for axes in (roc, pr):
            axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.02), aspect="equal")
        if (handles := roc.get_legend_handles_labels())[0]:
            # Beneath, where no curve runs.
            figure.legend(*handles, loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=2, fontsize=8, handlelength=2.6, title="AUROC")

    return svg(draw, name=name, title=f"ROC and precision–recall curves: {finding}", size=(9.2, 4.6))


def _drawn(results: Results, finding: str) -> list[tuple[Row, dict[str, Any]]]:
    """Rows whose curves are drawn, and how: all would be a thicket."""
    found = rows(results, finding)
    wanted = [headline(results, finding), image_alone(found), *(best(found, group) for group in ("single", "late", "baseline", "floor"))]
    drawn: list[tuple[Row, dict[str, Any]]] = []
    for row in wanted:
        if row is None or any(row is other for other, _ in drawn):
            continue
        group, auroc = str(row["group"]), metric(row, "auroc")
        # The best single modality beside image alone would have the same color.
        color = SKY if any(other["group"] == group for other, _ in drawn) else STYLE.get(group, (FAINT, "o"))[0]
        look = {"color": color, "linestyle": DASHES.get(group, "-"), "linewidth": 1.3 if drawn else 2.2, "zorder": 9 - len(drawn)}
        drawn.append((row, {**look, "label": f"{short(str(row['name']))}: {number(auroc.value if auroc else None)}"}))
    return drawn


def certainty(results: Results, finding: str, *, name: str) -> str:
    """Reliability, with how many studies each point stands for, and risk against coverage."""
    curves = (results.get("curves") or {}).get(finding) or {}
    reliability, selective = curves.get("reliability") or {}, curves.get("risk_coverage") or {}

    def draw(figure: Figure) -> None:
        grid = figure.add_gridspec(2, 2, height_ratios=(4, 1), hspace=0.12, wspace=0.25)
        top, amounts, right = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 0]), figure.add_subplot(grid[:, 1])
        top.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=(0, (2, 2)))
        predicted, observed, count = (list(reliability.get(key) or []) for key in ("predicted", "observed", "count"))
        top.plot(predicted, observed, color=VERMILION, marker="o", markersize=4.5, linewidth=1.4)
        amounts.bar(predicted, count, width=0.015, color=VERMILION, alpha=0.75)
        last = -1.0
        for x, n in zip(predicted, count, strict=True):
            if x - last < 0.045:  # bins of equal mass lie close together where most studies are
                continue
            last = x
            amounts.annotate(f"{n:.0f}", (x, n), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=7)
        top.set(title="Reliability (dots: perfect)", ylabel="Share that has the finding", xlim=(-0.02, 1.02), ylim=(-0.02, 1.04))
        top.tick_params(labelbottom=False)
        amounts.set(xlabel="Predicted probability", ylabel="Predictions", xlim=(-0.02, 1.02), ylim=(0, 1.35 * max([1, *count])))
        amounts.yaxis.set_major_locator(MaxNLocator(2, integer=True))
        coverage, risk = list(selective.get("coverage") or []), list(selective.get("risk") or [])
        right.plot(coverage, risk, color=VERMILION, linewidth=1.8)
        whole = f" (dots: all answered, {number(max(zip(coverage, risk, strict=True))[1])})" if risk else ""
        if risk:
            right.axhline(max(zip(coverage, risk, strict=True))[1], color=INK, linewidth=0.8, linestyle=(0, (2, 2)))
        right.set(title=f"Risk–coverage{whole}", xlabel="Share of studies answered", ylabel="Error among those answered", xlim=(0, 1.02))
        right.set_ylim(0, min(1.02, 1.2 * max([0.05, *risk])))  # a share: there is nothing above 1
        right.xaxis.set_major_formatter(PercentFormatter(1.0))

    return svg(draw, name=name, title=f"Reliability and risk–coverage: {finding}", size=(9.2, 4.4))


def missing(results: Results, finding: str, *, name: str) -> str:
    """AUROC with everything, and with each thing taken away: bars from chance, whiskers the 95 % interval."""
    head = headline(results, finding)
    bars = [("everything present", metric(head, "auroc")), *((str(r["name"]), metric(r, "auroc")) for r in of(results, "missing", finding))]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for y, (_, at) in enumerate(bars):
            if at:
                axes.barh(y, at.value - 0.5, left=0.5, height=0.6, color=VERMILION if y == 0 else SKY, alpha=0.85)
                axes.plot([at.low, at.high], [y, y], color=INK, linewidth=1.2)
            axes.text(1.02, y, str(at) if at else "not computed", va="center", transform=axes.get_yaxis_transform(), fontsize=8)
        axes.axvline(0.5, color=INK, linewidth=0.9)
        axes.set_yticks(range(len(bars)), [short(label) for label, _ in bars])
        axes.set_xlim(min([0.45, *(at.low - 0.02 for _, at in bars if at)]), 1.0)
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("AUROC (bars start at chance, 0.5) with 95 % interval")

    return svg(draw, name=name, title=f"AUROC with parts of the input taken away: {finding}", size=(5.4, 0.6 + 0.3 * len(bars)))


def learning_curve(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a PNG of the training and validation loss of each epoch, a panel for each stage, the best epoch marked.

    Parameters
    ----------
    history
        One mapping an epoch: ``epoch``, ``train_loss``, ``validation_loss`` (both per study, masked cross-entropy), perhaps ``stage``.
    """
    stages: dict[str, list[Mapping[str, Any]]] = {}
    for item in history:
        stages.setdefault(str(item.get("stage", "")), []).append(item)
    columns = min(2, max(1, len(stages)))
    rows = max(1, -(-len(stages) // columns))
    with mpl.rc_context(RC):
        figure = Figure(figsize=(6.4 if columns == 1 else 10, 3.4 * rows), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        for number, (stage, items) in enumerate(stages.items(), start=1):
            _losses(figure.add_subplot(rows, columns, number), stage, items)
        figure.savefig(path, format="png", dpi=150, metadata={"Software": None})


def _losses(axes: Axes, stage: str, history: Sequence[Mapping[str, Any]]) -> None:
    epochs = [item["epoch"] for item in history]
    for key, label, color, dash in (
        ("train_loss", "training" if stage.startswith("image:") else "training,\nall heads", BLUE, "--"),
        ("validation_loss", "validation", VERMILION, "-"),
    ):
        losses = [item[key] for item in history]
        axes.plot(epochs, losses, color=color, linestyle=dash, linewidth=1.8, marker="o" if len(losses) == 1 else "")
        axes.annotate(label, (epochs[-1], losses[-1]), xytext=(5, 0), textcoords="offset points", va="center", color=color)
    known = [item for item in history if math.isfinite(item["validation_loss"])]
    if known:
        best_item = min(known, key=lambda item: item["validation_loss"])
        axes.axvline(best_item["epoch"], color=INK, linewidth=0.8, linestyle=(0, (2, 2)))
        axes.plot(best_item["epoch"], best_item["validation_loss"], marker="o", markersize=7, color=VERMILION, markerfacecolor="white")
        said = f"best: epoch {best_item['epoch']:.0f}, validation loss {number(best_item['validation_loss'])}"
        axes.set_title(f"{stage}; {said}" if stage else said.capitalize())
    axes.set(xlabel="Epoch", ylabel="Loss per study (cross-entropy, nats)")
    axes.margins(x=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
