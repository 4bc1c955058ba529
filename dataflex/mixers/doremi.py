"""DoReMi: domains on which a small model lags behind a reference count more (run 2 of 3)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dataflex.config.keys import RunConfig
from dataflex.config.parameters import Positive, Share
from dataflex.config.registry import register
from dataflex.data.mixture import domains_of, exponentiated, opening_proportions
from dataflex.mixers.base import Mixer
from dataflex.run.context import RunContext, UpdateContext
from dataflex.run.log import record_of
from dataflex.weighters.base import LossContributor, MeasuredBatch, WeightContext
from gradstore.storage.replace import replace_file

FloatArray = npt.NDArray[np.float64]

#: Written into output_dir, where DataFlex 1.1.0 writes them.
EACH_STEP = "doremi_weights.jsonl"
AVERAGE = "doremi_average_weights.json"
PROPORTIONS = "doremi_step3_proportions.txt"

KEY = "reference_model_path"


@register("mixer", "doremi")
class DoremiMixer(Mixer, LossContributor):
    """Domain weights learned on a proxy model; their average is the mixture of the final run.

    From step W on, every optimizer step moves the weights to domains whose tokens the proxy
    predicts worse than the reference, and weights the loss by them. Rows keep being drawn in the
    opening proportions, so a token's factor is its domain's weight over that proportion: the
    domain's part of the loss is its weight, however often it is drawn. Run 1 trains the reference,
    run 3 the final model, both with `static_mix`. Results lie in output_dir:
    `doremi_weights.jsonl`, a line for each step; `doremi_average_weights.json` and
    `doremi_step3_proportions.txt`, the average (ALGORITHMS 2.3).

    Args:
        reference_model_path: the model that run 1 trained: a model folder, a folder with a LoRA
            adapter on this run's model, or a hub id.
        reweight_eta: step size of the weights.
        reweight_eps: share of the uniform weights that is mixed in after each step.
    """

    paper = "Xie et al. 2023, DoReMi, arXiv:2305.10429"
    # Rows are drawn in the opening proportions throughout: a fixed rule discards nothing.
    dynamic = False
    measures = True

    def __init__(
        self,
        reference_model_path: str | None = None,
        reweight_eta: Positive = 1.0,
        reweight_eps: Share = 1e-3,
    ) -> None:
        self.reference_model_path = reference_model_path
        self.reweight_eta = float(reweight_eta)
        self.reweight_eps = float(reweight_eps)
        self.domain_weights = np.empty(0)
        self.scores = np.empty(0)
        self.summed_weights = np.empty(0)
        self.updates = 0
        self.last_step = -1
        self._shares: FloatArray | None = None
        self._run: RunContext | None = None
        self._reference: Any = None

    # -- life cycle -------------------------------------------------------------------------------

    def check(self, config: RunConfig) -> list[str]:
        """Check that the reference is named, and exists if it is a folder."""
        from dataflex.models.paths import reference_faults

        faults = reference_faults(self.reference_model_path, KEY)
        return [f"{fault} Run 1 of DoReMi (component static) trains it." for fault in faults]

    def start(self, run: RunContext) -> None:
        """Load the reference; begin with uniform weights, or go on where the checkpoint was."""
        from dataflex.models.frozen import Reference

        k = len(domains_of(run.data).names)
        self._reference = Reference(run, str(self.reference_model_path), KEY)
        if self.updates == 0:
            self.domain_weights = np.full(k, 1.0 / k)
            self.scores, self.summed_weights = np.zeros(k), np.zeros(k)
        self._shares = opening_proportions(run.config, run.data)
        if run.ranks.leads:
            forget_after(run.output_dir, self.last_step)
        self._run = run

    def finish(self) -> None:
        """Write the average, also of a run that failed; let the reference go."""
        self._reference = None
        if self._run is not None and self._run.ranks.leads and self.updates:
            names = domains_of(self._run.data).names
            write_average(self._run.output_dir, names, self.average, self.updates)

    def state(self) -> dict[str, Any]:
        """Return weights, scores, and the sum that the average is computed from."""
        return {
            "domain_weights": self.domain_weights,
            "scores": self.scores,
            "summed_weights": self.summed_weights,
            "updates": self.updates,
            "last_step": self.last_step,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""
        self.domain_weights = np.asarray(state["domain_weights"], dtype=np.float64)
        self.scores = np.asarray(state["scores"], dtype=np.float64)
        self.summed_weights = np.asarray(state["summed_weights"], dtype=np.float64)
        self.updates, self.last_step = int(state["updates"]), int(state["last_step"])

    # -- the strategy -----------------------------------------------------------------------------

    @property
    def average(self) -> FloatArray:
        """(k,) mean of the weights over all updates: the result."""
        return np.asarray(self.summed_weights / self.updates)

    def mix(self, context: UpdateContext) -> FloatArray:
        """Return (k,) opening proportions: DoReMi weights the loss, not the sampling."""
        return opening_proportions(context.run.config, context.run.data)

    def by_domain(self) -> Mapping[str, FloatArray]:
        """Return the domain weights, and the excess losses that updated them."""
        return {"weights": self.domain_weights, "excess": self.scores}

    def measure(self, batch: MeasuredBatch) -> FloatArray:
        """Compute (b, 1) excess losses over the reference, clipped per token, summed per sample."""
        reference = self._reference.token_losses(batch.inputs, batch.targets)
        excess = (batch.token_losses - reference).double().cpu().numpy()
        rows = batch.targets.rows.cpu().numpy()
        return clipped_sums(excess, rows, batch.targets.grid[0])[:, None]

    def weights(self, losses: FloatArray, context: WeightContext) -> FloatArray:
        """Return (n,) domain weights over sampling shares; they are updated once per step."""
        if context.domains is None or context.measured is None:
            raise RuntimeError("DoReMi needs each sample's domain and excess loss")
        if context.step != self.last_step:
            self._update(context.measured[:, 0], context.tokens, context.domains, context.step)
        return loss_factors(self.domain_weights, self._shares)[context.domains]

    def _update(
        self,
        excess: FloatArray,
        tokens: npt.NDArray[np.int64],
        domains: npt.NDArray[np.int64],
        step: int,
    ) -> None:
        self.scores = domain_scores(excess, tokens, domains, self.scores)
        self.domain_weights = exponentiated(
            self.domain_weights, self.scores, self.reweight_eta, self.reweight_eps
        )
        self.summed_weights = self.summed_weights + self.domain_weights
        self.updates += 1
        self.last_step = step
        if self._run is not None and self._run.ranks.leads:
            names = domains_of(self._run.data).names
            tell_step(self._run.output_dir, step, names, self.domain_weights, self.scores)


# -- formulas -------------------------------------------------------------------------------------


def loss_factors(domain_weights: FloatArray, shares: FloatArray | None) -> FloatArray:
    """Compute a_d = alpha_d / (k sigma_d), the factor of each domain's tokens (ALGORITHMS 2.3).

    Args:
        domain_weights: (k,) alpha, on the simplex.
        shares: (k,) sigma, the proportions that rows are drawn in; None for equal ones, which
            leave alpha as it is. A domain of share 0 is never drawn.

    Returns:
        (k,) float64.

    Examples:
        >>> loss_factors(np.array([0.5, 0.5]), np.array([0.8, 0.2]))
        array([0.3125, 1.25  ])
    """
    if shares is None:
        return domain_weights
    scaled = len(shares) * shares
    return np.divide(domain_weights, scaled, out=np.zeros_like(domain_weights), where=scaled > 0)


def clipped_sums(excess: FloatArray, rows: npt.NDArray[np.int64], samples: int) -> FloatArray:
    """Add up max(excess, 0) over each sample's tokens.

    Args:
        excess: (s,) loss of the proxy minus that of the reference at each target token.
        rows: (s,) sample of each token.
        samples: b.

    Returns:
        (b,) float64; NaN where a token's loss is.
    """
    sums = np.zeros(samples)
    np.add.at(sums, rows, np.maximum(excess, 0.0))
    return sums


def domain_scores(
    excess: FloatArray,
    tokens: npt.NDArray[np.int64],
    domains: npt.NDArray[np.int64],
    previous: FloatArray,
) -> FloatArray:
    """Compute the mean clipped excess per token of each domain.

    Args:
        excess: (n,) summed clipped excess of each sample of a step, over all ranks.
        tokens: (n,) target tokens of each sample.
        domains: (n,) domain of each sample.
        previous: (k,) scores of the step before.

    Returns:
        (k,) float64; a domain without a token in this step keeps its score.

    Examples:
        >>> domain_scores(np.array([0.7, 1.0]), np.array([3, 3]), np.array([0, 1]), np.zeros(3))
        array([0.23333333, 0.33333333, 0.        ])
    """
    counted = np.isfinite(excess) & (tokens > 0)
    k = len(previous)
    sums = np.bincount(domains[counted], weights=excess[counted], minlength=k)
    counts = np.bincount(domains[counted], weights=tokens[counted], minlength=k)
    return np.where(counts > 0, sums / np.maximum(counts, 1.0), previous)


# -- files ----------------------------------------------------------------------------------------


def tell_step(
    folder: Path, step: int, names: tuple[str, ...], weights: FloatArray, scores: FloatArray
) -> None:
    """Append a step's line to `doremi_weights.jsonl`."""
    line = {
        "step": step,
        "domain_names": list(names),
        "domain_weights": weights.tolist(),
        "perdomain_scores": scores.tolist(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / EACH_STEP).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def forget_after(folder: Path, last_step: int) -> None:
    """Drop what is not of this run: steps after its checkpoint, and an average."""
    for name in (AVERAGE, PROPORTIONS):
        (folder / name).unlink(missing_ok=True)
    path = folder / EACH_STEP
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    held = [(line, record_of(line)) for line in lines if line.endswith("\n")]
    kept = [line for line, record in held if record is not None and record["step"] <= last_step]
    replace_file(path, "".join(kept).encode())


def write_average(folder: Path, names: tuple[str, ...], average: FloatArray, updates: int) -> None:
    """Write the result twice: for programs, and to paste into run 3's YAML."""
    content = {
        "description": "mean domain weights of DoReMi's run 2: the mixture of run 3",
        "update_times": updates,
        "domain_names": list(names),
        "average_weights": average.tolist(),
    }
    replace_file(folder / AVERAGE, (json.dumps(content, indent=2) + "\n").encode())
    shares = [f"{name}: {share:.6f}" for name, share in zip(names, average, strict=True)]
    lines = [f"# init_mixture_proportions: {average.tolist()}", *shares]
    replace_file(folder / PROPORTIONS, ("\n".join(lines) + "\n").encode())
