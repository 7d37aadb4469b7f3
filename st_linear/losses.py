"""Losses: distillation of a teacher into an encoder, and transfer of softmax attention into linear attention."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import combinations
from typing import Any, Literal, get_args

import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CoSENTLoss
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from st_linear.conversion import AttentionCall, linear_attentions, observe_attention
from st_linear.feature_maps import feature_map_names, make_feature_map
from st_linear.pair_head import DSEHead, find_dse_head
from st_linear.transformer import LinearTransformer, join_packed

Head = Literal["cosine", "dse"]
Objective = Literal["mse", "cosent"]
TeacherActivation = Literal["sigmoid", "identity"]
Train = Literal["maps", "all"]
Target = Literal["attention", "hidden"]

TEACHER_ACTIVATIONS: dict[str, nn.Module] = {"sigmoid": nn.Sigmoid(), "identity": nn.Identity()}
"""What is applied to a teacher's logit to make its score; a sigmoid squashes scores into 0–1."""


def check_choice(argument: str, value: Any, choices: Any) -> None:
    """Raise a ValueError unless ``value`` is one of a Literal's ``choices``."""
    if value not in get_args(choices):
        raise ValueError(f"unknown {argument} {value!r}; choose one of: {', '.join(get_args(choices))}")


def check_teacher(teacher: CrossEncoder) -> None:
    """Raise a ValueError unless ``teacher`` is a CrossEncoder that gives one score per pair."""
    if isinstance(teacher, SentenceTransformer):
        raise ValueError(
            "this teacher must be a CrossEncoder, got a SentenceTransformer: score with add_teacher_scores(dataset, "
            "teacher) beforehand"
        )
    if teacher.num_labels != 1:
        raise ValueError(
            f"the teacher has {teacher.num_labels} labels, distillation needs one score per pair: pass a CrossEncoder "
            "with num_labels=1"
        )


class DistillationLoss(nn.Module):
    """Pointwise distillation of a teacher's scores into a sentence encoder.

    ``(1 - alpha) · L(student, gold) + alpha · L(student, teacher)``, where the student's score of a pair is the
    cosine of its embeddings, or the output of a :class:`~st_linear.pair_head.DSEHead`.

    Args:
        model: The student.
        teacher: A CrossEncoder that scores each batch as it comes. It reads the texts back from the student's tokens,
            so what the student's tokenizer drops (case, say) or cuts it does not see;
            :func:`~st_linear.teachers.add_teacher_scores` is exact, and scores each pair once only.
        alpha: Weight of the teacher; 0 = gold alone, 1 = teacher alone.
        head: ``"cosine"`` keeps the vectors comparable by cosine; ``"dse"`` is the paper's MLP, appended to the model
            as its last module unless it is there already.
        objective: ``"mse"`` on scores, or ``"cosent"``, which learns their order.
        teacher_activation: What was, or is, applied to the teacher's logits: ``"sigmoid"`` or ``"identity"``.
            A cosine can't match logits, so ``"identity"`` needs the DSE head or ``"cosent"``.
        scale: Of the logits in ``"cosent"``.
        dropout: Whether the student trains with dropout. ``False`` has it in evaluation mode while it reads a batch,
            so gradient checkpointing is off too.

    Inputs:
        Two text columns, and labels (B,): gold scores, or with ``alpha=1`` and no ``teacher`` the teacher's; or
        labels (B, 2): gold and teacher scores. Gold scores lie in 0–1.

        Or K > 2 text columns, as :func:`~st_linear.mining.mine_groups` returns them, and labels (B, K(K − 1)/2): the
        teacher's scores of all pairs of a row's texts, the first with the second, the first with the third, and so
        on. With ``alpha=1`` and the cosine alone.

    Raises:
        ValueError: If an argument or the shape or range of the labels does not fit.

    References:
        - Scalable Attentive Sentence-Pair Modeling via Distilled Sentence Embedding: https://arxiv.org/abs/1908.05161

    Relations:
        - ``CosineSimilarityLoss`` and ``CoSENTLoss`` are the same without a teacher.
        - ``MarginMSELoss`` distils differences of scores, from triplets.

    Example:
        ::

            train = add_teacher_scores(train, CrossEncoder("cross-encoder/stsb-roberta-large"))
            loss = DistillationLoss(model, alpha=0.5)
            SentenceTransformerTrainer(model=model, train_dataset=train, loss=loss).train()
    """

    def __init__(
        self,
        model: SentenceTransformer,
        teacher: CrossEncoder | None = None,
        *,
        alpha: float = 0.5,
        head: Head = "cosine",
        objective: Objective = "mse",
        teacher_activation: TeacherActivation = "sigmoid",
        scale: float = 20.0,
        dropout: bool = True,
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie in 0..1, got {alpha!r}")
        check_choice("head", head, Head)
        check_choice("objective", objective, Objective)
        check_choice("teacher_activation", teacher_activation, TeacherActivation)
        if alpha > 0 and teacher_activation == "identity" and head == "cosine" and objective == "mse":
            raise ValueError(
                "a cosine can't match a teacher's logits: use teacher_activation='sigmoid', head='dse' or "
                "objective='cosent'"
            )
        if teacher is not None:
            check_teacher(teacher)
        self.model = model
        self.alpha = alpha
        self.head = head
        self.objective = objective
        self.teacher_activation = teacher_activation
        self.scale = scale
        self.dropout = dropout
        # In a tuple the teacher and the student's own modules are no submodules, and so no parameters, of the loss.
        self._teacher = (teacher,)
        self._student = (model,)
        if head == "dse" and find_dse_head(model) is None:
            with model.truncate_embeddings(None):
                dimension = model.get_embedding_dimension()
            if dimension is None:
                raise ValueError("head='dse' needs to know the model's embedding dimension, which it does not tell")
            model.append(DSEHead(dimension).to(model.device, model.dtype))

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        columns = list(sentence_features)
        if len(columns) < 2:
            raise ValueError(f"DistillationLoss takes two text columns or more, got {len(columns)}")
        with nullcontext() if self.dropout else without_dropout(self.model):
            return self._of_pairs(columns, labels) if len(columns) == 2 else self._of_groups(columns, labels)

    def _of_pairs(self, columns: list[dict[str, Tensor]], labels: Tensor | None) -> Tensor:
        gold, taught = self._targets(columns, labels)
        u = self.model(columns[0])["sentence_embedding"]
        if self.head == "dse":
            logits = self._head_logits(u, columns[1]).float()
            scores = logits.sigmoid()
        else:
            v = self.model(columns[1])["sentence_embedding"]
            scores = logits = F.cosine_similarity(u.float(), v.float())
        loss = scores.new_zeros(())
        if gold is not None:
            loss = loss + (1 - self.alpha) * self._compare(scores, gold)
        if taught is not None:
            student = logits if self.teacher_activation == "identity" else scores
            loss = loss + self.alpha * self._compare(student, taught)
        return loss

    def _of_groups(self, columns: list[dict[str, Tensor]], labels: Tensor | None) -> Tensor:
        size = len(columns)
        if self.alpha != 1 or self.head != "cosine" or self._teacher[0] is not None:
            raise ValueError(
                f"{size} text columns want alpha=1, head='cosine' and scores of add_teacher_scores, no teacher=; "
                f"got alpha={self.alpha}, head={self.head!r} and teacher={self._teacher[0] and 'a CrossEncoder'}"
            )
        if labels is None or labels.ndim != 2 or labels.shape[1] != size * (size - 1) // 2:
            shape = None if labels is None else tuple(labels.shape)
            raise ValueError(f"{size} text columns make {size * (size - 1) // 2} pairs a row, labels are {shape}")
        self._check_scores("teacher", labels)
        texts = torch.stack(self._embeddings(columns), dim=1)
        first, second = torch.tensor(list(combinations(range(size), 2)), device=texts.device).T
        scores = F.cosine_similarity(texts[:, first], texts[:, second], dim=-1)
        return self._compare(scores.flatten(), labels.float().flatten())

    def _embeddings(self, columns: list[dict[str, Tensor]]) -> list[Tensor]:
        """Of each column's texts, (B, D) in float32; packed columns are read as one batch."""
        if all("cu_seq_lens_q" in features for features in columns):
            texts = self.model(join_packed(columns))["sentence_embedding"]
            return list(texts.float().chunk(len(columns)))
        return [self.model(features)["sentence_embedding"].float() for features in columns]

    def _head_logits(self, u: Tensor, features: dict[str, Tensor]) -> Tensor:
        """The head's scores of u and the texts in ``features``."""
        student = self._student[0]
        head = find_dse_head(student)
        assert head is not None

        def add_logits(module: nn.Module, arguments: Any, output: dict[str, Any]) -> dict[str, Any]:
            return {**output, "pair_logits": head.logits(u, output["sentence_embedding"])}

        # Distributed training takes for unused what no output of the model depends on.
        with student.register_forward_hook(add_logits):
            return self.model(features)["pair_logits"]

    def _targets(self, columns: list[dict[str, Tensor]], labels: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Gold and teacher scores, (B,) each; None where ``alpha`` gives them no weight."""
        given = [] if labels is None else list(labels.float().unbind(-1) if labels.ndim == 2 else [labels.float()])
        if len(given) > 2:
            raise ValueError(f"labels must be gold scores, or gold and teacher scores; got {len(given)} columns")
        if self._teacher[0] is not None:
            if len(given) == 2:
                raise ValueError("teacher scores come twice: from teacher= and from the label column; drop one")
            taught = self._ask_teacher(columns) if self.alpha > 0 else None
        else:
            taught = given.pop() if len(given) == 2 or (given and self.alpha == 1) else None
        gold = given[0] if given else None
        if self.alpha > 0 and taught is None:
            raise ValueError(
                f"alpha={self.alpha} asks for teacher scores and there are none: call add_teacher_scores(dataset, "
                "teacher), pass teacher=, or set alpha=0"
            )
        if self.alpha < 1 and gold is None:
            raise ValueError(f"alpha={self.alpha} asks for gold scores and there are none: set alpha=1")
        # Labels without weight may hold anything, STS-B's -1 for no label, say.
        targets = gold if self.alpha < 1 else None, taught if self.alpha > 0 else None
        for name, scores in zip(("gold", "teacher"), targets):
            if scores is not None:
                self._check_scores(name, scores)
        return targets

    def _check_scores(self, name: str, scores: Tensor) -> None:
        if not bool(torch.isfinite(scores).all()):
            raise ValueError(f"{name} scores hold NaN or inf")
        bounded = name == "gold" or self.teacher_activation == "sigmoid"
        if self.objective == "mse" and bounded and not bool(((scores >= 0) & (scores <= 1)).all()):
            low, high = scores.min().item(), scores.max().item()
            advice = "divide STS-B's by 5" if name == "gold" else "take the sigmoid of logits, and 0 for cosines below"
            raise ValueError(f"{name} scores must lie in 0..1, got {low:g}..{high:g}: {advice}")

    def _compare(self, scores: Tensor, target: Tensor) -> Tensor:
        target = target.to(scores.device)
        if self.objective == "mse":
            return F.mse_loss(scores, target)
        cosent = CoSENTLoss(None, scale=self.scale, similarity_fct=lambda left, right: left)  # type: ignore[arg-type]
        return cosent.compute_loss_from_embeddings([scores, scores], target)

    @torch.no_grad()
    def _ask_teacher(self, columns: list[dict[str, Tensor]]) -> Tensor:
        texts = [_read_texts(self._student[0].tokenizer, features) for features in columns]
        teacher = self._teacher[0]
        assert teacher is not None
        scores = teacher.predict(
            list(zip(*texts)),
            batch_size=len(texts[0]),
            show_progress_bar=False,
            activation_fn=TEACHER_ACTIVATIONS[self.teacher_activation],
            convert_to_tensor=True,
        )
        # predict() runs in inference mode, and autograd takes no tensors that were made there.
        return scores.clone().float()

    def get_config_dict(self) -> dict[str, Any]:
        return {
            "alpha": self.alpha,
            "head": self.head,
            "objective": self.objective,
            "teacher_activation": self.teacher_activation,
            "dropout": self.dropout,
        }

    @property
    def citation(self) -> str:
        return """
@inproceedings{barkan2020scalable,
    title = "Scalable Attentive Sentence-Pair Modeling via Distilled Sentence Embedding",
    author = "Barkan, Oren and Razin, Noam and Malkiel, Itzik and Katz, Ori and Caciularu, Avi and Koenigstein, Noam",
    booktitle = "Proceedings of the AAAI Conference on Artificial Intelligence",
    year = "2020",
    url = "https://arxiv.org/abs/1908.05161",
}
"""


class AttentionTransferLoss(nn.Module):
    """Brings linear attention close to the softmax attention it replaces, on plain texts without labels.

    The mean over layers of ``|linear - softmax|² / Var(softmax)``, plus ``pooled · (1 - cos)`` of the embeddings. With
    ``train="maps"`` gradients reach the feature maps and gains alone: what they learn is an adapter. With
    ``train="all"`` the whole linear encoder learns, from a frozen softmax copy of it, taken when the loss is built.
    Dropout is off in both. Processes that train together share means and variance: their gradients are those of one
    process with the whole batch.

    Args:
        model: A SentenceTransformer whose first module is a :class:`~st_linear.transformer.LinearTransformer`.
            ``train="maps"`` freezes the rest of it; ``model.requires_grad_(True)`` afterwards undoes that.
        train: ``"maps"`` or ``"all"``.
        target: ``"attention"``: the encoder runs once, with softmax attention, and each layer's linear attention is
            tried on the same q, k, v. For ``train="maps"`` alone, and its default. ``"hidden"``: the hidden states of
            the linear encoder are set against those of the softmax one, so that layers learn to make good the errors
            of those before them. Takes about twice as long.
        pooled: Weight of the embeddings' cosine, with ``target="hidden"``.

    Inputs:
        Any number of text columns; labels are not read.

    Raises:
        ValueError: If the model has no converted layer, or with ``train="maps"`` nothing to train, or the target does
            not fit.

    References:
        - The Hedgehog & the Porcupine: https://arxiv.org/abs/2402.04347 (attention transfer, there of weights)

    Relations:
        - :class:`DistillationLoss` is the step after it, or before it.

    Example:
        ::

            model = convert("sentence-transformers/all-MiniLM-L6-v2", feature_map="hedgehog", window=0)
            loss = AttentionTransferLoss(model, train="all")
            train = Dataset.from_dict({"text": texts})
            SentenceTransformerTrainer(model=model, train_dataset=train, loss=loss).train()
    """

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        train: Train = "maps",
        target: Target | None = None,
        pooled: float = 0.0,
    ) -> None:
        super().__init__()
        check_choice("train", train, Train)
        target = ("attention" if train == "maps" else "hidden") if target is None else target
        check_choice("target", target, Target)
        if target == "attention" and train == "all":
            raise ValueError(
                "target='attention' compares layers on the q, k, v of a frozen encoder: pass train='maps'"
            )
        if target == "attention" and pooled:
            raise ValueError(f"target='attention' never pools the linear encoder, got pooled={pooled}")
        encoder = model[0] if len(model) else None
        if not isinstance(encoder, LinearTransformer) or not linear_attentions(encoder.model):
            raise ValueError("AttentionTransferLoss needs a model with linear attention: call st_linear.convert first")
        self.model = model
        self.train_parameters = train
        self.target = target
        self.pooled = pooled
        # In a tuple they are no submodules, and so no parameters, of the loss.
        self._student = (model,)
        self._encoder = (encoder,)
        self._maps = tuple(p for module in linear_attentions(encoder.model).values() for p in module.parameters())
        if train == "maps":
            if not self._maps:
                raise ValueError(
                    f"feature_map={encoder.feature_map!r} with window=0 has nothing to train; choose a learned map "
                    f"({', '.join(_learned_maps())}), a window > 0, or train='all'"
                )
            model.requires_grad_(False)
            for parameter in self._maps:
                parameter.requires_grad_(True)
            # With softmax attention the frozen encoder is its own reference.
            self._reference: tuple[Any, ...] = (encoder.model,)
        else:
            self._reference = (copy.deepcopy(encoder.model).requires_grad_(False).eval(),)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        if isinstance(self.model, nn.DataParallel):
            raise ValueError("AttentionTransferLoss can't run under DataParallel: use torchrun, or one GPU")
        step = self._attention_error if self.target == "attention" else self._hidden_state_error
        with without_dropout(self.model):
            return torch.stack([step(features) for features in sentence_features]).mean()

    def _attention_error(self, features: dict[str, Tensor]) -> Tensor:
        errors = []

        def compare(call: AttentionCall) -> Tensor:
            target = call.softmax()
            if call.is_linear():
                errors.append(_relative_error(call.linear(), target, call.attention_mask, token_dim=2))
            return target

        def add_errors(module: nn.Module, arguments: Any, output: dict[str, Any]) -> dict[str, Any]:
            errors[0] = errors[0] + self._no_gradient()
            return {**output, "attention_errors": errors}

        # Distributed training takes for unused what no output of the model depends on.
        with observe_attention(compare), self._encoder[0].register_forward_hook(add_errors):
            self.model(features)
        return torch.stack(errors).mean()

    def _hidden_state_error(self, features: dict[str, Tensor]) -> Tensor:
        encoder, reference = self._encoder[0], self._reference[0].to(self._encoder[0].model.device)
        mask = None if "cu_seq_lens_q" in features else features["attention_mask"]
        with _hidden_states(encoder.model), _hidden_states(reference):
            student = self.model(features)
            model, encoder.model = encoder.model, reference
            try:
                # In full precision, whatever the student learns in.
                exact = torch.autocast(encoder.model.device.type, enabled=False)
                with torch.no_grad(), exact, observe_attention(AttentionCall.softmax):
                    # By its class: the method that accelerate puts in its place casts to half precision again.
                    target = type(self._student[0]).forward(self._student[0], features)
            finally:
                encoder.model = model
        states = (x["all_layer_embeddings"][1:] for x in (student, target))
        error = torch.stack([_relative_error(s, t, mask, token_dim=1) for s, t in zip(*states)]).mean()
        if self.pooled:
            u, v = (x["sentence_embedding"].float() for x in (student, target))
            error = error + self.pooled * (1 - F.cosine_similarity(u, v)).mean()
        return error + self._no_gradient()

    def _no_gradient(self) -> Tensor:
        """Nought. Where every text is exact no map was used: its gradient is zero then, not missing."""
        return 0 * sum(
            (parameter.sum() for parameter in self._maps), start=torch.zeros((), device=self._student[0].device)
        )

    def get_config_dict(self) -> dict[str, Any]:
        return {"train": self.train_parameters, "target": self.target, "pooled": self.pooled}


def _learned_maps() -> list[str]:
    return [name for name in feature_map_names() if any(True for _ in make_feature_map(name, 1, 2).parameters())]


def _relative_error(output: Tensor, target: Tensor, mask: Tensor | None, token_dim: int) -> Tensor:
    """Mean squared error over valid tokens, as a share of the target's variance."""
    output, target = output.float(), target.detach().float()
    if mask is not None:
        keep = mask.bool()
        output, target = output.movedim(token_dim, 1)[keep], target.movedim(token_dim, 1)[keep]
    error, variance = F.mse_loss(output, target), target.var()
    if dist.is_available() and dist.is_initialized() and torch.is_grad_enabled():
        error, variance = _among_processes(error, target)
    return error / variance.clamp(min=1e-12)


def _among_processes(error: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The error weighted by this process's share of all numbers, and the variance of them all.

    Gradients, which are averaged over processes, are then those of one process with the whole batch.
    """
    count = target.new_tensor(target.numel(), dtype=torch.float64)
    own = torch.stack([count, target.mean().double(), target.var().double() * (count - 1)])
    every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(every, own)
    counts, means, squares = torch.stack(every).T
    total = counts.sum()
    mean = (counts * means).sum() / total
    variance = (squares + counts * (means - mean) ** 2).sum() / (total - 1)
    return error * (len(every) * count / total).float(), variance.float()


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and back to the one that was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _hidden_states(model: Any) -> Iterator[None]:
    before = model.config.output_hidden_states
    model.config.output_hidden_states = True
    try:
        yield
    finally:
        model.config.output_hidden_states = before


def _read_texts(tokenizer: Any, features: dict[str, Tensor]) -> list[str]:
    """The texts of a batch, read back from its tokens."""
    ids = features["input_ids"]
    if "cu_seq_lens_q" in features:
        rows = list(ids[0].split(features["cu_seq_lens_q"].diff().tolist()))
    else:
        rows = [row[keep] for row, keep in zip(ids, features["attention_mask"].bool())]
    return tokenizer.batch_decode([row.tolist() for row in rows], skip_special_tokens=True)
