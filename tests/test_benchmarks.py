from __future__ import annotations

import gc
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, refused
from sentence_transformers import SentenceTransformer
from test_recipe import write_pairs

from st_linear import feature_map_names, feed_forward, linear_attention, make_feature_map, memory
from st_linear.attention import linear_attention_reference, near_far_attention_reference, softmax_attention_reference
from st_linear.benchmarks import LEVELS, contenders, encoders, markdown, report, run, runner, table, timing, workloads
from st_linear.benchmarks.contenders import MapSpec, Shape, make_attention, plain_linear_attention
from st_linear.benchmarks.encoders import PADDED, Encoders, encoder_workloads, mixed_models, mixed_workloads
from st_linear.benchmarks.settings import MIXED_PARTS, Settings
from st_linear.benchmarks.timing import extra_memory, measure_rounds, median_interval, paired_ratio
from st_linear.records import read_json, write_json

CPU = torch.device("cpu")
SHAPE = Shape(heads=4, head_dim=8, device=CPU, dtype=torch.float32)
MAPS = [name for name in feature_map_names() if name != "softmax"]
EXACT = {"rtol": 1e-4, "atol": 1e-5}
# Prints by how many MiB resident memory grows in a step that makes 64 MiB, gives them back and returns 16.
RESIDENT = """
import torch
from st_linear.benchmarks.timing import extra_memory

def step():
    torch.ones(2**24)
    return torch.ones(2**22)

step()
print(extra_memory(step, torch.device("cpu")).resident_mib)
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_MINIMUM_SECONDS", 0)


@pytest.fixture
def qkv() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 40, 8, generator=generator)
    return query, key, value


class TestStatistics:
    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ([3, 1, 2], (2, 1, 3)),
            ([6, 5, 4, 3, 2, 1], (3.5, 1, 6)),
            ([9, 8, 7, 6, 5, 4, 3, 2, 1], (5, 2, 8)),
            (list(range(1, 21)), (10.5, 6, 15)),
        ],
    )
    def test_median_and_order_statistics(self, values: list[float], expected: tuple[float, float, float]) -> None:
        assert median_interval(values) == expected

    @pytest.mark.parametrize("rounds", range(timing.MINIMUM_ROUNDS, 41))
    def test_intervals_are_the_narrowest_that_cover_95_percent(self, rounds: int) -> None:
        _, low, high = median_interval(list(range(1, rounds + 1)))
        assert low + high == rounds + 1

        def covered(rank: int) -> float:
            return 1 - 2 * sum(math.comb(rounds, k) for k in range(rank)) / 2**rounds

        assert covered(int(low)) >= 0.95 > covered(int(low) + 1)

    def test_fewer_rounds_do_not_cover_it(self) -> None:
        assert 1 - 2 * 0.5 ** (timing.MINIMUM_ROUNDS - 1) < 0.95

    def test_ratios_are_paired(self) -> None:
        slow = [10.0 ** random.Random(seed).uniform(-3, 3) for seed in range(9)]
        assert paired_ratio([2 * value for value in slow], slow) == pytest.approx((2, 2, 2))

    def test_nothing_and_unequal_rounds_are_refused(self) -> None:
        with refused("values is empty: there is no median"):
            median_interval([])
        with refused("rounds must be pairs, got 2 and 1"):
            paired_ratio([1, 2], [1])


class TestRounds:
    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
        """Steps are called once for a timing, and last as long as they say; the list tells which were timed."""
        timed: list[tuple[str, int]] = []

        def seconds(step: Callable[[], tuple[str, float]], calls: int, device: torch.device) -> float:
            name, lasts = step()
            timed.append((name, calls))
            return lasts

        monkeypatch.setattr(timing, "_seconds", seconds)
        return timed

    def test_every_round_holds_each_once_in_changing_order(self, clock: list[tuple[str, int]]) -> None:
        results = measure_rounds({name: lambda name=name: (name, 2.0) for name in "abc"}, rounds=9, device=CPU)
        rounds = [clock[start : start + 3] for start in range(0, len(clock), 3)]
        assert len(rounds) == 1 + 9
        assert all(sorted(name for name, _ in part) == ["a", "b", "c"] for part in rounds)
        assert len({tuple(part) for part in rounds}) > 2
        assert {name: timings.seconds for name, timings in results.items()} == dict.fromkeys("abc", [2.0] * 9)

    def test_the_order_is_a_function_of_the_seed(self, clock: list[tuple[str, int]]) -> None:
        steps = {name: lambda name=name: (name, 2.0) for name in "abc"}
        orders = []
        for seed in (0, 0, 1):
            clock.clear()
            measure_rounds(steps, rounds=9, device=CPU, seed=seed)
            orders.append(list(clock))
        assert orders[0] == orders[1] != orders[2]

    def test_fast_steps_are_repeated(self, clock: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(timing, "_MINIMUM_SECONDS", 0.02)
        steps = {"fast": lambda: ("fast", 0.003), "slow": lambda: ("slow", 0.05)}
        results = measure_rounds(steps, rounds=6, device=CPU)
        assert (results["fast"].calls, results["slow"].calls) == (7, 1)
        assert set(clock[4:]) == {("fast", 7), ("slow", 1)}

    def test_a_budget_leaves_the_fewest_rounds(self, clock: list[tuple[str, int]]) -> None:
        called = []
        results = measure_rounds(
            {"a": lambda: ("a", 1.0)}, rounds=50, device=CPU, seconds=0, warmup=2, on_round=lambda: called.append(1)
        )
        assert len(results["a"].seconds) == timing.MINIMUM_ROUNDS
        assert len(called) == 2 + timing.MINIMUM_ROUNDS

    def test_garbage_collection_is_off_meanwhile(self) -> None:
        seen = []
        measure_rounds({"a": lambda: seen.append(gc.isenabled())}, rounds=6, device=CPU)
        assert set(seen) == {False}
        assert gc.isenabled()

    @pytest.mark.parametrize(
        "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate")]
    )
    def test_out_of_memory_ends_one_contender(self, error: RuntimeError) -> None:
        def fail() -> None:
            raise error

        results = measure_rounds({"a": fail, "b": lambda: None}, rounds=6, device=CPU)
        assert (results["a"].failure, results["a"].seconds) == ("out of memory", [])
        assert (results["b"].failure, len(results["b"].seconds)) == (None, 6)

    def test_other_errors_are_errors(self) -> None:
        def fail() -> None:
            raise RuntimeError("a bug")

        with pytest.raises(RuntimeError, match="a bug"):
            measure_rounds({"a": fail}, rounds=6, device=CPU)
        assert gc.isenabled()


class TestMemory:
    MIB = 2**20 // 4

    def step(self) -> torch.Tensor:
        torch.ones(64 * self.MIB)
        return torch.ones(16 * self.MIB)

    def test_growth_beyond_outputs(self) -> None:
        self.step()
        measured = extra_memory(self.step, CPU)
        assert measured is not None
        # The first tensor is gone before the second one comes.
        assert (measured.tensors_mib, measured.outputs_mib, measured.total_mib) == (48, 16, 64)

    @pytest.mark.slow
    def test_growth_of_resident_memory(self) -> None:
        # In a process of its own: a heap that other tests left in pieces may hold the first tensor's memory back.
        done = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True)
        if done.stdout.strip() == "None":
            pytest.skip("resident memory can't be measured here")
        assert float(done.stdout) == pytest.approx(48, abs=8)

    def test_memory_that_the_allocator_kept_does_not_hide_growth(self) -> None:
        def step() -> tuple[()]:
            # Small blocks come from the heap, which keeps them.
            kept = [torch.ones(self.MIB // 64) for _ in range(64 * 64)]
            del kept
            return ()

        step()
        measured = extra_memory(step, CPU)
        assert measured is not None
        assert (measured.tensors_mib, measured.outputs_mib) == (64, 0)
        if measured.resident_mib is None:
            pytest.skip("resident memory can't be measured here")
        assert measured.resident_mib == pytest.approx(64, abs=8)

    def test_memory_of_a_training_step(self) -> None:
        weight = torch.ones(self.MIB, requires_grad=True)

        def step() -> tuple[torch.Tensor, ...]:
            # Two products are kept for the backward pass.
            return torch.autograd.grad((weight * 2 * weight).exp().sum(), [weight])

        measured = extra_memory(step, CPU)
        assert measured is not None
        assert measured.outputs_mib == 1
        assert 2 <= measured.tensors_mib <= 4

    def test_none_where_it_cannot_be_measured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert extra_memory(self.step, torch.device("meta")) is None
        # Where the system does not take the high-water mark back.
        monkeypatch.setattr(timing, "peak_memory_mib", lambda: 1e6)
        measured = extra_memory(self.step, CPU)
        assert measured is not None
        assert (measured.tensors_mib, measured.resident_mib) == (48, None)

    def test_nothing_is_said_beneath_python(self, capfd: pytest.CaptureFixture[str]) -> None:
        extra_memory(self.step, CPU)
        assert capfd.readouterr() == ("", "")


class TestSpecs:
    @pytest.mark.parametrize(
        ("name", "features", "expected"),
        [
            ("hedgehog", None, MapSpec("hedgehog")),
            ("hedgehog@64", None, MapSpec("hedgehog", None, 64)),
            ("favor:128@5", 32, MapSpec("favor", 128, 5)),
            ("favor", 32, MapSpec("favor", 32)),
            ("elu", 32, MapSpec("elu")),
        ],
    )
    def test_parse(self, name: str, features: int | None, expected: MapSpec) -> None:
        assert MapSpec.parse(name, features) == expected

    @pytest.mark.parametrize("name", ["", "nosuch", "favor:", "favor@", "favor:x", "favor@64:128", "softmax", "Favor"])
    def test_other_names_list_the_choices(self, name: str) -> None:
        with refused(
            f"unknown model {name!r}; choose among: sdpa, flash, performer, plain, uncompiled, flash-bla, copy, MAP["
        ):
            make_attention(name, SHAPE)
        with refused("MAP is one of elu, relu, favor, "):
            make_attention(name, SHAPE)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("elu:64", "feature map 'elu' has no option 'num_features'"),
            ("favor:0", "num_features must be a positive integer, got 0"),
            ("sdpa:3", "unknown model 'sdpa:3'; sdpa has no options"),
            ("copy:3", "unknown model 'copy:3'; copy has no options"),
            ("performer:x", "unknown model 'performer:x'; write performer:NUMBER, its number of features"),
            ("performer:0", "unknown model 'performer:0'; write performer:NUMBER"),
            (
                "uncompiled:elu",
                "uncompiled is there to compare with the compiled CPU kernel: run `st-linear build` first",
            ),
            ("plain:elu@4", "unknown model 'plain:elu@4'; plain is purely linear: leave out @4"),
            ("flash", "flash needs device=cuda and dtype float16 or bfloat16, got cpu and float32"),
            ("flash-bla:x", "unknown model 'flash-bla:x'; write flash-bla, or flash-bla:kernel"),
        ],
    )
    def test_bad_options(self, name: str, message: str) -> None:
        with refused(message):
            make_attention(name, SHAPE)


class TestAttention:
    def test_sdpa(self, qkv: tuple[torch.Tensor, ...]) -> None:
        torch.testing.assert_close(
            make_attention("sdpa", SHAPE).function(*qkv), softmax_attention_reference(*qkv), **EXACT
        )

    @pytest.mark.parametrize("name", MAPS)
    def test_plain_is_st_linear_and_its_reference(self, qkv: tuple[torch.Tensor, ...], name: str) -> None:
        expected = linear_attention_reference(*qkv, feature_map=make_feature_map(name, 4, 8))
        torch.testing.assert_close(make_attention(name, SHAPE).function(*qkv), expected, **EXACT)
        torch.testing.assert_close(make_attention(f"plain:{name}", SHAPE).function(*qkv), expected, **EXACT)

    @pytest.mark.parametrize("name", MAPS)
    def test_plain_of_a_trained_map(self, qkv: tuple[torch.Tensor, ...], name: str) -> None:
        feature_map = make_feature_map(name, 4, 8)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in feature_map.parameters():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        expected = linear_attention_reference(*qkv, feature_map=feature_map)
        # A query that meets no key gets zeros from st_linear, and 0 / 0 from plain code.
        output = plain_linear_attention(*qkv, feature_map=feature_map).nan_to_num(0)
        torch.testing.assert_close(output, expected, **EXACT)

    def test_plain_withstands_large_logits(self, qkv: tuple[torch.Tensor, ...]) -> None:
        query, key, value = qkv
        feature_map = make_feature_map("hedgehog", 4, 8)
        output = plain_linear_attention(10 * query, 10 * key, value, feature_map=feature_map)
        expected = linear_attention(10 * query, 10 * key, value, feature_map=feature_map)
        torch.testing.assert_close(output, expected, **EXACT)

    def test_near_far(self, qkv: tuple[torch.Tensor, ...]) -> None:
        attention = make_attention("favor:32@5", SHAPE)
        feature_map = make_feature_map("favor", 4, 8, num_features=32)
        expected = near_far_attention_reference(*qkv, feature_map=feature_map, window=5)
        torch.testing.assert_close(attention.function(*qkv), expected, **EXACT)
        assert [tuple(parameter.shape) for parameter in attention.parameters] == [(4,)]

    def test_performer_is_a_mean_of_values(self, qkv: tuple[torch.Tensor, ...]) -> None:
        query, key, value = qkv
        for name in ("performer", "performer:16"):
            function = make_attention(name, SHAPE).function
            ones = function(query, key, torch.ones_like(value))
            torch.testing.assert_close(ones, torch.ones_like(value), **EXACT)
        assert make_attention("performer", SHAPE).function.nb_features == 256
        assert make_attention("performer:16", SHAPE).function.nb_features == 16

    def test_performer_estimates_softmax(self, qkv: tuple[torch.Tensor, ...]) -> None:
        query, key, value = qkv
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            output = make_attention("performer:4096", SHAPE).function(query / 2, key / 2, value)
        expected = softmax_attention_reference(query / 2, key / 2, value)
        torch.testing.assert_close(output, expected, rtol=0, atol=0.1)

    def test_copy_moves_as_many_bytes_as_attention_must(self, qkv: tuple[torch.Tensor, ...]) -> None:
        copies = make_attention("copy", SHAPE).function(*qkv)
        for copy, original in zip(copies, qkv):
            torch.testing.assert_close(copy, original, rtol=0, atol=0)
            assert copy.data_ptr() != original.data_ptr()
        # Each byte is read and written.
        assert 2 * sum(copy.nbytes for copy in copies) == 4 * qkv[0].nbytes

    def test_names_are_made_without_touching_the_generator(self) -> None:
        before = torch.get_rng_state()
        contenders.check_attention("performer", SHAPE)
        assert torch.equal(torch.get_rng_state(), before)


class TestFlashBla:
    @pytest.mark.parametrize(
        "module", ["flash_bla.ops.linear_attn.fused", "fbi_la.ops.linear_attn.attention"], ids=["today", "first"]
    )
    def test_either_name_is_found(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, qkv: tuple[torch.Tensor, ...]
    ) -> None:
        file = tmp_path / (module.replace(".", "/") + ".py")
        file.parent.mkdir(parents=True)
        file.write_text("def linear_attention(q, k, v):\n    return q\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        assert contenders.flash_bla_attention()(1, 2, 3) == 1
        with refused("flash-bla needs device=cuda, got cpu"):
            make_attention("flash-bla", SHAPE)
        for name in [name for name in sys.modules if name.startswith(module.split(".")[0])]:
            monkeypatch.delitem(sys.modules, name)

    def test_a_missing_package_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(contenders, "find_spec", lambda name: None)
        with refused("pip install git+https://github.com/fla-org/flash-bidirectional-linear-attention", ImportError):
            make_attention("flash-bla", SHAPE)


class TestSettings:
    @pytest.mark.parametrize("level", LEVELS)
    def test_defaults(self, level: str) -> None:
        settings = Settings.for_level(level)
        assert set(settings.baselines) <= set(settings.models)
        assert json.loads(json.dumps(settings.to_json())) == settings.to_json()

    def test_texts(self) -> None:
        assert Settings.for_level("encoder", batch_size=3).texts(512) == 3
        assert Settings.for_level("encoder", batch_tokens=1100).texts(512) == 2
        assert Settings.for_level("encoder", batch_tokens=100).texts(512) == 1

    def test_a_default_baseline_that_takes_no_part_is_none(self) -> None:
        settings = Settings.for_level("encoder", models=("hedgehog", "no-attention"))
        assert settings.baselines == ("no-attention",)
        assert Settings.for_level("encoder", models=("elu", "favor")).baselines == ("elu",)

    def test_names_of_files(self) -> None:
        assert Settings.for_level("attention").name == "attention"
        assert Settings.for_level("attention", backward=True).name == "attention-backward"

    @pytest.mark.parametrize(
        ("level", "options", "message"),
        [
            ("nosuch", {}, "unknown level 'nosuch'; choose among: attention, encoder, training, mixed"),
            ("encoder", {"heads": 3}, "heads is no option of level 'encoder', but of: attention"),
            ("attention", {"base": "x"}, "base is no option of level 'attention', but of: encoder, training, mixed"),
            ("encoder", {"attention_dropout": 0.1}, "no option of level 'encoder', but of: training, mixed"),
            ("training", {"data": "sample"}, "data is no option of level 'training', but of: mixed"),
            ("encoder", {"dtype": "int8"}, "unknown dtype 'int8'; choose among: float32, bfloat16, float16"),
            ("encoder", {"device": "x"}, "unknown device 'x'; choose one of: cpu, cuda"),
            ("encoder", {"models": ()}, "models is empty: name at least one"),
            ("encoder", {"models": ("elu", "elu")}, "models names one twice: elu, elu"),
            ("encoder", {"baselines": ("x",)}, "unknown baseline 'x'; choose among: softmax, no-attention, "),
            ("encoder", {"limits": {"x": 8}}, "unknown model in limits 'x'; choose among: softmax, "),
            ("mixed", {"parts": ("x",)}, "unknown part 'x'; choose among: sts-forward, "),
            ("encoder", {"rounds": 5}, "rounds must be at least 6, where a median's 95 % interval begins, got 5"),
            ("encoder", {"lengths": ()}, "lengths is empty: name at least one"),
            ("encoder", {"lengths": (2,)}, "lengths must be at least 3 tokens, got 2"),
            ("encoder", {"batch_size": 0}, "batch_size must be positive, got 0"),
            ("encoder", {"features": 0}, "features must be positive, got 0"),
            ("encoder", {"threads": -1}, "threads must not be negative, got -1"),
            ("encoder", {"seconds": -1.0}, "seconds must not be negative, got -1.0"),
            ("training", {"attention_dropout": 1.0}, "attention_dropout must be at least 0 and below 1, or -1"),
        ],
    )
    def test_errors(self, level: str, options: dict[str, Any], message: str) -> None:
        with refused(message):
            Settings.for_level(level, **options)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_a_missing_device(self) -> None:
        with refused("device 'cuda' is not there: PyTorch sees no CUDA device; choose cpu"):
            Settings.for_level("encoder", device="cuda")


def ids(*rows: list[int]) -> dict[str, torch.Tensor]:
    tokens = torch.tensor(rows)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


class TestEncoders:
    @pytest.fixture
    def made(self, bert: str) -> Encoders:
        settings = Settings.for_level("training", base=bert, models=("softmax", "hedgehog"), baselines=("softmax",))
        return Encoders(settings, 100)

    def test_softmax_is_the_base_with_transformers_own_attention(self, made: Encoders, bert: str) -> None:
        features = ids([0, 5, 9, 11, 2])
        expected = SentenceTransformer(bert)(dict(features))["sentence_embedding"]
        torch.testing.assert_close(made["softmax"].embed(features), expected.detach(), **EXACT)
        assert made["softmax"].transformer.model.config._attn_implementation == "sdpa"
        assert made["softmax"].transformer.max_seq_length == 100

    def test_near_far_within_the_window_is_softmax(self, made: Encoders) -> None:
        features = ids([0, 5, 9, 11, 2])
        torch.testing.assert_close(made["hedgehog@4"].embed(features), made["softmax"].embed(features), **EXACT)

    def test_without_attention_tokens_do_not_meet(self, made: Encoders) -> None:
        for name, apart in (("no-attention", True), ("softmax", False), ("performer:16", False)):
            encoder = made[name]
            encoder.model.eval()
            with torch.inference_mode(), encoder._observed():
                one, other = (encoder.transformer(ids([0, 5, x, 2]))["token_embeddings"] for x in (9, 12))
            assert torch.allclose(one[:, :2], other[:, :2], atol=1e-6) is apart
            assert not torch.allclose(one[:, 2], other[:, 2], atol=1e-3)

    def test_all_but_the_originals_run_in_chunks_and_in_memory_used_before(
        self, made: Encoders, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(feed_forward, "CHUNK_ELEMENTS", 2 * SMALL["hidden_size"])
        monkeypatch.setattr(memory, "MIN_TOKENS", 1)
        monkeypatch.setattr(memory, "MIN_BYTES", 1)
        requests: list[Any] = []
        empty = memory._ReusedMemory._empty
        monkeypatch.setattr(memory._ReusedMemory, "_empty", lambda *args: requests.append(args) or empty(*args))
        whole = ("softmax", "no-attention-whole")
        for name in (*whole, "no-attention", "performer:16", "hedgehog@4"):
            seen: list[int] = []
            intermediate = made[name].transformer.model.encoder.layer[0].intermediate
            hook = intermediate.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))  # noqa: B023
            requests.clear()
            made[name].embed(ids([0, 5, 9, 11, 2]))
            hook.remove()
            assert seen == ([5] if name in whole else [2, 2, 1]), name
            assert bool(requests) == (name not in whole), name

    def test_each_is_made_once(self, made: Encoders) -> None:
        assert made["elu"] is made["elu"]
        assert made["favor:8"].transformer.feature_map_kwargs == {"num_features": 8}

    def test_a_training_step_has_dropout_and_a_forward_pass_has_none(self, made: Encoders) -> None:
        encoder = made["hedgehog"]
        for module in encoder.model.modules():
            module.training = module is encoder.model
        features = ids([0, 5, 9, 11, 2])
        encoder.train(features)
        assert all(module.training for module in encoder.model.modules())
        encoder.embed(features)
        assert not any(module.training for module in encoder.model.modules())

    def test_a_training_step_moves_the_weights_and_keeps_no_gradient(self, made: Encoders) -> None:
        encoder = made["hedgehog"]
        before = {name: tensor.clone() for name, tensor in encoder.model.state_dict().items()}
        encoder.train(ids([0, 5, 9, 11, 2]))
        after = encoder.model.state_dict()
        moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
        assert any("linear_attention.feature_map" in name for name in moved)
        assert any("word_embeddings" in name for name in moved)
        assert all(parameter.grad is None for parameter in encoder.model.parameters())
        assert encoder.model.training

    @pytest.mark.parametrize(("option", "expected"), [(-1.0, 0.1), (0.0, 0.0), (0.25, 0.25)])
    def test_attention_dropout(self, bert: str, option: float, expected: float) -> None:
        settings = Settings.for_level("training", base=bert, attention_dropout=option, lengths=(8,))
        (workload,) = encoder_workloads(settings)
        assert workload.about == {"attention_dropout": expected}

    def test_a_dropout_that_does_not_arrive_is_refused(self, bert: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(encoders, "_DROPOUT_OPTIONS", ())
        settings = Settings.for_level("training", base=bert, attention_dropout=0.0, lengths=(8,))
        with refused("attention_dropout=0.0 can't be set"):
            list(encoder_workloads(settings))

    def test_softmax_with_dropout_is_skipped_where_it_would_not_fit(
        self, bert: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(encoders, "_available_mib", lambda: 100.0)
        options = {"base": bert, "lengths": (64, 2048), "models": ("softmax", "elu")}
        short, long = encoder_workloads(Settings.for_level("training", **options))
        # 2 layers of 4 heads, 9 bytes each.
        assert (short.skipped, long.skipped) == ({}, {"softmax": "its T × T weights need about 0 GiB"})
        assert not any(w.skipped for w in encoder_workloads(Settings.for_level("encoder", **options)))
        for workload in encoder_workloads(Settings.for_level("training", attention_dropout=0.0, **options)):
            assert workload.skipped == {}

    def test_limits(self, bert: str) -> None:
        settings = Settings.for_level(
            "encoder", base=bert, lengths=(8, 16), models=("softmax", "elu"), limits={"softmax": 8}, batch_tokens=32
        )
        short, long = encoder_workloads(settings)
        assert (list(short.build()), list(long.build())) == (["softmax", "elu"], ["elu"])
        assert long.skipped == {"softmax": "limit of 8 tokens"}
        assert [(w.tokens, w.documents, w.longest) for w in (short, long)] == [(32, 4, 8), (32, 2, 16)]


class TestMixed:
    @pytest.fixture
    def settings(self, bert: str, tmp_path: Path) -> Settings:
        write_pairs(tmp_path / "pairs")
        return Settings.for_level(
            "mixed",
            base=bert,
            data=str(tmp_path / "pairs"),
            batch_size=6,
            batch_tokens=96,
            lengths=(32,),
            models=("softmax", "hedgehog@3", "no-attention"),
        )

    def test_models_come_packed_and_padded(self, settings: Settings) -> None:
        assert mixed_models(settings) == [
            "softmax",
            "hedgehog@3",
            "hedgehog@3 padded",
            "no-attention",
            "no-attention padded",
        ]

    def test_parts(self, settings: Settings) -> None:
        made = {workload.name: workload for workload in mixed_workloads(settings)}
        assert list(made) == ["sts-forward", "sts-training", "sts-encode", "32-forward", "32-training"]
        assert [workload.about["part"] for workload in made.values()] == list(MIXED_PARTS)
        long = made["32-forward"]
        assert long.documents == 3
        assert long.longest <= 64
        assert 0 < long.about["padding"] < 1
        assert made["sts-encode"].about["batch_size"] == 32
        assert made["sts-forward"].documents % 6 == 0

    def test_packed_and_padded_are_one_embedding(self, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: dict[str, list[torch.Tensor]] = {}
        original = encoders.Encoder.embed

        def embed(self: encoders.Encoder, features: dict[str, Any]) -> torch.Tensor:
            output = original(self, features)
            seen.setdefault("cu_seq_lens_q" in features, []).append(output)  # type: ignore[arg-type]
            return output

        monkeypatch.setattr(encoders.Encoder, "embed", embed)
        for workload in mixed_workloads(settings):
            if workload.name.endswith("forward"):
                steps = workload.build()
                seen.clear()
                steps["hedgehog@3"]()
                steps[f"hedgehog@3{PADDED}"]()
                assert len(seen[True]) == len(seen[False]) > 0  # type: ignore[index]
                for packed, padded in zip(seen[True], seen[False]):  # type: ignore[index]
                    torch.testing.assert_close(packed, padded, **EXACT)

    def test_a_limit_counts_for_both(self, settings: Settings) -> None:
        limited = Settings.for_level(**{**vars(settings), "limits": {"hedgehog@3": 9}, "parts": ("long-forward",)})
        (workload,) = mixed_workloads(limited)
        assert set(workload.skipped) == {"hedgehog@3", "hedgehog@3 padded"}
        assert list(workload.build()) == ["softmax", "no-attention", "no-attention padded"]

    def test_too_few_sentences(self, settings: Settings) -> None:
        many = Settings.for_level(**{**vars(settings), "batch_size": 10_000})
        with refused("batch_size=10000 is more than the"):
            list(mixed_workloads(many))

    def test_performer_takes_no_padding(self, settings: Settings) -> None:
        many = Settings.for_level(**{**vars(settings), "models": ("performer",), "baselines": None})
        with refused("model 'performer' takes no mask and no packed inputs"):
            run(many)


OPTIONS = {"models": ("sdpa", "elu", "hedgehog@8", "copy"), "heads": 2, "head_dim": 8, "rounds": 6}


class TestRun:
    def test_record(self, tmp_path: Path) -> None:
        settings = Settings.for_level("attention", lengths=(16, 32), threads=1, **OPTIONS)
        states: list[int] = []
        progress: list[tuple[str, int, int]] = []
        record = run(
            settings,
            tmp_path / "a" / "attention.json",
            progress=lambda *news: progress.append(news),
            on_record=lambda made: states.append(len(made["results"])),
        )
        assert record == read_json(tmp_path / "a" / "attention.json")
        assert states == [1, 2]
        assert progress[-1] == ("32", 14, 14)
        assert record["settings"]["models"] == list(OPTIONS["models"])
        assert record["environment"]["threads"] == 1
        for length, result in zip((16, 32), record["results"]):
            assert (result["name"], result["tokens"], result["documents"]) == (str(length), length, 1)
            assert list(result["contenders"]) == list(OPTIONS["models"])
            for name, figures in result["contenders"].items():
                assert len(figures["seconds"]) == 6
                middle = median_interval(figures["seconds"])
                assert (figures["median_seconds"], figures["seconds_low"], figures["seconds_high"]) == middle
                assert figures["tokens_per_second"] == pytest.approx(length / middle.median)
                # q, k, v and o, two heads of 8, four bytes each.
                assert figures["bytes_per_second"] == pytest.approx(4 * 16 * length * 4 / middle.median)
                baseline = result["contenders"]["sdpa"]["seconds"]
                assert figures["speed"] == {"sdpa": paired_ratio(baseline, figures["seconds"])._asdict()}, name

    def test_backward(self) -> None:
        record = run(Settings.for_level("attention", lengths=(16,), backward=True, **OPTIONS))
        figures = record["results"][0]["contenders"]
        assert figures["copy"] == {"skipped": "has no backward pass"}
        assert "bytes_per_second" not in figures["elu"]
        # o and the gradients of q, k, v.
        assert figures["elu"]["memory"]["outputs_mib"] == 4 * 16 * 16 * 4 / 2**20

    @pytest.mark.parametrize("name", ["elu", "hedgehog", "hedgehog@4", "plain:hedgehog"])
    def test_gradients(self, name: str) -> None:
        settings = Settings.for_level(
            "attention", models=("sdpa", name), lengths=(20,), heads=2, head_dim=8, backward=True
        )
        (workload,) = workloads.attention_workloads(settings)
        output, *gradients = workload.build()[name]()
        assert output.shape == (1, 2, 20, 8)
        assert all(gradient.abs().sum() > 0 for gradient in gradients)

    def test_across_lengths(self) -> None:
        settings = Settings.for_level("attention", lengths=(16, 64), across_lengths=True, **OPTIONS)
        progress: list[tuple[str, int, int]] = []
        record = run(settings, progress=lambda *news: progress.append(news))
        assert progress[-1] == ("16 … 64", 7, 7)
        first, second = record["results"]
        assert first["contenders"]["elu"]["growth_per_token"]["time"] == {"median": 1, "low": 1, "high": 1}
        growth = second["contenders"]["elu"]["growth_per_token"]
        expected = paired_ratio(
            [value / 64 for value in second["contenders"]["elu"]["seconds"]],
            [value / 16 for value in first["contenders"]["elu"]["seconds"]],
        )
        assert (growth["since"], growth["time"]) == ("16", expected._asdict())

    def test_an_interrupted_run_goes_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "attention.json"
        original = runner._measure

        def interrupt(group: Any, *more: Any) -> Any:
            if group[0].name == "32":
                raise KeyboardInterrupt
            return original(group, *more)

        monkeypatch.setattr(runner, "_measure", interrupt)
        settings = Settings.for_level("attention", lengths=(16, 32), **OPTIONS)
        with pytest.raises(KeyboardInterrupt):
            run(settings, path)
        kept = read_json(path)
        assert [result["name"] for result in kept["results"]] == ["16"]
        monkeypatch.setattr(runner, "_measure", original)
        said: list[str] = []
        record = run(settings, path, say=said.append)
        assert [result["name"] for result in record["results"]] == ["16", "32"]
        assert record["results"][0] == kept["results"][0]
        assert said == [f"{path} holds 16: not measured again"]
        # Further lengths are added, in order.
        record = run(Settings.for_level("attention", lengths=(24,), **OPTIONS), path)
        assert [result["name"] for result in record["results"]] == ["16", "24", "32"]
        assert record["settings"]["lengths"] == [16, 32, 24]
        monkeypatch.setattr(runner, "_measure", lambda *_: pytest.fail("nothing is left to measure"))
        assert run(settings, path)["results"] == record["results"]

    def test_a_record_of_another_run_is_left_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "attention.json"
        settings = Settings.for_level("attention", lengths=(16,), **OPTIONS)
        record = run(settings, path)
        other = Settings.for_level("attention", lengths=(32,), **{**OPTIONS, "rounds": 7})
        with refused(f"{path} was made with rounds=6, this run has 7: name another folder, or delete it"):
            run(other, path)
        write_json(path, {**record, "environment": {**record["environment"], "torch": "1.0"}})
        with refused(f"{path} was made with torch='1.0', this run has "):
            run(settings, path)
        write_json(path, {"students": {}})
        with refused(f"{path} is no record of a benchmark: name another folder"):
            run(settings, path)

    def test_threads_are_put_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before = torch.get_num_threads()
        monkeypatch.setattr(runner, "_workloads", lambda _: iter(()))
        record = run(Settings.for_level("attention", threads=before + 1, **OPTIONS))
        assert record["environment"]["threads"] == before + 1
        assert torch.get_num_threads() == before

    def test_a_contender_without_memory_is_skipped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any) -> None:
            raise torch.OutOfMemoryError("too much")

        monkeypatch.setitem(contenders.ATTENTION_PEERS, "sdpa", lambda rest, shape: contenders.Attention(fail))
        record = run(Settings.for_level("attention", lengths=(16,), **OPTIONS))
        figures = record["results"][0]["contenders"]
        assert figures["sdpa"] == {"skipped": "out of memory"}
        assert figures["elu"]["speed"] == {}
        assert report.speed_by_length(record) == ({}, "sdpa")

    @pytest.mark.parametrize("level", ["encoder", "training"])
    def test_encoders(self, bert: str, level: str) -> None:
        options = {"base": bert, "models": ("softmax", "hedgehog@4", "no-attention"), "lengths": (16,), "rounds": 6}
        record = run(Settings.for_level(level, batch_size=2, **options))
        (result,) = record["results"]
        assert (result["tokens"], result["documents"]) == (32, 2)
        assert ("attention_dropout" in result) == (level == "training")
        assert all(len(figures["seconds"]) == 6 for figures in result["contenders"].values())

    @pytest.mark.slow
    def test_exported_encoders(self, bert: str) -> None:
        models = ("softmax", "elu@4", "onnx:softmax", "onnx:elu@4", "onnx-int8:elu@4", "openvino:elu@4")
        record = run(Settings.for_level("encoder", base=bert, models=models, lengths=(16, 40), rounds=6))
        for result in record["results"]:
            assert list(result["contenders"]) == list(models)
            assert all(len(figures["seconds"]) == 6 for figures in result["contenders"].values())

    @pytest.mark.parametrize(
        ("level", "options", "message"),
        [
            ("training", {}, "model 'onnx:elu' runs at level 'encoder', in float32, on the CPU alone"),
            ("mixed", {}, "model 'onnx:elu' runs at level 'encoder', in float32, on the CPU alone"),
            ("encoder", {"dtype": "bfloat16"}, "model 'onnx:elu' runs at level 'encoder', in float32"),
            ("encoder", {"models": ("onnx:nosuch",)}, "unknown model 'nosuch'; choose among: softmax, MAP["),
        ],
    )
    def test_exported_encoders_only_read(self, level: str, options: dict[str, Any], message: str) -> None:
        with refused(message):
            run(Settings.for_level(level, **{"models": ("softmax", "onnx:elu"), **options}))

    @pytest.mark.slow
    def test_mixed(self, bert: str, tmp_path: Path) -> None:
        write_pairs(tmp_path / "pairs")
        settings = Settings.for_level(
            "mixed",
            base=bert,
            data=str(tmp_path / "pairs"),
            batch_size=4,
            batch_tokens=64,
            lengths=(32,),
            models=("softmax", "hedgehog@3"),
            rounds=6,
        )
        record = run(settings)
        assert [result["name"] for result in record["results"]] == [
            "sts-forward",
            "sts-training",
            "sts-encode",
            "32-forward",
            "32-training",
        ]
        for result in record["results"]:
            assert set(result["contenders"]["hedgehog@3"]["speed"]) == {"softmax", "hedgehog@3 padded"}
            assert set(result["contenders"]["hedgehog@3 padded"]["speed"]) == {"softmax"}
        header, lines = report.rows(record)
        assert header[-1] == "speed × padded"
        assert [line[-1] == "–" for line in lines] == [True, False, True] * 5

    def test_unknown_models_are_found_out_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runner, "_workloads", lambda _: pytest.fail("too late"))
        for level, choices in (
            ("attention", "sdpa, flash, "),
            ("encoder", "softmax, no-attention, no-attention-whole, "),
        ):
            with refused(f"unknown model 'nosuch'; choose among: {choices}"):
                run(Settings.for_level(level, models=("nosuch",)))


def figures(seconds: float, **more: Any) -> dict[str, Any]:
    return {
        "median_seconds": seconds,
        "tokens_per_second": 512 / seconds,
        "documents_per_second": 1 / seconds,
        "memory": {"tensors_mib": 12.34, "resident_mib": None, "outputs_mib": 1.0},
        "speed": {"sdpa": {"median": 0.5 / seconds, "low": 0.4 / seconds, "high": 0.6 / seconds}},
        **more,
    }


@pytest.fixture
def record() -> dict[str, Any]:
    return {
        "level": "attention",
        "settings": {
            "baselines": ["sdpa"],
            "rounds": 9,
            "heads": 12,
            "head_dim": 32,
            "dtype": "float32",
            "device": "cpu",
            "backward": False,
        },
        "environment": {"device": "a processor", "threads": 2},
        "results": [
            {"name": "512", "contenders": {"sdpa": figures(0.5), "elu": figures(0.25, memory=None)}},
            {
                "name": "999",
                "contenders": {"sdpa": {"skipped": "limit of 512 tokens"}, "elu": figures(0.5, speed={})},
            },
        ],
    }


class TestReport:
    def test_rows(self, record: dict[str, Any]) -> None:
        header, lines = report.rows(record)
        assert header == [
            "length",
            "model",
            "ms",
            "tokens/s",
            "documents/s",
            "tensors, MiB",
            "resident, MiB",
            "speed × sdpa",
        ]
        assert lines == [
            ["512", "sdpa", "500", "1,024", "2.00", "12.3", "–", "1.00 [0.80, 1.20]"],
            ["512", "elu", "250", "2,048", "4.00", "–", "–", "2.00 [1.60, 2.40]"],
            ["999", "sdpa", "limit of 512 tokens", "", "", "", "", ""],
            ["999", "elu", "500", "1,024", "2.00", "12.3", "–", "–"],
        ]

    def test_growth_and_bandwidth(self, record: dict[str, Any]) -> None:
        record["settings"]["across_lengths"] = True
        grown = {"since": "512", "time": {"median": 1.05, "low": 1.0, "high": 1.1}, "memory": 0.987}
        for result in record["results"]:
            result["contenders"] = {
                "elu": figures(0.5, growth_per_token=grown, bytes_per_second=2.5e9),
                "favor": figures(0.5, growth_per_token=None, bytes_per_second=250e9),
            }
        header, lines = report.rows(record)
        assert header[7:] == ["GB/s", "speed × sdpa", "time per token ×", "memory per token ×"]
        assert [line[7] for line in lines[:2]] == ["2.50", "250"]
        assert [line[-2:] for line in lines[:2]] == [["1.05 [1.00, 1.10]", "0.987"], ["–", "–"]]

    def test_table_and_markdown_hold_the_rows(self, record: dict[str, Any]) -> None:
        made = table(record)
        assert made.row_count == 4
        text = markdown(record)
        assert text.startswith(
            "attention · 12 heads of 32 · float32 · cpu (a processor) · 2 threads\n\n| length | model "
        )
        assert "| 512 | elu | 250 | 2,048 | 4.00 | – | – | 2.00 [1.60, 2.40] |\n" in text
        assert "beyond inputs and outputs" in text

    def test_files(self, record: dict[str, Any], tmp_path: Path) -> None:
        report.write_report(record, tmp_path, "attention")
        assert {path.name for path in tmp_path.iterdir()} == {"attention.md", "attention.svg"}

    def test_speed_is_of_the_first_baseline_without_itself(self, record: dict[str, Any]) -> None:
        assert report.speed_by_length(record) == (
            {"elu": {"512": {"median": 2.0, "low": 1.6, "high": 2.4}}},
            "sdpa",
        )
