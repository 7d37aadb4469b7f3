"""Train an adapter: maps-only attention transfer brings long texts close to the softmax model's vectors.

Run it with ``python examples/attention_transfer.py``. The base model is the all-MiniLM-L6-v2 of the quickstart extra,
the texts are sentences of the bundled sample, joined; the adapter goes to ``attention_transfer/`` in the current
folder. The steps are few and the learning rate is high, so that it takes less than a minute.
"""

from __future__ import annotations

import random

from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.util import pairwise_cos_sim
from transformers import set_seed

from st_linear import AttentionTransferLoss, convert
from st_linear.data import load_pairs, token_counts, training_sentences
from st_linear.recipe import packaged_base

FOLDER = "attention_transfer"
SETTINGS = {"feature_map": "hedgehog", "window": 32, "max_seq_length": 512}
STEPS = 12


def joined(sentences: list[str], count: int, sentences_each: int) -> list[str]:
    """Texts of some sentences each, drawn without order."""
    draw = random.Random(0)
    return [" ".join(draw.sample(sentences, sentences_each)) for _ in range(count)]


def fidelity(model: SentenceTransformer, softmax: SentenceTransformer, texts: list[str]) -> float:
    """Mean cosine of the model's vectors with the softmax model's."""
    return pairwise_cos_sim(model.encode(texts), softmax.encode(texts)).mean().item()


def main() -> None:
    """Convert, measure, transfer, measure again, and put the adapter on a fresh conversion."""
    set_seed(0)
    base = packaged_base()
    softmax = convert(base, feature_map="softmax", max_seq_length=SETTINGS["max_seq_length"])
    model = convert(base, **SETTINGS)

    seen = joined(training_sentences(load_pairs("sample", "train")), count=4 * STEPS, sentences_each=16)
    unseen_sentences = training_sentences(load_pairs("sample", "test"))
    unseen = joined(unseen_sentences, count=8, sentences_each=32)
    counts = token_counts(unseen, model.tokenizer)
    print(f"Trained on {len(seen)} texts, measured on {len(unseen)} others of {min(counts)}–{max(counts)} tokens")
    print("Cosine with the softmax model's vectors")
    print(f"  untrained: {fidelity(model, softmax, unseen):.4f}")

    loss = AttentionTransferLoss(model, train="maps")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=f"{FOLDER}/trainer",
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=1e-1,
        warmup_steps=0.1,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    dataset = Dataset.from_dict({"text": seen})
    SentenceTransformerTrainer(model=model, args=arguments, train_dataset=dataset, loss=loss).train()
    model.requires_grad_(True)
    print(f"  after {STEPS} steps on {trained:,} numbers, the encoder frozen: {fidelity(model, softmax, unseen):.4f}")

    model.save_pretrained(FOLDER)
    adapted = convert(base, adapter=FOLDER, **SETTINGS)
    short = unseen_sentences[:32]
    print(f"  the adapter on a fresh conversion: {fidelity(adapted, softmax, unseen):.4f}")
    print(f"  short texts, as ever: {fidelity(adapted, softmax, short):.4f}")


if __name__ == "__main__":
    main()
