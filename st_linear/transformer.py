"""LinearTransformer, the first module of a SentenceTransformer with linear attention."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.base.modules.transformer import ProcessingKwargs
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.util import load_file_path
from torch import Tensor
from torch.nn import functional as F
from transformers import DataCollatorWithFlattening, PreTrainedModel

from st_linear.adapters import CONFIG_NAME, NO_ADAPTER, WEIGHTS_NAME, Adapter, bundled_adapter_for, write_adapter
from st_linear.adapters import SETTINGS as ADAPTER_SETTINGS
from st_linear.attention import exact_limit
from st_linear.checkpoints import (
    hub_kwargs_of,
    one_line_if_missing,
    read_json_file,
    read_tensors,
    refuse_mismatch,
    refuse_misshapen_weights,
    refuse_missing_weights,
)
from st_linear.conversion import (
    ATTENTION_IMPLEMENTATION,
    accepts_packed_inputs,
    check_exact_up_to,
    check_settings,
    is_integer,
    linear_attentions,
    linearise,
    split_state_dict,
)
from st_linear.memory import reused_memory
from st_linear.model_card import LinearModelCardData
from st_linear.positions import (
    PositionExtension,
    check_position_extension,
    extend_positions,
    has_rotary_positions,
    rescaled_positions,
    trained_positions,
)
from st_linear.runtimes import HUB_OPTIONS, RUNTIMES, ExportedEncoder
from st_linear.untrusted import refuse_kernels

logger = logging.getLogger(__name__)

_DEFAULTS: dict[str, Any] = {"feature_map": "favor", "window": 64, "exact_layers": ()}
"""What is taken where neither the caller nor an adapter says anything."""

_PACKING_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


class LinearTransformer(Transformer):
    """Sentence Transformers' ``Transformer`` with linear-time attention and a longer context.

    Attention to the near window is exact and attention beyond it is linear, under one normaliser: a text of at most
    ``exact_up_to`` tokens gets the original model's vector, to rounding. Time and memory grow linearly with length.

    Args:
        model_name_or_path: Hub id or folder of a bidirectional encoder, as for ``Transformer``.
        feature_map: Kernel of the linear part, one of :func:`~st_linear.feature_maps.feature_map_names`;
            ``"softmax"`` keeps exact attention, the control of every comparison. That of the adapter by default, or
            ``"favor"`` without one.
        feature_map_kwargs: Options of the map, JSON values, e.g. ``{"num_features": 128}``.
        window: Near window in tokens; 0 = purely linear. That of the adapter by default, or 64 without one.
        exact_up_to: Texts of at most so many tokens get softmax attention, whatever the window: short texts cost no
            more that way. What the adapter says by default, or two windows, which is the least.
        exact_layers: Layers that keep softmax attention, counted from 0. None by default.
        max_seq_length: Texts are cut at this many tokens, with one warning that counts them.
        position_extension: How positions grow beyond the trained ones: ``"tile"`` leaves texts within the old limit
            unchanged, ``"interpolate"`` stretches all, ``"none"`` adds none.
        adapter: A trained conversion of this very encoder: folder, hub id, or the name of a bundled one
            (:func:`~st_linear.adapters.bundled_adapters`). By default the bundled one, if there is one that agrees
            with the settings given; ``"none"`` leaves the conversion untrained.
        seed: Random features are a function of it.
        **kwargs: ``model_kwargs``, ``processor_kwargs``, ``config_kwargs`` … exactly as ``Transformer``.

    Raises:
        ValueError: If an argument is out of range, the encoder can't be converted (see
            :func:`~st_linear.conversion.linearise`), or the adapter is another encoder's or has other settings.

    Relations:
        - :func:`~st_linear.models.convert` does the same to a whole ``SentenceTransformer``, whose pooling stays.

    Example:
        ::

            from sentence_transformers import SentenceTransformer
            from sentence_transformers.sentence_transformer.modules import Pooling
            from st_linear import LinearTransformer

            encoder = LinearTransformer("sentence-transformers/all-MiniLM-L6-v2")
            model = SentenceTransformer(modules=[encoder, Pooling(encoder.get_embedding_dimension(), "mean")])
            model.encode("A text of up to 8,192 tokens.")
    """

    training_record: dict[str, Any]
    """How the linear attention was trained, as its adapter records it; empty where it was not."""

    base_encoder: dict[str, Any]
    """What the encoder was called that was converted, and its revision where one is known."""

    config_keys: list[str] = [
        *Transformer.config_keys,
        "feature_map",
        "feature_map_kwargs",
        "window",
        "exact_up_to",
        "exact_layers",
        "max_seq_length",
        "position_extension",
        "seed",
    ]

    def __init__(
        self,
        model_name_or_path: str,
        *,
        feature_map: str | None = None,
        feature_map_kwargs: dict[str, Any] | None = None,
        window: int | None = None,
        exact_up_to: int | None = None,
        exact_layers: Sequence[int] | None = None,
        max_seq_length: int | None = 8192,
        position_extension: PositionExtension = "tile",
        adapter: str | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        settings: dict[str, Any] = {
            "feature_map": feature_map,
            "feature_map_kwargs": feature_map_kwargs,
            "window": window,
            "exact_up_to": exact_up_to,
            "exact_layers": exact_layers,
            "max_seq_length": max_seq_length,
            "position_extension": position_extension,
            "seed": seed,
        }
        _check_settings(**settings)
        implementation = (kwargs.get("model_kwargs") or {}).get("attn_implementation")
        if implementation is not None:
            raise ValueError(
                f"attn_implementation={implementation!r} can't be combined with LinearTransformer, which brings its "
                "own; for exact attention pass feature_map='softmax'"
            )
        backend = kwargs.get("backend", "torch")
        if backend in RUNTIMES and adapter != NO_ADAPTER:
            raise ValueError(
                f"LinearTransformer converts encoders on backend='torch' only, got {backend!r}; load an exported "
                f"model with SentenceTransformer(folder, backend={backend!r}, trust_remote_code=True)"
            )
        self._loading_info: dict[str, Any] = {}
        with one_line_if_missing(model_name_or_path):
            super().__init__(model_name_or_path, **kwargs)
        refuse_missing_weights(model_name_or_path, self._loading_info.get("missing_keys", ()))
        self._base = (str(model_name_or_path), hub_kwargs_of(kwargs.get("model_kwargs")))
        # A revision is the base model's.
        hub_kwargs = {name: value for name, value in self._base[1].items() if name != "revision"}
        self._convert(adapter, hub_kwargs, **settings)

    @classmethod
    def from_transformer(cls, transformer: Transformer, **settings: Any) -> LinearTransformer:
        """Convert a loaded ``Transformer``; the original is left as it was.

        Args:
            transformer: The module to copy; one that is a LinearTransformer already is converted anew.
            **settings: As for the constructor, without ``kwargs``.
        """
        parameters = inspect.signature(cls).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        for name in settings:
            if name not in defaults:
                raise ValueError(f"unknown setting {name!r}; choose among: {', '.join(defaults)}")
        _refuse_exported(transformer, "converted")
        settings = {**defaults, **settings}
        adapter = settings.pop("adapter")
        _check_settings(**settings)
        learned = any(p.requires_grad for layer in linear_attentions(transformer).values() for p in layer.parameters())
        if learned and settings["feature_map"] != "softmax":
            logger.warning("The model was converted before: what its feature maps have learned is not carried over.")
        module = cls.__new__(cls)
        module.__dict__ = copy.deepcopy(transformer).__dict__
        module._convert(adapter, {}, **settings)
        return module

    def _convert(self, source: str | None, hub_kwargs: dict[str, Any], **settings: Any) -> None:
        """Take what the settings leave open from an adapter, if there is one, and convert the encoder."""
        given = {name: settings[name] for name in ADAPTER_SETTINGS}
        adapter = None
        if source is None:
            adapter = bundled_adapter_for(self.model, given)
        elif source != NO_ADAPTER:
            adapter = Adapter.load(source, **hub_kwargs)
            adapter.refuse_other_base(self.model)
        if adapter is not None:
            own = adapter.settings_with(given)
            settings |= {name: value for name, value in own.items() if settings[name] is None}
            logger.info("Linear attention as trained in adapter %s", adapter.source)
        self._linearise(**_with_defaults(settings))
        if adapter is not None:
            self._load_linear_weights(adapter.weights)
            self.training_record, self.base_encoder = adapter.training, adapter.base

    def _linearise(
        self,
        *,
        feature_map: str,
        feature_map_kwargs: dict[str, Any] | None,
        window: int,
        exact_up_to: int | None,
        exact_layers: Sequence[int],
        max_seq_length: int | None,
        position_extension: PositionExtension,
        seed: int,
    ) -> None:
        self.feature_map = feature_map
        self.feature_map_kwargs = feature_map_kwargs
        self.window = window
        self.exact_up_to = exact_limit(window, exact_up_to)
        self.exact_layers = tuple(exact_layers)
        self.position_extension = position_extension
        self.seed = seed
        self.num_truncated = 0
        self.training_record = {}
        revision = getattr(self.model.config, "_commit_hash", None)
        self.base_encoder = {"name": self.model.config._name_or_path, "revision": revision}
        if isinstance(self.model, ExportedEncoder):
            # The graph has it all in it.
            self.max_seq_length = min(max_seq_length or self.model.limit, self.model.limit)
            return
        linearise(
            self.model,
            feature_map=feature_map,
            window=window,
            exact_up_to=exact_up_to,
            exact_layers=exact_layers,
            seed=seed,
            feature_map_kwargs=feature_map_kwargs,
        )
        if max_seq_length is not None:
            self.max_seq_length = min(max_seq_length, extend_positions(self.model, max_seq_length, position_extension))
        self.unpad_inputs = getattr(self, "_unpad_inputs", None)

    def redraw(self, seed: int) -> None:
        """Draw the random features of all layers anew, as ``LinearTransformer(…, seed=seed)`` has them."""
        _refuse_exported(self, "redrawn")
        self.seed = seed
        for attention in linear_attentions(self.model).values():
            attention.redraw(seed)

    def on_model_ready(self, model: Any) -> None:
        if not isinstance(model, SentenceTransformer):
            return
        model.model_card_data = LinearModelCardData.from_card_data(model.model_card_data)
        if len(model) == 1:
            # The caller iterates over the model's modules: give it a new dictionary rather than grow the one in use.
            model._modules = dict(model._modules)
            model.append(self._declared_pooling())

    def _declared_pooling(self) -> Pooling:
        """The pooling that the base model's folder declares; the mean where it declares none."""
        path, hub_kwargs = getattr(self, "_base", (None, {}))
        for module in (read_json_file(path, "modules.json", **hub_kwargs) if path else None) or ():
            if module["type"].endswith(".Pooling"):
                return Pooling.load(path, subfolder=module["path"], **hub_kwargs)
        return Pooling(self.get_embedding_dimension(), "mean")

    def preprocess(
        self,
        inputs: Sequence[Any],
        prompt: str | None = None,
        processing_kwargs: ProcessingKwargs | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        for text in inputs:
            if text is None or isinstance(text, (int, float)):
                raise ValueError(f"one of the inputs is {text!r}, not a text: pass strings")
        features = super().preprocess(inputs, prompt, processing_kwargs, **kwargs)
        self._count_truncated(features, inputs, prompt)
        return features

    def _count_truncated(self, features: dict[str, Any], inputs: Sequence[Any], prompt: str | None) -> None:
        limit, tokenizer = self.max_seq_length, self.tokenizer
        if limit is None or tokenizer is None or not all(isinstance(text, str) for text in inputs):
            return
        if "cu_seq_lens_q" in features:
            lengths = features["cu_seq_lens_q"].diff().tolist()
        elif "attention_mask" in features:
            lengths = features["attention_mask"].sum(dim=-1).tolist()
        else:
            return
        # A text that was cut fills the limit: only such texts are tokenised once more.
        full = [(prompt or "") + text for text, length in zip(inputs, lengths) if length >= limit]
        if not full:
            return
        uncut = tokenizer(full, truncation=False, verbose=False)["input_ids"]
        cut = sum(len(ids) > limit for ids in uncut)
        if cut and not self.num_truncated:
            logger.warning(
                "%d of %d texts in this batch are longer than max_seq_length=%d tokens and were cut; this is said "
                "once, num_truncated of the module goes on counting.",
                cut,
                len(inputs),
                limit,
            )
        self.num_truncated += cut

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        # The caller's features stay as they are: losses that embed a batch twice hand them in again.
        features = dict(features)
        packed = "cu_seq_lens_q" in features
        if packed and getattr(self, "_is_replica", False):
            raise ValueError(
                "DataParallel takes packed texts apart: use a process for each GPU (torchrun, accelerate launch), or "
                "set unpad_inputs=False"
            )
        if self.squeezes_positions():
            mask = _packed_mask(features) if packed else features["attention_mask"]
            positions = rescaled_positions(mask, trained_positions(self.model))
            if positions is not None:
                features["position_ids"] = positions[mask.bool()][None] if packed else positions
        with reused_memory(self.model, {**features, **kwargs}.get("input_ids")):
            features = super().forward(features, **kwargs)
        return self._unpack(features) if packed else features

    def squeezes_positions(self) -> bool:
        """Whether texts longer than the trained range get positions of their own, squeezed into it."""
        if isinstance(self.model, ExportedEncoder):
            return "position_ids" in self.model.inputs
        stretched = self.model.config.max_position_embeddings > trained_positions(self.model)
        return self.position_extension == "tile" and stretched and has_rotary_positions(self.model)

    def _unpack(self, features: dict[str, Any]) -> dict[str, Any]:
        """Put a packed output back into padded rows, which every later module and ``output_value`` understands."""
        mask = _packed_mask(features)
        if len(mask) > 1:
            tokens = features[self.module_output_name][0]
            padded = tokens.new_zeros(*mask.shape, tokens.shape[-1])
            padded[mask] = tokens
            features[self.module_output_name] = padded
        features["attention_mask"] = mask.long()
        for key in (*_PACKING_KEYS, "position_ids"):
            features.pop(key, None)
        return features

    def _can_flatten_inputs(self) -> bool:
        # Sentence Transformers asks for flash attention here. Ours takes packed inputs on every device.
        if (
            isinstance(self.model, ExportedEncoder)
            or self.config._attn_implementation != ATTENTION_IMPLEMENTATION
            or self.transformer_task not in ("feature-extraction", "fill-mask")
            or "text" not in self.modality_config
            or any(params["method"] != "forward" for params in self.modality_config.values())
            or not accepts_packed_inputs(self.model)
        ):
            return False
        self.data_collator = DataCollatorWithFlattening(
            return_seq_idx=True, return_flash_attn_kwargs=True, return_position_ids=True
        )
        if self.model_forward_params is not None:
            self.model_forward_params |= set(_PACKING_KEYS)
        self._flatten_position_offset = self._infer_flatten_position_offset()
        return True

    def _load_model(self, model_name_or_path: str, *args: Any, **kwargs: Any) -> PreTrainedModel:
        _, config, backend, *_ = args
        if backend in RUNTIMES:
            return ExportedEncoder.load(model_name_or_path, config, backend, **kwargs)  # type: ignore[return-value]
        refuse_kernels(model_name_or_path, config)
        # transformers' own error on misshapen tensors names neither the tensor nor its shape: ours does.
        kwargs.update(ignore_mismatched_sizes=True, output_loading_info=True)
        try:
            loaded = super()._load_model(model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            raise ValueError(f"{model_name_or_path}: model.safetensors is damaged ({error})") from error
        if isinstance(loaded, tuple):
            loaded, self._loading_info = loaded
        refuse_misshapen_weights(model_name_or_path, self._loading_info.get("mismatched_keys", ()))
        return loaded

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Save a plain transformers checkpoint, and beside it what linear attention adds; safetensors only."""
        _refuse_exported(self, "saved")
        plain, added = split_state_dict(self.model)
        self.model.save_pretrained(output_path, state_dict=plain)
        self.processor.save_pretrained(output_path)
        write_adapter(self, output_path, added, self._kernel_settings())
        self.save_config(output_path)

    @classmethod
    def load(cls, model_name_or_path: str, *args: Any, **kwargs: Any) -> LinearTransformer:
        """Load a saved module. Every tensor must be there, and no other.

        Raises:
            ValueError: If a tensor is missing, left over or misshapen, or a file is damaged.
        """
        subfolder = kwargs.get("subfolder", args[0] if args else "")
        exported = kwargs.get("backend", "torch") in RUNTIMES
        weights = load_file_path(model_name_or_path, WEIGHTS_NAME, subfolder, **hub_kwargs_of(kwargs))
        if weights is None:
            raise ValueError(f"{model_name_or_path} holds no {WEIGHTS_NAME}: LinearTransformer saved no model there")
        # Its own weights, not those of an adapter, whose settings it may have.
        kwargs["init_defaults"] = {**(kwargs.get("init_defaults") or {}), "adapter": NO_ADAPTER}
        if not exported:
            kwargs["model_kwargs"] = {"use_safetensors": True, **(kwargs.get("model_kwargs") or {})}
        module = super().load(model_name_or_path, *args, **kwargs)
        if exported:
            module._refuse_other_settings(weights, read_tensors(weights)[1])
        else:
            info = module._loading_info
            missing, unexpected = info.get("missing_keys", ()), info.get("unexpected_keys", ())
            refuse_mismatch(f"{model_name_or_path}: model.safetensors", missing, unexpected)
            module._load_linear_weights(weights)
        config = read_json_file(model_name_or_path, CONFIG_NAME, subfolder, **hub_kwargs_of(kwargs)) or {}
        module.training_record = config.get("training") or {}
        base = {name: value for name, value in (config.get("base") or {}).items() if name != "fingerprint"}
        module.base_encoder = base or module.base_encoder
        return module

    @classmethod
    def _load_init_kwargs(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        init_kwargs = super()._load_init_kwargs(*args, **kwargs)
        if kwargs.get("backend", "torch") in RUNTIMES:
            # How a graph is run is for the caller to say, and not for the folder.
            allowed = HUB_OPTIONS | (kwargs.get("model_kwargs") or {}).keys()
            merged = init_kwargs.get("model_kwargs") or {}
            init_kwargs["model_kwargs"] = {name: value for name, value in merged.items() if name in allowed}
        return init_kwargs

    def _refuse_other_settings(self, path: str, metadata: dict[str, str]) -> None:
        for name, value in self._kernel_settings().items():
            if metadata.get(name, value) != value:
                raise ValueError(f"{path} was made with {name}={metadata[name]}, this model has {name}={value}")

    def _load_linear_weights(self, path: str) -> None:
        saved, metadata = read_tensors(path)
        self._refuse_other_settings(path, metadata)
        _, own = split_state_dict(self.model)
        refuse_mismatch(path, own.keys() - saved.keys(), saved.keys() - own.keys())
        for name, tensor in saved.items():
            if tensor.shape != own[name].shape:
                raise ValueError(f"{path}: {name} has shape {tuple(tensor.shape)}, expected {tuple(own[name].shape)}")
            if not tensor.is_floating_point():
                raise ValueError(f"{path}: {name} holds {tensor.dtype}, expected floating-point numbers")
            own[name].copy_(tensor)

    def _kernel_settings(self) -> dict[str, str]:
        return {"feature_map": self.feature_map, "window": str(self.window)}

    def get_config_dict(self) -> dict[str, Any]:
        config = {**super().get_config_dict(), "exact_layers": list(self.exact_layers)}
        if self.exact_up_to == 2 * self.window:
            # The default goes without saying, as it did before there was a choice.
            del config["exact_up_to"]
        return config

    def __repr__(self) -> str:
        return f"LinearTransformer({dict(self.get_config_dict(), architecture=type(self.model).__name__)})"


def _refuse_exported(transformer: Transformer, what: str) -> None:
    """Raise a ValueError if a module runs on another backend than PyTorch, and so can't be ``what``."""
    if transformer.backend != "torch":
        raise ValueError(f"a model that runs on {transformer.backend} can't be {what}: load it with backend='torch'")


def _with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: _DEFAULTS.get(name) if value is None else value for name, value in settings.items()}


def _check_settings(max_seq_length: Any, position_extension: str, **settings: Any) -> None:
    """Refuse bad settings before a model is loaded for them."""
    if settings["window"] is None:
        # How many tokens two windows are, an adapter may have to say first.
        check_exact_up_to(settings["exact_up_to"])
        settings["exact_up_to"] = None
    check_settings(**_with_defaults(settings))
    check_position_extension(position_extension)
    if max_seq_length is not None and (not is_integer(max_seq_length) or max_seq_length < 1):
        raise ValueError(f"max_seq_length must be a positive number of tokens, got {max_seq_length!r}")


def join_packed(batches: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The features of one packed batch with the texts of several, in their order."""
    joined = dict(batches[0])
    for name in ("input_ids", "position_ids"):
        joined[name] = torch.cat([features[name] for features in batches], dim=1)
    lengths = torch.cat([features["cu_seq_lens_q"].diff() for features in batches])
    texts = torch.arange(len(lengths), dtype=torch.int32, device=lengths.device)
    joined["seq_idx"] = texts.repeat_interleave(lengths)[None]
    joined["cu_seq_lens_q"] = joined["cu_seq_lens_k"] = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    joined["max_length_q"] = joined["max_length_k"] = max(features["max_length_q"] for features in batches)
    return joined


def _packed_mask(features: dict[str, Any]) -> Tensor:
    """(B, T) bool mask of the padded form of packed features."""
    lengths = features["cu_seq_lens_q"].diff()
    return torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]
