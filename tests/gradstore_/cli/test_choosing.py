"""`gradstore select`: which rows are taken, by which rule and within which budget."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from gradstore.cli.choosing import Asked
from gradstore.cli.options import Question, app
from gradstore.errors import BadInput
from gradstore.format.records import RowSet
from gradstore.scoring.choose import ChoiceOptions, select_subset
from gradstore.scoring.length_bias import length_correlation, without_length
from gradstore.scoring.pairing import checkpoint_features
from gradstore.scoring.products import InnerProduct
from gradstore.scoring.rules import SUBSETS
from gradstore.store.reader import Store, open_store


@pytest.fixture
def store(tmp_path: Path, kit: Any) -> Path:
    """40 train rows of 0 to 15 target tokens, 8 target rows; some of each are not usable."""
    path = tmp_path / "store"
    with kit.writer(path) as writer:
        kit.add(writer, "train/1", 40)
        kit.add(writer, "target/dev/1", 8)
    return path


def chosen(store: Path, *options: str) -> list[int]:
    output = store.with_name("selected.jsonl")
    result = CliRunner().invoke(app, ["select", str(store), "-o", str(output), *options])
    if result.exception is not None:
        raise result.exception
    return [json.loads(line)["row"] for line in output.read_text().splitlines()]


def cosines(store: Store) -> np.ndarray:
    """(n, t) float64 of all usable rows, nan for other train rows."""
    train, target = store.generation("train/1"), store.generation("target/dev/1")
    sides = []
    for side in (train, target):
        rows = np.full((side.rows, side.dim), np.nan)
        rows[side.usable] = side.read(0, side.rows)[side.usable]
        sides.append(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    return np.asarray(sides[0] @ sides[1][target.usable].T)


def test_round_robin_serves_the_target_rows_of_a_store_in_turn(store: Path) -> None:
    table = cosines(open_store(store))
    expected: list[int] = []
    for turn in range(20):
        ranks = np.argsort(-table[:, turn % table.shape[1]], kind="stable").tolist()
        expected.append(next(row for row in ranks if row not in expected))
    assert chosen(store, "-k", "20", "--subset", "round_robin") == expected


def test_every_rule_takes_as_many_rows_as_asked(store: Path) -> None:
    usable = set(np.flatnonzero(open_store(store).generation("train/1").usable).tolist())
    for subset in SUBSETS:
        rows = chosen(store, "-k", "7", "--subset", subset)
        assert len(set(rows)) == 7
        assert set(rows) <= usable


def test_the_neighbours_of_knn_uniform_can_be_said(store: Path) -> None:
    table = np.nan_to_num(cosines(open_store(store)), nan=-9)
    order = np.argsort(-table, axis=0, kind="stable")
    named = np.bincount(order[:3].ravel(), minlength=40)
    likeness = [sum(table[r, j] for j in range(table.shape[1]) if r in order[:3, j])
                for r in range(40)]  # fmt: skip
    expected = sorted(np.flatnonzero(named).tolist(), key=lambda r: (-named[r], -likeness[r], r))
    k = len(expected) - 2
    knn = ("--subset", "knn_uniform", "--neighbours", "3")
    assert chosen(store, "-k", str(k), *knn) == expected[:k]


def test_top_is_what_select_took_before_it_had_a_choice(store: Path) -> None:
    means = cosines(open_store(store)).mean(axis=1)
    best = np.argsort(-np.nan_to_num(means, nan=-np.inf), kind="stable")[:7].tolist()
    assert chosen(store, "-k", "7") == best == chosen(store, "-k", "7", "--subset", "top")


@pytest.mark.parametrize("subset", ["top", "round_robin"])
def test_a_token_budget_takes_the_same_order_and_ends_within_it(store: Path, subset: str) -> None:
    train = open_store(store).generation("train/1")
    every = chosen(store, "--fraction", "1", "--subset", subset)
    rows = chosen(store, "--token-budget", "120", "--subset", subset)
    assert rows == every[: len(rows)]
    assert train.tokens[rows].sum() <= 120 < train.tokens[every[: len(rows) + 1]].sum()


@pytest.mark.parametrize(("quota", "most"), [("3", 3), ("0.25", 2)])
def test_a_quota_limits_a_data_set_and_others_fill_up(
    tmp_path: Path, kit: Any, monkeypatch: pytest.MonkeyPatch, quota: str, most: int
) -> None:
    hashes = kit.rows(40).hashes
    two = RowSet(hashes, tuple((("poems", "sums")[row % 2], row) for row in range(40)))
    store = tmp_path / "two"
    with kit.writer(store) as writer:
        kit.add(writer, "target/dev/1", 8)
        monkeypatch.setattr(kit, "rows", lambda n: two)
        kit.add(writer, "train/1", 40)
    sources = open_store(store).generation("train/1").sources
    assert sources is not None
    names = [name for name, _ in sources]
    every = chosen(store, "--fraction", "1")
    first = names[every[0]]
    mine = [row for row in every if names[row] == first][:most]
    expected = [row for row in every if names[row] != first or row in mine][:8]
    assert expected != every[:8]
    assert chosen(store, "-k", "8", "--quota", f"{first}={quota}") == expected


def test_the_length_of_rows_can_be_taken_out_of_the_scores(store: Path) -> None:
    train = open_store(store).generation("train/1")
    means = cosines(open_store(store)).mean(axis=1)
    left = without_length(means, train.tokens, "regression", usable=~np.isnan(means))
    best = np.argsort(-np.nan_to_num(left, nan=-np.inf), kind="stable")[:7].tolist()
    assert best != chosen(store, "-k", "7")
    assert chosen(store, "-k", "7", "--length-correction", "regression") == best
    output = str(store.with_name("rows.jsonl"))
    result = CliRunner().invoke(app, ["select", str(store), "-o", output, "-k", "7",
                                      "--length-correction", "bins"])  # fmt: skip
    usable = ~np.isnan(means)
    before = length_correlation(means, train.tokens, usable=usable)
    assert f"scores with target tokens: {before:+.2f}, by bins" in result.output


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        (("-k", "9"), {"k": 9}),
        (("--fraction", "0.3"), {"fraction": 0.3}),
        (("--token-budget", "120"), {"token_budget": 120}),
        (
            ("--subset", "drop_harmful", "--quota", "set one=4"),
            {"subset": "drop_harmful", "quotas": {"set one": 4}},
        ),
        (("-k", "9", "--length-correction", "bins"), {"k": 9, "length_correction": "bins"}),
        (("-k", "9", "--aggregation", "mean"), {"k": 9, "aggregation": "mean"}),
        (("--subset", "drop_harmful"), {"subset": "drop_harmful"}),
        (
            ("-k", "9", "--subset", "knn_uniform", "--neighbours", "2"),
            {"k": 9, "subset": "knn_uniform", "neighbours": 2},
        ),
        (
            ("-k", "9", "--subset", "facility_location", "--subset-param", "discount=0.9"),
            {"k": 9, "subset": "facility_location", "subset_params": {"discount": 0.9}},
        ),
        (
            ("-k", "9", "--subset", "round_robin", "--preconditioner", "fisher", "--normalize",
             "target", "--damping", "0.2"),
            {"k": 9, "subset": "round_robin", "product": InnerProduct("target", "fisher", 0.2)},
        ),
    ],
)  # fmt: skip
def test_the_command_and_the_function_choose_the_same_rows(
    store: Path, kit: Any, monkeypatch: pytest.MonkeyPatch, options: Any, asked: dict[str, Any]
) -> None:
    pairs = checkpoint_features(open_store(store))
    assert chosen(store, *options) == select_subset(pairs, **asked).tolist()


def test_every_choice_of_the_command_is_one_of_the_function() -> None:
    command = set(inspect.signature(Asked).parameters)
    ours = {"count": "k", "quota": "quotas", "subset_param": "subset_params"}
    function = {*inspect.signature(select_subset).parameters, *ChoiceOptions.__annotations__}
    assert {ours.get(name, name) for name in command} <= function
    own = {"normalize", "preconditioner", "damping"}
    assert own <= set(inspect.signature(Question).parameters)
    assert own == {field.name for field in dataclasses.fields(InnerProduct)}


def test_harmful_rows_are_dropped_and_counted_with_and_without_a_budget(
    store: Path,
) -> None:
    means = cosines(open_store(store)).mean(axis=1)
    usable = np.flatnonzero(~np.isnan(means))
    helpful = [row for row in np.argsort(-means, kind="stable").tolist() if means[row] > 0]
    assert 5 < len(helpful) < len(usable)
    drop = ("--subset", "drop_harmful")
    output = store.with_name("rows.jsonl")
    result = CliRunner().invoke(app, ["select", str(store), "-o", str(output), *drop])
    told = f"{len(usable) - len(helpful)} of {len(usable)} usable rows dropped"
    assert told in result.output
    assert chosen(store, *drop) == helpful
    assert chosen(store, "-k", "5", *drop) == helpful[:5]
    tokens = open_store(store).generation("train/1").tokens
    budget = int(tokens[helpful[:4]].sum())
    within = chosen(store, "--token-budget", str(budget), *drop)
    assert within == helpful[: len(within)]
    assert len(within) >= 4
    with pytest.raises(BadInput, match=f"only {len(helpful)} of {len(usable)} usable"):
        chosen(store, "-k", str(len(usable)), *drop)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("-k", "3", "--subset", "round_robin"), "3 rows cannot serve 6 target rows"),
        (("-k", "41", "--subset", "round_robin"), "asked 41"),
        (("-k", "3", "--subset", "round_robbin"), "did you mean 'round_robin'"),
        (("-k", "3", "--token-budget", "9"), "-k 3 and --token-budget 9 are given; give one: -k N"),
        (("-k", "3", "--quota", "nosuch=1"), "quota of 'nosuch', but the train rows are of"),
        (("-k", "3", "--quota", "a=few"), "'few' is no number of rows and no share"),
        (("-k", "3", "--quota", "a"), "give SET=ROWS or SET=SHARE"),
        (("-k", "3", "--quota", "a=0"), "--quota 'a=0' is 0"),
        (("-k", "3", "--quota", "a=1.5"), "'1.5' is no number of rows and no share"),
        (("-k", "3", "--quota", "a=nan"), "'nan' is no number of rows and no share"),
        (("-k", "40", "--quota", "set one=9"), "asked 40"),
        (("-k", "20", "--quota", "set one=9"), "asked 20 rows, but the quotas leave 9"),
        (("--token-budget", "9", "--quota", "a=0.5"), "beside --token-budget"),
        (("-k", "9", "--length-correction", "log"), "choose none or regression or bins"),
        (("-k", "9", "--neighbours", "3"), "only the subset 'knn_uniform' has neighbours"),
        (("-k", "9", "--subset-param", "blur"), "give NAME=NUMBER, once for a name"),
        (("-k", "9", "--subset-param", "blur=much"), "give NAME=NUMBER, once for a name"),
        (("-k", "9", "--subset-param", "blur=1"), "no constant of the subset 'top': it has none"),
        (
            ("-k", "9", "--subset", "transport", "--subset-param", "discount=1"),
            "no constant of the subset 'transport': it has blur and train",
        ),
        (("-k", "9", "--subset", "transport", "--subset-param", "blur=0"), "blur is 0.0"),
        ((), "no budget of top is given; give one: -k N, --fraction F or --token-budget T"),
        (("--token-budget", "0"), "--token-budget is 0"),
    ],
)
def test_what_cannot_be_chosen_is_refused(store: Path, options: tuple[str, ...], told: str) -> None:
    with pytest.raises(BadInput, match=told):
        chosen(store, *options)


@pytest.mark.parametrize(
    "options",
    [
        ("-k", "3", "--subset", "round_robin"),
        ("-k", "41"),
        ("--fraction", "0.1", "--subset", "round_robin"),
        ("-k", "3", "--quota", "nosuch=1"),
        ("-k", "20", "--quota", "set one=9"),
        ("--token-budget", "30", "--quota", "nosuch=1"),
        ("--token-budget", "2", "--subset", "round_robin"),
    ],
)
def test_it_is_refused_before_rows_are_scored(
    store: Path, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradstore.scoring.influence.influence_scores", None)
    with pytest.raises(BadInput):
        chosen(store, *options)


def test_a_wrong_rule_is_told_before_a_store_is_opened() -> None:
    with pytest.raises(BadInput, match="subset is 'best'; Choose top or round_robin"):
        Asked(subset="best", count=3)


def test_another_product_ranks_by_it_in_score_and_in_every_rule(store: Path) -> None:
    from gradstore.scoring.influence import influence_scores

    pairs = checkpoint_features(open_store(store))
    product = InnerProduct("cosine", "fisher", 0.2)
    values = np.nan_to_num(influence_scores(pairs, product=product).values, nan=-np.inf)
    options = ("--preconditioner", "fisher", "--damping", "0.2")

    assert chosen(store, "-k", "9", *options) == np.argsort(-values, kind="stable")[:9].tolist()
    assert chosen(store, "-k", "9", *options) != chosen(store, "-k", "9")
    plain = chosen(store, "-k", "9", "--subset", "round_robin")
    assert chosen(store, "-k", "9", "--subset", "round_robin", *options) != plain


def test_the_fisher_metric_says_its_level_and_the_rows_that_it_is_of(store: Path) -> None:
    train = checkpoint_features(open_store(store))[0].train
    options = ("--preconditioner", "fisher", "--damping", "0.2")

    result = CliRunner().invoke(app, ["score", str(store), *options])

    level = f"{0.2 / train.dim:.3g}"  # unit rows: R has trace 1
    said = f"fisher: damping level {level} (0.2 times the mean eigenvalue), of {train.usable.sum()}"
    assert f"{said} rows" in result.stderr


def test_a_subspace_ranks_by_it_and_says_how_many_dimensions_it_has(store: Path) -> None:
    from gradstore.scoring.influence import influence_scores

    pairs = checkpoint_features(open_store(store))
    target = pairs[0].targets[0]
    usable = target.read(0, target.rows)[target.usable].astype(np.float64)
    squares = np.linalg.svd(usable / np.linalg.norm(usable, axis=1, keepdims=True))[1] ** 2
    k = int((np.cumsum(squares) < 0.9 * squares.sum()).sum()) + 1
    values = influence_scores(pairs, product=InnerProduct("cosine", "subspace")).values
    options = ("--preconditioner", "subspace")

    result = CliRunner().invoke(app, ["score", str(store), "--json", *options])

    assert f"subspace: {k} dimensions keep 90% of the {len(usable)} target rows" in result.stderr
    best = np.argsort(-np.nan_to_num(values, nan=-np.inf), kind="stable")
    assert chosen(store, "-k", "9", *options) == best[:9].tolist()
    scores = json.loads(result.stdout)["scores"]
    assert [s for s in scores if s is not None] == pytest.approx(values[~np.isnan(values)].tolist())


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--preconditioner", "kfac"), "preconditioner is 'kfac'; use none | fisher | subspace"),
        (("--normalize", "train"), "normalize is 'train'"),
        (("--damping", "-1"), "damping is -1.0"),
        (("--preconditioner", "fisher", "--damping", "0"), "fisher needs a number above 0"),
    ],
)
def test_an_unknown_product_is_told_before_a_store_is_opened(
    option: tuple[str, ...], said: str
) -> None:
    with pytest.raises(BadInput, match=said.replace("|", r"\|")):
        chosen(Path("nowhere"), "-k", "3", *option)
