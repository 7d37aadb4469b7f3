"""Distil a CrossEncoder into a converted model with the ordinary SentenceTransformerTrainer.

Run it with ``python examples/distil_with_trainer.py``, or name a teacher, a hub id or folder of a CrossEncoder, behind
it. Without one a teacher is trained here, on few pairs and so a weak one: the last lines say what that means. The base
model is the all-MiniLM-L6-v2 of the quickstart extra, the pairs are part of the bundled sample; the files go to
``distil_with_trainer/`` in the current folder.
"""

from __future__ import annotations

import sys

from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from transformers import set_seed

from st_linear import DistillationLoss, add_teacher_scores, convert, load
from st_linear.data import load_pairs
from st_linear.evaluation import LengthSimilarityEvaluator, correlation
from st_linear.recipe import packaged_base
from st_linear.teachers import train_teacher

FOLDER = "distil_with_trainer"


def main(teacher: str | None = None) -> None:
    """Teacher, scores, student, training, evaluation, saving."""
    set_seed(0)
    base = packaged_base()
    train = load_pairs("sample", "train").select(range(64))
    dev = load_pairs("sample", "dev")

    if teacher is None:
        teacher = f"{FOLDER}/teacher"
        train_teacher(base, train, teacher, epochs=1, batch_size=16, show_progress_bar=False)

    # Each pair is scored once; a second run reads the scores from the cache.
    scored = add_teacher_scores(train, teacher, cache_folder=f"{FOLDER}/scores", show_progress_bar=False)
    print(f"{len(scored)} training pairs; labels [gold, teacher] of the first: {scored[0]['score']}")

    student = convert(base, feature_map="hedgehog", window=64)
    evaluator = LengthSimilarityEvaluator(dev["sentence1"], dev["sentence2"], dev["score"], name="dev")
    before = evaluator(student)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=f"{FOLDER}/trainer",
        num_train_epochs=1,
        per_device_train_batch_size=16,
        learning_rate=3e-5,
        warmup_steps=0.1,
        eval_strategy="steps",
        eval_steps=2,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SentenceTransformerTrainer(
        model=student,
        args=arguments,
        train_dataset=scored,
        loss=DistillationLoss(student, alpha=0.5),
        evaluator=evaluator,
    )
    trainer.train()
    after = evaluator(student)
    student.save_pretrained(f"{FOLDER}/student")

    without_gold = dev.remove_columns("score")
    taught = add_teacher_scores(without_gold, teacher, cache_folder=f"{FOLDER}/scores", show_progress_bar=False)
    figures = {
        "teacher": correlation(taught["score"], dev["score"]).pearson,
        "student, before": before["dev_pearson_cosine"],
        "student, after": after["dev_pearson_cosine"],
    }
    print("\nPearson × 100 on dev (the bundled sample, not STS-B)")
    for name, value in figures.items():
        print(f"  {name:16} {100 * value:6.2f}")
    if figures["teacher"] <= figures["student, after"]:
        print("  The teacher is no better than its student, so it teaches nothing: name a stronger one.")
    reloaded = load(f"{FOLDER}/student")
    print(f"\n{FOLDER}/student loads again: {type(reloaded[0]).__name__}, {reloaded.max_seq_length:,} tokens")


if __name__ == "__main__":
    main(*sys.argv[1:2])
