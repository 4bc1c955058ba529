"""A reward computed by any importable function."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dataflex.config.registry import imported
from dataflex.rewards.base import JudgeRequest, Verdict, shortened
from gradstore.errors import BadInput

if TYPE_CHECKING:
    from torch import nn


class FunctionJudge:
    """Judge that calls `package.module:callable(prompt, response, reference)`.

    Args:
        target: where the function is; it returns a number from 0 to 1, or NaN for none.
    """

    def __init__(self, target: str) -> None:
        self.target = target

    def identity(self) -> Mapping[str, Any]:
        """Return the function's name; changes of its code are not detected."""
        return {"reward": "function", "function": self.target}

    def faults(self) -> list[str]:
        """Check that the function can be imported and called."""
        try:
            _ = self._function
        except BadInput as error:
            return [str(error)]
        return []

    def start(self, model: nn.Module) -> None:
        """Do nothing: there is nothing to load."""

    def judge(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        """Call the function once per response."""
        return [self._one(request) for request in requests]

    def _one(self, request: JudgeRequest) -> Verdict:
        try:
            answer = self._function(request.prompt, request.response, request.reference)
        except Exception as error:  # whatever a user's function raises, the row must be named
            raise BadInput(
                f"reward_function {self.target} failed with {error!r} on the response "
                f"{shortened(request.response)!r} to {shortened(request.prompt)!r}."
            ) from error
        try:
            reward = float(answer)
        except (TypeError, ValueError):
            reward = math.inf
        if math.isnan(reward):
            return Verdict(math.nan, "nan")
        if not 0 <= reward <= 1:
            raise BadInput(
                f"reward_function {self.target} returned {shortened(repr(answer))} for the "
                f"response {shortened(request.response)!r}; a reward is a number "
                "from 0 to 1, or NaN."
            )
        return Verdict(reward)

    @cached_property
    def _function(self) -> Callable[[str, str, str], Any]:
        found: Any = imported(self.target, "reward_function", "package.module:function")
        if not callable(found):
            raise BadInput(
                f"reward_function {self.target!r} is a {type(found).__name__}, not a function."
            )
        function: Callable[[str, str, str], Any] = found
        return function
