"""Responses of a policy to the prompts of target rows.

Target rows come tokenised, as prompt and answer in one. Each is taken apart again; the policy (the
model in training, or a fixed one) answers the prompt `mc_samples` times. A response is a function
of (model, seed, row, draw) alone: neither the batch nor the rank nor a resume changes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from dataflex.data.rows import IGNORED, Rows
from dataflex.models.frozen import load_language_model
from dataflex.models.generate import (
    Ids,
    continuations,
    groups_of_similar_length,
    pad_id,
    prompt_ids,
    stop_ids,
)
from dataflex.run.context import RunContext
from dataflex.run.log import progress
from gradstore.capture.limits import max_positions
from gradstore.errors import BadInput


@dataclass(frozen=True)
class SamplingSettings:
    """User settings of sampling.

    Attributes:
        mc_samples: K, responses to each prompt.
        max_new_tokens: length of a response, at most.
        temperature: logits are divided by it.
        max_prompt_length: tokens of a prompt; a longer one loses its beginning.
        prompt_template: text around the prompt, with {prompt}; None leaves it as it is.
        batch_size: responses under way at once.
        seed: combined with row and draw.
        model_path: a fixed policy; None samples from the model in training.
        trust_remote_code: let a fixed policy bring its own code.
    """

    mc_samples: int
    max_new_tokens: int
    temperature: float
    max_prompt_length: int
    prompt_template: str | None
    batch_size: int
    seed: int
    model_path: str | None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Refuse a template that cannot be filled, or never shows the prompt."""
        if self.prompt_template is not None:
            try:
                shown = [in_template(self.prompt_template, text) for text in ("a", "b")]
            except (KeyError, IndexError, ValueError) as error:
                raise ValueError(
                    f"prompt_template cannot be filled ({error}): use {{prompt}}, and double any "
                    "other brace"
                ) from error
            if shown[0] == shown[1]:
                raise ValueError("prompt_template never shows the prompt: put {prompt} into it")

    def identity(self) -> dict[str, Any]:
        """Return the settings that responses depend on, JSON-like."""
        kept = {f: getattr(self, f) for f in ("mc_samples", "max_new_tokens", "temperature",
                                              "max_prompt_length", "prompt_template")}  # fmt: skip
        return {**kept, "sampling_seed": self.seed, "policy": self.model_path}


@dataclass(frozen=True)
class Exchange:
    """A target row taken apart.

    Attributes:
        prompt: token ids before the last labelled stretch.
        reference: that stretch.
    """

    prompt: Ids
    reference: Ids

    @staticmethod
    def of(row: Mapping[str, Any]) -> Exchange:
        """Split a processed row: a conversation's last answer counts, what precedes is prompt.

        Both parts are empty where there is no answer, or nothing before it.
        """
        ids, labels = list(row["input_ids"]), list(row["labels"])
        stop = len(labels)
        while stop and labels[stop - 1] == IGNORED:
            stop -= 1
        start = stop
        while start and labels[start - 1] != IGNORED:
            start -= 1
        return Exchange(ids[:start], ids[start:stop]) if start else Exchange([], [])


@dataclass(frozen=True)
class SampledResponses:
    """Responses of a policy to one target row, in the tokens of the model in training.

    Attributes:
        prompt: token ids that the responses follow.
        responses: K lists of token ids; empty where the row has no prompt.
        reference: token ids of the row's own answer.
        prompt_text: for a judge.
        texts: K responses, for a judge.
        reference_text: for a judge.
    """

    prompt: Ids
    responses: tuple[Ids, ...]
    reference: Ids
    prompt_text: str = ""
    texts: tuple[str, ...] = ()
    reference_text: str = ""

    def row(self, response: Ids) -> dict[str, Any]:
        """Build a training row of prompt and response, for the collator."""
        ids = [*self.prompt, *response]
        return {
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
            "labels": [IGNORED] * len(self.prompt) + response,
            "images": None,
            "videos": None,
            "audios": None,
        }


class Policy:
    """Sampler of responses: the model in training, or a fixed one."""

    def __init__(self, run: RunContext, settings: SamplingSettings) -> None:
        """Check that prompts and responses fit into the model.

        Raises:
            BadInput: they do not.
        """
        self.run = run
        self.settings = settings
        self.tokenizer = run.data.tokenizer
        self._room(run.model, "the model")

    def sample(self, sets: Sequence[Rows]) -> list[list[SampledResponses]]:
        """Sample responses to every row of every target set. Collective: the ranks share the rows.

        Returns:
            For each set one `SampledResponses` per row, the same on every rank.
        """
        ranks, settings = self.run.ranks, self.settings
        exchanges = [Exchange.of(row) for rows in sets for row in rows.dataset]
        model, tokenizer = self.run.model, self.tokenizer
        if settings.model_path is not None:
            model, tokenizer = load_language_model(settings.model_path, settings.trust_remote_code)
            model = model.to(next(self.run.model.parameters()).device)
        asked = self._asked(exchanges, model, tokenizer)
        with_prompt = np.array([i for i, ids in enumerate(asked) if ids], dtype=np.int64)
        lengths = [len(asked[i]) for i in with_prompt]
        groups = groups_of_similar_length(
            lengths, max(1, settings.batch_size // settings.mc_samples)
        )

        def own_part() -> dict[int, list[Ids]]:
            found: dict[int, list[Ids]] = {}
            with progress(
                "responses", len(lengths), shown=self.run.shows_progress, told=ranks.leads
            ) as advance:
                for group in ranks.share(groups):
                    numbers = with_prompt[group]
                    found |= self._draw(numbers, asked, model, tokenizer)
                    advance(min(len(group) * ranks.world, len(lengths)))
            return found

        drawn: dict[int, list[Ids]] = {}
        for part in ranks.gather(own_part):
            drawn |= part
        sampled = [
            self._sampled(exchange, asked[i], drawn.get(i, []), tokenizer)
            for i, exchange in enumerate(exchanges)
        ]
        ends = np.cumsum([0, *(len(rows) for rows in sets)]).tolist()
        return [sampled[a:b] for a, b in pairwise(ends)]

    def _asked(self, exchanges: Sequence[Exchange], model: Any, tokenizer: Any) -> list[Ids]:  # noqa: ANN401
        """Build the policy's input for each row, in its own tokens; empty if there is no prompt."""
        room = self._room(model, "the policy")
        template, fixed = self.settings.prompt_template, self.settings.model_path is not None
        found: list[Ids] = []
        for exchange in exchanges:
            ids = exchange.prompt
            if ids and (fixed or template is not None):
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                if template is None:
                    ids = prompt_ids(tokenizer, text)
                else:
                    ids = list(tokenizer(in_template(template, text))["input_ids"])
            found.append(ids[-room:])
        return found

    def _draw(
        self,
        numbers: npt.NDArray[np.int64],
        asked: Sequence[Ids],
        model: Any,  # noqa: ANN401
        tokenizer: Any,  # noqa: ANN401
    ) -> dict[int, list[Ids]]:
        """Draw K responses to each of some rows, in the policy's tokens."""
        settings = self.settings
        pairs = [(int(i), draw) for i in numbers for draw in range(settings.mc_samples)]
        uniforms = np.stack(
            [
                np.random.default_rng([settings.seed, i, draw]).random(settings.max_new_tokens)
                for i, draw in pairs
            ]
        )
        answers = continuations(
            model,
            [asked[i] for i, _ in pairs],
            max_new_tokens=settings.max_new_tokens,
            stops=stop_ids(tokenizer),
            pad=pad_id(tokenizer),
            uniforms=uniforms,
            temperature=settings.temperature,
            autocast=self.run.autocast,
        )
        found: dict[int, list[Ids]] = {}
        for (i, _), answer in zip(pairs, answers, strict=True):
            found.setdefault(i, []).append(answer)
        return found

    def _sampled(
        self,
        exchange: Exchange,
        asked: Ids,
        answers: Sequence[Ids],
        tokenizer: Any,  # noqa: ANN401
    ) -> SampledResponses:
        """Put a row's responses into the tokens and words of the model in training."""
        if not answers:
            return SampledResponses([], (), exchange.reference)
        texts = tuple(tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers)
        prompt, responses = asked, tuple(answers)
        if self.settings.model_path is not None:
            prompt = exchange.prompt[-self._room(self.run.model, "the model") :]
            limit, end = self.settings.max_new_tokens, [self.tokenizer.eos_token_id]
            responses = tuple(
                [*self.tokenizer(text, add_special_tokens=False)["input_ids"], *end][:limit]
                for text in texts
            )
        longest = max_positions(self.run.model)
        return SampledResponses(
            prompt,
            responses,
            exchange.reference[: None if longest is None else longest - len(prompt)],
            self.tokenizer.decode(exchange.prompt, skip_special_tokens=True).strip(),
            texts,
            self.tokenizer.decode(exchange.reference, skip_special_tokens=True).strip(),
        )

    def _room(self, model: Any, who: str) -> int:  # noqa: ANN401 - a PreTrainedModel
        """Return the most tokens a prompt may have so that a full-length response fits after it."""
        settings = self.settings
        longest = max_positions(model)
        if longest is None:
            return settings.max_prompt_length
        if settings.max_new_tokens >= longest:
            raise BadInput(
                f"max_new_tokens is {settings.max_new_tokens}, but {who} has {longest} positions "
                "for prompt and response together: set component_params.max_new_tokens lower."
            )
        return min(settings.max_prompt_length, longest - settings.max_new_tokens)


def in_template(template: str, prompt: str) -> str:
    """Fill in the prompt; {instruction} is DataFlex 1.1.0's name for it, {input} stays empty."""
    return template.format(prompt=prompt, instruction=prompt, input="")
