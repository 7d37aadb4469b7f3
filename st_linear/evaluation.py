"""Correlations with intervals, and Sentence Transformers' similarity evaluator over several text lengths."""

from __future__ import annotations

import csv
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from scipy.stats import norm, pearsonr, spearmanr, t
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.util import cos_sim, pairwise_cos_sim
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from st_linear.data import evenly_spaced, token_counts
from st_linear.protocols import check_protocol, lengthen
from st_linear.references import BM25

logger = logging.getLogger(__name__)

METRICS = ("pearson", "spearman")

NATURAL = "natural"
"""Stands for the protocol, where texts keep the length they have."""

# A batch of natural sentences stays as large as asked up to this many tokens a text.
_TOKENS_PER_TEXT = 256

_TOKENS_PER_BATCH = 8192

_TEXTS_FOR_TOKENS = 64

# Float32 vectors of equal texts differ by some 1e-6 from batch to batch, and so their cosine from 1 by 1e-12; the
# least that a sentence among 8,192 tokens of the same filler moves it is 1e-7.
_SPREAD_OF_A_CONSTANT = 1e-9


class UndefinedCorrelationError(ValueError):
    """Predictions that no correlation is defined for: some are not finite, or all are equal."""


@dataclass(frozen=True)
class Correlation:
    """
    Pearson's and Spearman's correlation of ``n`` pairs, each with the bounds of its confidence interval.

    All figures but ``n`` lie in [-1, 1].
    """

    pearson: float
    pearson_low: float
    pearson_high: float
    spearman: float
    spearman_low: float
    spearman_high: float
    n: int

    def as_dict(self) -> dict[str, Any]:
        """
        Turn the figures into JSON values.

        Returns:
            The fields by name.
        """
        return asdict(self)


def correlation(
    predictions: Sequence[float] | np.ndarray, labels: Sequence[float] | np.ndarray, *, confidence_level: float = 0.95
) -> Correlation:
    r"""
    Correlate predictions with labels.

    Both intervals come from Fisher's transformation, :math:`\tanh(\operatorname{artanh} r \pm z \cdot s)`, with the
    standard error :math:`s = 1/\sqrt{n - 3}` for Pearson's and Bonett and Wright's
    :math:`s = \sqrt{(1 + r^2/2)/(n - 3)}` for Spearman's correlation.

    Args:
        predictions: One number per pair.
        labels: One number per pair.
        confidence_level: The probability that an interval shall cover, between 0 and 1.

    Returns:
        Both correlations with their intervals.

    Raises:
        ValueError: If the two differ in length, there are fewer than 4 pairs, or the labels hold NaN or an infinity or
            are constant, for which a correlation is not defined.
        UndefinedCorrelationError: A ValueError: if the predictions do, or are constant but for rounding.

    References:
        - Bonett and Wright (2000), Sample size requirements for estimating Pearson, Kendall and Spearman correlations,
          Psychometrika 65, 23–28: https://doi.org/10.1007/BF02294183

    Example:
        >>> from st_linear.evaluation import correlation
        >>> result = correlation([0.1, 0.4, 0.35, 0.8, 0.9], [0, 2, 3, 4, 5])
        >>> round(result.spearman, 6), result.n
        (0.9, 5)
        >>> result.pearson_low < result.pearson < result.pearson_high
        True
    """
    if not 0 < confidence_level < 1:
        raise ValueError(f"confidence_level={confidence_level!r} must be between 0 and 1")
    x = _numbers("predictions", predictions)
    y = checked_labels("labels", labels)
    if len(x) != len(y):
        raise ValueError(f"predictions has {len(x)} values, labels {len(y)}; they must be as many")
    n = len(x)
    if not np.isfinite(x).all():
        raise UndefinedCorrelationError(f"{np.sum(~np.isfinite(x))} of {n} predictions are not finite")
    if np.ptp(x) <= _SPREAD_OF_A_CONSTANT * np.abs(x).max():
        raise UndefinedCorrelationError(f"all {n} predictions are {x[0]:g}")
    pearson = pearsonr(x, y)
    interval = pearson.confidence_interval(confidence_level)
    rank = float(spearmanr(x, y).statistic)
    # Perfect agreement of ranks lies at infinity on Fisher's scale, where its interval is one point.
    z = math.copysign(math.inf, rank) if abs(rank) >= 1 else math.atanh(rank)
    margin = float(norm.ppf(0.5 + confidence_level / 2)) * math.sqrt((1 + rank**2 / 2) / (n - 3))
    return Correlation(
        pearson=float(pearson.statistic),
        pearson_low=float(interval.low),
        pearson_high=float(interval.high),
        spearman=rank,
        spearman_low=math.tanh(z - margin),
        spearman_high=math.tanh(z + margin),
        n=n,
    )


def correlation_or_reason(
    predictions: Sequence[float] | np.ndarray, labels: Sequence[float] | np.ndarray
) -> dict[str, Any]:
    """
    Correlate predictions with labels, or say why there is no correlation.

    Args:
        predictions: As for :func:`correlation`.
        labels: Likewise.

    Returns:
        The fields of a :class:`Correlation`, all but ``n`` None where it is not defined, and ``undefined``: why, or
        None.

    Raises:
        ValueError: As :func:`correlation`, but for predictions that have none.
    """
    try:
        return {**correlation(predictions, labels).as_dict(), "undefined": None}
    except UndefinedCorrelationError as error:
        nothing: dict[str, Any] = {field.name: None for field in fields(Correlation)}
        return {**nothing, "n": len(labels), "undefined": str(error)}


@dataclass(frozen=True)
class Mean:
    """
    The mean over seeds, with the bounds of its confidence interval, which a single seed has none of.

    The interval is Student's, mean ± t · s/√n, for what another draw of seeds would give on the same pairs.
    """

    mean: float
    low: float | None
    high: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float], confidence_level: float = 0.95) -> Mean:
        """
        Average figures of one seed each; paired differences between two models, seed by seed, as well.

        Args:
            values: One per seed.
            confidence_level: The probability that the interval shall cover.

        Raises:
            ValueError: If there is no value.
        """
        if not values:
            raise ValueError("values is empty: a mean needs at least one seed")
        average = float(np.mean(values))
        if len(values) == 1:
            return cls(average, None, None, 1)
        margin = (
            float(t.ppf(0.5 + confidence_level / 2, len(values) - 1) * np.std(values, ddof=1)) / len(values) ** 0.5
        )
        return cls(average, average - margin, average + margin, len(values))


def report_correlation(metric: str, correlation: Correlation) -> str:
    """
    Format one correlation for a table, times 100.

    Args:
        metric: ``"pearson"`` or ``"spearman"``.
        correlation: The figures.

    Returns:
        The value and its interval, e.g. ``"82.74 [81.0, 84.3]"``.

    Raises:
        ValueError: If ``metric`` is neither.
    """
    figures = correlation.as_dict()
    value, low, high = (100 * figures[f"{_metric('metric', metric)}{bound}"] for bound in ("", "_low", "_high"))
    return f"{value:.2f} [{low:.1f}, {high:.1f}]"


class LengthSimilarityEvaluator(EmbeddingSimilarityEvaluator):
    """
    Evaluate a model on sentence pairs whose texts are brought to lengths in tokens, by one protocol or several.

    A protocol says how a text becomes long (see :func:`~st_linear.protocols.lengthen`), and what the figures mean.
    Predictions are cosine similarities.

    After a call, ``results[protocol][length]`` holds the figures of each cell, and ``results["natural"][None]`` those
    of the natural length, where it is one of ``lengths``: the fields of :class:`Correlation`, ``undefined`` (None, or
    why there is no correlation; its figures are None then), ``mean_tokens`` (what the model reads of a text, after
    truncation), ``truncated`` (share of the texts that are longer than the model's ``max_seq_length``),
    ``mean_pairwise_cosine`` (of all texts with one another: near 1, vectors have drifted together), ``seconds``
    (encoding alone) and ``tokens_per_second``.

    Args:
        sentences1: The first sentences of the pairs.
        sentences2: The second sentences.
        scores: The gold similarities, on any scale.
        lengths: Lengths in tokens, special tokens and the model's default prompt included; None is the natural
            length.
        protocols: Some of :func:`~st_linear.protocols.protocol_names`; each is asked at each of ``lengths`` that is a
            number.
        seed: Of what the protocols draw.
        primary_length: The one of ``lengths`` whose figure is the primary metric; by default the first.
        primary_protocol: The one of ``protocols`` likewise.
        main_metric: The primary metric's kind, ``"pearson"`` or ``"spearman"``.
        batch_size: Texts per batch up to 256 tokens a text. Longer texts go in proportionally smaller batches, so
            memory stays about that of ``batch_size * 256`` tokens.
        measured_by: A model whose tokenizer and default prompt measure lengths; by default the one that is evaluated,
            but :class:`~st_linear.references.BM25` has neither.
        name: The data's name, prefix of the metrics and part of the CSV file's name.
        show_progress_bar: Show progress over the cells and within each.
        write_csv: Append one row per cell and call to a CSV file in ``output_path``.

    Raises:
        ValueError: If the three columns differ in length, hold fewer than 4 pairs or equal scores alone, ``lengths``
            or ``protocols`` is empty or has doubles, or an argument is none of its choices. On a call: if a text is
            longer than one of ``lengths``.

    References:
        - Length-Induced Embedding Collapse in Transformer-based Models: https://arxiv.org/abs/2410.24200

    Relations:
        - ``EmbeddingSimilarityEvaluator`` is the same at natural length, with a choice of similarities and of
          precision.

    Example:
        ::

            from st_linear import load
            from st_linear.data import load_pairs
            from st_linear.evaluation import LengthSimilarityEvaluator

            pairs = load_pairs("sentence-transformers/stsb", "test")
            evaluator = LengthSimilarityEvaluator(
                pairs["sentence1"],
                pairs["sentence2"],
                pairs["score"],
                lengths=(None, 512, 2048),
                protocols=("repeat", "document"),
                name="stsb",
            )
            metrics = evaluator(load("my-model"))
            # metrics["stsb_spearman_cosine"], metrics["stsb_document_2048_pearson_cosine"], …
            # evaluator.results["document"][2048]["tokens_per_second"], …
    """

    def __init__(
        self,
        sentences1: Sequence[str],
        sentences2: Sequence[str],
        scores: Sequence[float],
        *,
        lengths: Sequence[int | None] = (None,),
        protocols: Sequence[str] = ("repeat",),
        seed: int = 0,
        primary_length: int | None = None,
        primary_protocol: str | None = None,
        main_metric: Literal["pearson", "spearman"] = "spearman",
        batch_size: int = 32,
        measured_by: SentenceTransformer | None = None,
        name: str = "",
        show_progress_bar: bool = False,
        write_csv: bool = True,
    ) -> None:
        if not len(sentences1) == len(sentences2) == len(scores):
            raise ValueError(
                f"sentences1, sentences2 and scores have {len(sentences1)}, {len(sentences2)} and {len(scores)} "
                "entries; they must be as many"
            )
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r} must be a positive integer")
        checked_labels("scores", scores)
        self.lengths = _checked_lengths(lengths)
        self.protocols = _checked_protocols(protocols)
        if primary_length is not None and primary_length not in self.lengths:
            raise ValueError(f"primary_length={primary_length!r} is none of lengths={self.lengths!r}")
        if primary_protocol is not None and primary_protocol not in self.protocols:
            raise ValueError(f"primary_protocol={primary_protocol!r} is none of protocols={self.protocols!r}")
        self.primary_length = self.lengths[0] if primary_length is None else primary_length
        self.main_metric = _metric("main_metric", main_metric)
        self.seed = seed
        self.measured_by = measured_by
        super().__init__(
            list(sentences1),
            list(sentences2),
            list(scores),
            batch_size=batch_size,
            similarity_fn_names=["cosine"],
            name=name,
            show_progress_bar=show_progress_bar,
            write_csv=write_csv,
        )
        self.csv_file = f"length_{self.csv_file}"
        self.csv_headers = [
            *self.csv_headers[:2],
            "protocol",
            "length",
            *self.csv_headers[2:],
            "mean_tokens",
            "truncated",
        ]
        protocol = NATURAL if self.primary_length is None else primary_protocol or self.protocols[0]
        prefix = f"{name}_" if name else ""
        self.primary_metric = f"{prefix}{_metric_key(protocol, self.primary_length, self.main_metric)}"
        self.results: dict[str, dict[int | None, dict[str, Any]]] = {}
        self._prepared: dict[tuple[str, int | None], tuple[Any, str, Dataset, np.ndarray]] = {}

    def __call__(  # type: ignore[override]  # narrows the model, as its parent does
        self, model: SentenceTransformer | BM25, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """
        Evaluate a model at every length, by every protocol.

        Args:
            model: The model.
            output_path: Folder for the CSV file; None writes none.
            epoch: Training's epoch, for the CSV file and the model card; -1 outside training.
            steps: Training's step, likewise.

        Returns:
            ``{name}_pearson_cosine`` and ``{name}_spearman_cosine`` for the natural length,
            ``{name}_{protocol}_{length}_pearson_cosine`` and so on for the others; NaN where it is undefined.
        """
        results: dict[str, dict[int | None, dict[str, Any]]] = {}
        metrics: dict[str, float] = {}
        for protocol, length in tqdm(self._cells(), desc="Lengths", unit="cell", disable=not self.show_progress_bar):
            figures = self._evaluate(model, protocol, length)
            results.setdefault(protocol, {})[length] = figures
            for metric in METRICS:
                value = figures[metric]
                metrics[_metric_key(protocol, length, metric)] = math.nan if value is None else value
            logger.info(
                "%s, %s: %s (%.0f tokens a text)",
                self.name or "Similarity",
                "natural length" if length is None else f"{protocol} at {length} tokens",
                figures["undefined"] or "Pearson {pearson:.4f}, Spearman {spearman:.4f}".format(**figures),
                figures["mean_tokens"],
            )
        self.results = results
        if output_path is not None and self.write_csv:
            self._append_csv(Path(output_path), epoch, steps)
        metrics = self.prefix_name_to_metrics(metrics, self.name)
        if not isinstance(model, BM25):
            self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        return metrics

    def _cells(self) -> list[tuple[str, int | None]]:
        cells: list[tuple[str, int | None]] = [(NATURAL, None)] if None in self.lengths else []
        return cells + [(name, length) for name in self.protocols for length in self.lengths if length is not None]

    def embed_inputs(self, model: SentenceTransformer, sentences: Any, **kwargs: Any) -> np.ndarray:
        """
        Encode texts.

        Args:
            model: The model.
            sentences: The texts.
            **kwargs: Go to ``model.encode`` and override this evaluator's own settings.

        Returns:
            One row per text.
        """
        settings = {"batch_size": self.batch_size, "show_progress_bar": self.show_progress_bar, **kwargs}
        return model.encode(sentences, convert_to_numpy=True, **settings)

    def get_config_dict(self) -> dict[str, Any]:
        """
        List what the model card shall tell of this evaluator.

        Returns:
            The lengths and the protocols that brought the texts to them.
        """
        return {"lengths": list(self.lengths), "protocols": list(self.protocols), "seed": self.seed}

    def _evaluate(self, model: SentenceTransformer | BM25, protocol: str, length: int | None) -> dict[str, Any]:
        pairs, counts = self.pairs_at(model, protocol, length)
        limit = (None if isinstance(model, BM25) else model.max_seq_length) or math.inf
        read = np.minimum(counts, limit)
        collapse: float | None = None
        start = time.perf_counter()
        if isinstance(model, BM25):
            predictions = model.similarities(pairs["sentence1"], pairs["sentence2"])
            seconds = time.perf_counter() - start
        else:
            batch_size = max(1, int(self.batch_size * min(1.0, _TOKENS_PER_TEXT / max(1.0, read.max()))))
            embeddings = self.embed_inputs(model, _texts(pairs), batch_size=batch_size)
            seconds = time.perf_counter() - start
            # Between texts that are alike but for a sentence, cosines differ by less than float32 can tell.
            embeddings = embeddings.astype(np.float64)
            half = len(pairs)
            predictions = pairwise_cos_sim(embeddings[:half], embeddings[half:]).cpu().numpy()
            collapse = _mean_pairwise_cosine(embeddings)
        return {
            **correlation_or_reason(predictions, pairs["score"]),
            "mean_pairwise_cosine": collapse,
            "mean_tokens": float(read.mean()),
            "truncated": float((counts > limit).mean()),
            "seconds": seconds,
            "tokens_per_second": float(read.sum() / seconds),
        }

    def pairs_at(
        self, model: SentenceTransformer | BM25, protocol: str, length: int | None
    ) -> tuple[Dataset, np.ndarray]:
        """
        Make the pairs of a cell; they are kept for the next call with the same tokenizer.

        Args:
            model: The model that shall read them.
            protocol: One of ``protocols``, or ``"natural"``.
            length: One of ``lengths``.

        Returns:
            The pairs, and the numbers of tokens of all first texts, then of all second ones, prompt included.

        Raises:
            ValueError: If a text is longer than the length, or nothing measures lengths.
        """
        measure = self.measured_by or model
        if isinstance(measure, BM25):
            raise ValueError("BM25 has no tokenizer to measure lengths with: pass measured_by, a model")
        tokenizer = measure.tokenizer
        prompt = (measure.prompts.get(measure.default_prompt_name) if measure.default_prompt_name else None) or ""
        kept = self._prepared.get((protocol, length))
        if kept is not None and kept[0] is tokenizer and kept[1] == prompt:
            return kept[2], kept[3]
        pairs = Dataset.from_dict(
            {"sentence1": self.sentences1, "sentence2": self.sentences2, "score": [float(s) for s in self.scores]}
        )
        if length is not None:
            # encode() puts the prompt before every text; without room for it each text would lose its end.
            empty, prompted = token_counts(["", prompt], tokenizer)
            room = length - (prompted - empty)
            if room < 1:
                raise ValueError(f"length={length} has no room beside the default prompt of {prompted - empty} tokens")
            pairs = lengthen(pairs, tokenizer, room, protocol, seed=self.seed)
        texts = _texts(pairs)
        distinct = list(dict.fromkeys(texts))
        tokens = dict(zip(distinct, token_counts([prompt + text for text in distinct], tokenizer), strict=True))
        counts = np.array([tokens[text] for text in texts])
        self._prepared[protocol, length] = (tokenizer, prompt, pairs, counts)
        return pairs, counts

    def _append_csv(self, folder: Path, epoch: int, steps: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.csv_file
        new = not path.exists()
        with open(path, "a", newline="", encoding="utf-8") as handle:
            writer = csv.writer(handle)
            if new:
                writer.writerow(self.csv_headers)
            for protocol, length in self._cells():
                figures = self.results[protocol][length]
                row = [figures[key] for key in (*METRICS, "mean_tokens", "truncated")]
                writer.writerow([epoch, steps, protocol, NATURAL if length is None else length, *row])


class FidelityEvaluator(BaseEvaluator):
    """
    Measure how close a model's vectors are to those of a reference, such as the softmax model it was converted from.

    Per length: the mean and the 5th percentile of the texts' cosines, the mean cosine of the tokens of (at most 64 of)
    them, and the share of each text's ``neighbours`` nearest other texts that both models agree on.

    Args:
        texts: Texts by length in tokens. Both models read them cut at that length.
        reference: The model to be like. It is asked once, here.
        neighbours: How many nearest texts are compared; left out where there are fewer than four times as many texts.
        show_progress_bar: Show progress.
        name: Of the data, prefix of the metrics.

    Raises:
        ValueError: If there is no text, or on a call, if a model gives vectors of another size.

    Relations:
        - ``MSEEvaluator`` compares embeddings too, in squares, which say little of cosines.

    Example:
        ::

            reference = convert("sentence-transformers/all-MiniLM-L6-v2", feature_map="softmax")
            fidelity = FidelityEvaluator({512: texts}, reference)
            fidelity(convert("sentence-transformers/all-MiniLM-L6-v2"))
    """

    def __init__(
        self,
        texts: Mapping[int, Sequence[str]],
        reference: SentenceTransformer,
        *,
        neighbours: int = 10,
        show_progress_bar: bool = False,
        name: str = "",
    ) -> None:
        super().__init__()
        if not texts or not all(texts.values()):
            raise ValueError("texts holds none: name a length, and give texts for each")
        self.texts = {length: list(some) for length, some in texts.items()}
        self.neighbours = neighbours
        self.show_progress_bar = show_progress_bar
        self.name = name
        self.greater_is_better = True
        self.primary_metric = f"{name}_cosine" if name else "cosine"
        self.results: dict[int, dict[str, float]] = {}
        self._reference = {length: self._vectors(reference, length) for length in self.texts}

    def __call__(  # type: ignore[override]  # narrows the model, as Sentence Transformers' own evaluators do
        self, model: SentenceTransformer, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        """
        Compare a model with the reference.

        Args:
            model: The model.
            output_path: Not used: :attr:`results` has everything.
            epoch: Not used.
            steps: Not used.

        Returns:
            ``cosine``, the mean over lengths, and every figure of every length, e.g. ``cosine_512``.
        """
        self.results = {length: self._compare(model, length) for length in self.texts}
        figures = {f"{key}_{length}": value for length, some in self.results.items() for key, value in some.items()}
        figures["cosine"] = float(np.mean([some["cosine"] for some in self.results.values()]))
        metrics = self.prefix_name_to_metrics(figures, self.name)
        self.store_metrics_in_model_card_data(model, metrics, int(epoch), steps)
        return metrics

    def _compare(self, model: SentenceTransformer, length: int) -> dict[str, float]:
        pooled, tokens = self._reference[length]
        own, own_tokens = self._vectors(model, length)
        if own.shape != pooled.shape:
            raise ValueError(f"the model gives {own.shape[-1]} numbers a text, the reference {pooled.shape[-1]}")
        cosines = F.cosine_similarity(own, pooled)
        figures = {
            "n": float(len(pooled)),
            "cosine": cosines.mean().item(),
            "cosine_p5": cosines.quantile(0.05).item(),
            "token_cosine": torch.cat([F.cosine_similarity(a, b) for a, b in zip(own_tokens, tokens)]).mean().item(),
        }
        if len(pooled) >= 4 * self.neighbours:
            nearest = [self._nearest(x) for x in (own, pooled)]
            shared = [len(set(a) & set(b)) for a, b in zip(*nearest)]
            figures[f"neighbours_{self.neighbours}"] = float(np.mean(shared)) / self.neighbours
        return figures

    def _nearest(self, vectors: Tensor) -> list[list[int]]:
        similarity = cos_sim(vectors, vectors).fill_diagonal_(-math.inf)
        return similarity.topk(self.neighbours).indices.tolist()

    def _vectors(self, model: SentenceTransformer, length: int) -> tuple[Tensor, list[Tensor]]:
        """Embeddings of the texts of a length, and those of the tokens of some, in float32 on the CPU."""
        texts, limit = self.texts[length], model.max_seq_length
        if limit is not None and length > limit:
            raise ValueError(f"texts of {length} tokens are longer than the model reads, max_seq_length={limit}")
        # The vectors of all tokens of all texts may be more than memory holds.
        whole = set(evenly_spaced(range(len(texts)), _TEXTS_FOR_TOKENS))
        encode = partial(
            model.encode,
            batch_size=max(1, _TOKENS_PER_BATCH // length),
            show_progress_bar=self.show_progress_bar,
        )
        model.max_seq_length = length
        try:
            outputs: Any = encode([texts[index] for index in sorted(whole)], output_value=None)
            pooled = {index: output["sentence_embedding"] for index, output in zip(sorted(whole), outputs)}
            rest = [index for index in range(len(texts)) if index not in whole]
            if rest:
                pooled |= zip(rest, encode([texts[index] for index in rest], convert_to_tensor=True))
        finally:
            model.max_seq_length = limit
        tokens = [output["token_embeddings"][output["attention_mask"].bool()].float().cpu() for output in outputs]
        return torch.stack([pooled[index] for index in range(len(texts))]).float().cpu(), tokens


def _texts(pairs: Dataset) -> list[str]:
    return [*pairs["sentence1"], *pairs["sentence2"]]


def _mean_pairwise_cosine(embeddings: np.ndarray) -> float | None:
    """Of all pairs of different rows: one minus it is what is left to tell texts apart. None if not all are finite."""
    if not np.isfinite(embeddings).all():
        return None
    units = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    count = len(units)
    return float((np.square(units.sum(0)).sum() - count) / (count * (count - 1)))


def _metric_key(protocol: str, length: int | None, metric: str) -> str:
    return f"{metric}_cosine" if length is None else f"{protocol}_{length}_{metric}_cosine"


def _metric(argument: str, metric: str) -> str:
    if metric not in METRICS:
        raise ValueError(f"{argument}={metric!r} is none of {', '.join(METRICS)}")
    return metric


def _checked_protocols(protocols: Sequence[str]) -> tuple[str, ...]:
    if isinstance(protocols, str):
        raise ValueError(f"protocols={protocols!r} must be a sequence of names: ({protocols!r},)")
    checked = tuple(protocols)
    if not checked or len(set(checked)) != len(checked):
        raise ValueError(f"protocols={checked!r} must hold at least one name, and each only once")
    for protocol in checked:
        check_protocol(protocol)
    return checked


def _checked_lengths(lengths: Sequence[int | None]) -> tuple[int | None, ...]:
    checked = tuple(lengths)
    if not checked or len(set(checked)) != len(checked):
        raise ValueError(f"lengths={checked!r} must hold at least one length, and each only once")
    for length in checked:
        if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
            raise ValueError(f"lengths={checked!r}: {length!r} is neither None (natural) nor a positive integer")
    return checked


def checked_labels(name: str, values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Gold scores as an array.

    Raises:
        ValueError: If they are fewer than 4, not all finite, or all equal: nothing correlates with such.
    """
    array = _numbers(name, values)
    if not np.isfinite(array).all():
        position = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ValueError(f"{name}[{position}] is {array[position]}; every value must be finite")
    if (array == array[0]).all():
        raise ValueError(f"{name} are all {array[0]:g}; a correlation with a constant is not defined")
    return array


def _numbers(name: str, values: Sequence[float] | np.ndarray) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {array.shape}; one number per pair is needed")
    if len(array) < 4:
        raise ValueError(f"{name} has {len(array)} values; a correlation with an interval needs at least 4")
    return array
