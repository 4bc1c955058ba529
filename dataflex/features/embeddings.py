"""The embedding service: rows -> unit vectors, kept as generations of the run's store.

Two sources. The model in training: hidden states averaged over a row's tokens, another generation
at every step it is asked at. An encoder of its own (`embedding_model_name_or_path`): rows are
decoded to text and tokenised again, once per run, and reused by any run with the same rows.

Letters: n rows, d dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dataflex.data.rows import Rows
from dataflex.features.embedders import (
    STORED,
    Embedder,
    EmbeddingSettings,
    embedder_of,
)
from dataflex.features.shared import export_shared, keep_text
from dataflex.features.store_owner import check_owner
from dataflex.run.context import RunContext
from gradstore.errors import BadInput, StoreError
from gradstore.export.gradient_space import libraries
from gradstore.format.names import GenerationName, Role
from gradstore.format.records import embedding_record
from gradstore.store.writer import StoreWriter

if TYPE_CHECKING:
    from gradstore.format.records import GenerationRecord
    from gradstore.store.filling import ExportSummary
    from gradstore.store.generation import Generation
    from gradstore.store.reader import Store
    from gradstore.store.space_writer import SpaceWriter


@dataclass(frozen=True)
class EmbeddingExport:
    """Generations of embeddings, committed.

    Attributes:
        train: name of the training rows' generation.
        targets: names of the target sets', in the run's order; empty where none was asked for.
        tokens: tokens that went through the model; 0 where everything was there already.
        seconds: duration of the passes.
    """

    train: str
    targets: tuple[str, ...]
    tokens: int
    seconds: float


class EmbeddingService:
    """Service that writes and finds the embeddings of one run.

    Every rank has one, and shares the passes; rank 0's works on the open store.
    """

    def __init__(
        self,
        run: RunContext,
        settings: EmbeddingSettings,
        opened: Callable[[], StoreWriter] | None = None,
        source: Embedder | None = None,
    ) -> None:
        """Open the embeddings' space of the store for writing.

        Args:
            run: with its model.
            settings: which model, which layer.
            opened: returns, on rank 0, the store's writer where it is open already.
            source: makes vectors in a way of its own; None chooses by `settings`.

        Raises:
            ProvenanceMismatch: the store holds embeddings of other rows, or of another model.
            StoreBusy: another process writes to it.
            BadInput: the embedding model can't be used.
        """
        self.run = run
        self.frozen = settings.frozen
        self._source: Embedder = source or embedder_of(run, settings)
        self._own: StoreWriter | None = None
        self._writer: StoreWriter | SpaceWriter | None = None
        run.ranks.decide(lambda: self._open(opened))

    def _open(self, opened: Callable[[], StoreWriter] | None) -> None:
        run, source = self.run, self._source
        if opened is not None:
            self._writer = opened().with_space(source.space, source.fields())
        else:
            path = run.config.store_path
            self._own = StoreWriter(path, space=source.space, provenance=source.fields())
            self._writer = self._own
        try:
            check_owner(self.store, run, space=source.space, run_id=source.run_id)
        except StoreError:
            self.close()
            raise

    @property
    def store(self) -> Store:
        """The store as it is now; on rank 0."""
        if self._writer is None:
            raise RuntimeError("the store is open on rank 0 alone, and until close()")
        return self._writer.store

    def generation(self, name: str) -> Generation:
        """Return a committed generation; called on rank 0."""
        return self.store.generation(name)

    def close(self) -> None:
        """Release the store's lock, where this service holds it."""
        if self._own is not None:
            self._own.close()
        self._own = self._writer = None

    def clean(self, keep: int) -> None:
        """Remove all but the newest `keep` steps, where this service holds the store; rank 0."""
        if self._own is not None:
            self._own.clean(keep)

    def export(self, step: int, targets: Sequence[Rows] = ()) -> EmbeddingExport:
        """Embed the training rows and some target sets, as far as they are not; collective.

        Args:
            step: g, names the generations; an encoder of its own counts as step 0.
            targets: the sets wanted.

        Raises:
            BadInput: a set without a usable row; too many rows that are not finite.
        """
        step = 0 if self.frozen else step
        names, tokens, seconds = [], 0, 0.0
        sets: list[tuple[Role, Rows]] = [("target", rows) for rows in targets]
        for role, rows in [*sets, ("train", self.run.data.train)]:
            name, summary = self._one(role, rows, step)
            names.append(name)
            tokens, seconds = tokens + summary.tokens, seconds + summary.seconds
        self._source.release()
        return EmbeddingExport(names[-1], tuple(names[:-1]), tokens, seconds)

    def _one(self, role: Role, rows: Rows, step: int) -> tuple[str, ExportSummary]:
        record = self._record(role, rows, step)

        def begin() -> Any:  # noqa: ANN401 - a GenerationWriter
            if self._writer is None:
                raise RuntimeError("the store is open on rank 0 alone, and until close()")
            keep_text(self.run, self._writer, rows)
            return self._writer.begin(record, rows.row_set, dim=self._source.dim, dtype=STORED)

        def check() -> str:
            generation = self.generation(record.name)
            if not generation.usable.any():
                raise BadInput(
                    f"{record.name} has no usable row: no text, more tokens than the model takes, "
                    "or embeddings that are not finite. Check the rows, or name another "
                    "embedding_model_name_or_path."
                )
            return generation.name

        summary = export_shared(
            self.run.ranks,
            f"embeddings of {record.name}",
            begin,
            lambda unit, advance: self._source.unit(rows, unit, advance),
            max_bad_fraction=0.01,
            shows_progress=self.run.shows_progress,
            lengths=rows.lengths,
        )
        return self.run.ranks.decide(check), summary

    def _record(self, role: Role, rows: Rows, step: int) -> GenerationRecord:
        set_name = rows.name if role == "target" else ""
        run = self.run.config.store_run
        return embedding_record(
            GenerationName(role, step, set_name, run),
            space=self._source.space,
            run_id=self._source.run_id,
            libraries=libraries(),
            **self._source.identity(),
        )
