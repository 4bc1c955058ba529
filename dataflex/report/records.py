"""A run's records as a picture needs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dataflex.run.log import read_events
from gradstore.format.foreign import read_json

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Chosen:
    """Rows of one update.

    Attributes:
        step: g, optimizer steps finished.
        rows: (k,) int64 positions in the training set, in the strategy's order.
        scores: (k,) in the same order, NaN where a row has none.
    """

    step: int
    rows: npt.NDArray[np.int64]
    scores: FloatArray

    @property
    def has_scores(self) -> bool:
        """Return true where any row has a score."""
        return bool(np.isfinite(self.scores).any())


@dataclass(frozen=True)
class Records:
    """Everything that a run wrote about itself.

    Attributes:
        name: the last two parts of its folder's path.
        events: lines of events.jsonl, by step.
        answers: rows of every update, by step.
        losses: (step, loss) of training, by step.
        evaluated: losses on held-out data, name -> (step, loss) by step.
        steps: optimizer steps that the Trainer finished, as far as it wrote that.
    """

    name: str
    events: Sequence[Mapping[str, Any]]
    answers: Sequence[Chosen]
    losses: Sequence[tuple[int, float]]
    evaluated: Mapping[str, Sequence[tuple[int, float]]]
    steps: int

    @classmethod
    def read(cls, folder: Path) -> Records:
        """Read the records of a run.

        Args:
            folder: `output_dir/dataflex`.
        """
        path = folder.parent / "trainer_state.json"
        state = read_json(path.read_text(encoding="utf-8")) if path.is_file() else {}
        losses, evaluated = _history(state.get("log_history", ()))
        name = "/".join(folder.resolve().parent.parts[-2:])
        steps = int(state.get("global_step", 0))
        return cls(name, read_events(folder), _answers(folder), losses, evaluated, steps)

    @cached_property
    def updates(self) -> list[int]:
        """The steps at which the strategy decided; those of weights, all of them, are left out."""
        return sorted({int(e["step"]) for e in self.events if e["event"] != "weight"})

    @cached_property
    def end(self) -> int:
        """The last step that anything tells of."""
        return max([1, self.steps, *(int(e["step"]) for e in self.events)])

    @cached_property
    def chosen(self) -> list[Chosen]:
        """The answers of selectors."""
        ordered = {int(e["step"]) for e in self.events if e["event"] == "reorder"}
        return [each for each in self.answers if each.step not in ordered]

    @cached_property
    def orders(self) -> list[Chosen]:
        """The answers of reorders."""
        ordered = {int(e["step"]) for e in self.events if e["event"] == "reorder"}
        return [each for each in self.answers if each.step in ordered]

    @cached_property
    def sets(self) -> list[str]:
        """The data sets that rows are selected from, the largest first."""
        return self._largest(self.names("train_sets") or self.names("chosen"))

    @property
    def only_set(self) -> str:
        """The data set that rows are selected from, where there is one."""
        return self.sets[0] if self.sets else "the training set"

    @cached_property
    def train_rows(self) -> int:
        """The number of training rows, as far as it is known."""
        told = [int(e["train_rows"]) for e in self.events if "train_rows" in e]
        return max([*told, *(int(each.rows.max()) + 1 for each in self.answers)])

    def names(self, key: str) -> dict[str, float]:
        """Return the names in the mappings that events hold under `key`, each with its sum."""
        found: dict[str, float] = {}
        for event in self.events:
            for name, value in (event.get(key) or {}).items():
                found[name] = found.get(name, 0.0) + float(value)
        return found

    def numbers(self, key: str) -> list[tuple[int, float]]:
        """Return (step, value) of the events that hold a number under `key`."""
        return [(int(e["step"]), float(e[key])) for e in self.events if key in e]

    @staticmethod
    def _largest(names: Mapping[str, float]) -> list[str]:
        return sorted(names, key=lambda name: -names[name])


def _answers(folder: Path) -> list[Chosen]:
    """Read every file of selections, sorted by step."""
    found = []
    for path in (folder / "selections").glob("step_*.json"):
        content = read_json(path.read_text(encoding="utf-8"))
        rows = np.asarray(content["indices"], dtype=np.int64)
        scores = np.full(len(rows), np.nan)
        given = content["metric"].get("score") or []
        scores[: len(given)] = [np.nan if value is None else value for value in given]
        if len(rows):
            found.append(Chosen(int(path.stem.removeprefix("step_")), rows, scores))
    return sorted(found, key=lambda each: each.step)


def _history(
    history: Sequence[Mapping[str, Any]],
) -> tuple[list[tuple[int, float]], dict[str, list[tuple[int, float]]]]:
    """Sort out the losses that the Trainer logged: of training, and of each evaluation set."""
    losses: list[tuple[int, float]] = []
    evaluated: dict[str, list[tuple[int, float]]] = {}
    for line in history:
        for key, value in line.items():
            if key == "loss":
                losses.append((int(line["step"]), float(value)))
            elif key.startswith("eval_") and key.endswith("loss"):
                name = key.removeprefix("eval_").removesuffix("loss").strip("_")
                evaluated.setdefault(name, []).append((int(line["step"]), float(value)))
    return losses, evaluated
