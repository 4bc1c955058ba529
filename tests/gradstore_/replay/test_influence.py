"""Replay against retraining with torch's own optimizer, closed forms and counted memory."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradstore.errors import BadInput
from gradstore.replay import influence
from gradstore.replay.influence import replay_forwards, replay_influence
from gradstore.replay.kept import Backwards
from gradstore.replay.price import Limits, forecast, step_passes
from gradstore.replay.run import AdamW, MicroBatch, Moments, Sgd, Step, TrainingRun
from gradstore.replay.steps import Replayer, State

N, T, WORDS, WIDTH = 24, 10, 13, 8


class Low(nn.Module):
    """A frozen linear layer plus LoRA."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(2, WIDTH) * 0.4)
        self.lora_B = nn.Parameter(torch.randn(WIDTH, 2) * 0.4)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.lora_A.T @ self.lora_B.T


class Lm(nn.Module):
    """One block of causal attention; its LoRA matrices alone are trained."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH).requires_grad_(False)
        self.q, self.v = Low(), Low()
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(WIDTH, WORDS).requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        heads = [part.unflatten(-1, (2, -1)).transpose(1, 2) for part in (self.q(x), x, self.v(x))]
        seen = F.scaled_dot_product_attention(*heads, is_causal=True)
        return self.head(self.dropout(x + F.gelu(seen.transpose(1, 2).flatten(2))))


def row_losses(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").sum(1)


class Case:
    """A run: 10 steps of 2 micro-batches of 3 rows; 24 rows, so most come twice or more."""

    def __init__(self, dropout: float = 0.0) -> None:
        torch.manual_seed(0)
        self.model = Lm(dropout).double()
        self.ids = torch.randint(0, WORDS, (N, 6))
        self.query_ids = torch.randint(0, WORDS, (3, 6))
        self.order = np.random.default_rng(1).integers(0, N - 1, (T, 2, 3))  # row 23 never comes
        self.rates = [0.05 * min(1, (t + 1) / 3) * (1 - t / T) for t in range(T)]
        self.max_norm = 0.1
        self.rule = AdamW((0.8, 0.95), 1e-4, 0.1, frozenset({"q.lora_A"}))

    def trained(self) -> dict[str, Tensor]:
        return {k: v.detach().clone() for k, v in self.model.named_parameters() if v.requires_grad}

    def loss(self, parameters: Mapping[str, Tensor], ids: Tensor, weights: Tensor) -> Tensor:
        logits = functional_call(self.model, dict(parameters), (ids,))
        return (weights * row_losses(logits, ids)).sum() / (6 * 5)

    def query(self, parameters: Mapping[str, Tensor]) -> Tensor:
        logits = functional_call(self.model, dict(parameters), (self.query_ids,))
        return row_losses(logits, self.query_ids).mean()

    def queries(self, parameters: Mapping[str, Tensor]) -> Tensor:
        logits = functional_call(self.model, dict(parameters), (self.query_ids,))
        return row_losses(logits, self.query_ids)

    def run(self, **changes: Any) -> TrainingRun:
        steps = [
            Step([MicroBatch(rows, self.ids[rows]) for rows in micros], rate)
            for micros, rate in zip(self.order, self.rates, strict=True)
        ]
        given: dict[str, Any] = {"parameters": self.trained(), "loss": self.loss, "steps": steps,
                                 "row_count": N, "optimizer": self.rule,
                                 "max_grad_norm": self.max_norm}  # fmt: skip
        return TrainingRun(**{**given, **changes})

    def retrain(self, weights: Tensor) -> tuple[dict[str, Tensor], int]:
        """Trains with torch's AdamW and clipping; also counts the steps that were clipped."""
        values = {k: nn.Parameter(v) for k, v in self.trained().items()}
        groups = [
            {"params": [v], "weight_decay": 0.0 if k in self.rule.undecayed else 0.1}
            for k, v in values.items()
        ]
        optimizer = torch.optim.AdamW(groups, betas=self.rule.betas, eps=self.rule.eps)
        clipped = 0
        for micros, rate in zip(self.order, self.rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            for rows in micros:
                self.loss(values, self.ids[rows], weights[rows]).backward()
            norm = nn.utils.clip_grad_norm_(list(values.values()), self.max_norm)
            clipped += int(norm > self.max_norm)
            optimizer.step()
        return {k: v.detach() for k, v in values.items()}, clipped


@pytest.fixture
def case() -> Case:
    return Case()


def test_replay_forwards_is_torchs_own_adamw_with_clipping(case: Case) -> None:
    trained, clipped = case.retrain(torch.ones(N).double())
    assert 0 < clipped < T  # both sides of the limit
    for name, value in replay_forwards(case.run()).items():
        torch.testing.assert_close(value, trained[name], rtol=0, atol=1e-12)


def test_replay_is_what_retraining_with_a_reweighted_row_converges_to(case: Case) -> None:
    found = replay_influence(case.run(), case.query)
    assert found.shape == (N,)
    assert found.dtype == np.float64
    for row in range(N - 1):
        sides = []
        for change in (1e-4, -1e-4):
            weights = torch.ones(N).double()
            weights[row] += change
            sides.append(float(case.query(case.retrain(weights)[0])))
        slope = (sides[0] - sides[1]) / 2e-4
        assert abs(found[row] - slope) <= 1e-3 * abs(slope), row
    assert found[N - 1] == 0  # never trained on


def test_a_run_that_goes_on_is_the_second_half_of_the_whole(case: Case) -> None:
    """Moments, their step count and the parameters of a checkpoint take the place of zeros."""
    whole, at = case.run(), 4
    engine = Replayer(whole)
    state = engine.start()
    for index in range(at):
        gradient = engine.gradient(state.vectors[0], whole.steps[index].batches)
        state = engine.advance(state, gradient, index)
    parameters, first, second = (engine.named(vector) for vector in state.vectors)
    rest = dataclasses.replace(
        whole,
        parameters=parameters,
        moments=Moments(first, second, at),
        steps=whole.steps[at:],
        ended=replay_forwards(whole),
    )
    for name, value in replay_forwards(rest).items():
        torch.testing.assert_close(value, replay_forwards(whole)[name], rtol=0, atol=1e-15)
    weights = torch.ones(N).double()
    found, slopes = replay_influence(rest, case.query), np.zeros(N)

    def reweighted(parameters: Mapping[str, Tensor], inputs: Any, ones: Tensor) -> Tensor:
        rows, ids = inputs
        return case.loss(parameters, ids, ones * weights[rows])

    named = [
        Step([MicroBatch(b.rows, (b.rows, b.inputs)) for b in step.batches], step.learning_rate)
        for step in rest.steps
    ]
    again = dataclasses.replace(rest, steps=named, loss=reweighted, ended=None)
    for row in range(N):
        sides = []
        for change in (1e-4, -1e-4):
            weights[row] = 1 + change
            sides.append(float(case.query(replay_forwards(again))))
        weights[row] = 1
        slopes[row] = (sides[0] - sides[1]) / 2e-4
    np.testing.assert_allclose(found, slopes, rtol=1e-3, atol=1e-9)


def test_a_run_that_ended_elsewhere_is_refused(case: Case) -> None:
    ended, _ = case.retrain(torch.ones(N).double())
    replay_influence(case.run(ended=ended), case.query)
    other = {name: value + 1e-3 for name, value in ended.items()}
    with pytest.raises(BadInput, match=r"ends .* away from where the real one did"):
        replay_influence(case.run(ended=other), case.query)
    with pytest.raises(BadInput, match=r"ends .* away from where the real one did"):
        replay_forwards(case.run(ended=other))


@pytest.mark.parametrize("queries", [1, 3])
def test_every_pass_over_a_step_is_told(case: Case, queries: int) -> None:
    told: list[int] = []
    query = case.query if queries == 1 else case.queries
    replay_influence(case.run(), query, tell=told.append)
    assert sum(told) == step_passes(case.run(), queries=queries) == T * (2 + queries)


@pytest.mark.parametrize("segment", [1, 2, 3, 7, 10, 99])
def test_the_size_of_segments_does_not_change_the_result(case: Case, segment: int) -> None:
    run = case.run()
    expected = replay_influence(run, case.query)
    found = replay_influence(run, case.query, segment=segment)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-14)


class Killed(Exception):
    pass


class Memory:
    """What a process kept before it was killed at its n-th piece."""

    def __init__(self, pieces: int) -> None:
        self.pieces = pieces
        self.states: dict[int, State] = {}
        self.done: Backwards | None = None

    def state(self, number: int) -> State | None:
        return self.states.get(number)

    def keep_state(self, number: int, state: State) -> None:
        self.count()
        self.states[number] = state

    def backwards(self) -> Backwards | None:
        return self.done

    def keep_backwards(self, done: Backwards) -> None:
        self.count()
        self.done = done

    def count(self) -> None:
        if self.pieces == 0:
            raise Killed
        self.pieces -= 1


@pytest.mark.parametrize("pieces", range(6))
def test_a_replay_killed_in_any_segment_goes_on_from_it_to_the_same_bits(
    case: Case, monkeypatch: pytest.MonkeyPatch, pieces: int
) -> None:
    whole = replay_influence(case.run(), case.queries, segment=4)  # 4, 4 and 2 steps
    kept, told = Memory(pieces), []
    with pytest.raises(Killed):
        replay_influence(case.run(), case.queries, segment=4, kept=kept)
    kept.pieces = 99
    taken: list[int] = []
    advance = Replayer.advance
    monkeypatch.setattr(
        Replayer, "advance", lambda self, *given: (taken.append(1), advance(self, *given))[1]
    )
    found = replay_influence(case.run(), case.queries, segment=4, kept=kept, tell=told.append)
    assert (found == whole).all()
    assert sum(told) == step_passes(case.run(), queries=3)
    assert len(taken) == [20, 16, 12, 10, 8, 4][pieces]


def test_several_queries_are_their_single_replays(case: Case) -> None:
    run = case.run()
    together = replay_influence(run, case.queries)
    assert together.shape == (3, N)
    for i in range(3):
        alone = replay_influence(run, lambda p, i=i: case.queries(p)[i])  # type: ignore[misc]
        np.testing.assert_allclose(together[i], alone, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(together.mean(0), replay_influence(run, case.query), atol=1e-12)


def test_a_matrix_whose_gradients_are_exactly_zero_at_first_gives_finite_influence(
    case: Case,
) -> None:
    """LoRA starts with B at 0: A's first gradient, and its second moment, are 0."""
    start = {k: v * ("lora_B" not in k) for k, v in case.trained().items()}
    found = replay_influence(case.run(parameters=start), case.query)
    assert np.isfinite(found).all()
    assert found[: N - 1].any()


def test_sgd_on_a_linear_model_has_its_closed_form() -> None:
    """One parameter, rows (x, y), loss w (x theta - y)^2 / 2: each step is a linear map.

    theta' = theta - r w x (x theta - y), so d theta_T / d w_i is the sum over the row's steps of
    -r x (x theta - y) times the product of later (1 - r x^2).
    """
    rows = [(2.0, 1.0), (-1.0, 3.0), (0.5, -2.0)]
    order, rate, theta = [0, 1, 0, 2], 0.1, 0.7
    slopes = np.zeros(3)
    at = theta
    for row in order:
        x, y = rows[row]
        slopes *= 1 - rate * x * x
        slopes[row] -= rate * x * (x * at - y)
        at -= rate * x * (x * at - y)

    def loss(parameters: Mapping[str, Tensor], inputs: tuple[float, float], w: Tensor) -> Tensor:
        x, y = inputs
        return (w * (x * parameters["theta"] - y) ** 2).sum() / 2

    steps = [Step([MicroBatch(np.array([i]), rows[i])], rate) for i in order]
    start = {"theta": torch.tensor([theta], dtype=torch.float64)}
    run = TrainingRun(start, loss, steps, 3, Sgd())
    found = replay_influence(run, lambda p: 5 * p["theta"].sum())
    np.testing.assert_allclose(found, 5 * slopes, rtol=1e-12)


@pytest.mark.parametrize(("steps", "segment"), [(10, None), (10, 1), (10, 4), (10, 10), (40, None)])
def test_no_more_states_are_alive_than_forecast(
    case: Case, monkeypatch: pytest.MonkeyPatch, steps: int, segment: int | None
) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0
    advance = Replayer.advance

    def counted(self: Replayer, *args: Any) -> Any:
        nonlocal most
        made = advance(self, *args)
        alive.add(made)
        most = max(most, len(alive))
        return made

    monkeypatch.setattr(Replayer, "advance", counted)
    run = case.run()
    run = dataclasses.replace(run, steps=(list(run.steps) * 4)[:steps])
    replay_influence(run, case.query, segment=segment)
    bound = forecast(run, segment=segment).kept_states
    assert most <= bound
    if segment is None:
        assert bound <= 2 * np.ceil(np.sqrt(steps)) + 1


def test_dropout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(dropout=0.3)
    with pytest.raises(BadInput, match=r"not deterministic.*first micro-batch.*lora_dropout"):
        replay_influence(case.run(), case.query)
    # What the first micro-batch does not show, the states of a segment do.
    monkeypatch.setattr(influence, "_check_run", lambda engine: None)
    with pytest.raises(BadInput, match=r"not deterministic: the state after step"):
        replay_influence(case.run(), case.query)


def test_a_run_above_the_limits_is_refused_with_its_price_before_it_trains(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Replayer, "advance", lambda *_: pytest.fail("training began"))
    with pytest.raises(BadInput, match=r"10 steps would take about .* s \(limit 1e-09 s\)"):
        replay_influence(case.run(), case.query, limits=Limits(seconds=1e-9))
    with pytest.raises(BadInput, match=r"KiB for 8 states \(limit 10 B\)"):
        replay_influence(case.run(), case.query, limits=Limits(state_bytes=10))


class Once(torch.autograd.Function):
    """A kernel of which no second derivative is known."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, given: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return given * x.cos()


def test_what_has_no_second_derivative_is_refused(case: Case) -> None:
    def fused(parameters: Mapping[str, Tensor], ids: Tensor, weights: Tensor) -> Tensor:
        logits = functional_call(case.model, dict(parameters), (ids,))
        return (weights * Once.apply(row_losses(logits, ids))).sum()  # type: ignore[no-any-return]

    def flash(parameters: Mapping[str, Tensor], ids: Tensor, weights: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return case.loss(parameters, ids, weights)

    with pytest.raises(BadInput, match="autograd can differentiate twice"):
        replay_influence(case.run(loss=fused), case.query)
    with pytest.raises(BadInput, match=r"second derivatives.*flash.*eager"):
        replay_influence(case.run(loss=flash), case.query)


class Hidden(torch.autograd.Function):
    """A kernel that autograd takes for differentiable twice, and that is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> Tensor:  # type: ignore[override]
        return given.detach() * 2


def test_a_loss_that_is_no_weighted_sum_or_hides_its_derivative_is_refused(case: Case) -> None:
    def hidden(parameters: Mapping[str, Tensor], ids: Tensor, weights: Tensor) -> Tensor:
        logits = functional_call(case.model, dict(parameters), (ids,))
        return (weights * row_losses(logits * 0.5 + Hidden.apply(logits), ids)).sum()

    def normalised(parameters: Mapping[str, Tensor], ids: Tensor, weights: Tensor) -> Tensor:
        return case.loss(parameters, ids, weights) / weights.sum() ** 0.5

    for loss in (hidden, normalised):
        with pytest.raises(BadInput, match="doubling the weights of the first micro-batch"):
            replay_influence(case.run(loss=loss), case.query)


def test_losses_that_do_not_follow_weights_or_parameters_are_refused(case: Case) -> None:
    def unweighted(parameters: Mapping[str, Tensor], ids: Tensor, weights: Tensor) -> Tensor:
        return case.loss(parameters, ids, torch.ones_like(weights))

    def constant(parameters: Mapping[str, Tensor], ids: Tensor, weights: Tensor) -> Tensor:
        return case.loss(case.trained(), ids, weights).detach()

    with pytest.raises(BadInput, match="does not depend on the rows' weights"):
        replay_influence(case.run(loss=unweighted), case.query)
    with pytest.raises(BadInput, match="depends on the parameters"):
        replay_influence(case.run(loss=constant), case.query)
    with pytest.raises(BadInput, match="query's loss does not depend"):
        replay_influence(case.run(), lambda parameters: torch.tensor(1.0))
    with pytest.raises(BadInput, match="query's loss is"):
        replay_influence(case.run(), lambda parameters: case.query(parameters) * torch.nan)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameters": {}}, "parameters is 0"),
        ({"row_count": 5}, "row_count is 5"),
        ({"steps": []}, "steps is 0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm is -1.0"),
        ({"optimizer": AdamW(undecayed=frozenset({"no"}))}, "undecayed is 'no'"),
        ({"optimizer": AdamW(eps=0.0)}, "eps above 0"),
        ({"ended": {}}, "ended is 'q.lora_A"),
        ({"moments": Moments({}, {}, 3)}, "moments.first is"),
        ({"moments": Moments({}, {}, 0)}, "moments.steps is 0"),
        ({"moments": Moments({}, {}, 3), "optimizer": Sgd()}, "none to Sgd"),
    ],
)
def test_a_run_that_cannot_be_is_refused(case: Case, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        case.run(**changes)
