"""What a study is asked to do: its YAML file, checked, and the cells of its grid."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from st_linear.losses import Objective, TeacherActivation
from st_linear.protocols import check_protocol
from st_linear.settings import ATTENTION_FORM, Settings, Student

STUDY = "study.json"
"""The file of a study's folder that says what it was asked to do."""

MOST_CELLS = 10_000
"""Of one study: a grid with more is a mistake in writing it."""

MOST_VALUES = 200_000
"""In one file, likewise."""

Location = tuple[Any, ...]


def _checked_attention(name: str) -> str:
    Student.named(name)
    if "+" in name:
        raise ValueError(f"unknown student {name!r}: write {ATTENTION_FORM}, and 'transfer' in a line of its own")
    return name


def _checked_protocol(name: str) -> str:
    check_protocol(name)
    return name


def _listed(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else [value]


def _without_doubles(values: tuple[Any, ...]) -> tuple[Any, ...]:
    for index, value in enumerate(values):
        if value in values[:index]:
            raise ValueError(f"{value!r} stands there twice")
    return values


Attention = Annotated[str, AfterValidator(_checked_attention)]
Protocol = Annotated[str, AfterValidator(_checked_protocol)]
# Below four tokens nothing is left of a text but its special tokens.
Length = Annotated[int, Field(ge=4, le=2**20)]
# NumPy's generators take no greater ones.
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Share = Annotated[float, Field(gt=0, lt=1)]
_Value = TypeVar("_Value")
SomeOrNone = Annotated[tuple[_Value, ...], BeforeValidator(_listed), AfterValidator(_without_doubles)]
Some = Annotated[SomeOrNone[_Value], Field(min_length=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Data(_Part):
    """Sentence pairs, the same for all cells.

    Attributes:
        source: ``sample``, a folder or a hub id.
        train: Training pairs, evenly spaced; None = all.
        dev: Pairs of the learning curve, likewise.
        test: Pairs of the final figures, likewise.
        most_tokens: Pairs with a longer sentence are left out; None = none are.
        seed: Of what the protocols draw.
    """

    source: str = "sample"
    train: Annotated[int, Field(ge=4)] | None = None
    dev: Annotated[int, Field(ge=4)] | None = None
    test: Annotated[int, Field(ge=4)] | None = None
    most_tokens: Length | None = None
    seed: Seed = 0


class TeacherChoice(_Part):
    """Whose scores are distilled.

    Attributes:
        model: Hub id or folder of a CrossEncoder.
        scores: Folder of cached scores instead. With neither, a teacher is trained from the base model.
    """

    model: str | None = None
    scores: str | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> TeacherChoice:
        if self.model is not None and self.scores is not None:
            raise ValueError("give a model or scores, not both")
        return self


class Grid(_Part):
    """Cells: every combination of these.

    Attributes:
        attention: Names of students, ``MAP[:features][@window]``; ``softmax`` is the control.
        length: Tokens of the training texts.
        protocol: What brings texts to that length.
        seed: Of everything random in a cell.
        transfer: Whether attention transfer comes before distillation; the control knows none.
        pairs_at_once: Pairs of a training step that are in memory at once; the gradients of such parts are added up.
            None = all of the step's.
        half: Whether to train under bfloat16 autocast; None = as ``training.half`` says. Cells that are compared
            should have the same: give it by seed, where some run on a machine without instructions for bfloat16.
    """

    attention: Some[Attention]
    length: Some[Length]
    protocol: Some[Protocol] = ("repeat",)
    seed: Some[Seed] = (0,)
    transfer: Some[bool] = (False,)
    pairs_at_once: PositiveInt | None = None
    half: bool | None = None

    def cells(self) -> Iterator[Cell]:
        """Each combination's cell; the control comes again for each value of ``transfer``."""
        for attention, length, protocol, seed, transfer in product(*self._values()):
            yield Cell(
                attention, length, protocol, seed, transfer and attention != "softmax", self.half, self.pairs_at_once
            )

    def size(self) -> int:
        """How many combinations there are."""
        return math.prod(map(len, self._values()))

    def _values(self) -> tuple[tuple[Any, ...], ...]:
        return self.attention, self.length, self.protocol, self.seed, self.transfer


class Budget(_Part):
    """What each cell may spend on distillation, in one of three units; as many whole steps as fit.

    Attributes:
        examples: Pairs seen: equal steps for all cells.
        tokens: Tokens read: fewer steps at greater lengths.
        operations: Floating-point operations: fewer steps where attention costs more.
    """

    examples: PositiveInt | None = None
    tokens: PositiveInt | None = None
    operations: PositiveFloat | None = None

    @model_validator(mode="after")
    def _one_unit(self) -> Budget:
        if len(self.model_dump(exclude_none=True)) != 1:
            raise ValueError("give one of examples, tokens and operations")
        return self

    @property
    def unit(self) -> str:
        """The unit that it is given in."""
        return next(iter(self.model_dump(exclude_none=True)))

    @property
    def amount(self) -> float:
        """How many of the unit."""
        return float(getattr(self, self.unit))


class Training(_Part):
    """How each cell is distilled; see :class:`~st_linear.settings.Settings`."""

    batch_size: PositiveInt = 32
    learning_rate: PositiveFloat = 3e-5
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    objective: Objective = "mse"
    teacher_activation: TeacherActivation = "sigmoid"
    half: bool = False


class TransferBudget(_Part):
    """What attention transfer may cost; see :class:`~st_linear.settings.Settings`."""

    epochs: PositiveFloat = 2
    steps: PositiveInt = 120
    maps_learning_rate: PositiveFloat = 1e-2


class Evaluation(_Part):
    """When and how long texts are read.

    Attributes:
        shares: Of training, after which dev is read at the training length; 0 and 1 always are.
        lengths: Tokens at which test is read in the end, beside the training length and the natural one.
    """

    shares: SomeOrNone[Share] = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75)
    lengths: SomeOrNone[Length] = ()


@dataclass(frozen=True)
class Cell:
    """One distillation of the grid.

    Cells that differ in ``pairs_at_once`` alone are the same: it says how a step is computed, not what.
    """

    attention: str
    length: int
    protocol: str
    seed: int
    transfer: bool
    half: bool | None = None
    pairs_at_once: int | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """As it is printed."""
        return f"{self.student_name}, {self.length} tokens, {self.protocol}, seed {self.seed}{self._format(', ')}"

    @property
    def folder(self) -> str:
        """Name of its folder."""
        student = self.attention.replace(":", "-") + ("-transfer" if self.transfer else "")
        return f"{self.length:05d}-{self.protocol}-{student}-seed-{self.seed}{self._format('-')}"

    @property
    def student_name(self) -> str:
        """The attention, and whether there was transfer."""
        return student_name(self.attention, self.transfer)

    @property
    def is_control(self) -> bool:
        """Whether it attends exactly."""
        return self.attention == "softmax"

    def _format(self, before: str) -> str:
        return "" if self.half is None else f"{before}{number_format(self.half)}"

    def student(self) -> Student:
        """How it attends and what it is taught first."""
        return Student.named(self.attention, None if self.transfer else "none")


class Study(_Part):
    """A study: a grid of cells, and all that is the same for them.

    Attributes:
        name: Title of the report.
        base: Encoder, hub id or folder; ``packaged`` is the all-MiniLM-L6-v2 of the extra ``quickstart``.
        grid: Grids, whose cells are put together.
        threads: Of PyTorch on the CPU; None = its default. Other numbers of threads round otherwise.
        checkpoint_seconds: Training saves a checkpoint when so much time has passed since the last.
        keep_models: Whether the trained models stay in the cells' folders.
    """

    name: Annotated[str, Field(min_length=1)]
    base: str = "packaged"
    data: Data = Data()
    teacher: TeacherChoice = TeacherChoice()
    grid: Annotated[tuple[Grid, ...], BeforeValidator(_listed), Field(min_length=1)]
    budget: Budget
    training: Training = Training()
    transfer: TransferBudget = TransferBudget()
    evaluation: Evaluation = Evaluation()
    threads: PositiveInt | None = None
    checkpoint_seconds: Annotated[float, Field(ge=0)] = 120
    keep_models: bool = False

    @model_validator(mode="after")
    def _settings_agree(self) -> Study:
        size = sum(grid.size() for grid in self.grid)
        if size > MOST_CELLS:
            raise ValueError(f"the grid has {size:,} cells, more than {MOST_CELLS:,}")
        known: dict[Cell, Cell] = {}
        for grid in self.grid:
            if grid.pairs_at_once is not None:
                self._check_parts(grid.pairs_at_once)
            for cell in grid.cells():
                first = known.setdefault(replace(cell, half=None), cell)
                for key in ("half", "pairs_at_once"):
                    if getattr(first, key) != getattr(cell, key):
                        raise ValueError(f"two grids have the cell {first.name!r}, with different {key}")
        self.settings(seed=0)
        if self.budget.unit == "examples" and self.budget.amount < self.training.batch_size:
            raise ValueError(f"budget.examples makes no step of training.batch_size={self.training.batch_size} pairs")
        if self.training.teacher_activation == "identity" and self.training.objective == "mse":
            raise ValueError("a cosine can't match logits: teacher_activation identity needs objective cosent")
        return self

    def _check_parts(self, pairs_at_once: int) -> None:
        if self.training.batch_size % pairs_at_once:
            raise ValueError(
                f"pairs_at_once={pairs_at_once} must divide training.batch_size={self.training.batch_size}"
            )
        if self.training.objective == "cosent" and pairs_at_once < self.training.batch_size:
            raise ValueError(f"cosent compares all pairs of a step: it can't have pairs_at_once={pairs_at_once}")

    def cells(self) -> list[Cell]:
        """The grid's cells, each once: by seed, then by length, the control first."""
        found = {cell for grid in self.grid for cell in grid.cells()}
        return sorted(found, key=lambda c: (c.seed, c.length, c.protocol, not c.is_control, c.attention, c.transfer))

    def lengths(self) -> tuple[int, ...]:
        """All lengths that texts are brought to."""
        return tuple(sorted({cell.length for cell in self.cells()} | set(self.evaluation.lengths)))

    def protocols(self) -> tuple[str, ...]:
        """All protocols in use."""
        return tuple(sorted({cell.protocol for cell in self.cells()}))

    def settings(self, seed: int, half: bool | None = None) -> Settings:
        """What a cell's distillation costs, but for the number of its steps.

        Args:
            seed: The cell's.
            half: The cell's; None = ``training.half``.
        """
        return Settings(
            batch_size=self.training.batch_size,
            learning_rate=self.training.learning_rate,
            alpha=self.training.alpha,
            objective=self.training.objective,
            teacher_activation=self.training.teacher_activation,
            half=self.training.half if half is None else half,
            transfer_epochs=self.transfer.epochs,
            transfer_steps=self.transfer.steps,
            maps_learning_rate=self.transfer.maps_learning_rate,
            lengths=(),
            max_seq_length=max(512, *self.lengths()),
            seed=seed,
        )

    def common(self) -> dict[str, Any]:
        """What all cells share, as JSON values: figures of studies that differ in it don't compare."""
        return self.model_dump(mode="json", exclude={"name", "grid", "checkpoint_seconds", "keep_models"})


def number_format(half: bool) -> str:
    """What a cell trains in."""
    return "bfloat16" if half else "float32"


def student_name(attention: str, transfer: bool) -> str:
    """The attention, and whether there was transfer."""
    return f"{attention} + transfer" if transfer else attention


def read_study(path: Path) -> Study:
    """Read a study's YAML file.

    Raises:
        ValueError: If it is no YAML or asks for what can't be; the message names the line.
        FileNotFoundError: If there is no such file.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        lines = {} if root is None else _lines(path, root)
        value = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = 1 if mark is None else mark.line + 1
        raise ValueError(f"{path}, line {line}: no YAML: {error.problem or error.context}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error
    except _BadFile:
        raise
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    try:
        return Study.model_validate(value)
    except ValidationError as error:
        _raise(path, error, lines)


class _BadFile(ValueError):
    """Says where in the file."""


def _lines(path: Path, root: yaml.Node) -> dict[Location, int]:
    """The line of every value, by where it stands; of a value with a key, the key's line."""
    lines: dict[Location, int] = {}
    open_nodes: list[tuple[Location, yaml.Node]] = [((), root)]
    visited = 0
    while open_nodes:
        location, node = open_nodes.pop()
        lines.setdefault(location, node.start_mark.line + 1)
        visited += 1
        if visited > MOST_VALUES:
            # Aliases of aliases make a few lines as large as one likes.
            raise _BadFile(f"{path} holds more than {MOST_VALUES:,} values")
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key, value in node.value:
                line = key.start_mark.line + 1
                if not isinstance(key, yaml.ScalarNode):
                    raise _BadFile(f"{path}, line {line}: keys must be words")
                if key.value in seen:
                    raise _BadFile(f"{path}, line {line}: {key.value} stands there twice")
                seen.add(key.value)
                lines[(*location, key.value)] = line
                open_nodes.append(((*location, key.value), value))
        elif isinstance(node, yaml.SequenceNode):
            open_nodes += [((*location, index), value) for index, value in enumerate(node.value)]
    return lines


def _raise(path: Path, error: ValidationError, lines: Mapping[Location, int]) -> NoReturn:
    first, *others = error.errors(include_url=False)
    known: Location = first["loc"]
    while known and known not in lines:
        known = known[:-1]
    where = ".".join(map(str, first["loc"])) or "the file"
    if first["type"] == "extra_forbidden":
        problem = f"unknown key; the keys there: {', '.join(_keys(first['loc'][:-1]))}"
    elif first["type"] == "missing":
        problem = "is missing"
    elif first["type"] == "model_type":
        problem = f"must have keys ({', '.join(_keys(first['loc']))}), got {first['input']!r}"
    else:
        problem = first["msg"].removeprefix("Value error, ")
        if not isinstance(first["input"], (dict, BaseModel)) and repr(first["input"]) not in problem:
            problem += f", got {first['input']!r}"
    more = f" (and {len(others)} more)" if others else ""
    raise ValueError(f"{path}, line {lines.get(known, 1)}: {where}: {problem}{more}") from error


def _keys(location: Location) -> list[str]:
    """The keys of the part of a study that stands there."""
    part: type[BaseModel] = Study
    for step in location:
        if isinstance(step, str):
            part = Grid if step == "grid" else part.model_fields[step].annotation  # type: ignore[assignment]
    return list(part.model_fields)
