"""A parameter is declared once: in the annotation of the constructor that takes it."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from annotated_types import Gt, Le
from pydantic import Field

from dataflex.config.parameters import BadParameter, Count, declared, describe, faults
from dataflex.config.presets import resolve
from dataflex.config.registry import PACKAGES, declarations, parameters, strategies
from dataflex.features.settings import FeatureSettings
from dataflex.selectors.base import Selector
from dataflex.selectors.less import LessSelector
from gradstore.errors import BadInput

EVERY = [(kind, name, cls) for kind in PACKAGES for name, cls in strategies(kind).items()]


class Own(Selector):
    """A user's selector."""

    def __init__(
        self,
        share: Annotated[float, Gt(0), Le(1)] = 0.5,
        part: Annotated[float, Field(gt=0, lt=1)] = 0.5,
        mode: Literal["near", "far"] | Count = "near",
        sizes: Sequence[int] | None = None,
        callback: Any = None,
        unread: set[int] | int = 3,
    ) -> None:
        self.share = share


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"share": 0}, "share is 0; it must be above 0 and at most 1"),
        ({"share": float("nan")}, "share is nan; it must be above 0 and at most 1"),
        ({"share": True}, "share is True; expected a number above 0 and at most 1"),
        ({"share": "half"}, "share is 'half'; expected a number above 0 and at most 1"),
        ({"share": None}, "share is null; expected a number above 0 and at most 1"),
        ({"part": 1}, "part is 1; it must be above 0 and below 1"),
        ({"mode": "fa"}, "mode is 'fa'; choose near, far or a whole number of at least 1"),
        ({"mode": 0}, "mode is 0; it must be at least 1"),
        ({"sizes": [1, "b"]}, "sizes is [1, 'b']; expected a list, each a whole number, or null"),
        ({"sizes": "12"}, "sizes is '12'; expected a list, each a whole number, or null"),
    ],
)
def test_a_refused_value_is_told_with_its_limit(params: dict[str, Any], says: str) -> None:
    with pytest.raises(BadParameter) as error:
        Own(**params)
    assert str(error.value) == says


def test_what_fits_is_taken_as_it_is() -> None:
    assert Own(share=1).share == 1
    assert faults(declared(Own.__init__), {"sizes": (1, 2), "callback": 3, "unread": "x"}) == []


def test_a_positional_value_is_checked_like_a_named_one() -> None:
    with pytest.raises(ValueError, match="share is 2"):
        Own(2)


def test_all_refused_values_are_told_together() -> None:
    with pytest.raises(BadInput) as error:
        Own(share=0, mode="x", sizes=3)  # type: ignore[arg-type]
    assert [line.split()[0] for line in str(error.value).splitlines()] == ["share", "mode", "sizes"]
    params = {"proj_dim": 0, "aggregation": "sum", "keep_generations": 0, "proj_dmi": 3}
    with pytest.raises(BadInput) as error:
        resolve("dynamic_select", "less", params)
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    assert "unknown component_params of 'less': 'proj_dmi' (did you mean 'proj_dim'?)" in lines[0]
    assert all(f"component 'less': {key} is " in str(error.value) for key in list(params)[:3])


def test_pydantic_is_never_quoted() -> None:
    for params in ({"share": 0}, {"mode": object()}, {"sizes": {}}):
        with pytest.raises(BadParameter) as error:
            Own(**params)  # type: ignore[arg-type]
        assert not re.search(r"pydantic|https?:|input_type|Input should", str(error.value))


def test_a_signature_stays_as_it_is_written_and_a_strategy_can_be_copied() -> None:
    assert list(inspect.signature(Own).parameters)[:2] == ["share", "part"]
    assert copy.deepcopy(Own(share=0.25)).share == 0.25


def test_a_user_class_without_base_or_annotations_is_built_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_free.py").write_text(
        "from dataflex.api import Selector\n\n\n"
        "class Bare:\n    def __init__(self, share=1, **more): self.share = share\n\n\n"
        "class Strange(Selector):\n"
        "    def __init__(self, share: 'Nowhere' = 1): self.share = share\n\n\n"
        "class Plain:\n    def __init__(self, share: float = 1.0, seed: int = 1): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("Bare", "Strange"):
        params = {"target": f"own_free:{name}", "share": [1]}
        assert resolve("dynamic_select", "custom", params).build().share == [1]
    for wrong in ({"share": "x"}, {"seed": -1}):
        with pytest.raises(BadInput, match=f"{next(iter(wrong))} is "):
            resolve("dynamic_select", "custom", {"target": "own_free:Plain", **wrong})


def test_a_dataclass_is_checked_where_a_configuration_is_read_or_once_decorated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its constructor is added by a decorator, after the base class had a look."""
    (tmp_path / "own_data.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from typing import Annotated\n\n"
        "from annotated_types import Gt\n"
        "from dataflex.api import Selector\n"
        "from dataflex.config.parameters import checked\n\n\n"
        "@dataclass\n"
        "class Plain(Selector):\n"
        "    share: Annotated[float, Gt(0)] = 0.5\n\n\n"
        "@checked\n"
        "@dataclass\n"
        "class Decorated(Selector):\n"
        "    share: Annotated[float, Gt(0)] = 0.5\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("Plain", "Decorated"):
        target = {"target": f"own_data:{name}"}
        assert resolve("dynamic_select", "custom", {**target, "share": 2}).build().share == 2
        with pytest.raises(BadInput, match="component 'custom': share is 0; it must be above 0"):
            resolve("dynamic_select", "custom", {**target, "share": 0})
    own = importlib.import_module("own_data")
    with pytest.raises(BadParameter, match="share is 0; it must be above 0"):
        own.Decorated(share=0)


@pytest.mark.parametrize(("kind", "name", "cls"), EVERY, ids=[f"{k}-{n}" for k, n, _ in EVERY])
def test_every_default_is_what_its_own_declaration_takes(kind: str, name: str, cls: type) -> None:
    known = declarations(cls)
    accepted = parameters(cls)
    given = {key: p.default for key, p in accepted.items() if p.default is not p.empty}
    assert faults(known, given) == []
    unread = {key for key, p in accepted.items() if key not in known} - {"target"}
    assert not unread, "a strategy of ours says of each parameter what it may be"


def test_a_group_of_parameters_is_declared_in_one_place() -> None:
    shared = set(inspect.signature(FeatureSettings).parameters)
    assert shared <= set(parameters(LessSelector))
    assert LessSelector(proj_dim=64, seed=7).settings == FeatureSettings(proj_dim=64, seed=7)
    with pytest.raises(ValueError, match="proj_dim is 0; it must be from 1 to"):
        LessSelector(proj_dim=0)
    with pytest.raises(ValueError, match="s=9 exceeds d=8"):
        LessSelector(proj_dim=8, sjlt_s=9)


def test_a_projection_by_trak_is_refused_where_trak_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert LessSelector(proj_method="trak").settings.proj_method == "trak"
    monkeypatch.setitem(sys.modules, "trak", None)
    with pytest.raises(ValueError, match=r"proj_method is 'trak', but the package traker"):
        LessSelector(proj_method="trak")


def test_the_words_for_a_declaration_are_those_of_the_catalogue() -> None:
    accepts = {key: describe(known.hint) for key, known in declarations(LessSelector).items()}
    assert accepts["aggregation"] == "max or mean"
    assert accepts["checkpoints"] == "last, all or a whole number of at least 1"
    assert accepts["tokens_per_batch"] == "a whole number of at least 1, or null"
    assert accepts["max_bad_fraction"] == "a number from 0 to 1"
    assert accepts["unit_rows"] == "a whole number from 1 to 1048576"


def test_numpy_values_count_as_what_they_hold() -> None:
    from dataflex.selectors.loss import LossSelector
    from dataflex.selectors.random import RandomSelector

    RandomSelector(seed=np.int64(3), replacement=np.bool_(True))  # type: ignore[arg-type]
    LossSelector(quantiles=np.array([0.3, 0.6]))  # type: ignore[arg-type]
    with pytest.raises(BadParameter, match="expected 0 or more"):
        RandomSelector(seed=np.int64(-3))  # type: ignore[arg-type]
    with pytest.raises(BadParameter, match="seed is"):
        RandomSelector(seed=np.float64(0.5))  # type: ignore[arg-type]


def test_a_constructor_that_is_a_descriptor_does_not_keep_its_module_from_being_imported() -> None:
    class Descriptor(Selector):
        __init__ = functools.partialmethod(lambda self, q, a=1: None, 5)  # type: ignore[assignment]

    assert isinstance(Descriptor(), Selector)


def test_a_positional_only_parameter_is_no_component_parameter() -> None:
    class Positional(Selector):
        def __init__(self, a: int = 1, /, b: int = 2) -> None:
            self.sum = a + b

    assert list(declared(Positional.__init__)) == ["b"]
