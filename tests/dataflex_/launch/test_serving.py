"""A served model is that of the run and step that the question names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dataflex.launch import explain, serving
from gradstore.errors import BadInput


def test_each_run_step_and_combination_has_its_own_model_and_is_loaded_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    trains = [
        SimpleNamespace(name=name, role="train", set="", step=step,
                        record=SimpleNamespace(run=run))
        for name, run, step in (("train/4", "", 4), ("train/8", "", 8), ("b/train/6", "b", 6))
    ]  # fmt: skip
    commits = [SimpleNamespace(generation=each.name, sha256=each.name) for each in trains]
    store = SimpleNamespace(generations=lambda: trains, live_commits=lambda: commits)
    opened = []

    def answer(*_: Any, on_rows: Any) -> Any:
        if on_rows is not None:
            on_rows(3)
        return opened[-1]

    def open_model(_: Any, generation: str | None, **named: Any) -> Any:
        opened.append((generation, *named.values()))
        return SimpleNamespace(explain=answer)

    monkeypatch.setattr(serving, "open_store", lambda _: store)
    monkeypatch.setattr(explain, "open_model", open_model)
    model = serving.ModelAtHand(tmp_path)
    for asked, expected in (
        ({}, (None, "last", "")),
        ({"step": 7}, ("train/4", "last", "")),
        ({"step": 7, "checkpoints": "all"}, ("train/4", "all", "")),
        ({"step": 9, "run": "b"}, ("b/train/6", "last", "b")),
    ):
        assert model.explain("a", "b", 1, **asked) == expected
        assert model.explain("c", "d", 1, **asked) == expected
    assert len(opened) == 4
    stages: list[str | int] = []
    model.explain("a", "b", 1, on_stage=stages.append, on_rows=stages.append)
    assert stages == ["loading the model", "asking the model", 3]
    with pytest.raises(BadInput, match="no committed train generation of run 'b' up to step 5"):
        model.explain("a", "b", 1, run="b", step=5)
