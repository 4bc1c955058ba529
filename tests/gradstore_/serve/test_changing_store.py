"""A store that changes while it is served: commits appear whole, damage is told."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradstore.store.texts import RowTexts

PROBLEM = "application/problem+json"


def test_new_commits_appear_and_never_half_ones(
    ask: Callable[..., Any], explorer: Any, tmp_path: Path
) -> None:
    path = explorer.build(tmp_path / "s", steps=(1,))
    client = ask(path)
    before = client.get("/v1/generations")
    with explorer.writer(path) as writer:
        generation = explorer.begin(writer, "train/2", explorer.features(300, 2))
        known = {"If-None-Match": before.headers["etag"]}
        assert client.get("/v1/generations", headers=known).status_code == 304
        assert client.get("/v1/rows?generation=train/2").status_code == 404
        generation.commit()
        after = client.get("/v1/generations", headers=known)
        assert after.status_code == 200
        assert after.headers["etag"] != before.headers["etag"]
        assert client.get("/v1/rows?generation=train/2&limit=1").json()["total"] == 300
        # Its target sets are not there yet: that is said, and the older checkpoint can be asked.
        late = client.post("/v1/score", json={"values": False})
        assert late.status_code == 422
        assert "no target generation of step 2" in late.json()["detail"]
        assert client.post("/v1/score", json={"step": 1}).json()["generation"] == "train/1"


def test_clients_read_on_while_a_writer_commits(
    ask: Callable[..., Any], explorer: Any, tmp_path: Path
) -> None:
    path = explorer.build(tmp_path / "s", steps=(1,))
    client = ask(path)
    codes: list[int] = []

    def read() -> None:
        for i in range(12):
            form = {"step": 1, "target": "one", "target_row": i % 8, "top": 3}
            codes.append(client.post("/v1/query", json=form).status_code)
            codes.append(client.get("/v1/rows", params={"step": 1, "sort": "-score"}).status_code)

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    with explorer.writer(path) as writer:
        for step in (2, 3):
            explorer.add(writer, step)
    for reader in readers:
        reader.join()
    assert codes == [200] * 96


def test_a_store_that_is_removed_is_told_and_found_again(
    ask: Callable[..., Any], store_path: Path, tmp_path: Path
) -> None:
    path = shutil.copytree(store_path, tmp_path / "s")
    client = ask(path)
    assert client.post("/v1/score", json={}).status_code == 200
    path.rename(tmp_path / "elsewhere")
    for answer in (client.get("/v1/rows"), client.post("/v1/score", json={})):
        assert (answer.status_code, answer.headers["content-type"]) == (404, PROBLEM)
        assert f'no store at "{path}"' in answer.json()["detail"]
    (tmp_path / "elsewhere").rename(path)
    assert client.get("/v1/rows").status_code == 200


@pytest.mark.parametrize("how", ["cut", "removed", "changed"])
def test_fault_21_damage_is_told_with_the_file_and_the_next_step(
    ask: Callable[..., Any], store_path: Path, tmp_path: Path, how: str
) -> None:
    path = shutil.copytree(store_path, tmp_path / "s")
    client = ask(path)
    (chunk,) = (path / "generations/train/8/features").glob("c/0*")
    chunk = next(file for file in [chunk, *chunk.rglob("*")] if file.is_file())
    data = chunk.read_bytes()
    chunk.unlink()
    if how != "removed":
        chunk.write_bytes(data[:-1] if how == "cut" else bytes([data[0] ^ 1]) + data[1:])
    answer = client.post("/v1/score", json={})
    assert (answer.status_code, answer.headers["content-type"]) == (409, PROBLEM)
    content = answer.json()
    assert (content["title"], content["exit_code"]) == ("damaged data", 4)
    assert "gradstore verify" in content["detail"]
    assert client.get("/v1/generations").status_code == 200


@pytest.mark.parametrize("how", ["cut", "removed", "changed"])
def test_damaged_text_is_told_and_what_needs_no_text_is_answered(
    ask: Callable[..., Any], store_path: Path, tmp_path: Path, how: str
) -> None:
    path = shutil.copytree(store_path, tmp_path / "s")
    train = max(path.glob("texts/*/*.parquet"), key=lambda file: file.stat().st_size)
    data = train.read_bytes()
    train.unlink()
    if how != "removed":
        half = len(data) // 2
        changed = data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :]
        train.write_bytes(data[:-1] if how == "cut" else changed)
    client = ask(path)
    query = {"target": "one", "target_row": 3}
    refused = [
        client.get("/v1/rows"),
        client.get("/v1/rows/5"),
        client.get("/v1/rows?contains=add"),
        client.get("/v1/pair.jsonl?target=one&row=1"),
        client.post("/v1/query", json=query),
        client.post("/v1/select", json={"count": 3}),
        client.post("/v1/diff", json={"before": {"count": 3}, "after": {"count": 5}}),
    ]
    for answer in refused:
        assert (answer.status_code, answer.headers["content-type"]) == (409, PROBLEM)
        content = answer.json()
        assert (content["title"], content["exit_code"]) == ("damaged data", 4)
        assert str(train.relative_to(path)) in content["detail"]
        assert "gradstore verify" in content["detail"]
    answered = [
        client.get("/v1/map"),
        client.get("/v1/rows?generation=target/one/8"),
        client.post("/v1/score", json={}),
    ]
    assert {answer.status_code for answer in answered} == {200}


def test_a_row_is_read_while_searches_through_all_text_go_on(
    ask: Callable[..., Any], store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, begun = threading.Event(), threading.Semaphore(0)
    whole = RowTexts.parts

    def slow(*args: Any) -> Any:
        begun.release()
        gate.wait(10)
        return whole(*args)

    monkeypatch.setattr(RowTexts, "parts", slow)
    client = ask(store_path)
    with ThreadPoolExecutor(17) as pool:
        found = [pool.submit(client.get, f"/v1/rows?contains=add+{n}") for n in range(16)]
        try:
            assert begun.acquire(timeout=5)
            assert pool.submit(client.get, "/v1/rows/3").result(5).status_code == 200
            assert not any(each.done() for each in found)
        finally:
            gate.set()
        assert {each.result(20).status_code for each in found} == {200}


def test_without_a_model_explain_says_so_and_with_one_it_answers(
    ask: Callable[..., Any], store_path: Path, explorer: Any
) -> None:
    refused = ask(store_path).post("/v1/explain", json={"prompt": "what is 1 plus 1?"})
    assert refused.status_code == 409
    assert "gradstore explain STORE" in refused.json()["detail"]
    client = ask(store_path, explorer.model())
    assert client.get("/v1/stores").json()["stores"][0]["explains"] is True
    got = client.post("/v1/explain", json={"prompt": "what is 1 plus 1?", "top": 3}).json()
    assert [line["row"] for line in got["helped"]] == [40, 299, 298]
    assert (got["hurt"][0]["row"], got["hurt"][0]["score"]) == (41, float(np.float32(-0.9)))
    assert got["helped"][0]["prompt"] == explorer.text(40).prompt
    assert (got["generated"], got["target_row"]["response"]) == (True, "generated answer")


def test_pairs_viewer_gets_its_documented_fields(client: Any) -> None:
    answer = client.get("/v1/pair.jsonl", params={"target": "two", "row": [0, 3], "top": 5})
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert [line["trex_id"] for line in lines] == ["two[0]", "two[3]"]
    query = client.post("/v1/query", json={"target": "two", "target_row": 3, "top": 5}).json()
    line = lines[1]
    assert line["proponent_scores"] == [row["score"] for row in query["helped"]]
    assert line["opponent_ids"] == ["{}[{}]".format(*row["source"]) for row in query["hurt"]]
    assert line["proponents"][0].startswith(query["helped"][0]["prompt"])
    assert (line["inputs_plaintext"], line["query_set"]) == ("two: what is 3 plus 3?", "two")
