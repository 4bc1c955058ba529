"""Online selection against explicit gradients and brute force; candidates, turns, resume."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dataflex.data.rows import Rows
from dataflex.run.context import UpdateContext
from dataflex.run.ranks import Ranks
from dataflex.selectors.online import OnlineSelector
from gradstore.errors import BadInput
from gradstore.export.room import Room
from gradstore.export.token_rows import padded

N = 30


def small_model() -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, pad_token_id=0,
    )  # fmt: skip
    base = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    model: Any = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model.double()


def made(n: int, seed: int, name: str) -> Rows:
    """Rows of 5 to 10 tokens; the first two are the prompt. Row 7 of the training set is masked."""
    random = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        ids = random.integers(3, 60, random.integers(5, 11)).tolist()
        labels = [-100] * 2 + ids[2:]
        rows.append({"input_ids": ids, "labels": [-100] * len(ids) if i == 7 and n > 8 else labels})
    return Rows(name, datasets.Dataset.from_list(rows))


def context(step: int = 4, model: Any = None, pool: list[int] | None = None) -> UpdateContext:
    data: Any = SimpleNamespace(
        train=made(N, 0, "train"), targets=(made(3, 1, "a"), made(2, 2, "b"))
    )
    run: Any = SimpleNamespace(
        data=data, model=model or small_model(), collate=padded, ranks=Ranks(), autocast="off",
        shows_progress=False, whole_room=Room(),
    )  # fmt: skip
    some = None if pool is None else np.array(pool)
    return UpdateContext(run, step, 1, 9, 1e-3, None, some)


def started(at: UpdateContext, **params: Any) -> OnlineSelector:
    selector = OnlineSelector(**params)
    selector.start(at.run)
    return selector


def gradients(model: Any, rows: Rows) -> np.ndarray:
    """(n, p) float64 by autograd, row by row."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    found = []
    for row in rows.dataset:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
        if (labels == -100).all():
            found.append(np.zeros(sum(p.numel() for p in parameters)))
            continue
        loss = F.cross_entropy(model(input_ids=ids).logits[0, :-1], labels)
        gradient = torch.autograd.grad(loss, parameters)
        found.append(torch.cat([part.reshape(-1) for part in gradient]).double().numpy())
    return np.stack(found)


def by_hand(
    g: np.ndarray, direction: np.ndarray, rows: np.ndarray, k: int, redundancy: float, cosine: bool
) -> set[int]:
    """Greedy over whole gradients: each time the row after which the set is worth most."""
    lengths = np.linalg.norm(g[rows], axis=1)
    scaled = g[rows] / (lengths[:, None] if cosine else np.sqrt((lengths**2).mean()))
    unit, chosen = direction / np.linalg.norm(direction), []
    for _ in range(k):

        def worth(i: int) -> float:
            mean = scaled[[*chosen, i]].sum(axis=0) / k
            return float(mean @ unit - redundancy / 2 * mean @ mean)

        chosen.append(max((i for i in range(len(rows)) if i not in chosen), key=worth))
    return set(rows[chosen].tolist())


@pytest.mark.parametrize("tokens", [None, 40])
@pytest.mark.parametrize(
    ("redundancy", "product"), [(0.0, "dot"), (1.0, "dot"), (4.0, "dot"), (1.0, "cosine")]
)
def test_the_rows_chosen_are_those_of_explicit_gradients_and_brute_force(
    redundancy: float, product: Any, tokens: int | None
) -> None:
    """In groups of 4, 4 and 1, in one pass a group or in several."""
    at = context()
    selector = started(
        at, candidates=3, group_size=4, redundancy=redundancy, product=product,
        tokens_per_batch=tokens,
    )  # fmt: skip
    answer = selector.select(9, at)
    g = gradients(at.run.model, at.run.data.train)
    sets = [gradients(at.run.model, rows) for rows in at.run.data.targets]
    means = [(t / np.linalg.norm(t, axis=1, keepdims=True)).mean(axis=0) for t in sets]
    direction = np.mean(means, axis=0)
    drawn = np.random.default_rng([42, 0]).permutation(np.delete(np.arange(N), 7))[:27]
    assert len(set(answer.indices.tolist())) == 9
    for start, stop, first, k in ((0, 12, 0, 4), (12, 24, 4, 4), (24, 27, 8, 1)):
        expected = by_hand(g, direction, drawn[start:stop], k, redundancy, product == "cosine")
        assert set(answer.indices[first : first + k].tolist()) == expected
    assert answer.scores is not None
    if product == "cosine":
        cosines = g @ direction / np.linalg.norm(g, axis=1).clip(1e-30) / np.linalg.norm(direction)
        np.testing.assert_allclose(answer.scores, cosines[answer.indices], atol=1e-6)
    assert answer.numbers["candidates"] == 27
    assert sum(answer.manifest["all_scores"]["counts"]) == 27


def test_in_the_optimizers_space_gradients_are_divided_by_the_root_of_adams_second_moment() -> None:
    at = context()
    model, train = at.run.model, at.run.data.train
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.0, betas=(0.9, 0.99), eps=1e-6)
    for rows in ([0, 1], [2, 3], [4, 5]):
        batch = padded([train.dataset[i] for i in rows])
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    at = replace(at, optimizer=optimizer)
    plain = started(at, candidates=3, group_size=9).select(9, at)
    answer = started(at, candidates=3, group_size=9, space="optimizer").select(9, at)
    v = [optimizer.state[p]["exp_avg_sq"].reshape(-1) for p in parameters]
    scale = (1 / ((0.99 * torch.cat(v) / (1 - 0.99**4)).sqrt() + 1e-6)).double().numpy()
    sets = [gradients(model, rows) for rows in at.run.data.targets]
    means = [(t / np.linalg.norm(t, axis=1, keepdims=True)).mean(axis=0) for t in sets]
    drawn = np.random.default_rng([42, 0]).permutation(np.delete(np.arange(N), 7))[:27]
    scaled = gradients(model, train) * scale
    expected = by_hand(scaled, np.mean(means, axis=0), drawn, 9, 1.0, cosine=False)
    assert set(answer.indices.tolist()) == expected
    assert set(answer.indices.tolist()) != set(plain.indices.tolist())
    assert OnlineSelector(space="optimizer").needs_moments
    assert not OnlineSelector().needs_moments


def test_every_row_is_a_candidate_once_a_pass_and_no_row_is_its_own_rival() -> None:
    selector, allowed = OnlineSelector(candidates=2), np.delete(np.arange(N), 7)
    passes: list[list[int]] = [[]]
    for _ in range(7):
        drawn = selector._draw(allowed, 8).tolist()
        assert len(set(drawn)) == 8
        if len(passes[-1]) + 8 > 29:
            passes.append([])
        passes[-1] += drawn
    assert [len(found) for found in passes] == [24, 24, 8]
    assert all(len(set(found)) == len(found) for found in passes)
    assert passes[0] != passes[1], "another order in every pass"


def test_the_target_is_looked_at_again_after_its_interval() -> None:
    at = context(step=4)
    selector = started(at, target_interval=3)
    first = selector.select(2, at)
    for step, looks in ((5, False), (6, False), (7, True), (9, False), (10, True)):
        before = selector._direction.copy()
        with torch.no_grad():
            for parameter in at.run.model.parameters():
                if parameter.requires_grad:
                    parameter *= 1.1
        found = selector.select(2, context(step, at.run.model))
        assert (selector._direction != before).any() == looks
        assert (found.tokens > first.tokens / 2) or not looks
    assert selector._looked == 10


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_a_resumed_run_chooses_what_the_whole_run_chooses(temperature: float) -> None:
    at = context()
    whole = started(at, temperature=temperature, target_interval=5)
    whole.select(3, at)
    with torch.no_grad():
        next(p for p in at.run.model.parameters() if p.requires_grad).mul_(2.0)
    later = context(5, at.run.model)
    resumed = started(later, temperature=temperature, target_interval=5)
    resumed.restore(whole.state())
    answers = [one.select(3, later).indices.tolist() for one in (whole, resumed)]
    assert answers[0] == answers[1]
    fresh = started(later, temperature=temperature, target_interval=5)
    assert fresh.select(3, later).indices.tolist() != answers[0]


def test_a_draw_depends_on_the_temperature_and_the_step_alone() -> None:
    def chosen(step: int, temperature: float) -> list[int]:
        at = context(step)
        return started(at, temperature=temperature).select(3, at).indices.tolist()

    assert chosen(4, 0.0) == chosen(5, 0.0)
    assert chosen(4, 50.0) == chosen(4, 50.0)
    assert chosen(4, 50.0) != chosen(5, 50.0)


def test_only_rows_of_the_pool_are_candidates() -> None:
    pool = [1, 3, 4, 7, 9, 12, 15, 20, 22]
    at = context(pool=pool)
    answer = started(at, candidates=2).select(4, at)
    assert set(answer.indices.tolist()) < set(pool) - {7}
    with pytest.raises(BadInput, match="10 candidates requested, 8 rows can be chosen"):
        started(at, candidates=2).select(5, at)


def test_candidates_whose_gradients_are_not_finite_are_never_chosen() -> None:
    at = context()
    train = at.run.data.train
    bad = {int(i) for i in np.flatnonzero([59 in row["input_ids"] for row in train.dataset])}
    assert bad
    at.run.model.get_input_embeddings().weight.data[59] = torch.inf
    selector = started(at, candidates=3)
    answer = selector.select(9, at)
    assert not bad & set(answer.indices.tolist())
    assert 0 < answer.skipped["non_finite"] <= len(bad)
    assert np.isfinite(np.asarray(answer.scores)).all()


def test_what_cannot_be_done_is_refused_before_the_model() -> None:
    data = context().run.data
    OnlineSelector(candidates=4).check_count(7, data)
    with pytest.raises(BadInput, match=r"the 8 rows of an update are chosen from 32, but 29"):
        OnlineSelector(candidates=4).check_count(8, data)
    for params, says in (({"candidates": 1}, "candidates is 1"), ({"redundancy": -1}, "redundancy"),
                         ({"temperature": float("nan")}, "temperature"),
                         ({"product": "sum"}, "product is 'sum'")):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            OnlineSelector(**params)  # type: ignore[arg-type]


def test_a_forecast_counts_the_looks_at_the_target_and_the_candidates_of_every_step() -> None:
    at = context()
    selector = OnlineSelector(candidates=2, target_interval=10)
    selector.check_count(4, at.run.data)
    found = selector.forecasts(at.run, list(range(10, 45)))
    assert [(f.what, f.times, f.rows) for f in found] == [
        ("gradients of a", 4, 3), ("gradients of b", 4, 2), ("gradients of candidates", 35, 8),
    ]  # fmt: skip
    assert all((f.seconds or 0) > 0 for f in found)
