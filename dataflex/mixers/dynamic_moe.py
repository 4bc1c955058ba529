"""Domains that a mixture-of-experts model routes unlike the others get more of the next rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dataflex.config.parameters import Count, Positive, Share
from dataflex.config.registry import register
from dataflex.data.mixture import domains_of, exponentiated, opening_proportions
from dataflex.data.rows import Rows
from dataflex.mixers.base import Mixer
from dataflex.run.context import RunContext, UpdateContext
from dataflex.run.log import progress
from dataflex.run.strategy import FSDP, ZERO3
from gradstore.errors import BadInput

if TYPE_CHECKING:
    from dataflex.run.forecast import Forecast

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

#: Rows of one domain, and positions (b,) of a batch of them.
Batch = tuple[int, Rows, IntArray]


@register("mixer", "dynamic_moe")
class DynamicMoeMixer(Mixer):
    """Proportions that follow how differently the domains load the experts.

    Loads are counted on held-out rows (`mixer_eval_dataset` or `val_size`); a domain without any is
    looked at on rows of its training set, which stay in training. The first answer moves away from
    the opening proportions. `freeze_gate: true` keeps the routers as they are.

    Args:
        eta: step size of the proportions.
        c: share of the uniform proportions in every answer.
        collect_steps: batches of each domain measured in an update.
        eval_samples: rows of each domain that these are drawn from, at most.
        eval_batch_size: rows of a batch.
    """

    paper = "Zhu et al. 2024, Dynamic Data Mixing for Mixture-of-Experts, arXiv:2406.11256"
    neutral = frozenset({"eval_batch_size"})
    whole_model = frozenset({FSDP, ZERO3})

    def __init__(
        self,
        eta: Positive = 10.0,
        c: Share = 0.05,
        collect_steps: Count = 10,
        eval_samples: Count = 1000,
        eval_batch_size: Count = 32,
    ) -> None:
        self.eta, self.c = float(eta), float(c)
        self.collect_steps = collect_steps
        self.eval_samples = eval_samples
        self.eval_batch_size = eval_batch_size
        self.proportions = np.empty(0)
        self.distances = np.empty(0)

    def forecasts(self, run: RunContext, steps: Sequence[int]) -> Sequence[Forecast]:
        """Forecast the passes that count loads, from some of the first update's batches."""
        from dataflex.run.forecast import batches_forecast

        self._check(run)
        plan = self._plan(run, steps[0])
        lengths = [rows.lengths[positions] for _, rows, positions in plan]

        def count(numbers: Sequence[int]) -> None:
            self._counts(run, [plan[i] for i in numbers])

        return [batches_forecast("loads of experts", len(steps), lengths, count)]

    def start(self, run: RunContext) -> None:
        """Refuse a model without experts; begin at the opening proportions."""
        self._check(run)
        if not len(self.proportions):
            self.proportions = opening_proportions(run.config, run.data)
            self.distances = np.zeros(len(self.proportions))

    def _check(self, run: RunContext) -> None:
        """Refuse a model without experts."""
        from dataflex.models.experts import expert_layers

        if not expert_layers(run.model):
            raise BadInput(
                f"component dynamic_moe reads which experts a model chooses, and "
                f"{type(run.model).__name__} has no layer of experts with readable routing. Use a "
                "mixture-of-experts model (Mixtral, Qwen MoE, OLMoE, DeepSeek) or another mixer."
            )

    def state(self) -> dict[str, Any]:
        """Return the proportions that the next update starts from, and the load distances."""
        return {"proportions": self.proportions, "distances": self.distances}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""
        self.proportions = np.asarray(state["proportions"], dtype=np.float64)
        self.distances = np.asarray(state["distances"], dtype=np.float64)

    def by_domain(self) -> Mapping[str, FloatArray]:
        """Return the distance of each domain's expert loads from those of the others."""
        return {"load_distance": self.distances}

    def mix(self, context: UpdateContext) -> FloatArray:
        """Compute (k,) proportions from the experts' loads; the ranks share the batches."""
        run = context.run
        everyone = run.ranks.gather(lambda: self._counts(run, self._plan(run, context.step)))
        self.distances = load_distances(np.sum(everyone, axis=0))
        self.proportions = exponentiated(self.proportions, self.distances, self.eta, self.c)
        return self.proportions

    def _counts(self, run: RunContext, plan: Sequence[Batch]) -> FloatArray:
        """Count (k, L, E) choices of each expert of each layer by this rank's share of a plan."""
        import torch

        from dataflex.models.experts import counted_choices, expert_count, expert_layers, loads
        from gradstore.capture.losses import model_inputs
        from gradstore.capture.modelstate import borrowed

        layers = expert_layers(run.model)
        width = max(expert_count(experts) for experts in layers)
        found = np.zeros((len(domains_of(run.data).names), len(layers), width))
        device = next(run.model.parameters()).device
        total = sum(len(positions) for _, _, positions in plan)
        with (
            borrowed(run.model, freeze=False),
            torch.no_grad(),
            counted_choices(run.model) as choices,
            progress(
                "loads of experts", total, shown=run.shows_progress, told=run.ranks.leads
            ) as advance,
        ):
            for domain, rows, positions in run.ranks.share(plan):
                batch = run.collate([rows.dataset[int(i)] for i in positions])
                inputs = {k: v.to(device) for k, v in model_inputs(batch).items()}
                choices.clear()
                run.model(**inputs)
                mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
                found[domain] += loads(choices, mask, width).cpu().numpy()
                advance(min(len(positions) * run.ranks.world, total))
        return found

    def _plan(self, run: RunContext, step: int) -> list[Batch]:
        """Plan batches of rows of similar length for all domains: the same list on every rank."""
        domains = domains_of(run.data)
        plan: list[Batch] = []
        for d, name in enumerate(domains.names):
            rows = domains.held_out.get(name)
            if rows is None:
                rows, pool = run.data.train, np.flatnonzero(domains.of_row == d)
            else:
                pool = np.arange(len(rows))
            pool = np.random.default_rng([run.seed, d]).permutation(pool)[: self.eval_samples]
            drawn = np.random.default_rng([run.seed, step, d]).permutation(pool)
            drawn = drawn[: self.collect_steps * self.eval_batch_size]
            drawn = drawn[np.argsort(-rows.lengths[drawn], kind="stable")]
            plan += [(d, rows, drawn[at : at + self.eval_batch_size])
                     for at in range(0, len(drawn), self.eval_batch_size)]  # fmt: skip
        return plan


def load_distances(counts: FloatArray) -> FloatArray:
    """Compute the distance of each domain's expert loads from those of all domains.

    Args:
        counts: (k, L, E) how often each of E experts in each of L layers was chosen.

    Returns:
        (k,) mean over all domains, itself included, and over layers, of the Euclidean distance of
        the L1-normalised loads. A layer is compared with itself alone: expert 3 of one layer has
        nothing to do with expert 3 of another.

    Examples:
        Two domains that use two experts the other way round:

        >>> load_distances(np.array([[[3.0, 1.0]], [[1.0, 3.0]]])).round(6)
        array([0.353553, 0.353553])
    """
    totals = counts.sum(axis=2, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    apart = np.linalg.norm(shares[:, None] - shares[None], axis=3)
    return np.asarray(apart.mean(axis=(1, 2)))
