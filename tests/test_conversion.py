from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from conftest import FAMILIES, SMALL, refused
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModel, BertModel, PreTrainedConfig, PreTrainedModel

from st_linear import LinearTransformer
from st_linear.attention import linear_attention_reference, near_far_attention_reference
from st_linear.conversion import (
    ATTENTION_IMPLEMENTATION,
    AttentionCall,
    accepts_packed_inputs,
    attention_calls,
    attention_forward,
    linear_attentions,
    linearise,
    observe_attention,
    padding_mask,
    split_state_dict,
)

WINDOW = 8
FAVOR: dict[str, Any] = {"feature_map": "favor", "feature_map_kwargs": {"num_features": 16}}
EXACT_LENGTHS = (2 * WINDOW, 3, 9)
LONG_LENGTHS = (33, 3, 60, 17)


def original_embeddings(folder: str, texts: list[str]) -> list[Tensor]:
    """Token embeddings of the encoder as transformers has it, each text alone."""
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in texts]


def batch_embeddings(encoder: LinearTransformer, texts: list[str], *, packed: bool) -> list[Tensor]:
    encoder.unpad_inputs = packed
    features = encoder.preprocess(texts)
    assert ("cu_seq_lens_q" in features) == packed
    with torch.no_grad():
        features = encoder.eval()(features)
    return [row[mask.bool()] for row, mask in zip(features["token_embeddings"], features["attention_mask"])]


def layouts(encoder: LinearTransformer, texts: list[str]) -> dict[str, list[Tensor]]:
    """The same texts padded, packed, and each alone."""
    return {
        "padded": batch_embeddings(encoder, texts, packed=False),
        "packed": batch_embeddings(encoder, texts, packed=True),
        "alone": [batch_embeddings(encoder, [text], packed=False)[0] for text in texts],
    }


def tiny(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModel.from_config(FAMILIES[name]()).eval()


def run(model: PreTrainedModel, length: int = 40) -> Tensor:
    ids = torch.arange(length)[None] % 40 + 5
    with torch.no_grad():
        return model(input_ids=ids).last_hidden_state


class TensorShapes(TorchDispatchMode):
    """Collects the shapes of all tensors that come into being."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.shapes |= {tuple(leaf.shape) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
        return result

    def quadratic(self, length: int) -> list[tuple[int, ...]]:
        return [shape for shape in self.shapes if shape.count(length) > 1]


class TestFamilies:
    def test_short_texts_get_the_original_vectors(self, family: str, text: Callable[..., str]) -> None:
        texts = [text(length) for length in EXACT_LENGTHS]
        expected = original_embeddings(family, texts)
        encoder = LinearTransformer(family, window=WINDOW, **FAVOR)
        for actual in layouts(encoder, texts).values():
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)

    @pytest.mark.parametrize(
        "settings",
        [{"window": WINDOW, **FAVOR}, {"window": 0, **FAVOR}, {"feature_map": "softmax"}],
        ids=["near_far", "linear", "softmax"],
    )
    def test_layouts_agree_at_length(self, family: str, settings: dict[str, Any], text: Callable[..., str]) -> None:
        texts = [text(length) for length in LONG_LENGTHS]
        encoder = LinearTransformer(family, **settings)
        results = layouts(encoder, texts)
        torch.testing.assert_close(results["padded"], results["alone"], rtol=0, atol=1e-4)
        torch.testing.assert_close(results["packed"], results["alone"], rtol=0, atol=1e-4)
        expected = original_embeddings(family, texts)
        if settings["feature_map"] == "softmax":
            torch.testing.assert_close(results["alone"], expected, rtol=0, atol=1e-4)
        else:
            # The longest text is not the original's any more: the linear part was at work.
            assert (results["alone"][2] - expected[2]).abs().max() > 1e-2

    def test_packs_on_the_cpu(self, family: str) -> None:
        encoder = LinearTransformer(family, window=WINDOW, **FAVOR)
        assert next(encoder.parameters()).device.type == "cpu"
        assert encoder.can_flatten_inputs
        assert accepts_packed_inputs(encoder.model)

    @pytest.mark.parametrize("packed", [True, False])
    def test_no_quadratic_tensor_is_built(self, family: str, packed: bool, text: Callable[..., str]) -> None:
        encoder = LinearTransformer(family, window=WINDOW, **FAVOR)
        encoder.unpad_inputs = packed
        features = encoder.preprocess([text(61), text(17)])
        with torch.no_grad(), TensorShapes() as tensors:
            encoder.eval()(features)
        assert tensors.quadratic(61) == []
        assert tensors.quadratic(61 + 17) == []

    def test_the_original_builds_quadratic_tensors(self, family: str) -> None:
        model = AutoModel.from_pretrained(family, attn_implementation="eager")
        with torch.no_grad(), TensorShapes() as tensors:
            model(input_ids=torch.full((2, 61), 5))
        assert tensors.quadratic(61) != []

    def test_only_what_linear_attention_adds_is_new(self, family: str) -> None:
        encoder = LinearTransformer(family, window=WINDOW, **FAVOR)
        plain, added = split_state_dict(encoder.model)
        original = AutoModel.from_pretrained(family).state_dict()
        assert plain.keys() == original.keys()
        assert {name.split(".linear_attention.")[1] for name in added} == {"feature_map.projection", "gain"}
        assert len(added) == 2 * len(linear_attentions(encoder.model))


class TestGlue:
    """Which tensors reach attention, and what becomes of its output."""

    @pytest.mark.parametrize("name", ["bert", "eurobert"])
    @pytest.mark.parametrize("window", [0, WINDOW])
    def test_layers_compute_the_reference_attention(self, name: str, window: int) -> None:
        model = tiny(name)
        linearise(model, window=window, **FAVOR)
        reference = near_far_attention_reference if window else linear_attention_reference

        def by_definition(call: AttentionCall) -> Tensor:
            attention = linear_attentions(call.module)["linear_attention"]
            options = {"window": window, "gain": attention.gain} if window else {}
            return reference(
                call.query, call.key, call.value, feature_map=attention.feature_map, scale=call.scale, **options
            )

        for attention in linear_attentions(model).values():
            if attention.gain is not None:
                torch.nn.init.normal_(attention.gain)
        with observe_attention(by_definition):
            expected = run(model)
        torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-4)

    def test_an_observer_sees_the_softmax_attention_that_was_replaced(self) -> None:
        expected = run(tiny("bert"))
        model = tiny("bert")
        linearise(model, window=WINDOW, **FAVOR)
        calls: list[AttentionCall] = []

        def softmax(call: AttentionCall) -> Tensor:
            calls.append(call)
            return call.softmax()

        with observe_attention(softmax):
            torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-4)
        assert [call.query.shape for call in calls] == [(1, 4, 40, 8)] * 2
        assert all(call.is_linear() for call in calls)
        assert (run(model) - expected).abs().max() > 1e-2

    def test_an_observer_that_fails_is_gone_afterwards(self) -> None:
        model = tiny("bert")
        linearise(model, window=WINDOW, **FAVOR)
        expected = run(model)

        def fail(call: AttentionCall) -> Tensor:
            raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"), observe_attention(fail):
            run(model)
        torch.testing.assert_close(run(model), expected)

    def test_the_mask_is_the_padding_mask(self) -> None:
        mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
        assert padding_mask(attention_mask=mask, q_length=3, kv_length=3) is mask
        assert padding_mask(attention_mask=torch.ones(2, 3)) is None
        assert padding_mask() is None

    def test_a_quadratic_mask_is_refused(self) -> None:
        query = torch.randn(1, 2, 3, 4)
        with pytest.raises(ValueError, match=r"takes a 2-D attention_mask \(B, T\).* got shape \(1, 1, 3, 3\)"):
            attention_forward(torch.nn.Module(), query, query, query, torch.zeros(1, 1, 3, 3))

    def test_only_padding_gives_finite_output_and_gradients(self) -> None:
        model = tiny("bert")
        linearise(model, window=WINDOW, **FAVOR)
        mask = torch.zeros(2, 40, dtype=torch.long)
        mask[0, :30] = 1
        output = model(input_ids=torch.full((2, 40), 5), attention_mask=mask).last_hidden_state
        assert torch.isfinite(output).all()
        output.sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


class TestPackedInputs:
    def test_a_model_that_drops_the_offsets_does_not_pack(self) -> None:
        class Deaf(BertModel):
            def forward(
                self, input_ids: Tensor, attention_mask: Any = None, position_ids: Any = None, **_: Any
            ) -> Any:
                return super().forward(input_ids, attention_mask, position_ids=position_ids)

        assert not accepts_packed_inputs(Deaf(FAMILIES["bert"]()))

    def test_a_model_without_position_ids_does_not_pack(self) -> None:
        class Strict(BertModel):
            def forward(self, input_ids: Tensor, attention_mask: Any = None) -> Any:
                return super().forward(input_ids, attention_mask)

        assert not accepts_packed_inputs(Strict(FAMILIES["bert"]()))


class TestSlidingLayers:
    def test_they_are_not_converted(self) -> None:
        model = tiny("modernbert")
        linearise(model, window=WINDOW, **FAVOR)
        assert list(linear_attentions(model)) == ["layers.0.attn.linear_attention", "layers.2.attn.linear_attention"]
        assert [call.sliding_window is None for call in attention_calls(model)] == [True, False, True, False]

    @pytest.mark.parametrize("reach", [2, 4, 8, 126])
    def test_they_stay_exact_beyond_their_window(
        self, reach: int, save_encoder: Any, text: Callable[..., str]
    ) -> None:
        config = FAMILIES["modernbert"]()
        config.layer_types = ["sliding_attention"] * 4
        config.local_attention = reach
        folder = save_encoder(config)
        texts = [text(length) for length in LONG_LENGTHS]
        encoder = LinearTransformer(folder, window=WINDOW, **FAVOR)
        expected = original_embeddings(folder, texts)
        for actual in layouts(encoder, texts).values():
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


class TestLinearise:
    def test_shared_layers_count_once(self) -> None:
        model = tiny("albert")
        linearise(model, window=WINDOW, **FAVOR)
        assert len(linear_attentions(model)) == 1
        with pytest.raises(ValueError, match=r"exact_layers must lie in 0\.\.0, got 1"):
            linearise(model, window=WINDOW, exact_layers=[1], **FAVOR)

    def test_grouped_heads_get_a_map_each(self) -> None:
        model = tiny("eurobert")
        linearise(model, window=WINDOW, **FAVOR)
        assert {attention.feature_map.num_heads for attention in linear_attentions(model).values()} == {4}

    def test_exact_layers_keep_softmax(self) -> None:
        expected = run(tiny("bert"))
        model = tiny("bert")
        linearise(model, window=0, exact_layers=(1,), **FAVOR)
        assert list(linear_attentions(model)) == ["encoder.layer.0.attention.self.linear_attention"]
        assert (run(model) - expected).abs().max() > 1e-2
        linearise(model, window=0, exact_layers=(0, 1), **FAVOR)
        torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-4)

    def test_an_earlier_conversion_is_undone(self) -> None:
        expected = run(tiny("bert"))
        model = tiny("bert")
        linearise(model, window=0, feature_map="hedgehog")
        linearise(model, window=0, feature_map="softmax")
        assert linear_attentions(model) == {}
        torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-4)

    def test_features_are_a_function_of_seed_and_layer(self) -> None:
        def projections(seed: int, **settings: Any) -> list[Tensor]:
            model = tiny("bert")
            linearise(model, window=0, seed=seed, **FAVOR, **settings)
            return [attention.feature_map.projection for attention in linear_attentions(model).values()]

        first, second = projections(3)
        torch.testing.assert_close(projections(3), [first, second], rtol=0, atol=0)
        assert not torch.equal(first, second)
        assert not torch.equal(first, projections(4)[0])
        # A layer's features do not depend on what becomes of the others.
        torch.testing.assert_close(projections(3, exact_layers=[0]), [second], rtol=0, atol=0)

    @pytest.mark.parametrize("settings", [{}, {"exact_layers": [0]}])
    def test_redraw_is_construction_with_the_seed(self, settings: dict[str, Any]) -> None:
        model, other = tiny("bert"), tiny("bert")
        linearise(model, window=0, seed=3, **FAVOR, **settings)
        linearise(other, window=0, seed=4, **FAVOR, **settings)
        before = run(model)
        for attention in linear_attentions(model).values():
            attention.redraw(4)
        torch.testing.assert_close(run(model), run(other))
        assert (run(model) - before).abs().max() > 1e-3
        for attention in linear_attentions(model).values():
            attention.redraw(3)
        torch.testing.assert_close(run(model), before)

    def test_the_generator_of_the_caller_is_left_alone(self) -> None:
        model = tiny("bert")
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        linearise(model, window=WINDOW, **FAVOR)
        torch.testing.assert_close(torch.rand(3), expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_additions_take_the_dtype_of_the_model(self, dtype: torch.dtype) -> None:
        model = tiny("bert").to(dtype)
        linearise(model, window=WINDOW, **FAVOR)
        assert {tensor.dtype for tensor in model.state_dict().values()} == {dtype}

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (
                {"feature_map": "performer"},
                "unknown feature_map 'performer'; choose one of: softmax, elu, relu, favor",
            ),
            ({"window": -1}, "window must be a number of tokens >= 0 (0 = purely linear), got -1"),
            ({"window": 1.5}, "window must be a number of tokens >= 0 (0 = purely linear), got 1.5"),
            ({"window": True}, "window must be a number of tokens >= 0 (0 = purely linear), got True"),
            ({"exact_layers": [0, 2]}, "exact_layers must lie in 0..1, got 2"),
            ({"exact_layers": [-1]}, "exact_layers must lie in 0..1, got -1"),
            ({"exact_layers": 1}, "exact_layers must be a list of layer indices, got 1"),
            ({"exact_layers": [True]}, "exact_layers must be a list of layer indices, got [True]"),
            ({"seed": 0.5}, "seed must be an integer, got 0.5"),
            ({"feature_map_kwargs": [16]}, "feature_map_kwargs must be a dictionary of options, got [16]"),
            ({"feature_map_kwargs": {"nf": 16}}, "feature map 'favor' has no option 'nf'; its options: num_features"),
            ({"feature_map_kwargs": {"num_features": 0}}, "num_features must be a positive integer, got 0"),
            (
                {"feature_map": "softmax", "feature_map_kwargs": {"num_features": 16}},
                "feature map 'softmax' has no option 'num_features'; its options: none",
            ),
        ],
        ids=str,
    )
    def test_bad_arguments_are_refused(self, settings: dict[str, Any], message: str) -> None:
        with refused(message):
            linearise(tiny("bert"), **{"feature_map": "favor", "window": WINDOW, **settings})


WIDE = {name: value for name, value in SMALL.items() if name != "initializer_range"}
OUTSIDE = "computes attention outside transformers' AttentionInterface"
REFUSED: dict[str, tuple[Callable[[], PreTrainedConfig], str]] = {
    "mpnet": (lambda: transformers.MPNetConfig(**WIDE), OUTSIDE),
    "deberta": (lambda: transformers.DebertaConfig(**WIDE), OUTSIDE),
    "deberta-v2": (lambda: transformers.DebertaV2Config(**WIDE), OUTSIDE),
    "gpt2": (lambda: transformers.GPT2Config(vocab_size=45, n_embd=32, n_layer=2, n_head=4), "attends causally"),
    "llama": (lambda: transformers.LlamaConfig(**WIDE), "attends causally"),
    "modernbert-decoder": (lambda: transformers.ModernBertDecoderConfig(**WIDE), "attends causally"),
    "bert-decoder": (lambda: transformers.BertConfig(is_decoder=True, **WIDE), "is a causal decoder"),
    "bert-cross-attention": (
        lambda: transformers.BertConfig(is_decoder=True, add_cross_attention=True, **WIDE),
        "has cross-attention",
    ),
    "bart": (
        lambda: transformers.BartConfig(
            vocab_size=45, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=48, decoder_ffn_dim=48
        ),
        "has cross-attention",
    ),
    "t5": (lambda: transformers.T5Config(vocab_size=45, d_model=32, d_kv=8, d_ff=48), "has cross-attention"),
}


class TestRefusals:
    @pytest.mark.parametrize("name", REFUSED)
    def test_the_message_says_why_and_what_is_supported(self, name: str) -> None:
        config, reason = REFUSED[name]
        model = AutoModel.from_config(config())
        implementation, training = model.config._attn_implementation, model.training
        with pytest.raises(
            ValueError, match=rf"^{type(model).__name__} can't be converted: it {reason}.* Supported: BERT, .*$"
        ):
            linearise(model, window=WINDOW, **FAVOR)
        assert (model.config._attn_implementation, model.training) == (implementation, training)
        assert linear_attentions(model) == {}

    def test_the_encoder_of_t5_is_refused_for_its_position_bias(self) -> None:
        config = REFUSED["t5"][0]()
        with pytest.raises(ValueError, match=r"T5EncoderModel can't be converted: it computes attention outside"):
            linearise(transformers.T5EncoderModel(config), window=WINDOW, **FAVOR)

    def test_a_model_that_never_calls_the_interface_is_refused(self) -> None:
        model = tiny("bert")
        model.forward = lambda **_: None  # type: ignore[method-assign]
        with pytest.raises(ValueError, match="it made no call through transformers' AttentionInterface"):
            linearise(model, window=WINDOW, **FAVOR)

    @pytest.mark.parametrize("option", ["position_bias", "softcap", "s_aux"])
    def test_logits_that_are_more_than_a_product_are_refused(self, option: str) -> None:
        model = tiny("bert")
        model.forward = partial(model.forward, **{option: torch.ones(1)})  # type: ignore[method-assign]
        with pytest.raises(ValueError, match=f"it adds {option} to its attention logits"):
            linearise(model, window=WINDOW, **FAVOR)

    def test_the_trial_run_leaves_no_trace(self) -> None:
        model = tiny("bert").train()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        assert len(attention_calls(model)) == 2
        assert model.training
        assert model.config._attn_implementation != ATTENTION_IMPLEMENTATION
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
