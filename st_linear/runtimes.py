"""Encoders that ONNX Runtime or OpenVINO computes, as :func:`~st_linear.export.export` wrote them."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.util import load_file_path
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutput

from st_linear.checkpoints import hub_kwargs_of

FILES = {
    "onnx": "onnx/model.onnx",
    "onnx-int8": "onnx/model_quint8.onnx",
    "openvino": "openvino/openvino_model.xml",
}
"""Formats, and the file of each within a model's folder."""

RUNTIMES = ("onnx", "openvino")
"""Backends, as Sentence Transformers names them, that run exported encoders."""

PACKAGES = {"onnx": "onnxruntime", "openvino": "openvino"}
"""What each of them needs."""

DIGEST, LIMIT = "st_linear_weights", "st_linear_tokens"
"""Metadata of a graph: what weights it was made of, and how many tokens it takes at most."""

OUTPUT = "last_hidden_state"

# What a caller may say of how a graph is run, in model_kwargs.
_OPTIONS = {"onnx": ("file_name", "provider", "session_options"), "openvino": ("file_name", "ov_config")}

HUB_OPTIONS = {"cache_dir", "cache_folder", "local_files_only", "revision", "token", "trust_remote_code", "subfolder"}
"""``model_kwargs`` of Sentence Transformers' own, which say where files are and not how a graph is run."""


class ExportedEncoder(nn.Module):
    """Stands in for the encoder of a LinearTransformer; ONNX Runtime or OpenVINO computes what it gives.

    Without gradients, so it can't be trained; padding must be on the right. It runs on as many threads as PyTorch was
    set to when it was loaded, on the CPU unless a provider is named.

    Args:
        file: The graph.
        config: Of the encoder.
        backend: ``"onnx"`` or ``"openvino"``.
        **options: For ONNX Runtime ``provider`` (e.g. ``"CUDAExecutionProvider"``) and ``session_options``; for
            OpenVINO ``ov_config``, a dictionary of its properties.

    Raises:
        ImportError: If the runtime is not installed.
        ValueError: If an option is unknown, or the file is no such graph.
    """

    def __init__(self, file: str | Path, config: PretrainedConfig, backend: str, **options: Any) -> None:
        super().__init__()
        self.file, self.config, self.backend, self.options = str(file), config, backend, options
        self._start()
        self.eval()

    @classmethod
    def load(cls, path: str, config: PretrainedConfig, backend: str, **model_kwargs: Any) -> ExportedEncoder:
        """Load the graph of a folder or hub id; options are those of the class, and ``file_name``.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If st_linear did not write it, or, in a folder, if it is of other weights than those beside it.
        """
        options = {name: value for name, value in model_kwargs.items() if name not in HUB_OPTIONS}
        file_name = options.pop("file_name", FILES[backend])
        subfolder = model_kwargs.get("subfolder") or ""
        hub_kwargs = hub_kwargs_of(model_kwargs)
        file = load_file_path(path, file_name, subfolder, **hub_kwargs)
        if file is None:
            raise FileNotFoundError(f"{path} holds no {file_name}: st_linear.export writes it")
        # What lies beside it, if anything does: from the hub only files come that are asked for.
        for beside in _beside(Path(file_name)):
            load_file_path(path, beside.as_posix(), subfolder, **hub_kwargs)
        encoder = cls(file, config, backend, **options)
        if not encoder.digest:
            raise ValueError(f"{file} was not written by st_linear.export: it may hold another attention")
        folder = Path(path, subfolder)
        if folder.is_dir() and not digest_of(folder):
            raise ValueError(f"{folder} holds no weights to compare {file} with: keep the whole folder")
        if folder.is_dir() and encoder.digest != digest_of(folder):
            raise ValueError(f"{file} was exported from other weights than those of {folder}: export the model again")
        return encoder

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_dict: bool = True,
    ) -> BaseModelOutput:
        """Tokens' embeddings (B, T, hidden), where the inputs are, (B, T) each.

        Raises:
            ValueError: In training, on padding elsewhere than on the right, and on more tokens than the graph takes.
        """
        if self.training and torch.is_grad_enabled():
            raise ValueError(f"a model that runs on {self.backend} can't be trained: load it with backend='torch'")
        if (attention_mask.diff(dim=1) > 0).any():
            raise ValueError(
                "exported encoders take padding on the right alone: set tokenizer.padding_side to 'right'"
            )
        if input_ids.shape[1] > self.limit:
            raise ValueError(f"the graph takes {self.limit} tokens at most, got {input_ids.shape[1]}")
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], dtype=torch.float32).expand(input_ids.shape)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
        }
        feed = {name: given[name].cpu().numpy() for name in self.inputs}
        return BaseModelOutput(last_hidden_state=torch.from_numpy(self._run(feed)).to(input_ids.device))

    def fingerprint(self) -> str:
        """Of the graph: all that its outputs depend on, but for the runtime."""
        return _sha256([Path(self.file), *_beside(Path(self.file))])

    def _start(self) -> None:
        for name in self.options:
            if name not in _OPTIONS[self.backend]:
                raise ValueError(
                    f"unknown option {name!r} for backend={self.backend!r}; choose among: "
                    f"{', '.join(_OPTIONS[self.backend])}"
                )
        require(self.backend, PACKAGES[self.backend])
        start = _start_onnxruntime if self.backend == "onnx" else _start_openvino
        try:
            self.inputs, metadata, self._run = start(self.file, **self.options)
        except ValueError:
            raise
        except Exception as error:  # both runtimes raise whatever comes from C++
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"{self.file} can't be run with backend={self.backend!r} ({reason})") from error
        self.digest, self.limit = metadata.get(DIGEST, ""), int(metadata.get(LIMIT, 0))

    # A session can't be pickled or copied: processes and copies start one of their own.
    def __getstate__(self) -> dict[str, Any]:
        if "session_options" in self.options:
            raise ValueError("an encoder with session_options can't be copied to other processes: leave them out")
        return {name: value for name, value in self.__dict__.items() if name != "_run"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start()
        if self.digest != state["digest"]:
            raise ValueError(f"{self.file} is another graph than it was: load the model again")


def _start_onnxruntime(file: str, provider: str = "CPUExecutionProvider", session_options: Any = None) -> tuple:
    import onnxruntime

    if session_options is None:
        session_options = onnxruntime.SessionOptions()
        session_options.intra_op_num_threads = torch.get_num_threads()
    if provider not in (available := onnxruntime.get_available_providers()):
        raise ValueError(f"unknown provider {provider!r}; choose among: {', '.join(available)}")
    session = onnxruntime.InferenceSession(file, session_options, providers=[provider], enable_fallback=0)
    if session.get_providers()[0] != provider:
        raise ValueError(f"provider {provider!r} did not start, and ONNX Runtime took {session.get_providers()[0]}")
    names = [entry.name for entry in session.get_inputs()]
    metadata = session.get_modelmeta().custom_metadata_map
    return names, metadata, lambda feed: session.run([OUTPUT], dict(feed))[0]


def _start_openvino(file: str, ov_config: Mapping[str, Any] | None = None) -> tuple:
    import openvino

    core = openvino.Core()
    model = core.read_model(file)
    # In bfloat16, which it would choose where the processor has it, vectors are others.
    defaults = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(model, "CPU", {**defaults, **(ov_config or {})})
    names = [entry.get_any_name() for entry in compiled.inputs]
    metadata = {key: str(model.get_rt_info([key]).value) for key in (DIGEST, LIMIT) if model.has_rt_info([key])}
    # A request serves one thread at a time.
    requests = threading.local()

    def run(feed: Mapping[str, Any]) -> Any:
        if not hasattr(requests, "own"):
            requests.own = compiled.create_infer_request()
        # A copy: the next call writes where this one's output is.
        return requests.own.infer(dict(feed))[0].copy()

    return names, metadata, run


def backend_of(name: str) -> str:
    """The backend that runs a format."""
    return name.partition("-")[0]


def arguments_for(name: str) -> dict[str, Any]:
    """Arguments of ``load`` that run the graph of a format, one of :data:`FILES`; none for ``"torch"``.

    Raises:
        ValueError: If there is no such format.
    """
    if name == "torch":
        return {}
    if name not in FILES:
        raise ValueError(f"unknown format {name!r}; choose among: torch, {', '.join(FILES)}")
    return {"backend": backend_of(name), "model_kwargs": {"file_name": FILES[name]}}


def _beside(file: Path) -> list[Path]:
    """Files that hold a graph's weights, where it does not hold them itself."""
    return [file.with_suffix(".bin")] if file.suffix == ".xml" else [file.with_name(f"{file.name}.data")]


def digest_of(folder: Path) -> str:
    """Of the weights of a saved encoder, "" where there are none."""
    files = sorted(folder.glob("*.safetensors"))
    return _sha256(files) if files else ""


def _sha256(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            with file.open("rb") as stream:
                while part := stream.read(2**20):
                    digest.update(part)
    return digest.hexdigest()


def require(extra: str, *packages: str) -> None:
    """Raise an ImportError that says what to install, unless it is."""
    for package in packages:
        try:
            import_module(package)
        except ImportError as error:
            raise ImportError(f'backend {extra!r} needs {package}: pip install "st-linear[{extra}]"') from error
