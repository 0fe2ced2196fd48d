"""An evaluation as one HTML page a person wants to read.

The page is for two: a radiologist reads the first screen, a data scientist reads on. One file: no script, nothing to load, the
same bytes for the same results; light, dark and on paper. What may be said is decided in words.py, what is drawn in plots.py, and
card.py says the same as Markdown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import count
from pathlib import Path
from typing import Any

from models import plots, words
from models.card import write_card
from models.words import GROUPS, METRICS, Estimate, Results, given, metric, number, share

__all__ = ["write_card", "write_page"]

POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # a browser that is told so loads nothing, even were a name to get through
STYLE = """
:root{color-scheme:light dark;--ink:#1c2128;--paper:#fff;--faint:#59636e;--line:#d5dae0;--soft:#f4f6f8;--warn:#a33b00}
@media (prefers-color-scheme:dark){:root{--ink:#e3e7ec;--paper:#15181c;--faint:#9aa4af;--line:#353c45;--soft:#1e2329;--warn:#ff9d66}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:72rem;padding:1.5rem 1.25rem 4rem;color:var(--ink);background:var(--paper);
 font:16px/1.55 system-ui,"Segoe UI",Roboto,Arial,"DejaVu Sans",sans-serif}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 .25rem}h2{font-size:1.3rem;margin:2.5rem 0 .5rem;border-bottom:1px solid var(--line)}
h3{font-size:1.05rem;margin:1.75rem 0 .4rem}p{margin:.4rem 0;max-width:46rem}.faint,figcaption,caption{color:var(--faint);font-size:.875rem}
.plain{background:var(--soft);border-left:4px solid var(--ink);padding:.75rem 1.1rem;margin:1rem 0;border-radius:0 6px 6px 0}
.plain h2,.plain h3{margin:.2rem 0 .4rem;border:0}.plain p,.plain li{max-width:none}
.plain ul{margin:.4rem 0;padding-left:1.2rem}li.warn{color:var(--warn);font-weight:600}
dl.tiles{display:flex;flex-wrap:wrap;gap:.5rem 2rem;margin:.6rem 0}dl.tiles div{display:flex;flex-direction:column-reverse}
dl.tiles dt{font-size:.8rem;color:var(--faint)}dl.tiles dd{margin:0;font-size:1.35rem;font-weight:600;font-variant-numeric:tabular-nums}
dl.tiles .few dd{font-weight:400}dl.tiles small{font-size:.85rem;font-weight:400;color:var(--faint)}
nav a{margin-right:1rem}a{color:inherit}
figure{margin:.5rem 0 1.25rem;overflow-x:auto}svg{max-width:100%;height:auto;stroke-linejoin:round;fill:currentColor}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.78rem;font-variant-numeric:tabular-nums;margin:.5rem 0 1rem}
caption{text-align:left;padding:.25rem 0}th,td{padding:.2rem .38rem;text-align:right;white-space:nowrap;
 border-bottom:1px solid var(--line)}
td small{display:block;color:var(--faint);font-size:.66rem;font-weight:400}
thead th{vertical-align:bottom;border-bottom:2px solid var(--faint)}
th:first-child,td.words{text-align:left}tbody th{font-weight:400;white-space:normal;min-width:9rem}
tbody th[scope=rowgroup]{font-weight:700;padding-top:.7rem}
td.words{white-space:normal;min-width:14rem}tr.head th,tr.head td{font-weight:700}.few,dl.tiles .few dd{color:var(--faint)}
@media print{@page{margin:14mm 12mm}:root{color-scheme:light;--ink:#000;--paper:#fff;--faint:#444;--line:#bbb;--soft:#fff;--warn:#8a3200}
body{max-width:none;padding:0;font-size:10pt}nav{display:none}.scroll,figure{overflow:visible}figure,tr,.plain{break-inside:avoid}
h2,h3{break-after:avoid}table{font-size:6.6pt}td small{font-size:6pt}th,td{padding:.12rem .25rem}}
"""


COVERED = ("coverage_positive", "coverage_negative")  # shares of a class that are not called the other


def write_page(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write ``evaluation.html``, one self-contained file, into `folder` (made if need be).

    Parameters
    ----------
    results
        The evaluation; `p` of its differences is already corrected by Holm. Parts may be absent or null: then less is said.

    Returns
    -------
    list of Path
        The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "evaluation.html"
    path.write_text(_page(results), encoding="utf-8")
    return [path]


def _page(results: Results) -> str:
    bundle, found = results.get("bundle") or {}, words.findings(results)
    title = f"{bundle.get('title') or bundle.get('name') or 'A bundle'}: evaluation"
    named = f"{given(bundle, 'name')} {bundle.get('version', '')}"
    ids = (f"f{n}" for n in count())
    links = "".join(f'<a href="#finding-{n}">{escape(name)}</a>' for n, name in enumerate(found))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n<style>{STYLE}</style>\n'
        f"</head>\n<body>\n<header><h1>{escape(title)}</h1>\n"
        f'<p class="faint">Bundle {escape(named)} · {escape(str(given(bundle, "digest"))[:16])} · '
        "for research, not for the care of patients</p></header>\n<main>\n"
        + f"<p>{escape(words.worth(results))}</p>\n"
        + "".join(_plain(results, name) for name in found)
        + (f'<nav aria-label="Contents">Read on: {links}<a href="#how">How it was judged</a></nav>\n' if found else "")
        + "".join(_finding(results, name, n, [next(ids) for _ in range(5)]) for n, name in enumerate(found))
        + _how(results)
        + "</main>\n</body>\n</html>\n"
    )


def _plain(results: Results, finding: str) -> str:
    """What a radiologist reads: a paragraph, four figures, the comparisons in words."""
    head = metric(words.headline(results, finding), "auroc")
    image = words.image_alone(words.rows(results, finding))
    compared = words.compare(results, finding, image) if image else None
    gain = compared.difference if compared else None
    interval = f"{number(gain.low, signed=True)} to {number(gain.high, signed=True)}" if gain else ""
    few, shown = words.too_few(results, finding), words.in_short(gain, compared.p if compared else None)
    found = (results.get("triage") or {}).get(finding) or {}
    own = found.get("shipped") or found
    uncertain = "–" if own.get("refused") else share(own.get("uncertain"))
    patients = given(results.get("cohort"), "patients")
    # What may not be claimed is gray, and a gain of which nothing may be claimed is no headline at all.
    tiles = (
        ("AUROC", number(head.value) if head else "–", f"{number(head.low)} to {number(head.high)}" if head else "", bool(few)),
        *(((f"gain over image alone{shown}", number(gain.value, signed=True), interval, "not" in shown),) if gain and not few else ()),
        ("called uncertain", uncertain, "", bool(few)),
        ("patients", str(patients), "", False),
    )
    drawn = "".join(
        f"<div{' class=few' * gray}><dt>{escape(k)}</dt><dd>{escape(v)} <small>{escape(extra)}</small></dd></div>"
        for k, v, extra, gray in tiles
    )
    points = [*words.how_compared(results, finding), words.without(results, finding), words.triage(results, finding)]
    items = "".join(f"<li{' class=warn' * text.startswith('Beware')}>{escape(text)}</li>" for text in points if text)
    return (
        f'<section class="plain"><h2>{escape(finding)}</h2><p>{escape(words.how_good(results, finding))}</p>'
        f'<dl class="tiles">{drawn}</dl><ul>{items}</ul></section>\n'
    )


def _finding(results: Results, finding: str, order: int, ids: Sequence[str]) -> str:
    """What a data scientist reads on."""
    curves = (results.get("curves") or {}).get(finding) or {}
    n = words.population(results, finding)
    parts = [
        f'<section id="finding-{order}"><h2>{escape(finding)}</h2>',
        _figure(
            "Every row, the same folds",
            plots.forest(results, finding, name=ids[0]),
            f"AUROC with patient-clustered 95 % intervals, {n}. Band: the network's interval. Hollow: shortcut floors, what can be had "
            f"without seeing the finding. {words.jointly(results)}",
        ),
    ]
    if curves.get("roc") or curves.get("pr"):
        caption = f"The network, and the best of each other kind, {n}."
        parts.append(_figure("Operating curves", plots.operating(results, finding, name=ids[1]), caption))
    if curves.get("reliability") or curves.get("risk_coverage"):
        found = metric(words.headline(results, finding), "ece")
        caption = f"Counts are predictions, repeats pooled. ECE {found or 'not computed'}, {n}. {words.selective(results, finding)}"
        parts.append(_figure("Does the probability mean what it says?", plots.certainty(results, finding, name=ids[2]), caption))
    parts.append(f"<h3>Triage</h3><p>{escape(words.triage(results, finding))}</p>{_triage_table(results, finding)}")
    if words.of(results, "missing", finding):
        caption = f"The same network with parts of the input taken away, {n}."
        parts.append(_figure("What it is worth without", plots.missing(results, finding, name=ids[3]), caption))
    if words.of(results, "subgroups", finding):
        caption = (
            f"At the right: studies with the finding / all studies. Gray, hollow: a class of fewer than {words.FEWEST} patients, no claim."
        )
        parts += [_figure("Subgroups", plots.subgroups(results, finding, name=ids[4]), caption), _subgroup_table(results, finding)]
    parts += [_metric_table(results, finding), _difference_table(results, finding), "</section>\n"]
    return "\n".join(parts)


def _figure(title: str, drawing: str, caption: str) -> str:
    return f"<h3>{escape(title)}</h3><figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>"


def _table(caption: str, heads: Iterable[str], body: Iterable[str]) -> str:
    cells = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption><thead><tr>{cells}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _cell(found: Estimate | None, *, signed: bool = False) -> str:
    """A number, exact for machines and rounded for people, its interval beneath."""
    if found is None:
        return "<td>–</td>"
    return (
        f'<td><data value="{found.value!r}">{number(found.value, signed=signed)}</data>'
        f"<small>{number(found.low, signed=signed)}{' to ' if signed else '–'}{number(found.high, signed=signed)}</small></td>"
    )


def _line(name: str, cells: Iterable[str], *, kind: str = "") -> str:
    return f'<tr{f" class={kind}" if kind else ""}><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>'


def _metric_table(results: Results, finding: str) -> str:
    head, body, group = words.headline(results, finding), [], None
    for row in words.rows(results, finding):
        if row["group"] != group:
            group = row["group"]
            body.append(f'<tr><th scope="rowgroup" colspan="{2 + len(METRICS)}">{escape(GROUPS.get(group, str(group)))}</th></tr>')
        weights = row.get("parameters")
        cells = [f"<td>{weights:,}</td>" if weights is not None else "<td>–</td>", *(_cell(metric(row, name)) for name in METRICS)]
        body.append(_line(str(row["name"]), cells, kind="head" if row is head else ""))
    caption = f"All metrics with 95 % intervals, {words.population(results, finding)}. Brier and ECE: lower is better. "
    caption += words.twins(results, finding)
    return "<h3>All metrics</h3>" + _table(caption, ("Row", "Parameters", *METRICS.values()), body)


def _difference_table(results: Results, finding: str) -> str:
    found = words.of(results, "differences", finding)
    if not found:
        return ""
    body, few = [], "too few patients, so no claim" if words.too_few(results, finding) else ""
    for row in found:
        difference, name = words.estimate(row["difference"]), str(row["metric"])
        better = (
            Estimate(-difference.value, -difference.high, -difference.low) if difference and name in words.LOWER_IS_BETTER else difference
        )
        said = f'<td class="words">{escape(few or words.verdict(better, row.get("p")))}</td>'
        cells = [
            f"<td>{escape(METRICS.get(name, name))}</td>",
            _cell(difference, signed=True),
            f"<td>{words.chance(row.get('p'))}</td>",
            said,
        ]
        body.append(_line(f"{row['a']} − {row['b']}", cells))
    caption = f"Paired on the same bootstrap resamples of patients, {words.population(results, finding)}; p of single modalities "
    caption += "and late fusions, corrected by Holm for their number; without p, the interval alone, not corrected."
    return "<h3>Differences</h3>" + _table(caption, ("Difference", "Metric", "Value", "p (Holm)", "What it shows"), body)


def _subgroup_table(results: Results, finding: str) -> str:
    names = ("auroc", "recall", "specificity")
    body = []
    for row in words.of(results, "subgroups", finding):
        cells = [f"<td>{row['studies']}</td>", f"<td>{row['positives']}</td>", *(_cell(metric(row, name)) for name in names)]
        body.append(_line(f"{row['by']}: {row['group']}", cells, kind="few" if plots.small_group(row) else ""))
    heads = ("Subgroup", "Studies", "With the finding", *(METRICS[name] for name in names))
    return _table("The network in each subgroup, recall and specificity at its threshold.", heads, body)


def _triage_table(results: Results, finding: str) -> str:
    """The bundle's own thresholds, then those that a recalibration would give; wrong calls either way."""
    found = (results.get("triage") or {}).get(finding) or {}
    keys = ("threshold", "negative_below", "uncertain", "positives_called_negative", "negatives_called_positive")
    rows: list[tuple[str, Mapping[str, Any]]] = []
    if own := found.get("shipped"):
        rows.append(("as shipped", own))
    if found and not found.get("refused"):
        wrong = {key: None if found.get(held) is None else 1 - found[held] for key, held in zip(keys[3:], COVERED, strict=True)}
        rows.append(("after recalibrate", {**found, **wrong}))
    if not rows:
        return ""
    body = [
        _line(
            name,
            [
                f"<td>{number(row.get('alpha') or None)}</td>",
                *(f"<td>{number(row.get(key))}</td>" for key in keys[:2]),
                *(f"<td>{share(row.get(key))}</td>" for key in keys[2:]),
            ],
        )
        for name, row in rows
    ]
    heads = ("Verdicts", "α", "Positive from", "Negative below", "Uncertain", "With it, called negative", "Without it, called positive")
    caption = f"Out of fold, {words.population(results, finding)}; each patient weighs 1. After recalibrate: class-conditional conformal."
    return _table(caption, heads, body)


def _how(results: Results) -> str:
    """The cohort, the settings and what a reader must know."""
    cohort, bundle = results.get("cohort") or {}, results.get("bundle") or {}
    facts = [
        ("Studies", given(cohort, "studies")),
        ("Patients", given(cohort, "patients")),
        *((f"Studies that have: {name}", share(part)) for name, part in (cohort.get("present") or {}).items()),
        ("Folds, by patient", given(results, "folds")),
        ("Repeats", given(results, "repeats")),
        ("Seed", given(results, "seed")),
        ("Minutes it took", number((results.get("seconds") or 0) / 60)),
        ("Machine", given(results, "machine")),
        ("Digest of the bundle", given(bundle, "digest")),
    ]
    body = [_line(str(key), [f'<td class="words">{escape(str(value))}</td>']) for key, value in facts]
    notes = "".join(f"<li>{escape(str(note))}</li>" for note in results.get("notes") or [])
    return (
        '<section id="how"><h2>How it was judged</h2>'
        + _table("The cohort and the settings.", ("Fact", "Value"), body)
        + (f"<h3>Notes</h3><ul>{notes}</ul>" if notes else "")
        + "</section>\n"
    )
