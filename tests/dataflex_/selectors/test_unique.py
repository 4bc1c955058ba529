"""Copies: rows of equal tokens, labels and media; `unique` lets only the first be chosen."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest

from dataflex.data.rows import Rows
from dataflex.run.context import UpdateContext
from dataflex.run.ranks import Ranks
from dataflex.selectors.base import Selection, Selector, ask
from dataflex.selectors.less import LessSelector
from dataflex.selectors.near import NearSelector
from gradstore.errors import BadInput

#: Rows 0, 2 and 4 are copies; row 5 has the tokens of row 1 and other labels; row 3 has no target.
IDS = [[5, 6, 7], [5, 8, 9], [5, 6, 7], [5, 5], [5, 6, 7], [5, 8, 9]]
LABELS = [[-100, 6, 7], [-100, 8, 9], [-100, 6, 7], [-100, -100], [-100, 6, 7], [-100, -100, 9]]


def rows(**columns: Any) -> Rows:
    table = {"input_ids": IDS, "labels": LABELS, **columns}
    return Rows("mine", datasets.Dataset.from_dict(table))


class First(Selector):
    """Chooses the first candidates."""

    def select(self, count: int, context: UpdateContext) -> Selection:
        return Selection(context.candidates[:count])


def choice(selector: Selector, train: Rows, pool: Any = None) -> list[int]:
    run: Any = SimpleNamespace(data=SimpleNamespace(train=train), ranks=Ranks())
    context = UpdateContext(run, 2, 1, 1, 1e-3, None, pool)
    return ask(selector, 3, context, "mine", exact=False).indices.tolist()


def test_the_first_of_equal_rows_is_kept() -> None:
    assert rows().first_of_copies(np.arange(6)).tolist() == [0, 1, 3, 5]
    assert rows().first_of_copies(np.array([4, 2, 2, 1])).tolist() == [1, 2]


def test_rows_with_other_pictures_are_no_copies() -> None:
    pictures = [["a.png"], None, ["b.png"], None, ["a.png"], None]
    assert rows(images=pictures).first_of_copies(np.arange(6)).tolist() == [0, 1, 2, 3, 5]
    assert rows(images=[None] * 6).first_of_copies(np.arange(6)).tolist() == [0, 1, 3, 5]


def test_any_selector_may_leave_copies_out_of_what_it_chooses_from() -> None:
    selector = First()
    assert choice(selector, rows()) == [0, 1, 2]
    selector.unique = True
    assert choice(selector, rows()) == [0, 1, 5]
    assert choice(selector, rows(), np.array([2, 4, 5])) == [2, 5], "of a stage's pool, the first"


@pytest.mark.parametrize("cls", [LessSelector, NearSelector])
def test_more_distinct_rows_than_there_are_is_one_message_before_the_model(cls: Any) -> None:
    data: Any = SimpleNamespace(train=rows(), targets=[])
    cls(unique=True).check_count(3, data)
    cls().check_count(5, data)
    with pytest.raises(
        BadInput, match=r"4 rows an update .* only 3 of 5 usable rows are no copies"
    ):
        cls(unique=True).check_count(4, data)


def test_a_row_is_won_by_the_target_of_its_largest_influence() -> None:
    influence = np.array([[0.1, 0.5], [0.3, 0.2], [np.nan, np.nan], [0.4, 0.9]])
    run: Any = SimpleNamespace(
        config=SimpleNamespace(dataflex=SimpleNamespace(target_subtasks=None)),
        data=SimpleNamespace(targets=(SimpleNamespace(name="a"), SimpleNamespace(name="b"))),
    )
    less = LessSelector()
    best = less.best_of(influence)
    assert less.won(np.array([3, 0, 1]), best, run) == {"a": 1, "b": 2}
    assert LessSelector("mean").best_of(influence) is None
    assert less.won(np.array([3, 0, 1]), None, run) == {}
    run.data.targets = run.data.targets[:1]
    assert less.won(np.array([1]), best, run) == {}
    run.config.dataflex.target_subtasks = [4, 4]
    assert less.won(np.array([3, 0, 1]), best, run) == {"a[0]": 1, "a[1]": 2}
