"""The model behind `gradstore serve`: loaded by the first question that needs it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import TYPE_CHECKING

from gradstore.errors import BadInput
from gradstore.scoring.pairing import Which
from gradstore.storage.location import Location
from gradstore.store.reader import open_store

if TYPE_CHECKING:
    from dataflex.launch.explain import Explainer
    from dataflex.launch.explained import Explanation

#: Seconds after which a question that waits for its turn says so.
TURN_SECONDS = 0.2


class ModelAtHand:
    """Explainer of a store that loads its model when it is first asked.

    A server that only shows rows never imports torch's models. Once loaded, the model answers every
    question about the same run, step and checkpoints, until a newer checkpoint is committed; any
    other question loads its own model in its place. Questions take turns, from loading to answer:
    so there is one model in memory, also while a slow question is answered.
    """

    def __init__(self, store: Location) -> None:
        """Take the store's place; nothing is read yet."""
        self._store = store
        self._lock = threading.Lock()
        self._loaded: tuple[Hashable, Explainer] | None = None

    def explain(
        self, prompt: str, response: str | None, top: int, *,
        checkpoints: Which = "last", run: str = "", step: int | None = None,
        on_stage: Callable[[str], None] = lambda _: None,
        on_rows: Callable[[int], None] | None = None,
    ) -> Explanation:  # fmt: skip
        """Score the training rows by an answer; response None lets the model answer.

        Args:
            prompt: content of the user's turn.
            response: content of the answer.
            top: rows to name on each side.
            checkpoints: to combine, up to `step`.
            run: prefix of the generations.
            step: no later checkpoint is asked; None for the newest that is there.
            on_stage: called with what is done next.
            on_rows: called with the number of training rows just scored.

        Raises:
            BadInput: no such checkpoint; the model is not where it was; as for `Explainer.explain`.
            ProvenanceMismatch: the model is another one than the store was made with.
        """
        with self._turn(on_stage):
            on_stage("loading the model")
            explainer = self._explainer(checkpoints, run, step)
            on_stage("asking the model")
            return explainer.explain(prompt, response, top, on_rows=on_rows)

    @contextlib.contextmanager
    def _turn(self, on_stage: Callable[[str], None]) -> Iterator[None]:
        """Wait until no other question holds the model; `on_stage` may raise meanwhile."""
        while not self._lock.acquire(timeout=TURN_SECONDS):
            on_stage("waiting for the model")
        try:
            yield
        finally:
            self._lock.release()

    def _explainer(self, checkpoints: Which, run: str, step: int | None) -> Explainer:
        """Return the model that a question needs, loaded in the place of another."""
        generation = None if step is None else _train_until(self._store, run, step)
        asked = _newest_train(self._store), generation, checkpoints, run
        if self._loaded is None or self._loaded[0] != asked:
            from dataflex.launch.explain import open_model

            self._loaded = None  # it goes before the other one comes
            made = open_model(self._store, generation, checkpoints=checkpoints, run=run)
            self._loaded = asked, made
        return self._loaded[1]


def _train_until(store: Location, run: str, step: int) -> str:
    """Name the newest train generation of a run that is not later than a step."""
    found = [
        each for each in open_store(store).generations()
        if each.role == "train" and each.set == "" and each.record.run == run and each.step <= step
    ]  # fmt: skip
    if not found:
        raise BadInput(f'store "{store}" has no committed train generation of run {run!r} up to '
                       f"step {step}; ask for a later one.")  # fmt: skip
    return max(found, key=lambda each: each.step).name


def _newest_train(store: Location) -> str:
    """Return the seal of the newest commit of a train generation; "" without one."""
    commits = [c for c in open_store(store).live_commits() if "train/" in c.generation]
    return commits[-1].sha256 if commits else ""
