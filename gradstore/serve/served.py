"""The store that is served: its newest commits, its generations and its texts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gradstore.errors import BadInput
from gradstore.format.layout import METADATA
from gradstore.scoring.pairing import Which
from gradstore.serve.jobs import Desk
from gradstore.serve.problems import Missing
from gradstore.storage.location import Location, location
from gradstore.storage.places import reads_at
from gradstore.store.generation import Generation
from gradstore.store.reader import Store, open_store


class Explained(Protocol):
    """A model's answer to a question about an answer; n training rows."""

    @property
    def prompt(self) -> str:
        """The request."""

    @property
    def response(self) -> str:
        """The answer, given or generated."""

    @property
    def generated(self) -> bool:
        """The model made the answer."""

    @property
    def generations(self) -> tuple[str, ...]:
        """Names of the train generations that were combined, oldest first."""

    @property
    def values(self) -> npt.NDArray[np.float32]:
        """(n,), each training row's influence; nan where it is not usable."""


class Explainer(Protocol):
    """A model at hand: takes the gradient of an answer that is in no target set.

    `dataflex.open_model` has one; gradstore itself never loads a model.
    """

    def explain(
        self, prompt: str, response: str | None, top: int, *,
        checkpoints: Which, run: str, step: int | None, on_stage: Callable[[str], None],
        on_rows: Callable[[int], None],
    ) -> Explained:  # fmt: skip
        """Score the training rows by an answer.

        Args:
            prompt: the request.
            response: its answer; None lets the model answer.
            top: rows to name on each side.
            checkpoints: to combine, up to `step`.
            run: prefix of the generations.
            step: of the newest checkpoint to ask; None for the newest there is.
            on_stage: called with what is done next, such as "loading the model".
            on_rows: called with the number of training rows just scored.
        """


class Served:
    """Things that every request works with.

    Attributes:
        path: where the store is.
        files: its files, to be read.
        desk: jobs and kept results.
        explainer: the model, None where there is none.
    """

    def __init__(
        self, path: Location, explainer: Explainer | None = None, *, is_made: bool = False
    ) -> None:
        """Open the store; raises as `open_store` does.

        Args:
            path: where it is.
            explainer: the model, None where there is none.
            is_made: the store may be missing, and is made by whoever writes through the server.
        """
        found = location(path)
        self.path = found.absolute() if isinstance(found, Path) else found
        self.files = reads_at(self.path)
        self.desk = Desk()
        self.explainer = explainer
        self._lock = threading.Lock()
        self._view: Store | None = None
        if not is_made or self.files.has(METADATA):
            self._view = open_store(self.path)

    def view(self) -> Store:
        """Return the store at its newest commit.

        Raises:
            Missing: it was removed.
            DamagedData: a commit is damaged.
        """
        with self._lock:
            try:
                if self._view is None:
                    self._view = Store(self.files)
                self._view = self._view.refresh()
            except BadInput as error:
                raise Missing(str(error)) from error
            return self._view


def generation_of(store: Store, name: str) -> Generation:
    """Open a generation by name; raise Missing if there is none."""
    try:
        return store.generation(name)
    except BadInput as error:
        raise Missing(str(error)) from error


def commit_of(store: Store) -> str:
    """Return the id of the store's newest commit."""
    return store.head.sha256 if store.head else "empty"


def generation_lines(generations: Sequence[Generation]) -> list[dict[str, Any]]:
    """Describe generations for `GET /v1/generations`."""
    return [
        {
            "name": each.name,
            "role": each.role,
            "set": each.set,
            "run": each.record.run,
            "step": each.step,
            "space": each.space,
            "rows": each.rows,
            "usable_rows": each.status_counts()["ok"],
            "dim": each.dim,
            "dtype": each.dtype,
            "feature": each.record.feature,
            "learning_rate": each.record.learning_rate,
            "status": each.status_counts(),
            "bytes": each.bytes,
            "commit": each.commit_sha,
        }
        for each in generations
    ]
