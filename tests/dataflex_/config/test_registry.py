"""Presets resolve through `name`; nothing is dropped silently; a user's class needs no package."""

from __future__ import annotations

import inspect
import logging
import re
from pathlib import Path

import pytest

from dataflex.config import registry
from dataflex.config.presets import resolve
from dataflex.config.registry import (
    PACKAGES,
    constructors_of,
    descriptions,
    documentation,
    parameters,
    register,
    strategies,
)
from gradstore.errors import BadInput


def test_the_preset_is_overridden_parameter_by_parameter() -> None:
    component = resolve("dynamic_select", "less", {"proj_dim": 64})
    assert component.params["proj_dim"] == 64
    assert component.params["gradient_type"] == "adam_marginal"


def test_two_presets_of_one_strategy_are_possible(tmp_path: Path) -> None:
    presets = tmp_path / "p.yaml"
    presets.write_text(
        "selectors:\n  a: {name: random, params: {seed: 1}}\n  b: {name: random, params: {seed: 2}}"
    )
    seeds = [resolve("dynamic_select", key, {}, presets).build().seed for key in "ab"]
    assert seeds == [1, 2]


def test_an_unknown_parameter_names_the_nearest_and_all_accepted() -> None:
    with pytest.raises(BadInput, match=r"'proj_dmi' \(did you mean 'proj_dim'\?\).*aggregation"):
        resolve("dynamic_select", "less", {"proj_dmi": 3})


def test_an_unknown_component_names_the_known_ones() -> None:
    with pytest.raises(BadInput, match=r"did you mean 'less'\?.*custom, .*less, loss, .*random"):
        resolve("dynamic_select", "les", {})


def test_a_missing_component_name_is_refused() -> None:
    with pytest.raises(BadInput, match="needs component_name"):
        resolve("dynamic_select", None, {})


def test_a_preset_with_an_unknown_strategy_is_refused(tmp_path: Path) -> None:
    presets = tmp_path / "p.yaml"
    presets.write_text("selectors: {mine: {name: lesss}}")
    with pytest.raises(BadInput, match="did you mean 'less'"):
        resolve("dynamic_select", "mine", {}, presets)


def test_retired_parameters_are_dropped_with_a_word(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="dataflex"):
        logging.getLogger("dataflex").propagate = True
        component = resolve("dynamic_select", "less", {"save_interval": 16, "cache_dir": "x"})
    assert not {"save_interval", "cache_dir"} & set(component.params)
    assert "save_interval is ignored" in caplog.text


def test_a_users_class_is_found_beside_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_pick.py").write_text("class Pick:\n    def __init__(self, share=1): ...\n")
    monkeypatch.chdir(tmp_path)
    params = {"target": "my_pick:Pick", "share": 2}
    assert type(resolve("dynamic_select", "custom", params).build()).__name__ == "Pick"
    with pytest.raises(BadInput, match="Accepted: share"):
        resolve("dynamic_select", "custom", {"target": "my_pick:Pick", "shore": 2})


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("no_such_module:X", "cannot be imported"),
        ("json:nothing", "cannot be imported"),
        ("json:loads", "not a class"),
        ("json", "package.module:Class"),
    ],
)
def test_a_wrong_target_is_told(target: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        resolve("dynamic_select", "custom", {"target": target})


def test_a_parameter_out_of_range_names_its_component() -> None:
    for params in (
        {"proj_dim": 0},
        {"gradient_type": "adamw"},
        {"checkpoints": 0},
        {"checkpoints": 3, "keep_generations": 2},
        {"checkpoints": "all", "keep_generations": 5},
        {"bias_correction": "no"},
        {"tokens_per_batch": "big"},
        {"max_bad_fraction": "a"},
        {"unit_rows": 0},
        {"unit_rows": (1 << 20) + 1},
        {"scoring": "direct", "checkpoints": "all"},
        {"aggregation": "sum"},
    ):
        with pytest.raises(BadInput, match="component 'less'"):
            resolve("dynamic_select", "less", params).build()


def test_a_name_is_claimed_once() -> None:
    with pytest.raises(ValueError, match="already"):
        register("selector", "less")(int)


def documented(text: str) -> set[str]:
    """Names that the `Args:` of docstrings explain: entries one step in, with words behind them."""
    sections = re.findall(r"^Args:\n((?:(?: {4}.*)?(?:\n|\Z))*)", text, flags=re.M)
    return {name for part in sections for name in re.findall(r"^ {4}(\w+): \S", part, flags=re.M)}


@pytest.mark.parametrize("kind", PACKAGES)
def test_every_strategy_documents_every_parameter_and_no_other(kind: str) -> None:
    for name, cls in strategies(kind).items():
        explained, accepted = documented(documentation(cls)), set(parameters(cls))
        assert accepted <= explained, name
        # The constructor's `**rest` may say whose parameters it stands for.
        signatures = [inspect.signature(constructor) for constructor in constructors_of(cls)]
        rest = {
            p.name for s in signatures for p in s.parameters.values() if p.kind == p.VAR_KEYWORD
        }
        assert explained - rest <= accepted, name


def test_a_parameter_that_is_only_mentioned_is_not_documented() -> None:
    text = """Prefers rows by `alpha`.

    beta: indented, but no argument.

Args:
    gamma: explained; a line that goes on
        delta: is part of gamma's.
    epsilon:

Raises:
    zeta: no argument.
Args:
    eta: another docstring's.
"""
    assert documented(text) == {"gamma", "eta"}


def test_a_constructors_rest_stands_for_the_parameters_it_inherits(tmp_path: Path) -> None:
    class Base:
        """Base.

        Args:
            width: how wide.
        """

        def __init__(self, width: int = 1) -> None:
            self.width = width

    class Wider(Base):
        """Wider.

        Args:
            height: how high.
        """

        def __init__(self, height: int = 2, **base: int) -> None:
            super().__init__(**base)
            self.height = height

    assert {name: p.default for name, p in parameters(Wider).items()} == {"height": 2, "width": 1}
    assert "how high" in documentation(Wider)
    assert "how wide" in documentation(Wider)
    assert descriptions(Wider) == {"height": "how high.", "width": "how wide."}
    assert "aggregation" in parameters(strategies("selector")["less"])
    assert "proj_dim" in parameters(strategies("selector")["less"])


def test_an_installed_package_adds_strategies_by_an_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "stranger.py").write_text(
        "from dataflex.config.registry import register\n"
        "from dataflex.selectors.base import Selector\n\n\n"
        "@register('selector', 'strange')\n"
        "class Strange(Selector):\n"
        "    def __init__(self, power: int = 3) -> None:\n"
        "        self.power = power\n"
    )
    info = tmp_path / "stranger-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[dataflex.components]\nstrange = stranger\nbroken = no_such_module\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with caplog.at_level(logging.WARNING):
        component = resolve("dynamic_select", "strange", {"power": 5})
    assert component.build().power == 5
    assert "entry point broken of no_such_module cannot be loaded" in caplog.text
    with pytest.raises(BadInput, match=r"'powr' \(did you mean 'power'\?\)"):
        resolve("dynamic_select", "strange", {"powr": 5})
    del registry._classes["selector", "strange"]
