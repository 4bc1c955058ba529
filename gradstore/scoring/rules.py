"""The rules by which rows are chosen: their names, what each may be told, and the way to each.

Letters: n train rows, t target rows, k chosen.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from numbers import Real
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from gradstore.errors import BadInput, expect, expect_whole
from gradstore.scoring.best_rows import TargetTable, best_of_each
from gradstore.scoring.coverage import MOST_ROWS, check_discount, check_rows, facility_location
from gradstore.scoring.quotas import Limits, check_room
from gradstore.scoring.selection import check_k
from gradstore.scoring.subset import (
    MOST_NEIGHBOURS,
    NeighbourRule,
    best_first,
    check_serves_all,
    drop_harmful,
    knn_uniform,
    round_robin,
)
from gradstore.scoring.transport import Marginals, transport

#: Rules that look at each target row alone, in a pass of the store of their own.
PerTarget = Literal["round_robin", "knn_uniform", "transport", "facility_location"]
#: Rules of similarities, whose sign says nothing of harm.
OfSimilarity = Literal["top", PerTarget]
Subset = Literal[OfSimilarity, "drop_harmful"]

SUBSETS: tuple[str, ...] = get_args(Subset)
PER_TARGET = frozenset(get_args(PerTarget))

#: Constants that a rule may be given (`subset_params`), and the check of their values.
_CONSTANTS: Mapping[str, tuple[tuple[str, ...], Callable[..., object]]] = {
    "knn_uniform": (("alpha", "scale"), NeighbourRule),
    "transport": (("blur", "train"), Marginals),
    "facility_location": (("discount",), check_discount),
}


@dataclass(frozen=True)
class Rule:
    """A subset rule and what it may be told.

    Attributes:
        name: one of `SUBSETS`.
        neighbours: K of `knn_uniform`; None finds it.
        params: constants by name, others than the rule's own defaults: alpha and scale of
            `knn_uniform` (of the way to find K), blur and train of `transport`, discount of
            `facility_location`.

    Raises:
        BadInput: an unknown rule, neighbours of another than `knn_uniform`, a constant that the
            rule does not have or a value that it can't have.
    """

    name: str = "top"
    neighbours: int | None = None
    params: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check it before rows are scored."""
        if self.name not in SUBSETS:
            near = get_close_matches(str(self.name), SUBSETS, 1)
            meant = f"did you mean {near[0]!r}? " if near else ""
            raise BadInput(f"subset is {self.name!r}; {meant}Choose {' or '.join(SUBSETS)}.")
        if self.neighbours is not None:
            expect_whole(self.neighbours, "neighbours")
            if self.name != "knn_uniform":
                raise BadInput(
                    f"neighbours is {self.neighbours}, but only the subset 'knn_uniform' has "
                    f"neighbours, not {self.name!r}; leave it out."
                )
        self._check_params()

    @property
    def per_target(self) -> bool:
        """The rule looks at each target row alone."""
        return self.name in PER_TARGET

    @property
    def most(self) -> int:
        """Largest number of rows that the rule takes."""
        return MOST_ROWS if self.name == "facility_location" else sys.maxsize

    def check(self, k: int, targets: int) -> None:
        """Raise BadInput for a number of rows that the rule cannot choose for t target rows."""
        if self.name == "round_robin":
            check_serves_all(k, targets)
        if self.name == "facility_location":
            check_rows(k)

    def choose(
        self,
        k: int,
        scores: npt.NDArray[np.floating[Any]],
        table: TargetTable | None,
        *,
        usable: npt.NDArray[np.bool_],
        limits: Limits | None = None,
    ) -> npt.NDArray[np.int64]:
        """Choose exactly k rows, in the order of choice.

        Args:
            k: how many rows.
            scores: (n,) of the rows for the whole target; the rules `PER_TARGET` do not use them.
            table: similarities with each target row; the other rules do not use it.
            usable: (n,) bool, rows that may be chosen.
            limits: the most rows of a data set.

        Raises:
            BadInput: more rows than are usable, than the limits leave or than the rule can choose;
                all but what `drop_harmful` finds before the table is read.
        """
        k = check_k(k, int(usable.sum()), usable.size)
        check_room(k, usable, limits)
        if not self.per_target:
            way = drop_harmful if self.name == "drop_harmful" else best_first
            return way(scores, k, usable=usable, limits=limits)
        assert table is not None
        self.check(k, table.targets)
        n = int(usable.sum())
        # The authors limit the neighbours of KNN-KDE to a tenth of the rows; of few rows all would
        # be everybody's neighbours.
        most = min(MOST_NEIGHBOURS, max(1, n // 10))
        width = max(k, self.neighbours or most) if self.name == "knn_uniform" else k
        best = best_of_each(table, min(width, n), usable=usable, limits=limits)
        if self.name == "round_robin":
            return round_robin(best.rows, k, limits=limits)
        if self.name == "knn_uniform":
            found = NeighbourRule(**self.params) if self.neighbours is None else self.neighbours
            return knn_uniform(best, k, neighbours=found, most=most, limits=limits)
        if self.name == "transport":
            return transport(best, k, n, marginals=Marginals(**self.params), limits=limits)
        assert self.name == "facility_location"
        return facility_location(best, k, **self.params, limits=limits)

    def _check_params(self) -> None:
        wanted = "constants by name, such as {'discount': 0.3}"
        expect(isinstance(self.params, Mapping), "subset_params", self.params, wanted)
        accepted, check = _CONSTANTS.get(self.name, ((), dict))
        given: Mapping[str, object] = self.params
        for name, value in given.items():
            if name not in accepted:
                has = f"it has {' and '.join(accepted)}" if accepted else "it has none"
                raise BadInput(
                    f"subset_params.{name} is no constant of the subset {self.name!r}: {has}."
                )
            if isinstance(value, bool) or not isinstance(value, Real):
                raise BadInput(f"subset_params.{name} is {value!r}; give a number.")
        if self.params and self.neighbours is not None:
            raise BadInput(
                f"subset_params {dict(self.params)} say how neighbours are found, and neighbours "
                f"is {self.neighbours}; leave one of them out."
            )
        check(**self.params)
