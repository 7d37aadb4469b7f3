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
    Mapped,
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
LEARNED = [name for name in MAPS if list(make_feature_map(name, 2, 4).parameters())]

B, H, T, D = 2, 3, 7, 4


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def queries_and_keys(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return randn(B, H, T, D, seed=1, dtype=dtype), randn(B, H, T, D, seed=2, dtype=dtype)


def unscaled(mapped: Mapped) -> Tensor:
    return mapped.features * mapped.log_scale.exp()


def weights(feature_map: FeatureMap, query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, H, T, T) of φ_q(q_i)·φ_k(k_j)."""
    return unscaled(feature_map.query(query, mask)) @ unscaled(feature_map.key(key, mask)).transpose(-1, -2)


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
        mask = torch.ones(B, 1, T, 1, dtype=torch.bool) if masked else None
        for mapped, one_scale_per in ((feature_map.query(query, mask), T), (feature_map.key(key, mask), 1)):
            assert mapped.features.shape == (B, H, T, feature_map.num_features)
            assert mapped.features.dtype == dtype
            assert mapped.log_scale.expand(B, H, one_scale_per, 1).dtype == dtype

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
        mask = F.pad(torch.ones(B, 1, T, 1, dtype=torch.bool), pad)
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


@pytest.mark.parametrize(
    ("name", "num_features"),
    [("elu", 4), ("relu", 4), ("t2r", 4), ("efficient", 4), ("hedgehog", 8), ("cosformer", 8), ("taylor", 1 + 4 + 10)],
)
def test_num_features_by_default(name: str, num_features: int) -> None:
    assert make_feature_map(name, H, D).num_features == num_features


@pytest.mark.parametrize("name", EXPONENTIAL)
class TestExponentialMaps:
    def test_features_are_positive_and_at_most_one_over_root_of_their_number(self, name: str) -> None:
        feature_map = make_feature_map(name, H, D)
        query, key = queries_and_keys()
        for mapped in (feature_map.query(query, None), feature_map.key(key, None)):
            assert mapped.features.min() > 0
            assert_close(mapped.features.max() * feature_map.num_features**0.5, torch.tensor(1.0).double())

    def test_stabiliser_ranges_over_tokens_only(self, name: str) -> None:
        feature_map = make_feature_map(name, H, D)
        # The logit of an empty slot, 0, would be the largest of FAVOR+: its |x|²/2 outweighs w·x here.
        key = 20 + randn(B, H, T, D)
        pad = (0, 0, 0, 2)
        mask = F.pad(torch.ones(B, 1, T, 1, dtype=torch.bool), pad)
        assert_close(feature_map.key(F.pad(key, pad), mask).log_scale, feature_map.key(key, None).log_scale)

    def test_stabilisers_carry_no_gradient(self, name: str) -> None:
        feature_map = make_feature_map(name, H, D)
        query, key = (x.requires_grad_() for x in queries_and_keys())
        assert not feature_map.query(query, None).log_scale.requires_grad
        assert not feature_map.key(key, None).log_scale.requires_grad

    def test_a_text_without_a_token_keeps_a_finite_stabiliser(self, name: str) -> None:
        feature_map = make_feature_map(name, H, D)
        key = torch.zeros(B, H, T, D, requires_grad=True)
        mapped = feature_map.key(key, torch.zeros(B, 1, T, 1, dtype=torch.bool))
        assert mapped.log_scale.isfinite().all()
        (gradient,) = torch.autograd.grad(mapped.features.sum(), key)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", LEARNED)
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


@pytest.mark.parametrize("name", LEARNED)
def test_learned_projections_differ_by_head_and_side(name: str) -> None:
    feature_map = make_feature_map(name, H, D)
    x = randn(1, 1, 1, D).expand(B, H, T, D)
    before = unscaled(feature_map.query(x, None)), unscaled(feature_map.key(x, None))
    with torch.no_grad():
        feature_map.get_parameter("query_projection.weight")[1] *= 2
    after = unscaled(feature_map.query(x, None)), unscaled(feature_map.key(x, None))
    others = [0, 2]
    assert_close(after[0][:, others], before[0][:, others], rtol=0, atol=0)
    assert_close(after[1], before[1], rtol=0, atol=0)
    assert (after[0][:, 1] != before[0][:, 1]).any()


def test_elu_keeps_its_tail_in_bfloat16() -> None:
    x = torch.tensor([-80.0, -20.0, -7.0, -1.0, 0.0, 0.5, 300.0], dtype=torch.bfloat16)
    features = make_feature_map("elu", 1, 7).features(x)
    assert features.dtype == torch.bfloat16
    assert (features > 0).all()
    assert_close(features, torch.where(x >= 0, x.double() + 1, x.double().exp()).to(torch.bfloat16))


def test_elu_has_finite_gradients_at_any_size() -> None:
    x = torch.tensor([-1e4, 0.0, 1e4], requires_grad=True)
    (gradient,) = torch.autograd.grad(make_feature_map("elu", 1, 3).features(x).sum(), x)
    assert_close(gradient, torch.tensor([0.0, 1.0, 1.0]))


def test_efficient_normalises_queries_over_features_and_keys_over_tokens() -> None:
    feature_map = make_feature_map("efficient", H, D)
    query, key = queries_and_keys()
    mask = torch.tensor([[True] * T, [True] * 3 + [False] * (T - 3)])[:, None, :, None]
    rows = feature_map.query(query, mask).features.sum(dim=-1)
    assert_close(rows, torch.ones_like(rows))
    columns = (feature_map.key(key, mask).features * mask).sum(dim=-2)
    assert_close(columns, torch.tensor([7.0, 3.0], dtype=torch.float64)[:, None, None].expand(B, H, D))


def test_positions_of_cosformer_count_tokens() -> None:
    feature_map = make_feature_map("cosformer", H, D)
    query, key = queries_and_keys()
    mask = torch.zeros(B, 1, 2 * T + 1, 1, dtype=torch.bool)
    mask[:, :, 1::2] = True
    spread = [torch.zeros(B, H, 2 * T + 1, D, dtype=torch.float64).masked_scatter(mask, x) for x in (query, key)]
    assert_close(weights(feature_map, *spread, mask)[:, :, 1::2, 1::2], cosformer_kernel(feature_map, query, key))


def test_softmax_stands_for_exact_attention() -> None:
    softmax = make_feature_map("softmax", H, D)
    assert softmax.exact
    assert not any(feature_map_class(name).exact for name in MAPS)
    with pytest.raises(NotImplementedError):
        softmax.query(*queries_and_keys()[:1], None)
