"""ProjectionSpec: checked, frozen, and the same after a trip through JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from gradkernels import ProjectionSpec


def test_a_spec_survives_json() -> None:
    spec = ProjectionSpec("sjlt", p=2**31 - 1, d=8192, seed=2**63 - 1, s=4)
    assert ProjectionSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_another_seed_changes_nothing_else() -> None:
    spec = ProjectionSpec("gaussian", p=10, d=4, seed=1, s=3)
    assert spec.with_seed(9) == ProjectionSpec("gaussian", p=10, d=4, seed=9, s=3)


def test_a_spec_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ProjectionSpec("sjlt", p=10, d=8).d = 9  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "fjlt"}, r"method='fjlt' is not one of rademacher, gaussian, sjlt"),
        ({"p": 0}, r"p=0 is outside 1\.\.2147483647"),
        ({"p": 2**31}, r"p=2147483648 is outside 1\.\.2147483647"),
        ({"d": 0}, r"d=0 is outside 1\.\.16777216"),
        ({"d": 2**24 + 1}, r"d=16777217 is outside"),
        ({"seed": -1}, r"seed=-1 is outside 0\.\."),
        ({"seed": 2**63}, r"seed=9223372036854775808 is outside"),
        ({"s": 0}, r"s=0 is outside 1\.\."),
        ({"s": 65}, r"s=65 exceeds d=64.*choose s <= 64"),
        ({"version": 2}, r"version=2 is outside 1\.\.1"),
    ],
)
def test_a_bad_value_is_named_with_its_limit(change: dict[str, Any], message: str) -> None:
    fields: dict[str, Any] = {"method": "sjlt", "p": 100, "d": 64}
    with pytest.raises(ValueError, match=message):
        ProjectionSpec(**(fields | change))


@pytest.mark.parametrize("value", [1.0, "5", True, None])
def test_a_number_that_is_no_int_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match=r"d=.* not an int"):
        ProjectionSpec("rademacher", p=10, d=value)


def test_unknown_and_missing_keys_are_reported_together() -> None:
    with pytest.raises(ValueError, match=r"unknown keys \['dim', 'sed'\], missing keys \['d'\]"):
        ProjectionSpec.from_dict({"method": "sjlt", "p": 5, "dim": 3, "sed": 1})


def test_dense_methods_ignore_s() -> None:
    assert ProjectionSpec("rademacher", p=5, d=1).s == 8
