"""Common base of weighters that compare samples with the target rows: a mean embedding.

Letters: b samples of a rank's micro-batch, m target rows, d hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from dataflex.data.rows import Rows
from dataflex.run.context import RunContext
from dataflex.run.log import progress
from dataflex.run.strategy import FSDP
from dataflex.weighters.base import FloatArray, MeasuredBatch, Weighter
from gradstore.errors import BadInput
from gradstore.export.pooling import HiddenStates, Pooling, pool

if TYPE_CHECKING:
    from dataflex.run.forecast import Forecast

#: Rows of one data set that are embedded together.
Piece = tuple[Rows, npt.NDArray[np.int64]]


class TargetWeighter(Weighter):
    """Weighter with the mean embedding of the target rows, recomputed every so many steps.

    Samples are embedded from the hidden states of the forward pass that trains on them.

    Args:
        layer: index into the model's hidden states.
        pooling: how a row's tokens become one vector.
        shortest: vectors are divided by their length, or by this if they are shorter; None leaves
            them as they are.
        every: steps from one look at the target rows to the next.
        batch_rows: target rows of a forward pass.
        batches: forward passes of a look, over all ranks; 0 or less for all target rows.
    """

    needs_single_rows = True
    needs_targets = True
    measures = True
    whole_model = frozenset({FSDP})

    def __init__(
        self,
        *,
        layer: int,
        pooling: Pooling,
        shortest: float | None,
        every: int,
        batch_rows: int,
        batches: int,
    ) -> None:
        self.hidden_layer = layer
        self._pooling: Pooling = pooling
        self._shortest = shortest
        self._every = every
        self._batch_rows = batch_rows
        self._batches = batches
        self._mean = np.empty(0)
        self._looked = -1

    @property
    def mean(self) -> FloatArray:
        """(d,) mean of the target rows' embeddings at the last look."""
        return self._mean

    def forecasts(self, run: RunContext, steps: Sequence[int]) -> Sequence[Forecast]:
        """Forecast the looks at the target rows; name a scoring pass, which is not measured."""
        from dataflex.run.forecast import batches_forecast

        self._check(run)
        looked = [steps[0]]
        for step in steps:
            if step - looked[-1] >= self._every:
                looked.append(step)
        pieces, embed = self._pieces(run, steps[0]), self._embedder(run)
        lengths = [rows.lengths[where] for rows, where in pieces]

        def look(chosen: Sequence[int]) -> None:
            self._summed(run, embed, [pieces[i] for i in chosen])

        looks = batches_forecast("target embeddings", len(looked), lengths, look)
        return [looks, *(super().forecasts(run, steps) if self.scope == "window" else ())]

    def start(self, run: RunContext) -> None:
        """Refuse a layer that the model does not have."""
        self._check(run)

    def _check(self, run: RunContext) -> None:
        """Refuse a layer that the model does not have."""
        config: Any = run.model.config
        last = int(config.get_text_config().num_hidden_layers)
        if not -last - 1 <= (self.hidden_layer or 0) <= last:
            raise BadInput(
                f"embed_layer is {self.hidden_layer}; the model has hidden states {-last - 1} to "
                f"{last} (0 is the embedding of the tokens, -1 the last layer). "
                "Choose one of them."
            )

    def refresh(self, run: RunContext, step: int) -> None:
        """Embed the target rows, or a draw of them, if the last look is old enough."""
        if self._looked >= 0 and step - self._looked < self._every:
            return
        pieces = self._pieces(run, step)
        embed = self._embedder(run)
        total = sum(run.ranks.gather(lambda: self._summed(run, embed, pieces)))
        self._mean = np.asarray(total / sum(len(where) for _, where in pieces))
        self._looked = step

    def measure(self, batch: MeasuredBatch) -> FloatArray:
        """Compute (b, d) embeddings of this rank's samples."""
        if batch.hidden is None:
            raise RuntimeError("no hidden states were kept")
        mask = batch.inputs["attention_mask"]
        return self._scaled(pool(batch.hidden, mask, self._pooling, unit=False))

    def state(self) -> dict[str, Any]:
        """Return the mean and the step it was taken at: a resume continues with the same."""
        return {"mean": self._mean, "looked": self._looked}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""
        self._mean, self._looked = np.asarray(state["mean"]), int(state["looked"])

    def _embedder(self, run: RunContext) -> HiddenStates:
        """Return what embeds target rows, from the layer that samples are embedded from."""
        return HiddenStates(
            run.model, layer=self.hidden_layer or 0, pooling=self._pooling, unit=False
        )

    def _pieces(self, run: RunContext, step: int) -> list[Piece]:
        """Split the target rows used for the mean into batches; the same on every rank."""
        sets = run.data.targets
        which = np.repeat(np.arange(len(sets)), [len(rows) for rows in sets])
        where = np.concatenate([np.arange(len(rows)) for rows in sets])
        chosen = np.arange(len(which))
        if self._batches > 0:
            order = np.random.default_rng([run.seed, step]).permutation(len(which))
            chosen = np.sort(order[: self._batches * self._batch_rows])
        pieces: list[Piece] = []
        for index, rows in enumerate(sets):
            mine = where[chosen[which[chosen] == index]]
            mine = mine[np.argsort(-rows.lengths[mine], kind="stable")]
            starts = range(0, len(mine), self._batch_rows)
            pieces += [(rows, mine[start : start + self._batch_rows]) for start in starts]
        return pieces

    def _summed(self, run: RunContext, embed: HiddenStates, pieces: list[Piece]) -> FloatArray:
        """Sum the (d,) embeddings of this rank's share of the rows.

        Every rank makes as many passes: where the model's parameters are spread over the ranks
        (ZeRO-3), one that stops early would leave the others waiting. The last may count nothing.
        """
        ranks = run.ranks
        total: FloatArray = np.zeros(0)
        with progress(
            "target embeddings", len(pieces), shown=run.shows_progress, told=run.ranks.leads
        ) as advance:
            for first in range(0, len(pieces), ranks.world):
                counts = first + ranks.rank < len(pieces)
                rows, where = pieces[first + ranks.rank if counts else first]
                batch = run.collate([rows.dataset[int(i)] for i in where])
                vectors = self._scaled(embed(batch)) * float(counts)
                total = vectors.sum(axis=0) + (total if len(total) else 0.0)
                advance(min(ranks.world, len(pieces) - first))
        return total

    def _scaled(self, vectors: torch.Tensor) -> FloatArray:
        """Convert to (b, d) float64 rows, of length 1 where lengths are not to count."""
        found: FloatArray = vectors.double().cpu().numpy()
        return found if self._shortest is None else unit(found, self._shortest)


def unit(vectors: FloatArray, shortest: float) -> FloatArray:
    """Divide vectors (..., d) by their length, or by `shortest` where they are shorter."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, shortest))
