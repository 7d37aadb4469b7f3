from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModel

from st_linear import LinearTransformer
from st_linear.positions import (
    extend_positions,
    extend_table,
    has_rotary_positions,
    rescaled_positions,
    trained_positions,
)

LIMIT = 64
"""Positions that the tiny encoders are made with."""

ABSOLUTE = ["bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra", "albert", "ernie"]


def original_embeddings(folder: str, text: str, position_ids: Tensor | None = None) -> Tensor:
    """Token embeddings (T, hidden) of the encoder as transformers has it."""
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(text, return_tensors="pt", truncation=False)
    with torch.no_grad():
        return model(**inputs, position_ids=position_ids).last_hidden_state[0]


def embeddings(encoder: LinearTransformer, texts: list[str]) -> list[Tensor]:
    with torch.no_grad():
        features = encoder.eval()(encoder.preprocess(texts))
    return [row[mask.bool()] for row, mask in zip(features["token_embeddings"], features["attention_mask"])]


@pytest.mark.parametrize("offset", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tile_keeps_rows_and_repeats_them(offset: int, dtype: torch.dtype) -> None:
    table = torch.randn(offset + 5, 3).to(dtype)
    longer = extend_table(table, 13, "tile", offset)
    assert longer.dtype == dtype
    assert longer.shape == (offset + 13, 3)
    assert torch.equal(longer[: offset + 5], table)
    for position in range(5, 13):
        assert torch.equal(longer[offset + position], table[offset + position % 5])


@pytest.mark.parametrize("offset", [0, 2])
def test_interpolate_stretches_from_the_first_to_the_last_row(offset: int) -> None:
    table = torch.randn(offset + 5, 3)
    longer = extend_table(table, 9, "interpolate", offset)
    torch.testing.assert_close(longer[:offset], table[:offset])
    torch.testing.assert_close(longer[offset::2], table[offset:])
    torch.testing.assert_close(longer[offset + 1 :: 2], (table[offset:-1] + table[offset + 1 :]) / 2)


def test_a_table_that_is_long_enough_is_left_alone() -> None:
    table = torch.randn(7, 3)
    assert extend_table(table, 5, "tile", 2) is table
    assert extend_table(table, 4, "interpolate", 2) is table


@pytest.mark.parametrize("name", ABSOLUTE)
def test_absolute_positions_grow(name: str, encoder_folder: Callable[[str], str]) -> None:
    model = AutoModel.from_pretrained(encoder_folder(name))
    table = next(m for m in model.modules() if hasattr(m, "position_embeddings"))
    before = table.position_embeddings.weight.detach().clone()
    offset = before.shape[0] - LIMIT
    assert offset == (2 if "bert" in name and name in ("roberta", "xlm-roberta", "camembert") else 0)
    assert not has_rotary_positions(model)

    assert extend_positions(model, 150, "tile") == 150
    weight = table.position_embeddings.weight
    assert table.position_embeddings.num_embeddings == weight.shape[0] == 150 + offset
    assert weight.requires_grad
    assert torch.equal(weight[: LIMIT + offset], before)
    assert torch.equal(weight[offset + LIMIT : offset + 2 * LIMIT], before[offset:])
    assert model.config.max_position_embeddings == 150 + offset
    assert trained_positions(model) == LIMIT + offset
    assert torch.equal(table.position_ids, torch.arange(150 + offset)[None])
    if hasattr(table, "token_type_ids"):
        assert torch.equal(table.token_type_ids, torch.zeros(1, 150 + offset, dtype=torch.long))

    # A second time, from where it is: what the model was trained with is not forgotten.
    assert extend_positions(model, 160, "tile") == 160
    assert trained_positions(model) == LIMIT + offset
    assert extend_positions(model, 100, "tile") == 160


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert"])
def test_none_leaves_the_model_alone(name: str, encoder_folder: Callable[[str], str]) -> None:
    model = AutoModel.from_pretrained(encoder_folder(name))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config = model.config.to_dict()
    assert extend_positions(model, 150, "none") == LIMIT
    assert model.config.to_dict() == config
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_an_unknown_method_is_refused(bert: str) -> None:
    with pytest.raises(
        ValueError, match=r"unknown position_extension 'stretch'; choose one of: tile, interpolate, none"
    ):
        extend_positions(AutoModel.from_pretrained(bert), 150, "stretch")  # type: ignore[arg-type]


def test_rotary_positions_are_squeezed_text_by_text() -> None:
    mask = torch.zeros(3, 12, dtype=torch.long)
    mask[0] = 1
    mask[1, :8] = 1
    mask[2, 6:] = 1
    positions = rescaled_positions(mask, 8)
    assert positions is not None
    torch.testing.assert_close(positions[0], torch.arange(12) * (8 / 12))
    assert torch.equal(positions[1, :8], torch.arange(8.0))
    assert torch.equal(positions[2, 6:], torch.arange(6.0))
    assert rescaled_positions(mask[:, :8], 8) is None
    assert torch.isfinite(rescaled_positions(torch.zeros(1, 12, dtype=torch.long), 8)).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("packed", [True, False])
def test_tile_squeezes_long_rotary_texts_and_no_others(rotary: str, packed: bool, text: Callable[..., str]) -> None:
    encoder = LinearTransformer(rotary, feature_map="softmax", max_seq_length=160)
    encoder.unpad_inputs = None if packed else False
    long, short, at_limit = embeddings(encoder, [text(150), text(20), text(LIMIT)])
    torch.testing.assert_close(short, original_embeddings(rotary, text(20)), rtol=0, atol=1e-4)
    torch.testing.assert_close(at_limit, original_embeddings(rotary, text(LIMIT)), rtol=0, atol=1e-4)
    squeezed = torch.arange(150)[None] * (LIMIT / 150)
    torch.testing.assert_close(long, original_embeddings(rotary, text(150), squeezed), rtol=0, atol=1e-4)
    assert (long - original_embeddings(rotary, text(150))).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["gte", "modernbert"])
def test_interpolate_rescales_rotary_frequencies(name: str, encoder_folder: Callable[[str], str]) -> None:
    model = AutoModel.from_pretrained(encoder_folder(name))
    before = {key: value.clone() for key, value in model.named_buffers() if key.endswith("inv_freq")}
    assert before
    assert extend_positions(model, 2 * LIMIT, "interpolate") == 2 * LIMIT
    parameters = model.config.rope_parameters
    ropes = parameters.values() if name == "modernbert" else [parameters]
    assert [(rope["rope_type"], rope["factor"]) for rope in ropes] == [("linear", 2.0)] * len(ropes)
    after = {key: value for key, value in model.named_buffers() if key.endswith("inv_freq")}
    torch.testing.assert_close(after, {key: value / 2 for key, value in before.items()})

    # Once more: factors multiply.
    extend_positions(model, 6 * LIMIT, "interpolate")
    after = {key: value for key, value in model.named_buffers() if key.endswith("inv_freq")}
    torch.testing.assert_close(after, {key: value / 6 for key, value in before.items()})


def test_interpolate_moves_every_rotary_text(rotary: str, text: Callable[..., str]) -> None:
    encoder = LinearTransformer(
        rotary, feature_map="softmax", max_seq_length=2 * LIMIT, position_extension="interpolate"
    )
    stretched = torch.arange(20)[None] / 2
    (short,) = embeddings(encoder, [text(20)])
    torch.testing.assert_close(short, original_embeddings(rotary, text(20), stretched), rtol=0, atol=1e-4)


def test_interpolate_refuses_other_rescalings(encoder_folder: Callable[[str], str]) -> None:
    model = AutoModel.from_pretrained(encoder_folder("gte"))
    model.config.rope_parameters.update(rope_type="dynamic", factor=2.0)
    with pytest.raises(ValueError, match=r"can't rescale rope_type='dynamic'; choose 'tile' or 'none'"):
        extend_positions(model, 2 * LIMIT, "interpolate")


@pytest.mark.parametrize("packed", [True, False])
def test_texts_of_three_times_the_old_limit(family: str, packed: bool, text: Callable[..., str]) -> None:
    encoder = LinearTransformer(family, window=8, max_seq_length=3 * LIMIT)
    assert encoder.max_seq_length == 3 * LIMIT
    encoder.unpad_inputs = None if packed else False
    long, short = embeddings(encoder, [text(3 * LIMIT), text(9)])
    assert long.shape == (3 * LIMIT, 32)
    assert torch.isfinite(long).all()
    assert encoder.num_truncated == 0
    torch.testing.assert_close(short, original_embeddings(family, text(9)), rtol=0, atol=1e-4)
