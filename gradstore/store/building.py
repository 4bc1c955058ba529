"""`gradstore.build`: the generations of one state of a model, in one call, without a trainer.

```
gradstore.build(model, tokenizer, train_rows, {"maths": rows}, "store", moments=optimizer, step=100)
```
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from gradstore.capture.adapters import check_frozen
from gradstore.capture.limits import longest_of, token_budget, vocabulary_size
from gradstore.capture.modelstate import random_states_kept
from gradstore.errors import BadInput, expect, expect_whole
from gradstore.export.budget import MOST, found_budget, is_measured, tell_budget
from gradstore.export.features import FeatureMap, FeatureSpec
from gradstore.export.gradient_space import GradientSpace, tokenizer_hash
from gradstore.export.kronecker import KroneckerFactors
from gradstore.export.memory import check_memory, check_published, most_rows
from gradstore.export.moments import AdamMoments
from gradstore.export.projected import compute_unit
from gradstore.export.room import Room
from gradstore.export.settings import BuildSettings
from gradstore.export.share import expected_share
from gradstore.export.token_rows import TokenRows, decoded, padded, read_rows, tokenizer_of
from gradstore.export.units import Batches
from gradstore.format.layout import GRADIENT
from gradstore.format.names import GenerationName, Role
from gradstore.format.text_table import Text
from gradstore.storage.location import Location, Place, location
from gradstore.store.curvature import FactorSample
from gradstore.store.filling import CheckpointExport, ExportSummary, UnitSink, check_usable
from gradstore.store.ownership import check_rows_and_run, check_step
from gradstore.store.writer import StoreWriter

#: Names of the training set and of a target set that has none.
TRAIN, TARGET = "train", "target"

#: Entry of a dataset_info.json for rows of two texts, as LlamaFactory reads it.
_FORMAT = {"columns": {"prompt": "prompt", "response": "response"}}

#: Template of rows that come as tokens or through a collator: whoever made them applied it.
OWN = "of the rows' own"


@random_states_kept()
def build(
    model: nn.Module,
    tokenizer_or_collator: Any,  # noqa: ANN401 - of transformers, or any function
    train_rows: Sequence[Any] | None,
    target_rows: Mapping[str, Sequence[Any]] | Sequence[Any] | None,
    path: Place,
    *,
    moments: Any = None,  # noqa: ANN401 - AdamMoments or an optimizer
    step: int = 0,
    **settings: Any,  # noqa: ANN401 - of BuildSettings
) -> CheckpointExport:
    """Take the gradient of every row at the model's present state and commit the features.

    Interrupted, by a kill too, the same call goes on where it was; repeated, it computes nothing.
    The model, its gradients, hooks and every random state are left as they are.

    Args:
        model: a causal language model, on the device it shall run on, with one LoRA adapter or
            with any parameters that require grad. Inside `torch.autocast` the passes are made
            under it.
        tokenizer_or_collator: a tokenizer, for rows of `prompt` and `response`; or a collator, for
            rows it takes; or None for rows of `input_ids` and `labels`.
        train_rows: n rows; None for none.
        target_rows: rows of each target set by its name, or those of one set; None for none.
        path: the store's folder, made if need be; s3://BUCKET/PREFIX; or https://HOST.
        moments: for Adam features: `AdamMoments`, or the optimizer that holds them.
        step: g, optimizer steps the model has made; names the generations.
        **settings: fields of `gradstore.BuildSettings`, as `gradient_type` and `proj_dim`.

    Raises:
        BadInput: nothing to train, moments missing, rows that can't be used, too little memory, a
            rank other than the first that is no `worker`.
        ProvenanceMismatch: the store's features come of another model, tokenizer, projection, run
            or of other rows; lists the differences.
        StoreBusy: another process writes to the store; for a worker, one that is no worker.
        StoreIOError: the disk is full, or cannot be written; for a worker, its file system keeps
            locks to one machine.
    """
    options = BuildSettings.of(settings)
    place = location(path)
    step = expect_whole(step, "step", least=0)
    if options.worker is None:
        _check_process()
    expect(isinstance(model, nn.Module), "model", model, "a torch module")
    check_frozen(model)
    space = GradientSpace.of(model, options)
    held = None  # target sets alone need no moments
    if train_rows is not None:
        held = _moments_of(moments, model, space, options.train_features)
    sets = list(_read_sets(train_rows, target_rows, tokenizer_or_collator))
    for rows in sets:
        _check_vocabulary(model, rows)
    tokenizer = tokenizer_of(tokenizer_or_collator)
    features = options.target_features if train_rows is None else options.train_features
    checkpoint = _Checkpoint(model, space, options, step, tokenizer, held)
    checkpoint = replace(checkpoint, budget=_budget(checkpoint, sets[0], features))
    unit, cut = options.unit_rows, map(checkpoint.batches, sets)
    check_memory(model, checkpoint.batches(sets[0]), features, space.projection, unit)
    check_published(space.projection, max(most_rows(batches, unit) for batches in cut))
    return checkpoint.export(place, sets)


@dataclass(frozen=True)
class _Checkpoint:
    """A state of the model, whose generations are made one by one."""

    model: nn.Module
    space: GradientSpace
    options: BuildSettings
    step: int
    tokenizer: Any
    moments: AdamMoments | None
    room: Room = field(default_factory=Room)
    budget: int = MOST

    def export(self, path: Location, sets: Sequence[TokenRows]) -> CheckpointExport:
        """Make the generations of all sets in the store at `path`."""
        options = self.options
        fields = self.space.fields(
            self.model,
            tokenizer=None if self.tokenizer is None else tokenizer_hash(self.tokenizer),
            template=OWN,
            stage="sft",
            rows={},
        )
        named = {"" if _is_train(rows) else rows.name: rows.row_set for rows in sets}
        with StoreWriter(path, provenance=fields, worker=options.worker) as writer:
            check_rows_and_run(writer.store, named, space=GRADIENT, run=options.gradstore_run,
                               run_id=options.run_id)  # fmt: skip
            if options.train_features.needs_share and options.optimizer_step is not None:
                check_step(writer.store, options.optimizer_step, run=options.gradstore_run)
            # Target sets first: one without a usable row is found before the many training rows.
            curvature = self._curvature(writer, sets)
            made = [
                self._generation(writer, rows, curvature) for rows in sorted(sets, key=_is_train)
            ]
        return CheckpointExport(
            train=next((name for rows, name, _ in made if _is_train(rows)), ""),
            targets=tuple(name for rows, name, _ in made if not _is_train(rows)),
            target_rows=sum(len(rows) for rows, *_ in made if not _is_train(rows)),
            tokens=sum(summary.tokens for *_, summary in made),
            seconds=sum(summary.seconds for *_, summary in made),
        )

    def _generation(
        self, writer: StoreWriter, rows: TokenRows, curvature: KroneckerFactors | None
    ) -> tuple[TokenRows, str, ExportSummary]:
        """Make one generation; give the rows, its name in the store and what the pass did."""
        options, trains = self.options, _is_train(rows)
        role: Role = "train" if trains else "target"
        batches = self.batches(rows)
        features = self._train_features(batches) if trains else options.target_features
        features = replace(features, curvature=curvature)
        recipe = self.space.recipe(features, self.step, self.moments if trains else None)
        record = self.space.record(
            self.model,
            GenerationName(role, self.step, "" if trains else rows.name, options.gradstore_run),
            recipe,
            run_id=options.run_id,
            autocast=_autocast(self.model),
            learning_rate=options.learning_rate if trains else None,
            options={},
        )
        if options.store_text and (rows.texts is not None or self.tokenizer is not None):
            formats = None if rows.texts is None else {rows.name: _FORMAT}
            writer.keep_texts(rows.row_set, self._texts(rows), formats)
        begun = writer.begin(
            record, rows.row_set, dim=options.proj_dim, dtype=options.dtype,
            unit_rows=options.unit_rows, losses=True,
        )  # fmt: skip
        left = sum(unit.stop - unit.start for unit in begun.pending)
        sink = UnitSink(begun, max_bad_fraction=options.max_bad_fraction, behind=1)
        bar = tqdm(total=left, desc=record.name, unit="row", disable=None, leave=False)
        with bar, sink:
            advance = partial(_advance, bar, sink)
            for unit in sink.claimed(elsewhere=bar.update):
                sink.write(compute_unit(self.model, batches, recipe, unit, advance))
        begun.commit()
        check_usable(writer.store.generation(begun.name))
        return rows, begun.name, sink.summary

    def batches(self, rows: TokenRows) -> Batches:
        """Cut rows into batches."""
        longest = longest_of(self.model, rows.lengths, rows.name)
        return Batches(rows.items, padded, rows.lengths, self.budget, longest, room=self.room)

    def _curvature(self, writer: StoreWriter, sets: Sequence[TokenRows]) -> KroneckerFactors | None:
        """Take the store's factors of this state, or fit them on the training rows."""
        options, rule = self.options, self.options.curvature
        if rule is None:
            return None
        train = next((rows for rows in sets if _is_train(rows)), None)
        sample = None
        if train is not None:
            sample = FactorSample(self.batches(train), train.row_set, options.seed)
        found = writer.factors(
            self.model, self.space, rule, autocast=_autocast(self.model), sample=sample
        )
        return found.to(next(self.model.parameters()).device)

    def _train_features(self, batches: Batches) -> FeatureSpec:
        """Return the feature of a training row, with its share of a step where it needs that."""
        features, step = self.options.train_features, self.options.optimizer_step
        if not features.needs_share or step is None:
            return features
        sample = batches.sample(self.options.seed)
        share = expected_share(self.model, sample, step, features.modules)
        return replace(features, share=share)

    def _texts(self, rows: TokenRows) -> Iterator[Text]:
        for i, (ids, labels) in enumerate(zip(rows.input_ids, rows.labels, strict=True)):
            if rows.texts is None:
                yield Text(*decoded(self.tokenizer, ids, labels), len(ids))
            else:
                prompt, response = rows.texts[i]
                row = {"prompt": prompt, "response": response}
                yield Text(prompt, response, len(ids), json.dumps(row, ensure_ascii=False))


def _advance(bar: Any, sink: UnitSink, rows: int) -> None:  # noqa: ANN401 - tqdm
    sink.look()
    bar.update(rows)


def _is_train(rows: TokenRows) -> bool:
    return rows.name == TRAIN


def _check_process() -> None:
    """Refuse a rank other than the first: a store is one process's, or that of workers."""
    rank = int(os.environ.get("RANK", "0") or 0)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank = torch.distributed.get_rank()
    if rank:
        raise BadInput(
            f"gradstore.build was called by rank {rank} of a distributed run, as if it were alone. "
            "Give every rank worker=gradstore.Worker(rank + 1, ranks), and they share the rows; or "
            "call it on rank 0 alone. In training: dataflex.integrations.GradientStoreCallback."
        )


def _moments_of(
    given: Any,  # noqa: ANN401
    model: nn.Module,
    space: GradientSpace,
    features: FeatureSpec,
) -> AdamMoments | None:
    """Read the moments that features need; refuse them where one is missing."""
    if not features.needs_moments:
        return None
    held = given
    if given is not None and not isinstance(given, AdamMoments):
        held = AdamMoments.from_optimizer(given, model)
    FeatureMap(features, space.slots, held)
    return held  # type: ignore[no-any-return]


def _budget(checkpoint: _Checkpoint, rows: TokenRows, features: FeatureSpec) -> int:
    """Return the padded tokens of a batch: the caller's, or what the device has room for."""
    given, model = checkpoint.options.tokens_per_batch, checkpoint.model
    if given is not None or not is_measured(model):
        return given or token_budget(model)
    tokens = found_budget(
        model,
        checkpoint.batches(rows),
        features,
        checkpoint.space.projection,
        checkpoint.options.unit_rows,
    )
    tell_budget(tokens)
    return tokens


def _read_sets(train: Any, targets: Any, by: Any) -> Iterator[TokenRows]:  # noqa: ANN401
    """Read every set of rows, the training set first."""
    if targets is not None and not isinstance(targets, Mapping):
        targets = {TARGET: targets}
    expect(train is not None or bool(targets), "train_rows and target_rows", None,
           "one of them at least")  # fmt: skip
    if train is not None:
        yield read_rows(TRAIN, train, by)
    for name, rows in (targets or {}).items():
        if name == TRAIN or not isinstance(name, str) or not name:
            raise BadInput(f"a target set is named {name!r}; choose another name.")
        yield read_rows(name, rows, by)


def _check_vocabulary(model: nn.Module, rows: TokenRows) -> None:
    """Refuse a token without an embedding: on an accelerator it ends in a device assertion."""
    size = vocabulary_size(model)
    largest = [max(ids) for ids in rows.input_ids]
    if size is not None and max(largest) >= size:
        row = next(i for i, token in enumerate(largest) if token >= size)
        raise BadInput(
            f"{rows.name!r}, row {row}, has token {largest[row]}, the model has embeddings for "
            f"{size}. Tokenise with the model's own tokenizer, or call resize_token_embeddings."
        )


def _autocast(model: nn.Module) -> str:
    """Name the precision that the caller's autocast gives the model's device."""
    device = next(model.parameters()).device.type
    if not torch.is_autocast_enabled(device):
        return "off"
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}[torch.get_autocast_dtype(device)]
