"""The model card of a converted model: Sentence Transformers' own, with the loading line that works."""

from __future__ import annotations

from sentence_transformers.sentence_transformer.model_card import SentenceTransformerModelCardData


class LinearModelCardData(SentenceTransformerModelCardData):
    """Card data whose usage snippet passes ``trust_remote_code=True`` and shows ``st_linear.load``."""

    @classmethod
    def from_card_data(cls, card_data: SentenceTransformerModelCardData) -> LinearModelCardData:
        """The same card data, of this class."""
        card = cls.__new__(cls)
        card.__dict__.update(card_data.__dict__)
        card.add_tags(["st_linear", "linear-attention", "custom_code"])
        return card

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
