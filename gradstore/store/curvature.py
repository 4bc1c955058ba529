"""Kronecker factors beside the generations whose features they made, for whoever exports more.

`curvature/<sha256>.safetensors`, published before a generation that names it in its record
(`feature_options.curvature`) is planned; so target rows of a later day, other ranks and a resumed
run take the same factors, and features of one step are in one metric. A file that no generation
names is garbage of a run that was stopped, removed by the next clean-up.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from gradstore.errors import BadInput, DamagedData, DamagedFile, Fault
from gradstore.export.gradient_space import adapter_hash, attention_of
from gradstore.export.kronecker import CurvatureRule, KroneckerFactors
from gradstore.export.kronecker_fit import fit_factors, full_width, whole_bytes
from gradstore.format.layout import CURVATURE, plan_path
from gradstore.format.plans import Plan
from gradstore.storage.leases import leases_of
from gradstore.store.own_units import quarantine

if TYPE_CHECKING:
    from torch import nn

    from gradstore.export.gradient_space import GradientSpace
    from gradstore.export.units import Batches
    from gradstore.format.records import GenerationRecord, RowSet
    from gradstore.storage.leases import Leases
    from gradstore.storage.local import StoreFiles
    from gradstore.storage.reading import ReadFiles
    from gradstore.store.reader import Store

_log = logging.getLogger(__name__)

#: Entries of a record's metric that its file has too.
_TOLD_TWICE = ("kind", "rows", "sample")


@dataclass(frozen=True)
class FactorSample:
    """The training rows that factors are fitted on: some by lot.

    Attributes:
        batches: of all training rows.
        rows: the same rows, as a store knows them.
        seed: of the lot.
    """

    batches: Batches
    rows: RowSet
    seed: int

    @property
    def sha256(self) -> str:
        """Hash of the rows and the lot."""
        return sha256(f"{self.rows.sha256}:{self.seed}".encode()).hexdigest()


def step_factors(
    files: StoreFiles,
    store: Store,
    model: nn.Module,
    space: GradientSpace,
    rule: CurvatureRule,
    *,
    autocast: str,
    sample: FactorSample | None,
    leases: Leases | None = None,
) -> KroneckerFactors:
    """Take the factors that a store has of the model's present state, or fit and keep them.

    Of several workers one does, and the others take what it found: on a GPU two fits may differ.

    Args:
        files: of the store, under its writer's lock.
        store: as it is now.
        model: whose gradients are taken.
        space: of its gradients.
        rule: which metric.
        autocast: dtype name of mixed precision, or "off".
        sample: to fit them on; None takes those that the store has.
        leases: of this worker among others; None has the store to itself.

    Raises:
        BadInput: the store has none, and there are no training rows to fit them on.
        DamagedData: a file of factors is missing, or is not as it was written.
        StoreIOError: they can't be written.
    """
    state = (adapter_hash(model, space.trained), autocast, attention_of(model))
    find = partial(_found_or_fitted, files, store, model, space, rule, state, sample)
    if leases is None:
        return find()
    asked = sha256(repr((state, rule.kind, sample and sample.sha256)).encode()).hexdigest()
    task = f"{CURVATURE}/{asked}"
    mark = f"{leases_of(files)}/{task}.found"

    def tell() -> None:
        files.publish(mark, find().sha256.encode())

    leases.once(task, lambda: files.has(mark), tell, f"the factors of {rule.kind}")
    return replace(read_factors(files, {"sha256": files.read(mark).decode()}), damping=rule.damping)


def _found_or_fitted(
    files: StoreFiles,
    store: Store,
    model: nn.Module,
    space: GradientSpace,
    rule: CurvatureRule,
    state: tuple[str, str, str],
    sample: FactorSample | None,
) -> KroneckerFactors:
    sample_sha = None if sample is None else sample.sha256
    for record, committed in _records(files, store):
        told = record.curvature
        same = (record.adapter_hash, record.autocast, record.attention) == state
        # Of a state that was fitted before rows were forgotten: all of it stays in that metric.
        drawn = sample is None or sample.rows.forgotten.any() or sample_sha == told.get("sample")
        if not (same and told.get("kind") == rule.kind and drawn):
            continue
        try:
            return replace(read_factors(files, told), damping=rule.damping)
        except DamagedData as error:
            if committed or sample is None:
                raise
            _log.warning("%s; nothing committed needs them: they are fitted again", error)
            if files.has(path := factors_path(told["sha256"])):
                quarantine(files, path)
    if sample is None:
        raise BadInput(
            f'{rule.kind} is fitted on training rows, and store "{store.path}" has none of this '
            "model's state: give the training rows too, or build them first."
        )
    width, held = full_width(space.slots), whole_bytes(space.slots)
    _log.info(
        "fitting %s on training rows: factors take %s MB here and in the store; sides of a matrix "
        "wider than %d are diagonal", rule.kind, f"{held / 1e6:,.1f}", width,
    )  # fmt: skip
    found = fit_factors(model, sample.batches.sample(sample.seed, sample.rows.forgotten), rule.kind)
    found = replace(found, damping=rule.damping, sample=sample.sha256).to("cpu")
    # Also where they lie there: whoever wrote them may have died before their name was synced.
    if not files.publish(factors_path(found.sha256), found.to_bytes()):
        kept = read_factors(files, {"sha256": found.sha256})  # the same, of another sample of rows
        return replace(kept, damping=rule.damping)
    return found


def factors_path(sha: str) -> str:
    """Return the path of factors relative to the store."""
    return f"{CURVATURE}/{sha}.safetensors"


def read_factors(files: ReadFiles, told: Mapping[str, Any]) -> KroneckerFactors:
    """Read factors, and check that they are those that a record tells of.

    Args:
        files: of the store.
        told: their sha256; of a record also kind, rows and sample, which are no part of it.

    Raises:
        DamagedData: they are missing, or others.
    """
    sha = told["sha256"]
    path = factors_path(sha)
    if not files.has(path):
        raise DamagedFile(Fault(path, "a file", "no file"), str(files.root))
    # Of any size: those of a wide model are larger than a document may be.
    data = files.read(path, expected_bytes=files.size(path))
    found = KroneckerFactors.from_bytes(data, f'"{files.root}/{path}"')
    if found.sha256 != sha:
        raise DamagedFile(Fault(path, "the factors of its name", "others"), str(files.root))
    for name in _TOLD_TWICE:
        expected, here = told.get(name, getattr(found, name)), getattr(found, name)
        if here != expected:
            fault = Fault(path, f"{name} {expected!r}", f"{name} {here!r}")
            raise DamagedFile(fault, str(files.root))
    return found


def recorded_factors(files: ReadFiles, record: GenerationRecord) -> KroneckerFactors | None:
    """Read the factors that a record names, with its damping; None where it names none.

    Raises:
        DamagedData: they are missing, or others.
    """
    told = record.curvature
    if not told:
        return None
    return replace(read_factors(files, told), damping=told["damping"])


def factors_of_record(files: ReadFiles, record: GenerationRecord) -> tuple[str, Fault | None]:
    """Return the path of the factors that a record names, and what is wrong with them."""
    path = factors_path(record.curvature["sha256"])
    try:
        read_factors(files, record.curvature)
    except DamagedFile as error:
        return path, error.fault
    except DamagedData as error:
        return path, Fault(path, "Kronecker factors", str(error))
    return path, None


def _records(files: ReadFiles, store: Store) -> Iterator[tuple[GenerationRecord, bool]]:
    """Yield the records of all generations, newest first, and whether they are committed.

    Committed ones first: whoever joins their state takes the factors that readers have.
    """
    for generation in reversed(store.generations(superseded=True)):
        yield generation.record, True
    for name in reversed(store.planned()):
        try:
            yield Plan.from_bytes(files.read(plan_path(name)))[0].record, False
        except (ValueError, DamagedData):  # planned again by whoever begins it
            continue
