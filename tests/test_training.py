"""The losses in Sentence Transformers' trainer and in the older ``fit``: stops, checkpoints, and the best model."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, slow
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file, save_file
from sentence_transformers import (
    CrossEncoder,
    InputExample,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader
from transformers import BertForSequenceClassification, TrainerCallback

import st_linear
from st_linear import AttentionTransferLoss, DistillationLoss, PairScoreEvaluator, PairScorer, convert
from st_linear.conversion import linear_attentions
from st_linear.training import reached

PAIRS = 32
STEPS = 8
"""Batches of 8 pairs, 2 epochs."""


@pytest.fixture(scope="module")
def pairs(text: Callable[..., str]) -> Dataset:
    """Pairs on both sides of the window, with gold and teacher scores that go with the words they share."""
    rows = []
    for index in range(PAIRS):
        first, other = (text(6 + index % 11, seed=seed) for seed in (index, index + 500))
        kept = index % 5
        words = first.split()
        keep = len(words) * kept // 4
        second = " ".join([*words[:keep], *other.split()[keep:]])
        rows.append({"sentence1": first, "sentence2": second, "score": [kept / 4, 0.1 + 0.2 * kept]})
    return Dataset.from_list(rows)


def test_reached_is_linear_between_points() -> None:
    curve = [
        {"step": 0, "tokens": 0, "pearson": 0.4},
        {"step": 10, "tokens": 5000, "pearson": 0.8},
        {"step": 20, "tokens": 10000, "pearson": 0.8},
    ]
    assert reached(curve, 0.6, "step") == pytest.approx(5)
    assert reached(curve, 0.7, "tokens") == pytest.approx(3750)
    assert reached(curve, 0.3, "tokens") == 0
    assert reached(curve[1:], 0.3, "tokens") == curve[1]["tokens"] > 0
    assert reached(curve, 0.81, "tokens") is None


def side(pairs: Dataset, index: int) -> Dataset:
    """The pairs with the gold scores (0) or the teacher's (1) alone."""
    scores = [label[index] for label in pairs["score"]]
    return pairs.remove_columns("score").add_column("score", scores)


@pytest.fixture(scope="module")
def texts(text: Callable[..., str]) -> Dataset:
    return Dataset.from_dict({"text": [text(length, seed=7) for length in range(20, 20 + PAIRS)]})


def student(bert: str, seed: int = 0) -> SentenceTransformer:
    """A converted encoder, dropout on; ``seed`` decides the start of a head that a loss appends."""
    torch.manual_seed(seed)
    model = convert(bert, feature_map="hedgehog", window=4, max_seq_length=96)
    assert model[0].model.config.hidden_dropout_prob == 0.1
    return model


LOSSES: dict[str, Callable[[SentenceTransformer], nn.Module]] = {
    "cosine": lambda model: DistillationLoss(model),
    "dse": lambda model: DistillationLoss(model, head="dse"),
    "maps": lambda model: AttentionTransferLoss(model),
    "all": lambda model: AttentionTransferLoss(model, train="all"),
}

RATES = {"cosine": 2e-3, "dse": 2e-3, "maps": 3e-2, "all": 2e-3}
"""Learning rates; the maps, which start where they are sensible already, have far to go."""


@pytest.fixture(params=["cosine", *(slow(name) for name in ("dse", "maps", "all"))])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def data(name: str, pairs: Dataset, texts: Dataset) -> Dataset:
    return pairs if name in ("cosine", "dse") else texts


def arguments(folder: Path, **options: Any) -> SentenceTransformerTrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "learning_rate": 2e-3,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    return SentenceTransformerTrainingArguments(**{**defaults, **options})


def weights(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(dict(model.state_dict()))


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first if first[name].is_floating_point())


def value_of(loss: Any, model: SentenceTransformer, data: Dataset) -> float:
    """The loss on all rows at once, dropout off."""
    data = data.with_format(None)  # the Trainer sets one of its own
    columns = [column for column in data.column_names if column != "score"]
    labels = torch.tensor(data["score"]) if "score" in data.column_names else None
    training = loss.training
    loss.eval()
    with torch.no_grad():
        value = loss([model.preprocess(data[column]) for column in columns], labels)
    loss.train(training)
    return value.item()


def example_pairs(pairs: Dataset) -> list[tuple[str, str]]:
    return list(zip(pairs["sentence1"], pairs["sentence2"]))


def gold_of(pairs: Dataset) -> list[float]:
    return [gold for gold, _ in pairs["score"]]


def descend(
    name: str, data: Dataset, bert: str, folder: Path, *, batch: int, accumulated: int = 1, **options: Any
) -> dict[str, Tensor]:
    """Weights after three steps without dropout; plain descent shows the size of a gradient, which Adam would hide."""
    model = student(bert)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    args = arguments(
        folder,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulated,
        optim="sgd",
        learning_rate=0.05,
        max_grad_norm=0,
        max_steps=3,
        **options,
    )
    SentenceTransformerTrainer(model=model, args=args, train_dataset=data, loss=LOSSES[name](model)).train()
    return weights(model)


class StopAt(TrainerCallback):
    """Ends a run after a step, as a kill does or as a user asks."""

    def __init__(self, step: int, *, killed: bool) -> None:
        self.step = step
        self.killed = killed

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            if self.killed:
                raise KeyboardInterrupt
            control.should_training_stop = True


class TestTrainer:
    def test_losses_fall(self, name: str, data: Dataset, bert: str, tmp_path: Path) -> None:
        model = student(bert)
        loss = LOSSES[name](model)
        before = value_of(loss, model, data)
        args = arguments(tmp_path, num_train_epochs=5, learning_rate=RATES[name])
        trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=data, loss=loss)
        trainer.train()
        assert trainer.state.global_step == 5 * PAIRS // 8
        assert value_of(loss, model, data) < 0.9 * before

    def test_the_loss_is_evaluated_and_logged(self, name: str, data: Dataset, bert: str, tmp_path: Path) -> None:
        model = student(bert)
        loss = LOSSES[name](model)
        args = arguments(tmp_path, eval_strategy="steps", eval_steps=4, logging_strategy="steps", logging_steps=1)
        trainer = SentenceTransformerTrainer(
            model=model, args=args, train_dataset=data, eval_dataset=data.select(range(8)), loss=loss
        )
        trainer.train()
        evaluated = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
        assert list(evaluated) == [4, 8]
        assert evaluated[8] == pytest.approx(value_of(loss, model, data.select(range(8))), rel=1e-4)
        steps = [entry["step"] for entry in trainer.state.log_history if "loss" in entry]
        assert steps == list(range(1, STEPS + 1))

    def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
        self, name: str, data: Dataset, bert: str, tmp_path: Path
    ) -> None:
        def run(
            folder: str, seed: int = 0, resume: str | None = None, *callbacks: TrainerCallback
        ) -> dict[str, Tensor]:
            model = student(bert, seed)
            trainer = SentenceTransformerTrainer(
                model=model,
                # Step 3 lies within an epoch of four, step 6 within the next.
                args=arguments(tmp_path / folder, save_strategy="steps", save_steps=3),
                train_dataset=data,
                loss=LOSSES[name](model),
                callbacks=list(callbacks),
            )
            trainer.train(resume_from_checkpoint=resume)
            assert trainer.state.global_step == (5 if callbacks else STEPS)
            return weights(model)

        expected = run("whole")
        # Each way to end for each kind of loss.
        if name in ("dse", "maps"):
            with pytest.raises(KeyboardInterrupt):
                run("parts", 0, None, StopAt(5, killed=True))
        else:
            run("parts", 0, None, StopAt(5, killed=False))
        checkpoint = str(tmp_path / "parts" / "checkpoint-3")
        # Another head to start from: what counts is in the checkpoint.
        resumed = run("parts", 1, checkpoint)
        assert_close(resumed, expected, rtol=0, atol=1e-6)
        # Steps that change nothing, or that run without dropout, would prove nothing.
        assert distance(weights(st_linear.load(checkpoint)), expected) > 1e-3

    def test_dropout_makes_runs_with_other_seeds_differ(self, bert: str, pairs: Dataset, tmp_path: Path) -> None:
        results = []
        for seed in (3, 4):
            model = student(bert)
            args = arguments(tmp_path, seed=seed, data_seed=0, per_device_train_batch_size=PAIRS)
            trainer = SentenceTransformerTrainer(
                model=model, args=args, train_dataset=pairs, loss=DistillationLoss(model)
            )
            trainer.train()
            results.append(weights(model))
        assert distance(*results) > 1e-4

    def test_checkpoints_are_whole_models(self, name: str, data: Dataset, bert: str, tmp_path: Path) -> None:
        model = student(bert)
        args = arguments(tmp_path, save_strategy="epoch")
        SentenceTransformerTrainer(model=model, args=args, train_dataset=data, loss=LOSSES[name](model)).train()
        assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]
        loaded = st_linear.load(str(tmp_path / "checkpoint-8"))
        assert_close(weights(loaded), weights(model), rtol=0, atol=0)
        assert distance(weights(loaded), weights(st_linear.load(str(tmp_path / "checkpoint-4")))) > 1e-4

    def test_maps_alone_move_and_the_rest_is_in_the_checkpoint(
        self, bert: str, texts: Dataset, tmp_path: Path
    ) -> None:
        model = student(bert)
        before = weights(model)
        args = arguments(tmp_path, save_strategy="epoch", weight_decay=0.1)
        SentenceTransformerTrainer(
            model=model, args=args, train_dataset=texts, loss=AttentionTransferLoss(model)
        ).train()
        maps = {f"{n}.{p}" for n, m in linear_attentions(model).items() for p, _ in m.named_parameters()}
        after = weights(st_linear.load(str(tmp_path / "checkpoint-8")))
        assert {name for name in before if not torch.equal(before[name], after[name])} == maps

    def test_gradients_accumulate(self, name: str, data: Dataset, bert: str, tmp_path: Path) -> None:
        start = weights(student(bert))
        whole = descend(name, data, bert, tmp_path, batch=8)
        parts = descend(name, data, bert, tmp_path, batch=4, accumulated=2)
        moved = max(float((whole[key] - start[key]).abs().max()) for key in start)
        assert moved > 1e-4
        # Attention transfer divides by the variance over a batch's tokens, so its mean over parts is another one.
        assert distance(whole, parts) < (1e-5 if name in ("cosine", "dse") else 0.2 * moved)

    @pytest.mark.slow
    def test_two_processes_are_one_that_accumulates(self, name: str, data: Dataset, bert: str, tmp_path: Path) -> None:
        data.save_to_disk(tmp_path / "data")
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
        subprocess.run([sys.executable, *command, name, bert, str(tmp_path)], check=True, cwd=tmp_path)
        expected = descend(name, data, bert, tmp_path, batch=4, accumulated=2)
        for rank in (0, 1):
            assert_close(load_file(tmp_path / f"{rank}.safetensors"), expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("packed", [True, slow(False)], ids=["packed", "padded"])
    def test_bf16_autocast(self, name: str, data: Dataset, bert: str, tmp_path: Path, packed: bool) -> None:
        model = student(bert)
        model[0].unpad_inputs = packed
        loss = LOSSES[name](model)
        before = value_of(loss, model, data)
        seen: list[torch.dtype] = []
        layer = model[0].model.encoder.layer[0].attention.self.query
        hook = layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        args = arguments(tmp_path, bf16=True, num_train_epochs=10, learning_rate=RATES[name])
        SentenceTransformerTrainer(model=model, args=args, train_dataset=data, loss=loss).train()
        hook.remove()
        assert set(seen) == {torch.bfloat16}
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert value_of(loss, model, data) < 0.9 * before

    def test_a_live_teacher(self, bert: str, pairs: Dataset, tmp_path: Path, save_encoder: Callable[..., str]) -> None:
        config = FAMILIES["bert"]()
        config.num_labels = 1
        teacher = CrossEncoder(save_encoder(config, BertForSequenceClassification), device="cpu")
        taught = teacher.predict(example_pairs(pairs)).tolist()
        columns = pairs.remove_columns("score")
        results = []
        for dataset, live in ((columns, teacher), (columns.add_column("score", taught), None)):
            model = student(bert)
            loss = DistillationLoss(model, live, alpha=1)
            SentenceTransformerTrainer(model=model, args=arguments(tmp_path), train_dataset=dataset, loss=loss).train()
            results.append(weights(model))
        # Batches of the teacher are padded otherwise, which rounds otherwise, and Adam takes sides by the sign.
        assert distance(*results) < 1e-3
        assert distance(results[0], weights(student(bert))) > 5e-3

    @pytest.mark.parametrize("head", ["cosine", slow("dse")])
    def test_gold_and_taught_pairs_from_two_datasets(
        self, head: Any, bert: str, pairs: Dataset, tmp_path: Path
    ) -> None:
        model = student(bert)
        losses = {
            "gold": DistillationLoss(model, alpha=0, head=head),
            "mined": DistillationLoss(model, alpha=1, head=head),
        }
        datasets = {
            "gold": side(pairs, 0).select(range(16)),
            "mined": side(pairs, 1).select(range(16, 32)),
        }
        before = {key: value_of(losses[key], model, datasets[key]) for key in losses}
        trainer = SentenceTransformerTrainer(
            model=model,
            args=arguments(tmp_path, num_train_epochs=5, eval_strategy="epoch", learning_rate=RATES[head]),
            train_dataset=DatasetDict(datasets),
            eval_dataset=DatasetDict(datasets),
            loss=losses,
        )
        trainer.train()
        assert trainer.state.global_step == 5 * 4
        for key, loss in losses.items():
            assert value_of(loss, model, datasets[key]) < 0.9 * before[key], key
        logged = trainer.state.log_history[-3:]
        assert {key for entry in logged for key in entry} >= {"eval_gold_loss", "eval_mined_loss"}


class Scripted(BaseEvaluator):
    """Gives scores from a list, and remembers the weights that it saw."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.primary_metric = "score"
        self.scores = scores
        self.seen: list[dict[str, Tensor]] = []

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.seen.append(weights(model))
        return {"score": self.scores[len(self.seen) - 1]}


class Spoil(TrainerCallback):
    """Turns the head's scores upside down after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step:
            with torch.no_grad():
                for parameter in model[-1].mlp[-1].parameters():
                    parameter.neg_()


class TestBestModel:
    BEST: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
    }

    def test_the_best_weights_come_back(self, name: str, data: Dataset, bert: str, tmp_path: Path) -> None:
        model = student(bert)
        evaluator = Scripted([0.1, 0.9, 0.3, 0.2])
        trainer = SentenceTransformerTrainer(
            model=model,
            args=arguments(tmp_path, metric_for_best_model="eval_score", **self.BEST),
            train_dataset=data,
            loss=LOSSES[name](model),
            evaluator=evaluator,
        )
        trainer.train()
        assert len(evaluator.seen) == 4
        assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
        assert_close(weights(model), evaluator.seen[1], rtol=0, atol=0)
        assert distance(evaluator.seen[1], evaluator.seen[3]) > 1e-3

    def test_the_pair_score_evaluator_picks_the_best(self, bert: str, pairs: Dataset, tmp_path: Path) -> None:
        model = student(bert)
        loss = DistillationLoss(model, head="dse")
        dev = PairScoreEvaluator(example_pairs(pairs), gold_of(pairs), name="dev")
        trainer = SentenceTransformerTrainer(
            model=model,
            args=arguments(
                tmp_path, metric_for_best_model=f"eval_{dev.primary_metric}", num_train_epochs=4, **self.BEST
            ),
            train_dataset=pairs,
            loss=loss,
            evaluator=dev,
            callbacks=[Spoil(16)],
        )
        trainer.train()
        history = {
            entry["step"]: entry["eval_dev_spearman"]
            for entry in trainer.state.log_history
            if "eval_dev_spearman" in entry
        }
        assert list(history) == list(range(2, 17, 2))
        best = max(history, key=lambda step: history[step])
        assert history[16] < 0 < 0.3 < history[best]
        assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
        # Neither the spoilt scores nor those of another step are what the model gives now.
        assert dev(model)["dev_spearman"] == pytest.approx(history[best], abs=1e-6)
        loaded = st_linear.load(trainer.state.best_model_checkpoint)
        assert_close(weights(loaded), weights(model), rtol=0, atol=0)


@pytest.mark.parametrize("labels", [slow("gold"), "both"])
class TestFit:
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # fit() without checkpoint_path puts its checkpoints into the working directory.
        monkeypatch.chdir(tmp_path)

    def loader(self, pairs: Dataset, labels: str) -> DataLoader:
        examples = [
            InputExample(texts=list(texts), label=label if labels == "both" else label[0])
            for texts, label in zip(example_pairs(pairs), pairs["score"])
        ]
        return DataLoader(examples, shuffle=True, batch_size=8)

    @pytest.mark.parametrize("head", ["cosine", slow("dse")])
    def test_it_learns_and_saves(self, head: Any, labels: str, bert: str, pairs: Dataset, tmp_path: Path) -> None:
        model = student(bert)
        loss = DistillationLoss(model, alpha=0.5 if labels == "both" else 0, head=head)
        data = pairs if labels == "both" else side(pairs, 0)
        before = value_of(loss, model, data)
        model.fit(
            [(self.loader(pairs, labels), loss)],
            epochs=5,
            warmup_steps=0,
            optimizer_params={"lr": RATES[head]},
            output_path=str(tmp_path / "output"),
            checkpoint_path=str(tmp_path / "checkpoints"),
            checkpoint_save_steps=10,
            show_progress_bar=False,
        )
        assert value_of(loss, model, data) < 0.9 * before
        for folder in ("output", "checkpoints/checkpoint-20"):
            for loaded in (
                st_linear.load(str(tmp_path / folder)),
                SentenceTransformer(str(tmp_path / folder), trust_remote_code=True),
            ):
                assert_close(weights(loaded), weights(model), rtol=0, atol=0)
        assert (
            distance(weights(st_linear.load(str(tmp_path / "checkpoints" / "checkpoint-10"))), weights(model)) > 1e-3
        )

    @pytest.mark.slow
    def test_the_best_model_is_saved(self, labels: str, bert: str, pairs: Dataset, tmp_path: Path) -> None:
        model = student(bert)
        loss = DistillationLoss(model, alpha=0.5 if labels == "both" else 0, head="dse")
        dev = PairScoreEvaluator(example_pairs(pairs), gold_of(pairs), name="dev")
        scores: list[float] = []
        model.fit(
            [(self.loader(pairs, labels), loss)],
            evaluator=dev,
            epochs=3,
            warmup_steps=0,
            optimizer_params={"lr": 2e-3},
            output_path=str(tmp_path / "output"),
            callback=lambda score, epoch, steps: scores.append(score),
            show_progress_bar=False,
        )
        assert len(scores) >= 3
        best = PairScoreEvaluator(example_pairs(pairs), gold_of(pairs))(st_linear.load(str(tmp_path / "output")))
        assert best["spearman"] == pytest.approx(max(scores), abs=1e-6)

    @pytest.mark.slow
    def test_the_oldest_loop_too(self, labels: str, bert: str, pairs: Dataset) -> None:
        model = student(bert)
        loss = DistillationLoss(model, alpha=0.5 if labels == "both" else 0)
        data = pairs if labels == "both" else side(pairs, 0)
        before = value_of(loss, model, data)
        model.old_fit(
            [(self.loader(pairs, labels), loss)],
            epochs=5,
            warmup_steps=0,
            optimizer_params={"lr": 2e-3},
            show_progress_bar=False,
        )
        assert value_of(loss, model, data) < 0.9 * before


class TestFitTransfer:
    @pytest.mark.parametrize("train", ["maps", slow("all")])
    def test_plain_texts(
        self, train: Any, bert: str, texts: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        model = student(bert)
        loss = AttentionTransferLoss(model, train=train)
        before = value_of(loss, model, texts)
        loader = DataLoader([InputExample(texts=[text]) for text in texts["text"]], shuffle=True, batch_size=8)
        model.fit(
            [(loader, loss)],
            epochs=5,
            warmup_steps=0,
            optimizer_params={"lr": RATES[train]},
            output_path=str(tmp_path / "output"),
            show_progress_bar=False,
        )
        assert value_of(loss, model, texts) < 0.9 * before
        assert_close(weights(st_linear.load(str(tmp_path / "output"))), weights(model), rtol=0, atol=0)


class TestOneAfterTheOther:
    def test_transfer_then_distillation(self, bert: str, pairs: Dataset, texts: Dataset, tmp_path: Path) -> None:
        model = student(bert)
        SentenceTransformerTrainer(
            model=model,
            args=arguments(tmp_path / "transfer"),
            train_dataset=texts,
            loss=AttentionTransferLoss(model),
        ).train()
        model.requires_grad_(True)
        between = weights(model)
        dev = EmbeddingSimilarityEvaluator(pairs["sentence1"], pairs["sentence2"], gold_of(pairs), name="dev")
        SentenceTransformerTrainer(
            model=model,
            args=arguments(tmp_path / "distilled", num_train_epochs=5),
            train_dataset=pairs,
            loss=DistillationLoss(model),
            evaluator=dev,
        ).train()
        changed = {name for name, tensor in weights(model).items() if not torch.equal(tensor, between[name])}
        assert changed >= {name for name in between if "encoder.layer" in name and name.endswith("weight")}
        assert dev(model)["dev_spearman_cosine"] > 0.3

    def test_the_card_of_a_trained_model(self, bert: str, pairs: Dataset, tmp_path: Path) -> None:
        model = student(bert)
        loss = DistillationLoss(model, head="dse")
        SentenceTransformerTrainer(model=model, args=arguments(tmp_path), train_dataset=pairs, loss=loss).train()
        model.save_pretrained(str(tmp_path / "model"))
        card = (tmp_path / "model" / "README.md").read_text()
        assert "DistillationLoss" in card
        assert '"head": "dse"' in card
        assert "barkan2020scalable" in card
        scores = PairScorer(st_linear.load(str(tmp_path / "model"))).predict(example_pairs(pairs))
        assert_close(torch.tensor(scores), torch.tensor(PairScorer(model).predict(example_pairs(pairs))))


if __name__ == "__main__":
    # One of the processes of TestTrainer.test_two_processes_are_one_that_accumulates.
    loss_name, base, output = sys.argv[1:]
    dataset = Dataset.load_from_disk(f"{output}/data")
    trained = descend(loss_name, dataset, base, Path(output), batch=4, ddp_backend="gloo")
    save_file(trained, f"{output}/{os.environ['RANK']}.safetensors")
