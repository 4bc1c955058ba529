"""What the source of a class says is what the imported class says."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest

from dataflex.bridge import arguments
from dataflex.config import registry
from dataflex.config.presets import check_names
from dataflex.config.registry import PACKAGES, declared_names, strategies
from dataflex.config.sources import find_class
from gradstore.errors import BadInput


@pytest.mark.parametrize("kind", PACKAGES)
def test_strategies_and_their_parameters_are_those_of_the_classes(kind: str) -> None:
    found = declared_names(kind)
    live = strategies(kind)
    assert found is not None
    assert set(found) == set(live)
    for name, cls in live.items():
        constructors = registry.constructors_of(cls)
        takes_any = bool(constructors) and registry.takes_any_name(constructors[-1])
        assert found[name] == (None if takes_any else set(registry.parameters(cls))), name


def test_keys_are_the_fields_of_llamafactorys_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    live = {
        f.name: f for c in arguments.argument_classes() for f in dataclasses.fields(c) if f.init
    }
    keys = arguments.described_keys()
    assert set(keys) == set(live) == arguments.accepted_keys()
    assert len(keys) > 300
    helps = {name: " ".join(str(f.metadata.get("help", "")).split()) for name, f in live.items()}
    assert {name: key.help for name, key in keys.items()} == helps
    hints = {n: h for c in arguments.argument_classes() for n, h in get_type_hints(c).items()}
    for name, key in keys.items():
        parts = {part for part in _alternatives(hints[name]) if part is not type(None)}
        choices = [
            value for part in parts if get_origin(part) is Literal for value in get_args(part)
        ]
        assert list(key.choices) == choices, name
        plain = {part.__name__ for part in parts if part in (bool, int, float)}
        assert key.types & {"bool", "int", "float"} == plain, name
        assert len(key.types) == len(parts), name
    monkeypatch.setenv("USE_MCA", "1")  # then the classes themselves are asked
    monkeypatch.setattr(arguments, "argument_classes", lambda: [Other])
    assert arguments.accepted_keys() == {"mine"}


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """The parts of a union, or the annotation alone."""
    union = get_origin(hint) in (Union, UnionType)
    return get_args(hint) if union else (hint,)


@dataclasses.dataclass
class Other:
    mine: int = 3


def test_a_class_is_found_through_imports_and_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "unheard_of"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "inner" / "__init__.py").write_text("from ..base import Base as Above\n")
    (package / "base.py").write_text("class Base:\n    def __init__(self, a, *, b=1): ...\n")
    (package / "last.py").write_text(
        "from unheard_of.inner import Above\nNamed = Above\n"
        "class Last(Named):\n    def __init__(self, c, **rest): super().__init__(**rest)\n"
        "class Any(Base_of_nowhere):\n    def __init__(self, **rest): ...\n"
        "class Plain: ...\n"
        "class Below(somewhere.Base[int]): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    last, anything, plain = (find_class("unheard_of.last", n) for n in ("Last", "Any", "Plain"))
    assert last is not None
    assert last.parameters() == {"a", "b", "c"}
    assert anything is not None
    assert anything.parameters() is None
    assert plain is not None
    assert plain.parameters() == frozenset()
    below = find_class("unheard_of.last", "Below")
    assert below is not None
    assert below.parameters() is None
    assert find_class("unheard_of.last", "Nothing") is None
    assert find_class("unheard_of_at_all", "Last") is None
    assert "unheard_of" not in sys.modules


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("dynamic_select", "les", {}), "did you mean 'less'"),
        (("dynamic_select", None, {}), "needs component_name"),
        (("dynamic_select", "nice", {"proj_dmi": 3}), "did you mean 'proj_dim'"),
        (("dynamic_reorder", "saw", {"pattern_parms": {}}), "did you mean 'pattern_params'"),
        (("dynamic_lego", "pipeline", {"stage": []}), "did you mean 'stages'"),
        (("dynamic_select", "less", {"proj_dim": 3, "cache_dir": "x"}), None),
        (("dynamic_select", "custom", {"whatever": 3}), None),
        (("dynamic_select", "less", {"target": "no.such:Class", "whatever": 3}), None),
    ],
)
def test_names_are_checked_as_resolve_checks_them(given: Any, says: str | None) -> None:
    if says is None:
        check_names(*given)
        return
    with pytest.raises(BadInput, match=says):
        check_names(*given)


def test_where_a_package_may_add_strategies_nothing_is_refused_before_it_is_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry.importlib.metadata, "entry_points", lambda **_: ["one"])
    check_names("dynamic_select", "of_that_package", {})
