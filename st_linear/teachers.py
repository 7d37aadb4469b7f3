"""Teachers: their scores as a second value in the label column, cached; and a CrossEncoder trained here."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterator
from itertools import chain, combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset, Value
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Module
from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from transformers import set_seed

from st_linear.checkpoints import hub_kwargs_of, hub_out_of_reach
from st_linear.losses import TEACHER_ACTIVATIONS, TeacherActivation, check_choice, check_teacher
from st_linear.records import read_json, write_json
from st_linear.untrusted import guarded, refuse_bad_weights

_SCORE_COLUMNS = {"sigmoid": "score", "identity": "logit"}
_PAIRS_AT_A_TIME = 2**14


def load_teacher(teacher: str | os.PathLike[str] | CrossEncoder, **kwargs: Any) -> CrossEncoder:
    """A CrossEncoder with one label, from a hub id or folder; one that is loaded already passes through.

    Raises:
        ValueError: If it has several labels.
        FileNotFoundError: If there is no such folder, and no such model on the hub.
    """
    if isinstance(teacher, (str, os.PathLike)):
        if not os.path.isdir(teacher) and not kwargs.get("local_files_only"):
            kwargs["local_files_only"] = hub_out_of_reach(str(teacher), revision=kwargs.get("revision"))
        try:
            hub_kwargs = hub_kwargs_of(kwargs)
            with guarded(str(teacher), kwargs.get("model_kwargs"), **hub_kwargs):
                model = CrossEncoder(str(teacher), **kwargs)
                refuse_bad_weights(str(teacher), model, **hub_kwargs)
            return load_teacher(model)
        except OSError as error:
            if os.path.isdir(teacher):
                reason = str(error).partition("\n")[0]
                raise ValueError(f"{teacher} is no CrossEncoder that can be read ({reason})") from error
            raise FileNotFoundError(
                f"no folder {str(teacher)!r} here, and no such CrossEncoder could be had from the Hugging Face Hub"
            ) from error
    check_teacher(teacher)
    return teacher


def add_teacher_scores(
    dataset: Dataset,
    teacher: CrossEncoder | SentenceTransformer | str | os.PathLike[str],
    *,
    activation: TeacherActivation = "sigmoid",
    split: Literal["train", "dev", "test"] = "train",
    batch_size: int = 64,
    cache_folder: str | os.PathLike[str] | None = None,
    show_progress_bar: bool = True,
) -> Dataset:
    """Put a teacher's scores beside the gold scores: the label column becomes ``[gold, teacher]``.

    Scores are computed once and cached under a fingerprint of the texts, the teacher and ``activation``.

    Args:
        dataset: Columns ``sentence1``, ``sentence2`` and, unless pairs are unlabelled, ``score``. Or groups, as
            :func:`~st_linear.mining.mine_groups` returns them: ``sentence1`` to ``sentenceK``, without ``score``.
        teacher: A CrossEncoder, its hub id or folder; a SentenceTransformer, loaded, whose scores are its cosines,
            those below 0 as 0; or, for pairs, a folder of score files, ``{split}.csv`` with columns ``logit,score``,
            row for row as the dataset.
        activation: Applied to the teacher's logits: ``"sigmoid"`` squashes them into 0–1, as a cosine student needs;
            ``"identity"`` keeps them. Pass the same to ``DistillationLoss(teacher_activation=…)``.
        split: Which file of a folder of score files.
        batch_size: Pairs at a time; of a SentenceTransformer, sentences.
        cache_folder: ``~/.cache/st_linear/teacher_scores`` by default (under ``XDG_CACHE_HOME`` where it is set).
        show_progress_bar: Show one while scoring.

    Returns:
        The dataset with column ``score``: ``[gold, teacher]``, or the teacher's alone where there was no gold. Of a
        group, its scores of all pairs: the first text with the second, the first with the third, and so on.

    Raises:
        ValueError: If the teacher has several labels, answers with NaN, or scored the dataset already, score files
            and dataset do not fit, groups have gold scores, or a SentenceTransformer is asked for logits.
        FileNotFoundError: If there is no such teacher.

    Example:
        ::

            train = load_pairs("sentence-transformers/stsb", "train")
            train = add_teacher_scores(train, "cross-encoder/stsb-roberta-large")
    """
    check_choice("activation", activation, TeacherActivation)
    for column in ("sentence1", "sentence2"):
        if column not in dataset.column_names:
            raise ValueError(f"the dataset has no column {column!r}; its columns: {', '.join(dataset.column_names)}")
    labelled = "score" in dataset.column_names
    if labelled and not isinstance(dataset.features["score"], Value):
        raise ValueError("column 'score' holds teacher scores already; pass the dataset with gold scores alone")
    size = len(text_columns(dataset))
    if labelled and size > 2:
        raise ValueError(f"groups of {size} sentences have no gold scores: drop the column 'score', or sentence3")
    if isinstance(teacher, (str, os.PathLike)) and is_score_folder(teacher):
        if size > 2:
            raise ValueError(f"{teacher} is a folder of scores, whose groups have them already: call read_groups")
        scores = read_teacher_scores(teacher, split, activation=activation)
        if len(scores) != len(dataset):
            raise ValueError(f"{teacher} holds {len(scores)} scores for {split}, the dataset {len(dataset)} pairs")
    else:
        scores = score_pairs(
            dataset,
            teacher if isinstance(teacher, SentenceTransformer) else load_teacher(teacher),
            activation=activation,
            batch_size=batch_size,
            cache_folder=cache_folder,
            show_progress_bar=show_progress_bar,
        )
    if size > 2:
        return dataset.add_column("score", np.reshape(scores, (-1, size * (size - 1) // 2)).tolist())
    if not labelled:
        return dataset.add_column("score", scores)
    labels = [[gold, taught] for gold, taught in zip(dataset["score"], scores)]
    return dataset.remove_columns("score").add_column("score", labels)


def score_pairs(
    dataset: Dataset,
    teacher: CrossEncoder | SentenceTransformer,
    *,
    activation: TeacherActivation = "sigmoid",
    batch_size: int = 64,
    cache_folder: str | os.PathLike[str] | None = None,
    show_progress_bar: bool = True,
) -> list[float]:
    """The teacher's scores of all pairs, row by row, cached or not; arguments as :func:`add_teacher_scores`."""
    if isinstance(teacher, SentenceTransformer) and activation == "identity":
        raise ValueError("a SentenceTransformer has no logits: its scores are cosines; pass activation='sigmoid'")
    columns = (dataset[column] for column in text_columns(dataset))
    pairs = [pair for row in zip(*columns) for pair in combinations(row, 2)]
    path = _cache_folder(cache_folder) / f"{_fingerprint(pairs, teacher, activation)}.json"
    if path.is_file():
        return read_json(path)["scores"]
    if isinstance(teacher, SentenceTransformer):
        predicted = _cosines(pairs, teacher, batch_size, show_progress_bar)
    else:
        predicted = teacher.predict(
            pairs,
            batch_size=batch_size,
            activation_fn=TEACHER_ACTIVATIONS[activation],
            show_progress_bar=show_progress_bar,
            convert_to_numpy=True,
        )
    if bad := int((~np.isfinite(predicted)).sum()):
        raise ValueError(f"the teacher gave NaN or inf for {bad} of {len(pairs)} pairs")
    scores = [float(score) for score in predicted]
    write_json(path, {"activation": activation, "scores": scores})
    return scores


def _cosines(
    pairs: list[tuple[str, str]], teacher: SentenceTransformer, batch_size: int, show_progress_bar: bool
) -> np.ndarray:
    """Each sentence is read once, however many pairs it is in."""
    rows = {sentence: row for row, sentence in enumerate(dict.fromkeys(chain.from_iterable(pairs)))}
    embeddings = teacher.encode(
        list(rows), batch_size=batch_size, normalize_embeddings=True, show_progress_bar=show_progress_bar
    ).astype(np.float32)
    sides = np.array([[rows[first], rows[second]] for first, second in pairs])
    parts = np.array_split(sides, len(sides) // _PAIRS_AT_A_TIME + 1)
    cosines = [np.einsum("ij,ij->i", *embeddings[part.T]) for part in parts]
    return np.concatenate(cosines).clip(0, 1)


def text_columns(dataset: Dataset) -> list[str]:
    """``sentence1``, ``sentence2`` and those that follow: two of pairs, more of groups."""
    columns: list[str] = []
    while (name := f"sentence{len(columns) + 1}") in dataset.column_names:
        columns.append(name)
    return columns


def is_score_folder(folder: str | os.PathLike[str]) -> bool:
    """Whether ``folder`` holds score files rather than a model."""
    path = Path(folder)
    return path.is_dir() and not (path / "config.json").is_file() and any(path.glob("*.csv"))


def read_teacher_scores(
    folder: str | os.PathLike[str], split: str, *, activation: TeacherActivation = "sigmoid"
) -> list[float]:
    """A cached column of teacher scores: ``{folder}/{split}.csv`` with a header and columns ``logit,score``.

    Args:
        folder: The folder.
        split: ``"train"``, ``"dev"``, ``"test"`` or ``"mined"``.
        activation: ``"sigmoid"`` reads column ``score``, ``"identity"`` column ``logit``.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If the column is missing, or a value is no finite number.
    """
    column = _SCORE_COLUMNS[activation]
    path, rows = _read_rows(folder, split, column)
    return _scores_of(rows, path, column)


def read_mined_pairs(folder: str | os.PathLike[str], *, activation: TeacherActivation = "sigmoid") -> Dataset:
    """Pairs without gold scores that a teacher has scored: ``{folder}/mined.csv``.

    Its header is ``sentence1,sentence2,logit,score``.

    Args:
        folder: The folder.
        activation: ``"sigmoid"`` reads column ``score``, ``"identity"`` column ``logit``.

    Returns:
        A dataset with the columns ``sentence1``, ``sentence2`` and ``score``, which is the teacher's.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If there is no pair, a column is missing, a sentence is empty, or a score is no finite number.
    """
    column = _SCORE_COLUMNS[activation]
    path, rows = _read_rows(folder, "mined", "sentence1", "sentence2", column)
    if not rows:
        raise ValueError(f"{path} holds no pairs")
    sentences = {name: [row[name] for row in rows] for name in ("sentence1", "sentence2")}
    for name, texts in sentences.items():
        for number, text in enumerate(texts, start=1):
            if not text or not text.strip():
                raise ValueError(f"{path}, row {number}: {name} is {text!r}, not a text")
    return Dataset.from_dict({**sentences, "score": _scores_of(rows, path, column)})


def read_groups(folder: str | os.PathLike[str]) -> Dataset:
    """Groups of sentences, all pairs of which a teacher has scored: ``{folder}/groups.jsonl``.

    A line has the keys ``sentence1`` to ``sentenceK`` and ``score``, a list as :func:`add_teacher_scores` makes it.

    Args:
        folder: The folder.

    Returns:
        A dataset with these columns.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If it can't be read, groups are smaller than three, a sentence is empty, or scores are not as many
            as pairs or no numbers in 0–1.
    """
    path = Path(folder) / "groups.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"no groups that a teacher has scored: {path} is missing")
    try:
        # Not splitlines(), which also splits at characters that JSON strings may hold.
        lines = path.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} can't be read as UTF-8: {error}") from error
    if lines == [""]:
        raise ValueError(f"{path} holds no groups")
    groups: dict[str, list[Any]] = {}
    for number, line in enumerate(lines, start=1):
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
            texts, scores = [row[f"sentence{index}"] for index in range(1, len(row))], row["score"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{place} is no group: sentence1 to sentenceK and score in JSON ({error})") from error
        if groups and row.keys() != groups.keys():
            raise ValueError(f"{place} has {len(texts)} sentences, those before it {len(groups) - 1}")
        if len(texts) < 3:
            raise ValueError(f"{place} has {len(texts)} sentences: pairs belong in mined.csv")
        if bad := [text for text in texts if not isinstance(text, str) or not text.strip()]:
            raise ValueError(f"{place}: a sentence is {bad[0]!r}, not a text")
        wanted = len(texts) * (len(texts) - 1) // 2
        if not isinstance(scores, list) or len(scores) != wanted:
            raise ValueError(f"{place}: score must be a list of {wanted} numbers, one for each pair")
        if bad := [score for score in scores if type(score) not in (int, float) or not 0 <= score <= 1]:
            raise ValueError(f"{place}: a score is {bad[0]!r}, not a number in 0..1")
        for key, value in row.items():
            groups.setdefault(key, []).append(value)
    return Dataset.from_dict(groups)


def train_teacher(
    base: str,
    train: Dataset,
    output_path: str | os.PathLike[str],
    *,
    epochs: float = 2,
    batch_size: int = 32,
    learning_rate: float = 5e-5,
    max_length: int = 128,
    seed: int = 0,
    show_progress_bar: bool = True,
) -> CrossEncoder:
    """Fine-tune ``base`` as a CrossEncoder on gold scores, with binary cross-entropy, and save it.

    Args:
        base: Hub id or folder of an encoder.
        train: Columns ``sentence1``, ``sentence2``, ``score`` in 0–1.
        output_path: Folder of the trained teacher.
        epochs: Passes over ``train``.
        batch_size: Pairs per step.
        learning_rate: Peak of a schedule with 10 % warm-up and linear decay.
        max_length: Tokens per pair.
        seed: Of the head's start and of the order of pairs.
        show_progress_bar: Show one.

    Raises:
        ValueError: If a gold score lies outside 0–1.
    """
    columns = train.select_columns(["sentence1", "sentence2", "score"])
    if len(columns) and not 0 <= min(columns["score"]) <= max(columns["score"]) <= 1:
        low, high = min(columns["score"]), max(columns["score"])
        raise ValueError(f"gold scores must lie in 0..1, got {low:g}..{high:g}: divide STS-B's by 5")
    set_seed(seed)
    teacher = CrossEncoder(base, num_labels=1, max_length=max_length)
    arguments = CrossEncoderTrainingArguments(
        output_dir=str(Path(output_path) / "trainer"),
        num_train_epochs=epochs,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        warmup_steps=0.1,
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=not show_progress_bar,
    )
    CrossEncoderTrainer(
        model=teacher, args=arguments, train_dataset=columns, loss=BinaryCrossEntropyLoss(teacher)
    ).train()
    teacher.save_pretrained(str(output_path))
    return teacher


def _read_rows(folder: str | os.PathLike[str], split: str, *columns: str) -> tuple[Path, list[dict[str, str]]]:
    """A score file and its rows, all of which have ``columns``."""
    path = Path(folder) / f"{split}.csv"
    if not path.is_file():
        raise FileNotFoundError(f"no teacher scores for {split}: {path} is missing")
    limit = csv.field_size_limit(2**31 - 1)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            found, rows = reader.fieldnames or [], list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} can't be read as csv in UTF-8: {error}") from error
    finally:
        csv.field_size_limit(limit)
    for column in columns:
        if column not in found:
            listed = ", ".join(" ".join(name[:30].split()) for name in found)
            raise ValueError(f"{path} has no column {column!r}; its columns: {listed}")
    return path, rows


def _scores_of(rows: list[dict[str, str]], path: Path, column: str) -> list[float]:
    scores = []
    for number, row in enumerate(rows, start=2):
        try:
            scores.append(float(row[column]))
        except (TypeError, ValueError):
            raise ValueError(f"{path}, line {number}: {row[column]!r} is no number") from None
    if not np.isfinite(scores).all():
        raise ValueError(f"{path} holds NaN or inf scores")
    return scores


def _cache_folder(folder: str | os.PathLike[str] | None) -> Path:
    if folder is not None:
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "st_linear" / "teacher_scores"


def _fingerprint(pairs: list[tuple[str, str]], teacher: CrossEncoder | SentenceTransformer, activation: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for text in (activation, *_settings_of(teacher), *(text for pair in pairs for text in pair)):
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    for name, tensor in sorted(teacher.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _settings_of(teacher: CrossEncoder | SentenceTransformer) -> Iterator[str]:
    """What its scores depend on beside its weights."""
    yield str(teacher.max_seq_length)
    if isinstance(teacher, SentenceTransformer):
        yield repr((teacher.prompts, teacher.default_prompt_name, teacher.truncate_dim))
        for module in teacher:
            yield repr((type(module), module.get_config_dict() if isinstance(module, Module) else None))
