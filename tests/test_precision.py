"""Whole encoders in every number format: ``pytest -m slow tests/test_precision.py``.

The measure is the same encoder in the same format with attention in its plain O(T²) form: what that loses against
float64, ours may lose a few times. Softmax would be no measure for maps with a kink, whose gradients jump.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from st_linear import LinearTransformer, conversion, feature_map_names
from st_linear.attention import linear_attention_reference, near_far_attention_reference

MAPS = [name for name in feature_map_names() if name != "softmax"]
FORMS = list(product(MAPS, (0, 64)))
LENGTHS = (1, 65, 200, 1024, 8192)
PRECISIONS = ("float32", "bfloat16", "float16", "autocast")
LONGEST_OF_PLAIN = 1024
"""Beyond it the plain form takes too long: embeddings of longer texts are measured by its error there."""
MORE_THAN_PLAIN = 3
"""How many times the plain form's error: of token embeddings, and of gradients, each as a whole."""
TOLERANCES = {"float32": (1e-5, 1e-4)}
"""Of attention itself, and always allowed: where a product rounds to the other side of ReLU's kink its gradient jumps,
and what the plain form loses says little of that."""

pytestmark = pytest.mark.slow


def make(base: str, feature_map: str, window: int, scale: float = 1.0) -> LinearTransformer:
    """Weights of the base, but queries and keys ``scale`` times as large together."""
    encoder = LinearTransformer(base, feature_map=feature_map, window=window, max_seq_length=8192, adapter="none")
    for name, parameter in encoder.named_parameters():
        if ".query." in name or ".key." in name:
            parameter.data *= scale**0.5
    encoder.requires_grad_(True)
    return encoder.eval()


def batches(length: int) -> Iterator[dict[str, Any]]:
    """A text of so many tokens, alone and beside a short one."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(5, 45, (2, length), generator=generator)
    yield {"input_ids": ids[:1], "attention_mask": torch.ones(1, length, dtype=torch.long)}
    if 2 < length <= 512:
        mask = torch.ones(2, length, dtype=torch.long)
        mask[1, length // 2 :] = 0
        yield {"input_ids": ids, "attention_mask": mask}


@contextmanager
def in_precision(encoder: nn.Module, precision: str) -> Iterator[None]:
    if precision != "autocast":
        encoder.to(getattr(torch, precision))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
        yield


def outcome(encoder: LinearTransformer, features: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Token embeddings, and gradients of all parameters, each as one vector in float64."""
    encoder.zero_grad()
    output = encoder(dict(features))
    tokens = output["token_embeddings"][features["attention_mask"].bool()]
    direction = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (tokens.double() * direction).sum().backward()
    # What a text within the window has no use for has none.
    gradients = [(torch.zeros_like(p) if p.grad is None else p.grad).double().flatten() for p in encoder.parameters()]
    return tokens.detach().double().flatten(), torch.cat(gradients)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Within it, converted encoders attend by the definitions."""

    def plain(reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def attend(*args: Any, cu_seqlens: Tensor | None = None, dropout_p: float = 0.0, **kwargs: Any) -> Tensor:
            assert cu_seqlens is None
            assert not dropout_p
            return reference(*args, **kwargs).to(args[0].dtype)

        return attend

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "linear_attention", plain(linear_attention_reference))
        patch.setattr(conversion, "near_far_attention", plain(near_far_attention_reference))
        yield


def in_format(base: str, form: tuple[str, int], precision: str, features: dict[str, Any]) -> tuple[Tensor, Tensor]:
    encoder = make(base, *form)
    with in_precision(encoder, precision):
        found = outcome(encoder, features)
    assert all(part.isfinite().all() for part in found)
    return found


def distances(actual: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> list[float]:
    """Relative errors of embeddings and of gradients."""
    return [float((a - e).norm() / e.norm()) for a, e in zip(actual, exact)]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_little_more_is_lost_than_by_the_plain_form(form: tuple[str, int], bert: str) -> None:
    lost: dict[str, list[float]] = {}
    for length in LENGTHS:
        for features in batches(length):
            plain = length <= LONGEST_OF_PLAIN
            with plain_attention() if plain else nullcontext():
                exact = outcome(make(bert, *form).double(), features)
                if plain:
                    lost = {p: distances(in_format(bert, form, p, features), exact) for p in PRECISIONS}
            for precision in PRECISIONS:
                ours = distances(in_format(bert, form, precision, features), exact)
                bars = zip(lost[precision], TOLERANCES.get(precision, (0, 0)))
                compared = list(zip(ours, bars))[: 2 if plain else 1]
                assert all(a <= max(MORE_THAN_PLAIN * b, tolerance) for a, (b, tolerance) in compared), (
                    precision,
                    length,
                    ours,
                    lost[precision],
                )


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("feature_map", "window"), FORMS)
def test_large_activations_stay_finite(feature_map: str, window: int, precision: str, bert: str) -> None:
    for length in (1, 65, 512):
        for features in batches(length):
            encoder = make(bert, feature_map, window, scale=100)
            with in_precision(encoder, precision):
                assert all(part.isfinite().all() for part in outcome(encoder, features))


@pytest.mark.parametrize(("feature_map", "window"), FORMS)
def test_gradient_checkpointing_changes_nothing(feature_map: str, window: int, bert: str) -> None:
    for precision, features in product(("float32", "autocast"), batches(129)):
        found = []
        for checkpointing in (False, True):
            encoder = make(bert, feature_map, window)
            for module in encoder.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
            encoder.model.config.attention_probs_dropout_prob = 0.0
            if checkpointing:
                encoder.model.activation_checkpointing_enable()
            encoder.train()
            with in_precision(encoder, precision):
                found.append(outcome(encoder, features))
        torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("feature_map", "window"), FORMS)
def test_compiled_encoders_are_the_same(feature_map: str, window: int, bert: str) -> None:
    torch.compiler.reset()
    encoder = make(bert, feature_map, window)
    expected = {length: [outcome(encoder, features) for features in batches(length)] for length in (65, 200)}
    encoder.model.compile(dynamic=True)
    for length, outcomes in expected.items():
        for features, before in zip(batches(length), outcomes):
            for actual, exact in zip(outcome(encoder, features), before):
                assert (actual - exact).norm() <= 1e-5 * exact.norm()
