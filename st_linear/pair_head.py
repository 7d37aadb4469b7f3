"""The pair-scoring head of DSE: a score from two sentence embeddings, richer than their cosine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Module
from sentence_transformers.cross_encoder.evaluation import CrossEncoderCorrelationEvaluator
from torch import Tensor, nn
from tqdm.auto import trange


class DSEHead(Module):
    """Scores a pair of embeddings with an MLP on ``[u, v, u∗v, |u - v|]``.

    As the last module of a SentenceTransformer it hands its input on unchanged, and is saved and loaded with the
    model. :class:`PairScorer` scores texts with it, :class:`PairScoreEvaluator` measures those scores.

    Args:
        embedding_dimension: Size of u and v.
        hidden_dimension: Size of the hidden layer, ``embedding_dimension`` by default.

    References:
        - Scalable Attentive Sentence-Pair Modeling via Distilled Sentence Embedding: https://arxiv.org/abs/1908.05161

    Example:
        >>> import torch
        >>> DSEHead(384).logits(torch.randn(8, 384), torch.randn(8, 384)).shape
        torch.Size([8])
    """

    config_keys = ["embedding_dimension", "hidden_dimension"]

    def __init__(self, embedding_dimension: int, hidden_dimension: int | None = None) -> None:
        super().__init__()
        self.embedding_dimension = embedding_dimension
        self.hidden_dimension = embedding_dimension if hidden_dimension is None else hidden_dimension
        self.mlp = nn.Sequential(
            nn.Linear(4 * embedding_dimension, self.hidden_dimension), nn.ReLU(), nn.Linear(self.hidden_dimension, 1)
        )

    def logits(self, u: Tensor, v: Tensor) -> Tensor:
        """Unbounded scores (B,) of embeddings u and v (B, embedding_dimension); their sigmoid lies in 0–1."""
        return self.mlp(torch.cat([u, v, u * v, (u - v).abs()], dim=-1)).squeeze(-1)

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return features

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        self.save_config(output_path)
        self.save_torch_weights(output_path, safe_serialization=True)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        init_defaults: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> DSEHead:
        hub_kwargs: dict[str, Any] = {
            "subfolder": subfolder,
            "token": token,
            "cache_folder": cache_folder,
            "revision": revision,
            "local_files_only": local_files_only,
        }
        head = cls(**cls.load_config(model_name_or_path, **hub_kwargs))
        return cls.load_torch_weights(model_name_or_path, model=head, **hub_kwargs)


def find_dse_head(model: nn.Module) -> DSEHead | None:
    """The model's :class:`DSEHead`, if it has one."""
    return next((module for module in model.modules() if isinstance(module, DSEHead)), None)


class PairScorer:
    """Scores pairs of texts with a model's :class:`DSEHead`; each distinct text is encoded once.

    Args:
        model: A SentenceTransformer with a DSE head, as ``DistillationLoss(model, head="dse")`` leaves it.

    Raises:
        ValueError: If the model has no DSE head.
    """

    def __init__(self, model: SentenceTransformer) -> None:
        head = find_dse_head(model)
        if head is None:
            raise ValueError("the model has no DSE head: train it with DistillationLoss(model, head='dse')")
        self.model = model
        self.head = head
        self.model_card_data = model.model_card_data

    @torch.inference_mode()
    def predict(
        self,
        sentence_pairs: Sequence[tuple[str, str]],
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        convert_to_numpy: bool = True,
        prompt_name: str | None = None,
    ) -> np.ndarray | Tensor:
        """Scores in 0–1, one per pair, or one for a single pair; arguments as ``CrossEncoder.predict``.

        Raises:
            ValueError: If an entry is no pair of texts.
        """
        if len(sentence_pairs) == 2 and isinstance(sentence_pairs[0], str):
            return self.predict([sentence_pairs], batch_size, show_progress_bar, convert_to_numpy, prompt_name)[0]
        for pair in sentence_pairs:
            if isinstance(pair, str) or len(pair) != 2:
                raise ValueError(f"sentence_pairs must hold pairs of texts, got {pair!r}")
        texts = list(dict.fromkeys(text for pair in sentence_pairs for text in pair))
        row = {text: i for i, text in enumerate(texts)}
        # The head reads whole embeddings, whatever the model cuts its own to.
        with self.model.truncate_embeddings(None):
            embeddings = self.model.encode(
                texts,
                batch_size=batch_size,
                show_progress_bar=bool(show_progress_bar),
                convert_to_tensor=True,
                prompt_name=prompt_name,
            )
        scores = []
        for start in trange(0, len(sentence_pairs), 4096, desc="Pairs", disable=not show_progress_bar):
            pairs = sentence_pairs[start : start + 4096]
            u, v = (embeddings[[row[pair[side]] for pair in pairs]] for side in (0, 1))
            scores.append(self.head.logits(u, v).sigmoid())
        result = torch.cat(scores) if scores else embeddings.new_zeros(0)
        return result.float().cpu().numpy() if convert_to_numpy else result


class PairScoreEvaluator(CrossEncoderCorrelationEvaluator):
    """Pearson's and Spearman's correlation of gold scores with those of a model's :class:`DSEHead`.

    Args:
        sentence_pairs: Pairs of texts.
        scores: Their gold scores, on any scale.
        name: Of the data, prefix of the metrics.
        **kwargs: ``prompt_name``, ``batch_size``, ``show_progress_bar``, ``write_csv``, as for the parent.

    Raises:
        ValueError: On a call, if the model has no DSE head.

    Relations:
        - ``EmbeddingSimilarityEvaluator`` measures the cosine of the same embeddings.

    Example:
        ::

            dev = PairScoreEvaluator(list(zip(dev["sentence1"], dev["sentence2"])), dev["score"], name="dev")
            loss = DistillationLoss(model, head="dse")
            # metric_for_best_model=f"eval_{dev.primary_metric}" picks the best checkpoint
            SentenceTransformerTrainer(model=model, train_dataset=train, loss=loss, evaluator=dev).train()
    """

    def __init__(
        self, sentence_pairs: Sequence[Sequence[str]], scores: Sequence[float], name: str = "", **kwargs: Any
    ) -> None:
        super().__init__(list(map(list, sentence_pairs)), list(scores), name, **kwargs)
        self.greater_is_better = True
        # The parent gives the metric its name on the first call, too late for metric_for_best_model.
        self.primary_metric = f"{name}_spearman" if name else "spearman"
        self.csv_file = f"PairScoreEvaluator{'_' if name else ''}{name}_results.csv"

    def __call__(  # type: ignore[override]  # a SentenceTransformer, where the parent takes a CrossEncoder
        self, model: SentenceTransformer, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        return super().__call__(PairScorer(model), output_path, epoch, steps)  # type: ignore[arg-type]
