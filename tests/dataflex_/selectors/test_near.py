"""The near selector against the worked numbers E17, and files made offline."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflex.config.known import KnownKeys
from dataflex.selectors.by_embedding import load_offline, rows_of_file
from dataflex.selectors.near import NearSelector, next_rows, offline_neighbours
from gradstore.errors import BadInput
from gradstore.similarity.neighbours import column_order, growing_order

E17 = np.array([[0, 1, 2], [0, 3, 1]])


class Table:
    """Neighbours as a test says them: (q, k) rows and cosines that fall by a tenth."""

    def __init__(self, rows: np.ndarray, n: int) -> None:
        self.rows = rows
        self.usable = np.zeros(n, dtype=bool)
        self.usable[np.unique(rows)] = True
        self.asked: list[int] = []

    def nearest(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        self.asked.append(k)
        cosines = np.tile(1 - 0.1 * np.arange(k, dtype=np.float32), (len(self.rows), 1))
        return cosines, self.rows[:, :k]


def rows_named(n: int, sources: list[tuple[str, int]] | None = None) -> Any:
    rows = SimpleNamespace(sources=None if sources is None else tuple(sources))
    rows.target_tokens = np.ones(n, dtype=np.int64)
    return type("Rows", (SimpleNamespace,), {"__len__": lambda self: n})(**vars(rows))


def boundary(n: int, pool: list[int] | None = None, step: int = 0, train: Any = None) -> Any:
    candidates = np.arange(n) if pool is None else np.array(pool)

    def among(usable: np.ndarray) -> np.ndarray:
        allowed = np.zeros(n, dtype=bool)
        allowed[candidates] = True
        return allowed & usable

    data = SimpleNamespace(train=train if train is not None else rows_named(n))
    return SimpleNamespace(
        run=SimpleNamespace(data=data), step=step, candidates=candidates, among_candidates=among
    )


def test_e17_columns_are_read_one_after_the_other_without_repeats() -> None:
    rows, places = column_order(E17, np.ones(4, dtype=bool))
    assert rows.tolist() == [0, 1, 3, 2]
    assert places.tolist() == [0, 2, 3, 4]


def test_e17_the_next_update_goes_on_and_then_starts_again() -> None:
    near, table = NearSelector(max_K=3), Table(E17, 4)
    chosen = [near.choose(3, boundary(4), table).indices.tolist() for _ in range(4)]  # type: ignore[arg-type]
    assert chosen == [[0, 1, 3], [2, 0, 1], [3, 2, 0], [1, 3, 2]]
    standing = NearSelector(max_K=3, advance=False)
    for _ in range(2):
        assert standing.choose(3, boundary(4), table).indices.tolist() == [0, 1, 3]  # type: ignore[arg-type]
    assert standing.state() == {}


def test_a_resumed_selector_goes_on_behind_the_same_rows() -> None:
    near, table = NearSelector(), Table(E17, 4)
    near.choose(3, boundary(4), table)  # type: ignore[arg-type]
    resumed = NearSelector()
    resumed.restore(near.state())
    answers = [n.choose(2, boundary(4), table).indices.tolist() for n in (near, resumed)]  # type: ignore[arg-type]
    assert answers[0] == answers[1] == [2, 0]


def test_a_row_scores_the_cosine_it_was_found_with() -> None:
    chosen = NearSelector().choose(4, boundary(4), Table(E17, 4))  # type: ignore[arg-type]
    assert chosen.scores is not None
    np.testing.assert_allclose(chosen.scores, [1.0, 0.9, 0.9, 0.8], atol=1e-6)


def test_only_candidates_are_taken() -> None:
    chosen = NearSelector().choose(2, boundary(4, pool=[1, 2]), Table(E17, 4))  # type: ignore[arg-type]
    assert chosen.indices.tolist() == [1, 2]


def test_more_neighbours_are_looked_up_where_they_name_too_few_rows() -> None:
    table = Table(np.array([[4, 3, 2, 1, 0], [4, 3, 1, 2, 0]]), 5)
    assert growing_order(table, 1, 1, np.ones(5, bool))[0].tolist() == [4]  # type: ignore[arg-type]
    rows, _ = growing_order(table, 1, 5, np.ones(5, bool))  # type: ignore[arg-type]
    assert rows.tolist() == [4, 3, 2, 1, 0]
    assert table.asked == [1, 1, 2, 4, 5]


@given(st.permutations(range(8)), st.lists(st.integers(1, 8), min_size=1, max_size=12))
def test_every_row_is_served_once_before_any_is_served_twice(
    order: list[int], counts: list[int]
) -> None:
    served, flow = np.zeros(8, dtype=bool), []
    for count in counts:
        found = next_rows(np.array(order), served, count)
        assert len(set(found.tolist())) == len(found) == count
        flow += [order[i] for i in found]
    rounds = [flow[i : i + 8] for i in range(0, len(flow), 8)]
    assert rounds[0] == order[: len(rounds[0])]
    # An update that crosses an end may take a row early to stay distinct: the order of a later
    # round can differ, the eight rows of it cannot.
    for rows in rounds:
        assert len(set(rows)) == len(rows)


def write(path: Path, array: Any) -> Path:
    np.save(path, np.asarray(array))
    return path


def test_numbers_of_a_file_are_rows_of_the_training_set_where_they_were_kept(
    tmp_path: Path,
) -> None:
    """Row 1 of the file was dropped by preprocessing; -1 is a search that found nothing."""
    train = rows_named(3, [("a", 0), ("a", 2), ("a", 3)])
    path = write(tmp_path / "i.npy", [[0, 1, 3], [-1, 2, 9]])
    found = offline_neighbours(path, SimpleNamespace(train=train))  # type: ignore[arg-type]
    assert found.tolist() == [[0, -1, 2], [-1, 1, -1]]
    near = NearSelector(indices_path=str(path))
    assert not near.needs_targets
    near.check_count(3, SimpleNamespace(train=train))  # type: ignore[arg-type]
    chosen = near.choose(2, boundary(3, train=train), None)
    assert chosen.indices.tolist() == [0, 1]
    with pytest.raises(BadInput, match="names 3 of the 3 training rows, an update takes 4"):
        near.check_count(4, SimpleNamespace(train=train))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("array", "says"),
    [
        ([0, 1, 2], r"int64 \(3,\); whole numbers \(target rows, K\)"),
        ([[0.5, 1.0]], "float64"),
        ([[0, -2]], "names row -2"),
    ],
)
def test_a_file_that_is_no_table_of_rows_is_refused(tmp_path: Path, array: Any, says: str) -> None:
    path = write(tmp_path / "i.npy", array)
    with pytest.raises(BadInput, match=says):
        offline_neighbours(path, SimpleNamespace(train=rows_named(3)))  # type: ignore[arg-type]


def test_files_that_cannot_be_read_are_refused_and_nothing_in_them_is_run(tmp_path: Path) -> None:
    objects = tmp_path / "o.npy"
    np.save(objects, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "t.npy").write_text("not an array")
    np.savez(tmp_path / "several.npz", a=np.zeros(1))
    for name in ("o.npy", "t.npy", "several.npz", "missing.npy"):
        with pytest.raises(BadInput, match=name.partition(".")[0]):
            load_offline(tmp_path / name, "indices_path")


def test_numbers_are_refused_where_rows_come_from_several_files() -> None:
    train = rows_named(2, [("a", 0), ("b", 0)])
    with pytest.raises(BadInput, match=r"come from a, b\. Leave indices_path out"):
        rows_of_file(train, "indices_path")
    assert rows_of_file(rows_named(2), "indices_path").tolist() == [0, 1]


def test_parameters_out_of_range_are_refused(tmp_path: Path) -> None:
    for params, says in (
        ({"max_K": 0}, "max_K is 0"),
        ({"advance": "no"}, "advance is 'no'"),
        ({"embedding_model_dtype": "half"}, "choose auto, fp32, fp16 or bf16"),
        ({"embedding_layer": 1.5}, "embedding_layer is 1.5"),
        ({"embedding_batch_size": 0}, "embedding_batch_size is 0"),
        ({"keep_generations": 0}, "keep_generations is 0"),
        ({"embedding_model_name_or_path": ""}, "expected a folder or a hub id"),
    ):
        with pytest.raises(ValueError, match=says):
            NearSelector(**params)  # type: ignore[arg-type]
    config: Any = SimpleNamespace(known=KnownKeys())
    missing = NearSelector(indices_path=str(tmp_path / "no.npy"))
    assert "is not a file here" in missing.check(config)[0]
    nowhere = NearSelector(embedding_model_name_or_path=str(tmp_path / "no"))
    assert "is not a folder here" in nowhere.check(config)[0]
