"""The service over a store of few bits in a bucket: read, and written through it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from gradstore.format.text_table import Text
from gradstore.scoring.influence import influence_scores
from gradstore.scoring.pairing import checkpoint_features
from gradstore.store.reader import open_store
from gradstore.store.verify import verify_store

if TYPE_CHECKING:
    from conftest import StoreKit

ASKED = (
    "/v1/generations",
    "/v1/rows?generation=train/1&limit=5&offset=2",
    "/v1/rows?generation=train/1&limit=5&sort=score&wait=30",
)


def build(kit: StoreKit, place: Any) -> None:
    with kit.writer(place) as writer:
        writer.keep_texts(kit.rows(24), [Text(f"p {i}", f"r {i}", 3) for i in range(24)])
        for name, n in (("train/1", 24), ("target/dev/1", 8)):
            kit.add(writer, name, n)


@pytest.mark.parametrize("dtype", ["int8", "1bit"])
def test_rows_of_few_bits_in_a_bucket_are_served_as_those_of_a_folder(
    kit: StoreKit, ask: Any, bucket: str, tmp_path: Path, dtype: str
) -> None:
    kit.dtype, kit.dim, kit.unit_rows = dtype, 8, 8
    answers = []
    for place in (bucket, tmp_path / "s"):
        build(kit, place)
        client = ask(place)
        told = [client.get(each) for each in ASKED]
        assert [each.status_code for each in told] == [200] * len(ASKED), [t.text for t in told]
        answers.append([without_ids(each.json()) for each in told])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("dtype", ["int8", "1bit"])
def test_a_service_that_keeps_its_store_in_a_bucket_takes_writes_as_one_with_a_folder(
    kit: StoreKit, serve_writable: Any, bucket: str, tmp_path: Path, dtype: str
) -> None:
    kit.dtype, kit.dim, kit.unit_rows = dtype, 8, 8
    build(kit, tmp_path / "s")
    service = serve_writable(bucket)
    build(kit, service.address)
    assert verify_store(service.address).ok
    wanted = influence_scores(checkpoint_features(open_store(tmp_path / "s"), "last")).values
    for place in (service.address, bucket):
        found = influence_scores(checkpoint_features(open_store(place), "last")).values
        np.testing.assert_array_equal(found, wanted)


def without_ids(answer: Any) -> Any:
    """An answer without what differs between any two stores."""
    if isinstance(answer, dict):
        return {k: without_ids(v) for k, v in answer.items() if k not in ("commit", "id")}
    return [without_ids(each) for each in answer] if isinstance(answer, list) else answer
