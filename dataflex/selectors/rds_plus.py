"""RDS+: rows nearest to the target's in the model's own states, target rows choosing in turn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dataflex.config.parameters import Count
from dataflex.config.registry import register
from dataflex.run.context import UpdateContext
from dataflex.selectors.base import Selection
from dataflex.selectors.by_embedding import EmbeddingSelector, scored
from dataflex.selectors.subset_rule import rule_of
from dataflex.selectors.turns import Turns
from gradstore.scoring.rules import OfSimilarity
from gradstore.similarity.neighbours import Neighbours


@register("selector", "rds_plus")
class RdsPlusSelector(EmbeddingSelector):
    """Selector of rows by the model's own states, weighted by position; target rows take turns.

    A row's vector is the mean of its tokens' last hidden states, prompt and response, where token i
    of m weighs i / (1 + 2 + ... + m): a causal model's later states have seen more of the row. Each
    target row in turn takes the row of highest cosine that none has taken in this update; turns go
    on from one update to the next.

    Args:
        subset: null lets target rows take turns; top (mean cosine), round_robin, knn_uniform,
            transport or facility_location choose the rows of each update alone: docs/subset.md.
        neighbours: rows that a target row names, of knn_uniform; null finds them.
        subset_params: constants of the rule by name, in the place of its own: docs/subset.md.
        quotas: the most rows an update takes of a data set, by name, or a share between 0 and 1;
            with a subset.
        embedding_layer: index into the hidden states; -1 is the last layer's output.
        embedding_batch_size: rows of an embedding batch, at most; tokens bound it as well.
        keep_generations: newest steps kept of the embeddings; null keeps all.
        unique: of rows that are copies of one another, choose none but the first.
    """

    paper = (
        "Ivison et al. 2025, Large-Scale Data Selection for Instruction Tuning, arXiv:2503.01807"
    )

    def __init__(
        self,
        subset: OfSimilarity | None = None,
        neighbours: Count | None = None,
        subset_params: Mapping[str, float] | None = None,
        quotas: Mapping[str, int | float] | None = None,
        embedding_layer: int = -1,
        embedding_batch_size: Count = 32,
        keep_generations: Count | None = None,
        unique: bool = False,
    ) -> None:
        super().__init__(
            embedding_layer=embedding_layer,
            embedding_batch_size=embedding_batch_size,
            keep_generations=keep_generations,
            unique=unique,
        )
        self.embeddings = replace(self.embeddings, pooling="position")
        self.rule = rule_of(subset, neighbours, quotas, subset_params, own="target rows take turns")
        #: Of the usable rows of all target sets.
        self._turns = Turns()

    def state(self) -> dict[str, Any]:
        """Return whose turn is next."""
        return {"next": self._turns.next}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with the same target row."""
        self._turns.next = int(state["next"])

    def choose(
        self, count: int, context: UpdateContext, neighbours: Neighbours | None
    ) -> Selection:
        """Let the target rows choose in turn, or choose by the rule."""
        if neighbours is None:
            raise RuntimeError("rds_plus reads no file made offline")
        if self.rule is not None:
            return self.by_rule(count, context, neighbours, self.rule)
        allowed = context.among_candidates(neighbours.usable)
        ranked, cosines = neighbours.ranked(count, allowed)
        return scored(self._turns.take(ranked, count), cosines, allowed, {})
