"""Options of an engine: none without one, and no engine but Ray."""

from __future__ import annotations

from typing import Any

import pytest

from gradstore.cli.options import OnEngine
from gradstore.errors import BadInput


@pytest.mark.parametrize(
    "given", [{"address": "auto"}, {"actors": 2}, {"cpus_per_actor": 2.0}], ids=str
)
def test_options_of_an_engine_need_one(given: dict[str, Any]) -> None:
    assert OnEngine().ray() is None
    with pytest.raises(BadInput, match="--address, --actors and what an actor takes need --engine"):
        OnEngine(**given).ray()
    options = OnEngine(engine="ray", **given).ray()
    assert options is not None
    assert given.items() <= vars(options).items()


def test_another_engine_is_named() -> None:
    with pytest.raises(BadInput, match="'spark'; use --engine ray, or leave --engine out"):
        OnEngine(engine="spark").ray()
