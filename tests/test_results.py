"""The figures of the README come from the committed records."""

import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from st_linear import markdown, recipe, tables
from st_linear.benchmarks import report
from st_linear.evaluation import Mean
from st_linear.export import TOLERANCE
from st_linear.protocols import protocol_names
from st_linear.records import read_json
from st_linear.study import statistics
from st_linear.study.config import read_study

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"


@pytest.fixture(scope="module")
def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def swaps() -> dict[str, dict[str, Any]]:
    record = read_json(RESULTS / "zero-shot.json")
    return {name: final["natural"] for name, final in record["models"].items()}


def test_the_table_of_students_is_made_from_the_record(readme: str) -> None:
    record = read_json(RESULTS / "stsb" / "record.json")
    table = tables.as_markdown(tables.distilled(record))
    assert (RESULTS / "stsb" / "table.md").read_text(encoding="utf-8") == table
    assert table in readme


@pytest.mark.parametrize(
    ("folder", "page"), [("seeds", "README.md"), ("after", "docs/distillation.md"), ("mined", None)]
)
def test_the_table_over_seeds_is_made_from_the_record(folder: str, page: str | None) -> None:
    record = read_json(RESULTS / folder / "record.json")
    for made in record["students"].values():
        assert [one["settings"]["seed"] for one in made] == [0, 1, 2, 3, 4]
    section = (RESULTS / "README.md").read_text(encoding="utf-8").split(f"{folder}/record.json")[1].split("\n## ")[0]
    assert re.search(r"--seeds 0,1,2,3,4\b(?!,)", section)
    assert record["summary"] == json.loads(json.dumps(recipe.over_seeds(record["students"])))
    assert record["steps_to_control"] == json.loads(json.dumps(recipe.steps_to_control(record["students"])))
    table = tables.as_markdown(tables.distilled_over_seeds(record))
    assert (RESULTS / folder / "table.md").read_text(encoding="utf-8") == table
    assert page is None or table in (ROOT / page).read_text(encoding="utf-8")


def test_the_table_of_mined_pairs_is_made_from_the_records() -> None:
    records = [read_json(RESULTS / folder / "record.json") for folder in ("after", "mined")]
    gold, mined = (record["students"] for record in records)
    # Near/far reads these texts with softmax attention: it is the softmax student there.
    for near_far, softmax in zip(mined.pop("hedgehog@64+after"), mined["softmax"], strict=True):
        assert near_far["final"]["natural"]["pearson"] == pytest.approx(
            softmax["final"]["natural"]["pearson"], abs=1e-4
        )

    def ends(made: list[dict[str, Any]], metric: str, split: str) -> list[float]:
        return [(one["curve"][-1] if split == "dev" else one["final"]["natural"])[metric] for one in made]

    rows = []
    for name, made in mined.items():
        for own, other in zip(made, gold[name], strict=True):
            assert own["settings"] == other["settings"] | {"mined": 3600, "lengths": own["settings"]["lengths"]}
            assert own["teacher"]["mined"] == made[0]["teacher"]["mined"]
            assert own["teacher"] == other["teacher"] | {"mined": own["teacher"]["mined"]}
            same = ("base", "pairs", "student", "transfer_texts")
            assert [own[key] for key in same] == [other[key] for key in same]
        assert made[0]["teacher"]["mined"]["pairs"] == 3600
        cells = [tables.interval(record["summary"][name]["natural"]["pearson"]) for record in records]
        for metric in ("pearson", "spearman"):
            for split in ("test", "dev"):
                pairs = zip(ends(made, metric, split), ends(gold[name], metric, split))
                cells.append(tables.interval(asdict(Mean.of([own - other for own, other in pairs])), sign=True))
        rows.append([f"`{name}`", *cells])
    gains = [f"{metric}, {split}" for metric in ("gain in Pearson", "in Spearman") for split in ("test", "dev")]
    table = markdown.table(["student", "Pearson, gold pairs", "and mined ones", *gains], rows)
    assert f"{table}\n" in (ROOT / "docs" / "distillation.md").read_text(encoding="utf-8"), f"\n{table}"


def test_the_table_of_ways_to_use_a_teacher_is_made_from_its_records() -> None:
    paths = (RESULTS / "mined" / "ways").glob("*.json")
    records = {path.stem: read_json(path)["students"] for path in paths}
    commands = (RESULTS / "README.md").read_text(encoding="utf-8").split("## Pairs without gold scores")[1]
    ways = re.findall(r"^way \S+ (\S+) ?(.*)$", commands, re.MULTILINE)
    assert records.keys() == {"silver", *(name for name, _ in ways)}
    for name, folder in (("gold", "after"), ("mined", "mined")):
        students = read_json(RESULTS / folder / "record.json")["students"]
        records[name] = {"softmax": students["softmax"][:1]}
    made = {name: record["softmax"][0] for name, record in records.items()}
    gold = made["gold"]
    for name, flags in ways:
        asked: dict[str, Any] = {"mined": 0, "lengths": made[name]["settings"]["lengths"]}
        for flag, value in re.findall(r"--(\S+) (\S+)", flags):
            key = {"mine": "mined"}.get(flag, flag.replace("-", "_"))
            asked[key] = type(gold["settings"][key])(value)
        assert made[name]["settings"] == gold["settings"] | asked
        assert made[name]["pairs"] == gold["pairs"]
        assert (made[name]["teacher"] or gold["teacher"])["scores"] == gold["teacher"]["scores"]
    rows = []
    for name, one in made.items():
        assert (one["student"], one["settings"]["seed"]) == (gold["student"], 0)
        settings, pairs = one["settings"], (one["teacher"] or {}).get("mined")
        count = made["all-mined"]["teacher"]["mined"]["pairs"] if name == "silver" else pairs and pairs["pairs"]
        ends = one["curve"][-1], one["final"]["natural"]
        figures = [f"{100 * of[metric]:.2f}" for metric in ("pearson", "spearman") for of in ends]
        rows.append([f"`{name}`", f"{count:,}" if count else "–", f"{settings['epochs']:g}", *figures])
    rows.sort(key=lambda row: (-float(row[3]), row[0]))
    figures = [f"{metric}, {split}" for metric in ("Pearson", "Spearman") for split in ("dev", "test")]
    table = markdown.table(["way", "mined pairs", "epochs", *figures], rows)
    assert f"{table}\n" in (ROOT / "docs" / "distillation.md").read_text(encoding="utf-8"), f"\n{table}"


def test_the_table_of_an_averaged_teacher_is_made_from_its_records() -> None:
    paths = {"gold": "after/record.json", "mined": "mined/record.json", "all-mined": "mined/ways/all-mined.json"}
    first = {name: read_json(RESULTS / path) for name, path in paths.items()}
    averaged = {path.stem: read_json(path) for path in (RESULTS / "mined" / "averaged").glob("*.json")}
    longer, grouped = ("gold-3-epochs", "all-mined-3-epochs"), ("gold-1-epoch", "groups-1-epoch")
    assert averaged.keys() == {*first, "new-sentences", *longer, *grouped}
    settings = {name: made["students"]["softmax"][0]["settings"] for name, made in averaged.items()}
    for name, made in first.items():
        own = made["students"]["softmax"][0]["settings"]
        assert settings[name] == own | {"lengths": settings[name]["lengths"]}
    assert settings["new-sentences"] == settings["mined"]
    for name in longer:
        assert settings[name] == settings[name.removesuffix("-3-epochs")] | {"epochs": 3, "half": True}
    for name, count in zip(grouped, (0, 4000)):
        changed = {"epochs": 1, "learning_rate": 7e-5, "half": True, "evaluations": 8, "groups": count}
        assert settings[name] == settings["gold"] | changed
    rows = []
    for teacher, records in (("CrossEncoder", first), ("averaged", averaged)):
        for name in ("gold", "mined", "all-mined", "new-sentences", *longer, *grouped):
            if name not in records:
                continue
            taught, one = records[name]["teacher"]["figures"], records[name]["students"]["softmax"][0]
            mined, groups = one["teacher"]["mined"], one["teacher"].get("groups")
            pairs = f"{groups['groups']:,} groups" if groups else f"{mined['pairs']:,}" if mined else "–"
            ends = (taught["dev"], taught["test"], one["curve"][-1], one["final"]["natural"])
            figures = [f"{100 * of['pearson']:.2f}" for of in ends]
            rows.append([teacher, f"`{name}`", pairs, *figures])
    heads = [f"{who}, {split}" for who in ("teacher", "student") for split in ("dev", "test")]
    table = markdown.table(["teacher", "way", "mined pairs", *heads], rows)
    assert f"{table}\n" in (ROOT / "docs" / "distillation.md").read_text(encoding="utf-8"), f"\n{table}"


def test_the_table_of_swaps_is_made_from_the_record(readme: str, swaps: dict[str, dict[str, Any]]) -> None:
    seeds = [figures for name, figures in swaps.items() if name.startswith("favor-seed-")]
    assert len(seeds) == 5
    averages = {metric: mean(figures[metric] for figures in seeds) for metric in ("pearson", "spearman")}
    rows = {name: figures for name, figures in swaps.items() if not name.startswith("favor-seed-")}
    for name, figures in {**rows, "favor": averages}.items():
        found = re.search(rf"^\| `{name}`[^|]*\| ([\d.]+) \| ([\d.]+) \|$", readme, re.MULTILINE)
        assert found, name
        assert found.groups() == tuple(f"{100 * figures[metric]:.2f}" for metric in ("pearson", "spearman"))


def test_texts_inside_the_window_keep_the_original_figures(swaps: dict[str, dict[str, Any]]) -> None:
    for metric in ("pearson", "spearman"):
        assert swaps["near-far"][metric] == pytest.approx(swaps["softmax"][metric], abs=1e-4)


SPEED = sorted((RESULTS / "speed").glob("*/*.json"))


def test_there_are_records_of_speed() -> None:
    assert SPEED


@pytest.mark.parametrize("path", SPEED, ids=lambda path: path.parent.name)
def test_tables_of_speed_are_made_from_their_records(path: Path) -> None:
    record = read_json(path)
    assert path.with_suffix(".md").read_text(encoding="utf-8") == report.markdown(record)


@pytest.mark.parametrize("page", ["README.md", "docs/performance.md", "docs/deployment.md"])
def test_rows_of_speed_stand_in_those_tables(page: str) -> None:
    tables = {line for path in SPEED for line in path.with_suffix(".md").read_text(encoding="utf-8").splitlines()}
    text = (ROOT / page).read_text(encoding="utf-8")
    quoted = [line for line in text.splitlines() if re.match(r"\| (\d|sts-)", line)]
    assert quoted
    assert [line for line in quoted if line not in tables] == []


def fidelity_cells(figures: dict[str, Any]) -> list[str]:
    cells = [f"{figures[key]:.4f}" for key in ("cosine", "cosine_p5", "token_cosine")]
    return [*cells, f"{figures['neighbours_10']:.1%}" if "neighbours_10" in figures else "–"]


@pytest.mark.parametrize(
    ("page", "name", "exact_up_to"),
    [
        ("README.md", "all-MiniLM-L6-v2", 512),
        ("docs/conversion.md", "all-MiniLM-L6-v2", 512),
        ("docs/conversion.md", "far-from-256", 256),
        ("docs/conversion.md", "1000-passages", 512),
    ],
)
def test_rows_of_fidelity_are_made_from_the_records(page: str, name: str, exact_up_to: int) -> None:
    record = read_json(RESULTS / "conversion" / f"{name}.json")
    # The oldest record is of a time when there was no choice.
    assert record.get("exact_up_to", 2 * record["window"]) == exact_up_to
    text = (ROOT / page).read_text(encoding="utf-8")
    for length, figures in record["fidelity"]["figures"].items():
        cells = [f"{int(length):,} tokens", f"{figures['n']:.0f}", *fidelity_cells(figures)]
        assert f"| of {' | '.join(cells)} |" in text


def test_neighbours_among_a_thousand_passages_are_those_of_the_record() -> None:
    path = RESULTS / "conversion" / "far-from-256-1000-passages.json"
    figures = read_json(path)["fidelity"]["figures"]["512"]
    page = (ROOT / "docs" / "conversion.md").read_text(encoding="utf-8")
    shared = f"{100 * figures['neighbours_10']:.1f} % of neighbours are shared among {figures['n']:,.0f} passages"
    assert shared in page


def test_the_tables_of_the_ablation_are_made_from_its_records() -> None:
    folder = RESULTS / "conversion" / "ablation"
    records = {path.stem: read_json(path) for path in folder.glob("*.json")}
    for name, record in records.items():
        assert name.startswith(record["feature_map"])
        assert (record["exact_up_to"], record["window"]) == (256, int((re.findall(r"window-(\d+)", name) or [128])[0]))
        assert ("training" in record) == ("untrained" not in name)
        if "training" in record:
            settings = record["training"]["settings"]
            assert settings["target"] == ("attention" if name.endswith("-attention") else "hidden")
            assert settings["steps"] == (1 if name.endswith("-calibrated") else 32)
            assert settings["seed"] == (1 if name.endswith("-seed-1") else 0)
            assert settings["lengths"] == [1024]
    figures = {f"`{name}`": record["fidelity"]["figures"]["1024"] for name, record in records.items()}
    layers = read_json(RESULTS / "conversion" / "layers.json")
    page = (ROOT / "docs" / "conversion.md").read_text(encoding="utf-8")
    for title, found in {
        "conversion": dict(sorted(figures.items(), key=lambda item: -item[1]["cosine"])),
        "exact layer": {layer: record["figures"]["1024"] for layer, record in layers.items()},
    }.items():
        assert {of["n"] for of in found.values()} == {64}
        header = [title, "cosine, mean", "5th percentile", "of tokens", "10 nearest passages shared"]
        table = markdown.table(header, [[name, *fidelity_cells(of)] for name, of in found.items()])
        assert f"{table}\n" in page, f"\n{table}"


@pytest.mark.parametrize("model", ["softmax", "near-far"])
def test_figures_of_mteb_are_those_of_its_files(model: str) -> None:
    (folder,) = (RESULTS / "mteb" / "results" / f"local__{model}").iterdir()
    cells = [model]
    for task in ("STSBenchmark", "STSBenchmarkDocument128"):
        result = read_json(folder / f"{task}.json")
        assert result["dataset_revision"].startswith("local-")
        (scores,) = result["scores"]["test"]
        cells.append(", ".join(f"{100 * scores[f'cosine_{metric}']:.2f}" for metric in ("spearman", "pearson")))
    assert f"| {' | '.join(cells)} |" in (ROOT / "docs" / "mteb.md").read_text(encoding="utf-8")


def test_the_table_of_lengths_is_complete_and_made_from_the_record() -> None:
    record = read_json(RESULTS / "lengths" / "record.json")
    table = tables.as_markdown(tables.side_by_side(record["models"], ""))
    assert (RESULTS / "lengths" / "table.md").read_text(encoding="utf-8") == table
    assert table in (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    lengths = [str(length) for length in record["grid"]["lengths"]]
    assert lengths == ["128", "512", "1024", "2048", "4096", "8192"]
    for name, grid in record["models"].items():
        assert list(grid) == ["natural", *protocol_names()]
        assert grid["natural"]["n"] == 1379
        for protocol in protocol_names():
            assert list(grid[protocol]) == lengths
            for figures in grid[protocol].values():
                # Only where a model that is cut reads nothing of the sentence.
                assert figures["undefined"] is None or figures["truncated"] == 1, (name, protocol)


def test_texts_inside_two_windows_have_the_softmax_figures_at_length(swaps: dict[str, dict[str, Any]]) -> None:
    models = read_json(RESULTS / "lengths" / "record.json")["models"]
    for protocol in protocol_names():
        near_far, softmax = (models[name][protocol]["128"] for name in ("near-far", "softmax"))
        assert near_far["pearson"] == pytest.approx(softmax["pearson"], abs=1e-4)
    assert models["softmax"]["natural"]["pearson"] == pytest.approx(swaps["softmax"]["pearson"], abs=1e-5)


def test_figures_of_deployment_are_those_of_its_records() -> None:
    page = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    models = read_json(RESULTS / "deployment" / "record.json")["models"]
    table = tables.as_markdown(tables.side_by_side(models, ""))
    assert (RESULTS / "deployment" / "table.md").read_text(encoding="utf-8") == table
    assert table in page
    torch, onnx, int8, openvino = (figures["natural"]["pearson"] for figures in models.values())
    assert (onnx, openvino) == (pytest.approx(torch, abs=1e-6), pytest.approx(torch, abs=1e-6))
    assert torch - int8 == pytest.approx(0.0025, abs=0.0005)
    for name, entry in read_json(RESULTS / "deployment" / "export.json").items():
        differences = entry["largest_difference"]
        assert list(differences) == ["16", "512", "4096"]
        assert name == "onnx-int8" or all(value <= TOLERANCE for value in differences.values())
        cells = [f"`{name}`", f"{entry['bytes'] / 2**20:.1f}", *(f"{value:.1e}" for value in differences.values())]
        assert f"| {' | '.join(cells)} |" in page


STUDY = ROOT / "docs" / "study"


@pytest.fixture(scope="module")
def study() -> dict[str, Any]:
    return statistics.summarise(statistics.Records.read(STUDY / "cpu"))


def test_the_study_ran_to_its_end(study: dict[str, Any]) -> None:
    assert (study["missing"], study["failed"]) == (0, [])
    cells = read_study(STUDY / "cpu.yaml").cells()
    assert {path.parent.name for path in STUDY.glob("cpu/cells/*/record.json")} == {cell.folder for cell in cells}


def test_the_report_is_made_from_the_records(study: dict[str, Any]) -> None:
    # Nine digits: processors differ in the last ones, and so do scipy's quantiles from one version to another.
    written = json.loads(
        (STUDY / "cpu" / "report" / "summary.json").read_text(encoding="utf-8"),
        parse_float=lambda number: pytest.approx(float(number), rel=5e-9, abs=0),
    )
    assert json.loads(json.dumps(study)) == written


@pytest.mark.parametrize("what", ["pearson", "difference", "steps", "operations", "speed", "memory"])
def test_the_tables_of_the_studys_page_are_made_from_its_records(study: dict[str, Any], what: str) -> None:
    def cell(group: dict[str, Any]) -> str:
        if what == "pearson":
            return interval(group["read"][str(group["length"])]["pearson"], "{:.2f}", 100)
        if what == "difference":
            return interval((group["against_control"] or {}).get("pearson"), "{:+.2f}", 100)
        if what == "steps":
            return interval(group["convergence"]["gain"]["95"]["steps"], "{:.1f}", 1, lowest=0)
        if what == "operations":
            return interval(group["budget"]["operations"], "{:.1f}", 1e-12)
        return interval(group["training"][{"speed": "tokens_per_second", "memory": "memory_mib"}[what]], "{:,.0f}", 1)

    def interval(figures: dict[str, Any] | None, form: str, factor: float, lowest: float = -math.inf) -> str:
        if figures is None or figures["mean"] is None:
            return "–"
        text = form.format(factor * figures["mean"])
        # An interval of two machine times would be twelve times their distance: the page gives means alone.
        if figures["low"] in (None, figures["high"]) or what in ("speed", "memory"):
            return text
        low, high = (form.format(factor * max(lowest, figures[key])) for key in ("low", "high"))
        return f"{text} [{low}, {high}]"

    lengths = sorted({group["length"] for group in study["groups"]})
    students = sorted({group["student"] for group in study["groups"]}, key=lambda name: (name != "softmax", name))
    found = {(group["student"], group["length"]): cell(group) for group in study["groups"]}
    rows = [[f"`{student}`", *(found.get((student, length), "–") for length in lengths)] for student in students]
    if what == "difference":
        rows = rows[1:]
    table = markdown.table(["student", *(f"{length:,} tokens" for length in lengths)], rows)
    assert table in (STUDY / "README.md").read_text(encoding="utf-8"), f"\n{table}"
