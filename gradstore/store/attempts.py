"""Choice of a generation's plan: one to reuse or resume, a new attempt, or a refusal."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import chain
from typing import get_args

from gradstore.errors import BadInput, DamagedFile, Fault, ProvenanceMismatch, TooLarge
from gradstore.export.share import StepShare
from gradstore.format.commits import Commit
from gradstore.format.layout import GRADIENT, dtype_of_role, plan_path
from gradstore.format.names import GenerationName, Role, space_run
from gradstore.format.plans import Plan
from gradstore.format.provenance import Difference, compare, refuse
from gradstore.format.records import LOADED_FROM, GenerationRecord
from gradstore.storage.local import StoreFiles
from gradstore.storage.reading import ReadFiles
from gradstore.store.own_units import quarantine_plan
from gradstore.store.ownership import check_step
from gradstore.store.reader import Store

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlanChoice:
    """A plan, and how far it got.

    Attributes:
        plan: the plan.
        sha256: its seal.
        committed: its commit, if it is complete.
        resumed: True when the plan lay on disk before.
    """

    plan: Plan
    sha256: str
    committed: Commit | None = None
    resumed: bool = False


def choose_plan(
    files: StoreFiles, store: Store, wanted: Plan, before: Collection[str] | None = None
) -> PlanChoice:
    """Decide between reuse, resume and a new attempt.

    Args:
        files: the store's files.
        store: today's view.
        wanted: the plan of a first attempt.
        before: of a worker among others, the generations from before they began: those that came
            since are theirs, and are not superseded.

    Raises:
        BadInput: d is not the projection's, or the name lacks the prefix of its space.
        ProvenanceMismatch: other rows, d, dtype or optimizer step than earlier generations, a
            name of another run or space, or another state than the other workers have.
    """
    record, dim = wanted.record, wanted.dim
    if record.projection.get("d", dim) != dim:
        raise BadInput(
            f"{record.name}: the projection gives d={record.projection['d']}, not {dim}; "
            "begin the generation with the d of its projection"
        )
    _check_prefix(store, wanted)
    planned = readable_plans(files, store, mend=before is None, wanted=record.parsed)
    _check_beside(store, planned, wanted)
    if share := record.feature_options.get("share"):
        check_step(store, StepShare(**share).step, run=record.run)
    base = record.parsed
    used = [
        name.attempt
        for name in map(GenerationName.parse, [*planned, *ever_committed(store)])
        if name.base() == base
    ]
    current = _current(store, base)
    if current is not None:
        commit, plan = current
        if plan.record.run_id != record.run_id:
            raise _other_run(store, plan.record, record)
        if plan.identity() == wanted.identity():
            return PlanChoice(plan, commit.plan_sha256, commit, resumed=True)
    attempt = max(used, default=0)
    while plan_read := _unlisted(files, base.with_attempt(attempt + 1)):
        attempt += 1
        planned[plan_read[0].name] = plan_read
    newest = planned.get(str(base.with_attempt(attempt))) if attempt else None
    if newest is not None:
        plan, sha = newest
        if plan.record.run_id == record.run_id and plan.identity() == wanted.identity():
            return PlanChoice(plan, sha, resumed=True)
    theirs = newest or current
    if theirs and before is not None and str(base.with_attempt(attempt)) not in before:
        raise _other_state(store, next(each for each in theirs if isinstance(each, Plan)), wanted)
    name = str(base.with_attempt(attempt + 1))
    if attempt:
        _log.warning("%s was made from another state before; now written as %s", base, name)
    plan = replace(wanted, name=name)
    return PlanChoice(plan, plan.sha256)


def check_plan(files: ReadFiles, store: Store, wanted: Plan) -> None:
    """Refuse a plan that can't stand beside what a store has, whoever chose it.

    Args:
        files: the store's files.
        store: today's view.
        wanted: the plan, with its attempt.

    Raises:
        BadInput: its name lacks the prefix of its space.
        ProvenanceMismatch: other rows, d or dtype than earlier generations, a name of another run
            or space, or another plan of this name; lists every difference.
        DamagedFile: a plan that is not committed is damaged.
    """
    _check_prefix(store, wanted)
    planned = readable_plans(files, store, mend=False, wanted=wanted.record.parsed)
    if wanted.name in planned:
        theirs = planned.pop(wanted.name)[0]
        if differences := compare(_compared(theirs), _compared(wanted)):
            hint = "give every writer the same CONFIG, checkpoints and data"
            raise refuse(str(store.path), differences, hint=hint)
    _check_beside(store, planned, wanted)
    current = _current(store, wanted.record.parsed)
    if current is not None and current[1].record.run_id != wanted.record.run_id:
        raise _other_run(store, current[1].record, wanted.record)


def _compared(plan: Plan) -> dict[str, object]:
    return {**plan.identity(), "run_id": plan.record.run_id, "unit_rows": plan.unit_rows,
            "losses": plan.losses}  # fmt: skip


def warn_of_libraries(store: Store, plan: Plan) -> None:
    """Warn when library versions differ from those of the space's newest generation."""
    for commit in reversed(store.live_commits()):
        before = store.generation(commit.generation)
        if before.space == plan.space:
            for difference in compare(_versions(before.record), _versions(plan.record)):
                _log.warning("%s", difference.line(str(store.path)))
            return


def _versions(record: GenerationRecord) -> dict[str, object]:
    return {key: value for key, value in record.libraries.items() if key != LOADED_FROM}


def ever_committed(store: Store) -> list[str]:
    """List every generation that a commit names: those retired later, or before one, too."""
    return list(dict.fromkeys(name for c in store.commits for name in c.generations))


def _current(store: Store, base: GenerationName) -> tuple[Commit, Plan] | None:
    for commit in reversed(store.live_commits()):
        if GenerationName.parse(commit.generation).base() == base:
            return commit, store.generation(commit.generation).plan
    return None


def readable_plans(
    files: ReadFiles, store: Store, *, mend: bool = True, wanted: GenerationName | None = None
) -> dict[str, tuple[Plan, str]]:
    """Read the uncommitted plans; quarantine a damaged one with what was written for it.

    Args:
        files: the store's files.
        store: today's view.
        mend: whether nobody else is at work on such a plan; else a damaged one is an error.
        wanted: the generation that is to be planned. A plan of another one that has more rows than
            this release reads is left out; it may be sound, and stays.

    Raises:
        TooLarge: there is such a plan of `wanted`.
    """
    plans = {}
    for name in store.planned():
        try:
            plans[name] = Plan.from_bytes(files.read(plan_path(name)))
        except TooLarge as error:
            if wanted is not None and GenerationName.parse(name).base() == wanted:
                raise
            _log.warning("%s is left as it is: %s", name, error)
        except (ValueError, DamagedFile) as error:
            if not mend or not isinstance(files, StoreFiles):
                fault = Fault(plan_path(name), "the plan that was written", str(error))
                raise DamagedFile(fault, str(files.root)) from error
            _log.warning("the plan of %s is damaged (%s): planned again", name, error)
            quarantine_plan(files, name)
    return plans


def _unlisted(files: StoreFiles, name: GenerationName) -> tuple[Plan, str] | None:
    """Read a plan by its name, since a listing may lag behind; None where there is none."""
    data = files.read_if_there(plan_path(str(name)))
    try:
        return None if data is None else Plan.from_bytes(data)
    except ValueError:
        return None


def _check_prefix(store: Store, wanted: Plan) -> None:
    """Reject a run prefix that belongs to another space: their generations would share paths."""
    run, space = wanted.record.run, wanted.space
    if space != GRADIENT and run != space and not run.endswith(f"+{space}"):
        raise BadInput(
            f"{wanted.name!r} can't hold features of space {space!r}: its run must be "
            f"{space_run(space)!r} or RUN+{space}; build it with gradstore.format.names.space_run"
        )
    for commit in store.live_commits():
        if GenerationName.parse(commit.generation).run != run:
            continue
        found = store.generation(commit.generation).space
        if found != space:
            difference = Difference(f"space of {run!r}", found, space)
            hint = "choose another gradstore_run or space"
            raise refuse(str(store.path), [difference], hint=hint)


def _check_beside(store: Store, planned: dict[str, tuple[Plan, str]], wanted: Plan) -> None:
    """Reject what can't be compared with the generations that there are."""
    _check_shape(store, wanted)
    _check_rows(store, planned, wanted)


def _check_shape(store: Store, wanted: Plan) -> None:
    """Reject another d or dtype than the space's newest generation of either role has."""
    seen: set[str] = set()
    for commit in reversed(store.live_commits()):
        role = GenerationName.parse(commit.generation).role
        if role in seen:
            continue
        plan = store.generation(commit.generation).plan
        if plan.space != wanted.space:
            continue
        seen.add(role)
        stored, current = plan.dtype, wanted.dtype
        if role != wanted.record.role:  # one of the two is a target set
            stored, current = (dtype_of_role(each, "target") for each in (stored, current))
        differences = compare(
            {"dim": plan.dim, "dtype": stored}, {"dim": wanted.dim, "dtype": current}
        )
        if differences:
            raise refuse(str(store.path), differences)
        if len(seen) == len(get_args(Role)):
            return


def _check_rows(store: Store, planned: dict[str, tuple[Plan, str]], wanted: Plan) -> None:
    """Reject rows other than those of the newest generation of the role and set, in any space."""
    key = (wanted.record.role, wanted.record.set)
    committed = (store.generation(c.generation).plan for c in reversed(store.live_commits()))
    for plan in chain(committed, (plan for plan, _ in reversed(planned.values()))):
        if (plan.record.role, plan.record.set) != key:
            continue
        stored = plan.rows
        if len(stored) == len(wanted.rows):  # rows that are being removed are no others
            stored = stored.without(wanted.rows.forgotten)
        note = wanted.rows.difference(stored)
        if note:
            what = "train.rows" if key[0] == "train" else f"target.{key[1]}.rows"
            text = f'{note}. Store "{store.path}" has those of generation {plan.name}'
            raise refuse(
                str(store.path),
                [Difference(what, plan.rows.sha256, wanted.rows.sha256, note=text)],
            )
        return


def _other_state(store: Store, theirs: Plan, wanted: Plan) -> ProvenanceMismatch:
    """Refuse a plan beside the plan of workers that are at work, or were a moment ago."""
    differences = [
        replace(each, field=f"{wanted.record.name}: {each.field}")
        for each in compare(theirs.identity(), wanted.identity())
    ]
    return refuse(
        str(store.path),
        differences,
        hint="give every worker the same CONFIG, checkpoints and data",
    )


def _other_run(
    store: Store, stored: GenerationRecord, current: GenerationRecord
) -> ProvenanceMismatch:
    difference = Difference(f"{current.name}: run_id", stored.run_id, current.run_id)
    return refuse(
        str(store.path),
        [difference],
        hint="keep this run's generations apart with gradstore_run=NAME",
    )
