"""Each file imports only files above it in DESIGN's list, and optional packages stay in their own files."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import st_linear

PACKAGE = Path(st_linear.__file__).parent

LAYERS = [
    "feature_maps",
    "positions",
    "kernels",
    "softmax",
    "near",
    "streaming",
    "attention",
    "traceable",
    "feed_forward",
    "memory",
    "conversion",
    "quiet",
    "records",
    "markdown",
    "model_card",
    "pair_head",
    "checkpoints",
    "untrusted",
    "adapters",
    "runtimes",
    "transformer",
    "models",
    "export",
    "losses",
    "teachers",
    "data",
    "mining",
    "protocols",
    "references",
    "evaluation",
    "grid",
    "tables",
    "transfer",
    "plots",
    "settings",
    "training",
    "recipe",
    "tasks",
    "benchmarks",
    "study",
    "__init__",
    "cli",
]
"""Top-level modules of the package, lowest first."""

OPTIONAL = {
    "matplotlib": ("plots", "study"),
    "markdown_it": ("study",),
    "mteb": ("tasks",),
    "onnx": ("export",),
    "onnx_ir": ("export",),
    "onnxruntime": ("export", "runtimes"),
    "openvino": ("export", "runtimes"),
    "pydantic": ("study",),
    "ray": ("study",),
    "triton": ("kernels",),
    "yaml": ("study",),
}
"""Packages that come with an extra, and the modules that may import them."""

FILES = sorted(PACKAGE.rglob("*.py"))


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_modules(path: Path) -> Iterator[str]:
    """Dotted names of all modules that a file imports, at whatever depth, ``a.b`` for ``from a import b`` too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def upward_imports(path: Path, names: Iterator[str]) -> list[str]:
    own = layer_of(path)
    found = []
    for name in names:
        root, *rest = name.split(".")
        if root == "st_linear":
            # ``from st_linear import load`` asks the package itself, which re-exports what lies below it.
            layer = rest[0] if rest and rest[0] in LAYERS else "__init__"
            if layer != own and LAYERS.index(layer) >= LAYERS.index(own):
                found.append(name)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_down(path: Path) -> None:
    assert layer_of(path) in LAYERS, f"{path.name} has no place in the list of layers"
    assert upward_imports(path, imported_modules(path)) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_optional_packages_stay_in_their_files(path: Path) -> None:
    roots = {name.split(".")[0] for name in imported_modules(path)}
    for package, layers in OPTIONAL.items():
        assert package not in roots or layer_of(path) in layers, f"{path.name} imports {package}"


def test_an_upward_import_is_found() -> None:
    names = ["torch.nn", "st_linear.feature_maps.FeatureMap", "st_linear.transformer.LinearTransformer"]
    assert upward_imports(PACKAGE / "attention.py", iter(names)) == ["st_linear.transformer.LinearTransformer"]
    assert upward_imports(PACKAGE / "attention.py", iter(["st_linear.load"])) == ["st_linear.load"]
    assert upward_imports(PACKAGE / "cli.py", iter(names)) == []
