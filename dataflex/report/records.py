"""A run's records as its picture and its report need them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dataflex.run.log import read_events
from dataflex.run.receipt import read_receipt
from dataflex.run.spread import told_spread
from gradstore.format.foreign import read_json

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Chosen:
    """Rows of one update.

    Attributes:
        step: g, optimizer steps finished.
        rows: (k,) int64 positions in the training set, in the strategy's order.
        scores: (k,) in the same order, NaN where a row has none.
        spread: of the scores of all rows, as `run.spread` tells it; {} where it was not told.
        kinds: `column`, and counts of rows by kind: `chosen` and `all`; {} where rows have none.
    """

    step: int
    rows: npt.NDArray[np.int64]
    scores: FloatArray
    spread: Mapping[str, Any] = field(default_factory=dict)
    kinds: Mapping[str, Any] = field(default_factory=dict)

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
        folder: `output_dir/dataflex`.
        receipt: content of receipt.json; {} where there is none.
    """

    name: str
    events: Sequence[Mapping[str, Any]]
    answers: Sequence[Chosen]
    losses: Sequence[tuple[int, float]]
    evaluated: Mapping[str, Sequence[tuple[int, float]]]
    steps: int
    folder: Path = Path()
    receipt: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Records:
        """Read the records of a run.

        Args:
            folder: `output_dir/dataflex`.
        """
        receipt = read_receipt(folder) or {}
        steps, history = _trained(folder.parent, receipt)
        losses, evaluated = _history([*history, *_evaluated(folder.parent, receipt, steps)])
        name = "/".join(folder.resolve().parent.parts[-2:])
        return cls(name, read_events(folder), _answers(folder), losses, evaluated, steps,
                   folder, receipt)  # fmt: skip

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
        told.append(int((self.receipt.get("rows") or {}).get("train_rows", 0)))
        return max([*told, *(int(each.rows.max()) + 1 for each in self.answers)])

    def lines(self, step: int, ranks: Iterable[int]) -> list[dict[str, Any]]:
        """Read lines of `selections/step_<g>.jsonl`, by position; [] where there is no file."""
        path = self.folder / "selections" / f"step_{step}.jsonl"
        if not path.is_file():
            return []
        wanted = sorted(set(ranks))
        found = {}
        with path.open(encoding="utf-8", newline="\n") as file:
            for i, line in enumerate(islice(file, wanted[-1] + 1 if wanted else 0)):
                if i in wanted:
                    found[i] = read_json(line)
        return [found[i] for i in ranks if i in found]

    def lowest(self, step: int) -> list[dict[str, Any]]:
        """Read the usable rows with the lowest scores, where the strategy told them."""
        path = self.folder / "selections" / f"lowest_{step}.jsonl"
        if not path.is_file():
            return []
        return [read_json(line) for line in path.read_text("utf-8").split("\n") if line]

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
        manifest = content.get("manifest") or {}
        kinds = manifest.get("kinds")
        if not isinstance(kinds, dict) or not {"column", "chosen", "all"} <= kinds.keys():
            kinds = {}
        if len(rows):
            step = int(path.stem.removeprefix("step_"))
            found.append(Chosen(step, rows, scores, told_spread(manifest), kinds))
    return sorted(found, key=lambda each: each.step)


def _evaluated(output_dir: Path, receipt: Mapping[str, Any], steps: int) -> list[dict[str, Any]]:
    """Read the evaluation after the last step, which the Trainer's log no longer gets."""
    path = output_dir / "eval_results.json"
    if not steps or not path.is_file() or path.stat().st_mtime < _began(receipt):
        return []
    return [{**read_json(path.read_text(encoding="utf-8")), "step": steps}]


def _began(receipt: Mapping[str, Any]) -> float:
    """Return the time at which the last session began, as files are stamped; 0 if unknown."""
    sessions = receipt.get("sessions")
    return datetime.fromisoformat(sessions[-1]["began"]).timestamp() if sessions else 0.0


def _trained(
    output_dir: Path, receipt: Mapping[str, Any]
) -> tuple[int, Sequence[Mapping[str, Any]]]:
    """Read what the Trainer logged: steps finished, and its lines.

    It writes trainer_state.json when it has finished. Of a run that did not, or of a later one than
    that file's, LlamaFactory's log tells, line by line.
    """
    state, log = output_dir / "trainer_state.json", output_dir / "trainer_log.jsonl"
    if state.is_file() and (state.stat().st_mtime >= _began(receipt) or not log.is_file()):
        content = read_json(state.read_text(encoding="utf-8"))
        return int(content.get("global_step", 0)), content.get("log_history", ())
    if not log.is_file():
        return 0, ()
    by_step: dict[tuple[int, bool], dict[str, Any]] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):  # a kill may have cut the last one
            told = read_json(line)
            step = int(told["current_steps"])
            by_step[step, "loss" in told] = {**told, "step": step}
    return max((step for step, _ in by_step), default=0), list(by_step.values())


def _history(
    history: Sequence[Mapping[str, Any]],
) -> tuple[list[tuple[int, float]], dict[str, list[tuple[int, float]]]]:
    """Sort out the losses that the Trainer logged: of training, and of each evaluation set."""
    losses: list[tuple[int, float]] = []
    evaluated: dict[str, dict[int, float]] = {}
    for line in history:
        for key, value in line.items():
            if key == "loss":
                losses.append((int(line["step"]), float(value)))
            elif key.startswith("eval_") and key.endswith("loss"):
                name = key.removeprefix("eval_").removesuffix("loss").strip("_")
                evaluated.setdefault(name, {})[int(line["step"])] = float(value)
    return losses, {name: sorted(points.items()) for name, points in evaluated.items()}
