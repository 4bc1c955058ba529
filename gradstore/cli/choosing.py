"""Budget and rule of `gradstore select`: the number of rows taken, and whose turn it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from gradstore.errors import BadInput, expect_whole

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from gradstore.scoring.choose import Choice
    from gradstore.scoring.comparable import CheckpointFeatures
    from gradstore.scoring.influence import Scores
    from gradstore.scoring.products import InnerProduct
    from gradstore.store.generation import Generation


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The options of `select` that say which rows are taken.

    Raises:
        BadInput: an unknown rule, no budget or several, or one that no store could keep.
    """

    count: Annotated[int | None, typer.Option("-k", help="Rows to take.")] = None
    fraction: Annotated[float | None, typer.Option(help="Share of the usable rows.")] = None
    token_budget: Annotated[
        int | None, typer.Option(help="Target tokens to take, in place of a number of rows.")
    ] = None
    subset: Annotated[
        str,
        typer.Option(
            help="top: best scores; drop_harmful: scores above 0; of each target row alone: "
            "round_robin, knn_uniform, transport, facility_location."
        ),
    ] = "top"
    quota: Annotated[
        list[str] | None,
        typer.Option(
            help="At most so many rows of a data set, or such a share of the rows taken; repeat.",
            metavar="SET=ROWS|SHARE",
        ),
    ] = None
    neighbours: Annotated[
        int | None,
        typer.Option(help="Rows that a target row names, of knn_uniform. Default: found."),
    ] = None
    subset_param: Annotated[
        list[str] | None,
        typer.Option(
            help="A constant of the rule: alpha or scale of knn_uniform, blur or train of "
            "transport, discount of facility_location; repeat.",
            metavar="NAME=NUMBER",
        ),
    ] = None
    length_correction: Annotated[
        str,
        typer.Option(help="Take the rows' length out of the scores of top: regression or bins."),
    ] = "none"

    def __post_init__(self) -> None:
        """Check everything that can be checked before rows are scored."""
        self.choice()

    def choice(self) -> Choice:
        """Return the choice that the options ask for."""
        from gradstore.scoring.choose import Choice
        from gradstore.scoring.rules import Rule

        rule = Rule(self.subset, self.neighbours, params_of(self.subset_param or ()))
        budgets = {"-k": self.count, "--fraction": self.fraction,
                   "--token-budget": self.token_budget}  # fmt: skip
        given = [f"{option} {value}" for option, value in budgets.items() if value is not None]
        if len(given) > 1 or (not given and self.subset != "drop_harmful"):
            found = f"{' and '.join(given)} are" if given else f"no budget of {self.subset} is"
            raise BadInput(f"{found} given; give one: -k N, --fraction F or --token-budget T.")
        quotas = quotas_of(self.quota or ())
        if self.token_budget is not None:
            expect_whole(self.token_budget, "--token-budget")
            for name, most in quotas.items():
                if isinstance(most, float):
                    raise BadInput(
                        f"--quota '{name}={most}' is a share of a number of rows; beside "
                        "--token-budget give a number of rows."
                    )
        return Choice(
            rule, self.count, self.fraction, self.token_budget, quotas, self.length_correction
        )

    def check(self, checkpoints: Sequence[CheckpointFeatures]) -> None:
        """Refuse what the store's rows cannot give, before they are scored (BadInput)."""
        from gradstore.scoring.best_rows import usable_targets

        train: Generation = checkpoints[-1].train  # type: ignore[assignment]
        self.choice().check(train, len(usable_targets(checkpoints)))

    def rows(
        self, checkpoints: Sequence[CheckpointFeatures], scores: Scores, product: InnerProduct
    ) -> npt.NDArray[np.int64]:
        """Choose rows, first the first choice; a rule by target rows reads the store once more."""
        from gradstore.scoring.best_rows import StoredTable

        choice = self.choice()
        train: Generation = checkpoints[-1].train  # type: ignore[assignment]
        table = None
        if choice.rule.per_target:
            table = StoredTable(checkpoints, on_rows=_told(train.rows), product=product)
        rows = choice.rows(scores.values, table, train, usable=scores.usable)
        if choice.length != "none":
            typer.echo(_of_length(scores, train, choice.length))
        if self.subset == "drop_harmful":
            among = int(scores.usable.sum())
            dropped = among - int((scores.usable & (scores.values > 0)).sum())
            typer.echo(f"{dropped} of {among} usable rows dropped: their score is 0 or below")
        return rows


def quotas_of(given: Sequence[str]) -> dict[str, int | float]:
    """Read `SET=ROWS` and `SET=SHARE`.

    Raises:
        BadInput: written otherwise, a data set twice, or a number that is neither.
    """
    quotas: dict[str, int | float] = {}
    for quota in given:
        name, _, most = quota.rpartition("=")
        if not name or name in quotas:
            raise BadInput(f"--quota {quota!r}: give SET=ROWS or SET=SHARE, once for a set.")
        try:
            quotas[name] = int(most) if most.isdecimal() else float(most)
            if isinstance(quotas[name], float) and not 0 < quotas[name] < 1:
                raise ValueError
        except ValueError:
            raise BadInput(
                f"--quota {quota!r}: {most!r} is no number of rows and no share such as 0.2."
            ) from None
        if isinstance(quotas[name], int):
            expect_whole(quotas[name], f"--quota {quota!r}")
    return quotas


def params_of(given: Sequence[str]) -> dict[str, float]:
    """Read `NAME=NUMBER`.

    Raises:
        BadInput: written otherwise, or a name twice.
    """
    params: dict[str, float] = {}
    for param in given:
        name, _, number = param.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = None
        if value is None or not name or name in params:
            raise BadInput(f"--subset-param {param!r}: give NAME=NUMBER, once for a name.")
        params[name] = value
    return params


def _of_length(scores: Scores, train: Generation, how: str) -> str:
    from gradstore.scoring.length_bias import length_correlation, without_length

    left = without_length(scores.values, train.tokens, how, usable=scores.usable)
    before, after = (
        length_correlation(values, train.tokens, usable=scores.usable)
        for values in (scores.values, left)
    )
    return (
        f"Spearman's correlation of scores with target tokens: {before:+.2f}, by {how} {after:+.2f}"
    )


def _told(rows: int) -> Callable[[int], None]:
    from gradstore.pace import Pace, long_pass

    pace = Pace(
        rows,
        lambda seconds: typer.echo(
            long_pass("comparison with each target row", rows, seconds), err=True
        ),
    )
    return pace.advance
