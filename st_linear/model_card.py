"""The model card of a converted model: Sentence Transformers' own, with how it attends and how it is loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from jinja2 import Template
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.model_card import SentenceTransformerModelCardData

from st_linear import markdown

logger = logging.getLogger(__name__)

_HEADER = "{{ card_data }}\n---\n"
_NEXT_SECTION = "### Model Sources"
"""Of Sentence Transformers' template: ours goes before it."""

_FIDELITY = {
    "cosine": "cosine",
    "cosine_p5": "5th percentile",
    "token_cosine": "cosine of tokens",
    "neighbours": "nearest neighbours shared",
}


@dataclass(frozen=True)
class Distilled:
    """What a card says of a distillation.

    Attributes:
        data: The sentence pairs.
        teacher: Whose scores were distilled; None = gold scores alone.
        figures: On test, by what the texts are: ``n`` pairs, ``pearson`` and ``spearman``, None where undefined.
    """

    data: str
    teacher: str | None
    figures: Mapping[str, Mapping[str, Any]]


class LinearModelCardData(SentenceTransformerModelCardData):
    """Card data with a section on attention, and with the two ways of loading the model.

    Attributes:
        distilled: What the section says of a distillation, if there was one.
    """

    distilled: Distilled | None = None

    @classmethod
    def from_card_data(cls, card_data: SentenceTransformerModelCardData) -> LinearModelCardData:
        """The same card data, of this class."""
        card = cls.__new__(cls)
        card.__dict__.update(card_data.__dict__)
        card.template_path = Path(__file__).with_name("model_card_template.md")
        card.add_tags(["st_linear", "linear-attention", "custom_code"])
        return card

    def inherit(self, base: SentenceTransformer) -> None:
        """Take over the name of the model that was converted, and the licence and language that its card states."""
        self.base_model = base.model_card_data.base_model
        self.license, self.language = base.model_card_data.license, base.model_card_data.language
        stated = _stated(getattr(base, "_model_card_text", None))
        self.license = self.license or stated.get("license")
        self.language = self.language or stated.get("language", [])

    def generate_usage_snippet(self) -> str:
        model_id = self.model_id or "sentence_transformers_model_id"
        loading = f'SentenceTransformer("{model_id}")'
        trusted = (
            "# This model has linear attention: pip install st-linear\n"
            f'model = SentenceTransformer("{model_id}", trust_remote_code=True)\n'
            "# The same, without running any code that lies in the folder:\n"
            f'# import st_linear; model = st_linear.load("{model_id}")'
        )
        return super().generate_usage_snippet().replace(f"model = {loading}", trusted)

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        values["body"] = _body().render(**values, attention="\n".join(self._attention()), hf_emoji="🤗")
        return values

    def _attention(self) -> Iterator[str]:
        """The section's lines."""
        encoder: Any = self.model[0]  # type: ignore[index]
        settings = encoder.get_config_dict()
        options = ", ".join(f"{key}={value}" for key, value in (settings["feature_map_kwargs"] or {}).items())
        yield "### Attention\n"
        if settings["feature_map"] == "softmax":
            yield "- **Form:** exact softmax attention, as in the base model"
        else:
            yield f"- **Feature map:** `{settings['feature_map']}`" + (f" ({options})" if options else "")
            window = settings["window"]
            near = f"{window} tokens: exact within blocks of so many and their neighbours, linear beyond them"
            yield f"- **Window:** {near if window else 'none: linear throughout'}"
            if window:
                yield f"- **Exact:** texts of up to {encoder.exact_up_to:,} tokens"
        if settings["exact_layers"]:
            yield f"- **Layers with exact attention:** {', '.join(map(str, settings['exact_layers']))}"
        yield f"- **Positions:** `{settings['position_extension']}`, up to {settings['max_seq_length']:,} tokens"
        if encoder.base_encoder.get("name"):
            revision = encoder.base_encoder.get("revision")
            yield f"- **Encoder:** {_public(encoder.base_encoder['name'])}" + (
                f", revision {revision}" if revision else ""
            )
        yield from _trained(encoder.training_record)
        if self.distilled is not None:
            yield from _distilled(self.distilled)


@cache
def _body() -> Template:
    """Sentence Transformers' template with a place for our section. To compile it takes longer than a small model."""
    template = SentenceTransformerModelCardData.template_path.read_text(encoding="utf-8").partition(_HEADER)[2]
    before, heading, after = template.partition(_NEXT_SECTION)
    return Template(f"{before}{{{{ attention }}}}\n\n{heading}{after}")


def _stated(text: str | None) -> dict[str, Any]:
    """Licence and language in a card's header; a card that can't be read states none."""
    if not text:
        return {}
    try:
        header: Any = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    # Cards are written by hand: whatever is wrong with one, the model is not.
    except Exception as error:
        logger.warning("The base model's card can't be read, its licence is not taken over: %s", error)
        return {}
    words = {key: header.get(key) for key in ("license", "language")}
    return {key: value for key, value in words.items() if isinstance(value, (str, list)) and value}


def _public(name: str) -> str:
    """A model's name; of a folder on somebody's disk the last part alone."""
    return Path(name).name if Path(name).is_absolute() else name


def _trained(record: Mapping[str, Any]) -> Iterator[str]:
    """Of the adapter that the attention began as: its texts and its fidelity."""
    if record.get("texts"):
        yield f"- **Attention trained on:** {', '.join(record['texts'])}, the encoder frozen"
    fidelity = (record.get("held_out") or {}).get("after")
    if fidelity:
        keys = [key for key in _FIDELITY if any(key in figures for figures in fidelity.values())]
        yield "\nHow close its vectors then came to those of the encoder with exact attention, on held-out texts:\n"
        rows = [
            [f"{int(length):,}", f"{figures['n']:.0f}", *(f"{figures[k]:.4f}" if k in figures else "–" for k in keys)]
            for length, figures in fidelity.items()
        ]
        yield markdown.table(["tokens", "texts", *(_FIDELITY[key] for key in keys)], rows).rstrip()


def _distilled(distilled: Distilled) -> Iterator[str]:
    yield f"\nDistilled on {distilled.data}, " + (
        "from gold scores alone." if distilled.teacher is None else f"from the scores of {distilled.teacher}."
    )
    yield "Correlation × 100 of cosine similarities with human scores on its test pairs:\n"
    rows = [
        [
            texts,
            str(figures["n"]),
            *("undefined" if figures[key] is None else f"{100 * figures[key]:.2f}" for key in ("pearson", "spearman")),
        ]
        for texts, figures in distilled.figures.items()
    ]
    yield markdown.table(["texts", "pairs", "Pearson", "Spearman"], rows).rstrip()
