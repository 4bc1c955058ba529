"""States of training that lds.py measures from, and the options that name one."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import numpy.typing as npt
from effect import LATEST, State, paused
from tinyrun import SKILLS, TinyRun

from dataflex.data.rows import Rows

#: Learning rate of the smooth run, as a part of the file's.
SMOOTH = 0.1
#: Rows of a step as the file has them.
STEP_ROWS = 8


@dataclass(frozen=True)
class Beginning:
    """Where retrained models begin, and how they go on.

    Attributes:
        smooth: at a tenth of the rate, rows that are left out keep their places with weight 0.
        steps: optimizer steps on random rows before; 0 begins with the fresh adapter.
        rate: learning rate, as a multiple of the file's, of all steps.
        rows: of a step.
        clip: max_grad_norm as a multiple of the usual norm, from step `LATEST` on; 0 takes 1.0.
        pool: rows that models are retrained on and scores are of, those that the run would take
            next; 0 for all.
    """

    smooth: bool = False
    steps: int = 0
    rate: float = 1.0
    rows: int = STEP_ROWS
    clip: float = 0.0
    pool: int = 0

    @property
    def state(self) -> str:
        """Name what is not as in the file, smoothness apart; "" for nothing.

        Examples:
            >>> Beginning(steps=100, clip=0.1, pool=400).state
            '100 steps, clipped to 0.1, 400 rows'
        """
        parts = {
            f"{self.steps} steps": self.steps,
            f"rate x {self.rate:g}": self.rate != 1,
            f"B = {self.rows}": self.rows != STEP_ROWS,
            f"clipped to {self.clip:g}": self.clip,
            f"{self.pool} rows": self.pool,
        }
        return ", ".join(text for text, there in parts.items() if there)

    def folder(self, bank: Path) -> Path:
        """Return the state's own folder of a bank."""
        place = bank / "smooth" if self.smooth else bank
        return place / self.state.replace(", ", "-").replace(" ", "") if self.state else place

    @property
    def setting(self) -> dict[str, Any]:
        """All that decides a retrained model besides its rows, for its bank."""
        found: dict[str, Any] = {"model": "examples/tiny", "epochs": 1, "seed": 1}
        if self.smooth:
            found |= {"rate": SMOOTH, "left out": "weight 0"}
        return found | ({"state": self.state} if self.state else {})

    def start(self, seed: int = 1) -> tuple[TinyRun, npt.NDArray[np.int64]]:
        """Train a run to the state; with (n,) the rows of the file that are left to it.

        Raises:
            SystemExit: the pool is larger than the file.
        """
        rate = self.rate * (SMOOTH if self.smooth else 1)
        state = State(self.state, self.steps, self.clip, rate=rate, rows=self.rows)
        run, _ = paused(state, seed, [f"tiny_target_{skill}" for skill in SKILLS])
        train = run.data.train
        if not self.pool:
            return run, np.arange(len(train))
        if self.pool > len(train):
            raise SystemExit(f"--pool {self.pool}: there are {len(train)} rows")
        seen = self.steps * self.rows
        chosen = np.sort(run.order.take(np.arange(seen, seen + self.pool), mode="wrap"))
        pool = Rows(f"{train.name}, {self.state}", train.dataset.select(chosen.tolist()))
        run.data, run.skills = replace(run.data, train=pool), run.skills[chosen]
        return run, chosen


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `Beginning`."""
    default = Beginning()
    parser.add_argument("--smooth", action="store_true", help="on the smooth run")
    parser.add_argument("--steps", type=int, default=default.steps,
                        help="steps before; scores are then of that state")  # fmt: skip
    parser.add_argument("--rate", type=float, default=default.rate,
                        help="learning rate, times the file's")  # fmt: skip
    parser.add_argument("--rows", type=int, default=default.rows, help="rows of a step")
    parser.add_argument("--clip", type=float, default=default.clip,
                        help="max_grad_norm, times the usual norm")  # fmt: skip
    parser.add_argument("--pool", type=int, default=default.pool,
                        help="retrain on the next so many rows alone")  # fmt: skip


def beginning(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Beginning:
    """Read the options; exits where they name no state."""
    if options.clip and options.steps < LATEST:
        parser.error(f"--clip is relative to {LATEST} steps' norms: it needs --steps {LATEST}")
    if options.pool and not options.steps:
        parser.error("--pool needs --steps: without any, there is no state to score at")
    if options.replay and options.steps:
        parser.error("--replay is of a run from its first step: leave out --steps")
    names = ("smooth", "steps", "rate", "rows", "clip", "pool")
    return Beginning(**{name: getattr(options, name) for name in names})
