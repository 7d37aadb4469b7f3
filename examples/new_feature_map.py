"""Write a feature map: register it, check it against the reference, use it in a model.

Run it with ``python examples/new_feature_map.py``. The model is the all-MiniLM-L6-v2 of the quickstart extra, the
texts are those of the bundled sample; the model goes to ``new_feature_map/`` in the current folder.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from sentence_transformers.util import cos_sim
from torch import Tensor, nn

import st_linear
from st_linear import linear_attention, make_feature_map, near_far_attention, register_feature_map
from st_linear.attention import linear_attention_reference, near_far_attention_reference
from st_linear.data import load_pairs, token_counts, training_sentences
from st_linear.feature_maps import ExponentialFeatureMap
from st_linear.recipe import packaged_base


@register_feature_map("axes")
class Axes(ExponentialFeatureMap):
    """``φ(x) = [exp(a∗x), exp(-a∗x)]``, one learned factor a per head and axis; R = 2·D.

    A ``hedgehog`` whose matrix is diagonal. The base class keeps the exponentials from overflowing.

    Args:
        start: The value that the factors start at.
    """

    def __init__(self, num_heads: int, head_dim: int, *, seed: int = 0, start: float = 1.0) -> None:
        super().__init__(num_heads, head_dim, seed=seed)
        self.num_features = 2 * head_dim
        self.factor = nn.Parameter(torch.full((num_heads, 1, head_dim), float(start)))

    def query_logits(self, query: Tensor) -> Tensor:
        logits = query * self.factor.to(query.dtype)
        return torch.cat([logits, -logits], dim=-1)

    def key_logits(self, key: Tensor) -> Tensor:
        return self.query_logits(key)


def check_against_the_reference() -> None:
    """The fast forms equal their definitions, and padding changes nothing."""
    torch.manual_seed(0)
    feature_map = make_feature_map("axes", num_heads=3, head_dim=8, start=0.5)
    query, key, value = torch.randn(3, 2, 3, 21, 8, dtype=torch.float64)
    mask = torch.ones(2, 21)
    mask[0, 13:] = 0
    forms: list[tuple[Callable[..., Tensor], Callable[..., Tensor], dict[str, int]]] = [
        (linear_attention, linear_attention_reference, {}),
        (near_far_attention, near_far_attention_reference, {"window": 4}),
    ]
    for attend, reference, options in forms:
        output = attend(query, key, value, mask, feature_map=feature_map, **options)
        expected = reference(query, key, value, mask, feature_map=feature_map, **options)
        torch.testing.assert_close(output, expected)
        alone = attend(query[:1, :, :13], key[:1, :, :13], value[:1, :, :13], feature_map=feature_map, **options)
        torch.testing.assert_close(output[:1, :, :13], alone)
        print(f"  {attend.__name__:20} largest difference from its reference: {(output - expected).abs().max():.1e}")


def main() -> None:
    """Check the map, then compare it with others in a model."""
    print(f"Feature maps: {', '.join(st_linear.feature_map_names())}")
    check_against_the_reference()

    base = packaged_base()
    text = " ".join(training_sentences(load_pairs("sample", "test"))[:32])
    softmax = st_linear.convert(base, feature_map="softmax", max_seq_length=512)
    expected = softmax.encode(text, convert_to_tensor=True)
    print(f"\nA text of {token_counts([text], softmax.tokenizer)[0]} tokens; cosine with the softmax model's vector")
    for name, options in (("axes", None), ("axes", {"start": 2.0}), ("hedgehog", None), ("favor", None)):
        model = st_linear.convert(base, feature_map=name, feature_map_kwargs=options, window=32, max_seq_length=512)
        vector = model.encode(text, convert_to_tensor=True)
        print(f"  {name:8} {options or ''!s:16} untrained: {cos_sim(vector, expected).item():.4f}")

    # The saved model names the map: whoever loads it imports the module that registers it.
    model = st_linear.convert(base, feature_map="axes", feature_map_kwargs={"start": 2.0}, max_seq_length=512)
    model.save_pretrained("new_feature_map")
    print(f"\nSaved and loaded again: {st_linear.load('new_feature_map')[0].feature_map}")


if __name__ == "__main__":
    main()
