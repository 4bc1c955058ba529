"""`dataflex-cli gradstore repair STORE CONFIG`: damaged units are computed again by their model."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataflex.bridge.quiet import on_stderr
from dataflex.checkpoints.folders import find_checkpoints
from dataflex.checkpoints.state import trainer_state
from dataflex.checkpoints.weights import checkpoint_moments, load_weights
from dataflex.config.keys import RunConfig
from dataflex.data.rows import Rows, RunData, check_rows
from dataflex.features.gradients import FeatureService
from dataflex.launch.at_checkpoint import load_at
from dataflex.launch.build import feature_settings, step_at
from dataflex.launch.dry_run import context_of
from dataflex.launch.preflight import check_gradients
from dataflex.models.precision import autocast
from gradstore.errors import ProvenanceMismatch
from gradstore.format.layout import GRADIENT, provenance_path
from gradstore.format.plans import Plan
from gradstore.format.provenance import compare, provenance_bytes, refuse
from gradstore.storage.local import StoreFiles
from gradstore.store.curvature import recorded_factors
from gradstore.store.damage import Damage, plan_of
from gradstore.store.encoding import encoded_unit
from gradstore.store.reader import Store
from gradstore.store.repair import put_back, supersede
from gradstore.store.space_writer import SpaceFields

if TYPE_CHECKING:
    from gradstore.export.units import UnitFeatures

_log = logging.getLogger(__name__)

View = Callable[[], Store]
Values = Mapping[int, Mapping[str, np.ndarray]]


def recompute(
    config: RunConfig,
    new_attempt: bool,
    files: StoreFiles,
    view: View,
    damages: Sequence[Damage],
) -> list[str]:
    """Compute damaged units again with the model that CONFIG names; put them back if bit-equal.

    Args:
        config: of the run or build that made the store.
        new_attempt: commit units that come out otherwise as a new attempt of their generation.
        files: the store's files, under the writer's lock.
        view: gives the store as it is now.
        damages: what the store's own files do not suffice for.

    Returns:
        A line for everything that could not be made whole, and why.

    Raises:
        BadInput: see `check_gradients`.
        ProvenanceMismatch: CONFIG's model, rows or settings are not those of any damaged rows.
    """
    check_gradients(config)
    with on_stderr(), contextlib.redirect_stdout(sys.stderr):  # stdout is for the answer
        return _recompute(_Session(config, files, view, new_attempt), config, damages)


def _recompute(session: _Session, config: RunConfig, damages: Sequence[Damage]) -> list[str]:
    units: dict[str, list[Damage]] = {}
    for damage in damages:
        if damage.unit is not None:
            units.setdefault(damage.generation, []).append(damage)
    plans = {name: plan_of(session.files, session.view(), name)[0] for name in units}
    able = {name: plan for name, plan in plans.items() if not _unable(plan)}
    notes = [f"{name}: {_unable(plan)}" for name, plan in plans.items() if name not in able]
    folders = {trainer_state(each).global_step: each for each in find_checkpoints(config)}
    spaces = [damage for damage in damages if damage.what == "space"]
    texts = [damage for damage in damages if damage.what == "text"]
    for step in sorted({plan.record.step for plan in able.values()}):
        folder = folders.get(step)
        if folder is None and (step or folders):
            there = ", ".join(map(str, folders)) or "none"
            here = ", ".join(name for name, plan in able.items() if plan.record.step == step)
            notes.append(
                f"{here}: no checkpoint of step {step} with an adapter; there are: {there}"
            )
            continue
        session.load(folder)
        notes += session.mend_space(spaces)
        spaces = []
        for name, plan in able.items():
            if plan.record.step == step:
                notes += session.mend(plan, units[name], folder)
    session.refuse_if_nothing_is_its()
    if spaces or texts:
        session.load(next(iter(folders.values()), None))
        notes += session.mend_space(spaces)
        notes += session.keep_texts(texts)
    return notes


def _unable(plan: Plan) -> str:
    """Say why the rows of a generation are not computed here; "" where they are."""
    if plan.space != GRADIENT:
        return f"rows of space {plan.space!r} are embeddings, which only their own run computes"
    record = plan.record
    if record.is_sample or "source" in record.feature_options:
        return "its component chose or combined these rows in training, which does not repeat"
    return ""


class _Session:
    """The model and rows of a configuration, loaded once, at one checkpoint after another."""

    def __init__(self, config: RunConfig, files: StoreFiles, view: View, new_attempt: bool) -> None:
        self._config, self.files, self.view = config, files, view
        self._new_attempt = new_attempt
        self._service: FeatureService | None = None
        self._tried = 0
        self._foreign: list[ProvenanceMismatch] = []

    @property
    def service(self) -> FeatureService:
        """The features of the model as it is loaded."""
        assert self._service is not None
        return self._service

    def load(self, folder: Path | None) -> None:
        """Load a checkpoint's weights, at first with the model and the rows."""
        if self._service is not None:
            if folder is not None:
                load_weights(self.service.run.model, folder)
            return

        def check_data(data: RunData, *_: object) -> None:
            sizes = self._config.dataflex.target_subtasks
            check_rows(data, needs_targets=False, subtask_sizes=sizes)

        settings = feature_settings(self._config)
        loaded = load_at(self._config, folder, check_data)
        run = context_of(self._config, loaded, run_id="repair")
        if settings.train_features.needs_share and folder is not None:
            run = replace(run, step=step_at(folder, run.step))
        self._service = FeatureService(run, settings, opens=False)

    def mend_space(self, damages: Sequence[Damage]) -> list[str]:
        """Write the provenance of the gradients again if its fields come out as they were."""
        notes, path = [], provenance_path(GRADIENT)
        for damage in damages:
            data = provenance_bytes(
                GRADIENT, SpaceFields(GRADIENT, self.service.fields, None).fields
            )
            if damage.faults[0].file == path and self._is_committed(data):
                self.files.make_directory(path.rpartition("/")[0])
                self.files.replace(path, data, self.files.read_if_there(path))
            else:
                notes.append(f"{damage.faults[0].file}: comes out otherwise, and was left alone")
        return notes

    def _is_committed(self, provenance: bytes) -> bool:
        """Compare a provenance's seal with those that plans of its space name."""
        from gradstore.format.provenance import read_provenance

        store, sha = self.view(), read_provenance(provenance, GRADIENT)[1]
        plans = (plan_of(self.files, store, c.generation)[0] for c in store.live_commits())
        return all(plan.provenance_sha256 == sha for plan in plans if plan.space == GRADIENT)

    def mend(self, plan: Plan, damages: Sequence[Damage], folder: Path | None) -> list[str]:
        """Compute units of a generation at the loaded checkpoint; put back, or say what differs.

        A generation of another model, checkpoint or settings than CONFIG's stops no other's repair.
        """
        self._tried += 1
        try:
            return self._mend(plan, damages, folder)
        except ProvenanceMismatch as error:
            self._foreign.append(error)
            return [f"{plan.name}: {error}"]

    def refuse_if_nothing_is_its(self) -> None:
        """Refuse a CONFIG that no damaged generation was made with.

        Raises:
            ProvenanceMismatch: that of the first.
        """
        if self._foreign and len(self._foreign) == self._tried:
            raise self._foreign[0]

    def _mend(self, plan: Plan, damages: Sequence[Damage], folder: Path | None) -> list[str]:
        service = self.service
        rows = self._rows(plan)
        needs = service.settings.train_features.needs_moments and plan.record.role == "train"
        moments = checkpoint_moments(folder, service.run.model) if needs and folder else None
        with autocast(service.run.model, service.run.autocast):
            factors = recorded_factors(self.files, plan.record)
            record, compute = service.again(plan.record, rows, moments, factors)
            self._check(plan, record.identity())
            done: dict[int, Mapping[str, np.ndarray]] = {}
            for damage in damages:
                assert damage.unit is not None
                done[damage.unit.index] = _stored(plan, compute(damage.unit, _quiet))
        commit = plan_of(self.files, self.view(), plan.name)[1]
        left = [
            file
            for unit, values in done.items()
            for file in put_back(self.files, plan, commit, plan.units[unit], values)
        ]
        if not left:
            return []
        if plan.name not in {each.generation for each in self.view().live_commits()}:
            return [
                f"{plan.name}: its rows come out otherwise; a later attempt superseded it, which "
                "readers open: gradstore gc removes it"
            ]
        if self._new_attempt:
            name = supersede(self.files, self.view, plan.name, done)
            return [f"{plan.name}: its rows came out otherwise; {name} supersedes it"]
        return [
            f"{plan.name}: {len(left)} file(s), first {left[0]}, come out otherwise than they were "
            "committed (another device, library or number of threads). Nothing was changed; "
            "--new-attempt commits the generation anew with these rows."
        ]

    def _rows(self, plan: Plan) -> Rows:
        data = self.service.run.data
        sets = {"": data.train, **{rows.name: rows for rows in data.targets}}
        rows = sets.get(plan.record.set)
        note = (
            "no such set in CONFIG"
            if rows is None
            else self.view().without_forgotten(rows.row_set).difference(plan.rows)
        )
        if rows is None or note:
            raise ProvenanceMismatch(
                f"the rows of {plan.name} are not those of CONFIG: {note}. Give the configuration "
                "and the data of the run that made the store.",
                [note],
            )
        return rows

    def _check(self, plan: Plan, identity: Mapping[str, Any]) -> None:
        """Refuse another model, checkpoint or settings than the damaged rows were made with."""
        SpaceFields(GRADIENT, self.service.fields, None).compare(self.files)
        if differences := compare(plan.record.identity(), identity):
            hint = "give the configuration of the run or build that made it"
            raise refuse(str(self.files.root), differences, hint=hint)

    def keep_texts(self, damages: Sequence[Damage]) -> list[str]:
        """Keep the text of damaged tables anew."""
        from gradstore.store.cleaning import retire
        from gradstore.store.text_writer import keep_texts

        data = self.service.run.data
        store = self.view()
        known = {
            store.without_forgotten(rows.row_set).sha256: rows
            for rows in (data.train, *data.targets)
        }
        notes = []
        for sha in dict.fromkeys(d.faults[0].file.split("/")[1] for d in damages):
            rows = known.get(sha)
            if rows is None:
                notes.append(f"texts/{sha}: CONFIG has no data set with these rows")
                continue
            retire(self.files, self.view, (), [sha])
            keep_texts(self.files, self.view, rows.row_set, data.texts(rows), data.formats)
        return notes


def _stored(plan: Plan, done: UnitFeatures) -> dict[str, np.ndarray]:
    loss = done.loss if plan.losses else None
    return encoded_unit(plan, done.unit, done.features, done.norm, done.status, done.tokens, loss)


def _quiet(_: int) -> None:
    """Draw no bar."""
