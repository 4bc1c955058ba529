"""Unbalanced transport against linear programs, a general solver and closed forms."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from scipy.optimize import linprog, minimize
from scipy.special import softmax

from gradstore.errors import BadInput
from gradstore.scoring.best_rows import HeldTable, Ranked, best_of_each
from gradstore.scoring.transport import Marginals, transport, transport_plan

INFINITE = float("inf")


def all_pairs(table: npt.NDArray[np.float32]) -> Ranked:
    return best_of_each(HeldTable(table), len(table), usable=np.ones(len(table), dtype=bool))


def random_table(seed: int, n: int, t: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).uniform(-1, 1, (n, t)).astype(np.float32)


def dense(table: npt.NDArray[np.float32], marginals: Marginals) -> npt.NDArray[np.float64]:
    """The plan as an (n, t) matrix."""
    best = all_pairs(table)
    plan = transport_plan(best, len(table), marginals)
    matrix = np.zeros(table.shape)
    for target, rows in enumerate(best.rows):
        matrix[rows, target] = np.exp(plan.sent[target])
    assert np.allclose(matrix.sum(axis=1)[plan.rows], np.exp(plan.received))
    return matrix


@pytest.mark.parametrize("seed", range(5))
def test_without_blur_and_with_both_marginals_kept_it_is_the_linear_program(seed: int) -> None:
    n, t = 7, 3  # no sum of sevenths is a third: else the plan is degenerate and settles slowly
    table = random_table(seed, n, t)
    cost = 1.0 - table.astype(np.float64)
    sums = np.zeros((n + t, n * t))
    for row in range(n):
        sums[row, row * t : (row + 1) * t] = 1.0
    for target in range(t):
        sums[n + target, target::t] = 1.0
    masses = np.concatenate([np.full(n, 1 / n), np.full(t, 1 / t)])
    exact = linprog(cost.ravel(), A_eq=sums, b_eq=masses, bounds=(0, None))
    assert exact.success
    plan = dense(table, Marginals(blur=0.005, train=INFINITE))
    assert np.allclose(plan.sum(axis=1), 1 / n, atol=1e-6)
    assert np.allclose(plan.sum(axis=0), 1 / t, atol=1e-6)
    # The entropy of a plan of n t pairs costs at most blur log(n t) more.
    assert exact.fun - 1e-9 <= (plan * cost).sum() <= exact.fun + 0.005 * np.log(n * t)


@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_minimum_that_a_general_solver_finds(seed: int) -> None:
    table = random_table(seed, 4, 2)
    marginals = Marginals(blur=0.2, target=0.7, train=0.3)
    cost = 1.0 - table.astype(np.float64)

    def divergence(got: npt.NDArray[np.float64], wanted: float) -> float:
        return float((got * np.log(got / wanted) - got + wanted).sum())

    def total(logs: npt.NDArray[np.float64]) -> float:
        plan = np.exp(logs).reshape(table.shape)
        entropy = float((plan * (np.log(plan) - 1)).sum())
        return (
            float((plan * cost).sum())
            + 0.2 * entropy
            + 0.7 * divergence(plan.sum(axis=0), 1 / 2)
            + 0.3 * divergence(plan.sum(axis=1), 1 / 4)
        )

    found = minimize(total, np.full(8, -2.0), method="BFGS", options={"gtol": 1e-9})
    assert np.allclose(dense(table, marginals).ravel(), np.exp(found.x), atol=1e-5)


def test_with_free_rows_every_target_row_spreads_by_a_softmax() -> None:
    table = random_table(7, 9, 4)
    plan = dense(table, Marginals(blur=0.05, train=0.0))
    assert np.allclose(plan, softmax((table.astype(np.float64) - 1) / 0.05, axis=0) / 4)


def test_the_rows_of_the_most_mass_are_taken_however_rows_are_numbered() -> None:
    table = random_table(3, 60, 5)
    chosen = transport(all_pairs(table), 20, 60)
    assert len(set(chosen.tolist())) == 20
    mass = dense(table, Marginals()).sum(axis=1)
    assert np.allclose(np.sort(mass)[::-1][:20], mass[chosen])
    order = np.random.default_rng(0).permutation(60)
    assert order[transport(all_pairs(table[order]), 20, 60)].tolist() == chosen.tolist()


@pytest.mark.parametrize(
    ("seed", "shape", "chosen"),
    [
        (0, (300, 6), [36, 182, 207, 175, 268, 45, 294, 215, 274, 129, 269, 41]),
        (1, (500, 9), [364, 95, 373, 224, 388, 369, 173, 30, 493, 216, 167, 234]),
        (2, (200, 5), [94, 85, 153, 195, 46, 88, 166, 58, 125, 198, 21, 182]),
    ],
)
def test_the_rows_are_those_that_the_comparisons_authors_code_takes(
    seed: int, shape: tuple[int, int], chosen: list[int]
) -> None:
    """Printed by `uot_selection` of dcml-lab/targeted-instruction-selection with POT 0.9.7.

    Its distances are half of ours, so that its eps of 0.01 and reg_m2 of 0.0001 are twice as much.
    """
    drawn = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    table = np.clip(drawn / 4, -1, 1)
    marginals = Marginals(blur=0.02, train=2e-4)
    assert transport(all_pairs(table), 12, len(table), marginals=marginals).tolist() == chosen


def test_similarities_far_apart_neither_overflow_nor_vanish() -> None:
    table = np.array([[1.0], [0.5], [-1.0]], dtype=np.float32)
    plan = transport_plan(all_pairs(table), 3, Marginals(blur=1e-4, train=0.0))
    assert np.isfinite(plan.received).all()
    assert plan.received.tolist() == pytest.approx([0.0, -5000.0, -20000.0], rel=1e-6)


@pytest.mark.parametrize("marginals", [{"blur": 0.0}, {"train": -1.0}, {"target": 0.0}])
def test_weights_without_meaning_are_refused(marginals: dict[str, float]) -> None:
    with pytest.raises(BadInput, match="blur must be above 0"):
        Marginals(**marginals)


def test_a_plan_that_does_not_settle_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradstore.scoring.transport.MOST_SWEEPS", 3)
    with pytest.raises(BadInput, match="not settled in 3 sweeps; raise blur"):
        transport_plan(all_pairs(random_table(1, 8, 3)), 8, Marginals(1e-3, train=INFINITE))
