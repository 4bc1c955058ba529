"""NICE: rows whose gradients point where a rewarded response's gradient points.

Letters: K responses to each target row.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from annotated_types import Gt

from dataflex.config.parameters import Count, Natural, Share
from dataflex.config.registry import register
from dataflex.models.paths import model_path_faults
from dataflex.rewards.base import Judge, RewardPrompts, Verdict
from dataflex.rewards.function import FunctionJudge
from dataflex.rewards.local import LocalJudge
from dataflex.rewards.older import renamed
from dataflex.rewards.policy_gradient import (
    Baseline,
    RewardedResponses,
    RewardedTargets,
    check_scored,
    requests_of,
)
from dataflex.rewards.responses import Exchange, Policy, SamplingSettings
from dataflex.rewards.server import ApiJudge, ApiSettings
from dataflex.run.context import RunContext, UpdateContext
from dataflex.selectors.base import Selection
from dataflex.selectors.less import LessSelector
from gradstore.errors import BadInput

if TYPE_CHECKING:
    from dataflex.config.keys import RunConfig
    from dataflex.data.rows import RunData
    from dataflex.run.forecast import Forecast

_log = logging.getLogger(__name__)

JUDGING = (
    "Judge how well a response answers a prompt. Reply with one number from 0 (useless) to 1 "
    "(perfect) and nothing else.\n\nPrompt:\n{prompt}\n\n"
)
WITH_REFERENCE = JUDGING + (
    "A correct answer:\n{reference}\n\nResponse to judge:\n{response}\n\nScore:"
)
WITHOUT_REFERENCE = JUDGING + "Response to judge:\n{response}\n\nScore:"


@register("selector", "nice")
class NiceSelector(LessSelector):
    """Selector of rows whose gradients raise the reward of the model's own answers to the target.

    Args:
        policy_model_path: a fixed model that answers the target prompts; null samples from the
            model in training, again at every update.
        reward_backend: function, local or api; null takes local where reward_model_path is given,
            api where api_base_url is, function otherwise.
        reward_function: package.module:function(prompt, response, reference) -> 0 to 1.
        reward_model_path: local judge, a causal language model or a sequence classifier.
        api_base_url: server with OpenAI's chat completions, such as http://127.0.0.1:8000/v1.
        api_model: the judge's name there.
        api_key_env: environment variable that holds the key.
        api_timeout: seconds a request may take.
        api_retries: further attempts after a failed request.
        api_workers: requests under way at once.
        reward_max_new_tokens: length of a judge's answer.
        reward_prompt_with_ref: what a judge reads, with {prompt}, {response}, {reference}.
        reward_prompt_without_ref: the same for target rows without an answer.
        max_unscored: share of responses that may go without a score, which count 0.
        mc_samples: responses to each target row.
        max_new_tokens: length of a response.
        generation_temperature: of the draws, above 0.
        generation_batch_size: responses under way at once.
        max_prompt_length: tokens of a prompt; a longer one loses its beginning.
        prompt_template: text around the prompt, with {prompt}; null leaves it as in training.
        baseline: loo (a reward counts against the mean of the row's others) or none.
        gold_fallback: a target row whose rewards carry no signal takes its own answer's gradient.
        reward_model_backend: reward_backend as DataFlex 1.1.0 calls it.
        reward_backend_params: a judge's settings as DataFlex 1.1.0 has them, by backend.
        less: as for `LessSelector`.
    """

    paper = "Wang et al. 2025, NICE, ICML 2025, openreview.net/forum?id=2wt8m5HUBs"
    neutral = LessSelector.neutral | {
        "generation_batch_size", "api_timeout", "api_retries", "api_workers", "api_key_env",
    }  # fmt: skip

    def __init__(
        self,
        policy_model_path: str | None = None,
        reward_backend: Literal["function", "local", "api"] | None = None,
        reward_function: str = "dataflex.rewards.overlap:token_f1",
        reward_model_path: str | None = None,
        api_base_url: str | None = None,
        api_model: str | None = None,
        api_key_env: str | None = None,
        api_timeout: Annotated[float, Gt(0)] = 60.0,
        api_retries: Natural = 3,
        api_workers: Count = 8,
        reward_max_new_tokens: Count = 32,
        reward_prompt_with_ref: str | None = None,
        reward_prompt_without_ref: str | None = None,
        max_unscored: Share = 0.1,
        mc_samples: Count = 4,
        max_new_tokens: Count = 512,
        generation_temperature: Annotated[float, Gt(0)] = 0.7,
        generation_batch_size: Count = 32,
        max_prompt_length: Count = 4096,
        prompt_template: str | None = None,
        baseline: Baseline = "loo",
        gold_fallback: bool = False,
        reward_model_backend: str | None = None,
        reward_backend_params: Mapping[str, Mapping[str, Any]] | None = None,
        **less: Any,  # noqa: ANN401 - the base's parameters
    ) -> None:
        super().__init__(**less)
        if baseline == "loo" and mc_samples == 1:
            raise ValueError(
                "mc_samples is 1, but baseline: loo compares a response with the row's others; "
                "raise mc_samples or set baseline: none"
            )
        self.sampling = SamplingSettings(
            mc_samples=mc_samples, max_new_tokens=max_new_tokens,
            temperature=generation_temperature, max_prompt_length=max_prompt_length,
            prompt_template=prompt_template, batch_size=generation_batch_size,
            seed=self.settings.seed, model_path=policy_model_path,
        )  # fmt: skip
        given: dict[str, Any] = {
            "reward_backend": reward_backend, "reward_function": reward_function,
            "reward_model_path": reward_model_path, "reward_max_new_tokens": reward_max_new_tokens,
            "api_base_url": api_base_url, "api_model": api_model, "api_key_env": api_key_env,
            "api_timeout": api_timeout, "api_retries": api_retries, "api_workers": api_workers,
        }  # fmt: skip
        if reward_model_backend is not None:
            given |= renamed(reward_model_backend, reward_backend_params)
        with_reference = reward_prompt_with_ref or WITH_REFERENCE
        without_reference = reward_prompt_without_ref or WITHOUT_REFERENCE
        self.judge = judge_of(given, RewardPrompts(with_reference, without_reference))
        self.max_unscored = float(max_unscored)
        self.baseline: Baseline = baseline
        self.gold_fallback = gold_fallback
        self._policy: Policy | None = None
        self._targets: RewardedTargets | None = None

    # -- checks -----------------------------------------------------------------------------------

    def check(self, config: RunConfig) -> list[str]:
        """Return faults: a missing policy or judge, and configurations without prompts."""
        path = self.sampling.model_path
        faults = [] if path is None else model_path_faults("policy_model_path", path)
        if config.known.stage != "sft":
            faults.append(
                "component nice needs prompts, and rows of stage pt have none: set stage: sft."
            )
        if config.known.train_on_prompt:
            faults.append(
                "train_on_prompt is on: component nice cannot separate prompt and answer in the "
                "target rows. Set train_on_prompt: false."
            )
        return [*faults, *self.judge.faults()]

    def check_data(self, data: RunData, config: RunConfig) -> None:
        """Refuse target sets without a prompt to answer, and images, which are not supported."""
        for rows in data.targets:
            columns = {"images", "videos", "audios"} & set(rows.dataset.column_names)
            if any(row[c] for c in columns for row in rows.dataset.select_columns([c])):
                raise BadInput(
                    f"target set {rows.name!r} has images, videos or audio; component nice "
                    "answers text alone. Choose other target rows, or component less."
                )
            if not any(Exchange.of(row).prompt for row in rows.dataset):
                raise BadInput(
                    f"target set {rows.name!r} has no row with a prompt and an answer. "
                    "Name one that has."
                )

    # -- life cycle -------------------------------------------------------------------------------

    def forecasts(self, run: RunContext, steps: Sequence[int]) -> Sequence[Forecast]:
        """Name the responses, which take as long as they get; forecast the gradients."""
        from dataflex.run.forecast import Forecast

        times = len(steps) if self.sampling.model_path is None else 1
        responses = Forecast("responses", times, note="as long as the model's answers are")
        return [responses, *super().forecasts(run, steps)]

    def start(self, run: RunContext) -> None:
        """Load or ask the judge, then open the store."""
        trusted = run.config.known.trust_remote_code
        self.sampling = replace(self.sampling, trust_remote_code=trusted)
        self._policy = Policy(run, self.sampling)
        if isinstance(self.judge, LocalJudge):
            self.judge.trust_remote_code = trusted
        if isinstance(self.judge, LocalJudge) or run.ranks.leads:
            self.judge.start(run.model)
        super().start(run)

    # -- selecting --------------------------------------------------------------------------------

    def select(self, count: int, context: UpdateContext) -> Selection:
        """Answer the target prompts, have the judge score them, then score rows as LESS does."""
        began = time.perf_counter()
        if self._targets is None or self.sampling.model_path is None:
            self._targets = self._judged(context.run)
        asked_seconds = time.perf_counter() - began
        numbers = self._targets.numbers
        if numbers["rows_without_signal"] and context.run.ranks.leads:
            _log.warning(
                "nice: %d of %d target rows carry no signal, their responses got equal rewards "
                "(mean reward %.3g)",
                numbers["rows_without_signal"],
                sum(len(rows) for rows in context.run.data.targets),
                numbers["reward_mean"],
            )
        selection = super().select(count, context)
        return replace(
            selection,
            export_seconds=selection.export_seconds + asked_seconds,
            numbers={**selection.numbers, **numbers},
            manifest={**selection.manifest, "source": dict(self._targets.options)},
        )

    def target_source(self) -> RewardedTargets | None:
        """Return rewarded responses in place of the target rows' own answers."""
        return self._targets

    def _judged(self, run: RunContext) -> RewardedTargets:
        """Compute responses and rewards of every target row; collective: ranks share the rows."""
        assert self._policy is not None  # since start
        sampled = self._policy.sample(run.data.targets)
        flat = [row for rows in sampled for row in rows]
        asked = [i for i, row in enumerate(flat) if row.responses]

        def own_part() -> dict[int, list[Verdict]]:
            mine = run.ranks.share(asked)
            given = iter(self.judge.judge([a for i in mine for a in requests_of(flat[i])]))
            return {i: [next(given) for _ in flat[i].responses] for i in mine}

        verdicts: dict[int, list[Verdict]] = {}
        for part in run.ranks.gather(own_part):
            verdicts |= part
        check_scored([v for held in verdicts.values() for v in held], self.max_unscored)
        rewarded = iter(
            RewardedResponses(row, np.nan_to_num([v.reward for v in verdicts.get(i, ())], nan=0.0))
            for i, row in enumerate(flat)
        )
        return RewardedTargets(
            {rows.name: [next(rewarded) for _ in rows.dataset] for rows in run.data.targets},
            baseline=self.baseline,
            gold_fallback=self.gold_fallback,
            options={**self.judge.identity(), **self.sampling.identity()},
        )


def judge_of(given: Mapping[str, Any], prompts: RewardPrompts) -> Judge:
    """Build the reward backend that is requested, or that follows from the given settings."""
    guess = "local" if given["reward_model_path"] else "api" if given["api_base_url"] else None
    backend = given["reward_backend"] or guess or "function"
    if backend == "function":
        return FunctionJudge(given["reward_function"])
    length = given["reward_max_new_tokens"]
    if backend == "local":
        return LocalJudge(given["reward_model_path"], prompts, length)
    names = ("base_url", "model", "key_env", "timeout", "retries", "workers")
    settings = {name: given[f"api_{name}"] for name in names}
    return ApiJudge(ApiSettings(**settings, max_tokens=length), prompts)
