"""The gradient-feature service: model + rows -> committed generations, ready to be scored.

LESS in training, `gradstore build` and later strategies share it. It knows how generations are
named and in what order they are made; taking a gradient and keeping bytes is the work of gradstore.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from gradkernels import ProjectionSpec

from dataflex.context import RunContext
from dataflex.data import Rows
from dataflex.events import progress
from dataflex.ownership import check_owner
from dataflex.provenance import adapter_hash, libraries, space_fields
from gradstore.errors import BadInput, StoreError
from gradstore.export import ExportSummary, export_generation
from gradstore.features import FeatureSpec
from gradstore.gradients import GradientCapture
from gradstore.layout import GRADIENT, GenerationName, Role
from gradstore.moments import AdamMoments
from gradstore.pairing import Which, checkpoint_features
from gradstore.records import GenerationRecord
from gradstore.scoring.comparable import CheckpointFeatures
from gradstore.writer import StoreWriter

if TYPE_CHECKING:
    from torch import nn

    from gradstore.generation import Generation

_log = logging.getLogger(__name__)

#: Padded tokens of a gradient batch where the user sets none.
CPU_TOKENS, GPU_TOKENS = 2048, 16384


@dataclass(frozen=True)
class FeatureSettings:
    """What a user can say about gradient features.

    Attributes:
        gradient_type: adam_marginal | adam | sgd | sign.
        adam_eps_mode: inside | outside the square root.
        bias_correction: divide the moments by 1 - beta ** (t + 1).
        proj_method: sjlt | rademacher | gaussian.
        proj_dim: d.
        sjlt_s: non-zeros per parameter of sjlt.
        seed: base seed; each checkpoint projects with hash(seed, step).
        dtype: float16 | bfloat16, how features are stored.
        tokens_per_batch: padded tokens of a gradient batch; None chooses by device.
        max_bad_fraction: share of non-finite rows above which an export stops.
    """

    gradient_type: Literal["adam_marginal", "adam", "sgd", "sign"] = "adam_marginal"
    adam_eps_mode: Literal["inside", "outside"] = "inside"
    bias_correction: bool = False
    proj_method: Literal["sjlt", "rademacher", "gaussian"] = "sjlt"
    proj_dim: int = 8192
    sjlt_s: int = 8
    seed: int = 42
    dtype: str = "float16"
    tokens_per_batch: int | None = None
    max_bad_fraction: float = 0.01

    def __post_init__(self) -> None:
        """Let the parts that will use the values check them."""
        if not isinstance(self.bias_correction, bool):
            raise ValueError(f"bias_correction is {self.bias_correction!r}; give true or false")
        if not isinstance(self.max_bad_fraction, int | float):
            raise ValueError(f"max_bad_fraction is {self.max_bad_fraction!r}; give a number")
        if not isinstance(self.tokens_per_batch, int | None):
            raise ValueError(
                f"tokens_per_batch is {self.tokens_per_batch!r}; give a whole number or null"
            )
        _ = self.train_features
        ProjectionSpec(self.proj_method, p=1, d=self.proj_dim, seed=self.seed, s=self.sjlt_s)
        if self.dtype not in ("float16", "bfloat16"):
            raise ValueError(f"dtype is {self.dtype!r}; choose float16 or bfloat16")
        if self.tokens_per_batch is not None and self.tokens_per_batch < 1:
            raise ValueError(f"tokens_per_batch is {self.tokens_per_batch}; at least 1 is needed")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction is {self.max_bad_fraction}; give a share of 0 to 1")

    @property
    def train_features(self) -> FeatureSpec:
        """How a training row's gradient becomes a feature."""
        return FeatureSpec(self.gradient_type, self.adam_eps_mode, self.bias_correction)

    @property
    def target_features(self) -> FeatureSpec:
        """Targets are plain gradients: `sgd`, or `sign` when the training rows are `sign`."""
        return FeatureSpec("sign" if self.gradient_type == "sign" else "sgd")


@dataclass(frozen=True)
class CheckpointExport:
    """The generations of one checkpoint, committed.

    Attributes:
        train: generation of the training rows.
        targets: one per target set.
        target_rows: rows of all target sets.
        tokens: tokens that went through the model in this pass; 0 where everything was reused.
        seconds: duration of the passes.
    """

    train: Generation
    targets: tuple[Generation, ...]
    target_rows: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class _Exported:
    generation: Generation
    summary: ExportSummary


def effective_seed(base: int, step: int) -> int:
    """Seed of one checkpoint's projection: the noise then averages out over checkpoints."""
    digest = hashlib.blake2b(f"{base}:{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def token_budget(model: nn.Module) -> int:
    """Padded tokens of a gradient batch that suit the model's device."""
    return GPU_TOKENS if next(model.parameters()).device.type == "cuda" else CPU_TOKENS


class FeatureService:
    """Writes and finds the gradient generations of one run; holds the store's lock while open."""

    def __init__(self, run: RunContext, settings: FeatureSettings) -> None:
        """Open the store for writing.

        Raises:
            ProvenanceMismatch: the store holds features that can't be compared with this run's.
            StoreBusy: another process writes to it.
            BadInput: the model has more than one active adapter, or nothing to train.
        """
        self.run = run
        self.settings = settings
        with GradientCapture(run.model) as capture:
            self.slots = capture.slots
        self.projection = ProjectionSpec(
            settings.proj_method,
            p=sum(slot.numel for slot in self.slots),
            d=settings.proj_dim,
            seed=settings.seed,
            s=settings.sjlt_s,
        )
        fields = space_fields(run.model, run.data, self.slots, self.projection, settings.dtype)
        path = run.config.store_path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.writer = StoreWriter(path, space=GRADIENT, provenance=fields)
        self.writer.__enter__()
        try:
            check_owner(self.writer.store, run)
        except StoreError:
            self.close()
            raise

    def close(self) -> None:
        """Release the store's lock."""
        self.writer.__exit__(None, None, None)

    def export(
        self, step: int, learning_rate: float, moments: AdamMoments | None
    ) -> CheckpointExport:
        """Export every target set, then the training rows, at the model's present state.

        Generations of an earlier attempt at the same state are reused, finished or half done.

        Args:
            step: g, names the generations.
            learning_rate: mean since the previous generation; weights this checkpoint.
            moments: needed by Adam features.

        Raises:
            BadInput: a target set without a usable row, before any training row is taken.
        """
        adapter = adapter_hash(self.run.model, self.slots)
        sets = self.run.data.targets
        targets, seconds, tokens = [], 0.0, 0
        for rows in sets:
            one = self._one(
                "target", rows, step, adapter=adapter, features=self.settings.target_features
            )
            if not one.generation.usable.any():
                raise BadInput(
                    f"target set {rows.name!r} has no usable row: every gradient is zero, not "
                    "finite, or the row is masked."
                )
            targets.append(one.generation)
            tokens, seconds = tokens + one.summary.tokens, seconds + one.summary.seconds
        train = self._one(
            "train",
            self.run.data.train,
            step,
            adapter=adapter,
            features=self.settings.train_features,
            moments=moments,
            learning_rate=learning_rate,
        )
        return CheckpointExport(
            train.generation,
            tuple(targets),
            target_rows=sum(len(rows) for rows in sets),
            tokens=tokens + train.summary.tokens,
            seconds=seconds + train.summary.seconds,
        )

    def steps(self) -> list[int]:
        """Steps of this run's committed training generations, rising."""
        run = self.run.config.dataflex.gradstore_run or ""
        return sorted(
            g.step
            for g in self.writer.store.generations()
            if g.role == "train" and g.space == GRADIENT and g.record.run == run
        )

    def checkpoints(self, which: Which, step: int) -> list[CheckpointFeatures]:
        """The checkpoints to combine, none later than `step`, weighted by learning rate."""
        return checkpoint_features(
            self.writer.store,
            which,
            run=self.run.config.dataflex.gradstore_run or "",
            sets=[rows.name for rows in self.run.data.targets],
            until=step,
            fewer=True,
        )

    def _one(
        self,
        role: Role,
        rows: Rows,
        step: int,
        *,
        adapter: str,
        features: FeatureSpec,
        moments: AdamMoments | None = None,
        learning_rate: float | None = None,
    ) -> _Exported:
        set_name = rows.name if role == "target" else ""
        run = self.run.config.dataflex.gradstore_run or ""
        name = str(GenerationName(role, step, set_name, run))
        projection = self.projection.with_seed(effective_seed(self.settings.seed, step))
        record = GenerationRecord(
            name=name,
            role=role,
            step=step,
            set=set_name,
            run_id=self.run.run_id,
            adapter_hash=adapter,
            optimizer_hash=moments.sha256() if moments is not None else None,
            effective_seed=projection.seed,
            autocast=self.run.autocast,
            attention=str(getattr(self.run.model.config, "_attn_implementation", None)),
            projection=projection.to_dict(),
            feature=features.kind,
            feature_options=asdict(features),
            learning_rate=learning_rate,
            libraries=libraries(),
        )
        writer = self.writer.begin(
            record, rows.row_set, dim=projection.d, dtype=self.settings.dtype
        )
        waiting = sum(unit.stop - unit.start for unit in writer.pending)
        with progress(
            f"gradients of {name}", waiting, shown=self.run.shows_progress and waiting > 0
        ) as advance:
            summary = export_generation(
                self.run.model,
                rows.dataset,
                self.run.collate,
                writer,
                features=features,
                projection=projection,
                moments=moments,
                lengths=rows.lengths,
                token_budget=self.settings.tokens_per_batch or token_budget(self.run.model),
                longest=getattr(self.run.model.config, "max_position_embeddings", None),
                max_bad_fraction=self.settings.max_bad_fraction,
                on_rows=advance,
            )
        writer.commit()
        return _Exported(self.writer.store.generation(name), summary)
