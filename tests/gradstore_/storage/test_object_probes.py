"""The probe of a server of objects, while others are at work in the same place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gradstore.errors import StoreIOError
from gradstore.storage.location import location
from gradstore.storage.objects import ObjectFiles
from gradstore.store.cleaning import remove_dead_staging


@pytest.mark.parametrize("at", range(1, 6))
def test_a_probe_that_another_writers_clean_up_removes_tells_nothing_of_the_server(
    faulty: Any, use_server: Callable[[str], str], at: int
) -> None:
    """Of the five requests of a probe any one may be the last before the clean-up."""
    place = use_server(faulty.address)
    cleaner = ObjectFiles(location(place))  # type: ignore[arg-type]
    cleaner.alone = True
    seen: list[str] = []

    def clean(asked: Any) -> None:
        if "/probe-" in asked.key and len(seen) < at:
            seen.append(asked.method)
            if len(seen) == at:
                remove_dead_staging(cleaner)

    faulty.after = clean
    ObjectFiles(location(place)).make_root()  # type: ignore[arg-type]
    assert len(seen) == at
    assert cleaner.bucket.sizes("staging") == {}


def test_a_server_that_ignores_a_condition_is_not_taken_for_a_clean_up(
    faulty: Any, use_server: Callable[[str], str]
) -> None:
    place = use_server(faulty.address)
    probes: set[str] = set()

    def ignore(asked: Any) -> None:
        for name in [each for each in asked.headers if each.lower() == "if-none-match"]:
            asked.headers.pop(name)
            probes.add(asked.key)

    faulty.before = ignore
    with pytest.raises(StoreIOError, match="does not honour If-None-Match"):
        ObjectFiles(location(place)).make_root()  # type: ignore[arg-type]
    assert len(probes) > 1
