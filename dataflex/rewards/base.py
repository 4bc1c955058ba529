"""Input and output of a judge."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from gradstore.errors import BadInput

if TYPE_CHECKING:
    from torch import nn

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)"
_SCORE = re.compile(rf"({_NUMBER})\s*(?:/\s*({_NUMBER})|(%))?")
_LABELLED = re.compile(rf"\b(?:score|rating|reward)\b[^\d.+-]{{0,20}}{_SCORE.pattern}", re.I)

#: Asked before training starts: a judge that cannot answer this will not answer the rest.
PROBE_PROMPT, PROBE_ANSWER = "What is 2 + 2?", "4"


@dataclass(frozen=True)
class JudgeRequest:
    """One sampled response.

    Attributes:
        prompt: what the policy was asked.
        response: what it answered.
        reference: the target row's own answer, "" where it has none.
    """

    prompt: str
    response: str
    reference: str


@dataclass(frozen=True)
class Verdict:
    """Verdict of a judge on one response.

    Attributes:
        reward: 0 to 1; NaN where the judge gave none.
        text: answer of the judge, for messages.
    """

    reward: float
    text: str = ""


class Judge(Protocol):
    """A reward backend."""

    def identity(self) -> Mapping[str, Any]:
        """Return everything its rewards depend on, JSON-like."""

    def faults(self) -> list[str]:
        """List the faults that can be found before anything is loaded, one sentence each."""

    def start(self, model: nn.Module) -> None:
        """Load what is needed and refuse what cannot work; called once, before training.

        Args:
            model: the model in training, for its device.
        """

    def judge(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        """Return one verdict per response, in order."""


@dataclass(frozen=True)
class RewardPrompts:
    """Prompts for a judging model.

    Attributes:
        with_reference: used where the target row has an answer.
        without_reference: used where it has none.

    Both may use {prompt}, {response} and {reference}, or the names of DataFlex 1.1.0: {instruction}
    for the prompt, {prediction} for the response, and {input}, which is empty here.
    """

    with_reference: str
    without_reference: str

    def fill(self, request: JudgeRequest) -> str:
        """Build the prompt for one response."""
        template = self.with_reference if request.reference else self.without_reference
        return filled(template, request)

    def faults(self) -> list[str]:
        """List templates that cannot be filled, or never include the response."""
        found = []
        for key, template in (
            ("reward_prompt_with_ref", self.with_reference),
            ("reward_prompt_without_ref", self.without_reference),
        ):
            try:
                shown = [filled(template, JudgeRequest("p", text, "r")) for text in ("a", "b")]
            except (KeyError, IndexError, ValueError) as error:
                found.append(
                    f"{key} cannot be filled ({error}): use {{prompt}}, {{response}} and "
                    "{reference}, and double any other brace."
                )
                continue
            if shown[0] == shown[1]:
                found.append(f"{key} never shows the response: put {{response}} into it.")
        return found


def filled(template: str, request: JudgeRequest) -> str:
    """Fill a template with a response's texts."""
    return template.format(
        prompt=request.prompt,
        response=request.response,
        reference=request.reference,
        instruction=request.prompt,
        prediction=request.response,
        input="",
    )


def parse_score(text: str) -> float:
    """Parse the score in a judge's answer, 0 to 1: `0.8`, `8/10`, `80%`, `Score: 0.8`.

    A number behind the word score, rating or reward counts (the last one, if there are several);
    without that word there must be exactly one number.

    Returns:
        NaN where the answer has no score, several numbers, or one outside [0, 1].

    Examples:
        >>> parse_score("Good work. Score: 8/10"), parse_score("0.25"), parse_score("2 or 3")
        (0.8, 0.25, nan)
    """
    labelled = list(_LABELLED.finditer(text))
    found = labelled[-1:] or list(_SCORE.finditer(text))
    if len(found) != 1:
        return math.nan
    number, whole, percent = found[0].groups()
    divisor = 100.0 if percent else float(whole or 1.0)
    value = float(number) / divisor if divisor else math.nan
    return value if 0 <= value <= 1 else math.nan


def refuse_probe(judge: str, verdict: Verdict) -> None:
    """Stop before training where a judge's answer to the probe holds no score.

    Raises:
        BadInput: the answer holds no score; quotes it.
    """
    if math.isnan(verdict.reward):
        raise BadInput(
            f"{judge} was asked to score the answer {PROBE_ANSWER!r} to {PROBE_PROMPT!r} and "
            f"answered {shortened(verdict.text)!r}: no score from 0 to 1. Choose a model that "
            "follows instructions, or change the prompts reward_prompt_with_ref and "
            "reward_prompt_without_ref."
        )


def shortened(text: str, limit: int = 200) -> str:
    """Shorten a text to its beginning, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[:limit]} ..."
