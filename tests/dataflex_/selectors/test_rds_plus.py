"""RDS+ against a slow reading of the paper: position-weighted states, cosines, taking turns."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from dataflex.data.rows import Rows
from dataflex.features.embedders import CurrentModel, EmbeddingSettings
from dataflex.selectors.rds_plus import RdsPlusSelector
from gradstore.errors import BadInput
from gradstore.format.plans import UnitRange

#: Rows of 5 to 9 tokens, prompt and response.
ROWS = [{"input_ids": [3 + (7 * i + j * j) % 50 for j in range(5 + i % 5)]} for i in range(9)]


def small_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=32, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)  # type: ignore[no-untyped-call]


def padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    ids = [row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows]
    mask = [[int(j < len(row["input_ids"])) for j in range(width)] for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def by_hand(model: Any, ids: list[int], layer: int) -> np.ndarray:
    """The sum over i of i / (1 + ... + m) times the state of token i, as a unit vector."""
    with torch.no_grad():
        out = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    states = out.hidden_states[layer][0].double().numpy()
    m = len(ids)
    vector = sum((i / (m * (m + 1) / 2)) * state for i, state in enumerate(states, start=1))
    return np.asarray(vector / np.linalg.norm(vector))


@pytest.mark.parametrize("layer", [-1, 1])
def test_a_row_is_the_mean_of_its_states_with_weights_that_rise_by_position(layer: int) -> None:
    model = small_model()
    settings = RdsPlusSelector(embedding_layer=layer).embeddings
    run: Any = SimpleNamespace(model=model, run_id="run", collate=padded)
    rows = Rows("train", datasets.Dataset.from_list(ROWS))
    found = CurrentModel(run, settings).unit(rows, UnitRange(0, 0, 9), lambda _: None)
    expected = [by_hand(model, row["input_ids"], layer) for row in ROWS]
    np.testing.assert_allclose(found.features, expected, atol=1e-6)


def test_its_vectors_are_never_taken_for_those_of_another_pooling() -> None:
    run: Any = SimpleNamespace(model=small_model(), run_id="run")
    own = CurrentModel(run, RdsPlusSelector().embeddings)
    plain = CurrentModel(run, EmbeddingSettings())
    assert own.space == "hidden.layer-1.position"
    assert plain.space == "hidden.layer-1", "a store of an earlier version stays in use"


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class Plane:
    """Neighbours as vectors say them."""

    def __init__(self, n: int, q: int, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.cosines = unit(random.normal(size=(n, 5))) @ unit(random.normal(size=(q, 5))).T
        self.usable = np.ones(n, dtype=bool)
        self.usable[2] = False

    def ranked(self, k: int, allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort(-np.where(allowed[:, None], self.cosines, -9.0), axis=0, kind="stable").T
        ranked = np.where(np.arange(len(allowed)) < allowed.sum(), order, -1)[:, :k]
        return ranked, np.where(allowed, self.cosines.max(axis=1), np.nan)


def boundary(n: int, pool: list[int] | None = None) -> Any:
    def among(usable: np.ndarray) -> np.ndarray:
        allowed = np.zeros(n, dtype=bool)
        allowed[np.arange(n) if pool is None else pool] = True
        return allowed & usable

    return SimpleNamespace(among_candidates=among)


def in_turn(cosines: np.ndarray, allowed: np.ndarray, count: int, first: int) -> list[int]:
    """Every target row in turn takes its best row that is left, by looking at all of them."""
    left, taken = set(np.flatnonzero(allowed).tolist()), []
    while len(taken) < count:
        target = (first + len(taken)) % cosines.shape[1]
        taken.append(min(left, key=lambda row: (-cosines[row, target], row)))
        left.remove(taken[-1])
    return taken


@pytest.mark.parametrize("pool", [None, [1, 2, 3, 5, 8, 11, 12, 17, 19]])
@pytest.mark.parametrize("count", [1, 3, 4, 8])
def test_target_rows_take_turns_within_an_update_and_over_updates(
    count: int, pool: list[int] | None
) -> None:
    plane, selector, first = Plane(20, 3), RdsPlusSelector(), 0
    context = boundary(20, pool)
    for _ in range(4):
        allowed = context.among_candidates(plane.usable)
        chosen = selector.choose(count, context, plane)  # type: ignore[arg-type]
        assert chosen.indices.tolist() == in_turn(plane.cosines, allowed, count, first)
        assert chosen.scores is not None
        np.testing.assert_array_equal(chosen.scores, plane.cosines[chosen.indices].max(axis=1))
        first = (first + count) % 3


def test_a_resumed_selector_goes_on_with_the_same_target_row() -> None:
    plane, selector, context = Plane(20, 3), RdsPlusSelector(), boundary(20)
    selector.choose(4, context, plane)  # type: ignore[arg-type]
    resumed = RdsPlusSelector()
    resumed.restore(selector.state())
    answers = [s.choose(2, context, plane).indices.tolist() for s in (selector, resumed)]  # type: ignore[arg-type]
    assert answers[0] == answers[1]
    assert answers[0] != RdsPlusSelector().choose(2, context, plane).indices.tolist()  # type: ignore[arg-type]


def test_too_many_rows_and_bad_parameters_are_refused_before_the_model() -> None:
    train = Rows("train", datasets.Dataset.from_dict({"input_ids": [[1, 2]] * 3}))
    data: Any = SimpleNamespace(train=train)
    with pytest.raises(BadInput, match="4"):
        RdsPlusSelector().check_count(4, data)
    with pytest.raises(BadInput, match="only 1 of 3 usable rows"):
        RdsPlusSelector(unique=True).check_count(2, data)
    with pytest.raises(ValueError, match="embedding_batch_size is 0"):
        RdsPlusSelector(embedding_batch_size=0)
