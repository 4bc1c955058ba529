"""The audit: planted faults come first, with reasons; what a store lacks is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradstore
from gradstore.errors import BadInput
from gradstore.format.layout import RowStatus
from gradstore.format.records import RowSet, row_hash
from gradstore.format.text_table import Text
from gradstore.similarity.audit import Audit, AuditOptions, audit
from gradstore.store.reader import Store, open_store

N, D = 60, 16
WRONG, COPY, SAME_TEXT, OTHER_ANSWER, MASKED = 11, 23, 31, 37, 41
ORDER = np.arange(N)
COLUMNS = (
    "rank", "row", "source_set", "source_row", "row_hash", "prompt", "response", "status", "tokens",
    "suspicion", "loss", "gradient_norm", "self_influence", "self_influence_x_tokens", "agreement",
    "neighbour_cosine", "nearest_row", "nearest_cosine", "repeats_gradient_of", "repeats_text_of",
    "answers_unlike_row", "answer_conflict", "best_target", "hurts_all_targets", "target:goal",
    "reasons",
)  # fmt: skip


class Planted:
    """60 rows that pull one way, and a row of each fault."""

    def __init__(self) -> None:
        random = np.random.default_rng(4)
        common = np.zeros(D)
        common[0] = 1.0
        self.features = (common + 0.2 * random.standard_normal((N, D))).astype(np.float32)
        self.features[WRONG] = -self.features[WRONG]
        self.features[COPY] = 3 * self.features[2]
        self.norm = random.uniform(1, 2, N).astype(np.float32)
        self.norm[WRONG] = 9
        self.loss = random.uniform(1, 2, N).astype(np.float32)
        self.loss[WRONG] = 8
        self.tokens = np.full(N, 5)
        self.status = np.full(N, RowStatus.OK, np.uint8)
        self.status[MASKED] = RowStatus.MASKED
        self.texts = [Text(f"question {i} {i * 977}?", f"answer {i}", 9) for i in range(N)]
        self.texts[SAME_TEXT] = Text(" QUESTION 6  5862?", "answer 6", 9)
        self.texts[OTHER_ANSWER] = self.texts[8]._replace(response="something else")

    def store(
        self, kit: Any, path: Path, *, order: np.ndarray = ORDER, text: bool = True,
        losses: bool = True, target: bool = True,
    ) -> Store:  # fmt: skip
        rows = RowSet.from_hashes([row_hash([i], [i]) for i in order.tolist()],
                                  [("set", i) for i in order.tolist()])  # fmt: skip
        projection = {"method": "sjlt", "d": D, "seed": 7}
        with kit.writer(path) as writer:
            if text:
                writer.keep_texts(rows, [self.texts[i] for i in order])
            record = kit.record(projection=projection)
            generation = writer.begin(record, rows, dim=D, losses=losses)
            generation.write_unit(
                0, self.features[order], self.norm[order], self.status[order], self.tokens,
                self.loss[order] if losses else None,
            )  # fmt: skip
            generation.commit()
            if target:
                goal = writer.begin(
                    kit.record("target/goal/1", projection=projection), kit.rows(2), dim=D
                )
                ones = np.ones(2, np.float32)
                goal.write_unit(0, self.features[:2], ones, ones * 0, ones)
                goal.commit()
        return open_store(path)


@pytest.fixture(scope="module")
def planted() -> Planted:
    return Planted()


def by_row(found: Audit) -> dict[int, dict[str, Any]]:
    return {line["row"]: line for line in found.table.to_pylist()}


def test_planted_faults_are_found_each_with_its_reason(
    kit: Any, planted: Planted, tmp_path: Path
) -> None:
    found = gradstore.audit(planted.store(kit, tmp_path / "s"))
    assert tuple(found.table.column_names) == COLUMNS
    assert found.table["rank"].to_pylist() == list(range(1, N + 1))
    lines = by_row(found)
    wrong = lines[WRONG]
    assert (wrong["rank"], wrong["hurts_all_targets"], wrong["suspicion"]) == (1, True, 1.0)
    for reason in ("surprises the model: loss 8.00, above 99.9% of rows", "pulls hard at the model",
                   "pulls against the other rows", "hurts every target set"):  # fmt: skip
        assert reason in wrong["reasons"]
    assert lines[COPY]["repeats_gradient_of"] == 2
    assert "repeats the gradient of row 2" in lines[COPY]["reasons"]
    assert lines[SAME_TEXT]["repeats_text_of"] == 6
    assert "repeats the text of row 6" in lines[SAME_TEXT]["reasons"]
    assert (lines[OTHER_ANSWER]["answers_unlike_row"], lines[8]["answers_unlike_row"]) == (8, 37)
    assert "asks the same as row 8 and answers otherwise" in lines[OTHER_ANSWER]["reasons"]
    masked = lines[MASKED]
    assert (masked["rank"], masked["status"]) == (N, "masked")
    assert masked["reasons"] == "can't be used: no token is a target"
    assert all(masked[name] is None for name in ("suspicion", "loss", "agreement", "nearest_row"))
    assert found.counts == {
        "repeated_text": 1, "repeated_gradient": 1, "answer_conflict": 2, "hurts_all_targets": 1,
        "masked": 1,
    }  # fmt: skip
    assert found.notes == ()
    assert (found.generation, found.checkpoints, found.targets) == ("train/1", (1,), ("goal",))
    assert list(found.frame().columns) == list(COLUMNS)


def test_suspicion_is_the_mean_percentile_of_its_three_signals(
    kit: Any, planted: Planted, tmp_path: Path
) -> None:
    frame = audit(planted.store(kit, tmp_path / "s")).frame().dropna(subset=["suspicion"])
    percentile = [
        (frame[name] * sign).rank(method="average").sub(1).div(len(frame) - 1)
        for name, sign in (("loss", 1), ("self_influence_x_tokens", 1), ("agreement", -1))
    ]
    np.testing.assert_allclose(frame["suspicion"], sum(percentile) / 3, atol=1e-12)
    assert frame["suspicion"].is_monotonic_decreasing


def test_the_order_of_the_rows_does_not_matter(kit: Any, planted: Planted, tmp_path: Path) -> None:
    order = np.random.default_rng(1).permutation(N)
    first = audit(planted.store(kit, tmp_path / "a")).frame().set_index("row_hash")
    other = audit(planted.store(kit, tmp_path / "b", order=order)).frame().set_index("row_hash")
    other = other.loc[first.index]
    for name in ("suspicion", "loss", "self_influence", "agreement", "neighbour_cosine",
                 "answer_conflict", "best_target"):  # fmt: skip
        np.testing.assert_allclose(other[name], first[name], atol=1e-5, err_msg=name)
    np.testing.assert_array_equal(order[other["row"]], first["row"])
    # Rows of equal suspicion may change places.
    ranked = [frame.sort_values("rank")["suspicion"] for frame in (first, other)]
    np.testing.assert_allclose(*ranked, atol=1e-9)


def test_what_a_store_lacks_is_empty_and_said(kit: Any, planted: Planted, tmp_path: Path) -> None:
    store = planted.store(kit, tmp_path / "s", text=False, losses=False, target=False)
    found = audit(store)
    empty = {name for name in found.table.column_names
             if found.table[name].null_count == N}  # fmt: skip
    assert empty == {"prompt", "response", "loss", "repeats_text_of", "answers_unlike_row",
                     "answer_conflict", "best_target", "hurts_all_targets"}  # fmt: skip
    assert by_row(found)[WRONG]["rank"] == 1
    for note, words in zip(found.notes, ("store_text: true", "no losses", "no target set"),
                           strict=True):  # fmt: skip
        assert words in note


def test_more_neighbours_than_rows_are_refused(kit: Any, planted: Planted, tmp_path: Path) -> None:
    store = planted.store(kit, tmp_path / "s")
    with pytest.raises(BadInput, match="neighbours is 59, but each of 59 usable rows has 58"):
        audit(store, options=AuditOptions(neighbours=59))


def test_few_rows_take_as_many_neighbours_as_there_are(kit: Any, tmp_path: Path) -> None:
    found = audit(kit.build(tmp_path / "s", n=3))
    assert found.table["nearest_row"].null_count == 0


def test_a_set_that_is_not_there_and_other_options_are_refused(
    kit: Any, planted: Planted, tmp_path: Path
) -> None:
    store = planted.store(kit, tmp_path / "s")
    with pytest.raises(BadInput, match="gaol"):
        audit(store, targets=["gaol"])
    with pytest.raises(BadInput, match="AuditOptions"):
        audit(store, options={"neighbours": 3})  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="no committed train generation of run 'b'"):
        audit(store, run="b")
    assert audit(store, targets=[]).targets == ()
