"""The user's own selector, named by `target: package.module:Class`."""

from __future__ import annotations

from typing import Any

from dataflex.config.registry import register
from dataflex.selectors.base import Selector
from gradstore.errors import BadInput


@register("selector", "custom")
class CustomSelector(Selector):
    """Your own class, named by `component_params.target`: package.module:Class.

    Args:
        target: package.module:Class; every other parameter goes to that class.
    """

    def __init__(self, target: str | None = None, **params: Any) -> None:  # noqa: ANN401
        raise BadInput(
            "component custom needs component_params.target: package.module:Class, your own "
            "selector (see examples/train_lora/selectors/custom.yaml)."
        )
