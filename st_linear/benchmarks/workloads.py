"""What is measured at one length, its steps by contender; the level ``attention``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from st_linear.benchmarks.contenders import Attention, Shape, make_attention
from st_linear.benchmarks.settings import Settings
from st_linear.benchmarks.timing import Step


@dataclass(frozen=True)
class Workload:
    """One length, or one part of the level ``mixed``.

    Attributes:
        name: Unique in a run.
        tokens: Tokens in one call of a step, padding not counted.
        documents: Texts in one call.
        longest: Tokens of the longest text.
        build: Makes the steps by contender, when it is their turn.
        skipped: Contenders that do not run, with the reason.
        bytes_moved: Bytes of inputs and outputs in one call, which no contender can do without; 0 = not counted.
        about: What else the record says of it, JSON values.
    """

    name: str
    tokens: int
    documents: int
    longest: int
    build: Callable[[], dict[str, Step]]
    skipped: dict[str, str] = field(default_factory=dict)
    bytes_moved: int = 0
    about: dict[str, Any] = field(default_factory=dict)


def over_limit(settings: Settings, longest: int) -> dict[str, str]:
    """The contenders whose limit is below ``longest`` tokens, each with that as the reason."""
    return {name: f"limit of {limit} tokens" for name, limit in settings.limits.items() if longest > limit}


def attention_workloads(settings: Settings) -> Iterator[Workload]:
    """Attention alone on random q, k, v (B, H, T, D): forward, or forward and backward."""
    assert settings.heads is not None
    assert settings.head_dim is not None
    device, dtype = torch.device(settings.device), settings.torch_dtype()
    shape = Shape(settings.heads, settings.head_dim, device, dtype, settings.features, settings.seed)
    width = settings.heads * settings.head_dim
    for length in settings.lengths:
        skipped = over_limit(settings, length)
        if settings.backward:
            for name in settings.models:
                if name == "copy":
                    skipped[name] = "has no backward pass"
        yield Workload(
            name=str(length),
            tokens=settings.texts(length) * length,
            documents=settings.texts(length),
            longest=length,
            build=_attention_builder(settings, shape, length, skipped),
            skipped=skipped,
            # q, k and v are read, o is written; a backward pass has more, by formulas that differ.
            bytes_moved=0 if settings.backward else 4 * settings.texts(length) * length * width * dtype.itemsize,
        )


def _attention_builder(
    settings: Settings, shape: Shape, length: int, skipped: dict[str, str]
) -> Callable[[], dict[str, Step]]:
    def build() -> dict[str, Step]:
        generator = torch.Generator(shape.device).manual_seed(settings.seed)
        sizes = (settings.texts(length), shape.heads, length, shape.head_dim)
        query, key, value = (
            torch.randn(sizes, generator=generator, device=shape.device).to(shape.dtype) for _ in range(3)
        )
        return {
            name: _attention_step(make_attention(name, shape), query, key, value, bool(settings.backward))
            for name in settings.models
            if name not in skipped
        }

    return build


def _attention_step(attention: Attention, query: Tensor, key: Tensor, value: Tensor, backward: bool) -> Step:
    if not backward:

        def forward() -> Any:
            with torch.inference_mode(), attention.around():
                return attention.function(query, key, value)

        return forward
    inputs = [x.detach().requires_grad_() for x in (query, key, value)]
    gradient = torch.ones_like(query)

    def forward_and_backward() -> Any:
        wanted = [*inputs, *(parameter for parameter in attention.parameters if parameter.requires_grad)]
        with attention.around():
            output = attention.function(*inputs)
            # A text inside two windows leaves the map of near/far attention unused.
            gradients = torch.autograd.grad(output, wanted, gradient, allow_unused=True)
        return output, *gradients

    return forward_and_backward
