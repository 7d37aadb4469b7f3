"""Fused Triton kernels for linear attention and for its near blocks; :mod:`st_linear.attention` calls them.

They need the extra ``triton`` and a CUDA device, or Triton's interpreter on the CPU (``TRITON_INTERPRET=1``), which is
for tests: it is thousands of times slower than PyTorch. Importing this package needs neither; ``kernels.linear`` and
``kernels.near`` import triton, which reads ``TRITON_INTERPRET`` when a kernel is defined: set it before.
"""

from __future__ import annotations

import importlib.util

import torch


def take(query: torch.Tensor) -> bool:
    """Whether the kernels are there for such queries, (…, D).

    They want Triton, a CUDA device of compute capability 8.0 or above, a dtype of at most 32 bits, and D at most 128.
    They also run on the CPU in Triton's interpreter, but only whoever calls them by name wants that.
    """
    if query.device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    fits = query.dtype in (torch.float32, torch.bfloat16, torch.float16) and query.shape[-1] <= 128
    return fits and torch.cuda.get_device_capability(query.device) >= (8, 0)
