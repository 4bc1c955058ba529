"""Budget and rule of `gradstore select`: the number of rows taken, and whose turn it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

import typer

from gradstore.errors import BadInput, expect_whole

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from gradstore.scoring.comparable import CheckpointFeatures
    from gradstore.scoring.influence import Scores
    from gradstore.store.generation import Generation

SUBSETS = ("top", "round_robin", "drop_harmful")


@dataclass(frozen=True)
class Choice:
    """A subset rule and one of the three budgets, as asked; `drop_harmful` may do without.

    Raises:
        BadInput: an unknown rule, no budget or several, or one that no store could keep.
    """

    subset: str
    count: int | None
    fraction: float | None
    token_budget: int | None
    quotas: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check everything that can be checked before rows are scored."""
        from gradstore.scoring.selection import rows_for_fraction

        if self.subset not in SUBSETS:
            near = get_close_matches(self.subset, SUBSETS, 1)
            meant = f"did you mean {near[0]!r}? " if near else ""
            raise BadInput(f"subset is {self.subset!r}; {meant}Choose {' or '.join(SUBSETS)}.")
        budgets = 3 - [self.count, self.fraction, self.token_budget].count(None)
        if budgets > 1 or (budgets == 0 and self.subset != "drop_harmful"):
            raise BadInput("give either -k N or --fraction F or --token-budget T.")
        if self.fraction is not None:
            rows_for_fraction(self.fraction, 1)
        if self.token_budget is not None:
            expect_whole(self.token_budget, "--token-budget")
        if self.quotas and self.subset != "top":
            raise BadInput(f"--quota goes with the subset 'top', not with {self.subset!r}.")
        self._limits(1 if self.token_budget is None else None)

    def rows(
        self, checkpoints: Sequence[CheckpointFeatures], scores: Scores
    ) -> npt.NDArray[np.int64]:
        """Choose rows, first the first choice; round robin reads the store once more."""
        from gradstore.scoring.selection import check_k, select_top
        from gradstore.scoring.subset import (
            check_serves_all,
            round_robin_rows,
            usable_targets,
            within_tokens,
        )

        train: Generation = checkpoints[-1].train  # type: ignore[assignment]
        if self.subset == "drop_harmful":
            rows = self._helpful(scores, train)
        else:
            k = check_k(self._most(scores, train), int(scores.usable.sum()), train.rows)
            if self.subset == "top":
                usable = self._allowed(scores, train, k)
                rows = select_top(scores.values, min(k, int(usable.sum())), usable=usable)
            else:
                rows = round_robin_rows(checkpoints, k, on_rows=_told(train.rows))
        if self.token_budget is None:
            return rows
        rows = within_tokens(rows, train.tokens, self.token_budget)
        if self.subset == "round_robin":
            check_serves_all(len(rows), len(usable_targets(checkpoints)))
        return rows

    def _limits(self, k: int | None) -> dict[str, int]:
        """Read the quotas; a share is of k rows, None where their number is not known."""
        from gradstore.scoring.selection import rows_for_fraction

        limits: dict[str, int] = {}
        for quota in self.quotas:
            name, _, most = quota.rpartition("=")
            if not name or name in limits:
                raise BadInput(f"--quota {quota!r}: give SET=ROWS or SET=SHARE, once for a set.")
            try:
                limits[name] = int(most) if most.isdecimal() else -1
                share = float(most)
                if limits[name] < 0 and not 0 < share < 1:
                    raise ValueError
            except ValueError:
                raise BadInput(
                    f"--quota {quota!r}: {most!r} is no number of rows and no share such as 0.2."
                ) from None
            if limits[name] < 0:
                if k is None:
                    raise BadInput(
                        f"--quota {quota!r} is a share of a number of rows; beside --token-budget "
                        "give a number of rows."
                    )
                limits[name] = rows_for_fraction(share, k)
            expect_whole(limits[name], f"--quota {quota!r}")
        return limits

    def _allowed(self, scores: Scores, train: Generation, k: int) -> npt.NDArray[np.bool_]:
        """Mark the rows that the quotas leave to choose from."""
        from gradstore.scoring.subset import within_quotas

        if not self.quotas:
            return scores.usable
        if train.sources is None:
            raise BadInput("--quota needs the data set of each row, and this store has none.")
        names = [name for name, _ in train.sources]
        limits = self._limits(k if self.token_budget is None else None)
        left = within_quotas(scores.values, names, limits, usable=scores.usable)
        if self.token_budget is None and k > (most := int(left.sum())):
            raise BadInput(
                f"asked {k} rows, but the quotas leave {most}; ask for at most {most}, or raise a "
                "quota."
            )
        return left

    def _helpful(self, scores: Scores, train: Generation) -> npt.NDArray[np.int64]:
        """Choose among the rows that help, and say how many do not."""
        from gradstore.scoring.selection import check_k
        from gradstore.scoring.subset import drop_harmful

        among = int(scores.usable.sum())
        k = None
        if self.count is not None or self.fraction is not None:
            k = check_k(self._most(scores, train), among, train.rows)
        rows = drop_harmful(scores.values, usable=scores.usable)
        dropped = among - len(rows)
        if k is not None:
            rows = drop_harmful(scores.values, k, usable=scores.usable)
        typer.echo(f"{dropped} of {among} usable rows dropped: their score is 0 or below")
        return rows

    def _most(self, scores: Scores, train: Generation) -> int:
        """Count the rows that the budget may hold."""
        from gradstore.scoring.selection import rows_for_fraction
        from gradstore.scoring.subset import most_rows_within

        if self.count is not None:
            return self.count
        if self.fraction is not None:
            return rows_for_fraction(self.fraction, int(scores.usable.sum()))
        return max(1, most_rows_within(train.tokens[scores.usable], self.token_budget or 0))


def _told(rows: int) -> Callable[[int], None]:
    from gradstore.pace import Pace, long_pass

    pace = Pace(
        rows,
        lambda seconds: typer.echo(
            long_pass("comparison with each target row", rows, seconds), err=True
        ),
    )
    return pace.advance
