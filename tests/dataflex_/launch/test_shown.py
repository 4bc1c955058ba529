"""Answers of an explainer as people see them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dataflex.launch.explained import Explanation, FoundRow, Token, Why, combined, table_of
from dataflex.launch.shown import coloured, show, show_why
from gradstore.scoring.contributions import Contributions


def row(rank: int, score: float, **changes: Any) -> FoundRow:
    fields = {"source": ("alpaca", rank), "prompt": f"ask {rank}", "response": "yes", **changes}
    return FoundRow(rank, 10 * rank, score, **fields)


def answer(**changes: Any) -> Explanation:
    fields: dict[str, Any] = {
        "prompt": "Sort.", "response": "1 2", "generated": False, "generations": ("train/2",),
        "values": np.zeros(3, np.float32), "helped": (row(1, 0.5), row(2, 0.25)),
        "hurt": (row(1, -0.5),), "skipped": {"masked": 2},
    }  # fmt: skip
    return Explanation(**{**fields, **changes})


def parts(inner: float, norms: tuple[float, float], rest: float = 0.0) -> Contributions:
    """Two modules and two tokens on each side, of equal parts."""
    half = inner / 2
    names = ("base_model.model.b.lora_A.default.weight", "base_model.model.a.lora_B.default.weight")
    left = (inner - rest) / 2
    return Contributions(inner, norms, dict.fromkeys(names, half), np.array([0, left, left]),
                         np.array([0, half, half]), rest)  # fmt: skip


def test_tokens_are_coloured_by_sign_and_size() -> None:
    text = coloured([Token("ask", 0.0, is_target=False), Token("up", 0.5, is_target=True),
                     Token("\x1b[2J", -0.25, is_target=True)])  # fmt: skip
    assert text.plain == "askup\\x1b[2J", "a row's text does not act on the terminal"
    assert [span.style for span in text.spans] == [
        "dim", "black on rgb(100,255,100)", "black on rgb(255,178,178)"
    ]  # fmt: skip
    assert not coloured([]).plain


def test_checkpoints_are_added_as_cosines_by_their_weights() -> None:
    both = {
        "train/2": (0.25, parts(4.0, (2.0, 4.0))),
        "train/4": (0.75, parts(-1.0, (1.0, 2.0), 0.5)),
    }
    exact, modules, row_tokens, query_tokens, momentum = combined(both)
    assert exact == pytest.approx(0.25 * 0.5 - 0.75 * 0.5)
    assert sum(modules.values()) == pytest.approx(exact)
    assert list(modules) == ["b", "a"]
    assert query_tokens.sum() == pytest.approx(exact)
    assert momentum == pytest.approx(0.75 * 0.25)
    assert row_tokens.sum() + momentum == pytest.approx(exact)


def test_rows_are_shown_with_text_or_with_the_way_to_add_it(capsys: Any) -> None:
    show(answer(generated=True))
    out = capsys.readouterr().out
    for told in (
        "response (the model's own): 1 2",
        "+0.5000",
        "alpaca[2]",
        "ask 2 → yes",
        "2 masked",
    ):
        assert told in out
    assert "store_text" not in out
    bare = {"prompt": None, "response": None}
    show(answer(helped=(row(1, 0.5, **bare),), hurt=(row(1, -0.5, source=None, **bare),)))
    assert (
        "run `dataflex-cli gradstore build` again with store_text: true" in capsys.readouterr().out
    )


def test_a_pair_is_shown_with_its_parts(capsys: Any) -> None:
    both = {"train/2": (0.5, parts(1.0, (1.0, 2.0))), "train/4": (0.5, parts(1.0, (2.0, 1.0), 0.5))}
    exact, modules, _, _, momentum = combined(both)
    tokens = (Token("Sort", 0.0, is_target=False), Token(" 1", 0.25, is_target=True))
    show_why(Why(row(1, 0.4), exact, both, modules, tokens, tokens, momentum), answer())
    out = capsys.readouterr().out
    for told in ("exact influence +0.500000", "store's score +0.4000", "train/4", "+50.0%", "' 1'",
                 "momentum"):  # fmt: skip
        assert told in out


def test_a_table_has_a_line_for_each_row_of_each_answer() -> None:
    table = table_of(
        [answer(), answer(prompt="Add.", helped=(), hurt=(row(1, -1.0, source=None),))]
    )
    lines = table.to_pylist()
    assert [(line["query"], line["side"], line["rank"]) for line in lines] == [
        (0, "helped", 1), (0, "helped", 2), (0, "hurt", 1), (1, "hurt", 1)
    ]  # fmt: skip
    assert lines[1]["source_set"] == "alpaca"
    assert lines[3] | {"source_set": None, "source_row": None} == lines[3]
    assert table_of([]).num_rows == 0
