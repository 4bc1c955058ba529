"""Online selection: before a step, several times its rows are candidates, and the best make it.

Letters: n candidates of a group, k of them chosen, p gradient length.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from annotated_types import Ge
from pydantic import AllowInfNan

from dataflex.config.parameters import Count, Natural
from dataflex.config.registry import register
from dataflex.data.rows import Rows, RunData
from dataflex.run.context import RunContext, UpdateContext
from dataflex.run.spread import spread_of
from dataflex.run.strategy import FSDP, ZERO3
from dataflex.selectors.base import Selection, Selector
from gradstore.errors import BadInput
from gradstore.scoring.joint_choice import choose_jointly, relative_products

if TYPE_CHECKING:
    import torch

    from dataflex.run.forecast import Forecast
    from gradstore.capture.per_sample import GradientCapture
    from gradstore.capture.products import RowProducts

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Group:
    """The choice among the candidates of one group.

    Attributes:
        rows: (up to k,) chosen positions in the training set.
        candidates: (n,) positions that were chosen from.
        scores: (n,) products with the target direction, nan where a gradient is not finite.
    """

    rows: Positions
    candidates: Positions
    scores: npt.NDArray[np.float64]


@register("selector", "online")
class OnlineSelector(Selector):
    """Selector, meant for every step, of the candidates whose step helps the target most.

    Set `update_step: 1`. Candidates are drawn in reshuffled passes over the rows, `candidates`
    times as many as are chosen. One forward and backward of a group of them gives the products of
    their gradients with the mean gradient of the target rows, and with each other; the chosen rows
    then make a plain step. So a step costs about `candidates` + 1 plain ones.

    Args:
        candidates: rows looked at for each row chosen.
        group_size: rows that are chosen together, out of `candidates` times as many; memory is that
            of a pass over these.
        redundancy: how much rows are marked down whose gradients are alike; 0 takes the best ones.
        temperature: 0 takes the best; above 0, rows are drawn with probabilities that rise as
            exp(product / temperature).
        product: dot, in which long gradients count for more, or cosine.
        space: gradient, or optimizer, where products are of the steps that Adam makes of gradients.
        target_interval: steps from one look at the target rows to the next.
        seed: of the order of candidates, and of a draw.
        tokens_per_batch: padded tokens of a pass, at most; null goes by the device. Gradients are
            kept where a group takes several.
        unique: of rows that are copies of one another, choose none but the first.
    """

    needs_lora = True
    needs_targets = True
    whole_model = frozenset({FSDP, ZERO3})
    distinct = True
    every_step = True
    without_moments = "component_params.space to gradient"
    neutral = frozenset({"tokens_per_batch"})
    paper = (
        "Wang et al. 2024, GREATS: Online Selection of High-Quality Data for LLM Training in Every "
        "Iteration, NeurIPS; OPUS, arXiv:2602.05400 (the draw, the optimizer's space)"
    )

    def __init__(
        self,
        candidates: Annotated[int, Ge(2)] = 4,
        group_size: Count = 8,
        redundancy: Annotated[float, Ge(0), AllowInfNan(False)] = 1.0,
        temperature: Annotated[float, Ge(0), AllowInfNan(False)] = 0.0,
        product: Literal["dot", "cosine"] = "dot",
        space: Literal["gradient", "optimizer"] = "gradient",
        target_interval: Count = 20,
        seed: Natural = 42,
        tokens_per_batch: Count | None = None,
        unique: bool = False,
    ) -> None:
        self.candidates = candidates
        self.group_size = group_size
        self.redundancy = float(redundancy)
        self.temperature = float(temperature)
        self.product = product
        self.space = space
        self.needs_moments = space == "optimizer"
        self.target_interval = target_interval
        self.seed = seed
        self.tokens_per_batch = tokens_per_batch
        self.unique = unique
        self._count = 0
        #: (p,) float32, the mean of the target sets' directions; of the step `_looked`.
        self._direction: npt.NDArray[np.float32] = np.empty(0, dtype=np.float32)
        self._looked = -1
        self._lap, self._offset = 0, 0  # pass over the rows, candidates of it so far
        self._capture: GradientCapture | None = None

    # -- life cycle -------------------------------------------------------------------------------

    def check_count(self, count: int, data: RunData) -> None:
        """Refuse, before the model is loaded, more candidates than there are rows."""
        super().check_count(count, data)
        self._count = count
        usable = np.flatnonzero(data.train.target_tokens > 0)
        most = len(data.train.first_of_copies(usable) if self.unique else usable)
        if (wanted := self.candidates * count) > most:
            raise BadInput(
                f"candidates is {self.candidates}: the {count} rows of an update are chosen from "
                f"{wanted}, but {most} rows can be. Lower component_params.candidates or "
                "update_step (in a pipeline, keep_ratio, or take mode: draw)."
            )

    def forecasts(self, run: RunContext, steps: Sequence[int]) -> Sequence[Forecast]:
        """Forecast the passes over target rows and over candidates, from some rows of each."""
        looked = [steps[0]]
        for step in steps:
            if step - looked[-1] >= self.target_interval:
                looked.append(step)
        train = run.data.train
        targets = [self._forecast(run, f"gradients of {rows.name}", rows, len(looked), len(rows))
                   for rows in run.data.targets]  # fmt: skip
        wanted = self.candidates * self._count
        return [*targets, self._forecast(run, "gradients of candidates", train, len(steps), wanted)]

    def _forecast(self, run: RunContext, what: str, rows: Rows, times: int, count: int) -> Forecast:
        """Forecast passes over `count` of some rows, from passes over a few."""
        import torch

        from dataflex.models.precision import autocast
        from dataflex.run.forecast import Forecast, measured_seconds, peak_memory
        from gradstore.capture.per_sample import GradientCapture

        device = next(run.model.parameters()).device

        def work(positions: Positions) -> None:
            with GradientCapture(run.model) as capture:
                nowhere = torch.zeros(capture.p, device=device)
                self._products(run, capture, rows, positions, nowhere)

        with autocast(run.model, run.autocast):
            seconds = measured_seconds(work, rows.lengths, self._budget(run))
        share = count / len(rows)
        tokens = round(int(rows.lengths.sum()) * share)
        return Forecast(what, times, count, tokens, seconds * share, memory_bytes=peak_memory())

    def start(self, run: RunContext) -> None:
        """Find the parameters whose gradients are taken; refuses a model without one adapter."""
        from gradstore.capture.per_sample import GradientCapture

        self._capture = GradientCapture(run.model)

    def finish(self) -> None:
        """Let go of the model."""
        self._capture = None

    def state(self) -> dict[str, Any]:
        """Return the direction, the step it is of, and the place in the pass over the rows."""
        return {
            "direction": self._direction,
            "looked": self._looked,
            "lap": self._lap,
            "offset": self._offset,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with the same direction and the next candidates."""
        self._direction = np.asarray(state["direction"], dtype=np.float32)
        self._looked = int(state["looked"])
        self._lap, self._offset = int(state["lap"]), int(state["offset"])

    # -- selecting --------------------------------------------------------------------------------

    def select(self, count: int, context: UpdateContext) -> Selection:
        """Look at the target rows if it is time, then choose from the next candidates."""
        from dataflex.models.passes import fitting

        run, train = context.run, context.run.data.train
        clock = [time.perf_counter()]
        tokens = self._look(run, context.step)
        clock.append(time.perf_counter())
        drawn = self._draw(fitting(run, train, context.candidates), self.candidates * count)
        sizes = [self.group_size] * (count // self.group_size)
        sizes += [rest] if (rest := count % self.group_size) else []
        starts = self.candidates * np.cumsum([0, *sizes])
        numbered = list(enumerate(sizes))

        def own() -> list[Group]:
            return self._chosen(context, [
                (number, drawn[starts[number] : starts[number + 1]], size)
                for number, size in run.ranks.share(numbered)
            ])  # fmt: skip

        parts = run.ranks.gather(own)
        groups = [parts[i % run.ranks.world][i // run.ranks.world] for i in range(len(sizes))]
        clock.append(time.perf_counter())
        return self._answer(groups, tokens, clock, context)

    def _answer(
        self, groups: Sequence[Group], tokens: int, clock: Sequence[float], context: UpdateContext
    ) -> Selection:
        """Join the groups' choices."""
        train = context.run.data.train
        scores = np.full(len(train), np.nan)
        for group in groups:
            scores[group.candidates] = group.scores
        among = np.concatenate([group.candidates for group in groups])
        rows = np.concatenate([group.rows for group in groups])
        looked_at = np.isfinite(scores)
        sound = among[looked_at[among]]
        if not len(rows):
            raise BadInput(
                f"online: none of {len(among)} candidates at step {context.step} has a gradient "
                "that is finite. Check the model and the learning rate."
            )
        lost = len(among) - len(sound)
        return Selection(
            rows,
            scores[rows],
            target_rows=sum(len(target) for target in context.run.data.targets),
            tokens=tokens + int(train.lengths[among].sum()),
            export_seconds=clock[1] - clock[0],
            score_seconds=clock[2] - clock[1],
            skipped={"non_finite": lost} if lost else {},
            numbers={
                "candidates": float(len(among)),
                "candidate_mean": float(scores[sound].mean()),
            },
            manifest={
                "candidates": len(among),
                "looked": self._looked,
                "all_scores": spread_of(scores, looked_at, rows),
            },
        )

    def _draw(self, allowed: Positions, wanted: int) -> Positions:
        """Draw the next candidates (wanted,) of the pass over the rows, or of a new one.

        The rest of a pass that is shorter than that is left out: no row is its own rival.
        """
        if wanted > len(allowed):
            raise BadInput(
                f"online: {wanted} candidates requested, {len(allowed)} rows can be chosen. Lower "
                "component_params.candidates or update_step."
            )
        if self._offset + wanted > len(allowed):
            self._lap, self._offset = self._lap + 1, 0
        order = np.random.default_rng([self.seed, self._lap]).permutation(allowed)
        self._offset += wanted
        return order[self._offset - wanted : self._offset]

    def _look(self, run: RunContext, step: int) -> int:
        """Take the target's direction again if it is old enough; return the pass's tokens."""
        from dataflex.models.passes import batches, fitting, whole_rows
        from gradstore.export.direct import target_directions
        from gradstore.export.features import FeatureSpec

        if self._looked >= 0 and step - self._looked < self.target_interval:
            return 0
        budget, most = self._budget(run), whole_rows(run.model)
        looked = [(rows, fitting(run, rows, np.arange(len(rows)))) for rows in run.data.targets]

        def look() -> None:
            rest: tuple[Any, ...] = budget, lambda _: None, most
            sets = [batches(run, *pair, *rest, room=run.whole_room) for pair in looked]
            found = target_directions(run.model, sets, FeatureSpec("sgd")).matrix
            self._direction = found.mean(dim=0).cpu().numpy().astype(np.float32)

        run.ranks.gather(look)
        self._looked = step
        return sum(int(rows.lengths[where].sum()) for rows, where in looked)

    def _chosen(
        self, context: UpdateContext, groups: Sequence[tuple[int, Positions, int]]
    ) -> list[Group]:
        """Choose from this rank's groups.

        Args:
            context: the update's model, optimizer, and step, which a draw's noise goes by.
            groups: number, candidates (n,) and k of each.
        """
        import torch

        from gradstore.export.moments import AdamMoments

        assert self._capture is not None  # start() was called
        run, scale = context.run, None
        device = next(run.model.parameters()).device
        if self.space == "optimizer":
            moments = AdamMoments.from_optimizer(context.optimizer, run.model)
            scale = moments.step_scale(self._capture.slots).to(device)
        direction = torch.from_numpy(self._direction).to(device)
        norm, found = float(np.linalg.norm(self._direction)), []
        with self._capture as capture:
            for number, positions, k in groups:
                where, products = self._products(
                    run, capture, run.data.train, positions, direction, scale
                )
                dots, gram = products.dots.cpu().numpy(), products.gram.cpu().numpy()
                towards, among = relative_products(dots, gram, norm, cosine=self.product != "dot")
                noise = None
                if self.temperature:
                    generator = np.random.default_rng([self.seed, context.step, number])
                    noise = self.temperature * generator.gumbel(size=len(where))
                chosen = choose_jointly(towards, among, k, self.redundancy, noise)
                found.append(Group(where[chosen], where, towards))
        return found

    def _products(
        self,
        run: RunContext,
        capture: GradientCapture,
        rows: Rows,
        positions: Positions,
        direction: torch.Tensor,
        scale: torch.Tensor | None = None,
    ) -> tuple[Positions, RowProducts]:
        """Multiply the gradients of some rows; return them in the order of the products."""
        from dataflex.models.passes import batches
        from gradstore.export.row_products import planned_products

        given, room = (rows, positions, self._budget(run), lambda _: None), run.whole_room
        return planned_products(capture, batches(run, *given, room=room), direction, scale)

    def _budget(self, run: RunContext) -> int:
        from gradstore.capture.limits import token_budget

        return self.tokens_per_batch or token_budget(run.model)
