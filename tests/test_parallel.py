"""Training in two processes equals training in one: ``pytest -m slow tests/test_parallel.py``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_recipe import write_pairs

# Trains converted encoders on 16 pairs or texts a step in all, however many processes there are. In float64 and
# without dropout nothing is left to differ but the order of sums; with SGD, as Adam would make as much of rounding as
# of a gradient.
SCRIPT = """
import sys
import torch
from accelerate import debug_launcher
from datasets import Dataset
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from st_linear import AttentionTransferLoss, DistillationLoss, convert
from st_linear.data import load_pairs

launcher, base = sys.argv[1:]


def save(model, name):
    save_file({key: value.contiguous().clone() for key, value in model.state_dict().items()}, f"{name}.safetensors")


def train(what, feature_map, window):
    world = 1 if launcher == "one" else 2
    original = SentenceTransformer(base).double()
    for module in original.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    config = original[0].model.config
    config.attention_probs_dropout_prob = config.hidden_dropout_prob = 0.0
    model = convert(original, feature_map=feature_map, window=window, max_seq_length=200, seed=7).double()
    pairs = load_pairs("pairs").select(range(16))
    if what == "distillation":
        loss, data = DistillationLoss(model, alpha=0), pairs
    else:
        loss = AttentionTransferLoss(model, train="maps" if what == "transfer" else "all")
        data = Dataset.from_dict({"text": [" ".join([text] * (4 + i)) for i, text in enumerate(pairs["sentence1"])]})
    arguments = SentenceTransformerTrainingArguments(
        output_dir=f"trainer-{launcher}", max_steps=4, per_device_train_batch_size=16 // world, optim="sgd",
        learning_rate=0.1, lr_scheduler_type="constant", save_strategy="no", logging_strategy="no", report_to="none",
        use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, seed=0,
    )
    name = f"{what}-{feature_map}-{window}"
    if world == 1:
        save(model, f"{name}-start")
    trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=data, loss=loss)
    assert trainer.args.world_size == world
    trainer.train()
    save(trainer.accelerator.unwrap_model(trainer.model), f"{name}-{launcher}-{trainer.args.process_index}")


def main():
    torch.set_num_threads(1)
    for case in CASES:
        train(*case)


if __name__ == "__main__":
    debug_launcher(main, num_processes=2) if launcher == "accelerate" else main()
"""

CASES = [
    *(("distillation", feature_map, window) for feature_map, window in (("hedgehog", 8), ("favor", 0), ("elu", 4))),
    *(("transfer", feature_map, window) for feature_map, window in (("hedgehog", 0), ("learned_favor", 8))),
    ("transfer of all", "favor", 0),
]
LAUNCHERS = {
    "one": (),
    "torchrun": ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    "accelerate": (),
}


@pytest.mark.slow
def test_two_processes_equal_one(bert: str, tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs")
    (tmp_path / "script.py").write_text(f"CASES = {CASES}\n{SCRIPT}")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for name, options in LAUNCHERS.items():
        command = [sys.executable, *options, "script.py", name, bert]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    for case in CASES:
        name = "-".join(map(str, case))
        start, one = (load_file(tmp_path / f"{name}-{end}.safetensors") for end in ("start", "one-0"))
        assert max((one[key] - value).abs().max() for key, value in start.items()) > 1e-4
        for launcher in ("torchrun", "accelerate"):
            ranks = [load_file(tmp_path / f"{name}-{launcher}-{rank}.safetensors") for rank in (0, 1)]
            torch.testing.assert_close(ranks[0], ranks[1], rtol=0, atol=0)
            # Losses are computed in float32.
            torch.testing.assert_close(ranks[0], one, rtol=0, atol=1e-7)
