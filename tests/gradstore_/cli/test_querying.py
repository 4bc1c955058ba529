"""`gradstore query`: exact, or by lists of near rows with the recall said."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gradstore.errors import BadInput

if TYPE_CHECKING:
    from conftest import StoreKit

pytest.importorskip("faiss")


@pytest.fixture
def store(kit: StoreKit, fast_path: Path) -> Path:
    """1,000 training rows at one checkpoint, enough for lists."""
    kit.dim, kit.unit_rows = 16, 100
    with kit.writer(fast_path / "store") as writer:
        kit.add(writer, "train/1", 1000)
        kit.add(writer, "target/dev/1", 30)
    return fast_path / "store"


def test_an_approximate_answer_says_its_recall_and_names_rows_with_exact_scores(
    store: Path, commands: Any
) -> None:
    asked = ("query", store, "--target-row", 2, "--top", 4, "--json")
    exact, near = commands(*asked), commands(*asked, "--approximate", "--recall", 0.99)
    for side in ("helped", "hurt"):
        known = {row["row"]: row["score"] for row in exact[side]}
        assert len(near[side]) == 4
        shared = [row for row in near[side] if row["row"] in known]
        assert len(shared) >= 3
        assert all(row["score"] == known[row["row"]] for row in shared)
    told = near["approximate"]
    assert told["recall"] >= 0.99
    assert 1 <= told["nprobe"] <= told["lists"] == 21
    assert "approximate" not in exact
    assert [p.suffix for p in (store / "index").iterdir()] == [".ivf"]
    said = commands(*asked[:-1], "--approximate", "--recall", 0.99)
    assert f"at nprobe {told['nprobe']} of 21 lists, measured on" in said


def test_few_rows_are_answered_exactly_and_so_it_says(commands: Any, tmp_path: Path) -> None:
    commands.store(tmp_path / "s")
    asked = ("query", tmp_path / "s", "--target-row", 2, "--json")
    near = commands(*asked, "--approximate")
    assert near.pop("approximate")["says"].startswith("exact: 22 usable rows are too few")
    assert near == commands(*asked)


def test_a_recall_needs_approximate_and_lists_need_one_checkpoint(
    commands: Any, tmp_path: Path
) -> None:
    commands.store(tmp_path / "s")
    with pytest.raises(BadInput, match=r"--recall 0\.9 needs --approximate"):
        commands("query", tmp_path / "s", "--target-row", 2, "--recall", 0.9)
    with pytest.raises(BadInput, match="rows of one checkpoint"):
        commands("query", tmp_path / "s", "--target-row", 2, "--approximate",
                 "--checkpoints", "all")  # fmt: skip
