"""The bm25 selector against scores of all rows looked at one by one; turns, resume, refusals."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest

from dataflex.data.rows import Rows
from dataflex.run.ranks import Ranks
from dataflex.selectors.base import ask
from dataflex.selectors.bm25 import Bm25Selector
from gradstore.errors import BadInput
from gradstore.format.text_table import Text
from gradstore.similarity.bm25 import bm25_scores

PROMPTS = ["sort the letters", "sort the numbers", "name the vowels", "count letters",
           "say hello", "reverse the word", "sort the letters", "count the vowels", "sort",
           "spell a word"]  # fmt: skip
TARGETS = ["sort letters letters", "count vowels", "???"]
TRAIN = [f"{prompt}\nanswer {i}" for i, prompt in enumerate(PROMPTS)]
SCORES = bm25_scores(TRAIN, [f"{text}\n" for text in TARGETS[:2]]).T


class Texts(list[Text]):
    def read(self, rows: Any) -> list[Text]:
        return [self[int(row)] for row in rows]


def data(targets: list[str] = TARGETS) -> Any:
    """Row 4 has no target token, row 6 is a copy of row 0."""
    ids = [[1, 2 + (0 if i == 6 else i)] for i in range(10)]
    labels = [[-100, -100 if i == 4 else row[1]] for i, row in enumerate(ids)]
    train = Rows("train", datasets.Dataset.from_dict({"input_ids": ids, "labels": labels}))
    texts = {
        "train": Texts(Text(p, f"answer {i}", 2) for i, p in enumerate(PROMPTS)),
        "target": Texts(Text(text, "", 2) for text in targets),
    }
    target = Rows("target", datasets.Dataset.from_dict({"input_ids": [[1, 2]] * len(targets)}))
    return SimpleNamespace(train=train, targets=(target,), texts=lambda rows: texts[rows.name])


def boundary(pool: list[int] | None = None) -> Any:
    from dataflex.run.context import UpdateContext

    run: Any = SimpleNamespace(data=data(), ranks=Ranks())
    return UpdateContext(run, 2, 1, 1, 1e-3, None, None if pool is None else np.array(pool))


def selector(**params: Any) -> Bm25Selector:
    made = Bm25Selector(**params)
    made.check_data(data(), None)  # type: ignore[arg-type]
    return made


def best(left: set[int], scores: np.ndarray) -> int:
    return min(left, key=lambda row: (-scores[row], row))


@pytest.mark.parametrize("aggregation", ["max", "mean"])
@pytest.mark.parametrize("pool", [None, [0, 2, 3, 4, 8, 9]])
def test_the_best_rows_by_the_folded_score_are_chosen(
    aggregation: Any, pool: list[int] | None
) -> None:
    folded = SCORES.max(axis=1) if aggregation == "max" else SCORES.mean(axis=1)
    chosen = selector(aggregation=aggregation).select(3, boundary(pool))
    left = set(range(10) if pool is None else pool) - {4}
    expected: list[int] = []
    while len(expected) < 3:
        expected.append(best(left - set(expected), folded))
    assert chosen.indices.tolist() == expected
    assert chosen.scores is not None
    np.testing.assert_allclose(chosen.scores, folded[expected], rtol=1e-5)
    assert chosen.target_rows == 2, "a target row without a word has no say"


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_target_rows_take_turns_and_updates_go_on_until_all_rows_were_served(count: int) -> None:
    one, context = selector(), boundary()
    served: set[int] = set()
    turn = 0
    for _ in range(6):
        expected: list[int] = []
        while len(expected) < count:
            left = set(range(10)) - {4} - served
            if not left:
                served = set()
                left = set(range(10)) - {4} - set(expected)
                before = set(expected)
            else:
                before = set()
            row = best(left - before, SCORES[:, turn % 2])
            expected.append(row)
            served.add(row)
            turn += 1
        chosen = one.select(count, context).indices.tolist()
        assert chosen == expected
    still = selector(advance=False)
    answers = [still.select(count, context).indices.tolist() for _ in range(2)]
    assert answers[0] == answers[1], "without advance every update answers the same"


def test_an_update_that_starts_anew_answers_no_row_twice() -> None:
    """The best row is the last that was not served, and the first again."""
    one, top = selector(aggregation="max"), int(SCORES.max(axis=1).argmax())
    others = [row for row in range(10) if row not in (top, 4)]
    one.select(8, boundary(others))
    found = one.select(4, boundary()).indices.tolist()
    assert found[0] == top
    assert len(set(found)) == 4


def test_a_resumed_selector_goes_on_behind_the_same_rows() -> None:
    one, context = selector(), boundary()
    one.select(3, context)
    resumed = selector()
    resumed.restore(one.state())
    answers = [s.select(3, context).indices.tolist() for s in (one, resumed)]
    assert answers[0] == answers[1]
    assert answers[0] != selector().select(3, context).indices.tolist()


def test_copies_are_left_out_where_asked() -> None:
    chosen = [ask(selector(unique=unique, aggregation="max"), 5, boundary(), "bm25", exact=True)
              for unique in (False, True)]  # fmt: skip
    assert {0, 6} <= set(chosen[0].indices.tolist())
    assert 6 not in chosen[1].indices.tolist()


def test_what_cannot_be_done_is_refused_before_the_model() -> None:
    with pytest.raises(BadInput, match=r"none of the 2 target rows has a word"):
        Bm25Selector().check_data(data(["?", ""]), None)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="only 8 of 9 usable rows are no copies"):
        Bm25Selector(unique=True).check_count(9, data())
    for params, says in (({"b": 2}, "b is 2"), ({"k1": 0}, "k1 is 0"),
                         ({"aggregation": "sum"}, "aggregation is 'sum'")):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            Bm25Selector(**params)  # type: ignore[arg-type]


def test_a_forecast_counts_every_row_and_writes_nothing() -> None:
    one = selector()
    index, scores = one.forecasts(SimpleNamespace(data=data()), [2, 5])  # type: ignore[arg-type]
    assert (index.times, index.rows, scores.times) == (1, 10, 2)
    assert (index.seconds or 0) > 0
    assert "2 target rows" in scores.what
    assert one.state() == {"next": 0}
