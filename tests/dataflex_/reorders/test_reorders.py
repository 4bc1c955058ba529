"""Reorders over several intervals: E31, passes, pools, state, and where scores come from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from dataflex.config.presets import resolve
from dataflex.data.rows import SOURCE_ROW, RawRows, Rows, RunData, as_numbers
from dataflex.reorders.by_score import ScoredReorder
from dataflex.reorders.dynamic import DynamicReorder
from dataflex.reorders.patterns import PATTERNS
from dataflex.reorders.scores import ScoreParams, fixed_scores, read_scores
from dataflex.reorders.static import StaticReorder
from dataflex.run.context import RunContext, UpdateContext
from dataflex.run.ranks import Ranks
from gradstore.errors import BadInput, ProvenanceMismatch

PARAMS = {"layers": 3, "num_sections": 2, "folding_ratio": 0.2}
NOTHING: Any = None


class Board:
    """Losses that a test decides about, by step; it remembers what it was asked for."""

    def __init__(self, losses: Callable[[int], Any]) -> None:
        self.losses_at = losses
        self.asked: list[list[int]] = []
        self.tokens = 0

    def losses(self, step: int, positions: Any, max_rows: int) -> Any:
        self.asked.append(positions.tolist())
        found = np.full(len(self.losses_at(step)), np.nan)
        found[positions] = np.asarray(self.losses_at(step))[positions]
        self.tokens = 10 * len(positions)
        return found


def data_of(n: int, masked: tuple[int, ...] = (), **columns: list[Any]) -> RunData:
    """`n` rows of one file with `columns`."""
    labels = [[1, -100 if i in masked else i] for i in range(n)]
    dataset = Dataset.from_dict({"input_ids": [[1, i] for i in range(n)], "labels": labels})
    sources = tuple(("one", i) for i in range(n))
    files = {"one": Dataset.from_dict({SOURCE_ROW: list(range(n)), **columns})}
    return RunData(Rows("train", dataset, sources), (), NOTHING, "default", NOTHING, "sft",
                   files=files)  # fmt: skip


def context_of(data: RunData, step: int = 0, pool: Any = None, board: Any = None) -> UpdateContext:
    run = RunContext(NOTHING, data, NOTHING, NOTHING, Path(), "id", 0, ranks=Ranks(), board=board)
    return UpdateContext(run, step, 1, 1, 1e-3, NOTHING, None if pool is None else np.array(pool))


def served(strategy: ScoredReorder, data: RunData, counts: list[int], **more: Any) -> list[int]:
    """Rows of consecutive updates, one after the other."""
    rows: list[int] = []
    for step, count in enumerate(counts):
        rows += strategy.order(count, context_of(data, step, **more)).rows.tolist()
    return rows


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_e31_with_fixed_scores_dynamic_serves_the_order_of_static(
    pattern: str, window: int
) -> None:
    """Two passes and a half, in intervals that do not divide a pass."""
    data = data_of(12, score=[5, 1, 9, 3, 3, 8, 2, 7, 0, 6, 4, 3])
    options: dict[str, Any] = {"pattern": pattern, "window_size": window, "pattern_params": PARAMS,
                               "score_source": "precomputed"}  # fmt: skip
    static = served(StaticReorder("index", **options), data, [30])
    for consume in (True, False):
        for every in (1, 2):
            dynamic = DynamicReorder(every, consume, **options)
            assert served(dynamic, data, [4, 4, 4, 5, 5, 5, 3]) == static, (consume, every)


def test_e31_folding_by_intervals_of_four_serves_e29() -> None:
    data = data_of(12)
    board = Board(lambda step: np.arange(12.0))
    dynamic = DynamicReorder(pattern="folding", pattern_params={"layers": 3})
    rows = served(dynamic, data, [4, 4, 4], board=board)
    assert rows == [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]
    assert [len(asked) for asked in board.asked] == [12, 8, 4], "rows still to come"


def test_dynamic_chooses_by_the_rank_of_now() -> None:
    """Sorted, losses turned around after the first update: the last rows come next."""
    board = Board(lambda step: np.arange(6.0) * (1 if step == 0 else -1))
    rows = served(DynamicReorder(), data_of(6), [2, 2, 2], board=board)
    assert rows == [0, 1, 5, 4, 3, 2]


def test_reorder_every_second_update_goes_on_in_between() -> None:
    board = Board(lambda step: np.arange(8.0) * (-1) ** step)
    rows = served(DynamicReorder(reorder_every=2), data_of(8), [2, 2, 2, 2], board=board)
    assert rows == [0, 1, 2, 3, 4, 5, 6, 7]
    assert [len(asked) for asked in board.asked] == [8, 4]


def test_without_consume_once_a_row_may_come_twice() -> None:
    board = Board(lambda step: np.arange(4.0) * (-1) ** step)
    dynamic = DynamicReorder(consume_once=False)
    assert served(dynamic, data_of(4), [2, 2], board=board) == [0, 1, 1, 0]


def test_an_exhausted_pool_refills_and_every_pass_serves_every_row_once() -> None:
    board = Board(lambda step: np.random.default_rng(step).random(7))
    rows = served(DynamicReorder(pattern="saw", pattern_params=PARAMS), data_of(7), [3] * 7,
                  board=board)  # fmt: skip
    for at in (0, 7, 14):
        assert sorted(rows[at : at + 7]) == list(range(7))


def test_a_warm_up_draws_at_random_and_uses_up_the_beginning_of_the_pass() -> None:
    data, draws = data_of(20), set()
    for seed in range(5):
        dynamic = DynamicReorder(seed=seed)
        board = Board(lambda step: np.arange(20.0))
        opening = dynamic.warmup(8, context_of(data, board=board)).rows
        assert not board.asked
        rest = served(dynamic, data, [6, 6], board=board)
        assert rest == sorted(set(range(20)) - set(opening.tolist()))
        draws.add(tuple(opening.tolist()))
    assert len(draws) == 5


def test_statics_warm_up_is_the_head_of_its_order_and_the_cursor_wraps() -> None:
    static = StaticReorder("index", polarity="higher_earlier")
    data = data_of(5, score=[3, 1, 2, 5, 4])
    assert static.warmup(2, context_of(data)).rows.tolist() == [3, 4]
    told = static.order(7, context_of(data, 2))
    assert told.rows.tolist() == [0, 2, 1, 3, 4, 0, 2]
    assert told.scores is not None
    assert told.scores.tolist() == [3, 2, 1, 5, 4, 3, 2]
    assert told.numbers == {"passes": 9 / 5}


def test_statics_model_loss_is_one_pass() -> None:
    board = Board(lambda step: -np.arange(6.0) if step == 0 else np.arange(6.0))
    static = StaticReorder(score_source="model_loss")
    assert static.needs_single_rows
    assert served(static, data_of(6), [4, 4], board=board) == [5, 4, 3, 2, 1, 0, 5, 4]
    assert len(board.asked) == 1


def test_an_order_by_losses_of_which_none_is_finite_is_refused() -> None:
    board = Board(lambda step: np.full(6, np.nan))
    with pytest.raises(BadInput, match="no training row has a finite loss"):
        served(StaticReorder(score_source="model_loss"), data_of(6), [4], board=board)


@pytest.mark.parametrize("kind", [StaticReorder, DynamicReorder])
def test_max_samples_scores_a_seeded_draw_and_the_others_lie_in_the_middle(kind: Any) -> None:
    def run(seed: int) -> tuple[list[list[int]], list[int]]:
        board = Board(lambda step: np.where(np.arange(30) < 15, 0.0, 1.0))
        strategy = kind(score_source="model_loss", seed=seed, score_params={"max_samples": 11})
        rows = served(strategy, data_of(30), [30], board=board)
        return board.asked, rows

    asked, rows = run(1)
    assert run(1) == (asked, rows)
    assert run(2)[0] != asked
    (scored,) = asked
    assert len(scored) == 11
    low, high = ({i for i in scored if (i >= 15) == above} for above in (False, True))
    extreme = high if len(low) > len(high) else low  # the median is the majority's loss
    end = rows[-len(extreme) :] if extreme is high else rows[: len(extreme)]
    assert set(end) == extreme


def test_every_update_draws_other_rows_to_score() -> None:
    board = Board(lambda step: np.arange(30.0))
    dynamic = DynamicReorder(consume_once=False, score_params={"max_samples": 5})
    served(dynamic, data_of(30), [3, 3, 3], board=board)
    assert len({tuple(asked) for asked in board.asked}) == 3


@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.booleans(), st.integers(0, 5))
def test_a_restored_state_goes_on_with_the_same_rows(
    counts: list[int], dynamic: bool, cut: int
) -> None:
    data = data_of(7)
    board = Board(lambda step: np.random.default_rng(step).random(7))

    def fresh() -> ScoredReorder:
        if dynamic:
            return DynamicReorder(2, pattern="folding", pattern_params={"layers": 2})
        return StaticReorder(score_source="model_loss", pattern="folding")

    whole, first, second = fresh(), fresh(), fresh()
    rows = served(whole, data, counts, board=board)
    cut = min(cut, len(counts))
    found = served(first, data, counts[:cut], board=board)
    second.restore(first.state())
    for step in range(cut, len(counts)):
        found += second.order(counts[step], context_of(data, step, board=board)).rows.tolist()
    assert found == rows


@pytest.mark.parametrize("kind", [StaticReorder, DynamicReorder])
def test_a_pool_is_put_in_order_and_another_one_begins_a_pass(kind: Any) -> None:
    data = data_of(10, score=[9, 8, 7, 6, 5, 4, 3, 2, 1, 0])
    strategy = kind(score_source="precomputed")
    strategy.by_index()
    assert served(strategy, data, [2, 2], pool=[1, 2, 5, 8]) == [8, 5, 2, 1]
    assert served(strategy, data, [2], pool=[1, 2, 5, 8]) == [8, 5], "the same pool goes on"
    assert served(strategy, data, [2], pool=[0, 1, 2]) == [2, 1]


def test_rows_without_a_target_are_never_served() -> None:
    data = data_of(6, masked=(1, 4), score=[0, 1, 2, 3, 4, 5])
    for strategy in (StaticReorder("index"), DynamicReorder(score_source="precomputed")):
        assert served(strategy, data, [8]) == [0, 2, 3, 5] * 2
    with pytest.raises(BadInput, match="no row with a target"):
        served(DynamicReorder(), data, [1], pool=[1, 4])


def test_raw_rows_are_put_in_order_and_then_served_as_they_lie() -> None:
    raw = StaticReorder(pattern="zigzag", pattern_params={"layers": 2})
    index = StaticReorder("index", pattern="zigzag", pattern_params={"layers": 2})
    data = data_of(6, score=[3, 1, None, 5, 4, 0])
    assert raw.orders_raw_rows
    assert not raw.needs_single_rows
    assert data.raw is not None
    order = raw.order_raw_rows(data.raw)
    assert order.tolist() == served(index, data, [6])
    rows = Rows("train", data.train.dataset.select(order),
                tuple(("one", int(i)) for i in order))  # fmt: skip
    arranged = replace(data, train=rows)
    raw.check_data(arranged, NOTHING)
    told = raw.order(6, context_of(arranged))
    assert told.rows.tolist() == list(range(6))
    np.testing.assert_array_equal(told.scores, np.array([3, 1, np.nan, 5, 4, 0])[order])
    raw.by_index()
    assert not raw.orders_raw_rows


def test_a_column_is_looked_up_by_data_set_and_place_in_its_file() -> None:
    files = {
        "a": Dataset.from_dict({SOURCE_ROW: [0, 1, 2], "score": [1.0, None, 3.0]}),
        "b": Dataset.from_dict({SOURCE_ROW: [5, 2], "score": ["50", "20"], "x": [0, 0]}),
    }
    rows = RawRows((("b", 2), ("a", 0), ("a", 1), ("b", 5), ("a", 0)), files)
    np.testing.assert_array_equal(rows.numbers("score"), [20, 1, np.nan, 50, 1])
    with pytest.raises(BadInput, match="'a' has no column 'x'; its columns are score"):
        rows.numbers("x")
    with pytest.raises(BadInput, match=r"place: expected numbers: .*'high'"):
        as_numbers(["high"], "place")


def test_score_files_of_every_kind(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([1, 2, 3], dtype=np.int32))
    contents = {
        "b.json": "[1, null, 3]",
        "c.json": '{"score": [1, 2, 3]}',
        "d.json": '[{"score": 1}, {"score": 2}, {"score": 3}]',
        "e.jsonl": "1\n2\n3\n",
        "f.jsonl": '{"score": 1, "x": 0}\n\n{"score": null}\n{"score": 3}\n',
    }
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
    for path in sorted(tmp_path.iterdir()):
        middle = np.nan if path.name in ("b.json", "f.jsonl") else 2.0
        np.testing.assert_array_equal(read_scores(path, "score"), [1, middle, 3])
    with pytest.raises(BadInput, match="has no 'rank'; it has score"):
        read_scores(tmp_path / "f.jsonl", "rank")
    bad = {"g.json": "3", "h.json": "[1,", "i.jsonl": '"high"', "j.npy": "",
           "k.json": "[" * 50_000, "l.jsonl": "[" * 200 + "]" * 200}  # fmt: skip
    for name, text in bad.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(BadInput, match="score file"):
            read_scores(tmp_path / name, "score")


def test_a_score_file_of_another_length_names_both(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(4.0))
    params = ScoreParams(score_path=str(tmp_path / "a.npy"))
    with pytest.raises(BadInput, match="has 4 scores, but there are 5 training rows"):
        fixed_scores("precomputed", params, data_of(5))


def test_nothing_but_nan_is_no_score() -> None:
    with pytest.raises(BadInput, match="not one of 3 scores is a finite number"):
        fixed_scores("precomputed", ScoreParams(), data_of(3, score=[None, float("nan"), None]))


def selection(path: Path, **changes: Any) -> ScoreParams:
    content: dict[str, Any] = {"indices": [4, 0, 2], "metric": {"score": [0.4, 0.1, 0.9]}}
    path.write_text(json.dumps({**content, **changes}))
    return ScoreParams(cache_path=str(path))


def test_rows_that_a_selection_left_out_lie_in_the_middle(tmp_path: Path) -> None:
    params = selection(tmp_path / "step_2.json")
    scores = fixed_scores("cached_selection", params, data_of(6))
    np.testing.assert_array_equal(scores, [0.1, np.nan, 0.9, np.nan, 0.4, np.nan])
    strategy = StaticReorder(score_source="cached_selection", score_params=vars(params))
    assert served(strategy, data_of(6), [6]) == [0, 1, 3, 4, 5, 2]


def test_of_a_row_chosen_twice_the_first_finite_score_counts(tmp_path: Path) -> None:
    params = selection(tmp_path / "step_2.json", indices=[1, 1, 1],
                       metric={"score": [None, 0.5, 0.7]})  # fmt: skip
    np.testing.assert_array_equal(
        fixed_scores("cached_selection", params, data_of(2)), [np.nan, 0.5]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"indices": [4, 0, 9]}, "names position 9, but there are 6"),
        ({"metric": {"score": []}}, "has 3 indices, but 0 scores"),
        ({"metric": {"a": [1, 2, 3], "b": [1, 2, 3]}}, "has metrics a, b"),
        ({"metric": 3}, "cannot be read"),
        ({"indices": None}, "cannot be read"),
        ({"manifest": json.loads("[" * 200 + "]" * 200)}, "nests more than"),
    ],
)
def test_a_selection_that_does_not_fit_is_refused(
    changes: Mapping[str, Any], message: str, tmp_path: Path
) -> None:
    params = selection(tmp_path / "step_2.json", **changes)
    with pytest.raises(BadInput, match=message):
        fixed_scores("cached_selection", params, data_of(6))


def test_a_selection_of_other_rows_is_refused(tmp_path: Path) -> None:
    params = selection(tmp_path / "step_2.json", manifest={"rows_sha256": "other"})
    with pytest.raises(ProvenanceMismatch, match="made on other training rows"):
        fixed_scores("cached_selection", params, data_of(6))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"score_source": "modelloss"}, "score_source is 'modelloss'; choose precomputed"),
        ({"score_source": "cached_selection"}, "needs score_params.cache_path"),
        (
            {"score_source": "cached_selection", "score_params": {"cache_pth": "x"}},
            "did you mean 'cache_path'",
        ),
        ({"score_params": {"batchsize": 8}}, "unknown score_params: 'batchsize'"),
        ({"score_params": {"batch_size": 0}}, "batch_size is 0"),
        ({"window_size": -3}, "window_size is -3"),
        ({"reorder_every": 0}, "reorder_every is 0"),
        ({"pattern": "saw", "pattern_params": {"num_sections": 4, "folding_ratio": 0.125}},
         "would overlap"),
    ],
)  # fmt: skip
def test_what_is_out_of_range_is_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DynamicReorder(**params)


def test_presets_of_1_1_0_are_found_by_kind_and_keep_what_is_not_overridden(
    tmp_path: Path,
) -> None:
    theirs = tmp_path / "components.yaml"
    theirs.write_text(
        "reorderers:\n  mine:\n    name: anything\n    params: {kind: dynamic, pattern: stair,"
        " pattern_params: {num_sections: 2, folding_ratio: .1, layers: 3},"
        " score_params: {batch_size: 8, num_workers: 2}}\n"
    )
    given = {"pattern_params": {"layers": 4}}
    built = resolve("dynamic_reorder", "mine", given, theirs).build()
    assert isinstance(built, DynamicReorder)
    assert (built.pattern.params.layers, built.pattern.params.folding_ratio) == (4, 0.1)
    for name in PATTERNS:
        assert isinstance(resolve("dynamic_reorder", name, {}).build(), StaticReorder)
        for kind, cls in (("static", StaticReorder), ("dynamic", DynamicReorder)):
            found = resolve("dynamic_reorder", f"{kind}_{name}", {}).build()
            assert isinstance(found, cls)
            assert found.pattern.name == name
    with pytest.raises(BadInput, match="'dynamc'"):
        resolve("dynamic_reorder", "sorting", {"kind": "dynamc"})
