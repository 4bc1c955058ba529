"""The catalogue shows what a run gets: a preset's parameters, and defaults for the rest only."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from rich.console import Console

from dataflex.config.presets import resolve
from dataflex.config.registry import KINDS, parameters
from dataflex.launch.components import as_yaml, catalogue, other_presets, show

CATALOGUE = catalogue()
TRAIN_TYPES = {kind: train_type for train_type, (_, kind) in KINDS.items()}
NAMES = [
    (entry["kind"], name, entry)
    for entry in CATALOGUE
    for name in sorted({entry["name"], *entry["presets"]})
]

#: What a pipeline is told of where it was found.
PLACE = {"components_cfg_file", "placeholders"}


#: Parameters that a configuration has to name: there is nothing to show.
REQUIRED = {"pipeline": {"stages": [{"family": "weighter", "component": "loss"}]}}


def got(kind: str, name: str) -> dict[str, Any]:
    """All parameters of the strategy that a run with component_name: name and no other builds."""
    component = resolve(TRAIN_TYPES[kind], name, REQUIRED.get(name, {}))
    defaults = {key: p.default for key, p in parameters(component.cls).items()}
    return {key: list(value) if isinstance(value, tuple) else value
            for key, value in {**defaults, **component.params}.items()
            if key not in PLACE} | dict.fromkeys(REQUIRED.get(name, ()))  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "entry"), NAMES, ids=[f"{k}-{n}" for k, n, _ in NAMES])
def test_what_is_shown_is_what_a_run_gets(kind: str, name: str, entry: dict[str, Any]) -> None:
    own = entry["preset_parameters"].get(name, entry["parameters"])
    assert {key: value for key, value in own.items() if key not in PLACE} == got(kind, name)
    if name == entry["name"]:
        assert own == entry["parameters"]
    else:
        differing = next(values for names, values in other_presets(entry) if name in names)
        assert {**entry["parameters"], **differing} == own


def test_every_value_and_every_preset_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = partial(Console, width=5000, height=100)  # whatever terminal the tests are given
    monkeypatch.setattr("rich.console.Console", wide)
    show(CATALOGUE)
    said = [line.strip() for line in capsys.readouterr().out.replace("│", "\n").splitlines()]
    for entry in CATALOGUE:
        values = [entry["parameters"], *(values for _, values in other_presets(entry))]
        for key, value in (pair for each in values for pair in each.items()):
            assert any(line.split("  # ")[0] == f"{key}: {as_yaml(value)}" for line in said), key
        for names, _ in other_presets(entry):
            assert f"{', '.join(names)}:" in said
