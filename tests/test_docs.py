"""The docs say what is so: their Python blocks and the examples run, links and names in them exist."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer
from conftest import slow

import st_linear
from st_linear import feature_map_names, feature_maps
from st_linear.cli import app

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

FENCE = re.compile(r"^```", re.MULTILINE)
BLOCK = re.compile(r"(?P<before>[^\n]*\n)?^```python[^\n]*\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)
REASON = re.compile(r"<!-- not executed: \S.* -->")
LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?P<target>[^)\s]+)\)")

# Other tests compare with the registry as the package leaves it.
MAPS = feature_map_names()


class Block(NamedTuple):
    code: str
    line: int
    comment: str

    @property
    def executed(self) -> bool:
        return "not executed" not in self.comment


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(match["code"], text.count("\n", 0, match.start("code")), (match["before"] or "").strip())
        for match in BLOCK.finditer(text)
    ]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return "".join(FENCE.split(page.read_text(encoding="utf-8"))[::2])


def anchors(page: Path) -> set[str]:
    """Anchors of the page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def mteb_help() -> str:
    """What mteb's own ``run`` says of its options."""
    parser = pytest.importorskip("mteb.cli.build_cli").build_cli()
    return next(action for action in parser._actions if action.choices).choices["run"].format_help()


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def check_reasons(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for block in blocks(page):
        assert block.executed or REASON.fullmatch(block.comment), f"{page.name}:{block.line} gives no reason"
    # A comment that precedes no block, and a fence in another spelling, would let a block go unnoticed.
    assert text.count("<!-- not executed") == sum(not block.executed for block in blocks(page))
    assert len(re.findall(r"^\s*(?:```|~~~)\s*py", text, re.MULTILINE | re.IGNORECASE)) == len(blocks(page))


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minilm: str) -> Iterator[None]:
    """An empty current folder, and a registry of feature maps that is put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(feature_maps, "_REGISTRY", dict(feature_maps._REGISTRY))
    monkeypatch.setattr("sys.argv", ["example"])
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.mark.usefixtures("sandbox")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "mteb.md"], ids=name_of)
def test_python_blocks_run(page: Path) -> None:
    """All pages but mteb's, which test_tasks.py runs: mteb takes long to start, and this may be another process."""
    run_blocks(page)


def run_blocks(page: Path) -> None:
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.executed:
            # Blank lines first: a traceback then shows the page's own line numbers.
            exec(compile("\n" * block.line + block.code, name_of(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_that_do_not_run_say_why(page: Path) -> None:
    check_reasons(page)


@pytest.mark.parametrize(
    ("comment", "fence", "accepted"),
    [
        ("<!-- not executed: needs the hub -->", "```python", True),
        ("<!-- not executed -->", "```python", False),
        ("<!-- not executed: -->", "```python", False),
        ("<!-- not executed: needs the hub -->\n", "```python", False),
        ("", "```py", False),
        ("1. A list:", "   ```python", False),
    ],
)
def test_reasons_are_found(comment: str, fence: str, accepted: bool, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"Text.\n\n{comment}\n{fence}\n1 / 0\n```\n", encoding="utf-8")
    if accepted:
        check_reasons(page)
        assert not blocks(page)[0].executed
    else:
        with pytest.raises(AssertionError):
            check_reasons(page)


@pytest.mark.usefixtures("sandbox")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
@pytest.mark.parametrize(
    "example",
    [path if path.stem == "new_feature_map" else slow(path) for path in EXAMPLES],
    ids=name_of,
)
def test_examples_run(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path) -> None:
    for match in LINK.finditer(prose(page)):
        target = match["target"]
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{name_of(page)} links to {target}"
        if anchor:
            assert anchor in anchors(linked), f"{name_of(page)} links to {target}; {sorted(anchors(linked))}"


def test_every_page_and_example_is_on_the_map() -> None:
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / match["target"]).resolve() for match in LINK.finditer(prose(index))}
    assert {*EXAMPLES, *index.parent.glob("*.md")} - {index} <= linked


def test_the_table_of_layers_names_every_module() -> None:
    text = prose(ROOT / "docs" / "contributing.md")
    table = text[text.index("| file | what it holds |") : text.index("There is no `utils.py`")]
    modules = {path.name for path in (ROOT / "st_linear").glob("*.py")} - {"__init__.py"}
    assert set(re.findall(r"`(\w+\.py)`", table)) == modules


def test_the_table_of_feature_maps_is_the_registry() -> None:
    text = prose(ROOT / "docs" / "feature_maps.md")
    table = text[text.index("| name |") : text.index("$R$ is the default")]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == MAPS


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_extras_exist(page: Path) -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11 and later
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for names in re.findall(r"(?:st[-_]linear|\.)\[([\w,\- ]+)\]", page.read_text(encoding="utf-8")):
        for name in names.split(","):
            assert name.strip() in extras, f"{name_of(page)} names the extra {name!r}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_options_exist(page: Path) -> None:
    top: Any = typer.main.get_command(app)
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for name, rest in re.findall(r"(?<![\w/\[\"])st-linear ([a-z]\w*)([^\n`]*)", text):
        assert name in top.commands, f"{name_of(page)} names the command {name!r}"
        command = top.commands[name]
        if subcommands := getattr(command, "commands", None):
            subname = (rest.split() or [""])[0]
            if not subname:
                continue
            assert subname in subcommands, f"{name_of(page)} names the command {name} {subname!r}"
            command = subcommands[subname]
        known = {option for parameter in command.params for option in parameter.opts} | {"--help", "--debug"}
        if name == "mteb":
            known |= set(re.findall(r"--[a-z-]+", mteb_help()))
        assert set(re.findall(r"(?<!\S)--[a-z][a-z-]*", rest)) <= known, f"{name_of(page)}: st-linear {name}{rest}"


def test_the_reference_has_all_that_the_package_exports() -> None:
    reference = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    named = re.findall(r"^::: st_linear\.(\w+)$", reference, re.MULTILINE)
    assert sorted(named) == sorted(st_linear.__all__)
