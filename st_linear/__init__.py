"""Linear-time attention and long context for sentence encoders, with the vectors they had.

See :class:`LinearTransformer` and :func:`convert`; distillation is in :class:`DistillationLoss`.
"""

from __future__ import annotations

from st_linear.attention import linear_attention, near_far_attention
from st_linear.feature_maps import FeatureMap, feature_map_names, make_feature_map, register_feature_map
from st_linear.losses import AttentionTransferLoss, DistillationLoss
from st_linear.mining import mine_groups, mine_pairs
from st_linear.models import convert, load
from st_linear.pair_head import PairScoreEvaluator, PairScorer
from st_linear.teachers import add_teacher_scores
from st_linear.transformer import LinearTransformer

__version__ = "0.1.0"

__all__ = [
    "AttentionTransferLoss",
    "DistillationLoss",
    "FeatureMap",
    "LinearTransformer",
    "PairScoreEvaluator",
    "PairScorer",
    "add_teacher_scores",
    "convert",
    "feature_map_names",
    "linear_attention",
    "load",
    "make_feature_map",
    "mine_groups",
    "mine_pairs",
    "near_far_attention",
    "register_feature_map",
]
