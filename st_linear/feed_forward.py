"""The feed-forward half of an encoder's layers, some tokens at a time.

It treats each token alone, and what it computes on the way is several times as wide as a token. With tens of thousands
of tokens these are tensors of hundreds of megabytes: they leave the cache before they are read, and the allocator of
the CPU maps them anew for every layer, page by page. In chunks they stay in the cache, and in memory that is there. So
does what BERT and its like compute between attention and that: a projection, a sum and a normalisation.

transformers has an option for this, ``chunk_size_feed_forward``, for numbers of tokens that the chunk divides.

Hooks inside such a module are called for each chunk, and what scales its activations by a whole tensor (dynamic int8)
scales each chunk by itself. :func:`unchunk_feed_forward` is there for who minds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

CHUNK_ELEMENTS = 2048 * 384
"""Numbers of hidden states at a time, at most: 2,048 tokens of all-MiniLM, and fewer where they are wider."""

_METHODS = ("feed_forward_chunk", "ff_chunk")
"""What transformers' layers call in chunks themselves, where ``chunk_size_feed_forward`` is set."""

_MODULES = (
    *("ModernBertMLP", "NomicBertMLP", "GteMLP", "EuroBertMLP", "JinaEmbeddingsV3MLP"),
    *(f"{name}SelfOutput" for name in ("Bert", "Roberta", "XLMRoberta", "Camembert", "Electra", "Ernie")),
)
"""Modules that have no such method, and are called with features of each token and nothing else."""


def chunk_feed_forward(model: nn.Module) -> None:
    """Have the feed-forward modules of a transformers encoder run in chunks, in place.

    So they do for inference on the CPU; for training, on other devices and in graphs that are traced, they stay whole.
    Modules that are not known to treat each token alone are left as they are.
    """
    for module in model.modules():
        own: Any = type(module)
        method = _token_wise_method(own)
        if method is not None and not isinstance(module, _InChunks):
            module.__class__ = _in_chunks(own, method)


def unchunk_feed_forward(model: nn.Module) -> None:
    """Undo :func:`chunk_feed_forward`."""
    for module in model.modules():
        own: Any = type(module)
        if issubclass(own, _InChunks):
            module.__class__ = own.whole


def infers_on_cpu(x: Tensor) -> bool:
    """Whether what comes of x is computed on the CPU, here and now, and not for gradients."""
    deferred = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not deferred and not torch.is_grad_enabled() and x.device.type == "cpu"


class _InChunks(nn.Module):
    """First base of classes that run in chunks; copies and pickles of them name the class that they stand for."""

    whole: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced = super().__reduce_ex__(protocol)
        assert isinstance(reduced, tuple)
        return _blank, (self.whole,), *reduced[2:]


def _blank(whole: Any) -> nn.Module:
    """An instance without anything in it, to which a copy's or pickle's state is given."""
    method = _token_wise_method(whole)
    chunked: type[nn.Module] = whole if method is None else _in_chunks(whole, method)
    return chunked.__new__(chunked)


def _token_wise_method(module_class: type[nn.Module]) -> str | None:
    """The method that treats each token alone, from one or two (…, d) to (…, d); None where there is none."""
    if not module_class.__module__.startswith("transformers."):
        return None
    for name in _METHODS:
        method = getattr(module_class, name, None)
        if method is not None and len(signature(method).parameters) == 2:
            return name
    return "forward" if module_class.__name__ in _MODULES else None


@cache
def _in_chunks(whole: type[nn.Module], method: str) -> type[nn.Module]:
    """A class like ``whole``, whose ``method`` goes through its tokens in chunks."""
    compute: Callable[..., Tensor] = getattr(whole, method)

    def chunked(self: nn.Module, *inputs: Tensor) -> Tensor:
        hidden = inputs[0]
        # In training dropout would draw otherwise than where checkpointing computes it again, with gradients.
        if self.training or not infers_on_cpu(hidden) or hidden.numel() <= CHUNK_ELEMENTS:
            return compute(self, *inputs)
        tokens = hidden.shape[:-1].numel()
        output: Tensor | None = None
        done = 0
        chunks = min(tokens, math.ceil(hidden.numel() / CHUNK_ELEMENTS))
        for parts in zip(*(x.flatten(0, -2)[None].chunk(chunks, dim=1) for x in inputs)):
            result = compute(self, *parts)
            # Not before the first is there: under autocast it says the dtype.
            output = result.new_empty(1, tokens, result.shape[-1]) if output is None else output
            output[:, done : done + result.shape[1]] = result
            done += result.shape[1]
        assert output is not None
        return output.view(*hidden.shape[:-1], output.shape[-1])

    attributes = {method: chunked, "whole": whole, "__module__": whole.__module__, "__qualname__": whole.__qualname__}
    return type(whole.__name__, (_InChunks, whole), attributes)
