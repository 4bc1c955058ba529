"""Pairing of the generations scored together: a checkpoint's training rows and target sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from gradstore.errors import BadInput, ProvenanceMismatch, expect, expect_whole
from gradstore.format.layout import GRADIENT
from gradstore.format.names import space_run
from gradstore.scoring.comparable import CheckpointFeatures
from gradstore.scoring.influence import checkpoint_weights
from gradstore.store.generation import Generation
from gradstore.store.reader import Store

Which = Literal["last", "all"] | int


def checkpoint_features(
    store: Store,
    checkpoints: Which = "last",
    *,
    run: str = "",
    space: str = GRADIENT,
    targets: Sequence[str] | None = None,
    until: int | None = None,
    fewer: bool = False,
    train_set: str = "",
) -> list[CheckpointFeatures]:
    """Pair each training generation with its target sets, weighted by learning rate.

    Args:
        store: where they were committed.
        checkpoints: the newest, all of them, or how many of the newest.
        run: prefix of the generations (`gradstore_run`).
        space: whose generations; embeddings are never mixed with gradients.
        targets: target sets, in this order; None takes those of the newest checkpoint, by name. An
            empty list takes none, for what needs the training rows alone.
        until: no checkpoint of a later step is taken.
        fewer: take what there is where `checkpoints` asks for more, as a run at its beginning does.
        train_set: name of a sample of the training rows that stands for all; "" takes all.

    Returns:
        Oldest first; the weights are the recorded mean learning rates, normalised.

    Raises:
        BadInput: no such checkpoint, or a checkpoint lacks one of the sets.
    """
    trains, held = _found(store, run, space, until, train_set)
    if not trains:
        raise _nothing_to_score(store, run, space)
    chosen = _newest(sorted(trains), checkpoints, fewer)
    wanted = tuple(targets) if targets is not None else tuple(sorted(held.get(chosen[-1], {})))
    if targets is None or wanted:
        _check_targets(store, {step: list(held.get(step, {})) for step in chosen}, wanted)
    _check_kinds({step: _kind(trains[step]) for step in chosen})
    for step in chosen:
        _check_metric(trains[step], [held[step][name] for name in wanted])
    weights = checkpoint_weights([trains[s].record.learning_rate or 0.0 for s in chosen])
    return [
        CheckpointFeatures(trains[step], tuple(held[step][name] for name in wanted), float(weight))
        for step, weight in zip(chosen, weights, strict=True)
    ]


def shared_sets(store: Store, which: Which = "last", *, run: str = "") -> list[str]:
    """List the target sets of gradients that every one of the chosen checkpoints has, by name.

    Raises:
        BadInput: no such checkpoint.
    """
    chosen = [pair.train for pair in checkpoint_features(store, which, run=run, targets=[])]
    _, targets = _found(store, run, GRADIENT, None, "")
    steps = [train.step for train in chosen if isinstance(train, Generation)]
    return sorted(set.intersection(*(set(targets.get(step, {})) for step in steps)))


def _found(
    store: Store, run: str, space: str, until: int | None, train_set: str
) -> tuple[dict[int, Generation], dict[int, dict[str, Generation]]]:
    """Map each step to its training generation, and to its target generations by set."""
    expect(hasattr(store, "generations"), "store", store, "what open_store(path) returns")
    trains: dict[int, Generation] = {}
    targets: dict[int, dict[str, Generation]] = {}
    for generation in store.generations():
        if generation.space != space or generation.record.run != space_run(space, run):
            continue
        if until is not None and generation.step > until:
            continue
        if generation.set == train_set:
            trains[generation.step] = generation
        elif generation.role == "target" and not generation.record.is_sample:
            targets.setdefault(generation.step, {})[generation.set] = generation
    return trains, targets


def _nothing_to_score(store: Store, run: str, space: str) -> BadInput:
    """Build the refusal of a store without training rows; it names the spaces that are there."""
    where = f" of run {run!r}" if run else ""
    where += "" if space == GRADIENT else f" in space {space!r}"
    others = sorted({generation.space for generation in store.generations()} - {space})
    there = f" (it has generations of space {', '.join(others)})" if others else ""
    return BadInput(
        f'store "{store.path}" has no committed train generation{where}{there}; build one first.'
    )


def _check_targets(store: Store, held: Mapping[int, Sequence[str]], wanted: Sequence[str]) -> None:
    """Refuse a checkpoint, of step -> its target sets, that lacks one of the sets."""
    if not wanted:
        raise BadInput(
            f'store "{store.path}" has no target generation of step {max(held)}; build the target '
            "sets of that checkpoint first."
        )
    for step, sets in held.items():
        if missing := [name for name in wanted if name not in sets]:
            raise BadInput(
                f'store "{store.path}" has no target generation of {", ".join(missing)} at step '
                f"{step}; it has {', '.join(sorted(sets)) or 'none'}. Build them at that step, or "
                "ask for sets it has."
            )


def _kind(generation: Generation) -> str:
    """Name the kind of a generation's features, and their metric where they are in one."""
    metric = generation.record.curvature
    return generation.record.feature + (f" in the metric of {metric['kind']}" if metric else "")


def _check_metric(train: Generation, targets: Sequence[Generation]) -> None:
    """Refuse target rows in another metric than the training rows' of their checkpoint."""
    mine = train.record.curvature
    lines = [
        f"metric differs: {train.name} has {dict(mine) or None}, "
        f"{target.name} has {dict(target.record.curvature) or None}"
        for target in targets
        if target.record.curvature != mine
    ]
    if lines:
        raise ProvenanceMismatch(
            "; ".join(lines) + ". Their products mean nothing. Export both with one preconditioner "
            "and damping.",
            lines,
        )


def _check_kinds(features: Mapping[int, str]) -> None:
    """Refuse checkpoints, step -> feature kind, whose features can't be added up."""
    kinds = sorted(set(features.values()))
    if len(kinds) > 1:
        raise ProvenanceMismatch(
            f"checkpoints {list(features)} hold features of different kinds, {' and '.join(kinds)}"
            ": they can't be combined. Take checkpoints: last, or another gradstore_run."
        )


def parse_which(text: str) -> Which:
    """Parse `last`, `all` or a positive whole number, as given on a command line.

    Raises:
        BadInput: it is none of them.
    """
    if text == "last":
        return "last"
    if text == "all":
        return "all"
    if text.isdigit() and int(text) >= 1:
        return int(text)
    raise BadInput(f"checkpoints is {text!r}; choose last, all or a number of at least 1.")


def _newest(steps: list[int], which: Which, fewer: bool) -> list[int]:
    if which == "all":
        return steps
    if isinstance(which, str) and which != "last":
        raise BadInput(f"checkpoints is {which!r}; choose last, all or a number of at least 1.")
    count = 1 if which == "last" else expect_whole(which, "checkpoints")
    if count > len(steps) and not fewer:
        raise BadInput(
            f"{count} checkpoints requested, the store has {len(steps)}; "
            f"take all or a number of at most {len(steps)}."
        )
    return steps[-count:]
