"""Whole models: ``convert`` a SentenceTransformer, save it whole, ``load`` it without running its code."""

from __future__ import annotations

import copy
import ctypes
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.util import load_file_path

from st_linear.checkpoints import (
    hub_kwargs_of,
    hub_out_of_reach,
    one_line_if_missing,
    read_json_file,
)
from st_linear.pair_head import DSEHead
from st_linear.transformer import WEIGHTS_NAME, LinearTransformer
from st_linear.untrusted import guarded, refuse_bad_weights


def convert(model: str | SentenceTransformer, **settings: Any) -> SentenceTransformer:
    """Give a SentenceTransformer linear attention; its pooling, normalisation and prompts stay.

    Args:
        model: Hub id, folder or loaded model. A loaded model is left as it was.
        **settings: As for :class:`LinearTransformer`: ``feature_map``, ``feature_map_kwargs``, ``window``,
            ``exact_up_to``, ``exact_layers``, ``max_seq_length``, ``position_extension``, ``adapter``, ``seed``.

    Returns:
        A new model. After ``save_pretrained``, load it with :func:`load`, or with
        ``SentenceTransformer(folder, trust_remote_code=True)``.

    Raises:
        ValueError: If the model's first module is no ``Transformer``, a setting is out of range, or the encoder can't
            be converted.

    Example:
        ::

            model = convert("BAAI/bge-small-en-v1.5", feature_map="favor", window=64)
            model.save_pretrained("bge-small-linear")
    """
    base = load(model) if isinstance(model, (str, os.PathLike)) else model
    if not isinstance(base, SentenceTransformer):
        raise ValueError(f"can't convert a {type(base).__name__}: pass a SentenceTransformer, a folder or a hub id")
    if not isinstance(base[0], Transformer):
        first = type(base[0]).__name__
        raise ValueError(f"can't convert a model that begins with {first}: its first module must be a Transformer")
    encoder = LinearTransformer.from_transformer(base[0], **settings)
    converted = SentenceTransformer(
        modules=[encoder, *(copy.deepcopy(module) for module in list(base)[1:])],
        device=str(base.device),
        prompts={name: prompt for name, prompt in base.prompts.items() if prompt is not None},
        default_prompt_name=base.default_prompt_name,
        similarity_fn_name=base.similarity_fn_name,
        truncate_dim=base.truncate_dim,
    )
    card: Any = converted.model_card_data
    card.inherit(base)
    return converted


def load(model_name_or_path: str, **kwargs: Any) -> SentenceTransformer:
    """Load a saved model without ``trust_remote_code``.

    Builds the same SentenceTransformer as ``SentenceTransformer(folder, trust_remote_code=True)``, from Sentence
    Transformers' own classes and st_linear's alone: code that lies in the folder never runs.

    Args:
        model_name_or_path: Folder or hub id.
        **kwargs: As for ``SentenceTransformer``: ``device``, ``model_kwargs``, ``revision`` …

    Raises:
        FileNotFoundError: If there is no such folder, and no such model on the hub.
        ValueError: If the model needs a class of its own, is a CrossEncoder, lacks weights of its encoder (which
            transformers would draw at random), or its files are damaged, name code on the hub, hold NaN, or ask for
            much more memory than they hold.
    """
    if kwargs.pop("trust_remote_code", False):
        raise ValueError(
            "st_linear.load runs no remote code: use SentenceTransformer(…, trust_remote_code=True) for that"
        )
    path = str(model_name_or_path)
    if not os.path.isdir(path) and not kwargs.get("local_files_only"):
        kwargs["local_files_only"] = hub_out_of_reach(path, revision=kwargs.get("revision"), token=kwargs.get("token"))
    hub_kwargs = hub_kwargs_of(kwargs)
    with one_line_if_missing(path), guarded(path, kwargs.get("model_kwargs"), **hub_kwargs):
        _check_saved_model(path, **hub_kwargs)
        try:
            model = SentenceTransformer._load_with_module_classes(
                path, _module_classes(), trust_remote_code=False, **kwargs
            )
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{path}: a JSON file of the model is damaged ({error})") from error
        refuse_bad_weights(path, model, **hub_kwargs)
    return model


def save_model(model: SentenceTransformer, folder: Path, add: Callable[[Path], None] | None = None) -> None:
    """Save so that ``folder`` is at any moment the old model or the new one, whole.

    Where the system can't exchange two folders in one step (Linux can), there is a moment between the two at which
    ``folder`` is absent.

    Args:
        model: Any.
        folder: Where.
        add: Puts more files into the new folder before it takes the old one's place; if this raises, it doesn't.

    Raises:
        ValueError: As :func:`check_model_folder`.
    """
    folder = folder.resolve()
    check_model_folder(folder)
    fresh, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        model.save_pretrained(str(fresh))
        if add is not None:
            add(fresh)
        if not folder.exists():
            fresh.rename(folder)
        elif not _exchange(fresh, folder):
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
            fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Whether the system could give each folder the other's name, in one step."""
    if sys.platform != "linux":
        return False
    # Python has no name for it: renameat2(AT_FDCWD, …, AT_FDCWD, …, RENAME_EXCHANGE).
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and rename(-100, os.fsencode(first), -100, os.fsencode(second), 2) == 0


def check_model_folder(folder: Path) -> None:
    """Find out before the work, not after it, that :func:`save_model` can't save there.

    Raises:
        ValueError: If nothing can be written there, or what is there is no saved model, and so not ours to replace.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / WEIGHTS_NAME).is_file():
        raise ValueError(f"{folder} holds files and no model of st_linear's: name another folder")
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"{folder} can't be written: {existing} is {'read-only' if existing.is_dir() else 'a file'}")


def _module_classes() -> dict[str, type]:
    return {f"{cls.__module__}.{cls.__qualname__}": cls for cls in (LinearTransformer, DSEHead)}


def _check_saved_model(path: str, **hub_kwargs: Any) -> None:
    """Refuse what :func:`load` would run code for, or would load as something else than was saved."""
    if not path or (os.path.isdir(path) and not {"modules.json", "config.json"} & set(os.listdir(path))):
        raise FileNotFoundError(f"{path!r} holds no model: neither modules.json nor config.json is there")
    modules = read_json_file(path, "modules.json", **hub_kwargs)
    config = read_json_file(path, "config_sentence_transformers.json", **hub_kwargs) or {}
    try:
        entries = [(str(module["type"]), module["path"]) for module in modules or ()]
        model_type = config.get("model_type", "SentenceTransformer")
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: modules.json or config_sentence_transformers.json is damaged ({error})") from error
    for name, _ in entries:
        if name not in _module_classes() and not name.startswith("sentence_transformers."):
            raise ValueError(
                f"{path} needs the class {name}, which st_linear.load does not run; if you trust its code, use "
                "SentenceTransformer(…, trust_remote_code=True)"
            )
    if modules is None:
        # A CrossEncoder that another library saved says so by the head that it was trained with alone.
        architectures = (read_json_file(path, "config.json", **hub_kwargs) or {}).get("architectures") or ()
        if any(str(name).endswith("ForSequenceClassification") for name in architectures):
            model_type = "CrossEncoder"
    if model_type != "SentenceTransformer":
        raise ValueError(f"{path} is a {model_type}, not a SentenceTransformer: it has no sentence embeddings")
    if modules is None and load_file_path(path, WEIGHTS_NAME, **hub_kwargs) is not None:
        raise ValueError(f"{path} holds {WEIGHTS_NAME} but no modules.json: parts of the saved model are missing")
