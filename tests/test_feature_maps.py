from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from st_linear import feature_maps
from st_linear.feature_maps import (
    ExponentialFeatureMap,
    FeatureMap,
    PointwiseFeatureMap,
    RandomFeatures,
    feature_map_class,
    feature_map_names,
    make_feature_map,
    orthogonal_features,
    register_feature_map,
)

MAPS = [name for name in feature_map_names() if name != "softmax"]
RANDOM = [name for name in MAPS if issubclass(feature_map_class(name), RandomFeatures)]
EXPONENTIAL = [name for name in MAPS if issubclass(feature_map_class(name), ExponentialFeatureMap)]
PROJECTED = [name for name in MAPS if hasattr(make_feature_map(name, 2, 4), "query_projection")]

B, H, T, D = 2, 3, 7, 4


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def queries_and_keys(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return randn(B, H, T, D, seed=1, dtype=dtype), randn(B, H, T, D, seed=2, dtype=dtype)


def features(feature_map: FeatureMap, query: Tensor, key: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """φ of queries and of keys (B, H, T, D), with the mask (B, T) of tokens; all are, by default."""
    tokens = torch.ones(query.shape[0], query.shape[2], dtype=torch.bool) if mask is None else mask
    position = (tokens.cumsum(dim=-1) - 1).clamp(min=0).to(query.dtype) / tokens.sum(dim=-1, keepdim=True)
    position = position[:, None, :, None]
    if not isinstance(feature_map, ExponentialFeatureMap):
        return feature_map.query_features(query, position), feature_map.key_features(key, position)
    query_logits, key_logits = feature_map.query_logits(query), feature_map.key_logits(key)
    offsets = [feature_map.query_offset(query), feature_map.key_offset(key)]
    offsets += [feature_map.feature_bias(), feature_map.feature_offset(key, mask)]
    of_query, *of_key = (torch.zeros(()) if offset is None else offset.to(query.dtype) for offset in offsets)
    return (query_logits + of_query).exp(), (key_logits + sum(of_key)).exp()


def weights(feature_map: FeatureMap, query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, H, T, T) of φ_q(q_i)·φ_k(k_j), with the map's constant factor."""
    phi_q, phi_k = features(feature_map, query, key, mask)
    return feature_map.weight * phi_q @ phi_k.transpose(-1, -2)


class TestRegistry:
    @pytest.fixture(autouse=True)
    def registry(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(feature_maps, "_REGISTRY", dict(feature_maps._REGISTRY))

    def test_a_registered_class_is_known_and_made(self) -> None:
        @register_feature_map("square")
        class Square(PointwiseFeatureMap):
            def __init__(self, num_heads: int, head_dim: int, *, seed: int = 0, num_features: int = 2) -> None:
                super().__init__(num_heads, head_dim, seed=seed)
                self.num_features = num_features

        assert feature_map_names()[-1] == "square"
        assert feature_map_class("square") is Square
        made = make_feature_map("square", 3, 4, seed=5, num_features=6)
        assert isinstance(made, Square)
        assert (made.name, made.num_heads, made.head_dim, made.seed, made.num_features) == ("square", 3, 4, 5, 6)

    def test_a_name_is_given_once(self) -> None:
        with pytest.raises(ValueError, match=r"^feature map 'elu' is registered already, by Elu$"):
            register_feature_map("elu")(feature_maps.Relu)
        assert feature_map_class("elu") is feature_maps.Elu
        assert feature_maps.Relu.name == "relu"

    @pytest.mark.parametrize("ask", [feature_map_class, lambda name: make_feature_map(name, H, D)])
    def test_unknown_name_lists_the_choices(self, ask: Callable[[str], object]) -> None:
        with pytest.raises(ValueError, match=r"^unknown feature_map 'linformer'; choose one of: ") as error:
            ask("linformer")
        assert str(error.value).split(": ")[1].split(", ") == feature_map_names()

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("favor", {"features": 8}, "feature map 'favor' has no option 'features'; its options: num_features"),
            ("elu", {"num_features": 8}, "feature map 'elu' has no option 'num_features'; its options: none"),
            ("favor", {"num_features": 0}, "num_features must be a positive integer, got 0"),
            ("favor", {"num_features": 8.0}, "num_features must be a positive integer, got 8.0"),
            ("t2r", {"num_features": True}, "num_features must be a positive integer, got True"),
            ("hedgehog", {"num_features": 7}, "num_features must be a multiple of 2, got 7"),
        ],
    )
    def test_bad_options_are_named(self, name: str, options: dict, message: str) -> None:
        with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
            make_feature_map(name, H, D, **options)
        assert str(error.value) == message


@pytest.mark.parametrize("name", MAPS)
class TestEveryMap:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("masked", [False, True])
    def test_shapes_and_dtype(self, name: str, dtype: torch.dtype, masked: bool) -> None:
        feature_map = make_feature_map(name, H, D)
        query, key = queries_and_keys(dtype)
        mask = torch.ones(B, T, dtype=torch.bool) if masked else None
        for mapped in features(feature_map, query, key, mask):
            assert mapped.shape == (B, H, T, feature_map.num_features)
            assert mapped.dtype == dtype
        if isinstance(feature_map, ExponentialFeatureMap):
            for offset in (feature_map.query_offset(query), feature_map.key_offset(key)):
                assert offset is None or (offset.shape, offset.dtype) == ((B, H, T, 1), dtype)
            offset = feature_map.feature_offset(key, mask)
            assert offset is None or offset.expand(B, -1, -1, -1).shape == (B, H, 1, feature_map.num_features)
            assert offset is None or offset.dtype == dtype
            bias = feature_map.feature_bias()
            assert bias is None or bias.shape == (H, 1, feature_map.num_features)

    def test_a_part_of_a_text_has_the_features_that_it_has_in_the_whole(self, name: str) -> None:
        feature_map = make_feature_map(name, H, D)
        query, _ = queries_and_keys()
        position = (torch.arange(T, dtype=torch.float64) / T)[None, None, :, None]
        part = slice(2, 5)
        methods = [feature_map.query_features, feature_map.key_features]
        if isinstance(feature_map, ExponentialFeatureMap):
            logits = feature_map.query_logits, feature_map.key_logits
            methods = [lambda x, _, method=method: method(x) for method in logits]
        for method in methods:
            assert_close(method(query[:, :, part], position[:, :, part]), method(query, position)[:, :, part])

    def test_same_seed_same_map(self, name: str) -> None:
        assert_close(
            make_feature_map(name, H, D, seed=3).state_dict(),
            make_feature_map(name, H, D, seed=3).state_dict(),
            rtol=0,
            atol=0,
        )

    def test_building_and_redrawing_leave_the_global_generators_alone(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(seed: int) -> None:
            pytest.fail("seeded the generators of GPUs")

        monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
        before = torch.get_rng_state()
        make_feature_map(name, H, D, seed=3).redraw(4)
        assert torch.equal(torch.get_rng_state(), before)

    def test_features_do_not_depend_on_the_global_generator(self, name: str) -> None:
        states = []
        with torch.random.fork_rng(devices=[]):
            for global_seed in (1, 2):
                torch.manual_seed(global_seed)
                states.append(make_feature_map(name, H, D, seed=3).state_dict())
        assert_close(*states, rtol=0, atol=0)

    def test_redraw_keeps_what_was_learned(self, name: str) -> None:
        feature_map = make_feature_map(name, H, D)
        with torch.no_grad():
            for parameter in feature_map.parameters():
                parameter.add_(1)
        learned = {key: value.detach().clone() for key, value in feature_map.named_parameters()}
        feature_map.redraw(9)
        assert feature_map.seed == 9
        assert_close(dict(feature_map.named_parameters()), learned, rtol=0, atol=0)

    def test_masked_slots_do_not_change_the_features_of_tokens(self, name: str) -> None:
        feature_map = make_feature_map(name, H, D)
        query, key = queries_and_keys()
        pad = (0, 0, 2, 3)
        mask = F.pad(torch.ones(B, T, dtype=torch.bool), pad[2:])
        padded = weights(feature_map, F.pad(query, pad), F.pad(key, pad), mask)
        assert_close(padded[:, :, 2:-3, 2:-3], weights(feature_map, query, key))

    def test_weights_are_not_negative(self, name: str) -> None:
        assert weights(make_feature_map(name, H, D), *queries_and_keys()).min() >= 0

    def test_representation_names_the_sizes(self, name: str) -> None:
        feature_map = make_feature_map(name, H, D)
        assert f"num_heads=3, head_dim=4, num_features={feature_map.num_features}" in repr(feature_map)


@pytest.mark.parametrize("name", RANDOM)
class TestRandomMaps:
    def test_other_seed_other_features(self, name: str) -> None:
        first, second = (make_feature_map(name, H, D, seed=seed).get_buffer("projection") for seed in (0, 1))
        assert (first != second).all()

    def test_heads_draw_apart(self, name: str) -> None:
        projection = make_feature_map(name, 2, D).get_buffer("projection")
        assert (projection[0] != projection[1]).all()

    def test_redraw_equals_a_fresh_map_and_keeps_the_buffer(self, name: str) -> None:
        feature_map = make_feature_map(name, H, D, seed=0, num_features=10)
        projection = feature_map.get_buffer("projection")
        feature_map.redraw(5)
        assert feature_map.get_buffer("projection") is projection
        fresh = make_feature_map(name, H, D, seed=5, num_features=10)
        assert_close(feature_map.state_dict(), fresh.state_dict(), rtol=0, atol=0)

    def test_projection_is_saved_and_loaded(self, name: str) -> None:
        source, target = (make_feature_map(name, H, D, seed=seed) for seed in (0, 1))
        assert list(source.state_dict()) == ["projection"]
        target.load_state_dict(source.state_dict())
        query, key = queries_and_keys()
        assert_close(weights(target, query, key), weights(source, query, key), rtol=0, atol=0)

    def test_train_and_eval_have_the_same_features(self, name: str) -> None:
        feature_map = make_feature_map(name, H, D)
        query, key = queries_and_keys()
        training = weights(feature_map.train(), query, key)
        assert_close(weights(feature_map.eval(), query, key), training, rtol=0, atol=0)


@pytest.mark.parametrize(("num_features", "blocks"), [(12, [4, 4, 4]), (10, [4, 4, 2]), (3, [3])])
def test_orthogonal_features_are_orthogonal_in_blocks(num_features: int, blocks: list[int]) -> None:
    rows = orthogonal_features(H, num_features, D, seed=0)
    assert rows.shape == (H, num_features, D)
    for block in rows.split(blocks, dim=1):
        direction = F.normalize(block, dim=-1)
        identity = torch.eye(block.shape[1]).expand(H, -1, -1)
        assert_close(direction @ direction.transpose(-1, -2), identity)


def test_orthogonal_features_are_standard_gaussian_one_by_one() -> None:
    draws = 4000
    rows = orthogonal_features(draws, 2 * D, D, seed=0).double()
    # Standard errors of the first four moments of N(0, 1): its moments of even order are 1, 3, 15, 105.
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        mean = rows.pow(power).mean(dim=0)
        assert_close(mean, torch.full_like(mean, moment), rtol=0, atol=5 * (variance / draws) ** 0.5)


def test_features_are_drawn_on_the_cpu_whatever_the_default_device() -> None:
    with torch.device("meta"):
        feature_map = make_feature_map("favor", H, D)
    assert feature_map.get_buffer("projection").is_meta


def favor_estimates(query: Tensor, key: Tensor, num_heads: int, num_features: int, seed: int) -> Tensor:
    """Estimates of exp(q·k) by the independent draws of many heads: (pairs, heads), for query and key (pairs, D)."""
    feature_map = make_feature_map("favor", num_heads, query.shape[-1], seed=seed, num_features=num_features)
    query, key = (x[:, None, None].expand(-1, num_heads, -1, -1) for x in (query, key))
    return weights(feature_map, query, key).flatten(1)


def test_favor_is_unbiased() -> None:
    query, key = randn(6, 8, seed=1) * 0.3, randn(6, 8, seed=2) * 0.3
    # A direction of equal signs and its opposite: a draw that leans to one side is wrong here first.
    query[:2] = key[:2] = torch.tensor([[0.25], [-0.25]])
    estimates = torch.cat([favor_estimates(query, key, 1000, 28, seed) for seed in range(3)], dim=1)
    exact = (query * key).sum(dim=-1).exp()
    standard_error = estimates.std(dim=1) / estimates.shape[1] ** 0.5
    assert (standard_error < 0.02 * exact).all()
    assert ((estimates.mean(dim=1) - exact).abs() < 4 * standard_error).all()


def test_variance_of_favor_falls_as_one_over_the_number_of_features() -> None:
    query, key = randn(1, 4, seed=1) * 0.3, randn(1, 4, seed=2) * 0.3
    variances, errors = [], []
    for blocks in (1, 4):
        error = favor_estimates(query, key, 2000, 4 * blocks, seed=blocks) - (query * key).sum().exp()
        square = error.square() * blocks
        variances.append(square.mean())
        errors.append(square.std() / square.numel() ** 0.5)
    # Blocks are independent, so that a mean over four of them has a quarter of the variance of one.
    assert_close(variances[0], variances[1], rtol=0, atol=4 * float(errors[0].hypot(errors[1])))
    assert variances[1] / 4 < variances[0] / 2


def elu_plus_one(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def pairwise_sum(query: Tensor, key: Tensor) -> Tensor:
    return query[..., :, None, :] + key[..., None, :, :]


def favor_kernel(feature_map: FeatureMap, query: Tensor, key: Tensor) -> Tensor:
    w = feature_map.get_buffer("projection").double()
    norms = (query.square().sum(dim=-1)[..., :, None] + key.square().sum(dim=-1)[..., None, :]) / 2
    return (torch.einsum("hrd,bhijd->bhijr", w, pairwise_sum(query, key)) - norms[..., None]).exp().mean(dim=-1)


def favor_relu_kernel(feature_map: FeatureMap, query: Tensor, key: Tensor) -> Tensor:
    w = feature_map.get_buffer("projection").double()
    query, key = (torch.einsum("hrd,bhid->bhir", w, x).clamp(min=0) + 0.001 for x in (query, key))
    return (query[..., :, None, :] * key[..., None, :, :]).mean(dim=-1)


def cosformer_kernel(feature_map: FeatureMap, query: Tensor, key: Tensor) -> Tensor:
    position = torch.arange(query.shape[-2], dtype=torch.float64)
    cosine = torch.cos(math.pi / 2 * (position[:, None] - position) / query.shape[-2])
    return F.relu(query) @ F.relu(key).transpose(-1, -2) * cosine / (2 * D)


def taylor_kernel(feature_map: FeatureMap, query: Tensor, key: Tensor) -> Tensor:
    s = query @ key.transpose(-1, -2)
    return 1 + s + s**2 / 2


KERNELS: dict[str, Callable[[FeatureMap, Tensor, Tensor], Tensor]] = {
    "elu": lambda _, q, k: elu_plus_one(q) @ elu_plus_one(k).transpose(-1, -2) / D,
    "relu": lambda _, q, k: F.relu(q) @ F.relu(k).transpose(-1, -2) / D,
    "favor": favor_kernel,
    "favor_relu": favor_relu_kernel,
    # At its start it is FAVOR+, from the same draw.
    "learned_favor": lambda m, q, k: favor_kernel(make_feature_map("favor", H, D, num_features=m.num_features), q, k),
    # At their start W is the identity and b zero; cosh is the mean of the two signs.
    "hedgehog": lambda _, q, k: pairwise_sum(q, k).cosh().mean(dim=-1),
    "t2r": lambda _, q, k: F.relu(q) @ F.relu(k).transpose(-1, -2) / D,
    "cosformer": cosformer_kernel,
    "taylor": taylor_kernel,
    "efficient": lambda _, q, k: q.softmax(dim=-1) @ k.softmax(dim=-2).transpose(-1, -2) * T,
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_is_the_papers(name: str) -> None:
    feature_map = make_feature_map(name, H, D)
    query, key = queries_and_keys()
    assert_close(weights(feature_map, query, key), KERNELS[name](feature_map, query, key))


def test_learned_favor_is_exponentials_of_quadratic_forms() -> None:
    feature_map = make_feature_map("learned_favor", H, D, num_features=6).double()
    with torch.no_grad():
        for seed, parameter in enumerate(feature_map.parameters()):
            parameter += randn(*parameter.shape, seed=seed) / 4
    learned = dict(feature_map.named_parameters())
    query, key = queries_and_keys()
    phi_q, phi_k = (
        torch.exp(torch.einsum("hrd,bhid->bhir", learned[f"{side}_weight"], x) - learned[f"{side}_norm"] * norm(x))
        for side, x in (("query", query), ("key", key))
    )
    expected = (phi_q * learned["bias"].exp()) @ phi_k.transpose(-1, -2) / 6
    assert_close(weights(feature_map, query, key), expected)


class TestCalibration:
    """Queries and keys with means of their own, as encoders have them: FAVOR+'s rows miss what they add up to."""

    @staticmethod
    def inputs() -> tuple[Tensor, Tensor]:
        query, key = (0.7 * randn(2, H, 64, D, seed=seed) for seed in (1, 2))
        return query + 1.2, key + 0.8

    def sums(self) -> Tensor:
        query, key = self.inputs()
        attended = (query @ key.transpose(-1, -2)).argmax(dim=-1)
        pairs = query + key.gather(2, attended[..., None].expand_as(key))
        return pairs.transpose(0, 1).flatten(1, 2)

    @torch.no_grad()
    def test_estimates_are_better_and_as_unbiased(self) -> None:
        query, key = self.inputs()
        exact = query @ key.transpose(-1, -2)
        errors, means = {}, {}
        for start in ("favor", "calibrated"):
            estimates = []
            for seed in range(20):
                feature_map = make_feature_map("learned_favor", H, D, seed=seed, num_features=64).double()
                if start == "calibrated":
                    feature_map.calibrate(self.sums(), torch.Generator().manual_seed(seed))
                estimates.append(weights(feature_map, query, key) / exact.exp())
            ratio = torch.stack(estimates)
            errors[start] = float(ratio.log().abs().median())
            means[start] = float(ratio.mean(dim=0).median())
        assert errors["calibrated"] < errors["favor"] / 2
        assert abs(means["calibrated"] - 1) < 0.1

    def test_is_a_function_of_the_generator_alone(self) -> None:
        made = []
        for seed in (3, 3, 4):
            feature_map = make_feature_map("learned_favor", H, D)
            feature_map.calibrate(self.sums(), torch.Generator().manual_seed(seed))
            made.append(feature_map.get_parameter("query_weight").detach())
        assert_close(made[0], made[1], rtol=0, atol=0)
        assert (made[0] != made[2]).any()

    @pytest.mark.parametrize("name", ["favor", "elu", "hedgehog"])
    def test_other_maps_start_as_they_are(self, name: str) -> None:
        feature_map = make_feature_map(name, H, D)
        before = {key: value.clone() for key, value in feature_map.state_dict().items()}
        feature_map.calibrate(self.sums(), torch.Generator())
        assert_close(feature_map.state_dict(), before, rtol=0, atol=0)


def norm(x: Tensor) -> Tensor:
    return x.square().sum(dim=-1, keepdim=True)


def test_hedgehog_is_exponentials_of_both_signs_of_two_affine_maps() -> None:
    feature_map = make_feature_map("hedgehog", H, D, num_features=6).double()
    with torch.no_grad():
        for seed, parameter in enumerate(feature_map.parameters()):
            parameter += randn(*parameter.shape, seed=seed) / 4
    query, key = queries_and_keys()
    projected = [
        torch.einsum("hrd,bhid->bhir", feature_map.get_parameter(f"{side}_projection.weight"), x)
        + feature_map.get_parameter(f"{side}_projection.bias")
        for side, x in (("query", query), ("key", key))
    ]
    phi_q, phi_k = (torch.cat([x.exp(), (-x).exp()], dim=-1) for x in projected)
    assert_close(weights(feature_map, query, key), phi_q @ phi_k.transpose(-1, -2) / 6)


@pytest.mark.parametrize(
    ("name", "num_features"),
    [("elu", 4), ("relu", 4), ("t2r", 4), ("efficient", 4), ("hedgehog", 8), ("cosformer", 8), ("taylor", 1 + 4 + 10)],
)
def test_num_features_by_default(name: str, num_features: int) -> None:
    assert make_feature_map(name, H, D).num_features == num_features


@pytest.mark.parametrize("name", MAPS)
def test_weight_makes_a_mean_over_features_of_all_but_two(name: str) -> None:
    feature_map = make_feature_map(name, H, D)
    assert feature_map.weight == (1 if name in ("taylor", "efficient") else 1 / feature_map.num_features)


@pytest.mark.parametrize("name", EXPONENTIAL)
class TestExponentialMaps:
    def test_projections_are_what_logits_are_made_of(self, name: str) -> None:
        feature_map = make_feature_map(name, H, D).double()
        projections, query_and_key = feature_map.projections(), queries_and_keys()
        if projections is not None:
            for w, logits, x in zip(projections, (feature_map.query_logits, feature_map.key_logits), query_and_key):
                assert w.shape == (H, feature_map.num_features, D)
                assert_close(logits(x), torch.einsum("hrd,bhid->bhir", w, x))

    def test_offset_of_a_text_ranges_over_tokens_only(self, name: str) -> None:
        feature_map = make_feature_map(name, H, D)
        key = randn(B, H, T, D) - 20
        pad = (0, 0, 0, 2)
        mask = F.pad(torch.ones(B, T, dtype=torch.bool), pad[2:])
        offset, alone = feature_map.feature_offset(F.pad(key, pad), mask), feature_map.feature_offset(key, None)
        assert (offset is None) == (alone is None)
        if offset is not None:
            assert_close(offset, alone)

    def test_a_text_without_a_token_has_a_finite_offset(self, name: str) -> None:
        feature_map = make_feature_map(name, H, D)
        key = torch.zeros(B, H, T, D, requires_grad=True)
        offset = feature_map.feature_offset(key, torch.zeros(B, T, dtype=torch.bool))
        if offset is not None:
            assert offset.isfinite().all()
            (gradient,) = torch.autograd.grad(offset.sum(), key, allow_unused=True, materialize_grads=True)
            assert gradient.isfinite().all()

    def test_logits_are_finite_at_any_size(self, name: str) -> None:
        feature_map = make_feature_map(name, H, D)
        query, key = (1e4 * x for x in queries_and_keys(torch.float32))
        offsets = feature_map.query_offset(query), feature_map.key_offset(key), feature_map.feature_offset(key, None)
        for logits in (feature_map.query_logits(query), feature_map.key_logits(key), *offsets):
            assert logits is None or logits.isfinite().all()


def test_logits_must_be_given_in_one_way_or_the_other() -> None:
    bare = ExponentialFeatureMap(H, D)
    for logits in (bare.query_logits, bare.key_logits):
        with pytest.raises(NotImplementedError, match=r"^ExponentialFeatureMap defines neither projections nor log"):
            logits(queries_and_keys()[0])


@pytest.mark.parametrize("name", PROJECTED)
@pytest.mark.parametrize("rows", [D - 2, D, D + 3], ids=["fewer", "square", "more"])
def test_learned_projections_start_as_the_identity(name: str, rows: int) -> None:
    feature_map = make_feature_map(name, H, D, seed=7, num_features=2 * rows if name == "hedgehog" else rows)
    parameters = dict(feature_map.named_parameters())
    assert sorted(parameters) == [
        f"{side}_projection.{kind}" for side in ("key", "query") for kind in ("bias", "weight")
    ]
    for side in ("key", "query"):
        weight, bias = parameters[f"{side}_projection.weight"], parameters[f"{side}_projection.bias"]
        assert_close(weight[:, :D], torch.eye(min(rows, D), D).expand(H, -1, -1), rtol=0, atol=0)
        assert_close(weight[:, D:], orthogonal_features(H, rows - D, D, seed=7) if rows > D else weight[:, :0])
        assert_close(bias, torch.zeros(H, 1, rows), rtol=0, atol=0)


@pytest.mark.parametrize("name", PROJECTED)
def test_learned_projections_differ_by_head_and_side(name: str) -> None:
    feature_map = make_feature_map(name, H, D)
    x = randn(1, 1, 1, D).expand(B, H, T, D)
    before = features(feature_map, x, x)
    with torch.no_grad():
        feature_map.get_parameter("query_projection.weight")[1] *= 2
    after = features(feature_map, x, x)
    others = [0, 2]
    assert_close(after[0][:, others], before[0][:, others], rtol=0, atol=0)
    assert_close(after[1], before[1], rtol=0, atol=0)
    assert (after[0][:, 1] != before[0][:, 1]).any()


def test_elu_keeps_its_tail_in_bfloat16() -> None:
    x = torch.tensor([-80.0, -20.0, -7.0, -1.0, 0.0, 0.5, 300.0], dtype=torch.bfloat16)
    mapped = make_feature_map("elu", 1, 7).features(x)
    assert mapped.dtype == torch.bfloat16
    assert (mapped > 0).all()
    assert_close(mapped, torch.where(x >= 0, x.double() + 1, x.double().exp()).to(torch.bfloat16))


def test_elu_has_finite_gradients_at_any_size() -> None:
    x = torch.tensor([-1e4, 0.0, 1e4], requires_grad=True)
    (gradient,) = torch.autograd.grad(make_feature_map("elu", 1, 3).features(x).sum(), x)
    assert_close(gradient, torch.tensor([0.0, 1.0, 1.0]))


def test_efficient_normalises_queries_over_features_and_keys_over_tokens() -> None:
    feature_map = make_feature_map("efficient", H, D)
    query, key = queries_and_keys()
    mask = torch.tensor([[True] * T, [True] * 3 + [False] * (T - 3)])
    phi_q, phi_k = features(feature_map, query, key, mask)
    rows = phi_q.sum(dim=-1)
    assert_close(rows, torch.ones_like(rows))
    columns = (phi_k * mask[:, None, :, None]).sum(dim=-2)
    assert_close(columns, torch.tensor([7.0, 3.0], dtype=torch.float64)[:, None, None].expand(B, H, D))


def test_positions_of_cosformer_count_tokens() -> None:
    feature_map = make_feature_map("cosformer", H, D)
    query, key = queries_and_keys()
    mask = torch.zeros(B, 2 * T + 1, dtype=torch.bool)
    mask[:, 1::2] = True
    slots = mask[:, None, :, None]
    spread = [torch.zeros(B, H, 2 * T + 1, D, dtype=torch.float64).masked_scatter(slots, x) for x in (query, key)]
    assert_close(weights(feature_map, *spread, mask)[:, :, 1::2, 1::2], cosformer_kernel(feature_map, query, key))


def test_softmax_stands_for_exact_attention() -> None:
    softmax = make_feature_map("softmax", H, D)
    assert softmax.exact
    assert not any(feature_map_class(name).exact for name in MAPS)
    query, key = queries_and_keys()
    for method, x in ((softmax.query_features, query), (softmax.key_features, key)):
        with pytest.raises(NotImplementedError):
            method(x, torch.zeros(()))
