"""The service over a store in a bucket."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ASKED = (
    "/v1/generations",
    "/v1/rows?generation=train/4&limit=3&offset=290",
    "/v1/rows?generation=train/4&limit=3&sort=score&wait=30",
)


def test_a_store_in_a_bucket_is_served_as_one_in_a_folder(
    explorer: Any, ask: Any, bucket: str, tmp_path: Path
) -> None:
    answers: list[list[Any]] = []
    for place in (bucket, tmp_path / "s"):
        explorer.build(place, steps=(4,))
        client = ask(place)
        told = [client.get(each) for each in ASKED]
        assert [each.status_code for each in told] == [200] * len(ASKED), [t.text for t in told]
        answers.append([without_ids(each.json()) for each in told])
        (store,) = client.get("/v1/stores").json()["stores"]
        assert store["path"] == str(place)
        with explorer.writer(place) as writer:
            explorer.add(writer, 8)
        names = [each["name"] for each in client.get("/v1/generations").json()["generations"]]
        assert "train/8" in names, "what is committed meanwhile is seen"
    assert answers[0] == answers[1]


def without_ids(answer: Any) -> Any:
    """An answer without what differs between any two stores."""
    if isinstance(answer, dict):
        return {k: without_ids(v) for k, v in answer.items() if k not in ("commit", "id")}
    return [without_ids(each) for each in answer] if isinstance(answer, list) else answer
