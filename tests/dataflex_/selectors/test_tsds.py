"""The tsds selector against the worked numbers E18."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex.selectors import tsds as module
from dataflex.selectors.tsds import (
    Density,
    TsdsSelector,
    densities,
    distance,
    drawn,
    offline_probabilities,
    scaled_sigma,
    transport,
    transport_mass,
)
from gradstore.errors import BadInput

E18 = np.array([[0.1, 0.2, 0.9, 1.2], [0.3, 0.4, 0.5, 1.5]])
IDS = np.array([[0, 1, 2, 3], [2, 3, 1, 0]])


@pytest.mark.parametrize(
    ("density", "expected"),
    [((1, 1, 1, 1), [0.25, 0.25, 0.25, 0.25]), ((2, 2, 1, 1), [0.125, 0.125, 0.5, 0.25])],
)
def test_e18_mass_of_every_row(density: tuple[float, ...], expected: list[float]) -> None:
    found = transport(E18, np.array(density, dtype=float)[IDS], alpha=0.9, scale=5.0)
    assert found.level == pytest.approx(2.0)
    assert not found.cut_short
    mass = np.bincount(IDS.ravel(), found.mass.ravel())
    np.testing.assert_allclose(mass, expected, atol=1e-5)


def written_out(
    distances: np.ndarray, density: np.ndarray, alpha: float, scale: float
) -> tuple[np.ndarray, float]:
    """The transport letter by letter: accepted ranks one after the other, then what is left."""
    q, k = distances.shape
    filled = [1.0 / density[j, 0] for j in range(q)]
    rank, cost = [0] * q, [0.0] * q
    accepted: list[set[int]] = [{0} for _ in range(q)]
    while True:
        j = min(range(q), key=lambda i: (filled[i], i))
        s, r = filled[j], rank[j]
        accepted[j].add(r)
        if r + 1 == k:
            break
        cost[j] = distances[j, r + 1] * s - sum(
            distances[j, i] / density[j, i] for i in range(r + 1)
        )
        if alpha / scale * sum(cost) >= (1 - alpha) * q:
            break
        rank[j] += 1
        filled[j] += 1.0 / density[j, rank[j]]
    mass = np.zeros((q, k))
    for j in range(q):
        left = 1.0 / q
        for r in sorted(accepted[j]):
            mass[j, r] = min(left, 1.0 / (q * s * density[j, r]))
            left -= mass[j, r]
        if max(accepted[j]) + 1 < k:
            mass[j, max(accepted[j]) + 1] += left
    return mass, s


@settings(deadline=None)
@given(
    q=st.integers(1, 5),
    k=st.integers(1, 7),
    seed=st.integers(0, 10_000),
    alpha=st.floats(0, 1),
)
def test_the_transport_is_the_written_one_and_every_target_row_gives_its_whole_share(
    q: int, k: int, seed: int, alpha: float
) -> None:
    rng = np.random.default_rng(seed)
    distances = np.sort(rng.uniform(0, 2, (q, k)), axis=1)
    density = rng.uniform(1, 4, (q, k))
    found = transport(distances, density, alpha, 5.0)
    mass, level = written_out(distances, density, alpha, 5.0)
    assert found.level == pytest.approx(level)
    np.testing.assert_allclose(found.mass, mass, atol=1e-9)
    np.testing.assert_allclose(found.mass.sum(axis=1), 1.0 / q, atol=1e-9)


class Plane:
    """Neighbours among unit vectors in the plane, exact."""

    def __init__(self, n: int, q: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        rows, queries = (self._unit(rng.standard_normal((m, 2))) for m in (n, q))
        rows[1] = rows[0]
        self.cosines, self.all = queries @ rows.T, rows @ rows.T
        self.usable = np.ones(n, dtype=bool)
        self.widest = 0

    @staticmethod
    def _unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    def nearest(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        self.widest = max(self.widest, k)
        rows = np.argsort(-self.cosines, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(self.cosines, rows, 1), rows

    def around(self, rows: np.ndarray, k: int) -> np.ndarray:
        return -np.sort(-self.all[rows], axis=1)[:, :k]

    def around_in_sample(self, rows: np.ndarray, k: int, size: int) -> np.ndarray:
        sample = np.arange(size) * len(self.all) // size
        cosines = np.where(rows[:, None] == sample[None], -1.0, self.all[np.ix_(rows, sample)])
        return -np.sort(-cosines, axis=1)[:, :k]


def test_density_counts_near_rows_and_a_row_itself() -> None:
    plane: Any = Plane(30, 3)
    found = densities(plane, np.array([0, 1, 5]), 4, sigma=0.5)
    for row, value in zip((0, 1, 5), found, strict=True):
        near = np.sort(np.sqrt(np.maximum(0, 2 - 2 * plane.all[row])))[:4]
        assert value == pytest.approx(np.maximum(0, 1 - near**2 / 0.25).sum())
    assert found[0] == found[1] >= 2, "equal rows stand in each other's way"
    assert densities(plane, np.array([0, 1]), 4, sigma=0.0).tolist() == [1.0, 1.0]


def test_distance_is_of_unit_vectors_and_not_squared() -> None:
    np.testing.assert_allclose(distance(np.array([1.0, 0.0, -1.0, 1.0000001])), [0, 2**0.5, 2, 0])


def test_looking_at_fewer_neighbours_first_changes_nothing() -> None:
    def mass_of(plane: Any, alpha: float) -> np.ndarray:
        return transport_mass(plane, Density(plane, 400, 20, 0.75), 300, alpha, 5.0)[0]

    for alpha in (0.02, 0.9):
        plane: Any = Plane(400, 5)
        mass = mass_of(plane, alpha)
        cosines, rows = plane.nearest(300)
        density = densities(plane, np.arange(400), 20, 0.75)
        whole = transport(distance(cosines), density[rows], alpha, 5.0)
        np.testing.assert_allclose(mass, np.bincount(rows.ravel(), whole.mass.ravel(), 400))
        assert mass.sum() == pytest.approx(1.0)
    assert plane.widest == 300
    lazy: Any = Plane(400, 5)
    mass_of(lazy, 0.9)
    assert lazy.widest == 64, "a transport that stays near looks at few neighbours"


def boundary(n: int, pool: list[int] | None = None, step: int = 7) -> Any:
    candidates = np.arange(n) if pool is None else np.array(pool)

    def among(usable: np.ndarray) -> np.ndarray:
        allowed = np.zeros(n, dtype=bool)
        allowed[candidates] = True
        return allowed & usable

    train = type("Rows", (), {"__len__": lambda self: n, "sources": None,
                              "target_tokens": np.ones(n, dtype=np.int64)})()  # fmt: skip
    run = SimpleNamespace(data=SimpleNamespace(train=train))
    return SimpleNamespace(run=run, step=step, candidates=candidates, among_candidates=among)


def test_the_draw_is_seeded_by_step_and_keeps_to_the_pool() -> None:
    plane: Any = Plane(60, 4)
    options: Any = {"alpha": 0.05, "seed": 3}
    answers = [TsdsSelector(**options).choose(5, boundary(60, step=s), plane) for s in (7, 7, 8)]
    chosen = [answer.indices.tolist() for answer in answers]
    assert chosen[0] == chosen[1] != chosen[2]
    few = TsdsSelector(**options).choose(3, boundary(60, pool=[4, 5, 6]), plane)
    assert sorted(few.indices.tolist()) == [4, 5, 6]


def test_rows_of_no_mass_follow_by_nearness_when_too_few_have_any() -> None:
    """Alpha 1 keeps all mass at the first two neighbours of each target row."""
    plane: Any = Plane(60, 2)
    found = TsdsSelector(alpha=1.0).choose(12, boundary(60), plane)
    assert found.scores is not None
    with_mass = int((found.scores > 0).sum())
    assert found.numbers["topped_up"] == 12 - with_mass > 0
    assert (found.scores[with_mass:] == 0).all()
    nearest = [r for r in plane.nearest(60)[1].T.ravel().tolist()]
    order = list(dict.fromkeys(nearest))
    rest = [row for row in order if row not in found.indices[:with_mass].tolist()]
    assert found.indices[with_mass:].tolist() == rest[: 12 - with_mass]


def test_rows_are_drawn_as_often_as_their_mass_says() -> None:
    mass = np.array([0.7, 0.0, 0.2, 0.1])
    first = [int(drawn(mass, 1, np.random.default_rng(s))[0]) for s in range(3000)]
    shares = np.bincount(first, minlength=4) / 3000
    np.testing.assert_allclose(shares, mass, atol=0.03)
    assert sorted(drawn(mass, 9, np.random.default_rng(0)).tolist()) == [0, 2, 3]


def test_the_search_widens_to_max_k_where_mass_is_left() -> None:
    """Alpha 0 never ends it."""
    for max_k, widest in ((30, 30), (5000, 100)):
        plane: Any = Plane(100, 2)
        TsdsSelector(alpha=0.0, max_K=max_k).choose(3, boundary(100), plane)
        assert plane.widest == widest


class Cone(Plane):
    """Anisotropic vectors, as hidden states are: every cosine is near 1."""

    def __init__(self, n: int, q: int) -> None:
        rng = np.random.default_rng(1)
        rows, queries = (
            self._unit(np.array([10.0] + [0.0] * 8) + rng.standard_normal((m, 9))) for m in (n, q)
        )
        self.cosines, self.all = queries @ rows.T, rows @ rows.T
        self.usable, self.widest = np.ones(n, dtype=bool), 0


def test_alpha_without_effect_is_reported_and_sigma_auto_gives_it_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def masses(**params: Any) -> list[np.ndarray]:
        found = []
        for alpha in (0.85, 0.9):
            cone: Any = Cone(300, 4)
            selector = TsdsSelector(alpha=alpha, kde_K=30, max_K=60, C=1.0, **params)
            found.append(selector._of(cone, 300))
        return found

    wide = masses()
    np.testing.assert_array_equal(wide[0], wide[1], "the search ended before alpha counted")
    assert "alpha 0.85 would stop it: alpha has no effect on this selection" in caplog.text
    assert "component_params.sigma: auto" in caplog.text
    caplog.clear()
    TsdsSelector(alpha=0.0, kde_K=30, max_K=60)._of(Cone(300, 4), 300)  # type: ignore[arg-type]
    assert not caplog.records, "0 asks for all the spread there is"
    caplog.clear()
    scaled = masses(sigma="auto")
    assert not caplog.records
    assert np.abs(scaled[0] - scaled[1]).max() > 1e-3


def test_sigma_auto_is_the_median_distance_to_the_neighbour_asked_for() -> None:
    plane: Any = Plane(200, 3)
    distances = np.sort(distance(plane.all), axis=1)[:, 9]
    assert scaled_sigma(plane, 10) == pytest.approx(np.median(distances))


def test_densities_of_many_rows_are_estimated_from_a_sample(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plane: Any = Plane(2000, 2)
    angles = np.random.default_rng(4).vonmises(0.0, 4.0, 2000)  # dense at 0, thin elsewhere
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    plane.all = points @ points.T
    rows = np.arange(0, 2000, 7)
    exact = densities(plane, rows, 400, sigma=0.2)
    monkeypatch.setattr(module, "DENSITY_SAMPLE", 500)
    estimated = densities(plane, rows, 400, sigma=0.2)
    assert np.corrcoef(exact, estimated)[0, 1] > 0.95
    assert np.mean(estimated / exact) == pytest.approx(1.0, abs=0.1)


def rows_named(n: int, sources: list[tuple[str, int]] | None) -> Any:
    return type("Rows", (), {"__len__": lambda self: n, "sources": sources,
                             "target_tokens": np.ones(n, dtype=np.int64)})()  # fmt: skip


def test_probabilities_of_a_file_go_to_the_rows_that_were_kept(tmp_path: Path) -> None:
    path = tmp_path / "p.npy"
    np.save(path, np.array([0.1, 0.5, 0.0, 0.4]))
    data: Any = SimpleNamespace(train=rows_named(3, [("a", 0), ("a", 2), ("a", 3)]))
    assert offline_probabilities(path, data).tolist() == [0.1, 0.0, 0.4]
    tsds = TsdsSelector(probs_path=str(path))
    assert not tsds.needs_targets
    tsds.check_count(2, data)
    context = boundary(3)
    context.run.data = data
    assert sorted(tsds.choose(2, context, None).indices.tolist()) == [0, 2]
    with pytest.raises(BadInput, match="gives 2 of the 3 training rows a probability above 0"):
        tsds.check_count(3, data)
    later: Any = SimpleNamespace(train=rows_named(2, [("a", 0), ("a", 9)]))
    with pytest.raises(BadInput, match=r"holds 4 probabilities.*at least 10 rows"):
        offline_probabilities(path, later)


@pytest.mark.parametrize(
    ("values", "says"),
    [([[0.5, 0.5]], r"float64 \(1, 2\)"), ([0.5, -0.1], "0 or more"),
     ([0.0, 0.0], "not all 0"), ([0.5, float("nan")], "finite"), (["a"], "one number per row")],
)  # fmt: skip
def test_what_are_no_probabilities_is_refused(tmp_path: Path, values: Any, says: str) -> None:
    np.save(tmp_path / "p.npy", np.array(values))
    data: Any = SimpleNamespace(train=rows_named(2, None))
    with pytest.raises(BadInput, match=says):
        offline_probabilities(tmp_path / "p.npy", data)


def test_parameters_out_of_range_are_refused() -> None:
    for params in (
        {"max_K": 0},
        {"kde_K": -1},
        {"sigma": -0.1},
        {"sigma": "wide"},
        {"alpha": 1.5},
        {"C": 0},
    ):
        ((name, value),) = params.items()
        with pytest.raises(ValueError, match=f"{name} is {value!r}"):
            TsdsSelector(**params)  # type: ignore[arg-type]
