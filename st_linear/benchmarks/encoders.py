"""Whole encoders as contenders: forward pass, training step, and batches of mixed length."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device
from torch import Tensor

from st_linear import memory
from st_linear.adapters import NO_ADAPTER
from st_linear.benchmarks.contenders import MapSpec, performer_attention
from st_linear.benchmarks.settings import Settings
from st_linear.benchmarks.timing import Step
from st_linear.benchmarks.workloads import Workload, over_limit
from st_linear.conversion import AttentionCall, attention_calls, observe_attention
from st_linear.data import load_pairs, repeat_to_length, source_name, training_sentences
from st_linear.export import export, require_for
from st_linear.feed_forward import unchunk_feed_forward
from st_linear.models import convert, load
from st_linear.recipe import packaged_base
from st_linear.runtimes import FILES, arguments_for

ENCODE_BATCH_SIZE = 32
"""Of ``model.encode``: Sentence Transformers' own default."""

NUM_BATCHES = 4
"""Batches of sentences at random in one call of a step."""

PADDED = " padded"
"""Ends the name of a contender of the level ``mixed`` that pads; its twin takes packed inputs."""

ENCODER_PEERS = ("softmax", "no-attention", "no-attention-whole", "performer")
"""Contenders of the encoder levels that are not st_linear's; ``performer`` takes ``[:features]``.

``softmax`` is transformers' own encoder, and so is ``no-attention-whole`` but for its attention. The others have what
st_linear's own have for inference on the CPU: feed-forward modules in chunks, large tensors in memory used before.

At the level ``encoder``, ``softmax`` and st_linear's own also run as exported graphs: ``FORMAT:MODEL``, with one of
:data:`~st_linear.runtimes.FILES`, e.g. ``onnx:softmax``.
"""

_DROPOUT_OPTIONS = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")
"""Names under which transformers' encoder configs hold the dropout of attention weights."""

_BYTES_PER_WEIGHT = 9
"""What PyTorch's plain form of attention keeps per weight for the backward pass: two floats and a mask."""


def check_encoder(name: str, settings: Settings) -> None:
    """Find out before the work, not after it, that there is no such contender.

    Raises:
        ValueError: If the name is unknown, or the contender can't do the level.
    """
    head, _, rest = name.partition(":")
    if head == "performer":
        performer_attention(rest, 32)
        if settings.level == "mixed":
            raise ValueError(f"model {name!r} takes no mask and no packed inputs: leave it out of level 'mixed'")
    elif head in FILES:
        if settings.level != "encoder" or settings.dtype != "float32" or settings.device != "cpu":
            raise ValueError(f"model {name!r} runs at level 'encoder', in float32, on the CPU alone")
        if rest != "softmax":
            MapSpec.parse(rest, settings.features, peers="softmax")
        require_for(head)
    elif name not in ENCODER_PEERS:
        MapSpec.parse(name, settings.features, peers=", ".join(ENCODER_PEERS))


@dataclass
class Encoder:
    """One contender, loaded.

    Attributes:
        model: The whole model.
        observer: Stands in for the attention of every layer, or None.
        as_in_transformers: Whether all that is not attention runs as transformers has it: whole, in memory of its own.
    """

    model: SentenceTransformer
    observer: Callable[[AttentionCall], Tensor] | None = None
    as_in_transformers: bool = False

    @property
    def transformer(self) -> Any:
        """The model's first module."""
        return self.model[0]

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """For training steps; made when the first one needs it."""
        return torch.optim.AdamW(self.model.parameters(), lr=1e-6)

    def embed(self, features: dict[str, Any]) -> Tensor:
        """Embeddings of a batch, as ``encode`` computes them."""
        self.model.eval()
        with torch.inference_mode(), self._observed():
            return self.model(features)["sentence_embedding"]

    def encode(self, texts: list[str]) -> None:
        """``model.encode``, tokenisation and sorting by length included."""
        with self._observed():
            self.model.encode(texts, batch_size=ENCODE_BATCH_SIZE, show_progress_bar=False)

    def train(self, features: dict[str, Any]) -> None:
        """One training step: forward, a loss on the pooled output, backward, optimizer."""
        # Not only where the model says that it isn't: its transformer is loaded for evaluation on its own.
        self.model.train()
        with self._observed():
            embedding = self.model(features)["sentence_embedding"]
        # Not the embedding's norm: where the model normalises, that has no gradient.
        direction = torch.linspace(-1, 1, embedding.shape[-1], device=embedding.device, dtype=embedding.dtype)
        (embedding @ direction).square().mean().backward()
        self.optimizer.step()
        # At the end, so that gradients count as memory of the step, and not as held before it.
        self.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def _observed(self) -> Iterator[None]:
        with (
            nullcontext() if self.observer is None else observe_attention(self.observer),
            memory.left_out() if self.as_in_transformers else nullcontext(),
        ):
            yield


@dataclass
class Encoders:
    """The contenders of a run, each loaded once, and kept.

    Attributes:
        settings: Of the run.
        max_seq_length: Of every model.
    """

    settings: Settings
    max_seq_length: int
    loaded: dict[str, Encoder] = field(default_factory=dict)
    exported: dict[str, TemporaryDirectory[str]] = field(default_factory=dict)

    @cached_property
    def base(self) -> SentenceTransformer:
        """The model that all of them are made from."""
        name = self.settings.base or packaged_base()
        dropout = self.settings.attention_dropout
        if dropout is None or dropout < 0:
            return load(name, device="cpu")
        model = load(name, device="cpu", config_kwargs=dict.fromkeys(_DROPOUT_OPTIONS, dropout))
        found = dropout_of(model)
        if found != dropout:
            raise ValueError(f"attention_dropout={dropout} can't be set: {name} has {found}, by another option's name")
        return model

    @cached_property
    def attention_dropout(self) -> float:
        """The dropout of attention weights that the models train with."""
        return dropout_of(self.base)

    @cached_property
    def num_heads(self) -> int:
        """Heads of all layers together."""
        return sum(call.query.shape[1] for call in attention_calls(Encoder(self.base).transformer.model))

    @property
    def tokenizer(self) -> Any:
        """Of all of them."""
        return Encoder(self.base).transformer.tokenizer

    @property
    def vocab_size(self) -> int:
        """Of all of them."""
        return Encoder(self.base).transformer.model.config.vocab_size

    def __getitem__(self, name: str) -> Encoder:
        if name not in self.loaded:
            self.loaded[name] = self._make(name)
        return self.loaded[name]

    def _make(self, name: str) -> Encoder:
        bare = name.removesuffix(PADDED)
        head, _, rest = bare.partition(":")
        if head in FILES:
            return Encoder(load(self._exported(rest), device="cpu", **arguments_for(head)))
        if head in ENCODER_PEERS:
            encoder = Encoder(self._convert(feature_map="softmax"))
            if head == "softmax":
                # transformers' own; the conversion has given it the longer context alone.
                encoder.transformer.model.set_attn_implementation("sdpa")
            elif head.startswith("no-attention"):
                encoder.observer = _value_of
            else:
                encoder.observer = _performer(rest, self.settings)
            if head in ("softmax", "no-attention-whole"):
                encoder.as_in_transformers = True
                unchunk_feed_forward(encoder.transformer.model)
        else:
            encoder = Encoder(self._convert_to(bare))
        encoder.model.to(self.settings.device, self.settings.torch_dtype())
        # Packed where the model can: padding is what the twins are for.
        encoder.transformer.unpad_inputs = False if name.endswith(PADDED) or head == "softmax" else None
        return encoder

    def _exported(self, bare: str) -> str:
        """A folder with a model in all formats that take part."""
        if bare not in self.exported:
            folder = TemporaryDirectory()
            model = self._convert(feature_map="softmax") if bare == "softmax" else self._convert_to(bare)
            formats = [name for name in FILES if f"{name}:{bare}" in self.settings.models]
            export(model, Path(folder.name) / "model", formats)
            self.exported[bare] = folder
        return str(Path(self.exported[bare].name) / "model")

    def _convert_to(self, bare: str) -> SentenceTransformer:
        spec = MapSpec.parse(bare, self.settings.features)
        return self._convert(feature_map=spec.feature_map, feature_map_kwargs=spec.options or None, window=spec.window)

    def _convert(self, **options: Any) -> SentenceTransformer:
        options = {"window": 0, "max_seq_length": self.max_seq_length, "seed": self.settings.seed, **options}
        return convert(self.base, adapter=NO_ADAPTER, **options)


def encoder_workloads(settings: Settings) -> Iterator[Workload]:
    """Levels ``encoder`` and ``training``: batches of random tokens, all texts of one length."""
    encoders = Encoders(settings, max(settings.lengths))
    for length in settings.lengths:
        texts = settings.texts(length)
        skipped = over_limit(settings, length)
        if settings.level == "training":
            skipped = {**_too_large(settings, encoders, [length] * texts), **skipped}
        names = [name for name in settings.models if name not in skipped]
        yield Workload(
            name=str(length),
            tokens=texts * length,
            documents=texts,
            longest=length,
            build=_encoder_builder(settings, encoders, names, length),
            skipped=skipped,
            about=_dropout_in_record(settings, encoders),
        )


def mixed_workloads(settings: Settings) -> Iterator[Workload]:
    """Level ``mixed``: sentences at random in batches, ``encode`` of all sentences, and long texts of mixed length."""
    assert settings.data is not None
    assert settings.parts is not None
    encoders = Encoders(settings, max([512, *(2 * length for length in settings.lengths)]))
    sentences = training_sentences(load_pairs(settings.data, "test"))
    for part in settings.parts:
        kind = part.partition("-")[2]
        if part.startswith("long"):
            for length in settings.lengths:
                texts = _long_texts(sentences, encoders, length)
                yield _mixed_workload(f"{length}-{kind}", kind, [texts], encoders, {"part": part})
        else:
            batches = [sentences] if kind == "encode" else _random_batches(sentences, settings)
            about = {"part": part, "data": source_name(settings.data)}
            yield _mixed_workload(part, kind, batches, encoders, about)


def mixed_models(settings: Settings) -> list[str]:
    """The contenders of the level ``mixed``: st_linear's twice, packed and padded."""
    return [twin for name in settings.models for twin in ((name,) if name == "softmax" else (name, f"{name}{PADDED}"))]


def dropout_of(model: SentenceTransformer) -> float:
    """The dropout of attention weights that a model trains with."""
    converted = convert(model, feature_map="softmax")
    seen: list[float] = []

    def note(call: AttentionCall) -> Tensor:
        seen.append(call.dropout_p)
        return call.query

    converted.train()
    with torch.no_grad(), observe_attention(note):
        Encoder(converted).transformer.model(input_ids=torch.arange(3, device=converted.device)[None])
    return max(seen)


def _encoder_builder(
    settings: Settings, encoders: Encoders, names: Sequence[str], length: int
) -> Callable[[], dict[str, Step]]:
    def build() -> dict[str, Step]:
        generator = torch.Generator().manual_seed(settings.seed)
        # Ids below 1,000 hold special tokens in many vocabularies, padding among them.
        size = encoders.vocab_size
        low = min(1000, size // 2)
        ids = torch.randint(low, size, (settings.texts(length), length), generator=generator)
        features = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        features = batch_to_device(features, torch.device(settings.device))
        return {name: _step(encoders[name], settings.level, [features]) for name in names}

    return build


def _mixed_workload(
    name: str, kind: str, batches: list[list[str]], encoders: Encoders, about: dict[str, Any]
) -> Workload:
    settings = encoders.settings
    counts = [_token_counts(texts, encoders) for texts in batches]
    longest = max(max(lengths) for lengths in counts)
    skipped = over_limit(settings, longest)
    if kind == "training":
        padded = max(([max(lengths)] * len(lengths) for lengths in counts), key=sum)
        skipped = {**_too_large(settings, encoders, padded), **skipped}
        about = {**about, **_dropout_in_record(settings, encoders)}
    skipped.update({f"{model}{PADDED}": reason for model, reason in skipped.items() if model != "softmax"})
    names = [model for model in mixed_models(settings) if model not in skipped]
    tokens = sum(map(sum, counts))
    slots = sum(max(lengths) * len(lengths) for lengths in counts)

    def build() -> dict[str, Step]:
        if kind == "encode":
            return {model: _encode_step(encoders[model], batches[0]) for model in names}
        steps = {}
        for model in names:
            encoder = encoders[model]
            device = torch.device(settings.device)
            features = [batch_to_device(encoder.model.preprocess(texts), device) for texts in batches]
            steps[model] = _step(encoder, kind, features)
        return steps

    if kind == "encode":
        about = {**about, "batch_size": ENCODE_BATCH_SIZE}
    else:
        about = {**about, "batches": len(batches), "padding": round(1 - tokens / slots, 4)}
    return Workload(
        name=name,
        tokens=tokens,
        documents=sum(map(len, batches)),
        longest=longest,
        build=build,
        skipped=skipped,
        about=about,
    )


def _step(encoder: Encoder, level: str, batches: Sequence[dict[str, Any]]) -> Step:
    # No outputs are returned: an encoder's memory counts beyond what is held before the step, embeddings included.
    work = encoder.train if level == "training" else encoder.embed

    def step() -> None:
        for features in batches:
            work(features)

    return step


def _encode_step(encoder: Encoder, texts: list[str]) -> Step:
    return lambda: encoder.encode(texts)


def _random_batches(sentences: list[str], settings: Settings) -> list[list[str]]:
    order = random.Random(settings.seed).sample(range(len(sentences)), len(sentences))
    size = settings.batch_size
    if len(sentences) < size:
        raise ValueError(f"batch_size={size} is more than the {len(sentences)} test sentences of {settings.data}")
    batches = [order[start : start + size] for start in range(0, NUM_BATCHES * size, size)]
    return [[sentences[index] for index in batch] for batch in batches if len(batch) == size]


def _long_texts(sentences: list[str], encoders: Encoders, length: int) -> list[str]:
    """Texts whose lengths are drawn log-uniformly between half and twice ``length``."""
    settings = encoders.settings
    generator = random.Random(settings.seed)
    tokenizer = encoders.tokenizer
    # Two at the least: one alone has no other to be padded to.
    count = max(2, settings.texts(length))
    # The shortest sentences repeat to within a few tokens of what was drawn.
    short = sorted(sentences, key=len)[: max(count, 1)]
    return [
        repeat_to_length([short[index % len(short)]], tokenizer, round(length * 2 ** generator.uniform(-1, 1)))[0]
        for index in range(count)
    ]


def _token_counts(texts: list[str], encoders: Encoders) -> list[int]:
    ids = encoders.tokenizer(texts, truncation=False, verbose=False)["input_ids"]
    return [min(len(tokens), encoders.max_seq_length) for tokens in ids]


def _dropout_in_record(settings: Settings, encoders: Encoders) -> dict[str, Any]:
    return {} if settings.attention_dropout is None else {"attention_dropout": encoders.attention_dropout}


def _too_large(settings: Settings, encoders: Encoders, lengths: list[int]) -> dict[str, str]:
    """``softmax``, where its training step would take more memory than the CPU's machine has left.

    With dropout, PyTorch has no fused attention for the CPU: its plain form keeps T × T weights of every layer, and
    Linux ends a process that asks for too much rather than refuse it.
    """
    available = _available_mib()
    if "softmax" not in settings.models or settings.device != "cpu" or available is None:
        return {}
    if encoders.attention_dropout == 0:
        return {}
    needed = encoders.num_heads * _BYTES_PER_WEIGHT * sum(length**2 for length in lengths) / 2**20
    if needed < available:
        return {}
    return {"softmax": f"its T × T weights need about {needed / 1024:.0f} GiB"}


def _available_mib() -> float | None:
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) / 2**10 if "MemAvailable" in lines else None


def _value_of(call: AttentionCall) -> Tensor:
    return call.value


def _performer(rest: str, settings: Settings) -> Callable[[AttentionCall], Tensor]:
    made: dict[int, torch.nn.Module] = {}

    def attend(call: AttentionCall) -> Tensor:
        head_dim = call.query.shape[-1]
        if head_dim not in made:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(settings.seed)
                made[head_dim] = performer_attention(rest, head_dim, settings.features).to(call.query.device)
        return made[head_dim](call.query, call.key, call.value)

    return attend
