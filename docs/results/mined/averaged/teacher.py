"""Score files of an averaged teacher: ``python teacher.py BASE PATH OUT [TEXTS.txt …]``.

It is the mean of the CrossEncoder whose scores lie in ``PATH/teacher`` and of ``BASE``, fine-tuned here as a
bi-encoder on the same gold scores; fine-tuned weights are kept in ``OUT/bi-encoder``. The pairs in ``OUT/mined.csv``
are those of ``PATH/teacher``. With texts, a sentence a line, they are pairs mined among those instead, 3,500 of each
file, which the bi-encoder scores alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
from transformers import set_seed

from st_linear import load, mine_pairs
from st_linear.recipe import Pairs, packaged_base
from st_linear.teachers import read_mined_pairs, read_teacher_scores


def fine_tuned(base: str, pairs: Pairs, folder: Path) -> SentenceTransformer:
    """The bi-encoder, two epochs in bfloat16; from ``folder`` if it is there."""
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
        bf16=True,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
    )
    columns = pairs.train.select_columns(["sentence1", "sentence2", "score"])
    loss = CosineSimilarityLoss(model)
    SentenceTransformerTrainer(model=model, args=arguments, train_dataset=columns, loss=loss).train()
    model.save_pretrained(str(folder))
    return model


def cosines(model: SentenceTransformer, pairs: Dataset) -> np.ndarray:
    """Of the two sentences of each pair, brought into 0–1."""
    sentences = sorted({*pairs["sentence1"], *pairs["sentence2"]})
    with torch.autocast("cpu", torch.bfloat16):
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
