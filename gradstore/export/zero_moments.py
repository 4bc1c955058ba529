"""Adam moments that DeepSpeed spreads over processes (ZeRO-1 and ZeRO-2), whole by parameter.

There each process keeps the moments of a part of the parameters, cut out of one flat buffer; the
parameters themselves are whole. DeepSpeed puts a parameter's moments together from all processes
(`deepspeed.utils.safe_get_full_optimizer_state`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from gradstore.errors import BadInput

_KEYS = ("exp_avg", "exp_avg_sq")
#: Of a group; a flat buffer's parameters share them.
_CONSTANTS = ("betas", "eps")


def is_spread(parameter: nn.Parameter) -> bool:
    """Flag for a parameter whose optimizer state DeepSpeed has spread over the processes."""
    return hasattr(parameter, "_hp_mapping")


class SpreadMoments:
    """Moments of a DeepSpeed optimizer, read parameter by parameter; collective.

    Args:
        optimizer: DeepSpeed's, or accelerate's wrapper of it.

    Raises:
        BadInput: its groups have different constants, which a parameter can't be found in.
    """

    def __init__(self, optimizer: Any) -> None:  # noqa: ANN401 - DeepSpeed is no dependency
        groups = optimizer.param_groups
        self.group: Mapping[str, Any] = groups[0]
        for key in _CONSTANTS:
            if any(group.get(key) != self.group.get(key) for group in groups):
                raise BadInput(
                    f"the groups of DeepSpeed's optimizer have different {key}: give all "
                    "parameters the same, or take gradient_type `sgd` or `sign`, which need no "
                    "moments"
                )
        # Of the flat buffers; every process has one at least, and all step together.
        self._states = [state for state in optimizer.state.values() if state]
        if self._states:
            _link(optimizer)

    def state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        """Put one parameter's state together; {} before the first step. Every process calls it.

        Returns:
            exp_avg and exp_avg_sq float32 of the parameter's shape, step; or what the optimizer
            keeps instead, where it is not of the Adam family.
        """
        if not self._states:
            return {}
        first = self._states[0]
        if not set(_KEYS) <= set(first):
            return dict(first)
        from deepspeed.utils import (  # type: ignore[import-not-found,unused-ignore]
            safe_get_full_optimizer_state,
        )

        found: dict[str, Tensor] = {
            key: safe_get_full_optimizer_state(parameter, key) for key in _KEYS
        }
        return {**found, "step": first.get("step", self.group.get("step", 0))}


def _link(optimizer: Any) -> None:  # noqa: ANN401 - DeepSpeed is no dependency
    """Let parameters know their parts of the buffers.

    DeepSpeed does so once, in the step of the first group: too early for the others (0.18.4), and
    too late for a run that was resumed and has moments before its first step.
    """
    while not hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        if not hasattr(optimizer, "optimizer"):
            return
        optimizer = optimizer.optimizer
    optimizer._hp_optimizer_states_linked = False
    optimizer._lazy_init_hp_params_optimizer_state()
