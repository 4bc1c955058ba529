"""`gradstore select --rerank-store`: a second store ranks the best rows again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gradstore.cli.reranking import Again
from gradstore.errors import BadInput, ProvenanceMismatch
from gradstore.scoring.choose import Choice
from gradstore.scoring.influence import influence_scores
from gradstore.scoring.pairing import checkpoint_features
from gradstore.scoring.rescored import rerank
from gradstore.scoring.rules import Rule
from gradstore.store.reader import open_store

if TYPE_CHECKING:
    from conftest import StoreKit


@pytest.fixture
def stores(kit: StoreKit, fast_path: Path, commands: Any) -> tuple[Path, Path]:
    """The same 24 rows at two checkpoints, in 1bit and in int8."""
    kit.dim = 64
    places = fast_path / "bits", fast_path / "more"
    for place, kit.dtype in zip(places, ("1bit", "int8"), strict=True):
        commands.store(place)
    return places


def test_select_writes_the_second_stores_order_and_scores(
    stores: tuple[Path, Path], commands: Any, tmp_path: Path
) -> None:
    bits, more = stores
    output = tmp_path / "chosen.jsonl"
    said = commands("select", bits, "-k", 6, "-o", output, "--checkpoints", "all",
                    "--rerank-store", more, "--rerank-factor", 2)  # fmt: skip
    first, second = (checkpoint_features(open_store(each), "all") for each in stores)
    expected = rerank(Choice(Rule(), 6), influence_scores(first), second, factor=2)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["row"] for line in lines] == expected.rows.tolist()
    assert [line["score"] for line in lines] == expected.values[expected.rows].tolist()
    assert lines[0]["prompt"] == f"p {lines[0]['row']}"
    assert f"12 rows ranked again by {more} (int8): {expected.moved} of 6 rows taken" in said


def test_half_as_many_candidates_again_are_the_default(
    stores: tuple[Path, Path], commands: Any, tmp_path: Path
) -> None:
    bits, more = stores
    said = commands("select", bits, "-k", 7, "-o", tmp_path / "c.jsonl", "--rerank-store", more)
    assert said.startswith("11 rows ranked again")


def test_stores_that_differ_are_refused_before_anything_is_scored(
    stores: tuple[Path, Path], commands: Any, kit: StoreKit, fast_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("gradstore.scoring.influence.influence_scores", pytest.fail)
    with kit.writer(fast_path / "other") as writer:
        kit.add(writer, "train/2", 24, adapter_hash="cc")
        kit.add(writer, "target/dev/2", 8)
    output = fast_path / "never.jsonl"
    with pytest.raises(ProvenanceMismatch, match="train/2: adapter_hash differs: 'aa' and 'cc'"):
        commands("select", stores[0], "-k", 6, "-o", output, "--rerank-store", fast_path / "other")
    with kit.writer(fast_path / "lacking") as writer:
        kit.add(writer, "train/2", 24)
    with pytest.raises(BadInput, match="no target generation of dev at step 2"):
        commands("select", stores[0], "-k", 6, "-o", output,
                 "--rerank-store", fast_path / "lacking")  # fmt: skip
    with pytest.raises(BadInput, match="needs the subset 'top'"):
        commands("select", stores[0], "--subset", "drop_harmful", "-o", output,
                 "--rerank-store", stores[1])  # fmt: skip
    assert not output.exists()


def test_a_later_checkpoint_of_the_second_store_is_passed_over(
    stores: tuple[Path, Path], commands: Any, kit: StoreKit, tmp_path: Path
) -> None:
    bits, more = stores
    outputs = [tmp_path / name for name in ("before.jsonl", "after.jsonl")]
    commands("select", bits, "-k", 6, "-o", outputs[0], "--rerank-store", more)
    kit.dtype = "int8"
    with kit.writer(more) as writer:
        kit.add(writer, "train/3", 24)
        kit.add(writer, "target/dev/3", 8)
    commands("select", bits, "-k", 6, "-o", outputs[1], "--rerank-store", more)
    assert outputs[1].read_bytes() == outputs[0].read_bytes()


def test_a_factor_needs_a_store_and_is_at_least_1() -> None:
    with pytest.raises(BadInput, match="needs --rerank-store"):
        Again(rerank_factor=2.0)
    with pytest.raises(BadInput, match=r"rerank factor is 0.5"):
        Again(rerank_factor=0.5, rerank_store=Path("there"))
