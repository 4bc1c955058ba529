"""The second ranking against gradients of each row by autograd, and the Hessian of a divergence."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel

from dataflex.data.rows import Rows, RunData
from dataflex.features import direct
from dataflex.run.context import RunContext, UpdateContext
from dataflex.run.forecast import Forecast
from dataflex.selectors.base import Selection
from dataflex.selectors.by_influence import InfluenceSelector
from dataflex.selectors.cluster_less import ClusterLessSelector
from dataflex.selectors.icons import IconsSelector
from dataflex.selectors.less import LessSelector
from dataflex.selectors.ranked_again import rank_again
from dataflex.selectors.rerank import Rerank
from dataflex.selectors.row_scores import RowScores
from gradstore.errors import BadInput
from gradstore.scoring.best_rows import HeldTable, StoredTable
from gradstore.scoring.comparable import CheckpointFeatures
from gradstore.scoring.rules import PerTarget, Rule
from gradstore.scoring.selection import select_top

TRAIN, PROMPT = 18, 2


def rows_of(name: str, n: int, seed: int, masked: tuple[int, ...] = ()) -> Rows:
    """Rows of 5 to 9 tokens; those `masked` have no target."""
    rng, made = np.random.default_rng(seed), []
    for row in range(n):
        ids = rng.integers(20, 90, int(rng.integers(5, 10))).tolist()
        prompt = len(ids) if row in masked else PROMPT
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return Rows(name, Dataset.from_list(made))


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad on the right."""
    width = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, filler: int) -> torch.Tensor:
        return torch.tensor([row[key] + [filler] * (width - len(row[key])) for row in rows])

    mask = [[1] * len(r["input_ids"]) + [0] * (width - len(r["input_ids"])) for r in rows]
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100),
            "attention_mask": torch.tensor(mask)}  # fmt: skip


@pytest.fixture(scope="module")
def run() -> RunContext:
    """A model with one small adapter, 18 training rows without a target in row 4, two targets."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    base = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    lora = LoraConfig(r=1, target_modules=["q_proj", "v_proj"], layers_to_transform=[0])
    model: Any = get_peft_model(base, lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    anything: Any = None
    targets = (rows_of("a", 3, 2), rows_of("b", 4, 3))
    data = RunData(rows_of("train", TRAIN, 1, masked=(4,)), targets, anything, "default", anything,
                   "sft", anything)  # fmt: skip
    asked: Any = SimpleNamespace(dataflex=SimpleNamespace(target_subtasks=None))
    return RunContext(asked, data, collate, model, Path(), "id", 0, shows_progress=False)


def whole_gradients(run: RunContext, rows: Rows) -> Any:
    """(n, p) float64 gradients of each row's mean loss, one row at a time; 0 without a target."""
    model = run.model.eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    found = []
    for row in rows.dataset:
        labels = torch.tensor(row["labels"][1:])
        if (labels == -100).all():
            found.append(np.zeros(sum(p.numel() for p in trained)))
            continue
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        parts = torch.autograd.grad(F.cross_entropy(logits, labels), trained)
        found.append(torch.cat([part.reshape(-1) for part in parts]).double().numpy())
    return np.stack(found)


@pytest.fixture(scope="module")
def divergence_hessian(run: RunContext) -> Any:
    """(p, p) mean over rows of the Hessian of KL(now || moved) at no move: the Gauss-Newton matrix.

    By two backward passes, where the code under test takes one forward and one backward.
    """
    model, rows = run.model.eval(), run.data.train
    trained = [p for p in model.parameters() if p.requires_grad]
    batch = collate(list(rows.dataset))
    at = batch["labels"][:, 1:] != -100
    weights = 1 / (at.sum(1, keepdim=True) * (rows.target_tokens > 0).sum()).expand(at.shape)[at]
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel is differentiable once
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        moved = model(**inputs).logits[:, :-1][at].log_softmax(1)
        each = F.kl_div(moved, moved.detach(), log_target=True, reduction="none").sum(1)
        first = torch.autograd.grad((weights * each).sum(), trained, create_graph=True)
        flat = torch.cat([part.reshape(-1) for part in first])
        columns = [torch.autograd.grad(flat, trained, unit, retain_graph=True)
                   for unit in torch.eye(len(flat))]  # fmt: skip
    return np.stack([torch.cat([c.reshape(-1) for c in parts]).double() for parts in columns])


def ranked(
    selector: InfluenceSelector,
    run: RunContext,
    stored: Any,
    count: int,
    pool: Any = None,
    again: Any = None,
) -> Selection:
    """The second ranking of stored scores (n,)."""
    usable = run.data.train.target_tokens > 0
    context = UpdateContext(run, 3, 1, 2, 1e-3, None, pool)
    scores = RowScores(np.where(usable, stored, np.nan), usable, {}, again=again)
    rows = selector.take(scores.values, count, context.among_candidates(usable))
    assert selector.rerank is not None
    first = Selection(rows, scores.values[rows], tokens=7, manifest={"train": "train/3"})
    return rank_again(selector, selector.rerank, first, [scores], context)


def unit(rows: Any) -> Any:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)


STORED = np.random.default_rng(7).normal(size=TRAIN)


@pytest.mark.parametrize("normalize", ["cosine", "target", "none"])
@pytest.mark.parametrize("by", ["exact", "cg"])
def test_candidates_are_ordered_by_products_of_whole_gradients(
    run: RunContext, divergence_hessian: Any, by: str, normalize: Any
) -> None:
    cg = {"curvature_rows": TRAIN, "damping": 0.3, "tolerance": 1e-4} if by == "cg" else {}
    selector = LessSelector(
        rerank={"top": 0.5, "by": by, **cg}, normalize=normalize, gradient_type="sgd",
        tokens_per_batch=90,
    )  # fmt: skip
    found = ranked(selector, run, STORED, 4)

    train = whole_gradients(run, run.data.train)
    targets = [whole_gradients(run, rows) for rows in run.data.targets]
    directions = np.stack([(unit(t) if normalize != "none" else t).mean(0) for t in targets])
    if by == "cg":
        matrix = divergence_hessian
        along = np.einsum("qi,ij,qj->q", directions, matrix, directions) / (directions**2).sum(1)
        level = 0.3 * along.mean()
        damped = matrix + level * np.eye(len(matrix))
        directions = level * np.linalg.solve(damped, directions.T).T
        assert found.manifest["rerank"]["solved"]["level"] == pytest.approx(level, rel=1e-3)
    products = (unit(train) if normalize == "cosine" else train) @ directions.T
    candidates = np.argsort(-np.where(run.data.train.target_tokens > 0, STORED, -np.inf))[:8]
    expected = candidates[np.argsort(-products[candidates].max(axis=1))][:4]
    assert found.indices.tolist() == expected.tolist()
    assert found.scores is not None
    np.testing.assert_allclose(found.scores, products[expected].max(axis=1), rtol=2e-3)
    assert found.manifest["rerank"]["rows"] == 8
    assert found.manifest["train"] == "train/3", "what the first ranking tells stays"
    assert sum(found.manifest["won"].values()) == 4


@pytest.mark.parametrize("subset", get_args(PerTarget))
def test_a_rule_by_target_rows_asks_their_whole_gradients_of_its_own_candidates(
    run: RunContext, subset: Any
) -> None:
    selector = LessSelector(
        rerank={"top": 0.5}, subset=subset, gradient_type="sgd", tokens_per_batch=90
    )
    usable = run.data.train.target_tokens > 0
    again = np.sort(np.random.default_rng(3).permutation(np.flatnonzero(usable))[:10])
    found = ranked(selector, run, STORED, 8, again=again)

    train = unit(whole_gradients(run, run.data.train))
    each = np.concatenate([unit(whole_gradients(run, rows)) for rows in run.data.targets])
    asked = np.isin(np.arange(TRAIN), again)
    scores = np.full(TRAIN, np.nan)
    table = HeldTable(train @ each.T)
    expected = Rule(subset).choose(8, scores, table, usable=asked).tolist()
    assert found.indices.tolist() == expected
    assert found.manifest["rerank"]["rows"] == 10
    assert found.scores is not None
    assert np.isfinite(found.scores).all(), "scores are the whole target's"


def test_candidates_of_a_rule_are_those_that_it_takes_of_the_store(run: RunContext) -> None:
    rng = np.random.default_rng(5)
    pairs = [CheckpointFeatures(rng.normal(size=(TRAIN, 6)), [rng.normal(size=(3, 6)),
                                                             rng.normal(size=(4, 6))])]  # fmt: skip
    selector = LessSelector(rerank={"top": 0.7}, subset="round_robin")
    record = SimpleNamespace(adapter_hash="a")
    service: Any = SimpleNamespace(
        checkpoints=lambda *_: pairs,
        store=SimpleNamespace(generation=lambda _: SimpleNamespace(commit_sha="c", record=record)),
    )
    exported: Any = SimpleNamespace(train="train/3", targets=(), target_rows=7, tokens=0, seconds=0)
    kept: list[RowScores] = []
    context = UpdateContext(run, 3, 1, 2, 1e-3, None, None)
    chosen = selector._choose(8, context, service, exported, kept)
    usable = run.data.train.target_tokens > 0

    def taken(count: int) -> list[int]:
        rule, table = Rule("round_robin"), StoredTable(pairs)
        return rule.choose(count, np.empty(0), table, usable=usable).tolist()

    assert chosen.indices.tolist() == taken(8)
    again = Rerank(0.7).best(kept[0], 8, context).tolist()
    assert again == sorted(taken(11)), "0.7 of 17 rows"
    best = select_top(kept[0].values, 11, usable=usable).tolist()
    assert again != sorted(best), "or the candidates are the best scores"


def test_more_candidates_than_a_rule_takes_are_refused_before_the_model(
    run: RunContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    for room in ("rules", "coverage"):
        monkeypatch.setattr(f"gradstore.scoring.{room}.MOST_ROWS", 7)
    selector = LessSelector(subset="facility_location", rerank={"top": 0.5})
    LessSelector(subset="facility_location").check_count(7, run.data)
    with pytest.raises(BadInput, match=r"facility_location, 8 rows an update.* takes at most 7"):
        selector.check_count(7, run.data)


def test_with_damping_without_bound_cg_is_exact(run: RunContext) -> None:
    made = {}
    for by, more in {"exact": {}, "cg": {"damping": 1e6}}.items():
        rerank = {"top": 0.5, "by": by, **more}
        made[by] = ranked(LessSelector(rerank=rerank, gradient_type="sgd"), run, STORED, 4)
    assert made["cg"].indices.tolist() == made["exact"].indices.tolist()
    np.testing.assert_allclose(made["cg"].scores, made["exact"].scores, rtol=1e-4)  # type: ignore[arg-type]


def test_icons_votes_among_the_candidates(run: RunContext) -> None:
    selector = IconsSelector(rerank={"top": 0.4}, gradient_type="sgd")
    found = ranked(selector, run, STORED, 3)
    train = unit(whole_gradients(run, run.data.train))
    influence = np.stack(
        [train @ unit(whole_gradients(run, rows)).mean(0) for rows in run.data.targets], axis=1
    )
    usable = np.flatnonzero(run.data.train.target_tokens > 0)
    candidates = np.sort(usable[np.argsort(-STORED[usable])][:7])
    votes = (influence[candidates] >= np.quantile(influence[candidates], 1 - 3 / 7, axis=0)).sum(1)
    least = np.sort(votes)[::-1][2]
    assert (votes[np.searchsorted(candidates, found.indices)] >= least).all()


def test_rows_outside_the_pool_are_no_candidates(run: RunContext) -> None:
    pool = np.arange(6, TRAIN)
    selector = LessSelector(rerank={"top": 1.0}, gradient_type="sgd")
    found = ranked(selector, run, STORED, 12, pool)
    assert sorted(found.indices.tolist()) == pool.tolist()
    assert found.manifest["rerank"]["rows"] == 12
    assert found.numbers["rerank_kept_share"] == 1.0


def test_never_fewer_rows_are_ranked_again_than_an_update_takes(
    run: RunContext, caplog: pytest.LogCaptureFixture
) -> None:
    selector = LessSelector(rerank={"top": 0.2}, gradient_type="sgd")
    assert Rerank(0.2).candidates(17, 5) == 5
    assert Rerank(0.5).candidates(17, 5) == 8
    selector.check_count(1, run.data)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        selector.check_count(5, run.data)
    assert "rerank.top is 0.2, 3 of the 17 rows that may be chosen, and an update takes 5" in (
        caplog.text
    )
    assert "the share that an update takes, 0.29" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        LessSelector(rerank={"top": 1.0}).check_count(17, run.data)
    assert "Raise" not in caplog.text, "there is nothing above 1"
    assert "Leave out rerank, or let an update take fewer rows: it takes 1 of them" in caplog.text
    found = ranked(selector, run, STORED, 5)
    usable = np.flatnonzero(run.data.train.target_tokens > 0)
    assert set(found.indices.tolist()) == set(usable[np.argsort(-STORED[usable])][:5].tolist())


@pytest.mark.parametrize("broken", [4, 5])
@pytest.mark.parametrize("kind", [LessSelector, IconsSelector])
def test_where_candidates_have_no_gradient_the_stores_next_rows_follow(
    run: RunContext, monkeypatch: pytest.MonkeyPatch, kind: type[InfluenceSelector], broken: int
) -> None:
    """Five candidates, of which one is left, or none."""
    order = np.argsort(-STORED)
    order = order[order != 4]
    whole = direct.direct_influence

    def without(*args: Any, **kwargs: Any) -> Any:
        found = whole(*args, **kwargs)
        found.values[order[:broken]] = np.nan
        return found

    monkeypatch.setattr(direct, "direct_influence", without)
    selector = kind(rerank={"top": 0.3}, gradient_type="sgd")
    found = ranked(selector, run, STORED, 4)
    expected = order[broken : broken + 4].tolist()
    assert found.indices.tolist() == expected, "candidates that are left, then the store's"
    assert found.scores is not None
    assert np.isfinite(found.scores).tolist() == [row in order[:5] for row in expected]
    if kind is LessSelector:
        assert sum(found.manifest["won"].values()) == 5 - broken, "a row without a product"


def test_an_unsolved_system_is_told_and_its_ranking_is_taken(
    run: RunContext, caplog: pytest.LogCaptureFixture
) -> None:
    rerank = {"top": 0.5, "by": "cg", "iterations": 2, "damping": 1e-3, "tolerance": 1e-6}
    selector = LessSelector(rerank=rerank)
    assert selector.settings.gradient_type == "adam_marginal", "of the store alone"
    with caplog.at_level(logging.INFO):
        found = ranked(selector, run, STORED, 4)
    assert "conjugate gradients did not converge: 2 products over 17 rows, residual" in caplog.text
    assert "raise rerank.iterations or rerank.damping" in caplog.text
    solved = found.manifest["rerank"]["solved"]
    assert (solved["converged"], solved["iterations"], solved["rows"]) == (False, 2, 17)
    assert found.numbers["rerank_residual"] == solved["residual"] > 1e-6
    assert len(found.indices) == 4


def test_a_forecast_names_the_second_passes_and_the_most_that_they_cost(run: RunContext) -> None:
    first = [Forecast("gradients of a", 3, 3, 21, 0.3), Forecast("gradients of b", 3, 4, 28, 0.4),
             Forecast("gradients of train", 3, TRAIN, 180, 9.0, stored_bytes=99)]  # fmt: skip
    rerank = {"top": 0.5, "by": "cg", "curvature_rows": 5, "iterations": 7}
    found = LessSelector(rerank=rerank).rerank_forecasts(run, first)
    assert [(f.what, f.times, f.rows) for f in found] == [
        ("whole gradients of a", 3, 3),
        ("whole gradients of b", 3, 4),
        ("whole gradients of the best 0.5 of rows", 3, 8),
        ("Gauss-Newton products, at most", 21, 5),
    ]
    assert [f.seconds for f in found[:3]] == [0.3, 0.4, 4.0]
    assert found[3].seconds is not None
    assert found[3].seconds > 0
    assert [f.all_bytes for f in found] == [0] * 4
    assert [f.shared for f in found] == [False, False, True, True]
    exact = LessSelector(rerank={"top": 0.5}).rerank_forecasts(run, first)
    assert [f.what for f in exact] == [f.what for f in found[:3]]
    assert LessSelector().rerank_forecasts(run, first) == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rerank": {"top": 0}}, "rerank.top is 0; it must be above 0 and at most 1"),
        ({"rerank": {"top": 1.5}}, "rerank.top is 1.5"),
        ({"rerank": {"by": "ekfac"}}, "rerank.by is 'ekfac'; choose exact or cg"),
        ({"rerank": {"share": 0.1}}, "share"),
        ({"rerank": 0.1}, "rerank is 0.1; expected a mapping"),
        ({"rerank": {"by": "cg", "damping": 0}}, "rerank.damping is 0: the Gauss-Newton matrix"),
        ({"rerank": {"by": "cg", "damping": -1}}, "rerank.damping is -1"),
        ({"rerank": {"by": "cg", "iterations": 0}}, "rerank.iterations is 0"),
        ({"rerank": {"damping": 0.1}}, "rerank.damping belongs to rerank.by: cg"),
        ({"rerank": {}, "scoring": "direct"}, "scoring: direct ranks by whole gradients at once"),
        (
            {"rerank": {}, "preconditioner": "fisher", "gradient_type": "sgd"},
            "rerank.by is exact, whose products are plain",
        ),
        ({"rerank": {"by": "cg"}, "subset": "round_robin"}, "one for each target row; set by: ex"),
        ({"rerank": {}, "subset": "drop_harmful"}, "rerank gives .* but subset is drop_harmful"),
        ({"rerank": {}, "quotas": {"a": 2}}, "rerank gives .* quotas are"),
        (
            {"rerank": {}, "subset": "round_robin", "quotas": {"a": 2}},
            "rerank gives .* but subset is round_robin and quotas are",
        ),
    ],
)
def test_what_has_no_second_ranking_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LessSelector(**given)


def test_whole_clusters_have_no_second_ranking() -> None:
    with pytest.raises(ValueError, match="cluster_less takes whole clusters"):
        ClusterLessSelector(rerank={})


def test_a_store_ranked_in_a_metric_is_ranked_again_in_one() -> None:
    made = LessSelector(rerank={"by": "cg"}, preconditioner="fisher", gradient_type="sgd")
    assert made.rerank == Rerank(by="cg")
