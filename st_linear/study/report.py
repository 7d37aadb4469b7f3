"""The report of a study: one page of HTML with its figures inside, the same as Markdown; from records alone."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from st_linear.markdown import table as markdown_table
from st_linear.records import write_json, write_text
from st_linear.study.config import Cell
from st_linear.study.figures import INK, PAPER, Panel, draw_all
from st_linear.study.methods import methods
from st_linear.study.statistics import Records, summarise

REPORT = "report"

_STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 80rem; padding: 1rem; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
p, li { max-width: 46rem; overflow-wrap: anywhere; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .45rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { background: Canvas; border-bottom-width: 2px; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; }
td:first-child { background: Canvas; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 1rem; }
figure { margin: 0; max-width: 32rem; } figure svg { width: 100%; height: auto; }
figure svg text { font-family: inherit !important; } figcaption { font-size: .85rem; opacity: .8; }
"""


def write_report(folder: Path) -> Path:
    """Write ``report/`` in a study's folder: ``report.html``, ``report.md``, ``figures/``, ``summary.json``.

    Args:
        folder: Of the study, finished or not.

    Returns:
        The page.

    Raises:
        FileNotFoundError: If the folder holds no study.
        ValueError: If no cell is finished, or a record is damaged.
        ImportError: If a package is missing.
    """
    records = Records.read(folder)
    summary = summarise(records)
    output = folder / REPORT
    panels = draw_all(records, summary, output / "figures")
    text = markdown(records, summary, panels)
    write_json(output / "summary.json", summary)
    write_text(output / "report.md", text)
    write_text(output / "report.html", page(summary["name"], text, output))
    return output / "report.html"


def markdown(records: Records, summary: dict[str, Any], panels: Sequence[Panel]) -> str:
    """The report's text.

    Args:
        records: The study.
        summary: Its :func:`~st_linear.study.statistics.summarise`.
        panels: Its figures, in ``figures/``.
    """
    parts = [f"# {summary['name']}", _introduction(records, summary), "## In short", *_in_short(summary)]
    sections = [
        ("Quality", "quality", [_quality(summary)]),
        ("Convergence", "convergence", list(_convergence(summary))),
        ("Read at other lengths than trained at", "reading", [_reading(summary)]),
        ("Speed and memory", "costs", [_costs(summary)]),
    ]
    for title, name, tables in sections:
        figures = [f"![{p.caption}](figures/{p.name}.svg)" for p in panels if p.section == name]
        parts += [f"## {title}", *figures, *tables]
    parts += ["## How figures change with length", _laws(summary), methods(records)]
    if summary["failed"]:
        parts += ["## Cells that failed", _failures(summary)]
    return "\n\n".join(part for part in parts if part) + "\n"


def page(title: str, text: str, folder: Path) -> str:
    """The report as one page that needs no other file.

    Args:
        title: Of the page.
        text: In Markdown.
        folder: Where the figures' paths begin.

    Raises:
        ImportError: If markdown-it is not installed.
    """
    try:
        from markdown_it import MarkdownIt
    except ImportError as error:
        raise ImportError('the report needs markdown-it: pip install "st-linear[study]"') from error
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    body = body.replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>")
    image = r'<p><img src="(?P<src>[^"]+)" alt="(?P<alt>[^"]*)" ?/></p>\n?'
    body = re.sub(rf"(?:{image})+", lambda match: f'<div class="figures">\n{match[0]}</div>\n', body)
    body = re.sub(image, lambda match: _inline(folder / match["src"], match["alt"]), body)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )


def _inline(path: Path, caption: str) -> str:
    """A figure inside the page, in the page's own colours."""
    svg = path.read_text(encoding="utf-8")
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace(f"fill: {PAPER}", "fill: none")
    # Ids are the page's: each figure's get its name, references to them included.
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{path.stem}-", svg)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{caption}"', 1)
    return f"<figure>\n{svg}<figcaption>{caption}</figcaption>\n</figure>\n"


def _introduction(records: Records, summary: dict[str, Any]) -> str:
    inputs, cells = records.any()["inputs"], sum(len(seeds) for seeds in records.finished.values())
    teacher = "gold scores alone" if inputs["teacher"] is None else "a CrossEncoder teacher's scores and gold scores"
    text = (
        f"An encoder of sentences, {inputs['base']}, has its attention replaced and is then trained (distilled) on "
        f"{teacher} of {inputs['pairs']['train']:,} pairs of texts, brought to one length in tokens. What is asked is "
        "how fast it learns and how well its cosine similarities agree with human scores in the end (Pearson "
        "correlation × 100: 100 is perfect, 0 is chance). `softmax` is the ordinary attention, whose cost grows with "
        "the square of the length: the control that the others, whose cost grows linearly, are set against."
    )
    if any("@" in group.attention for group in records.finished):
        text += (
            " A number behind `@` is a window: attention is exact within blocks of so many tokens and their "
            "neighbours, and linear beyond them."
        )
    if any(group.transfer for group in records.finished):
        text += " `+ transfer` was first trained to give the vectors of the encoder as it was."
    if inputs["teacher"] is not None:
        figures = inputs["teacher"]["figures"]
        text += (
            f" The teacher's own Pearson is {100 * figures['dev']['pearson']:.2f} on dev and "
            f"{100 * figures['test']['pearson']:.2f} on test, on texts as they are."
        )
    state = f"{cells} cells are finished, {len(summary['failed'])} failed, {summary['missing']} are still to be run."
    return f"{text}\n\n{state}"


def _in_short(summary: dict[str, Any]) -> Iterator[str]:
    """Sentences that the figures bear out: no difference is claimed whose interval holds 0."""
    lines = []
    for protocol in _unique(summary, "protocol"):
        by = f" ({protocol})" if len(_unique(summary, "protocol")) > 1 else ""
        groups = [g for g in summary["groups"] if g["protocol"] == protocol]
        for student in dict.fromkeys(g["student"] for g in groups):
            own = [g for g in groups if g["student"] == student]
            compared = [g for g in own if (g["against_control"] or {}).get("pearson")]
            if compared:
                said = "; ".join(
                    f"at {g['length']:,} tokens {_verdict(g['against_control']['pearson'])}" for g in compared
                )
                lines.append(f"- **{student}**{by}, final Pearson against softmax: {said}.")
            law = summary["laws"][protocol][student]["pearson"]
            if law is not None:
                lines.append(f"- **{student}**{by}, Pearson with each doubling of the length: {_slope(law)}.")
    yield "\n".join(lines) if lines else "There is nothing to compare yet: no cell has a softmax control of its seed."


def _verdict(compared: dict[str, Any]) -> str:
    if compared["low"] is None:
        return f"{100 * compared['mean']:+.2f}, one seed, which bears out nothing"
    interval = f"{_points(compared)}, {compared['n']} seeds"
    if compared["low"] <= 0 <= compared["high"]:
        return f"no difference shown ({interval})"
    return f"{'higher' if compared['mean'] > 0 else 'lower'} ({interval})"


def _slope(law: dict[str, Any]) -> str:
    interval = f"{100 * law['slope']:+.2f} [{100 * law['low']:+.2f}, {100 * law['high']:+.2f}]"
    if law["low"] <= 0 <= law["high"]:
        return f"no trend shown ({interval})"
    return f"{'rises' if law['slope'] > 0 else 'falls'} by {interval}"


def _quality(summary: dict[str, Any]) -> str:
    header = [
        "student",
        *_length_header(summary),
        "seeds",
        "Pearson",
        "− softmax",
        "p, adjusted",
        "effect",
        "Spearman",
    ]
    header += ["before", "area", "pairs' interval"]
    rows = []
    for g in summary["groups"]:
        read = g["read"][str(g["length"])]
        against = (g["against_control"] or {}).get("pearson")
        low, high = read["pearson_of_pairs"]
        rows.append(
            [
                g["student"],
                *_length_cells(summary, g),
                str(len(g["seeds"])),
                _hundred(read["pearson"]),
                "–" if against is None else _points(against),
                "–" if against is None or against.get("p_adjusted") is None else f"{against['p_adjusted']:.3f}",
                "–" if against is None or against["effect"] is None else f"{against['effect']:+.1f}",
                _hundred(read["spearman"]),
                _hundred(g["start"]),
                _hundred(g["area"]),
                f"[{100 * low:.1f}, {100 * high:.1f}]",
            ]
        )
    note = (
        "× 100, with 95 % intervals over seeds. *before*: Pearson on dev before distillation. *Pearson*, *Spearman*: "
        "on test, at the training length. *pairs' interval*: of the first seed's Pearson, for other test pairs. "
        "*area*: mean Pearson on dev over training. *− softmax*: Pearson minus that of softmax of the same seed; "
        "*p*: paired t-test, adjusted for the number of comparisons; *effect*: the difference over its standard "
        "deviation."
    )
    return f"{markdown_table(header, rows)}\n{note}"


def _convergence(summary: dict[str, Any]) -> Iterator[str]:
    titles = {
        "control": "Until a share of softmax's final Pearson on dev",
        "own": "Until a share of the student's own final Pearson on dev",
        "gain": "Until a share of the student's own way, from its start to its end",
    }
    for basis, title in titles.items():
        header = ["student", *_length_header(summary), "share", "steps", "pairs", "tokens", "seconds", "operations"]
        rows = []
        for g in summary["groups"]:
            for target, amounts in g["convergence"][basis].items():
                if amounts["steps"] is not None:
                    cells = [
                        _amount(amounts[unit]) for unit in ("steps", "examples", "tokens", "seconds", "operations")
                    ]
                    rows.append([g["student"], *_length_cells(summary, g), f"{target} %", *cells])
        if rows:
            yield f"### {title}\n\n{markdown_table(header, rows).rstrip()}"
    yield (
        "Means over seeds with 95 % intervals, between the points of the curve by straight lines; 0: it was there "
        "before training. *k of n*: only so many seeds reached it, so that there is no mean."
    )


def _reading(summary: dict[str, Any]) -> str:
    places = sorted({p for g in summary["groups"] for p in g["read"] if p != "natural"}, key=int)
    header = ["student", *_length_header(summary, "trained at"), "natural", *(f"{int(place):,}" for place in places)]
    rows = []
    for g in summary["groups"]:
        read = [g["read"].get(place) for place in ("natural", *places)]
        cells = ["–" if figures is None else _hundred(figures["pearson"]) for figures in read]
        rows.append([g["student"], *_length_cells(summary, g), *cells])
    return f"{markdown_table(header, rows)}\nPearson × 100 on test by the tokens of the texts that are read."


def _costs(summary: dict[str, Any]) -> str:
    header = ["student", *_length_header(summary), "training, tokens/s", "training, MiB", "training, s"]
    header += ["encoding, tokens/s", "encoding, MiB", "pairs", "tokens", "operations", "of which transfer"]
    rows = []
    for g in summary["groups"]:
        read, training, budget = g["read"][str(g["length"])], g["training"], g["budget"]
        transfer = g["transfer_cost"]
        rows.append(
            [
                g["student"],
                *_length_cells(summary, g),
                *(_amount(training[key]) for key in ("tokens_per_second", "memory_mib", "seconds")),
                *(_amount(read[key]) for key in ("tokens_per_second", "memory_mib")),
                *(_short(budget[key]["mean"]) for key in ("examples", "tokens", "operations")),
                "–" if transfer is None else f"+ {_short(transfer['operations']['mean'])}",
            ]
        )
    note = (
        "Memory is the peak beyond what was held before. *pairs*, *tokens*, *operations*: what distillation spent; "
        "transfer's operations come on top."
    )
    cells, timed = sum(len(g["seeds"]) for g in summary["groups"]), summary["timed"]
    if timed["cells"] < cells:
        note += (
            f" Speed, seconds and memory are those of the {timed['cells']} of {cells} cells that ran in one place and "
            f"format ({timed['in']}), here and in all of the report: those of other machines do not compare."
        )
    return f"{markdown_table(header, rows)}\n{note}"


def _laws(summary: dict[str, Any]) -> str:
    header = ["student", "protocol", "Pearson × 100 per doubling", "time to 95 % of softmax", "time per pair", "cells"]
    rows = []
    for protocol, students in summary["laws"].items():
        for student, laws in students.items():
            pearson = laws["pearson"]
            powers = [
                "–"
                if laws[key] is None
                else f"length^{laws[key]['slope']:.2f} [{laws[key]['low']:.2f}, {laws[key]['high']:.2f}]"
                for key in ("to_95", "cost")
            ]
            if pearson is not None:
                slope = f"{100 * pearson['slope']:+.2f} [{100 * pearson['low']:+.2f}, {100 * pearson['high']:+.2f}]"
                rows.append([student, protocol, slope, *powers, str(pearson["n"])])
    if not rows:
        return "A line needs three cells of two lengths at least."
    note = (
        "Least squares over cells with 95 % intervals of the slope: final Pearson on test against the logarithm of "
        "the training length; time as a power of the length, without cells that were there before training or never. "
        "A line is a summary of the lengths that were measured, and no promise beyond them."
    )
    return f"{markdown_table(header, rows)}\n{note}"


def _failures(summary: dict[str, Any]) -> str:
    cells = [(Cell(**failure["cell"]), failure["message"].replace("`", "")) for failure in summary["failed"]]
    return "\n".join(f"- {cell.name}: `{message}`" for cell, message in cells)


def _unique(summary: dict[str, Any], key: str) -> list[str]:
    return list(dict.fromkeys(g[key] for g in summary["groups"]))


def _length_header(summary: dict[str, Any], name: str = "length") -> list[str]:
    """The column of lengths, and that of protocols where there are several."""
    return [name, *(["protocol"] if len(_unique(summary, "protocol")) > 1 else [])]


def _length_cells(summary: dict[str, Any], group: dict[str, Any]) -> list[str]:
    return [f"{group['length']:,}", *([group["protocol"]] if len(_unique(summary, "protocol")) > 1 else [])]


def _hundred(figures: dict[str, Any] | None) -> str:
    if figures is None or figures["mean"] is None:
        return "–"
    value = f"{100 * figures['mean']:.2f}"
    return value if figures["low"] is None else f"{value} [{100 * figures['low']:.1f}, {100 * figures['high']:.1f}]"


def _points(compared: dict[str, Any]) -> str:
    value = f"{100 * compared['mean']:+.2f}"
    if compared["low"] is None:
        return value
    return f"{value} [{100 * compared['low']:+.2f}, {100 * compared['high']:+.2f}]"


def _amount(figures: dict[str, Any] | None) -> str:
    if figures is None:
        return "–"
    if figures["mean"] is None:
        return f"{figures['reached']} of {figures['n']}"
    value = _short(figures["mean"])
    if figures["low"] in (None, figures["high"]):
        return value
    # No amount is below 0, where a symmetrical interval may reach.
    return f"{value} [{_short(max(0.0, figures['low']))}, {_short(figures['high'])}]"


def _short(value: float) -> str:
    for limit, name in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= limit:
            return f"{value / limit:.3g} {name}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
