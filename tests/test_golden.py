"""What earlier versions saved loads, and gives the vectors it gave; ``golden/make.py`` writes the folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling

import st_linear
from st_linear import LinearTransformer
from st_linear.records import read_json

GOLDEN = Path(__file__).parent / "golden"
MODELS = [file.parent for file in sorted(GOLDEN.glob("*/*/modules.json"))]
ADAPTERS = sorted(GOLDEN.glob("*/adapter"))


def test_this_version_has_some() -> None:
    assert (GOLDEN / st_linear.__version__).is_dir()
    assert len(MODELS) >= 2
    assert len(ADAPTERS) >= 1


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_models(folder: Path) -> None:
    expected = read_json(folder / "vectors.json")
    for model in (st_linear.load(str(folder)), SentenceTransformer(str(folder), trust_remote_code=True)):
        vectors = torch.from_numpy(model.encode(expected["texts"]))
        torch.testing.assert_close(vectors, torch.tensor(expected["vectors"]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("folder", ADAPTERS, ids=lambda folder: folder.parent.name)
def test_adapters(folder: Path) -> None:
    source = folder.parent / "bert-hedgehog-8"
    expected = read_json(source / "vectors.json")
    encoder = LinearTransformer(str(source), adapter=str(folder), max_seq_length=64)
    model = SentenceTransformer(modules=[encoder, Pooling(encoder.get_embedding_dimension(), "cls")])
    # Its matrices are kept in half precision.
    vectors = torch.from_numpy(model.encode(expected["texts"]))
    torch.testing.assert_close(vectors, torch.tensor(expected["vectors"]), rtol=0, atol=2e-3)
    untrained = LinearTransformer(str(source), adapter="none", feature_map="hedgehog", window=8, max_seq_length=64)
    model = SentenceTransformer(modules=[untrained, Pooling(encoder.get_embedding_dimension(), "cls")])
    assert (torch.from_numpy(model.encode(expected["texts"])) - torch.tensor(expected["vectors"])).abs().max() > 1e-2
