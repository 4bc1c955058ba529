"""The second store of `gradstore select`: it ranks the first one's best rows again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from gradstore.cli.options import Question, StoreValue
from gradstore.errors import BadInput
from gradstore.storage.location import at_user_home

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from gradstore.scoring.choose import Choice
    from gradstore.scoring.comparable import CheckpointFeatures
    from gradstore.scoring.influence import Scores
    from gradstore.store.generation import Generation


@dataclass(frozen=True, kw_only=True)
class Again:
    """The options of `select` that name the second store.

    Raises:
        BadInput: a factor without a store, or one below 1.
    """

    rerank_store: Annotated[
        StoreValue | None,
        typer.Option(
            help="Another store of the same rows, of a more exact dtype: the best rows are ranked "
            "again by its features.",
            metavar="STORE",
            parser=at_user_home,
        ),
    ] = None
    rerank_factor: Annotated[
        float | None, typer.Option(help="Rows ranked again for each row taken. Default: 1.5.")
    ] = None

    def __post_init__(self) -> None:
        """Check what needs no store."""
        from gradstore.scoring.rescored import check_factor

        if self.rerank_factor is None:
            return
        if self.rerank_store is None:
            raise BadInput(
                f"--rerank-factor {self.rerank_factor} needs --rerank-store; name the second store."
            )
        check_factor(self.rerank_factor)

    def opened(
        self, question: Question, first: Sequence[CheckpointFeatures], choice: Choice
    ) -> list[CheckpointFeatures] | None:
        """Pair the second store's generations; None where no store is named.

        Raises:
            BadInput: a choice that needs more than candidates, or a set that the store lacks.
            ProvenanceMismatch: it holds other rows, or rows of another run or projection.
        """
        from gradstore.scoring.pairing import checkpoint_features, parse_which
        from gradstore.scoring.rescored import check_rerank, check_same_rows
        from gradstore.store.reader import open_store

        if self.rerank_store is None:
            return None
        check_rerank(choice, question.product())
        newest: Generation = first[-1].train  # type: ignore[assignment]
        second = checkpoint_features(
            open_store(self.rerank_store),
            parse_which(question.checkpoints),
            run=question.run,
            targets=[target.set for target in first[-1].targets],  # type: ignore[attr-defined]
            until=newest.step,
        )
        check_same_rows(first, second)
        return second

    def rows(
        self,
        question: Question,
        second: Sequence[CheckpointFeatures],
        choice: Choice,
        scores: Scores,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Choose rows among the candidates, and say how many came in by it.

        Returns:
            (k,) rows, best first; (n,) scores by the second store, nan for all but candidates.
        """
        from gradstore.scoring.rescored import FACTOR, rerank

        found = rerank(
            choice, scores, second,
            factor=FACTOR if self.rerank_factor is None else self.rerank_factor,
            subtask_sizes=question.subtask_sizes(),
            aggregation=question.aggregation,  # type: ignore[arg-type]
            product=question.product(),
        )  # fmt: skip
        train: Generation = second[-1].train  # type: ignore[assignment]
        typer.echo(
            f"{len(found.candidates)} rows ranked again by {self.rerank_store} ({train.dtype}): "
            f"{found.moved} of {len(found.rows)} rows taken are others than without it"
        )
        return found.rows, found.values
