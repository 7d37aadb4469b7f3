"""Loading folders that nobody vouches for: no code from elsewhere, no memory that their files don't hold, one-line
errors.

Sentence Transformers and transformers build what a model's files describe. :func:`guarded` watches them while they do.
"""

from __future__ import annotations

import json
import math
import os
import threading
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.base.modules import Transformer
from sentence_transformers.base.modules.transformer import set_temporary_class_attrs
from sentence_transformers.util import load_file_path
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedConfig, PreTrainedModel

from st_linear.checkpoints import read_header, refuse_misshapen_weights, refuse_missing_weights
from st_linear.conversion import ATTENTION_IMPLEMENTATION

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
# Of attention implementations those that transformers brings: for FlashAttention it may go to the hub.
_ATTENTION = {None, "eager", "flex_attention", "sdpa", ATTENTION_IMPLEMENTATION}

LOADING_INFO = "_loading_info"
"""Attribute of a ``Transformer`` that looks itself at what transformers tells of a load."""

_MOST_JSON = 64 * 2**20
# Tensors that may be made, on the meta device too: encoders of Sentence Transformers have some hundreds.
_MOST_TENSORS = 25_000
# Bytes of tensors that may be made beside those that the files hold: random features, longer position tables, buffers.
_SLACK = 2**28
# Half precision becomes single precision, and transformers makes a tensor twice where a file has another shape.
_TIMES_THE_FILES = 8
# Elements of what is not worth to be foreseen.
_BIG = 2**16
# Of what transformers makes Python objects, or layers.
_MOST = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layers", "n_layer"), 10_000),
    **dict.fromkeys(("num_labels", "extra_ids"), 100_000),
}
_OUTSIDE = ("weight_map", "tokenizer_name_or_path")
_ACTIVATIONS = ("activation_fn", "sbert_ce_default_activation_function")
_CONFIGS = ("config.json", "tokenizer_config.json", "sentence_bert_config.json", "config_sentence_transformers.json")

# One load at a time, as it puts its own function in a class's place.
_LOCK = threading.RLock()


@contextmanager
def guarded(path: str, model_kwargs: Mapping[str, Any] | None = None, **hub_kwargs: Any) -> Iterator[None]:
    """Watch what Sentence Transformers loads from ``path`` in this thread.

    Args:
        path: Folder or hub id.
        model_kwargs: What the caller says himself of how transformers shall load it.
        **hub_kwargs: As for :func:`~sentence_transformers.util.load_file_path`.

    Raises:
        ValueError: If an encoder lacks weights, or the files ask for code from elsewhere, or for much more memory than
            they hold; or for whatever else they can't be loaded; always in one line.
    """
    own = dict(model_kwargs or {})
    thread = threading.get_ident()
    with _in_one_line(path), _LOCK:
        load = Transformer._load_model

        def checked(
            self: Transformer, name: str, task: Any, config: PreTrainedConfig, backend: str, peft: bool, **kwargs: Any
        ) -> PreTrainedModel:
            if threading.get_ident() != thread:
                return load(self, name, task, config, backend, peft, **kwargs)
            _refuse_requests(name, kwargs, own)
            if "attn_implementation" not in own:
                refuse_kernels(name, config)
                _refuse_kernel(name, kwargs.get("attn_implementation"))
            # Adapters of peft and exported models have loaders of their own; LinearTransformer looks itself.
            if backend != "torch" or peft or hasattr(self, LOADING_INFO):
                return load(self, name, task, config, backend, peft, **kwargs)
            # transformers' own error on misshapen tensors names neither the tensor nor its shape.
            kwargs |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
            loaded: Any = load(self, name, task, config, backend, peft, **kwargs)
            if not isinstance(loaded, tuple):
                return loaded
            model, info = loaded
            if not own.get("ignore_mismatched_sizes"):
                refuse_misshapen_weights(name, info["mismatched_keys"])
            refuse_missing_weights(name, info["missing_keys"])
            return model

        _refuse_bad_files(path, **hub_kwargs)
        bound = _NoMoreThanFiles(path, lambda: _allowed_bytes(path, **hub_kwargs))
        with set_temporary_class_attrs(Transformer, _load_model=checked), bound:
            yield


def refuse_kernels(where: str, config: PreTrainedConfig) -> None:
    """Raise a ValueError if a config names an attention implementation that may be code on the hub."""
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        _refuse_kernel(where, getattr(part, "_attn_implementation", None))


def refuse_bad_weights(where: str, model: nn.Module, **hub_kwargs: Any) -> None:
    """Raise a ValueError if a weight of a loaded model is NaN or infinite, or its file holds no floats.

    transformers would make floats of integers, and leave out the imaginary part of complex numbers.
    """
    parameters = {f".{name}" for name, _ in model.named_parameters()}
    quantised = any(getattr(module, "is_quantized", False) for module in model.modules())
    for file in () if quantised else _files(where, "*.safetensors", **hub_kwargs):
        try:
            header = read_header(file)
        except ValueError:
            # Not one that was loaded.
            continue
        for name, (number_format, _) in header.items():
            # Checkpoints of a model with a head begin their names with the encoder's.
            ends = (f".{name}", f".{name.partition('.')[2]}")
            if number_format.startswith(("I", "U", "BOOL", "C")) and any(p.endswith(ends) for p in parameters):
                raise ValueError(f"{file}: {name} holds {number_format}, no floating-point numbers")
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
            continue
        # One pass that stores nothing; NaN is both the least and the largest.
        if not all(math.isfinite(end) for end in tensor.aminmax()):
            raise ValueError(f"{where}: {name} holds NaN or infinite values")


def _refuse_bad_files(path: str, **hub_kwargs: Any) -> None:
    """Raise a ValueError at what can be seen of files before they are loaded."""
    if os.path.isdir(path):
        files = _files(path)
        for file in files:
            if file.suffix == ".json" and (size := file.stat().st_size) > _MOST_JSON:
                raise ValueError(
                    f"{file} has {size / 2**20:,.0f} MiB; a model's JSON has {_MOST_JSON // 2**20} at most"
                )
            if file.suffix == ".bin":
                _refuse_pickle_bomb(file, _allowed_bytes(path))
        configs = [str(file) for file in files if file.name in _CONFIGS or file.name.endswith(".index.json")]
    else:
        found = [load_file_path(path, name, **hub_kwargs) for name in _CONFIGS]
        configs = [file for file in found if file is not None]
    for config in configs:
        try:
            content = json.loads(Path(config).read_bytes())
        except (ValueError, RecursionError):
            # Who needs it says so.
            continue
        for key, value in _entries(content):
            _refuse_entry(config, key, value)


def _entries(content: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value of a JSON value, at whatever depth."""
    left = [content]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            yield from value.items()
        if isinstance(value, (dict, list)):
            left += value.values() if isinstance(value, dict) else value


def _refuse_entry(where: str, key: str, value: Any) -> None:
    if key in _MOST and isinstance(value, (int, float)) and value > _MOST[key]:
        raise ValueError(f"{where}: {key}={value} is more than {_MOST[key]:,}")
    if key in _OUTSIDE:
        for name in value.values() if isinstance(value, dict) else [value]:
            if isinstance(name, str) and (os.path.isabs(name) or ".." in Path(name).parts):
                raise ValueError(f"{where}: {key} names {name!r}, which lies outside the folder")
    if key in _ACTIVATIONS and isinstance(value, str) and value.startswith("torch."):
        module, _, name = value.rpartition(".")
        kind = getattr(nn, name, None)
        if not module.startswith("torch.nn") or not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise ValueError(f"{where}: {key}={value!r} is no torch.nn.Module")


def _refuse_pickle_bomb(file: Path, allowed: int) -> None:
    """Refuse a file of torch's that is compressed, or whose tensors are larger than what it stores."""
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                stored = sum(entry.file_size for entry in archive.infolist())
        else:
            stored = file.stat().st_size
        tensors = [] if stored > allowed else tree_leaves(torch.load(file, map_location="meta", weights_only=True))
    except Exception:
        # Who loads it says what is wrong with it, under the same restrictions.
        return
    needed = max(stored, sum(leaf.numel() * leaf.itemsize for leaf in tensors if isinstance(leaf, Tensor)))
    if needed > allowed:
        raise ValueError(f"{file} unfolds to {needed / 2**20:,.0f} MiB, its folder holds much less")


def _refuse_requests(where: str, kwargs: dict[str, Any], own: Collection[str]) -> None:
    for name in kwargs.keys() - _MODEL_KWARGS - set(own):
        raise ValueError(
            f"{where}: its files ask for {name}={kwargs[name]!r}, which st_linear.load takes from its caller alone "
            "(model_kwargs)"
        )


def _refuse_kernel(where: str, implementation: Any) -> None:
    for name in tree_leaves(implementation):
        if name not in _ATTENTION:
            raise ValueError(
                f"{where}: the attention implementation {name!r} may be code from the hub; if you trust it, pass it "
                "yourself (model_kwargs)"
            )


class _NoMoreThanFiles(TorchDispatchMode):
    """Refuses tensors for which the files of a model give no reason, before memory is taken for them.

    Args:
        where: What is loaded.
        allowed: Gives the bytes that may be taken; asked late, as a hub model's files come while they are read.
    """

    def __init__(self, where: str, allowed: Callable[[], int]) -> None:
        super().__init__()
        self.where = where
        self.allowed = allowed
        self.tensors = 0
        self.bytes = 0
        self.planned: dict[str, int] = {}

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
        device = kwargs.get("device") or (tensors[0].device if tensors else None)
        if device is not None and torch.device(device).type == "meta":
            return
        # No operation makes more of its arguments than all their products.
        sizes: list[float] = [tensor.numel() for tensor in tensors]
        sizes += [abs(leaf) for leaf in leaves if isinstance(leaf, (int, float)) and abs(leaf) > 1]
        if sum(sizes) < _BIG and math.prod(size for size in sizes if size) < _BIG:
            return
        # Layers are alike, and so are most of their operations.
        call = f"{func} {torch.get_default_dtype()} {tree_map(_layout, (args, kwargs))}"
        if call not in self.planned:
            planned = tree_leaves(_planned(func, args, kwargs))
            self.planned[call] = sum(leaf.numel() * leaf.itemsize for leaf in planned if isinstance(leaf, Tensor))
        self.bytes += self.planned[call]
        if self.bytes > _SLACK and self.bytes > (allowed := self.allowed()):
            raise ValueError(
                f"{self.where} asks for {self.bytes / 2**20:,.0f} MiB of memory, its files give reason for "
                f"{allowed / 2**20:,.0f}"
            )


def _planned(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What an operation would return, without its memory; None where that hangs on values."""
    args, kwargs = tree_map(_on_meta, (args, kwargs))
    names = {argument.name for argument in func._schema.arguments}
    try:
        return func(*args, **kwargs, **({"device": "meta"} if "device" in names and "device" not in kwargs else {}))
    except Exception:
        return None


def _layout(value: Any) -> Any:
    """All that :func:`_planned` sees of an argument."""
    return (value.shape, value.stride(), value.dtype) if isinstance(value, Tensor) else value


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
        found = (load_file_path(path, name, **hub_kwargs) for name in ("modules.json", "config.json"))
        first = next(filter(None, found), None)
        if first is None:
            return []
        folder = Path(first).parent
    return [file for file in folder.rglob(pattern) if file.is_file()]


def _allowed_bytes(path: str, **hub_kwargs: Any) -> int:
    return _SLACK + _TIMES_THE_FILES * sum(file.stat().st_size for file in _files(path, **hub_kwargs))


@contextmanager
def _in_one_line(path: str) -> Iterator[None]:
    """Errors of a line, and of kinds that a caller can expect, whatever the libraries raise at damaged files."""
    try:
        yield
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except OSError as error:
        if "\n" not in str(error):
            raise
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
        raise kind(f"{path} can't be loaded: {' '.join(str(error).split())}") from error
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
