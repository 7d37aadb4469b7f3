"""What a benchmark is asked to do: its level, contenders, sizes and rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch

from st_linear.benchmarks.timing import MINIMUM_ROUNDS

LEVELS = ("attention", "encoder", "training", "mixed")
"""Attention alone; a whole encoder's forward pass; a training step; batches of mixed length."""

DTYPES = ("float32", "bfloat16", "float16")

MIXED_PARTS = ("sts-forward", "sts-training", "sts-encode", "long-forward", "long-training")
"""Parts of the level ``mixed``."""

_ATTENTION_MODELS = ("sdpa", "performer", "plain", "elu", "hedgehog", "favor", "hedgehog@64", "copy")
_ENCODER_MODELS = ("softmax", "no-attention", "hedgehog", "favor:128", "hedgehog@64")

_LEVEL_DEFAULTS: dict[str, dict[str, Any]] = {
    "attention": {
        "models": _ATTENTION_MODELS,
        "lengths": (128, 512, 2048, 8192),
        "baselines": ("sdpa",),
        "batch_size": 1,
        "batch_tokens": 0,
        "heads": 12,
        "head_dim": 32,
        "backward": False,
        "across_lengths": False,
    },
    "encoder": {
        "models": _ENCODER_MODELS,
        "lengths": (128, 512, 2048, 8192),
        "baselines": ("softmax", "no-attention"),
        "batch_size": 1,
        "batch_tokens": 0,
        "base": "",
        "across_lengths": False,
    },
    "training": {
        "models": _ENCODER_MODELS,
        "lengths": (128, 512, 2048),
        "baselines": ("softmax",),
        "batch_size": 1,
        "batch_tokens": 0,
        "base": "",
        "attention_dropout": -1.0,
        "across_lengths": False,
    },
    "mixed": {
        "models": ("softmax", "hedgehog@64"),
        "lengths": (4096,),
        "baselines": ("softmax",),
        "batch_size": 64,
        "batch_tokens": 16384,
        "base": "",
        "attention_dropout": -1.0,
        "data": "sample",
        "parts": MIXED_PARTS,
    },
}
"""The options that a level takes besides those of every level, and what they are where nothing is said."""


@dataclass(frozen=True)
class Settings:
    """What one benchmark measures; :meth:`for_level` fills in what a level takes by default.

    Attributes:
        level: One of :data:`LEVELS`.
        models: Names of the contenders.
        lengths: Tokens per text; in ``mixed``, lengths around which those of long texts are drawn.
        baselines: The contenders whose time every other's is set against, round by round.
        batch_size: Texts per batch; in ``mixed``, sentences per batch.
        batch_tokens: As many texts per batch as come to this many tokens, one at least; 0 = ``batch_size`` texts. In
            ``mixed``, the same of long texts.
        heads: H, at the level ``attention``.
        head_dim: D, at the level ``attention``.
        backward: Whether the backward pass is part of it, at the level ``attention``.
        base: Encoder to convert, hub id or folder; "" = the packaged all-MiniLM-L6-v2.
        attention_dropout: Of a training step; -1 = the model's own.
        data: Sentence pairs of ``mixed``.
        parts: Of ``mixed``, some of :data:`MIXED_PARTS`.
        across_lengths: Whether all lengths are measured in the same rounds, so that their costs per token are paired.
        features: Features per head of maps that have a choice and whose name holds no number; None = the map's own.
        limits: Length by contender beyond which it does not run.
        rounds: Timed rounds.
        warmup: Rounds before them.
        seconds: Budget of a length: no round is begun after it, once the fewest are done; 0 = none.
        dtype: One of :data:`DTYPES`.
        device: ``cpu``, ``cuda``, ``cuda:1`` …
        threads: Of PyTorch, on the CPU; 0 = as they are.
        seed: Of inputs, random features and the order of contenders.
    """

    level: str
    models: tuple[str, ...]
    lengths: tuple[int, ...]
    baselines: tuple[str, ...]
    batch_size: int
    batch_tokens: int
    heads: int | None = None
    head_dim: int | None = None
    backward: bool | None = None
    base: str | None = None
    attention_dropout: float | None = None
    data: str | None = None
    parts: tuple[str, ...] | None = None
    across_lengths: bool | None = None
    features: int | None = None
    limits: dict[str, int] = field(default_factory=dict)
    rounds: int = 9
    warmup: int = 1
    seconds: float = 0
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 0
    seed: int = 0

    @classmethod
    def for_level(cls, level: str, **options: Any) -> Settings:
        """Settings of a level.

        Args:
            level: One of :data:`LEVELS`.
            **options: Attributes; None, or an empty sequence of names, takes the level's default.

        Raises:
            ValueError: If an option is out of range, or belongs to another level.
        """
        _choice("level", level, LEVELS)
        chosen = {name: value for name, value in options.items() if value is not None}
        defaults = dict(_LEVEL_DEFAULTS[level])
        of_levels = {name for values in _LEVEL_DEFAULTS.values() for name in values}
        for name in chosen:
            if name in of_levels and name not in defaults:
                takers = ", ".join(other for other in LEVELS if name in _LEVEL_DEFAULTS[other])
                raise ValueError(f"{name} is no option of level {level!r}, but of: {takers}")
        settings = cls(level=level, **{**defaults, **chosen})
        settings = settings._without_baselines_left_out(explicit="baselines" in chosen)
        settings._check()
        return settings

    @property
    def name(self) -> str:
        """Of the record's files."""
        return f"{self.level}-backward" if self.backward else self.level

    def to_json(self) -> dict[str, Any]:
        """The settings that the level takes, as JSON values."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {name: value for name, value in values.items() if value is not None or name == "features"}

    def texts(self, length: int) -> int:
        """Texts in a batch of texts of ``length`` tokens."""
        return max(1, self.batch_tokens // length) if self.batch_tokens else self.batch_size

    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as PyTorch has it."""
        return getattr(torch, self.dtype)

    def _without_baselines_left_out(self, explicit: bool) -> Settings:
        """A default baseline that does not take part is none, and the first contender stands in."""
        if explicit:
            return self
        present = tuple(name for name in self.baselines if name in self.models)
        return replace(self, baselines=present or self.models[:1])

    def _check(self) -> None:
        _choice("dtype", self.dtype, DTYPES)
        if not self.models:
            raise ValueError("models is empty: name at least one")
        if len(set(self.models)) < len(self.models):
            raise ValueError(f"models names one twice: {', '.join(self.models)}")
        for name in self.baselines:
            _choice("baseline", name, self.models)
        for name in self.limits:
            _choice("model in limits", name, self.models)
        for name in self.parts or ():
            _choice("part", name, MIXED_PARTS)
        if self.rounds < MINIMUM_ROUNDS:
            raise ValueError(
                f"rounds must be at least {MINIMUM_ROUNDS}, where a median's 95 % interval begins, got {self.rounds}"
            )
        for field_ in fields(self):
            value = getattr(self, field_.name)
            if field_.name in ("batch_size", "heads", "head_dim", "features") and value is not None and value < 1:
                raise ValueError(f"{field_.name} must be positive, got {value}")
            if field_.name in ("batch_tokens", "warmup", "seconds", "threads") and value < 0:
                raise ValueError(f"{field_.name} must not be negative, got {value}")
        if not self.lengths and self.level != "mixed":
            raise ValueError("lengths is empty: name at least one")
        _check_lengths("lengths", self.lengths)
        _check_lengths("limits", tuple(self.limits.values()))
        dropout = self.attention_dropout
        if dropout is not None and dropout != -1 and not 0 <= dropout < 1:
            raise ValueError(
                f"attention_dropout must be at least 0 and below 1, or -1 (the model's own), got {dropout}"
            )
        _check_device(self.device)


def _check_lengths(name: str, lengths: Sequence[int]) -> None:
    for length in lengths:
        # [CLS], a token and [SEP]; a window needs no more.
        if length < 3:
            raise ValueError(f"{name} must be at least 3 tokens, got {length}")


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; choose one of: cpu, cuda, cuda:0 …") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} is not there: PyTorch sees no CUDA device; choose cpu")


def _choice(what: str, name: str, choices: Sequence[str]) -> None:
    if name not in choices:
        raise ValueError(f"unknown {what} {name!r}; choose among: {', '.join(choices)}")
