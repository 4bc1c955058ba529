"""The user's own weighter, named by `target: package.module:Class`."""

from __future__ import annotations

from typing import Any

from dataflex.config.registry import register
from dataflex.weighters.base import Weighter
from gradstore.errors import BadInput


@register("weighter", "custom")
class CustomWeighter(Weighter):
    """Your own class, named by `component_params.target`: package.module:Class.

    Args:
        target: package.module:Class; every other parameter goes to that class.
    """

    def __init__(self, target: str | None = None, **params: Any) -> None:  # noqa: ANN401
        raise BadInput(
            "component custom needs component_params.target: package.module:Class, your own "
            "weighter (see examples/train_lora/weighters/custom.yaml)."
        )
