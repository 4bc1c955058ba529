"""The gradient-feature service: model + rows -> committed generations, ready to be scored.

LESS in training, `gradstore build` and later strategies share it. It knows how generations are
named and in what order they are made; taking a gradient and keeping bytes is the work of gradstore.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from dataflex.data.rows import Rows
from dataflex.features.fields import space_fields
from dataflex.features.loaded_from import loaded_from
from dataflex.features.settings import FeatureSettings
from dataflex.features.shared import Compute, export_shared, gradient_budget, keep_text
from dataflex.features.step_share import features_again, train_features
from dataflex.features.store_owner import check_owner
from dataflex.models.passes import longest_row
from dataflex.models.precision import autocast
from dataflex.run.context import RunContext
from dataflex.run.log import OnRows
from gradstore.errors import StoreError
from gradstore.export.combined import WeightedSums, compute_combined_unit
from gradstore.export.features import FeatureSpec, Recipe
from gradstore.export.gradient_space import GradientSpace
from gradstore.export.kronecker import KroneckerFactors
from gradstore.export.memory import check_memory, check_published, most_rows
from gradstore.export.moments import AdamMoments
from gradstore.export.projected import compute_unit
from gradstore.export.units import Batches, UnitFeatures
from gradstore.format.layout import GRADIENT
from gradstore.format.names import GenerationName, Role
from gradstore.format.plans import UnitRange
from gradstore.format.records import LOADED_FROM, GenerationRecord
from gradstore.scoring.comparable import CheckpointFeatures
from gradstore.scoring.pairing import Which, checkpoint_features
from gradstore.storage.leases import Worker
from gradstore.store.curvature import FactorSample
from gradstore.store.filling import CheckpointExport, ExportSummary, check_usable
from gradstore.store.generation_writer import GenerationWriter
from gradstore.store.ownership import check_step
from gradstore.store.writer import StoreWriter

if TYPE_CHECKING:
    from dataflex.features.target_source import TargetFeatures
    from gradstore.store.reader import Store


class FeatureService:
    """Service that writes and finds the gradient generations of one run.

    Every rank has one, and shares the passes; rank 0's holds the store and its lock while open.
    """

    def __init__(
        self,
        run: RunContext,
        settings: FeatureSettings,
        worker: Worker | None = None,
        *,
        opens: bool = True,
    ) -> None:
        """Open the store for writing.

        Args:
            run: whose rows and model they are.
            settings: of the features.
            worker: this process among those that share the store; None has it to itself.
            opens: False leaves the store alone until `open`.

        Raises:
            ProvenanceMismatch: the store holds features that can't be compared with this run's.
            StoreBusy: another process writes to it.
            BadInput: the model has more than one active adapter, or nothing to train, or the
                gradients of its whole weights take more memory than is free.
        """
        self.run = run
        self.settings = settings
        self._worker = worker
        self.space = GradientSpace.of(run.model, settings)
        self._budget = gradient_budget(run, settings, self.space.projection)
        run.ranks.decide(self._check_memory)
        self._writer: StoreWriter | None = None
        if opens:
            self.open()

    def open(self) -> None:
        """Take the store's lock, after `close`; collective. Raises as the constructor does."""
        self.run.ranks.decide(self._open)

    @cached_property
    def fields(self) -> dict[str, Any]:
        """The MUST-EQUAL fields, which take a pass over the model's frozen weights."""
        return space_fields(self.run.model, self.run.data, self.space)

    def _open(self) -> None:
        run = self.run
        path = run.config.store_path
        self._writer = StoreWriter(path, provenance=self.fields, worker=self._worker)
        try:
            check_owner(self._writer.store, run)
            if self.settings.train_features.needs_share and run.step is not None:
                check_step(self._writer.store, run.step, run=run.config.store_run)
        except StoreError:
            self.close()
            raise

    @property
    def writer(self) -> StoreWriter:
        """The store's writer; rank 0 alone holds it."""
        if self._writer is None:
            raise RuntimeError("the store is open on rank 0 alone, and until close()")
        return self._writer

    @property
    def store(self) -> Store:
        """The store as it is now; on rank 0."""
        return self.writer.store

    def close(self) -> None:
        """Release the store's lock."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def export(
        self,
        step: int,
        learning_rate: float,
        moments: AdamMoments | None,
        source: TargetFeatures | None = None,
        sample: Rows | None = None,
    ) -> CheckpointExport:
        """Export every target set, then the training rows, at the model's present state.

        Collective. Generations of an earlier attempt at the same state are reused, finished or
        half done.

        Args:
            step: g, names the generations.
            learning_rate: mean since the previous generation; weights this checkpoint.
            moments: needed by Adam features.
            source: of target features; None takes the gradients of the target rows' answers.
            sample: training rows that stand for all, under a name of their own; None takes all.

        Raises:
            BadInput: a target set without a usable row, before any training row is taken.
        """
        curvature = self._factors()
        drawn = train_features(self.run, self.settings, lambda: self.store)
        features = replace(drawn, curvature=curvature)
        of_targets = replace(self.settings.target_features, curvature=curvature)
        targets, seconds, tokens = [], 0.0, 0
        for rows in self.run.data.targets:
            name, summary = self.export_rows("target", rows, step, of_targets, source=source)
            self.run.ranks.decide(lambda name=name: check_usable(self.store.generation(name)))  # type: ignore[misc]
            targets.append(name)
            tokens, seconds = tokens + summary.tokens, seconds + summary.seconds
        train, summary = self.export_rows(
            "train" if sample is None else "target",
            self.run.data.train if sample is None else sample,
            step,
            features,
            moments=moments,
            learning_rate=learning_rate,
            is_sample=sample is not None,
        )
        return CheckpointExport(
            train,
            tuple(targets),
            target_rows=sum(len(rows) for rows in self.run.data.targets),
            tokens=tokens + summary.tokens,
            seconds=seconds + summary.seconds,
        )

    def steps(self, train_set: str = "") -> list[int]:
        """List the steps of this run's committed training generations, ascending; on rank 0.

        Args:
            train_set: name of a sample that stands for the training rows.
        """
        run = self.run.config.store_run
        return sorted(
            g.step
            for g in self.store.generations()
            if g.set == train_set and g.record.run == run and g.space == GRADIENT
        )

    def checkpoints(self, which: Which, step: int, train_set: str = "") -> list[CheckpointFeatures]:
        """Return the checkpoints to combine, up to `step`, weighted by learning rate; on rank 0."""
        return checkpoint_features(
            self.store,
            which,
            run=self.run.config.store_run,
            targets=[rows.name for rows in self.run.data.targets],
            until=step,
            fewer=True,
            train_set=train_set,
        )

    def export_rows(
        self,
        role: Role,
        rows: Rows,
        step: int,
        features: FeatureSpec,
        *,
        moments: AdamMoments | None = None,
        learning_rate: float | None = None,
        source: TargetFeatures | None = None,
        is_sample: bool = False,
    ) -> tuple[str, ExportSummary]:
        """Make one generation of gradient features; collective.

        Args:
            role: train or target.
            rows: any processed rows; a target set is named by them.
            step: g, names the generation.
            features: how a gradient becomes a feature.
            moments: needed by Adam features.
            learning_rate: of a train generation, see `export`.
            source: of the features of a target set, see `export`.
            is_sample: the set is a sample of the training rows.

        Returns:
            The generation's name in the store (on every rank), and what the pass did.
        """
        recipe = self.space.recipe(features, step, moments)
        options: dict[str, Any] = {"sample_of": "train"} if is_sample else {}
        options |= {} if source is None else {"source": source.options}
        record = self._record(role, rows, step, recipe, learning_rate, options)

        def begin() -> GenerationWriter:
            begun = self.writer.begin(
                record,
                rows.row_set,
                dim=self.settings.proj_dim,
                dtype=self.settings.dtype,
                unit_rows=self.settings.unit_rows,
                losses=source is None,  # others sum up several answers
            )
            keep_text(self.run, self.writer, rows)  # of rows that were not refused
            return begun

        summary = export_shared(
            self.run.ranks,
            f"gradients of {record.name}",
            begin,
            self._compute(rows, recipe, source),
            max_bad_fraction=self.settings.max_bad_fraction,
            shows_progress=self.run.shows_progress,
            lengths=rows.lengths,
            watch=self.run.watch,
        )
        full_name = self.run.ranks.decide(lambda: self.store.generation(record.name).name)
        return full_name, summary

    def _factors(self) -> KroneckerFactors | None:
        """Take or fit the factors of the features' metric at this state; collective.

        Rank 0 fits them, the others wait.
        """
        run, rule = self.run, self.settings.curvature
        if rule is None:
            return None
        train = run.data.train
        sample = FactorSample(self._batches(train), train.row_set, self.settings.seed)
        found = run.ranks.decide(
            lambda: self.writer.factors(
                run.model, self.space, rule, autocast=run.autocast, sample=sample
            )
        )
        return found.to(next(run.model.parameters()).device)

    def _check_memory(self) -> None:
        """Say what gradients take that are kept whole; refuse what does not fit."""
        run, settings = self.run, self.settings
        unit, cut = settings.unit_rows, map(self._batches, (run.data.train, *run.data.targets))
        check_published(self.space.projection, max(most_rows(batches, unit) for batches in cut))
        with autocast(run.model, run.autocast):
            check_memory(run.model, self._batches(run.data.train), settings.train_features,
                         self.space.projection, unit)  # fmt: skip

    def _batches(self, rows: Rows) -> Batches:
        run, budget, longest = self.run, self._budget, longest_row(self.run.model, rows)
        return Batches(rows.dataset, run.collate, rows.lengths, budget, longest, room=run.room)

    def again(
        self,
        record: GenerationRecord,
        rows: Rows,
        moments: AdamMoments | None,
        curvature: KroneckerFactors | None = None,
    ) -> tuple[GenerationRecord, Compute]:
        """Give the record that an export would make at the model's present state, and its units.

        Args:
            record: of a generation of this run's gradients, made before.
            rows: its rows.
            moments: needed by Adam features.
            curvature: factors of the metric that the generation is in, where it is in one.
        """
        trains = record.role == "train"
        features = features_again(self.run, self.settings, record)
        if curvature is not None:
            curvature = curvature.to(next(self.run.model.parameters()).device)
            features = replace(features, curvature=curvature)
        recipe = self.space.recipe(features, record.step, moments if trains else None)
        made = self._record(record.role, rows, record.step, recipe, record.learning_rate, {})
        return made, self._compute(rows, recipe, None)

    def _compute(self, rows: Rows, recipe: Recipe, source: TargetFeatures | None) -> Compute:
        """Give the function that computes a unit of `rows`."""
        model, collate, room = self.run.model, self.run.collate, self.run.whole_room
        if source is None:
            return partial(compute_unit, model, self._batches(rows), recipe)

        def combined(unit: UnitRange, advance: OnRows) -> UnitFeatures:
            weighted = source.weighted(rows.name, range(unit.start, unit.stop))
            sums = WeightedSums(weighted, collate, self._budget, room)
            return compute_combined_unit(model, sums, recipe, unit, advance)

        return combined

    def _record(
        self,
        role: Role,
        rows: Rows,
        step: int,
        recipe: Recipe,
        learning_rate: float | None,
        options: Mapping[str, Any],
    ) -> GenerationRecord:
        set_name = rows.name if role == "target" else ""
        record = self.space.record(
            self.run.model,
            GenerationName(role, step, set_name, self.run.config.store_run),
            recipe,
            run_id=self.run.run_id,
            autocast=self.run.autocast,
            learning_rate=learning_rate,
            options=options,
        )
        places = {LOADED_FROM: loaded_from(self.run.config)}
        return replace(record, libraries={**record.libraries, **places})
