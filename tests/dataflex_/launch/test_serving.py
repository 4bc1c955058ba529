"""A served model is that of the run and step that the question names."""

from __future__ import annotations

import threading
import weakref
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


def test_a_slow_question_and_one_to_another_model_hold_one_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    begun, gate, told = threading.Event(), threading.Event(), threading.Event()
    opened: list[weakref.ref[Any]] = []
    alive: list[int] = []

    class Model:
        def explain(self, prompt: str, *_: Any, **named: Any) -> str:
            begun.set()
            gate.wait(10)
            return prompt

    def open_model(*_: Any, **named: Any) -> Model:
        alive.append(sum(each() is not None for each in opened))
        made = Model()
        opened.append(weakref.ref(made))
        return made

    def wait_told(stage: str) -> None:
        if stage == "waiting for the model":
            told.set()

    def given_up(stage: str) -> None:
        raise KeyError(stage)

    monkeypatch.setattr(serving, "_newest_train", lambda _: "")
    monkeypatch.setattr(serving, "TURN_SECONDS", 0.01)
    monkeypatch.setattr(explain, "open_model", open_model)
    model = serving.ModelAtHand(tmp_path)
    answers: list[Any] = []

    def ask(prompt: str, run: str, on_stage: Any) -> None:
        answers.append(model.explain(prompt, None, 1, run=run, on_stage=on_stage))

    slow = threading.Thread(target=ask, args=("slow", "a", lambda _: None))
    other = threading.Thread(target=ask, args=("other", "b", wait_told))
    slow.start()
    assert begun.wait(5)
    other.start()
    assert told.wait(5)
    with pytest.raises(KeyError, match="waiting for the model"):
        model.explain("third", None, 1, run="c", on_stage=given_up)
    assert alive == [0]
    gate.set()
    slow.join(5)
    other.join(5)
    assert (answers, alive) == (["slow", "other"], [0, 0])
