"""The model behind `gradstore serve`: loaded by the first question that needs it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

from gradstore.store.reader import open_store

if TYPE_CHECKING:
    from dataflex.launch.explain import Explainer
    from dataflex.launch.explained import Explanation


class ModelAtHand:
    """Explainer of a store that loads its model when it is first asked.

    A server that only shows rows never imports torch's models. Once loaded, the model answers every
    question, until a newer checkpoint is committed: then that one is loaded in its place.
    """

    def __init__(self, store: Path) -> None:
        """Take the store's folder; nothing is read yet."""
        self._store = store
        self._lock = threading.Lock()
        self._loaded: tuple[str, Explainer] | None = None

    def explain(self, prompt: str, response: str | None, top: int) -> Explanation:
        """Score the training rows by an answer; response None lets the model answer.

        Raises:
            BadInput: the model is not where it was; as for `Explainer.explain`.
            ProvenanceMismatch: the model is another one than the store was made with.
        """
        return self._explainer().explain(prompt, response, top)

    def _explainer(self) -> Explainer:
        with self._lock:
            newest = _newest_train(self._store)
            if self._loaded is None or self._loaded[0] != newest:
                from dataflex.launch.explain import open_model

                self._loaded = None  # two models need not be in memory at once
                self._loaded = newest, open_model(self._store)
            return self._loaded[1]


def _newest_train(store: Path) -> str:
    """Return the seal of the newest commit of a train generation; "" without one."""
    commits = [c for c in open_store(store).live_commits() if "train/" in c.generation]
    return commits[-1].sha256 if commits else ""
