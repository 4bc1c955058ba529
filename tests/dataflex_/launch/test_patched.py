"""Tail-patch: a step by the command's own code against torch's optimizer, and what is chosen."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from dataflex.data.rows import Rows, RunData
from dataflex.launch import patched
from dataflex.launch.evaluated import Evaluation
from dataflex.launch.judged_scores import Scored
from dataflex.launch.patched import checkpoint_of, patch, rows_to_patch
from dataflex.models.trained import trained_on
from gradstore.errors import BadInput
from gradstore.export.moments import AdamMoments
from gradstore.export.token_rows import padded

TINY = Path(__file__).resolve().parents[3] / "examples" / "tiny" / "model"
RATE, CLIP = 1e-2, 0.05


def rows_of(name: str, lengths: list[int], masked: tuple[int, ...] = ()) -> Rows:
    rng, rows = np.random.default_rng(len(lengths)), []
    for number, length in enumerate(lengths):
        ids = rng.integers(3, 60, length).tolist()
        labels = [-100] * length if number in masked else [-100, -100, *ids[2:]]
        rows.append({"input_ids": ids, "labels": labels})
    return Rows(name, Dataset.from_list(rows))


@pytest.fixture
def trained() -> Any:
    """A LoRA model that took two steps of AdamW, its optimizer, and its rows."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(str(TINY), dtype=torch.float32)
    model: Any = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], RATE, weight_decay=0.0
    )
    nothing: Any = None
    train = rows_of("train", [9, 6, 7, 12, 8, 5], masked=(5,))
    targets = (rows_of("a", [8, 6, 9], masked=(1,)), rows_of("b", [7, 10]))
    data = RunData(train, targets, nothing, "default", nothing, "sft")
    for row in (0, 3):
        model(**padded([train.dataset[row]])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    args = SimpleNamespace(
        seed=1, bf16=False, fp16=False, learning_rate=RATE, max_grad_norm=CLIP, n_gpu=0,
        per_device_train_batch_size=1, gradient_accumulation_steps=1, world_size=1,
    )  # fmt: skip
    loaded = SimpleNamespace(model=model, data=data, collate=padded, training_args=args)
    return loaded, optimizer


def log_probability(model: Any, row: dict[str, Any]) -> float:
    """Token by token, from the model's logits."""
    ids, labels = row["input_ids"], row["labels"]
    with torch.no_grad():
        logs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    return sum(float(logs[i - 1, label]) for i, label in enumerate(labels) if label != -100)


def by_hand(loaded: Any, optimizer: Any, row: int, queries: list[Any]) -> np.ndarray:
    """Log-probabilities after torch's own next step on the row, on copies of model and moments."""
    model, state = copy.deepcopy(loaded.model).eval(), copy.deepcopy(optimizer.state_dict())
    parameters = [p for p in model.parameters() if p.requires_grad]
    next_step = torch.optim.AdamW(parameters, RATE, weight_decay=0.0)
    next_step.load_state_dict(state)
    model(**padded([loaded.data.train.dataset[row]])).loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, CLIP)
    next_step.step()
    return np.array([log_probability(model, query) for query in queries])


def test_the_gain_is_that_of_torchs_next_step_on_each_row_above_random_ones(
    trained: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loaded, optimizer = trained
    moments = AdamMoments.from_optimizer(optimizer, loaded.model)
    monkeypatch.setattr(patched, "checkpoint_moments", lambda folder, model: moments)
    config: Any = SimpleNamespace(output_dir=tmp_path)
    scores = np.random.default_rng(0).normal(size=(3, 6))
    scored = np.array([0, 1, 3])  # of four queries: a[0], a[2], b[0], b[1]
    before = {name: p.detach().clone() for name, p in loaded.model.named_parameters()}
    both = patch(config, loaded, tmp_path, Scored(scores, scored), k=2, seed=5)
    assert all((p == before[name]).all() for name, p in loaded.model.named_parameters())

    a, b = (rows.dataset for rows in loaded.data.targets)
    queries = [a[0], a[2], b[1]]
    usable = np.array([True] * 5 + [False])
    rows = rows_to_patch(scores, usable, 2, 5)
    start = np.array([log_probability(loaded.model.eval(), query) for query in queries])
    after = np.stack([by_hand(loaded, optimizer, row, queries) for row in range(5)], axis=1)
    expected = [
        (after[q, rows.top[q]] - start[q]).mean() - (after[q, rows.random[q]] - start[q]).mean()
        for q in range(3)
    ]
    assert both["tail_patch_log"].values == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert max(abs(value) for value in expected) > 0.01
    rises = [(np.exp(after[q, rows.top[q]]) - np.exp(start[q])).mean() for q in range(3)]
    assert both["tail_patch"].values == pytest.approx(rises, rel=1e-3, abs=0)
    assert set(both) == {"tail_patch", "tail_patch_log"}


class Stopped(Exception):
    """What ends an evaluation on its way."""


def test_a_bank_keeps_each_rows_step_and_a_stopped_evaluation_goes_on(
    trained: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loaded, _ = trained
    config: Any = SimpleNamespace(output_dir=tmp_path, llamafactory={"seed": 1},
                                  dataflex=SimpleNamespace(train_step=0))  # fmt: skip
    scored = Scored(np.random.default_rng(0).normal(size=(3, 6)), np.array([0, 1, 3]))
    stepped: list[int] = []
    most = 99

    @contextlib.contextmanager
    def counted(run: Any, rows: Any, positions: Any, *rest: Any) -> Any:
        if len(stepped) == most:
            raise Stopped
        stepped.append(int(positions[0]))
        with trained_on(run, rows, positions, *rest) as losses:
            yield losses

    monkeypatch.setattr(patched, "trained_on", counted)

    def ask(bank: Path | None, seed: int = 5, of: Scored = scored) -> Any:
        return patch(config, loaded, None, of, k=2, seed=seed, bank=bank)

    whole = ask(None)
    rows, most = set(stepped), len(stepped) + 2
    with pytest.raises(Stopped):
        ask(tmp_path / "bank")
    begun, most = set(stepped[-2:]), 99
    stepped.clear()
    assert ask(tmp_path / "bank") == whole
    assert set(stepped) == rows - begun
    stepped.clear()
    assert ask(tmp_path / "bank") == whole
    assert not stepped

    # Another rate or another start is another step.
    loaded.training_args.learning_rate = RATE / 2
    assert ask(tmp_path / "bank") != whole
    assert set(stepped) == rows
    loaded.training_args.learning_rate = RATE
    stepped.clear()
    parameter = next(p for p in loaded.model.parameters() if p.requires_grad)
    with torch.no_grad():
        parameter += 1e-3
    ask(tmp_path / "bank")
    assert set(stepped) == rows


def test_a_query_that_asks_for_a_kept_row_later_has_it_stepped_on_again(
    trained: Any, tmp_path: Path
) -> None:
    loaded, _ = trained
    config: Any = SimpleNamespace(output_dir=tmp_path, llamafactory={"seed": 1},
                                  dataflex=SimpleNamespace(train_step=0))  # fmt: skip
    values = np.random.default_rng(0).normal(size=(4, 6))
    one = Scored(values[:1], np.array([0]))
    everyone = Scored(values, np.arange(4))
    patch(config, loaded, None, one, k=3, seed=5, bank=tmp_path)
    found = patch(config, loaded, None, everyone, k=3, seed=5, bank=tmp_path)
    assert found == patch(config, loaded, None, everyone, k=3, seed=5)


def test_rows_without_a_target_token_are_neither_at_the_top_nor_drawn() -> None:
    usable = np.array([True, False, True, True])
    found = rows_to_patch(np.array([[0.0, 9.0, 1.0, 2.0]] * 50), usable, 2, 0)
    assert (found.top == [3, 2]).all()
    assert 1 not in found.random
    assert all(len(set(row)) == 2 for row in found.random.tolist())
    assert len(np.unique(found.random, axis=0)) > 1  # each query draws its own
    with pytest.raises(BadInput, match="4"):
        rows_to_patch(np.zeros((1, 4)), usable, 4, 0)


def test_a_checkpoint_without_moments_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    assert checkpoint_of([]) is None
    with pytest.raises(BadInput, match="so does the run's next step"):
        checkpoint_of([tmp_path])


def test_a_learning_rate_of_0_is_refused(trained: Any, tmp_path: Path) -> None:
    loaded, _ = trained
    loaded.training_args.learning_rate = 0.0
    config: Any = SimpleNamespace(output_dir=tmp_path)
    with pytest.raises(BadInput, match="learning_rate is 0"):
        patch(config, loaded, None, Scored(np.zeros((1, 6)), np.array([0])), k=1, seed=0)


def test_tail_patch_needs_neither_bank_nor_truth() -> None:
    assert Evaluation(store=Path("store"), metric="tail_patch").bank is None
