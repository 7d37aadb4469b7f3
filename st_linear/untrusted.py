"""Loading folders that nobody vouches for: no code from elsewhere, no memory that their files don't hold, one-line
errors.

Sentence Transformers and transformers build what a model's files describe. :func:`guarded` watches them while they do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from sentence_transformers.base.modules import Transformer
from sentence_transformers.base.modules.transformer import set_temporary_class_attrs
from sentence_transformers.util import load_file_path
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedConfig, PreTrainedModel

from st_linear.checkpoints import refuse_misshapen_weights, refuse_missing_weights

# What a model's own files may say of how transformers loads it. Who loads it may say more.
_MODEL_KWARGS = {
    "attn_implementation",
    "add_pooling_layer",
    "cache_dir",
    "dtype",
    "ignore_mismatched_sizes",
    "local_files_only",
    "low_cpu_mem_usage",
    "output_loading_info",
    "revision",
    "subfolder",
    "token",
    "torch_dtype",
    "trust_remote_code",
    "use_safetensors",
}

LOADING_INFO = "_loading_info"
"""Attribute of a ``Transformer`` that looks itself at what transformers tells of a load."""

_MOST_JSON = 64 * 2**20
# Tensors that may be made, on the meta device too: encoders of Sentence Transformers have some hundreds.
_MOST_TENSORS = 25_000
# Bytes of tensors that may be made beside those that the files hold: random features, longer position tables, buffers.
_SLACK = 2**28
# Half precision becomes single precision, and transformers makes a tensor twice where a file has another shape.
_TIMES_THE_FILES = 8
# Smaller ones can't add up to much, as their number is limited.
_BIG = 2**16


@contextmanager
def guarded(path: str, model_kwargs: Collection[str] = (), **hub_kwargs: Any) -> Iterator[None]:
    """Watch what Sentence Transformers loads from ``path``, in other threads too.

    Args:
        path: Folder or hub id.
        model_kwargs: Names of what the caller says himself of how transformers shall load it.
        **hub_kwargs: As for :func:`~sentence_transformers.util.load_file_path`.

    Raises:
        ValueError: If an encoder lacks weights, or the files ask for code from the hub, or for much more memory than
            they hold; or for whatever else they can't be loaded; always in one line.
    """
    load = Transformer._load_model

    def checked(
        self: Transformer, name: str, task: Any, config: PreTrainedConfig, backend: str, peft: bool, **kwargs: Any
    ) -> PreTrainedModel:
        refuse_kernels(name, config)
        _refuse_requests(name, kwargs, model_kwargs)
        # Adapters of peft and exported models have loaders of their own; LinearTransformer looks itself.
        if backend != "torch" or peft or hasattr(self, LOADING_INFO):
            return load(self, name, task, config, backend, peft, **kwargs)
        # transformers' own error on misshapen tensors names neither the tensor nor its shape.
        kwargs |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
        loaded: Any = load(self, name, task, config, backend, peft, **kwargs)
        if not isinstance(loaded, tuple):
            return loaded
        model, info = loaded
        refuse_misshapen_weights(name, info["mismatched_keys"])
        refuse_missing_weights(name, info["missing_keys"])
        return model

    bound = _NoMoreThanFiles(path, lambda: sum(file.stat().st_size for file in _files(path, **hub_kwargs)))
    with _in_one_line(path), set_temporary_class_attrs(Transformer, _load_model=checked), bound:
        yield


def refuse_kernels(where: str, config: PreTrainedConfig) -> None:
    """Raise a ValueError if a config names an attention implementation that is code on the hub."""
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        implementation = getattr(part, "_attn_implementation", None)
        for name in implementation.values() if isinstance(implementation, dict) else [implementation]:
            _refuse_kernel(where, name)


def refuse_bad_weights(where: str, model: nn.Module, **hub_kwargs: Any) -> None:
    """Raise a ValueError if a weight of a loaded model is NaN or infinite, or its file holds no floats.

    transformers would make floats of integers, and leave out the imaginary part of complex numbers.
    """
    quantised = any(getattr(module, "is_quantized", False) for module in model.modules())
    for file in () if quantised else _files(where, "*.safetensors", **hub_kwargs):
        with safe_open(file, framework="pt") as stored:
            names = [name for name in stored.keys() if name.endswith((".weight", ".bias"))]  # noqa: SIM118
            for name in names:
                if (dtype := stored.get_slice(name).get_dtype()).startswith(("I", "U", "BOOL", "C")):
                    raise ValueError(f"{file}: {name} holds {dtype}, no floating-point numbers")
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all():
            raise ValueError(f"{where}: {name} holds NaN or infinite values")


def refuse_bombs(folder: str) -> None:
    """Raise a ValueError if a JSON file of a folder is larger than any that a model needs."""
    for file in _files(folder, "*.json"):
        if file.stat().st_size > _MOST_JSON:
            size = file.stat().st_size / 2**20
            raise ValueError(
                f"{file} has {size:,.0f} MiB, more than the {_MOST_JSON // 2**20} that st_linear.load reads"
            )


def _refuse_requests(where: str, kwargs: dict[str, Any], own: Collection[str]) -> None:
    for name in kwargs.keys() - _MODEL_KWARGS - set(own):
        raise ValueError(
            f"{where}: its files ask for {name}={kwargs[name]!r}, which st_linear.load takes from its caller alone "
            "(model_kwargs)"
        )
    if "attn_implementation" not in own:
        _refuse_kernel(where, kwargs.get("attn_implementation"))


def _refuse_kernel(where: str, implementation: Any) -> None:
    if isinstance(implementation, str) and "/" in implementation:
        raise ValueError(
            f"{where}: its files name the attention implementation {implementation!r}, code from the hub, which "
            "st_linear.load does not run"
        )


class _NoMoreThanFiles(TorchDispatchMode):
    """Refuses tensors for which the files of a model give no reason, before memory is taken for them.

    Args:
        where: What is loaded.
        files: Gives the bytes of its files, which may be there only when they have been read.
    """

    def __init__(self, where: str, files: Callable[[], int]) -> None:
        super().__init__()
        self.where = where
        self.files = files
        self.tensors = 0
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Views and changes in place take no memory.
        if not any(returned.alias_info for returned in func._schema.returns):
            self._count(func, args, kwargs)
        return func(*args, **kwargs)

    def _count(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not tensors:
            self.tensors += 1
            if self.tensors > _MOST_TENSORS:
                raise ValueError(f"{self.where} asks for more than {_MOST_TENSORS:,} tensors")
        numbers = [leaf for leaf in leaves if isinstance(leaf, int) and leaf > 0]
        device = kwargs.get("device") or (tensors[0].device if tensors else None)
        if (device is not None and torch.device(device).type == "meta") or (
            math.prod(numbers) < _BIG and all(tensor.numel() < _BIG for tensor in tensors)
        ):
            return
        planned = _planned(func, args, kwargs)
        self.bytes += sum(leaf.numel() * leaf.itemsize for leaf in tree_leaves(planned) if isinstance(leaf, Tensor))
        if self.bytes > _SLACK and self.bytes > _SLACK + _TIMES_THE_FILES * (held := self.files()):
            raise ValueError(
                f"{self.where} asks for {self.bytes / 2**20:,.0f} MiB of memory, its files hold {held / 2**20:,.1f}"
            )


def _planned(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What an operation would return, without its memory; None where that hangs on values."""
    args, kwargs = tree_map(_on_meta, (args, kwargs))
    names = {argument.name for argument in func._schema.arguments}
    try:
        return func(*args, **kwargs, **({"device": "meta"} if "device" in names and "device" not in kwargs else {}))
    except Exception:
        return None


def _on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, torch.Generator):
        return None
    return torch.device("meta") if isinstance(value, torch.device) else value


def _files(path: str, pattern: str = "*", **hub_kwargs: Any) -> list[Path]:
    """Files of a folder, or those of a hub model that are in the cache."""
    folder = Path(path)
    if not folder.is_dir():
        found = load_file_path(path, "config.json", **hub_kwargs)
        if found is None:
            return []
        folder = Path(found).parent
    return [file for file in folder.rglob(pattern) if file.is_file()]


@contextmanager
def _in_one_line(path: str) -> Iterator[None]:
    """Errors of a line, and of kinds that a caller can expect, whatever the libraries raise at damaged files."""
    try:
        yield
    except (OSError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except ValueError as error:
        message = str(error)
        if "\n" not in message:
            raise
        raise ValueError(f"{path} can't be loaded: {' '.join(message.split())}") from error
    except Exception as error:
        raise ValueError(f"{path} can't be loaded: {_told(error)}") from error
    except BaseException as error:
        # What Rust's libraries raise where they give up is no Exception.
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{path} can't be loaded: {_told(error)}") from error


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
