"""Memory for the large tensors of long texts: the next layer's come to lie where the last one's lay.

Blocks of 32 MiB and more glibc's allocator maps anew each time, and gives them back as soon as they are free. So the
operating system clears every page of every such tensor, when it is first touched: a sixth of an encoder's time at
32,768 tokens. But what a layer needs at once are few tensors, and the next one needs as many again, of the same sizes.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from st_linear.feed_forward import infers_on_cpu

ALWAYS_MAPPED = 2**25
"""Bytes of blocks from which on glibc maps each anew, whatever it has seen (``DEFAULT_MMAP_THRESHOLD_MAX``)."""

MIN_BYTES = ALWAYS_MAPPED
"""Of tensors whose memory is used again."""

MIN_TOKENS = 1024
"""Of batches that are worth a look at each call."""

_LEFT_OUT: ContextVar[bool] = ContextVar("st_linear_memory_left_out", default=False)


def reused_memory(model: nn.Module, input_ids: Tensor | None) -> AbstractContextManager[Any]:
    """Inside, for inference on the CPU, large outputs of linear layers and of ``new_empty`` lie in memory used before.

    It is used again once the last tensor that lies in it is gone, whoever held that, and is free when the block ends,
    or with tensors that outlive it. Such outputs can't be resized. The first time, glibc is shown that blocks below
    32 MiB are worth keeping, too.

    Args:
        model: What is called inside; one that is compiled, or in part, manages memory itself.
        input_ids: Its tokens; for few of them, or where they are not given, all is left as it is.
    """
    if input_ids is None or not infers_on_cpu(input_ids) or input_ids.numel() < MIN_TOKENS:
        return nullcontext()
    if _LEFT_OUT.get() or _is_compiled(model):
        return nullcontext()
    _raise_threshold()
    return _ReusedMemory()


@contextmanager
def left_out() -> Iterator[None]:
    """Inside, :func:`reused_memory` does nothing: for comparisons."""
    token = _LEFT_OUT.set(True)
    try:
        yield
    finally:
        _LEFT_OUT.reset(token)


def _is_compiled(model: nn.Module) -> bool:
    return any(isinstance(part, OptimizedModule) or part._compiled_call_impl is not None for part in model.modules())


@functools.cache
def _raise_threshold() -> None:
    # What is larger than any block that it mapped and saw freed glibc maps anew: this one is as large as counts.
    torch.empty(ALWAYS_MAPPED - 2**16, dtype=torch.uint8, device="cpu")


class _ReusedMemory(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        # Blocks that no tensor lies in, by their number of bytes.
        self._free: dict[int, list[np.ndarray[Any, Any]]] = defaultdict(list)

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        # Not for subclasses (quantised weights, say), nor with options, nor where autocast chooses the dtype.
        if args and type(args[0]) is Tensor and not (types or kwargs or torch.compiler.is_compiling()):
            like = args[0]
            if func is Tensor.new_empty:
                shape = args[1] if isinstance(args[1], Sequence) else args[1:]
                if self._is_large(like, shape):
                    return self._empty(shape, like.dtype)
            elif func is F.linear and like.ndim > 1 and args[1].ndim == 2 and not torch.is_autocast_enabled("cpu"):
                shape = (*like.shape[:-1], len(args[1]))
                if self._is_large(like, shape):
                    # In rows: of more dimensions, ``out`` is written in two steps, and half precision rounded in both.
                    rows = like.flatten(0, -2)
                    output = self._empty((len(rows), shape[-1]), like.dtype)
                    return func(rows, *args[1:], out=output).view(shape)
        return func(*args, **(kwargs or {}))

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        # An exception's traceback may hold on to this.
        self._free.clear()

    def _is_large(self, like: Tensor, shape: Sequence[int]) -> bool:
        plain = like.device.type == "cpu" and like.layout is torch.strided and not torch.is_grad_enabled()
        return plain and math.prod(shape) * like.element_size() >= MIN_BYTES

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        free = self._free[size]
        block = free.pop() if free else torch.empty(size, dtype=torch.uint8, device="cpu").numpy()
        # A view of its own, which the tensor's storage holds: it is gone when the last tensor on that is.
        view = block[:]
        weakref.finalize(view, _give_back, weakref.ref(self), block).atexit = False
        return torch.from_numpy(view).view(dtype).view(tuple(shape))


def _give_back(memory: weakref.ref[_ReusedMemory], block: np.ndarray[Any, Any]) -> None:
    """Call a block free, if there still is someone to use it again."""
    if (alive := memory()) is not None:
        alive._free[block.nbytes].append(block)
