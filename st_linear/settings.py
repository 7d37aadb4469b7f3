"""What a distillation is asked to do: how its students attend, and what it may cost."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from st_linear.conversion import check_settings
from st_linear.feature_maps import feature_map_names
from st_linear.losses import Head, Objective, TeacherActivation, check_choice

Transfer = Literal["none", "maps", "all", "after"]
Transferred = Literal["none", "maps", "all"]

ATTENTION_FORM = "MAP[:features][@window]"
"""How attention is named in one word: ``hedgehog``, ``favor:128``, ``hedgehog@64``."""

STUDENT_FORM = f"{ATTENTION_FORM}[+TRANSFER]"
"""A student's name, its own attention transfer included: ``hedgehog+none``."""

_ATTENTION = re.compile(r"(?P<map>[a-z]\w*)(?::(?P<features>\d+))?(?:@(?P<window>\d+))?")

_POSITIVE_SETTINGS = (
    "epochs",
    "batch_size",
    "learning_rate",
    "transfer_epochs",
    "transfer_steps",
    "maps_learning_rate",
    "transfer_learning_rate",
    "evaluations",
    "max_seq_length",
)

_TRANSFER_SETTINGS = {
    "maps": ("transfer_steps", "maps_learning_rate"),
    "all": ("transfer_epochs", "transfer_learning_rate", "transfer_pooled"),
}
"""What has a say in a transfer, by what it trains."""


def read_attention_name(name: str) -> tuple[str, int | None, int] | None:
    """Map, number of features and window of a name in :data:`ATTENTION_FORM`; None if it has another form."""
    match = _ATTENTION.fullmatch(name)
    if match is None:
        return None
    features = None if match["features"] is None else int(match["features"])
    return match["map"], features, int(match["window"] or 0)


@dataclass(frozen=True)
class Student:
    """How a student attends, and the attention transfer beside its distillation.

    Attributes:
        feature_map: Name of a feature map; ``softmax`` is the control.
        window: Near window in tokens; 0 = purely linear.
        transfer: Attention transfer before distillation: ``"none"``, to the ``"maps"`` alone, or to ``"all"`` of the
            student. ``"after"``: the encoder is distilled with its softmax attention, and transfer follows, to the
            maps with a window, to all without.
        feature_map_kwargs: Options of the map.
        exact_layers: Layers that keep softmax.
    """

    feature_map: str = "hedgehog"
    window: int = 64
    transfer: Transfer = "maps"
    feature_map_kwargs: dict[str, Any] | None = None
    exact_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_choice("transfer", self.transfer, Transfer)
        check_settings(
            feature_map=self.feature_map,
            window=self.window,
            exact_layers=self.exact_layers,
            feature_map_kwargs=self.feature_map_kwargs,
        )
        if self.feature_map == "softmax" and self.transfer != "none":
            raise ValueError(f"feature_map='softmax' is what transfer={self.transfer!r} aims at: pass transfer='none'")

    @property
    def transferred_to(self) -> Transferred:
        """What transfer trains."""
        if self.transfer == "after":
            return "maps" if self.window else "all"
        return self.transfer

    @classmethod
    def named(cls, name: str, transfer: Transfer | None = None) -> Student:
        """The student that attends as its name says.

        Args:
            name: In :data:`STUDENT_FORM`; ``softmax`` is the control.
            transfer: Its transfer, where its name doesn't say; None = first to its ``"maps"`` with a window, to
                ``"all"`` of it without one. The control has none, whatever this says.

        Raises:
            ValueError: If the name has another form, or there is no such map, transfer or option.
        """
        attention, plus, own = name.partition("+")
        form = read_attention_name(attention)
        if form is None or form[0] not in feature_map_names():
            raise ValueError(
                f"unknown student {name!r}; write {STUDENT_FORM}, MAP being one of {', '.join(feature_map_names())}"
            )
        if transfer is not None:
            check_choice("transfer", transfer, Transfer)
        feature_map, features, window = form
        default = "none" if feature_map == "softmax" else transfer or ("maps" if window else "all")
        chosen: Any = own if plus else default
        return cls(feature_map, window, chosen, None if features is None else {"num_features": features})


CONTROL = Student("softmax", window=0, transfer="none")
"""What the others are set against, and what those that are transferred to after distillation are made of."""

STUDENTS = {
    "softmax student": CONTROL,
    "near/far student": Student("hedgehog", window=64, transfer="maps"),
    "linear student": Student("hedgehog", window=0, transfer="all"),
}
"""The students of ``quickstart``: the control, the one that keeps short texts' vectors, and the purely linear one."""


@dataclass(frozen=True)
class Settings:
    """What a distillation costs and how it is judged; the same for every student of a comparison.

    Attributes:
        epochs: Passes over the training pairs, and over the groups.
        batch_size: Pairs per step; groups per step are fewer, with as many sentences.
        learning_rate: Peak of a schedule with 10 % warm-up and linear decay.
        alpha: Weight of the teacher against the gold scores.
        head: The student's score: ``"cosine"`` or ``"dse"``.
        objective: ``"mse"`` or ``"cosent"``.
        teacher_activation: Applied to the teacher's logits: ``"sigmoid"`` or ``"identity"``.
        transfer_epochs: Passes of whole-student transfer over the training sentences.
        transfer_steps: Steps of maps-only transfer, each on four texts of 256–1,024 tokens, or of 4–16 windows.
        maps_learning_rate: Of feature maps and gains, in maps-only transfer.
        transfer_learning_rate: Of the encoder, in whole-student transfer; its feature maps have fifteen times as much.
        transfer_pooled: Weight of the embeddings in whole-student transfer.
        mined: Pairs without a gold score that the teacher labels besides, at most.
        groups: Groups of sentences, all pairs of which the teacher has scored, to train on besides, at most.
        half: Train under bfloat16 autocast: faster where the device has instructions for it.
        evaluations: Points of the learning curve.
        lengths: Lengths in tokens at which the test pairs are read again; none for the DSE head.
        pairs_at_length: How many test pairs, evenly spaced, are read at each length; natural length reads all.
        max_seq_length: Of the students.
        seed: Of everything random.
    """

    epochs: float = 2
    batch_size: int = 32
    learning_rate: float = 3e-5
    alpha: float = 0.5
    head: Head = "cosine"
    objective: Objective = "mse"
    teacher_activation: TeacherActivation = "sigmoid"
    transfer_epochs: float = 2
    transfer_steps: int = 120
    maps_learning_rate: float = 1e-2
    transfer_learning_rate: float = 2e-4
    transfer_pooled: float = 10
    mined: int = 0
    groups: int = 0
    half: bool = False
    evaluations: int = 8
    lengths: tuple[int, ...] = (512, 1024, 2048)
    pairs_at_length: int = 200
    max_seq_length: int = 8192
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("head", self.head, Head)
        check_choice("objective", self.objective, Objective)
        check_choice("teacher_activation", self.teacher_activation, TeacherActivation)
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must lie in 0..1, got {self.alpha!r}")
        if self.head == "dse" and self.lengths:
            raise ValueError(f"head='dse' is measured at natural length alone, got lengths={self.lengths}")
        if self.pairs_at_length < 4:
            raise ValueError(f"pairs_at_length must be at least 4, got {self.pairs_at_length!r}")
        if not self.transfer_pooled >= 0:
            raise ValueError(f"transfer_pooled must be 0 or more, got {self.transfer_pooled!r}")
        if self.mined < 0:
            raise ValueError(f"mined must be a number of pairs, 0 or more, got {self.mined!r}")
        if self.groups < 0:
            raise ValueError(f"groups must be a number of groups, 0 or more, got {self.groups!r}")
        if self.groups and (self.head == "dse" or self.teacher_activation == "identity"):
            raise ValueError(
                "groups have scores in 0..1, for the cosine: pass head='cosine' and teacher_activation='sigmoid'"
            )
        if self.groups and not self.alpha:
            raise ValueError("groups have no scores but the teacher's, which alpha=0 leaves out")
        if self.mined and not self.alpha:
            raise ValueError("mined pairs have no scores but the teacher's, which alpha=0 leaves out")
        for name in _POSITIVE_SETTINGS:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")

    def for_transfer(self, trains: Transferred) -> Settings:
        """A copy in which what has no say in a transfer that trains these is the default."""
        idle = {name for other, names in _TRANSFER_SETTINGS.items() if other != trains for name in names}
        defaults = {field.name: field.default for field in fields(self) if field.name in idle}
        return replace(self, **defaults)  # type: ignore[arg-type]
