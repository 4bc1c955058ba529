"""Exact influence against cosines of whole gradients that plain autograd made one row at a time."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch
from gradkernels import ProjectionSpec, project

from gradstore.capture.per_sample import GradientCapture
from gradstore.errors import BadInput
from gradstore.export.direct import direct_products, target_directions
from gradstore.export.features import FeatureMap, FeatureSpec, Kind
from gradstore.export.share import StepShare
from gradstore.scoring.comparable import CheckpointFeatures
from gradstore.scoring.influence import aggregate, influence_scores
from gradstore.scoring.scan import unit_rows

TRAIN, TARGETS = 13, (3, 2)


class Held:
    """Features in memory, all rows usable."""

    def __init__(self, features: np.ndarray) -> None:
        self.features = features
        self.rows, self.dim = features.shape
        self.usable = np.ones(self.rows, dtype=bool)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.features[start:stop]


SHARE = StepShare(rows=4, max_grad_norm=1.0, tokens=9.0, norm=2.0)


def features_of(model: Any, gradients: torch.Tensor, spec: FeatureSpec, moments: Any) -> np.ndarray:
    """(n, p) whole features of whole gradients."""
    with GradientCapture(model) as capture:
        feature_map = FeatureMap(spec, capture.slots, moments)
        blocks = [
            feature_map.apply_(slot, gradients[:, slot.start : slot.start + slot.numel].float())
            for slot in capture.slots
        ]
    return torch.cat(blocks, dim=1).double().numpy()


@pytest.fixture(scope="module")
def case(llama: Any) -> dict[str, Any]:
    """A model, train and target rows, and the whole gradients of both."""
    model = llama.model()
    rows = llama.rows(TRAIN)
    # The second sub-task is two train rows, so that some cosines are large.
    targets = llama.rows(TARGETS[0], seed=6) + rows[: TARGETS[1]]
    return {
        "model": model,
        "moments": llama.moments(model),
        "rows": rows,
        "subtasks": [targets[: TARGETS[0]], targets[TARGETS[0] :]],
        "train": llama.gradients(model, rows),
        "target": llama.gradients(model, targets),
    }


def scored(case: dict[str, Any], llama: Any, spec: FeatureSpec, size: int = 4) -> np.ndarray:
    """(n, q) by the functions under test."""
    target = FeatureSpec("sign" if spec.kind == "sign" else "sgd")
    subtasks = [llama.batches(rows, 2) for rows in case["subtasks"]]
    directions = target_directions(case["model"], subtasks, target)
    assert directions.rows == TARGETS
    batches = llama.batches(case["rows"], size)
    moments = case["moments"] if spec.needs_moments else None
    return direct_products(case["model"], batches, TRAIN, directions, spec, moments)


@pytest.mark.parametrize("kind", get_args(Kind))
def test_direct_products_are_the_mean_cosines_of_whole_batch_1_features(
    llama: Any, case: dict[str, Any], kind: Kind
) -> None:
    spec, gradients = FeatureSpec(kind), case["train"]
    if kind == "adam_share":  # the marginal step of a row's share, taken by hand
        spec = FeatureSpec(kind, share=SHARE)
        counts = [sum(label != -100 for label in row["labels"][1:]) for row in case["rows"]]
        tokens = torch.tensor(counts)
        gradients = gradients * (0.5 * tokens / (tokens + 3 * 9))[:, None]
    by_hand = FeatureSpec("adam_marginal") if spec.share else spec
    train = features_of(case["model"], gradients, by_hand, case["moments"])
    target = features_of(
        case["model"], case["target"], FeatureSpec("sign" if kind == "sign" else "sgd"), None
    )
    single = unit_rows(train)[0] @ unit_rows(target)[0].T
    expected = np.stack([part.mean(axis=1) for part in np.split(single, [TARGETS[0]], axis=1)], 1)
    # A gradient of about 0 may come out with either sign: 3,712 signs, a few of which may differ.
    tolerance = 2e-3 if kind == "sign" else 1e-5
    np.testing.assert_allclose(scored(case, llama, spec), expected, atol=tolerance)


def test_the_batch_size_changes_no_cosine(llama: Any, case: dict[str, Any]) -> None:
    spec = FeatureSpec("adam_marginal")
    alone = scored(case, llama, spec, 1)
    for size in (3, 8):
        np.testing.assert_allclose(scored(case, llama, spec, size), alone, atol=1e-6)


def test_projected_scores_approach_the_direct_ones_and_agree_on_the_subtask(
    llama: Any, case: dict[str, Any]
) -> None:
    spec = FeatureSpec("sgd")
    exact = scored(case, llama, spec)
    values, best = aggregate(exact, [1, 1])
    train = features_of(case["model"], case["train"], spec, case["moments"])
    target = features_of(case["model"], case["target"], spec, None)
    d = 1 << 15
    projection = ProjectionSpec("sjlt", p=train.shape[1], d=d, seed=4)
    low = [Held(project(torch.from_numpy(x), projection).numpy()) for x in (train, target)]
    scores = influence_scores([CheckpointFeatures(low[0], (low[1],))], subtask_sizes=TARGETS)
    # A mean of cosines has at most the noise of one cosine, 1/sqrt(d); the max adds none.
    np.testing.assert_allclose(scores.values, values, atol=5 / d**0.5)
    clear = np.abs(exact[:, 0] - exact[:, 1]) > 10 / d**0.5
    assert clear.any()
    np.testing.assert_array_equal(scores.best_subtask[clear], best[clear])


def test_rows_that_cannot_be_used_or_were_not_given_are_nan(
    llama: Any, case: dict[str, Any]
) -> None:
    model = llama.model(broken=True)
    rows = [dict(row) for row in case["rows"]]
    rows[2]["labels"] = [-100] * len(rows[2]["labels"])
    rows[4]["input_ids"] = [llama.broken_token, *rows[4]["input_ids"][1:]]
    directions = target_directions(
        model, [llama.batches(case["subtasks"][0], 2)], FeatureSpec("sgd")
    )
    batches = llama.batches(rows[:8], 8)
    found = direct_products(model, batches, TRAIN, directions, FeatureSpec("sgd"))[:, 0]
    assert np.flatnonzero(np.isnan(found)).tolist() == [2, 4, *range(8, TRAIN)]
    whole = direct_products(
        model, llama.batches(case["rows"], 8), TRAIN, directions, FeatureSpec("sgd")
    )[:, 0]
    np.testing.assert_allclose(found[[0, 1, 3, 5, 6, 7]], whole[[0, 1, 3, 5, 6, 7]], atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_each_rows_cosines_are_in_the_rows_order_and_average_to_the_subtasks(
    llama: Any, case: dict[str, Any], size: int
) -> None:
    spec, rows = FeatureSpec("sgd"), [dict(row) for row in case["subtasks"][0]]
    rows[1]["labels"] = [-100] * len(rows[1]["labels"])
    subtasks = [llama.batches(part, size) for part in (rows, case["subtasks"][1])]
    backwards = [list(batches)[::-1] for batches in subtasks]
    directions = target_directions(case["model"], backwards, spec, each_row=True)
    found = direct_products(case["model"], llama.batches(case["rows"], 4), TRAIN, directions, spec)
    train = features_of(case["model"], case["train"], spec, None)
    target = features_of(case["model"], case["target"], spec, None)
    kept = [i for i in range(sum(TARGETS)) if i != 1]
    expected = unit_rows(train)[0] @ unit_rows(target)[0][kept].T
    np.testing.assert_allclose(found[:, 2:], expected, atol=1e-5)
    first = TARGETS[0] - 1
    np.testing.assert_allclose(found[:, 0], found[:, 2 : 2 + first].mean(axis=1), atol=1e-6)
    np.testing.assert_allclose(found[:, 1], found[:, 2 + first :].mean(axis=1), atol=1e-6)


def test_a_masked_target_row_is_left_out_of_its_subtask(llama: Any, case: dict[str, Any]) -> None:
    good = case["subtasks"][0]
    masked = {"input_ids": good[0]["input_ids"], "labels": [-100] * len(good[0]["labels"])}
    spec = FeatureSpec("sgd")
    alone = target_directions(case["model"], [llama.batches(good, 4)], spec)
    beside = target_directions(case["model"], [llama.batches([*good, masked], 4)], spec)
    assert beside.rows == (len(good),)
    torch.testing.assert_close(beside.matrix, alone.matrix, rtol=1e-5, atol=1e-7)


def test_a_subtask_without_a_usable_row_is_named(llama: Any, case: dict[str, Any]) -> None:
    masked = [{**row, "labels": [-100] * len(row["labels"])} for row in case["subtasks"][1]]
    subtasks = [llama.batches(case["subtasks"][0], 2), llama.batches(masked, 2)]
    with pytest.raises(BadInput, match="sub-task 1 of the target has no usable row"):
        target_directions(case["model"], subtasks, FeatureSpec("sgd"))
