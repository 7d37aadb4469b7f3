from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import FAMILIES, make_tokenizer, refused
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Module
from sentence_transformers.sentence_transformer.losses import CoSENTLoss, CosineSimilarityLoss
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import normalizers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoModel, BertForSequenceClassification

from st_linear import AttentionTransferLoss, DistillationLoss, LinearTransformer, convert
from st_linear.attention import linear_attention_reference, near_far_attention_reference, softmax_attention_reference
from st_linear.conversion import AttentionCall, linear_attentions, observe_attention
from st_linear.pair_head import DSEHead, find_dse_head

DIMENSION = 6


class Given(Module):
    """Hands on the embeddings that it is given, times a weight to learn, as if it were an encoder."""

    def __init__(self, knows_dimension: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(DIMENSION))
        self.knows_dimension = knows_dimension

    def forward(self, features: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
        return {**features, "sentence_embedding": features["sentence_embedding"] * self.weight}

    def get_embedding_dimension(self) -> int | None:
        return DIMENSION if self.knows_dimension else None

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None: ...


def given_model(**options: Any) -> SentenceTransformer:
    torch.manual_seed(0)
    return SentenceTransformer(modules=[Given(**options)], device="cpu")


EMBEDDINGS = torch.randn(2, 5, DIMENSION, generator=torch.Generator().manual_seed(0))
COLUMNS = [{"sentence_embedding": side} for side in EMBEDDINGS]
GOLD = torch.tensor([0.9, 0.1, 0.5, 0.5, 0.0])
TAUGHT = torch.tensor([0.7, 0.3, 0.2, 0.6, 0.1])
LOGITS = TAUGHT.logit()


def student_logits(model: SentenceTransformer) -> Tensor:
    """The DSE head's output on EMBEDDINGS, pair by pair from its weights."""
    head = find_dse_head(model)
    assert head is not None
    first, _, second = head.mlp
    rows = []
    for u, v in zip(*EMBEDDINGS):
        hidden = first.weight @ torch.cat([u, v, u * v, abs(u - v)]) + first.bias
        rows.append((second.weight @ hidden.clamp(min=0) + second.bias)[0])
    return torch.stack(rows).detach()


def cosines() -> Tensor:
    return torch.stack([u @ v / math.sqrt((u @ u) * (v @ v)) for u, v in zip(*EMBEDDINGS)])


def objective_by_hand(objective: str, scores: Tensor, target: Tensor, scale: float) -> Tensor:
    if objective == "mse":
        return ((scores - target) ** 2).mean()
    terms = [
        torch.exp(scale * (low - high))
        for low, low_target in zip(scores, target)
        for high, high_target in zip(scores, target)
        if high_target > low_target
    ]
    return torch.log1p(torch.stack(terms).sum())


def both(gold: Tensor = GOLD, taught: Tensor = TAUGHT) -> Tensor:
    return torch.stack([gold, taught], dim=1)


class TestFormula:
    @pytest.mark.parametrize("objective", ["mse", "cosent"])
    @pytest.mark.parametrize("head", ["cosine", "dse"])
    @pytest.mark.parametrize("alpha", [0, 0.5, 0.8, 1])
    def test_it_is_the_weighted_sum(self, alpha: float, head: Any, objective: Any) -> None:
        model = given_model()
        loss = DistillationLoss(model, alpha=alpha, head=head, objective=objective, scale=3.0)
        scores = student_logits(model).sigmoid() if head == "dse" else cosines()
        expected = (1 - alpha) * objective_by_hand(objective, scores, GOLD, 3.0) + alpha * objective_by_hand(
            objective, scores, TAUGHT, 3.0
        )
        assert expected > 0.01
        assert_close(loss(COLUMNS, both()), expected)

    @pytest.mark.parametrize("objective", ["mse", "cosent"])
    def test_identity_compares_logits_with_logits(self, objective: Any) -> None:
        model = given_model()
        loss = DistillationLoss(model, head="dse", objective=objective, teacher_activation="identity", scale=3.0)
        logits = student_logits(model)
        expected = 0.5 * objective_by_hand(objective, logits.sigmoid(), GOLD, 3.0) + 0.5 * objective_by_hand(
            objective, logits, LOGITS, 3.0
        )
        assert_close(loss(COLUMNS, both(taught=LOGITS)), expected)

    def test_a_cosine_learns_the_order_of_logits(self) -> None:
        loss = DistillationLoss(given_model(), alpha=1, objective="cosent", teacher_activation="identity", scale=3.0)
        assert_close(loss(COLUMNS, LOGITS), objective_by_hand("cosent", cosines(), TAUGHT, 3.0))

    @pytest.mark.parametrize(
        ("objective", "theirs"),
        [("mse", CosineSimilarityLoss), ("cosent", CoSENTLoss)],
    )
    def test_without_a_teacher_it_is_that_of_sentence_transformers(
        self, objective: Any, theirs: Callable[[SentenceTransformer], nn.Module]
    ) -> None:
        gradients = []
        for build in (lambda model: DistillationLoss(model, alpha=0, objective=objective), theirs):
            model = given_model()
            value = build(model)(COLUMNS, GOLD)
            value.backward()
            gradients.append((value.detach(), model[0].weight.grad))
        assert_close(*gradients)

    @pytest.mark.parametrize("head", ["cosine", "dse"])
    def test_together_and_apart_are_the_same(self, head: Any) -> None:
        model = given_model()
        together = DistillationLoss(model, alpha=0.3, head=head)(COLUMNS, both())
        gold = DistillationLoss(model, alpha=0, head=head)(COLUMNS, GOLD)
        taught = DistillationLoss(model, alpha=1, head=head)(COLUMNS, TAUGHT)
        assert_close(together, 0.7 * gold + 0.3 * taught)

    @pytest.mark.parametrize("alpha", [0, 1])
    def test_labels_without_weight_are_not_read(self, alpha: float) -> None:
        loss = DistillationLoss(given_model(), alpha=alpha)
        unused = torch.full_like(GOLD, math.nan)
        labels = both(taught=unused) if alpha == 0 else both(gold=unused)
        assert_close(loss(COLUMNS, labels), loss(COLUMNS, GOLD if alpha == 0 else TAUGHT))

    def test_labels_may_be_a_column_integers_or_doubles(self) -> None:
        loss = DistillationLoss(given_model(), alpha=0)
        assert_close(loss(COLUMNS, GOLD[:, None].double()), loss(COLUMNS, GOLD))
        assert_close(loss(COLUMNS, torch.tensor([1, 0, 0, 1, 0])), loss(COLUMNS, torch.tensor([1.0, 0, 0, 1, 0])))

    @pytest.mark.parametrize("head", ["cosine", "dse"])
    def test_gradients_reach_what_scores(self, head: Any) -> None:
        model = given_model()
        DistillationLoss(model, head=head)(COLUMNS, both()).backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert len(gradients) == (5 if head == "dse" else 1)
        for name, gradient in gradients.items():
            assert gradient is not None, name
            assert gradient.abs().max() > 1e-6, name

    def test_half_precision_embeddings_are_compared_in_full(self) -> None:
        columns = [{"sentence_embedding": side.bfloat16()} for side in EMBEDDINGS]
        same = [{"sentence_embedding": side.bfloat16().float()} for side in EMBEDDINGS]
        half = DistillationLoss(given_model().bfloat16())(columns, both())
        assert half.dtype == torch.float32
        assert_close(half, DistillationLoss(given_model())(same, both()))

    def test_model_cards_are_told_the_settings(self) -> None:
        loss = DistillationLoss(given_model(), alpha=0.25, head="dse", objective="cosent")
        assert loss.get_config_dict() == {
            "alpha": 0.25,
            "head": "dse",
            "objective": "cosent",
            "teacher_activation": "sigmoid",
            "dropout": True,
        }
        assert "1908.05161" in loss.citation


class TestArguments:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"alpha": -0.1}, "alpha must lie in 0..1, got -0.1"),
            ({"alpha": 1.5}, "alpha must lie in 0..1, got 1.5"),
            ({"alpha": math.nan}, "alpha must lie in 0..1, got nan"),
            ({"head": "mlp"}, "unknown head 'mlp'; choose one of: cosine, dse"),
            ({"objective": "kl"}, "unknown objective 'kl'; choose one of: mse, cosent"),
            (
                {"teacher_activation": "tanh"},
                "unknown teacher_activation 'tanh'; choose one of: sigmoid, identity",
            ),
            (
                {"teacher_activation": "identity"},
                "a cosine can't match a teacher's logits: use teacher_activation='sigmoid', head='dse' or "
                "objective='cosent'",
            ),
        ],
    )
    def test_bad_ones_are_refused(self, options: dict[str, Any], message: str) -> None:
        with refused(message):
            DistillationLoss(given_model(), **options)

    def test_identity_is_not_refused_where_no_teacher_has_weight(self) -> None:
        loss = DistillationLoss(given_model(), alpha=0, teacher_activation="identity")
        assert_close(loss(COLUMNS, GOLD), objective_by_hand("mse", cosines(), GOLD, 1))

    def test_an_encoder_is_no_live_teacher(self) -> None:
        with refused("this teacher must be a CrossEncoder, got a SentenceTransformer: score with add_teacher_scores"):
            DistillationLoss(given_model(), given_model())  # type: ignore[arg-type]

    def test_a_model_that_hides_its_dimension_gets_no_head(self) -> None:
        with refused("head='dse' needs to know the model's embedding dimension, which it does not tell"):
            DistillationLoss(given_model(knows_dimension=False), head="dse")

    def test_a_head_of_ones_own_will_do(self) -> None:
        model = given_model(knows_dimension=False)
        model.append(DSEHead(DIMENSION, 3))
        loss = DistillationLoss(model, alpha=0, head="dse")
        assert_close(loss(COLUMNS, GOLD), objective_by_hand("mse", student_logits(model).sigmoid(), GOLD, 1))


class TestLabels:
    @pytest.mark.parametrize(
        ("options", "labels", "message"),
        [
            ({}, None, "alpha=0.5 asks for teacher scores and there are none: call add_teacher_scores(dataset, "),
            ({}, GOLD, "alpha=0.5 asks for teacher scores and there are none: call add_teacher_scores(dataset, "),
            ({"alpha": 1}, None, "alpha=1 asks for teacher scores and there are none"),
            ({"alpha": 0}, None, "alpha=0 asks for gold scores and there are none: set alpha=1"),
            (
                {},
                torch.zeros(5, 3),
                "labels must be gold scores, or gold and teacher scores; got 3 columns",
            ),
            ({}, both(gold=GOLD * 5), "gold scores must lie in 0..1, got 0..4.5: divide STS-B's by 5"),
            ({"alpha": 0}, GOLD - 0.5, "gold scores must lie in 0..1, got -0.5..0.4"),
            ({}, both(taught=LOGITS), "teacher scores must lie in 0..1, got -2.19722..0.847298"),
            ({}, both(gold=GOLD / 0), "gold scores hold NaN or inf"),
            ({}, both(taught=TAUGHT * math.nan), "teacher scores hold NaN or inf"),
            ({"objective": "cosent"}, both(taught=TAUGHT * math.nan), "teacher scores hold NaN or inf"),
            (
                {"head": "dse", "teacher_activation": "identity"},
                both(gold=GOLD * 5, taught=LOGITS),
                "gold scores must lie in 0..1, got 0..4.5",
            ),
        ],
    )
    def test_bad_ones_are_refused(self, options: dict[str, Any], labels: Tensor | None, message: str) -> None:
        with refused(message):
            DistillationLoss(given_model(), **options)(COLUMNS, labels)

    def test_an_order_has_no_range(self) -> None:
        loss = DistillationLoss(given_model(), objective="cosent")
        assert_close(loss(COLUMNS, both(gold=GOLD * 5, taught=LOGITS)), loss(COLUMNS, both()))

    def test_one_text_column_is_no_pair(self) -> None:
        with refused("DistillationLoss takes two text columns or more, got 1"):
            DistillationLoss(given_model(), alpha=0)([COLUMNS[0]], GOLD)


GROUPS = torch.randn(4, 5, DIMENSION, generator=torch.Generator().manual_seed(1))
GROUP_SCORES = torch.rand(5, 6, generator=torch.Generator().manual_seed(2))


class TestGroups:
    """Four texts a row, and the teacher's scores of the six pairs of them."""

    columns = tuple({"sentence_embedding": texts} for texts in GROUPS)

    @pytest.mark.parametrize("objective", ["mse", "cosent"])
    def test_it_is_that_of_all_pairs_of_a_row(self, objective: Any) -> None:
        scores, targets = [], []
        for row in range(5):
            pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
            for (first, second), target in zip(pairs, GROUP_SCORES[row]):
                u, v = GROUPS[first, row], GROUPS[second, row]
                scores.append(u @ v / math.sqrt((u @ u) * (v @ v)))
                targets.append(target)
        expected = objective_by_hand(objective, torch.stack(scores), torch.stack(targets), 3.0)
        loss = DistillationLoss(given_model(), alpha=1, objective=objective, scale=3.0)
        assert_close(loss(self.columns, GROUP_SCORES), expected)

    def test_its_gradient_is_that_of_the_pairs(self) -> None:
        gradients = []
        for grouped in (True, False):
            model = given_model()
            loss = DistillationLoss(model, alpha=1)
            if grouped:
                loss(self.columns, GROUP_SCORES).backward()
            else:
                pairs = [(a, b) for a in range(4) for b in range(a + 1, 4)]
                for (a, b), labels in zip(pairs, GROUP_SCORES.T):
                    (loss((self.columns[a], self.columns[b]), labels) / 6).backward()
            gradients.append(model[0].weight.grad)
        assert gradients[0].abs().max() > 1e-3
        assert_close(*gradients)

    @pytest.mark.parametrize(
        ("options", "got"),
        [
            ({}, "got alpha=0.5, head='cosine' and teacher=None"),
            ({"alpha": 1, "head": "dse"}, "got alpha=1, head='dse' and teacher=None"),
        ],
    )
    def test_they_have_a_teacher_alone(self, options: dict[str, Any], got: str) -> None:
        with refused(
            f"4 text columns want alpha=1, head='cosine' and scores of add_teacher_scores, no teacher=; {got}"
        ):
            DistillationLoss(given_model(), **options)(self.columns, GROUP_SCORES)

    def test_they_have_no_live_teacher(self, teacher: CrossEncoder) -> None:
        with refused("got alpha=1, head='cosine' and teacher=a CrossEncoder"):
            DistillationLoss(given_model(), teacher, alpha=1)(self.columns, GROUP_SCORES)

    @pytest.mark.parametrize(
        ("labels", "shape"), [(GROUP_SCORES[:, :5], "(5, 5)"), (GROUP_SCORES[:, 0], "(5,)"), (None, "None")]
    )
    def test_each_pair_has_a_label(self, labels: Tensor | None, shape: str) -> None:
        with refused(f"4 text columns make 6 pairs a row, labels are {shape}"):
            DistillationLoss(given_model(), alpha=1)(self.columns, labels)

    def test_scores_are_checked(self) -> None:
        with refused("teacher scores must lie in 0..1, got "):
            DistillationLoss(given_model(), alpha=1)(self.columns, GROUP_SCORES * 2)
        with refused("teacher scores hold NaN or inf"):
            DistillationLoss(given_model(), alpha=1)(self.columns, GROUP_SCORES / 0)


@pytest.mark.parametrize("name", ["softmax", "favor"])
def test_packed_columns_of_a_group_are_one_batch(name: str, bert: str, text: Callable[..., str]) -> None:
    columns = [[text(3 + 4 * row + column, seed=column) for row in range(5)] for column in range(4)]
    losses, gradients, batches = [], [], []
    for packed in (True, False):
        model = convert(bert, feature_map=name)
        model[0].unpad_inputs = packed
        hook = model[0].register_forward_pre_hook(lambda *_, packed=packed: batches.append(packed))
        loss = DistillationLoss(model, alpha=1, dropout=False)(map(model.preprocess, columns), GROUP_SCORES)
        hook.remove()
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    assert batches == [True] + 4 * [False]
    assert_close(*losses)
    assert max(gradient.abs().max() for gradient in gradients[0].values()) > 1e-3
    assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dropout", [True, False])
def test_dropout_can_be_left_out(dropout: bool, bert: str, text: Callable[..., str]) -> None:
    student = convert(bert, feature_map="softmax").train()
    loss = DistillationLoss(student, alpha=0, dropout=dropout)
    columns = features_of(student, [(text(9, seed=row), text(11, seed=row + 3)) for row in range(3)])
    losses = {loss([dict(column) for column in columns], GOLD[:3]).item() for _ in range(2)}
    assert len(losses) == (2 if dropout else 1)
    assert student.training


@pytest.fixture(scope="module")
def teacher_folder(save_encoder: Callable[..., str]) -> str:
    config = FAMILIES["bert"]()
    config.num_labels = 1
    return save_encoder(config, BertForSequenceClassification)


@pytest.fixture(scope="module")
def teacher(teacher_folder: str) -> CrossEncoder:
    return CrossEncoder(teacher_folder, device="cpu")


@pytest.fixture
def student(bert: str) -> SentenceTransformer:
    return convert(bert, window=8, max_seq_length=128, feature_map_kwargs={"num_features": 16})


@pytest.fixture(scope="module")
def pairs(text: Callable[..., str]) -> list[tuple[str, str]]:
    return [(text(first, seed=2), text(second, seed=3)) for first, second in ((5, 9), (20, 3), (12, 12), (2, 7))]


def features_of(model: SentenceTransformer, pairs: list[tuple[str, str]]) -> list[dict[str, Tensor]]:
    return [model.preprocess(list(column)) for column in zip(*pairs)]


PAIR_GOLD = torch.tensor([0.2, 0.9, 0.4, 0.0])


class TestLiveTeacher:
    @pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
    @pytest.mark.parametrize(("head", "activation"), [("cosine", "sigmoid"), ("dse", "sigmoid"), ("dse", "identity")])
    def test_it_scores_as_the_column_has_it(
        self,
        student: SentenceTransformer,
        teacher: CrossEncoder,
        pairs: list[tuple[str, str]],
        head: Any,
        activation: Any,
        packed: bool,
    ) -> None:
        student[0].unpad_inputs = packed
        features = features_of(student, pairs)
        assert ("cu_seq_lens_q" in features[0]) == packed
        activations = {"sigmoid": nn.Sigmoid(), "identity": nn.Identity()}
        column = torch.from_numpy(teacher.predict(pairs, activation_fn=activations[activation]))
        # Scores that are all alike, or the gold ones, would let a wrong teacher pass.
        assert column.std() > 0.05
        assert (column - PAIR_GOLD).abs().min() > 0.01
        student.eval()
        live = DistillationLoss(student, teacher, head=head, teacher_activation=activation)
        cached = DistillationLoss(student, head=head, teacher_activation=activation)
        assert_close(live(features, PAIR_GOLD), cached(features, both(PAIR_GOLD, column)))

    def test_unlabelled_pairs_are_taught_alone(
        self, student: SentenceTransformer, teacher: CrossEncoder, pairs: list[tuple[str, str]]
    ) -> None:
        student.eval()
        features = features_of(student, pairs)
        column = torch.from_numpy(teacher.predict(pairs, activation_fn=nn.Sigmoid()))
        live = DistillationLoss(student, teacher, alpha=1)(features)
        assert_close(live, DistillationLoss(student, alpha=1)(features, column))
        # Labels that happen to be there get no weight.
        assert_close(DistillationLoss(student, teacher, alpha=1)(features, PAIR_GOLD), live)

    def test_it_reads_what_the_tokens_of_the_student_keep(
        self, bert: str, teacher: CrossEncoder, pairs: list[tuple[str, str]]
    ) -> None:
        tokenizer = make_tokenizer()
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
        student = convert(bert, window=8, max_seq_length=16)
        student[0].processor = tokenizer
        student.max_seq_length = 16
        student.eval()
        shouted = [(left.upper(), right.upper()) for left, right in pairs]
        read = [tuple(" ".join(side.split()[:14]) for side in pair) for pair in pairs]
        assert read != pairs
        column = torch.from_numpy(teacher.predict(read, activation_fn=nn.Sigmoid()))
        features = features_of(student, shouted)
        assert_close(
            DistillationLoss(student, teacher)(features, PAIR_GOLD),
            DistillationLoss(student)(features, both(PAIR_GOLD, column)),
        )

    def test_it_is_no_part_of_the_loss(
        self, student: SentenceTransformer, teacher_folder: str, pairs: list[tuple[str, str]]
    ) -> None:
        teacher = CrossEncoder(teacher_folder, device="cpu")
        before = copy.deepcopy(teacher.state_dict())
        loss = DistillationLoss(student, teacher, head="dse")
        assert {id(p) for p in loss.parameters()} == {id(p) for p in student.parameters()}
        assert all(name.startswith("model.") for name in loss.state_dict())
        optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
        loss.train()
        loss(features_of(student, pairs), PAIR_GOLD).backward()
        optimizer.step()
        assert all(parameter.grad is None for parameter in teacher.parameters())
        assert_close(teacher.state_dict(), before, rtol=0, atol=0)

    def test_alpha_zero_does_not_ask_it(
        self,
        student: SentenceTransformer,
        teacher: CrossEncoder,
        pairs: list[tuple[str, str]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def refuse(*args: Any, **kwargs: Any) -> None:
            raise AssertionError("the teacher was asked")

        student.eval()
        monkeypatch.setattr(teacher, "predict", refuse)
        features = features_of(student, pairs)
        value = DistillationLoss(student, teacher, alpha=0)(features, PAIR_GOLD)
        assert_close(value, CosineSimilarityLoss(student)(features, PAIR_GOLD))
        with pytest.raises(AssertionError, match="the teacher was asked"):
            DistillationLoss(student, teacher)(features, PAIR_GOLD)

    def test_scores_from_two_sides_are_refused(
        self, student: SentenceTransformer, teacher: CrossEncoder, pairs: list[tuple[str, str]]
    ) -> None:
        with refused("teacher scores come twice: from teacher= and from the label column; drop one"):
            DistillationLoss(student, teacher)(features_of(student, pairs), both(PAIR_GOLD, PAIR_GOLD))

    def test_missing_gold_is_refused(
        self, student: SentenceTransformer, teacher: CrossEncoder, pairs: list[tuple[str, str]]
    ) -> None:
        with refused("alpha=0.5 asks for gold scores and there are none: set alpha=1"):
            DistillationLoss(student, teacher)(features_of(student, pairs))

    def test_several_labels_are_refused(self, bert: str, student: SentenceTransformer) -> None:
        with refused(
            "the teacher has 3 labels, distillation needs one score per pair: pass a CrossEncoder with num_labels=1"
        ):
            DistillationLoss(student, CrossEncoder(bert, num_labels=3, device="cpu"))


LONG = (70, 9, 41, 120)
"""Token counts beyond two windows of 8, beyond the 64 trained positions, and one within."""


@pytest.fixture(scope="module")
def texts(text: Callable[..., str]) -> list[str]:
    return [text(length, seed=4) for length in LONG]


def learner(folder: str, **settings: Any) -> SentenceTransformer:
    return convert(folder, **{"feature_map": "hedgehog", "window": 8, "max_seq_length": 128, **settings})


def train_steps(loss: nn.Module, columns: list[dict[str, Tensor]], steps: int, rate: float) -> None:
    optimizer = torch.optim.Adam([p for p in loss.parameters() if p.requires_grad], lr=rate)
    loss.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss(columns).backward()
        optimizer.step()


def relative_error(outputs: list[Tensor], targets: list[Tensor]) -> Tensor:
    """Of the tokens (..., D) of several texts: mean squared error over the targets' variance."""
    output, target = (torch.cat([x.reshape(-1) for x in texts]) for texts in (outputs, targets))
    return ((output - target) ** 2).mean() / ((target - target.mean()) ** 2).sum() * (len(target) - 1)


def maps_loss_by_hand(model: SentenceTransformer, texts: list[str]) -> list[Tensor]:
    """One error per converted layer, from the reference forms on each text by itself."""
    layers: dict[int, tuple[list[Tensor], list[Tensor]]] = {}

    def record(call: AttentionCall) -> Tensor:
        if call.is_linear():
            attention = call.module.linear_attention
            options = {"scale": call.scale, "feature_map": attention.feature_map}
            qkv = call.query, call.key, call.value
            if attention.window:
                linear = near_far_attention_reference(*qkv, window=attention.window, gain=attention.gain, **options)
            else:
                linear = linear_attention_reference(*qkv, **options)
            outputs, targets = layers.setdefault(id(call.module), ([], []))
            outputs.append(linear)
            targets.append(softmax_attention_reference(*qkv, scale=call.scale))
        return call.softmax()

    model.eval()
    with torch.no_grad(), observe_attention(record):
        for text in texts:
            model(model.preprocess([text]))
    return [relative_error(*layer) for layer in layers.values()]


def hidden_states(encoder: nn.Module, ids: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return encoder(input_ids=ids[None], output_hidden_states=True).hidden_states[1:]


@contextmanager
def packing(model: SentenceTransformer, packed: bool) -> Iterator[None]:
    model[0].unpad_inputs = packed
    yield
    model[0].unpad_inputs = None


class TestTransferOfMaps:
    def test_gradients_reach_the_maps_and_gains_alone(self, bert: str, texts: list[str]) -> None:
        model = learner(bert)
        maps = {id(p) for module in linear_attentions(model).values() for p in module.parameters()}
        loss = AttentionTransferLoss(model)
        before = copy.deepcopy(model.state_dict())
        train_steps(loss, [model.preprocess(texts)], steps=2, rate=1e-2)
        moved = set()
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == (id(parameter) in maps), name
            if id(parameter) in maps:
                assert parameter.grad is not None, name
            else:
                assert parameter.grad is None, name
            if not torch.equal(parameter, before[name]):
                moved.add(id(parameter))
        assert moved == maps
        assert any(name.endswith(".gain") for name in before)

    def test_it_can_be_undone(self, bert: str, texts: list[str]) -> None:
        model = learner(bert)
        AttentionTransferLoss(model)
        assert not all(parameter.requires_grad for parameter in model.parameters())
        model.requires_grad_(True)
        assert all(parameter.requires_grad for parameter in model.parameters())
        features = [model.preprocess(texts), model.preprocess(texts[::-1])]
        DistillationLoss(model, alpha=0)(features, torch.tensor([0.1, 0.2, 0.3, 0.4])).backward()
        missing = [name for name, p in model.named_parameters() if p.grad is None and "pooler" not in name]
        assert missing == []

    @pytest.mark.parametrize("window", [0, 8])
    @pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
    def test_it_is_the_mean_relative_error_of_the_layers(
        self, bert: str, texts: list[str], window: int, packed: bool
    ) -> None:
        model = learner(bert, window=window)
        expected = maps_loss_by_hand(model, texts)
        assert len(expected) == 2
        assert min(expected) > 1e-3
        loss = AttentionTransferLoss(model)
        with packing(model, packed):
            assert_close(loss([model.preprocess(texts)]), torch.stack(expected).mean(), rtol=1e-4, atol=0)

    def test_columns_count_alike(self, bert: str, texts: list[str]) -> None:
        model = learner(bert)
        loss = AttentionTransferLoss(model)
        parameters = [p for p in model.parameters() if p.requires_grad]
        columns = [model.preprocess(texts[:2]), model.preprocess(texts[2:])]
        together = loss(columns)
        apart = [loss([column]) for column in columns]
        assert_close(together, (apart[0] + apart[1]) / 2)
        gradients = torch.autograd.grad(together, parameters)
        expected = torch.autograd.grad((apart[0] + apart[1]) / 2, parameters)
        assert_close(gradients, expected, rtol=1e-4, atol=1e-7)
        assert all(gradient.abs().max() > 0 for gradient in gradients)

    def test_packed_equals_padded(self, bert: str, texts: list[str]) -> None:
        model = learner(bert)
        loss = AttentionTransferLoss(model)
        parameters = [p for p in model.parameters() if p.requires_grad]
        results = []
        for packed in (True, False):
            with packing(model, packed):
                features = model.preprocess(texts)
                assert ("cu_seq_lens_q" in features) == packed
                value = loss([features])
            results.append((value, torch.autograd.grad(value, parameters)))
        assert_close(*results, rtol=1e-4, atol=1e-6)

    def test_texts_inside_the_window_have_none(self, bert: str, text: Callable[..., str]) -> None:
        model = learner(bert)
        loss = AttentionTransferLoss(model)
        error = loss([model.preprocess([text(length) for length in (16, 3, 9)])])
        assert error < 1e-10
        error.backward()
        assert all((p.grad == 0).all() for p in model.parameters() if p.requires_grad)
        assert loss([model.preprocess([text(length) for length in (17, 3, 9)])]) > 1e-6

    def test_a_map_equal_to_softmax_has_none(self, bert: str, texts: list[str]) -> None:
        model = learner(bert, window=0)
        loss = AttentionTransferLoss(model)
        assert loss([model.preprocess(texts)]) > 1e-3
        # Where every query is zero and all keys are alike, both forms are the mean of the values.
        for layer in model[0].model.encoder.layer:
            for projection in (layer.attention.self.query, layer.attention.self.key):
                nn.init.zeros_(projection.weight)
                nn.init.zeros_(projection.bias)
        assert loss([model.preprocess(texts)]) < 1e-10

    def test_it_falls_on_texts_it_was_not_trained_on_too(
        self, bert: str, texts: list[str], text: Callable[..., str]
    ) -> None:
        model = learner(bert, window=0)
        loss = AttentionTransferLoss(model)
        seen = [model.preprocess([text(length, seed=seed) for seed in range(4) for length in (60, 90)])]
        unseen = [model.preprocess(texts)]
        before = [loss(columns).item() for columns in (seen, unseen)]
        train_steps(loss, seen, steps=30, rate=2e-2)
        after = [loss(columns).item() for columns in (seen, unseen)]
        assert after[0] < 0.8 * before[0]
        assert after[1] < 0.9 * before[1]

    def test_sliding_and_exact_layers_are_skipped(
        self, encoder_folder: Callable[[str], str], texts: list[str]
    ) -> None:
        model = learner(encoder_folder("modernbert"), exact_layers=[0])
        expected = maps_loss_by_hand(model, texts)
        assert len(expected) == 1
        assert_close(AttentionTransferLoss(model)([model.preprocess(texts)]), expected[0], rtol=1e-4, atol=0)

    def test_the_model_answers_with_linear_attention_again(self, bert: str, texts: list[str]) -> None:
        model = learner(bert)
        before = model.encode(texts, convert_to_tensor=True)
        AttentionTransferLoss(model)([model.preprocess(texts)])
        assert_close(model.encode(texts, convert_to_tensor=True), before)


class TestTransferOfMapsToHiddenStates:
    @staticmethod
    def by_hand(model: SentenceTransformer, texts: list[str]) -> tuple[Tensor, Tensor]:
        """The mean relative error of the hidden states, and the mean distance of the embeddings, text by text."""
        original = convert(model, feature_map="softmax", max_seq_length=model.max_seq_length)
        rows = []
        for text in texts:
            ids = model.tokenizer(text, return_tensors="pt")["input_ids"][0]
            rows.append((hidden_states(model[0].model, ids), hidden_states(original[0].model, ids)))
        layers = range(len(rows[0][0]))
        errors = [relative_error([s[layer] for s, _ in rows], [t[layer] for _, t in rows]) for layer in layers]
        vectors = [x.encode(texts, convert_to_tensor=True) for x in (model, original)]
        return torch.stack(errors).mean(), (1 - F.cosine_similarity(*vectors)).mean()

    @pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
    @pytest.mark.parametrize("pooled", [0.0, 3.0])
    def test_value(self, bert: str, texts: list[str], packed: bool, pooled: float) -> None:
        model = learner(bert).eval()
        hidden, distance = self.by_hand(model, texts)
        assert min(hidden, distance) > 1e-4
        loss = AttentionTransferLoss(model, target="hidden", pooled=pooled)
        with packing(model, packed):
            assert_close(loss([model.preprocess(texts)]), hidden + pooled * distance, rtol=1e-3, atol=0)

    def test_maps_alone_learn_it(self, bert: str, texts: list[str]) -> None:
        model = learner(bert)
        loss = AttentionTransferLoss(model, target="hidden", pooled=1.0)
        before, columns = copy.deepcopy(model.state_dict()), [model.preprocess(texts)]
        first = loss(columns).item()
        train_steps(loss, columns, steps=20, rate=1e-2)
        assert loss(columns).item() < 0.8 * first
        moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        assert moved == {name for name in before if ".linear_attention." in name}

    def test_texts_inside_the_window_give_zero_gradients(self, bert: str, text: Callable[..., str]) -> None:
        model = learner(bert)
        loss = AttentionTransferLoss(model, target="hidden", pooled=1.0)
        loss([model.preprocess([text(16), text(3)])]).backward()
        assert all(p.grad.abs().max() < 1e-6 for p in model.parameters() if p.requires_grad)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"target": "weights"}, "unknown target 'weights'; choose one of: attention, hidden"),
            ({"target": "attention", "train": "all"}, "target='attention' compares layers"),
            ({"pooled": 1.0}, "target='attention' never pools the linear encoder, got pooled=1.0"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, bert: str, options: dict[str, Any], message: str) -> None:
        with refused(message):
            AttentionTransferLoss(learner(bert), **options)


class TestTransferOfAll:
    @pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
    def test_it_is_the_mean_relative_error_of_the_hidden_states(
        self, bert: str, texts: list[str], packed: bool
    ) -> None:
        model = learner(bert)
        loss = AttentionTransferLoss(model, train="all")
        # A step away from the target, so that copy and student differ in more than attention.
        train_steps(loss, [model.preprocess(texts)], steps=1, rate=1e-3)
        short = [text for text in texts if len(text.split()) < 50]
        original = AutoModel.from_pretrained(bert, attn_implementation="eager").eval()
        model.eval()
        rows = []
        for text in short:
            ids = model.tokenizer(text, return_tensors="pt")["input_ids"][0]
            rows.append((hidden_states(model[0].model, ids), hidden_states(original, ids)))
        expected = [
            relative_error([student[layer] for student, _ in rows], [target[layer] for _, target in rows])
            for layer in range(2)
        ]
        with packing(model, packed):
            features = model.preprocess(short)
            assert ("cu_seq_lens_q" in features) == packed
            assert_close(loss([features]), torch.stack(expected).mean(), rtol=1e-4, atol=0)

    def test_every_parameter_may_move(self, bert: str, texts: list[str]) -> None:
        model = learner(bert)
        loss = AttentionTransferLoss(model, train="all")
        before = copy.deepcopy(model.state_dict())
        assert {id(p) for p in loss.parameters()} == {id(p) for p in model.parameters()}
        train_steps(loss, [model.preprocess(texts)], steps=2, rate=1e-3)
        still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
        # The pooler gives no hidden state.
        assert all("pooler" in name for name in still)
        assert all(parameter.requires_grad for parameter in model.parameters())

    def test_the_target_stays_where_it_was(self, bert: str, texts: list[str]) -> None:
        model = learner(bert)
        loss = AttentionTransferLoss(model, train="all")
        columns = [model.preprocess(texts)]
        start, before = copy.deepcopy(model.state_dict()), loss(columns).item()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)
        assert loss(columns).item() != pytest.approx(before, rel=0.01)
        # A target that shared weights with the student would have moved along, and a new loss takes a new one.
        assert AttentionTransferLoss(model, train="all")(columns).item() != pytest.approx(
            loss(columns).item(), rel=0.01
        )
        model.load_state_dict(start)
        assert loss(columns).item() == pytest.approx(before, rel=1e-5)

    def test_it_falls(self, bert: str, texts: list[str]) -> None:
        model = learner(bert, feature_map="elu", window=0)
        loss = AttentionTransferLoss(model, train="all")
        columns = [model.preprocess(texts)]
        before = loss(columns).item()
        train_steps(loss, columns, steps=30, rate=2e-3)
        assert loss(columns).item() < 0.5 * before

    def test_without_a_difference_there_is_no_loss(
        self, bert: str, texts: list[str], text: Callable[..., str]
    ) -> None:
        model = learner(bert)
        loss = AttentionTransferLoss(model, train="all")
        assert loss([model.preprocess([text(16), text(5)])]) < 1e-10
        assert loss([model.preprocess(texts)]) > 1e-4

    def test_packed_equals_padded(self, bert: str, texts: list[str]) -> None:
        model = learner(bert)
        loss = AttentionTransferLoss(model, train="all")
        parameters = [p for name, p in model.named_parameters() if "pooler" not in name]
        results = []
        for packed in (True, False):
            with packing(model, packed):
                value = loss([model.preprocess(texts)])
            results.append((value, torch.autograd.grad(value, parameters)))
        assert_close(*results, rtol=1e-3, atol=1e-5)

    def test_the_model_is_left_as_it_was_by_a_failing_batch(
        self, bert: str, texts: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = learner(bert)
        loss = AttentionTransferLoss(model, train="all").train()
        own = model[0].model

        def fail(call: AttentionCall) -> Tensor:
            raise MemoryError

        columns = [model.preprocess(texts)]
        with monkeypatch.context() as patch:
            patch.setattr(AttentionCall, "softmax", fail)
            with pytest.raises(MemoryError):
                loss(columns)
        assert model[0].model is own
        assert model.training
        assert not own.config.output_hidden_states
        assert "all_layer_embeddings" not in model(model.preprocess(texts))


@pytest.mark.parametrize("train", ["maps", "all"])
class TestTransfer:
    def test_dropout_is_off_and_comes_back(self, bert: str, texts: list[str], train: Any) -> None:
        model = learner(bert)
        assert model[0].model.config.hidden_dropout_prob > 0
        assert model[0].model.config.attention_probs_dropout_prob > 0
        loss = AttentionTransferLoss(model, train=train)
        columns = [model.preprocess(texts)]
        expected = loss.eval()(columns)
        assert not model.training
        assert_close(loss.train()(columns), expected)
        assert all(module.training for module in model.modules())

    def test_features_serve_a_second_time(self, bert: str, texts: list[str], train: Any) -> None:
        model = learner(bert)
        loss = AttentionTransferLoss(model, train=train)
        for packed in (True, False):
            with packing(model, packed):
                columns = [model.preprocess(texts), model.preprocess(texts[::-1])]
            before = copy.deepcopy(columns)
            first = loss(columns)
            for features, kept in zip(columns, before):
                assert features.keys() == kept.keys()
                for key, value in features.items():
                    assert torch.equal(value, kept[key]) if isinstance(value, Tensor) else value == kept[key]
            assert_close(loss(columns), first)

    def test_labels_are_not_read(self, bert: str, texts: list[str], train: Any) -> None:
        model = learner(bert)
        loss = AttentionTransferLoss(model, train=train)
        columns = [model.preprocess(texts)]
        assert_close(loss(columns, torch.full((4,), math.nan)), loss(columns))

    def test_every_family(self, family: str, texts: list[str], train: Any) -> None:
        model = learner(family)
        loss = AttentionTransferLoss(model, train=train)
        values = []
        for packed in (None, False):
            model[0].unpad_inputs = packed
            values.append(loss([model.preprocess(texts)]))
        assert_close(*values, rtol=1e-3, atol=1e-6)
        assert values[0] > 1e-5
        values[0].backward()
        maps = [p for module in linear_attentions(model).values() for p in module.parameters()]
        assert maps
        assert all(torch.isfinite(p.grad).all() for p in maps)
        assert any(p.grad.abs().max() > 0 for p in maps)

    def test_model_cards_are_told_the_setting(self, bert: str, train: Any) -> None:
        target = "attention" if train == "maps" else "hidden"
        config = AttentionTransferLoss(learner(bert), train=train).get_config_dict()
        assert config == {"train": train, "target": target, "pooled": 0.0}

    def test_a_model_without_linear_attention_is_refused(self, bert: str, train: Any) -> None:
        message = "AttentionTransferLoss needs a model with linear attention: call st_linear.convert first"
        for model in (SentenceTransformer(bert), learner(bert, feature_map="softmax"), given_model()):
            with refused(message):
                AttentionTransferLoss(model, train=train)

    def test_layers_that_all_stay_exact_are_refused(self, bert: str, train: Any) -> None:
        with refused("AttentionTransferLoss needs a model with linear attention"):
            AttentionTransferLoss(learner(bert, exact_layers=[0, 1]), train=train)


class TestTransferArguments:
    def test_an_unknown_choice_is_refused(self, bert: str) -> None:
        with refused("unknown train 'heads'; choose one of: maps, all"):
            AttentionTransferLoss(learner(bert), train="heads")

    @pytest.mark.parametrize("feature_map", ["elu", "favor"])
    def test_maps_without_parameters_are_refused(self, bert: str, feature_map: str) -> None:
        model = learner(bert, feature_map=feature_map, window=0)
        with refused(
            f"feature_map={feature_map!r} with window=0 has nothing to train; choose a learned map (learned_favor, "
            "hedgehog, t2r), a window > 0, or train='all'"
        ):
            AttentionTransferLoss(model)
        # A refusal freezes nothing.
        assert all(parameter.requires_grad for parameter in model.parameters())
        AttentionTransferLoss(model, train="all")

    def test_a_gain_is_enough_to_train(self, bert: str, texts: list[str]) -> None:
        model = learner(bert, feature_map="elu")
        AttentionTransferLoss(model)([model.preprocess(texts)]).backward()
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert len(trained) == 2
        assert all(name.endswith(".gain") for name in trained)

    def test_the_encoder_alone_will_do(self, bert: str, texts: list[str]) -> None:
        encoder = LinearTransformer(bert, feature_map="hedgehog", window=8, max_seq_length=128)
        model = SentenceTransformer(modules=[encoder, Pooling(encoder.get_embedding_dimension(), "cls")])
        expected = maps_loss_by_hand(model, texts)
        value = AttentionTransferLoss(model)([model.preprocess(texts)])
        assert_close(value, torch.stack(expected).mean(), rtol=1e-4, atol=0)
