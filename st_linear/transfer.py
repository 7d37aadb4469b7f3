"""Attention transfer from start to end: what ``st-linear convert --texts`` does to a converted model."""

from __future__ import annotations

import logging
import math
import random
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import DefaultBatchSampler
from torch import Tensor
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback

from st_linear.adapters import fingerprint
from st_linear.conversion import AttentionCall, LinearAttention, linear_attentions, observe_attention
from st_linear.data import evenly_spaced, passages
from st_linear.evaluation import FidelityEvaluator
from st_linear.feature_maps import FeatureMap
from st_linear.losses import AttentionTransferLoss, Target, check_choice, without_dropout
from st_linear.models import convert
from st_linear.records import as_json, digest, environment, has_bfloat16, read_json, write_json
from st_linear.transformer import LinearTransformer

logger = logging.getLogger(__name__)

FEATURE_MAP, NUM_FEATURES, WINDOW = "learned_favor", 128, 128
"""What docs/conversion.md settles on."""

EXACT_UP_TO = 512
"""Up to so many tokens softmax attention costs no more (docs/performance.md), and is what others come close to."""

# Of the text, every so many-th block of passages is held out of training.
_HELD_OUT_EVERY = 8
_HELD_OUT_TOKENS = 16_384
"""Tokens of each length's passages that fidelity is measured on, about."""

_CALIBRATION_TOKENS = 8_192
"""Tokens of the texts that maps are calibrated on, about."""

_CALIBRATION_PAIRS = 2_048
"""Pairs of these tokens that say where a head's attention looks, about."""


@dataclass(frozen=True)
class TransferSettings:
    """What an attention transfer costs, and what it aims at.

    Attributes:
        steps: Steps of training, at most.
        lengths: Passages of these many tokens are trained on in turn, and held out to measure fidelity on.
        tokens_per_step: Tokens of a step's passages, about.
        learning_rate: Peak of a cosine schedule with 5 % warm-up; gradients are clipped at a norm of 0.5.
        target: ``"hidden"`` or ``"attention"``, as in :class:`~st_linear.losses.AttentionTransferLoss`.
        pooled: Weight of the embeddings' cosine in the ``"hidden"`` target.
        evaluations: Measurements on the way.
        patience: Measurements without a gain after which training ends.
        half: Train under bfloat16 autocast; None = where the device has instructions for it.
        seed: Of everything random.
    """

    steps: int = 250
    lengths: tuple[int, ...] = (1024, 2048, 4096)
    tokens_per_step: int = 4096
    learning_rate: float = 1e-2
    target: Target = "hidden"
    pooled: float = 10.0
    evaluations: int = 5
    patience: int = 2
    half: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("target", self.target, Target)
        if not self.lengths:
            raise ValueError("lengths is empty: name at least one")
        for name in ("steps", "tokens_per_step", "learning_rate", "evaluations", "patience"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")


def transfer(
    model: SentenceTransformer,
    texts: Mapping[str, str],
    folder: Path,
    *,
    settings: TransferSettings | None = None,
    show_progress_bar: bool = True,
) -> dict[str, Any]:
    """Train a converted model's linear attention to be like softmax attention; the encoder stays as it is.

    The maps start where attention looks (:meth:`~st_linear.feature_maps.FeatureMap.calibrate`), learn on passages of
    the texts, and end as they were when passages held out fared best. Call it again after a crash, with the same
    arguments: it goes on at the last measurement.

    Args:
        model: From :func:`~st_linear.models.convert`, fresh.
        texts: Plain texts by name.
        folder: Where checkpoints lie, new or of the same training. Remove it once the model is saved.
        settings: Budget and aims.
        show_progress_bar: Show progress.

    Returns:
        The record, which the model keeps and saves in its adapter.json: settings, texts, fidelity by length before
        and after on passages held out, steps, the step that this run went on at, its seconds, environment.

    Raises:
        ValueError: If the model has nothing to train, the texts are too short, or the folder holds something else.
    """
    settings = settings or TransferSettings()
    encoder: LinearTransformer = model[0]  # type: ignore[assignment]
    _check_lengths(settings, encoder, model.max_seq_length)
    training, held_out = _passages(texts, model, settings.lengths)
    asked = {
        "settings": asdict(settings),
        "encoder": encoder.get_config_dict(),
        "fingerprint": fingerprint(encoder.model),
        "texts": digest(training),
    }
    _keep_checkpoints_of(folder, as_json(asked))
    learns = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    loss = AttentionTransferLoss(
        model, target=settings.target, pooled=settings.pooled if settings.target == "hidden" else 0.0
    )
    try:
        fidelity = FidelityEvaluator(held_out, _softmax_twin(model))
        before = _figures(fidelity, model)
        calibrate(encoder, training[max(training)], seed=settings.seed)
        started = time.perf_counter()
        resumed_at, steps = _train(model, loss, fidelity, training, folder, settings, show_progress_bar)
        seconds = time.perf_counter() - started
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(learns[name])
    after = _figures(fidelity, model)
    for length, figures in after.items():
        if figures["cosine"] < before[length]["cosine"]:
            logger.warning("Training has not helped at %s tokens: cosine %.4f", length, figures["cosine"])
    encoder.training_record = {
        "settings": as_json(asdict(settings)),
        "texts": {name: len(text) for name, text in texts.items()},
        "passages": {str(length): len(some) for length, some in training.items()},
        "held_out": {"before": before, "after": after},
        "steps": steps,
        "resumed_at": resumed_at,
        "seconds": seconds,
        "environment": environment(),
    }
    return encoder.training_record


def cut_passages(
    texts: Mapping[str, str], model: SentenceTransformer, lengths: Sequence[int], most: int
) -> dict[int, list[str]]:
    """Passages of some texts, for :func:`check_fidelity`.

    Args:
        texts: Plain texts by name.
        model: Whose tokens count.
        lengths: Tokens of the passages, which follow each other.
        most: Passages of each length, at most, evenly spaced.

    Returns:
        The passages by length.

    Raises:
        ValueError: If a length is more than the texts have, or than the model reads.
    """
    whole = "\n".join(texts.values())
    cut = {}
    for length in lengths:
        if model.max_seq_length is not None and length > model.max_seq_length:
            raise ValueError(f"lengths must be at most max_seq_length={model.max_seq_length}, got {length}")
        cut[length] = evenly_spaced(passages(whole, model.tokenizer, length), most)
        if not cut[length]:
            raise ValueError(f"the texts come to less than one passage of {length} tokens")
    return cut


def check_fidelity(
    model: SentenceTransformer, cut: Mapping[int, Sequence[str]], *, show_progress_bar: bool = False
) -> dict[str, Any]:
    """Compare a converted model's vectors with those of the encoder as it was, on the same positions.

    Args:
        model: A converted model whose encoder was not trained.
        cut: Passages by length, of texts that it was not trained on; see :func:`cut_passages`.
        show_progress_bar: Show progress.

    Returns:
        ``figures``, by length, and ``environment``.
    """
    fidelity = FidelityEvaluator(cut, _softmax_twin(model), show_progress_bar=show_progress_bar)
    return {"figures": _figures(fidelity, model), "environment": environment()}


@torch.no_grad()
def calibrate(encoder: LinearTransformer, texts: Sequence[str], *, seed: int = 0) -> None:
    """Start each layer's feature map where softmax attention looks in some texts. Most maps have no such start.

    Args:
        encoder: Of a converted model.
        texts: Some 8,192 tokens of them are read, in random order, those whose tokens all have far ones.
        seed: Of the order, and of what the maps draw.

    Raises:
        ValueError: If no text is long enough.
    """
    if all(
        type(attention.feature_map).calibrate is FeatureMap.calibrate
        for attention in linear_attentions(encoder.model).values()
    ):
        return
    tokenizer: Any = encoder.tokenizer
    rows = tokenizer(list(texts), truncation=True, verbose=False)["input_ids"]
    least = max(3 * encoder.window, encoder.exact_up_to)
    long = [row for row in rows if len(row) > least]
    if not long:
        raise ValueError(
            f"feature_map={encoder.feature_map!r} is calibrated on texts of more than {least} tokens, and the longest "
            f"of {len(rows)} has {max(map(len, rows), default=0)}"
        )
    random.Random(seed).shuffle(long)
    read: list[list[int]] = []
    total = 0
    for row in long:
        if read and total + len(row) / 2 > _CALIBRATION_TOKENS:
            break
        read.append(row)
        total += len(row)
    generator = torch.Generator().manual_seed(seed)
    sums: dict[LinearAttention, list[Tensor]] = {}

    def see(call: AttentionCall) -> Tensor:
        if call.is_linear():
            attention = call.linear_attention
            query, key = (x[0].float().cpu() * call.scale**0.5 for x in (call.query, call.key))
            count = math.ceil(_CALIBRATION_PAIRS * query.shape[1] / total)
            sums.setdefault(attention, []).append(_attended_sums(query, key, count, attention.window, generator))
        return call.softmax()

    with without_dropout(encoder), observe_attention(see):
        for row in read:
            inputs = torch.tensor([row], device=encoder.model.device)
            encoder({"input_ids": inputs, "attention_mask": torch.ones_like(inputs)})
    for attention, some in sums.items():
        feature_map: Any = attention.feature_map
        feature_map.calibrate(torch.cat(some, dim=1), generator)


def _attended_sums(query: Tensor, key: Tensor, count: int, window: int, generator: torch.Generator) -> Tensor:
    """``q_i + k_j`` of pairs of far tokens of a text, i drawn evenly and j as attention picks it: (H, count, D)."""
    length = query.shape[1]
    block = torch.arange(length) // max(window, 1)
    sums = []
    for q, k in zip(query, key):
        rows = torch.randint(length, (count,), generator=generator)
        near = (block[rows, None] - block).abs() <= 1 if window else torch.zeros((), dtype=torch.bool)
        weights = (q[rows] @ k.T).masked_fill(near, -math.inf).softmax(dim=-1)
        sums.append(q[rows] + k[weights.multinomial(1, generator=generator)[:, 0]])
    return torch.stack(sums)


def _train(
    model: SentenceTransformer,
    loss: AttentionTransferLoss,
    fidelity: FidelityEvaluator,
    training: Mapping[int, list[str]],
    folder: Path,
    settings: TransferSettings,
    show_progress_bar: bool,
) -> tuple[int, int]:
    """Train, and return the step that it began at and the one that it ended at."""
    every = math.ceil(settings.steps / settings.evaluations)
    texts = [text for some in training.values() for text in some]
    groups = _batches(training, settings.tokens_per_step)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        batch_sampler=partial(_PassageBatches, groups),
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        adam_beta2=0.99,
        weight_decay=0.0,
        max_grad_norm=0.5,
        use_cpu=model.device.type == "cpu",
        bf16=has_bfloat16(model.device) if settings.half is None else settings.half,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model=f"eval_{fidelity.primary_metric}",
        greater_is_better=True,
        restore_callback_states_from_checkpoint=True,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=not show_progress_bar,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=settings.seed,
    )
    trainer = SentenceTransformerTrainer(
        model=model,
        args=on_one_device(arguments),
        train_dataset=Dataset.from_dict({"text": texts}),
        loss=loss,
        evaluator=fidelity,
        callbacks=[EarlyStoppingCallback(settings.patience)],
    )
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    if show_progress_bar:
        trainer.add_callback(_Bar(fidelity))
    checkpoint = _last_whole_checkpoint(folder)
    if checkpoint is not None:
        logger.warning("Going on from %s", checkpoint)
    run_trainer(trainer, checkpoint)
    return 0 if checkpoint is None else _step_of(checkpoint), trainer.state.global_step


def on_one_device(arguments: SentenceTransformerTrainingArguments) -> SentenceTransformerTrainingArguments:
    """The same, with no more than one GPU for a process: several would be DataParallel, which takes packed texts
    apart."""
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def run_trainer(trainer: SentenceTransformerTrainer, checkpoint: Path | None = None) -> None:
    """Train, from a checkpoint on where there is one, and leave the model as it was but for its weights."""
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        # Under bfloat16 accelerate gives the model a forward method of its own, and leaves it there.
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


def _keep_checkpoints_of(folder: Path, asked: dict[str, Any]) -> None:
    """Empty the folder of checkpoints, unless they are of the same training.

    Raises:
        ValueError: If it holds anything, and was not made here.
    """
    path = folder / "asked.json"
    if folder.is_dir() and any(folder.iterdir()) and not path.is_file():
        raise ValueError(f"{folder} holds files, and no checkpoints of an attention transfer: name another folder")
    if not path.is_file() or read_json(path) != asked:
        shutil.rmtree(folder, ignore_errors=True)
        write_json(path, asked)


def _last_whole_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint whose every file was written: the Trainer's state comes last."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=_step_of, default=None)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def _softmax_twin(model: SentenceTransformer) -> SentenceTransformer:
    """The same model with exact attention: positions and length are those of the conversion."""
    encoder: LinearTransformer = model[0]  # type: ignore[assignment]
    return convert(
        model,
        feature_map="softmax",
        max_seq_length=model.max_seq_length,
        position_extension=encoder.position_extension,
    )


class _Bar(ProgressCallback):
    """The Trainer's progress bar, with fidelity in words where the Trainer prints a dictionary."""

    def __init__(self, fidelity: FidelityEvaluator) -> None:
        super().__init__()
        self.fidelity = fidelity

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and "eval_runtime" in (logs or {}):
            figures = (f"{some['cosine']:.4f} at {length:,}" for length, some in self.fidelity.results.items())
            self.training_bar.write(f"step {state.global_step}: held-out cosine {', '.join(figures)}")


class _PassageBatches(DefaultBatchSampler):
    """Batches of passages of one length, in random order."""

    def __init__(self, groups: Sequence[range], dataset: Dataset, *, seed: int = 0, **options: Any) -> None:
        super().__init__(dataset, seed=seed, **options)
        self.groups = groups

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        for index in torch.randperm(len(self.groups), generator=generator).tolist():
            yield list(self.groups[index])

    def __len__(self) -> int:
        return len(self.groups)


def _batches(training: Mapping[int, Sequence[str]], tokens: int) -> list[range]:
    """Rows of passages one length after the other, as many of each length's batches as of every other's."""
    groups: list[list[range]] = []
    start = 0
    for length, some in training.items():
        size = max(1, tokens // length)
        stop = start + len(some)
        groups.append([range(first, min(first + size, stop)) for first in range(start, stop, size)])
        start = stop
    most = max(map(len, groups))
    return [batches[index % len(batches)] for batches in groups for index in range(most)]


def _passages(
    texts: Mapping[str, str], model: SentenceTransformer, lengths: Sequence[int]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Passages to train on, and others, of no common word, to measure on: by length in tokens."""
    whole = "\n".join(texts.values())
    blocks = passages(whole, model.tokenizer, max(lengths))
    held = blocks[_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY]
    if not held:
        raise ValueError(
            f"the texts come to {len(blocks)} passages of {max(lengths)} tokens: at least {_HELD_OUT_EVERY} are needed"
        )
    rest = [block for index, block in enumerate(blocks) if index % _HELD_OUT_EVERY != _HELD_OUT_EVERY - 1]

    def cut(some: list[str], length: int) -> list[str]:
        if length == max(lengths):
            return some
        return [passage for block in some for passage in passages(block, model.tokenizer, length)]

    training = {length: cut(rest, length) for length in lengths}
    kept = {length: cut(held, length) for length in lengths}
    for length, some in kept.items():
        if not some:
            raise ValueError(f"no passage of {length} tokens is in those of {max(lengths)}: choose other lengths")
    return training, {length: evenly_spaced(some, max(1, _HELD_OUT_TOKENS // length)) for length, some in kept.items()}


def _check_lengths(settings: TransferSettings, encoder: LinearTransformer, max_seq_length: int | None) -> None:
    # A passage may be shorter than its length by most of a word, and must still be longer than three windows.
    least = 4 * encoder.window
    for length in settings.lengths:
        if length < least:
            raise ValueError(f"lengths must be at least four windows, {least} tokens, got {length}")
        if length < encoder.exact_up_to + encoder.window:
            raise ValueError(
                f"lengths must be longer than exact_up_to={encoder.exact_up_to} by a window, got {length}: attention "
                "is exact up to there, and has nothing to learn"
            )
        if max_seq_length is not None and length > max_seq_length:
            raise ValueError(f"lengths must be at most max_seq_length={max_seq_length}, got {length}")


def _figures(fidelity: FidelityEvaluator, model: SentenceTransformer) -> dict[str, dict[str, float]]:
    fidelity(model)
    return {str(length): figures for length, figures in fidelity.results.items()}
