"""Adapters: what the linear attention of a frozen encoder has learned, and which encoder that was.

An adapter is two files: the tensors, and :data:`CONFIG_NAME` with the settings they were trained for, a fingerprint of
the encoder, and what is known of the training. Every saved model holds both, so its folder is an adapter too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sentence_transformers.util import load_file_path
from torch import Tensor, nn

from st_linear.checkpoints import read_header, read_json_file
from st_linear.conversion import check_settings, is_integer, split_state_dict
from st_linear.records import atomic_path, write_json

WEIGHTS_NAME = "linear_attention.safetensors"
"""File that holds what linear attention adds to a plain transformers checkpoint."""

CONFIG_NAME = "adapter.json"
"""File beside it, which says what its tensors are for."""

NO_ADAPTER = "none"
"""The value of ``adapter=`` that asks for an untrained conversion, where a trained one is bundled."""

FORMAT_VERSION = 1

SETTINGS = ("feature_map", "feature_map_kwargs", "window", "exact_layers")
"""Settings of a conversion that its tensors hang on."""

EXACT_UP_TO = "exact_up_to"
"""A setting that they do not hang on: an adapter says what it is meant for, and the caller may say otherwise."""

_BUNDLED = Path(str(files("st_linear"))) / "bundled"

_SAMPLES = 8
"""Weights of each matrix that a fingerprint holds."""

# That a conversion may draw, whatever an adapter's tensors have.
_FEW_FEATURES = 4096

# Weights rounded to bfloat16 are still those of the same model; those of another are not so close, all of them.
_RTOL, _ATOL = 2**-8, 1e-6


@dataclass(frozen=True)
class Adapter:
    """A trained conversion.

    Attributes:
        source: Folder, hub id or bundled name that it was loaded from.
        weights: Path of its tensors.
        settings: Values of :data:`SETTINGS`, and of :data:`EXACT_UP_TO` or None.
        fingerprint: Of the encoder that it was trained for; see :func:`fingerprint`.
        base: What that encoder is called, and its revision where one is known.
        training: Texts, settings and fidelity of the training, as far as they were recorded.
    """

    source: str
    weights: str
    settings: dict[str, Any]
    fingerprint: list[float]
    base: dict[str, Any]
    training: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, source: str, **hub_kwargs: Any) -> Adapter:
        """Find an adapter.

        Args:
            source: Name of a bundled one, folder or hub id.
            **hub_kwargs: ``token``, ``cache_folder``, ``local_files_only``.

        Raises:
            ValueError: If there is none, a file is damaged, or this version of st_linear can't read it.
        """
        folder = str(_BUNDLED / source) if source in bundled_adapters() else source
        weights = load_file_path(folder, WEIGHTS_NAME, **hub_kwargs)
        if weights is None:
            choices = "".join(f", or {name}" for name in bundled_adapters())
            raise ValueError(f"{source} holds no {WEIGHTS_NAME}: pass the folder or hub id of an adapter{choices}")
        config = read_json_file(folder, CONFIG_NAME, **hub_kwargs)
        if config is None:
            raise ValueError(f"{source} holds no {CONFIG_NAME}, which says what its tensors are for")
        if not isinstance(config, dict) or config.get("version") != FORMAT_VERSION:
            found = config.get("version") if isinstance(config, dict) else None
            raise ValueError(
                f"{source}: {CONFIG_NAME} has version {found!r}, this st_linear reads version {FORMAT_VERSION}"
            )
        try:
            settings = {name: config["settings"][name] for name in SETTINGS}
            settings[EXACT_UP_TO] = config["settings"].get(EXACT_UP_TO)
            base = dict(config["base"])
            samples = [float(value) for value in base.pop("fingerprint")]
            check_settings(**settings)
            training = dict(config.get("training") or {})
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"{source}: {CONFIG_NAME} is damaged ({error!r})") from error
        # Features are drawn before the tensors are read: none that they can't have.
        features = (settings["feature_map_kwargs"] or {}).get("num_features", 0)
        largest = max((side for _, shape in read_header(weights).values() for side in shape), default=0)
        if is_integer(features) and features > max(largest, _FEW_FEATURES):
            raise ValueError(f"{source}: {CONFIG_NAME} has num_features={features}, {WEIGHTS_NAME} at most {largest}")
        return cls(source, weights, settings, samples, base, training)

    def fits(self, model: nn.Module) -> bool:
        """Whether ``model`` is the encoder that it was trained for, whatever number format its weights are in."""
        own, trained = torch.tensor(fingerprint(model)), torch.tensor(self.fingerprint)
        return own.shape == trained.shape and torch.allclose(own, trained, rtol=_RTOL, atol=_ATOL)

    def refuse_other_base(self, model: nn.Module) -> None:
        """Raise a ValueError unless :meth:`fits`."""
        if not self.fits(model):
            raise ValueError(
                f"adapter {self.source} was trained for another encoder, {self.base.get('name')}: these are not its "
                "weights"
            )

    def settings_with(self, given: dict[str, Any]) -> dict[str, Any]:
        """Its settings, which those that are ``given`` (not None) must agree with.

        Raises:
            ValueError: If one does not.
        """
        for name in self.disagreements(given):
            raise ValueError(
                f"adapter {self.source} was made with {name}={self.settings[name]!r}, got {given[name]!r}"
            )
        return dict(self.settings)

    def disagreements(self, given: dict[str, Any]) -> list[str]:
        """Names of the settings that are ``given`` (not None) and are not its own."""
        return [name for name, value in given.items() if value is not None and not _agree(value, self.settings[name])]


def bundled_adapters() -> list[str]:
    """Names of the adapters that come with st_linear."""
    return sorted(path.name for path in _BUNDLED.iterdir() if path.is_dir()) if _BUNDLED.is_dir() else []


def bundled_adapter_for(model: nn.Module, given: dict[str, Any]) -> Adapter | None:
    """The bundled adapter of an encoder that agrees with the settings that are ``given`` (not None), if any."""
    for name in bundled_adapters():
        adapter = Adapter.load(name)
        if not adapter.disagreements(given) and adapter.fits(model):
            return adapter
    return None


def fingerprint(model: nn.Module) -> list[float]:
    """Some weights of every matrix of an encoder, as it is without linear attention.

    Position tables are left out, as a conversion makes them longer, and so are poolers, which nothing here reads.
    """
    plain, _ = split_state_dict(model)
    samples: list[Tensor] = []
    for name in sorted(plain):
        if plain[name].ndim == 2 and "position" not in name and "pooler" not in name:
            flat = plain[name].detach().flatten()
            index = torch.linspace(0, len(flat) - 1, _SAMPLES, dtype=torch.float64).long()
            samples.append(flat[index.to(flat.device)].float().cpu())
    return [float(f"{value:.6g}") for value in torch.cat(samples).tolist()]


def export_adapter(encoder: Any, folder: str | Path) -> None:
    """Write the adapter of a converted encoder alone: two files, of one or two megabytes for a small encoder.

    Matrices are rounded to float16; biases and gains, which may be large and go into exponents, stay in float32.

    Args:
        encoder: The first module of a converted model.
        folder: Where; made if it is not there.

    Raises:
        ValueError: If no layer is linear.
    """
    _, added = split_state_dict(encoder.model)
    if not added:
        raise ValueError("the model has no linear attention, and so no adapter: convert it first")
    tensors = {
        name: tensor.to(torch.float16 if _is_matrix(tensor) else torch.float32) for name, tensor in added.items()
    }
    write_adapter(encoder, folder, tensors)


def write_adapter(
    encoder: Any, folder: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write the two files of an adapter.

    Args:
        encoder: The first module of a converted model.
        folder: Where; made if it is not there.
        tensors: What its linear attention has of its own.
        metadata: To be kept beside the tensors.
    """
    with atomic_path(Path(folder) / WEIGHTS_NAME) as temporary:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, temporary, metadata={"format": "pt", **(metadata or {})})
    settings = encoder.get_config_dict()
    config = {
        "version": FORMAT_VERSION,
        "settings": {name: settings[name] for name in (*SETTINGS, EXACT_UP_TO) if name in settings},
        "training": encoder.training_record,
        "base": {**encoder.base_encoder, "fingerprint": fingerprint(encoder.model)},
    }
    write_json(Path(folder) / CONFIG_NAME, config)


def _is_matrix(tensor: Tensor) -> bool:
    """Whether a tensor holds a matrix for each head, rather than a row or a number."""
    return tensor.ndim == 3 and 1 not in tensor.shape[1:]


def _agree(given: Any, own: Any) -> bool:
    """Whether a setting as somebody gives it is that of an adapter, which comes from JSON."""
    if isinstance(given, Mapping):
        return dict(given) == (own or {})
    return (list(given) if isinstance(given, tuple) else given) == own
