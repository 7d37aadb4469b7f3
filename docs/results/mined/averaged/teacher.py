"""Score files of an averaged teacher: ``python teacher.py BASE PATH OUT [TEXTS.txt …]``.

It is the mean of the CrossEncoder whose scores lie in ``PATH/teacher`` and of ``BASE``, fine-tuned here as a
bi-encoder on the same gold scores; fine-tuned weights are kept in ``OUT/bi-encoder``. The pairs in ``OUT/mined.csv``
are those of ``PATH/teacher``. With texts, a sentence a line, they are pairs mined among those instead, 3,500 of each
file, which the bi-encoder scores alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import set_seed

from st_linear import load, mine_pairs
from st_linear.recipe import Pairs, packaged_base
from st_linear.records import has_bfloat16
from st_linear.teachers import read_mined_pairs, read_teacher_scores

HALF = has_bfloat16(torch.device("cpu"))
"""Whether to compute in bfloat16; all of it runs on the CPU."""


class Regression(nn.Module):
    """Sentence Transformers' ``CosineSimilarityLoss`` on texts of like length together: padding was three fifths."""

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        columns = list(sentence_features)
        width = max(features["input_ids"].shape[1] for features in columns)
        ids, mask = (
            torch.cat([F.pad(features[name], (0, width - features[name].shape[1])) for features in columns])
            for name in ("input_ids", "attention_mask")
        )
        order = mask.sum(dim=1).argsort()
        parts = []
        for rows in order.split(16):
            longest = int(mask[rows].sum(dim=1).max())
            trimmed = {"input_ids": ids[rows, :longest], "attention_mask": mask[rows, :longest]}
            parts.append(self.model(trimmed)["sentence_embedding"])
        first, second = torch.cat(parts)[order.argsort()].float().chunk(2)
        return F.mse_loss(F.cosine_similarity(first, second), labels.float())


def fine_tuned(base: str, pairs: Pairs, folder: Path) -> SentenceTransformer:
    """The bi-encoder, two epochs, in bfloat16 where that pays; from ``folder`` if it is there."""
    if folder.is_dir():
        return SentenceTransformer(str(folder))
    set_seed(0)
    model = SentenceTransformer(base)
    model.max_seq_length = 128
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder.parent / "trainer"),
        num_train_epochs=2,
        per_device_train_batch_size=32,
        learning_rate=3e-5,
        warmup_steps=0.1,
        seed=0,
        bf16=HALF,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
    )
    columns = pairs.train.select_columns(["sentence1", "sentence2", "score"])
    SentenceTransformerTrainer(model=model, args=arguments, train_dataset=columns, loss=Regression(model)).train()
    model.save_pretrained(str(folder))
    return model


def cosines(model: SentenceTransformer, pairs: Dataset) -> np.ndarray:
    """Of the two sentences of each pair, brought into 0–1."""
    sentences = sorted({*pairs["sentence1"], *pairs["sentence2"]})
    with torch.autocast("cpu", torch.bfloat16, enabled=HALF):
        embeddings = model.encode(sentences, batch_size=64, convert_to_tensor=True).float()
    vectors = dict(zip(sentences, torch.nn.functional.normalize(embeddings, dim=1).numpy()))
    found = [float(vectors[a] @ vectors[b]) for a, b in zip(pairs["sentence1"], pairs["sentence2"])]
    return np.clip(found, 1e-4, 1 - 1e-4)


def write(path: Path, scores: np.ndarray, pairs: Dataset | None = None) -> None:
    """A score file, with its sentences if it is one of mined pairs."""
    columns = {} if pairs is None else pairs.select_columns(["sentence1", "sentence2"]).to_dict()
    columns |= {"logit": np.log(scores / (1 - scores)).round(5), "score": scores.round(6)}
    Dataset.from_dict(columns).to_csv(path)


def mined_among(texts: Path, pairs: Pairs) -> Dataset:
    """3,500 of 10,000 pairs of near sentences."""
    sentences = sorted({line.strip() for line in texts.read_text(encoding="utf-8").splitlines() if line.strip()})
    source = Dataset.from_dict({"sentence1": sentences, "sentence2": sentences})
    return mine_pairs(source, load(packaged_base()), 10_000, exclude=pairs.unseen()).select(range(3500))


def main(base: str, data: str, output: str, *texts: str) -> None:
    """Fine-tune, score, write."""
    folder, theirs, pairs = Path(output), f"{data}/teacher", Pairs.load(data)
    folder.mkdir(parents=True, exist_ok=True)
    model = fine_tuned(base, pairs, folder / "bi-encoder")
    for split, dataset in (("train", pairs.train), ("dev", pairs.dev), ("test", pairs.test)):
        cross = np.array(read_teacher_scores(theirs, split))
        write(folder / f"{split}.csv", (cosines(model, dataset) + cross) / 2)
    if texts:
        mined = concatenate_datasets([mined_among(Path(each), pairs) for each in texts])
        write(folder / "mined.csv", cosines(model, mined), mined)
    else:
        mined = read_mined_pairs(theirs)
        write(folder / "mined.csv", (cosines(model, mined) + np.array(mined["score"])) / 2, mined)


if __name__ == "__main__":
    main(*sys.argv[1:])
