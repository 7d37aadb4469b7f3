"""What all distillations share: training arguments, the learning curve, and checkpoints to go on from."""

from __future__ import annotations

import copy
import logging
import math
import shutil
import time
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.base.sampler import DefaultBatchSampler
from torch.utils.data import RandomSampler
from transformers import TrainerCallback

from st_linear.data import token_counts
from st_linear.losses import DistillationLoss
from st_linear.records import has_bfloat16, read_json, write_json
from st_linear.settings import Settings
from st_linear.teachers import text_columns
from st_linear.transfer import on_one_device, run_trainer

logger = logging.getLogger(__name__)

_CURVE = "curve.json"


class Curve(BaseEvaluator, TrainerCallback):
    """The learning curve: figures against steps, examples, tokens and seconds of training.

    The model is measured before the first step, whenever the Trainer evaluates, and after the last step. Seconds are
    those of training alone. Points lie in each checkpoint too, so that a training that goes on has all of them.

    Args:
        model: The student.
        measure: Gives the ``pearson`` and ``spearman`` of the student as it is.
        train: The pairs.
        batch_size: Pairs per step, of all processes together.
        drop_last: Whether the last, smaller batch of an epoch is left out.
        at: Steps after which the Trainer shall evaluate, beside those that its arguments name.
        groups: Groups of sentences to train on besides. One of K sentences counts as K / 2 pairs.
    """

    primary_metric = "pearson"

    def __init__(
        self,
        model: SentenceTransformer,
        measure: Callable[[], dict[str, Any]],
        train: Dataset,
        batch_size: int,
        *,
        drop_last: bool = False,
        at: Container[int] = (),
        groups: Dataset | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.measure = measure
        self.at = at
        self.batch_size = batch_size
        self.examples = len(train) - (len(train) % batch_size if drop_last else 0)
        self.steps = math.ceil(self.examples / batch_size)
        datasets = [train]
        if groups is not None:
            datasets.append(groups)
            self.examples += len(groups) * len(text_columns(groups)) // 2
            self.steps += math.ceil(len(groups) / _rows_per_step(groups, batch_size))
        counts = (token_counts(d[column], model.tokenizer) for d in datasets for column in text_columns(d))
        self.tokens_per_pair = 2 * sum(map(sum, counts)) / sum(len(d) * len(text_columns(d)) for d in datasets)
        self.points: list[dict[str, Any]] = []
        self.seconds = 0.0
        self.resumed = time.perf_counter()

    def restore(self, checkpoint: Path) -> None:
        """Go on with the points of a checkpoint."""
        kept = read_json(checkpoint / _CURVE)
        self.points, self.seconds = kept["points"], kept["seconds"]

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        if not self.points:
            self._measure_at(0)
        self.resumed = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.at:
            control.should_evaluate = True
        if control.should_save:
            self._stop_clock()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(folder / _CURVE, {"points": self.points, "seconds": self.seconds})
        self.resumed = time.perf_counter()

    def __call__(  # type: ignore[override]  # narrows the model, as Sentence Transformers' own evaluators do
        self, model: SentenceTransformer, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        return self._measure_at(steps)

    def on_train_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        if self.points[-1]["step"] != state.global_step and state.global_step >= state.max_steps:
            self._measure_at(state.global_step)

    def _stop_clock(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        now = time.perf_counter()
        self.seconds += now - self.resumed
        self.resumed = now

    def _measure_at(self, step: int) -> dict[str, float]:
        if step:
            self._stop_clock()
        figures = self.measure()
        if figures["undefined"]:
            raise ValueError(f"the student can't be measured on dev after {step} steps: {figures['undefined']}")
        self.resumed = time.perf_counter()
        # The last batch of an epoch is smaller: count whole epochs as such.
        epochs, rest = divmod(step, self.steps)
        examples = epochs * self.examples + min(rest * self.batch_size, self.examples)
        point = {
            "step": step,
            "examples": examples,
            "tokens": round(examples * self.tokens_per_pair),
            "seconds": self.seconds,
            "pearson": figures["pearson"],
            "spearman": figures["spearman"],
        }
        self.points.append(point)
        return {name: point[name] for name in ("pearson", "spearman")}


def reached(curve: Sequence[dict[str, Any]], target: float, unit: str) -> float | None:
    """How much of a unit it took until Pearson first was at a target, linear between the points of the curve.

    Args:
        curve: Points in the order of training.
        target: The Pearson.
        unit: What its points count: ``"step"``, ``"examples"``, ``"tokens"``, ``"seconds"``, or more that was added.

    Returns:
        The amount, that of the first point (as a rule 0) where it was there already, None where it never was.
    """
    for index, point in enumerate(curve):
        if point["pearson"] >= target:
            if index == 0:
                return float(point[unit])
            before = curve[index - 1]
            share = (target - before["pearson"]) / (point["pearson"] - before["pearson"])
            return before[unit] + share * (point[unit] - before[unit])
    return None


def _rows_per_step(dataset: Dataset, batch_size: int) -> int:
    """How many groups hold as many texts as ``batch_size`` pairs, or not many more."""
    return max(1, 2 * batch_size // len(text_columns(dataset)))


def _batches(
    dataset: Dataset, batch_size: int, generator: torch.Generator | None, **options: Any
) -> DefaultBatchSampler:
    """Sentence Transformers' own batches of pairs, and batches of groups with as many texts."""
    size = _rows_per_step(dataset, batch_size)
    order: Any = RandomSampler(dataset, generator=generator)
    return DefaultBatchSampler(order, batch_size=size, generator=generator, **options)


def training_arguments(output: Path, settings: Settings, **options: Any) -> SentenceTransformerTrainingArguments:
    """The Trainer's arguments under some settings, checkpoints in ``output/trainer``; ``options`` override them."""
    defaults: dict[str, Any] = {
        "output_dir": str(output / "trainer"),
        "per_device_train_batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate,
        "warmup_steps": 0.1,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "bf16": settings.half,
        "use_cpu": not torch.accelerator.is_available(),
        "seed": settings.seed,
    }
    if settings.half and not torch.accelerator.is_available() and not has_bfloat16():
        logger.warning("This processor has no instructions for bfloat16: training in half precision is slower here.")
    return on_one_device(SentenceTransformerTrainingArguments(**(defaults | options)))


def distil_pairs(
    curve: Curve,
    train: Dataset,
    arguments: SentenceTransformerTrainingArguments,
    settings: Settings,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    checkpoint: Path | None = None,
    groups: Dataset | None = None,
) -> None:
    """Train the curve's model on labelled pairs with :class:`~st_linear.losses.DistillationLoss`.

    Args:
        curve: Where the figures go.
        train: Columns ``sentence1``, ``sentence2`` and ``score``: the gold score, or ``[gold, teacher]``.
        arguments: Of the Trainer.
        settings: Of the loss.
        callbacks: Called before the curve.
        checkpoint: From :func:`last_whole_checkpoint`, to go on from.
        groups: Groups of sentences to train on besides, with the teacher's scores of all their pairs, without
            dropout. A step is one of pairs or of groups, with as many texts.

    Raises:
        ValueError: If there are groups, and several processes or steps in several batches.
    """
    if checkpoint is not None:
        curve.restore(checkpoint)
    loss: Any = DistillationLoss(
        curve.model,
        alpha=settings.alpha,
        head=settings.head,
        objective=settings.objective,
        teacher_activation=settings.teacher_activation,
    )
    dataset: Any = train
    if groups is not None:
        if arguments.world_size * arguments.gradient_accumulation_steps > 1:
            raise ValueError("groups are trained on by one process, a batch a step")
        dataset = DatasetDict(pairs=train, groups=groups)
        of_groups = DistillationLoss(curve.model, alpha=1, objective=settings.objective, dropout=False)
        loss = {"pairs": loss, "groups": of_groups}
        arguments = copy.copy(arguments)
        arguments.batch_sampler = _batches
    trainer = SentenceTransformerTrainer(
        model=curve.model,
        args=arguments,
        train_dataset=dataset,
        loss=loss,
        evaluator=curve,
        callbacks=[*callbacks, curve],
    )
    run_trainer(trainer, checkpoint)


def last_whole_checkpoint(folder: Path, *, clean: bool = True) -> Path | None:
    """The last checkpoint with a learning curve, which is written last.

    Args:
        folder: The Trainer's.
        clean: Remove those that were never finished: they would count among the ones that the Trainer keeps.
    """
    whole = []
    for path in folder.glob("checkpoint-*"):
        if (path / _CURVE).is_file():
            whole.append(path)
        elif clean:
            shutil.rmtree(path)
    return max(whole, key=lambda path: int(path.name.partition("-")[2]), default=None)
