"""Write the golden folders of this version: ``python tests/golden/make.py``, once, before it is released.

Small random models as :func:`st_linear.load` must read them in every later version, and the vectors that they give.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoModel, BertConfig, ModernBertConfig, PreTrainedConfig

sys.path.insert(0, str(Path(__file__).parent.parent))
from conftest import SMALL, WORDS, make_tokenizer

import st_linear
from st_linear.adapters import export_adapter
from st_linear.pair_head import DSEHead
from st_linear.records import write_json

HERE = Path(__file__).parent
# Weights so large that attention is far from uniform.
TINY = {
    **SMALL,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 1.0,
}
TEXTS = [" ".join(WORDS[(7 * i + j * j) % len(WORDS)] for j in range(n)) for i, n in enumerate((3, 14, 30, 60))]
BERT = BertConfig(**TINY)
MODERNBERT = ModernBertConfig(
    **TINY,
    layer_types=["full_attention", "sliding_attention"],
    local_attention=8,
    cls_token_id=TINY["bos_token_id"],
    sep_token_id=TINY["eos_token_id"],
)


def make(config: PreTrainedConfig, pooling: str, folder: Path, **settings: Any) -> SentenceTransformer:
    """A converted random encoder, saved with its vectors."""
    with tempfile.TemporaryDirectory() as base:
        AutoModel.from_config(config).save_pretrained(base)
        make_tokenizer().save_pretrained(base)
        model = SentenceTransformer(modules=[Transformer(base), Pooling(TINY["hidden_size"], pooling)])
        model = st_linear.convert(model, max_seq_length=64, **settings)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    if settings["feature_map"] == "hedgehog":
        model.append(DSEHead(TINY["hidden_size"], 4))
    model[0].base_encoder = {"name": "random", "revision": None}
    model.save_pretrained(str(folder), create_model_card=False)
    vectors = [[round(float(value), 7) for value in vector] for vector in model.encode(TEXTS)]
    write_json(folder / "vectors.json", {"texts": TEXTS, "vectors": vectors})
    return model


def main() -> None:
    """Write them, unless they are there."""
    root = HERE / st_linear.__version__
    if root.exists():
        sys.exit(f"{root} is there: golden folders are not made again")
    torch.manual_seed(0)
    bert = make(BERT, "cls", root / "bert-hedgehog-8", feature_map="hedgehog", window=8)
    favor = {"feature_map": "favor", "feature_map_kwargs": {"num_features": 16}, "window": 0, "exact_layers": [1]}
    make(MODERNBERT, "mean", root / "modernbert-favor-0", **favor)
    export_adapter(bert[0], root / "adapter")


if __name__ == "__main__":
    main()
