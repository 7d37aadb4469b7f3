"""Convert a model: short texts keep their vectors, and a long text is read in one piece.

Run it with ``python examples/convert_and_compare.py``. It needs no network: the model is the all-MiniLM-L6-v2 of the
quickstart extra, the texts are those of the bundled sample.
"""

from __future__ import annotations

import torch
from sentence_transformers.util import cos_sim

from st_linear import convert, load
from st_linear.data import load_pairs, token_counts, training_sentences
from st_linear.recipe import packaged_base


def main() -> None:
    """Compare the original, its linear conversion, and its softmax conversion of the same length."""
    base = packaged_base()
    original = load(base)
    linear = convert(base, feature_map="favor", window=64, max_seq_length=2048)
    softmax = convert(base, feature_map="softmax", max_seq_length=2048)

    sentences = training_sentences(load_pairs("sample", "test"))
    short = sentences[:64]
    difference = abs(original.encode(short) - linear.encode(short)).max()
    print(f"{len(short)} short texts of {max(token_counts(short, linear.tokenizer))} tokens at most")
    print(f"  largest difference of any number in their vectors: {difference:.1e}")

    # Two documents that differ in their last sentence alone.
    document = " ".join(sentences[:80])
    changed = " ".join([*sentences[:79], "None of this has anything to do with the price of copper. " * 8])
    print(f"\nTwo documents of {token_counts([document, changed], linear.tokenizer)} tokens that differ at the end")
    for name, model in (("original", original), ("linear", linear)):
        first, second = model.encode([document, changed], convert_to_tensor=True)
        similarity = cos_sim(first, second).item()
        print(f"  {name:8} reads {model.max_seq_length:5,} tokens; cosine of the two: {similarity:.4f}")

    # How near the untrained far part comes to exact attention; attention_transfer.py brings it nearer.
    exact, approximate = (model.encode(document, convert_to_tensor=True) for model in (softmax, linear))
    print("\nThe same document with softmax attention at this length, quadratic in time")
    print(f"  cosine of the linear model's vector with it: {cos_sim(exact, approximate).item():.4f}")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
