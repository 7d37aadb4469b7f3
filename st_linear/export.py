"""Converted encoders as graphs for ONNX Runtime and OpenVINO, which :mod:`st_linear.runtimes` runs.

Files lie where Sentence Transformers has them, so ``backend="onnx"`` and ``backend="openvino"`` find them. Its own
exporter, Optimum, takes no version of transformers that st_linear runs on.
"""

from __future__ import annotations

import copy
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from st_linear.attention import softmax_attention
from st_linear.conversion import AttentionCall, attention_calls, observe_attention
from st_linear.models import save_model
from st_linear.runtimes import DIGEST, FILES, LIMIT, OUTPUT, PACKAGES, ExportedEncoder, backend_of, digest_of, require
from st_linear.traceable import traceable_linear, traceable_local, traceable_near_far
from st_linear.transformer import LinearTransformer

TOLERANCE = 1e-4
"""Largest difference of a token's embedding that :func:`export` lets pass; ``onnx-int8`` has none."""

CHECKED_LENGTHS = (16, 512, 4096)
"""Tokens of the texts that every exported graph is compared with PyTorch on."""

OLDEST_TORCH = "2.9"
"""Tracers of torch 2.6 make a constant of the texts' length; those between are untried."""


def export(model: SentenceTransformer, folder: str | Path, formats: Sequence[str] = ("onnx",)) -> dict[str, Any]:
    """Save a converted model with graphs of its encoder, for any batch and length, and compare them with PyTorch.

    The folder is a whole model as ``save_pretrained`` writes it, so that PyTorch can load it as well, and at any
    moment the old one or the new one. Load it with ``backend="onnx"`` or ``"openvino"``::

        model = SentenceTransformer(folder, backend="onnx", trust_remote_code=True)

    Weights are float32. In ``onnx-int8`` those of matrix products and of token embeddings are int8, and activations
    are quantised as they come; load it with ``model_kwargs={"file_name": "onnx/model_quint8.onnx"}``.

    Args:
        model: A model that begins with a LinearTransformer.
        folder: Where; an earlier model of st_linear's there is replaced.
        formats: Of :data:`FILES`, one or several.

    Returns:
        By format: ``file``, ``bytes``, and ``largest_difference`` of a token's embedding by number of tokens.

    Raises:
        ImportError: If ONNX Runtime or OpenVINO is not installed.
        ValueError: If a format is unknown, the model has no linear attention of st_linear's, pads on the left, or a
            graph's outputs differ from PyTorch's by more than :data:`TOLERANCE`.
    """
    for name in formats:
        require_for(name)
    encoder: Any = model[0]
    if not isinstance(encoder, LinearTransformer) or encoder.backend != "torch":
        raise ValueError("can't export this model: pass a converted one, loaded with backend='torch'")
    side = encoder.tokenizer.padding_side  # type: ignore[union-attr]
    if side != "right":
        raise ValueError(f"can't export a model that pads on the {side}: on the right alone")
    differences: dict[str, dict[int, float]] = {}
    sizes: dict[str, int] = {}

    def add_graphs(fresh: Path) -> None:
        graph = _Graph(encoder)
        with tempfile.TemporaryDirectory() as temporary:
            onnx = Path(temporary) / "model.onnx"
            graph.write(onnx, digest_of(fresh))
            for name in formats:
                file = fresh / FILES[name]
                file.parent.mkdir(exist_ok=True)
                _WRITERS[name](onnx, file)
                sizes[name] = sum(part.stat().st_size for part in file.parent.glob(f"{file.stem}.*"))
                differences[name] = graph.differences(ExportedEncoder(file, encoder.config, backend_of(name)))
                tolerance = math.inf if name == "onnx-int8" else TOLERANCE
                for length, value in differences[name].items():
                    if not (math.isfinite(value) and value <= tolerance):
                        raise ValueError(
                            f"the {name} graph differs from PyTorch by {value:.1e} at {length} tokens, more than "
                            f"{tolerance}"
                        )

    save_model(model, Path(folder), add_graphs)
    return {
        name: {
            "file": str(Path(folder) / FILES[name]),
            "bytes": sizes[name],
            "largest_difference": {str(length): value for length, value in differences[name].items()},
        }
        for name in formats
    }


def require_for(name: str) -> None:
    """Find out before the work, not after it, that a format can't be written.

    Raises:
        ImportError: If what writes it is not installed, or torch is too old; the message says what to install.
        ValueError: If there is no such format.
    """
    if name not in FILES:
        raise ValueError(f"unknown format {name!r}; choose among: {', '.join(FILES)}")
    if torch.__version__ < OLDEST_TORCH:
        raise ImportError(f"exporting needs torch {OLDEST_TORCH} or newer, not {torch.__version__}")
    backend = backend_of(name)
    require(backend, "onnx", "onnxscript", PACKAGES[backend])


class _Graph(nn.Module):
    """An encoder on the CPU in float32, whose attention is of the form that can be traced."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder.model).to("cpu", torch.float32)
        self.limit = encoder.max_seq_length
        # A sliding layer has blocks as near/far attention does.
        radii = [call.radius or 0 for call in attention_calls(self.encoder)]
        self.block = max(encoder.window, *radii)
        self.checked = set(CHECKED_LENGTHS)
        if encoder.exact_up_to > 2 * encoder.window:
            # The shorter of two texts is exact beside a longer one that is not.
            self.checked.add(encoder.exact_up_to * 5 // 4)
        self.inputs = list(encoder.tokenizer(["a"]).keys())
        if encoder.squeezes_positions():
            self.inputs.append("position_ids")
        self.eval()

    # Names, as the tracer takes no keywords without.
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
        }
        with observe_attention(_attend):
            return self.encoder(**{name: given[name] for name in self.inputs}).last_hidden_state

    def write(self, file: Path, digest: str) -> None:
        """Write the graph as ONNX."""
        from onnx_ir import Shape

        # Some blocks and a part of one: a single one would be taken for a number that never changes.
        example = self._example(2, min(self.limit, 3 * max(self.block, 128) + 5))
        dynamic = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                self,
                kwargs=example,
                input_names=list(example),
                output_names=[OUTPUT],
                dynamic_shapes=dict.fromkeys(example, dynamic),
                dynamo=True,
                verbose=False,
            )
        assert program is not None
        program.model.metadata_props.update({DIGEST: digest, LIMIT: str(self.limit)})
        graph = program.model.graph
        for value in graph.inputs:
            value.shape = Shape(["batch", "length"])
        graph.outputs[0].shape = Shape(["batch", "length", self.encoder.config.hidden_size])
        program.save(file)

    def differences(self, exported: ExportedEncoder) -> dict[int, float]:
        """Largest difference of a token's embedding, by number of tokens: of two texts, one of them shorter."""
        found = {}
        for length in sorted({min(length, self.limit) for length in self.checked}):
            example = self._example(2, length)
            tokens = example["attention_mask"].bool()
            with torch.no_grad():
                expected = self.encoder(**example).last_hidden_state[tokens]
                output = exported(**example).last_hidden_state[tokens]
            found[length] = (output - expected).abs().max().item()
        return found

    def _example(self, texts: int, length: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(length)
        size = self.encoder.config.vocab_size
        # Ids below 1,000 hold special tokens in many vocabularies, padding among them.
        ids = torch.randint(min(1000, size // 2), size, (texts, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[-1, max(1, length * 2 // 3) :] = 0
        positions = torch.arange(length, dtype=torch.float32).expand(texts, -1)
        made = {
            "input_ids": ids,
            "attention_mask": mask,
            "token_type_ids": torch.zeros_like(ids),
            "position_ids": positions.contiguous(),
        }
        return {name: made[name] for name in self.inputs}


def _attend(call: AttentionCall) -> Tensor:
    assert call.attention_mask is not None
    arguments = (call.query, call.key, call.value, call.attention_mask.bool())
    if not call.is_linear():
        if call.radius is None:
            return call.softmax()
        return _exact_within(call.radius + 1, call.scale, partial(traceable_local, radius=call.radius), *arguments)
    attention = call.linear_attention
    feature_map, limit = attention.feature_map, attention.exact_up_to
    if not attention.window:
        return traceable_linear(*arguments, feature_map=feature_map, scale=call.scale)
    near_far = partial(
        traceable_near_far,
        feature_map=feature_map,
        window=attention.window,
        exact_up_to=limit,
        gain=attention.gain,
    )
    return _exact_within(limit, call.scale, near_far, *arguments)


def _exact_within(limit: int, scale: float, attend: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    """A branch in the graph: batches of up to ``limit`` tokens get softmax attention."""

    def dense(x: Tensor) -> Tensor:
        # Both branches must give the same strides, whatever those of the example are.
        return x.clone(memory_format=torch.contiguous_format)

    return torch.cond(
        arguments[0].shape[2] <= limit,
        lambda *x: dense(softmax_attention(*x, scale=scale)),
        lambda *x: dense(attend(*x, scale=scale)),
        arguments,
    )


def _write_onnx(onnx: Path, file: Path) -> None:
    for part in onnx.parent.glob(f"{onnx.name}*"):
        file.with_name(part.name).write_bytes(part.read_bytes())


def _write_int8(onnx: Path, file: Path) -> None:
    from onnx import load
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = load(onnx).graph
    matrices = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
    # A scale by channel, which a matrix for each head can't have: with one for the whole, cosines fall to 0.9.
    # Unsigned, as signed weights overflow the 16-bit sums of processors without VNNI.
    excluded = [node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] not in matrices]
    with _quiet():
        quantize_dynamic(onnx, file, weight_type=QuantType.QUInt8, per_channel=True, nodes_to_exclude=excluded)


def _write_openvino(onnx: Path, file: Path) -> None:
    import openvino

    model = openvino.Core().read_model(onnx)
    for key, value in _metadata(onnx).items():
        model.set_rt_info(value, [key])
    openvino.save_model(model, file, compress_to_fp16=False)


_WRITERS = {"onnx": _write_onnx, "onnx-int8": _write_int8, "openvino": _write_openvino}


def _metadata(onnx: Path) -> dict[str, str]:
    from onnx import load

    found = {entry.key: entry.value for entry in load(onnx, load_external_data=False).metadata_props}
    return {key: found[key] for key in (DIGEST, LIMIT)}


@contextmanager
def _quiet() -> Iterator[None]:
    """PyTorch's exporter and ONNX Runtime's quantiser say much that no user can act on."""
    # The quantiser logs through the root logger.
    loggers = [logging.getLogger(name) for name in (None, "torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
