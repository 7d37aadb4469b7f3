"""The form of attention that exporters trace equals the references, at any length, window and padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from st_linear.attention import (
    linear_attention_reference,
    local_attention_reference,
    near_far_attention_reference,
)
from st_linear.feature_maps import feature_map_names, make_feature_map
from st_linear.traceable import traceable_linear, traceable_local, traceable_near_far

HEADS, HEAD_DIM, WINDOW = 2, 8, 4
SCALE = HEAD_DIM**-0.5
MAPS = [name for name in feature_map_names() if name != "softmax"]
LENGTHS = (1, 4, 7, 12, 29)


def batch(length: int, size: float = 1) -> tuple[Tensor, ...]:
    """Queries, keys, values, and a mask with padding on the right; the last texts are one token, and none."""
    generator = torch.Generator().manual_seed(length)
    texts = (torch.randn(4, HEADS, length, HEAD_DIM, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = torch.arange(length) < torch.tensor([length, (length + 1) // 2, 1, 0])[:, None]
    query, key, value = texts
    return size * query, size * key, value, mask


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", MAPS)
@torch.no_grad()
def test_linear(name: str, length: int) -> None:
    *texts, mask = batch(length)
    feature_map = make_feature_map(name, HEADS, HEAD_DIM, seed=1).double()
    expected = linear_attention_reference(*texts, mask, feature_map=feature_map)
    torch.testing.assert_close(traceable_linear(*texts, mask, feature_map=feature_map, scale=SCALE), expected)


@pytest.mark.parametrize("exact_up_to", [None, 15, 40])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", MAPS)
@torch.no_grad()
def test_near_far(name: str, length: int, exact_up_to: int | None) -> None:
    *texts, mask = batch(length)
    options = {
        "feature_map": make_feature_map(name, HEADS, HEAD_DIM, seed=1).double(),
        "window": WINDOW,
        "exact_up_to": exact_up_to,
        "gain": torch.tensor([0.5, -1.0], dtype=torch.float64),
    }
    expected = near_far_attention_reference(*texts, mask, **options)
    torch.testing.assert_close(traceable_near_far(*texts, mask, scale=SCALE, **options), expected)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("radius", [1, 3, 40])
@torch.no_grad()
def test_local(radius: int, length: int) -> None:
    *texts, mask = batch(length)
    expected = local_attention_reference(*texts, mask, radius=radius)
    torch.testing.assert_close(traceable_local(*texts, mask, radius=radius, scale=SCALE), expected)


@pytest.mark.parametrize("name", ["elu", "favor", "hedgehog"])
@torch.no_grad()
def test_large_activations_in_float32(name: str) -> None:
    *texts, mask = batch(29, size=5)
    options = {"feature_map": make_feature_map(name, HEADS, HEAD_DIM, seed=1), "window": WINDOW, "gain": None}
    expected = near_far_attention_reference(*texts, mask, **options).float()
    output = traceable_near_far(*(x.float() for x in texts), mask, scale=SCALE, **options)
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-4)
