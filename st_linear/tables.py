"""Tables of figures, for the terminal and in Markdown."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from rich.table import Table

from st_linear import markdown
from st_linear.evaluation import METRICS, NATURAL, Correlation, report_correlation


def distilled(result: dict[str, Any]) -> Table:
    """A teacher and its students, before training and after, at every length."""
    table = _figures_table(f"Test of {result['data']}")
    if result["teacher"] is not None:
        _add_rows(table, "teacher", {"natural": result["teacher"]["figures"]["test"]})
    for name, record in result["students"].items():
        _add_rows(table, f"{name}, untrained", {"natural": record["untrained"]})
        _add_rows(table, name, record["final"])
    return table


def distilled_over_seeds(result: dict[str, Any]) -> Table:
    """Means over seeds; with one seed, its figures without an interval. Steps are those of dev's learning curve."""
    table = Table(
        title=f"Test of {result['data']}", caption="Pearson and Spearman × 100; with 95 % intervals over seeds"
    )
    columns = ["seeds", "Pearson", "Spearman", "Pearson − softmax student's", "of teacher's"]
    shares = list(next(iter(result["steps_to_control"].values()), ()))
    columns += [f"steps to {share} % of softmax's, on dev" for share in shares]
    for column in ("student", "stage", *columns):
        table.add_column(column, justify="left" if column in ("student", "stage") else "right")
    taught = None
    if result["teacher"] is not None:
        figures = result["teacher"]["figures"]["test"]
        taught = figures["pearson"]
        found = (f"{100 * figures[key]:.2f}" for key in ("pearson", "spearman"))
        table.add_row("teacher", "–", "–", *found, "–", "–", *["–"] * len(shares))
    for name, stages in result["summary"].items():
        for stage, means in stages.items():
            cells = [
                interval(means[key], sign=key == "minus_control") for key in ("pearson", "spearman", "minus_control")
            ]
            trained = stage == "natural"
            pearson = means["pearson"]
            cells.append(f"{pearson['mean'] / taught:.1%}" if trained and taught and pearson else "–")
            for share in shares:
                steps = result["steps_to_control"][name][share]
                cells.append("–" if not trained else "never" if steps is None else f"{steps['mean']:.0f}")
            table.add_row(name, stage, str(pearson["n"]) if pearson else "–", *cells)
    return table


def grids(models: dict[str, dict[str, Any]], title: str) -> Table:
    """All figures of a grid of protocols and lengths, a row for each model and cell."""
    table = _figures_table(title, "protocol")
    for name, grid in models.items():
        for protocol, figures in grid.items():
            by_length = {NATURAL: figures} if protocol == NATURAL else figures
            _add_rows(table, name, by_length, "–" if protocol == NATURAL else protocol)
    return table


def side_by_side(models: dict[str, dict[str, Any]], title: str) -> Table:
    """Pearson alone, a row for each cell and a column for each model."""
    table = Table(title=title)
    for column in ("protocol", "length", "pairs", *models):
        table.add_column(column)
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for name, grid in models.items():
        for protocol, figures in grid.items():
            for length, some in ({NATURAL: figures} if protocol == NATURAL else figures).items():
                rows.setdefault(("–" if protocol == NATURAL else protocol, length), {})[name] = some
    for cell, by_model in rows.items():
        pairs = str(next(iter(by_model.values()))["n"])
        figures_of = (by_model.get(name) for name in models)
        table.add_row(*cell, pairs, *("–" if some is None else _correlations(some)[0] for some in figures_of))
    return table


def two_columns(title: str, values: dict[str, Any]) -> Table:
    """Names and what they stand for."""
    table = Table(title=title, show_header=False)
    for key, value in values.items():
        table.add_row(key, str(value))
    return table


def fidelity(result: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """What is known of a conversion's fidelity, by length, under a title each."""
    held_out = result.get("training", {}).get("held_out", {})
    titles = {"before": "held-out texts, before", "after": "held-out texts, after"}
    found = {titles[key]: figures for key, figures in held_out.items()}
    if "fidelity" in result:
        found["other texts"] = result["fidelity"]["figures"]
    return found


def add_fidelity(table: Table, result: dict[str, Any]) -> None:
    """Add rows with what is known of a conversion's fidelity."""
    for title, by_length in fidelity(result).items():
        for length, some in by_length.items():
            cells = [f"cosine {some['cosine']:.4f} (5 % below {some['cosine_p5']:.4f})"]
            cells += [f"tokens {some['token_cosine']:.4f}"]
            cells += [f"{key.replace('_', ' ')} {some[key]:.1%}" for key in some if key.startswith("neighbours")]
            table.add_row(f"{title}, {int(length):,} tokens × {some['n']:.0f}", " · ".join(cells))


def exported(title: str, formats: dict[str, Any]) -> Table:
    """Graphs of an encoder, and how far from PyTorch they are."""
    table = Table(title=title, caption="largest difference of a token's embedding, by number of tokens")
    lengths = next(iter(formats.values()))["largest_difference"]
    for column in ("format", "file", "MiB", *(f"{int(length):,}" for length in lengths)):
        table.add_column(column, justify="left" if column in ("format", "file") else "right")
    for name, entry in formats.items():
        differences = (f"{value:.1e}" for value in entry["largest_difference"].values())
        table.add_row(name, entry["file"], f"{entry['bytes'] / 2**20:.1f}", *differences)
    return table


def as_markdown(table: Table) -> str:
    """A table without its title."""
    cells = [[str(cell) for cell in column.cells] for column in table.columns]
    return markdown.table([str(column.header) for column in table.columns], list(zip(*cells)))


def _figures_table(title: str, *columns: str) -> Table:
    """A table that :func:`_add_rows` fills; ``columns`` stand between the model and the length."""
    table = Table(title=title, caption="Pearson and Spearman × 100, with 95 % intervals")
    for column in ("model", *columns, "length", "tokens read", "cut", "pairs", "Pearson", "Spearman"):
        table.add_column(column, justify="left" if column in ("model", *columns) else "right")
    return table


def _add_rows(table: Table, name: str, final: dict[str, Any], *cells: str) -> None:
    for length, figures in final.items():
        # A teacher's scores come without the texts they are of.
        read = f"{figures['mean_tokens']:,.0f}" if "mean_tokens" in figures else "–"
        cut = f"{figures['truncated']:.0%}" if "truncated" in figures else "–"
        table.add_row(name, *cells, length, read, cut, str(figures["n"]), *_correlations(figures))


def _correlations(figures: dict[str, Any]) -> tuple[str, ...]:
    """Pearson and Spearman, as printed."""
    if figures.get("undefined"):
        return f"undefined: {figures['undefined']}", "–"
    found = Correlation(**{field.name: figures[field.name] for field in fields(Correlation)})
    return tuple(report_correlation(metric, found) for metric in METRICS)


def interval(mean: dict[str, Any] | None, sign: bool = False) -> str:
    """A mean over seeds, × 100, and its interval where it has one."""
    if mean is None:
        return "–"
    form = "+.2f" if sign else ".2f"
    value = f"{100 * mean['mean']:{form}}"
    return value if mean["low"] is None else f"{value} [{100 * mean['low']:{form}}, {100 * mean['high']:{form}}]"
