"""Operations that benchmarks/quality/flops.py counts are those of the passes that are made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from gradstore.capture.per_sample import GradientCapture, batch_losses

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
ROWS, LENGTH, ANSWER = 3, 24, 6


@pytest.fixture
def flops(script: Any) -> Any:
    return script("flops")


@pytest.fixture
def small(flops: Any) -> Any:
    """A shape whose every number can be counted by hand."""
    return flops.Shape(
        layers=1, hidden=2, keys=1, middle=3, vocabulary=5, rank=1,
        rows=10, length=4, answer=2, targets=3, target_length=6, target_answer=1, trained_rows=7,
    )  # fmt: skip


def test_weights_are_counted_as_by_hand(small: Any) -> None:
    # q and o 2 x 2, k and v 1 x 2, gate and up 3 x 2, down 2 x 3.
    assert small.body == 4 + 2 + 2 + 4 + 6 + 6 + 6
    assert small.head == 2 * 5
    assert small.lora == 4 + 3 + 3 + 4 + 5 + 5 + 5


def test_passes_are_counted_as_by_hand(small: Any) -> None:
    # Weights of all layers 30 + 29 for each token, the head's 10 for each target token.
    assert small.states(10, 4) == 2 * 40 * 59
    assert small.forward(10, 4, 2) == 2 * 40 * 59 + 2 * 20 * 10
    assert small.gradients(10, 4, 2) == 2 * (2 * 40 * 59 + 2 * 20 * 10) + 2 * 40 * 29
    assert small.trained(7, 4) == 2 * (2 * 28 * 59 + 2 * 28 * 10) + 2 * 28 * 29


GRADIENTS = 12_560 + 5_412  # `of_train(10)` and `of_targets()`, by the lines above
FEATURES = GRADIENTS + 2 * 8 * 29 * 13  # sjlt: eight updates a parameter of 13 rows
ONE_QUERY, THREE_QUERIES = 2 * 10 * 4096, 2 * 10 * 3 * 4096
FISHER = 2 * 10**2 * 4096 + 10**3 / 3
LOSSES = 2 * 40 * 59 + 2 * 20 * 10
STATES = 2 * (40 + 18) * 59 + 2 * 10 * 3 * 2


@pytest.mark.parametrize(
    ("method", "operations"),
    [
        ("random", 0),
        ("oracle", 0),
        ("bm25", 0),
        ("loss", LOSSES),
        ("rds_plus", STATES),
        ("near (hidden states)", STATES),
        ("bm25, round_robin", 0),
        ("tsds", STATES),
        # One query in the place of three.
        ("rds_plus, top", STATES - 2 * 10 * 2 * 2),
        ("near (hidden states), top", STATES - 2 * 10 * 2 * 2),
        ("less", FEATURES + ONE_QUERY),
        ("less, sgd", FEATURES + ONE_QUERY),
        ("less, published adam", FEATURES + ONE_QUERY),
        ("less, normalize: target", FEATURES + ONE_QUERY),
        # Of ten rows all are in the sample of 256.
        ("less, share of a step", FEATURES + ONE_QUERY + 12_560),
        ("less, round_robin", FEATURES + THREE_QUERIES),
        ("icons, a task a row", FEATURES + THREE_QUERIES),
        ("less, subspace", FEATURES + ONE_QUERY + 2 * 3**2 * 4096),
        ("less, sgd, fisher", FEATURES + ONE_QUERY + FISHER),
        ("less, sgd, fisher, round_robin", FEATURES + THREE_QUERIES + FISHER),
        ("less, checkpoints: all", 6 * (FEATURES + ONE_QUERY)),
        ("less, sgd, fisher, checkpoints: all", 6 * (FEATURES + ONE_QUERY + FISHER)),
        # Two of ten rows, and the target's direction once more.
        ("less, rerank", FEATURES + ONE_QUERY + 5_412 + 2_512 + 2 * 2 * 29),
        ("mirror", 2 * LOSSES + 8 * 5_412),
        ("mirror, relative: false", 2 * LOSSES + 8 * 5_412),
    ],
)
def test_a_method_is_counted_as_by_hand(
    flops: Any, small: Any, method: str, operations: float
) -> None:
    assert flops.selecting(method, small) == pytest.approx(operations)


def test_landmarks_are_counted_as_by_hand(flops: Any, small: Any) -> None:
    some = 10 * 12_560 + 5_412 + 2 * 8 * 29 * 103 + 2 * 100 * 4096
    outputs = LOSSES + 20 * (2 * 10 + 4 * 2 * 32 + 2 * 32**2)
    fit = 2 * 110 * 100 * 1024 + 100**3 / 3
    assert flops.selecting("landmarks, 100", small) == pytest.approx(some + outputs + fit)


def test_clusters_are_counted_as_by_hand(flops: Any, small: Any) -> None:
    # Ten rows are one cluster of three representatives, compared 41 times at most.
    states = 2 * 40 * 59 + 41 * 2 * 10 * 1 * 2
    gradients = 0.3 * 12_560 + 5_412 + 2 * 8 * 29 * 6
    counted = flops.selecting("cluster_less", small)
    assert counted == pytest.approx(states + gradients + 2 * 3 * 4096)


def test_conjugate_gradients_are_counted_at_their_limit(flops: Any, small: Any) -> None:
    # 64 rows: their gradients, a forward of tangents, and those of LoRA's own matrices.
    product = 6.4 * 12_560 + 6.4 * LOSSES + 2 * 64 * 4 * 29
    ranked = flops.selecting("less, rerank", small) + 100 * product
    assert flops.selecting("less, rerank by cg", small) == pytest.approx(ranked)


def test_kronecker_factors_are_counted_as_by_hand(flops: Any, small: Any) -> None:
    # LoRA's A: six of 1 x 2 and 1 x 3 (down); its B: 3 of 2 x 1, two of 1 x 1, two of 3 x 1.
    squares = 6 * 5 + 10 + 3 * 5 + 2 * 2 + 2 * 10
    cubes = 6 * 9 + 28 + 3 * 9 + 2 * 2 + 2 * 28
    turn = 2 * (6 * 2 * 3 + 3 * 4 + 3 * 2 * 3 + 2 * 1 * 2 + 2 * 3 * 4)
    kfac = 12_560 + 2 * 40 * squares + 9 * cubes + 2 * turn * 13
    plain = FEATURES + ONE_QUERY
    assert flops.selecting("less, sgd, kfac", small) == pytest.approx(plain + kfac)
    ekfac = kfac + 12_560 + 10 * turn
    assert flops.selecting("less, sgd, ekfac", small) == pytest.approx(plain + ekfac)


def test_other_packages_programs_are_not_counted(flops: Any, small: Any) -> None:
    assert flops.selecting("bergson trackstar", small) is None


def test_every_method_of_the_benchmarks_has_its_count(script: Any, flops: Any) -> None:
    rules, real = script("rules"), script("real")
    peers = set(script("peer").COMMANDS)
    assert set(rules.METHODS) | set(real.METHODS) | peers == set(flops.SELECTING)
    assert (flops.CHECKPOINTS, flops.TAKEN_STEPS) == (len(rules.EARLIER) + 1, rules.TRAINED_STEPS)
    assert flops.REAL.trained_rows == real.TRAINED_STEPS * flops.STEP_ROWS
    # SmolLM2-135M: 134,515,008 weights less embeddings and norms, and LoRA of rank 16.
    assert flops.REAL.body == 134_515_008 - 49_152 * 576 - 61 * 576
    assert flops.REAL.lora == 4_884_480


# ---- beside what torch counts --------------------------------------------------------------------


@pytest.fixture
def model() -> Any:
    config = LlamaConfig(
        vocab_size=96, hidden_size=48, intermediate_size=128, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(LlamaForCausalLM(config), lora)


@pytest.fixture
def shape(flops: Any) -> Any:
    return flops.Shape(
        layers=6, hidden=48, keys=24, middle=128, vocabulary=96, rank=4,
        rows=ROWS, length=LENGTH, answer=ANSWER, targets=1, target_length=LENGTH,
        target_answer=ANSWER, trained_rows=ROWS,
    )  # fmt: skip


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 96, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :-ANSWER] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def counted(work: Any) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def test_a_training_step_is_what_torch_counts(model: Any, shape: Any, batch: Any) -> None:
    model.train()
    with_states = counted(lambda: model(**batch))
    assert shape.forward(ROWS, LENGTH, LENGTH) == pytest.approx(with_states, rel=0.05)
    step = counted(lambda: model(**batch).loss.backward())
    assert shape.trained(ROWS, LENGTH) == pytest.approx(step, rel=0.05)


def test_a_pass_of_losses_is_what_torch_counts(model: Any, shape: Any, batch: Any) -> None:
    found = counted(lambda: batch_losses(model, batch))
    assert shape.forward(ROWS, LENGTH, ANSWER) == pytest.approx(found, rel=0.05)


def test_gradients_of_rows_are_what_torch_counts(model: Any, shape: Any, batch: Any) -> None:
    with GradientCapture(model) as capture:
        found = counted(lambda: capture.capture(batch, lambda slot, gradient: None))
    assert shape.of_train(ROWS) == pytest.approx(found, rel=0.05)


def test_the_shape_of_rules_is_that_of_its_model_and_rows(script: Any, flops: Any) -> None:
    run = script("rules").start(1)
    train, targets = run.data.train, run.data.targets[:8]
    shape = flops.RULES
    assert sum(p.numel() for p in run.trained) == shape.lora
    embeddings_and_norms = 160 * 512 + 9 * 160
    weights = sum(p.numel() for p in run.model.parameters())
    assert weights == shape.body + shape.lora + embeddings_and_norms
    assert shape.head == 160 * 512  # the embeddings once more
    assert (shape.rows, shape.targets) == (len(train), len(targets[0]))
    assert shape.trained_rows == flops.TAKEN_STEPS * run.batch_size
    of = [train.lengths.mean(), train.target_tokens.mean(),
          sum(t.lengths.mean() for t in targets) / 8,
          sum(t.target_tokens.mean() for t in targets) / 8]  # fmt: skip
    told = [shape.length, shape.answer, shape.target_length, shape.target_answer]
    assert told == pytest.approx(of, rel=0.03)  # a mean over eight seeds, beside one of them
