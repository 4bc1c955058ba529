"""What the API answers equals what the library computes; bad input is a problem document."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fastapi.testclient import TestClient

from gradstore.scoring.choose import select_subset
from gradstore.scoring.influence import influence_scores
from gradstore.scoring.length_bias import without_length
from gradstore.scoring.pairing import checkpoint_features
from gradstore.scoring.query import query_influence
from gradstore.scoring.rules import SUBSETS
from gradstore.scoring.selection import select_top
from gradstore.store.reader import open_store

ARROW = {"Accept": "application/vnd.apache.arrow.stream"}


def table(response: Any) -> Any:
    assert response.headers["content-type"] == ARROW["Accept"]
    return pa.ipc.open_stream(io.BytesIO(response.content)).read_all()


def test_the_store_and_its_generations_are_listed_with_the_commit_as_etag(
    client: TestClient, store_path: Path
) -> None:
    store = open_store(store_path)
    (line,) = client.get("/v1/stores").json()["stores"]
    assert store.head is not None
    assert (line["uuid"], line["commit"]) == (store.uuid, store.head.sha256)
    answer = client.get("/v1/generations")
    assert answer.headers["etag"] == f'"{store.head.sha256}"'
    lines = {each["name"]: each for each in answer.json()["generations"]}
    assert set(lines) == {each.name for each in store.generations()}
    assert lines["train/8"]["usable_rows"] == 298
    assert lines["train/8"]["text"] is True
    again = client.get("/v1/generations", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_scores_are_those_of_the_library_in_json_and_in_arrow(
    client: TestClient, store_path: Path
) -> None:
    pairs = checkpoint_features(open_store(store_path), "all", targets=["two"])
    wanted = influence_scores(pairs).values
    form = {"checkpoints": "all", "target": ["two"]}
    got = client.post("/v1/score", json=form).json()
    assert (got["usable_rows"], got["skipped"]) == (298, {"zero_norm": 1, "non_finite": 1})
    assert got["scores"] == [None if np.isnan(v) else float(v) for v in wanted]
    assert sum(got["histogram"]["counts"]) == 298
    columns = table(client.post("/v1/score", json=form, headers=ARROW))
    np.testing.assert_array_equal(columns["score"].to_numpy(), wanted)


def test_a_query_names_helpers_and_hurters_with_text(client: TestClient, store_path: Path) -> None:
    pairs = checkpoint_features(open_store(store_path), targets=["one"])
    wanted = query_influence(pairs, 3, top=4)
    got = client.post("/v1/query", json={"target": "one", "target_row": 3, "top": 4}).json()
    for side in ("helped", "hurt"):
        rows = [line["row"] for line in got[side]]
        assert rows == getattr(wanted, side).tolist()
        assert [line["score"] for line in got[side]] == [float(wanted.values[r]) for r in rows]
    assert got["target_row"]["prompt"] == "one: what is 3 plus 3?"
    assert got["helped"][0]["prompt"]
    sides = table(client.post("/v1/query", json={"target": "one", "target_row": 3}, headers=ARROW))
    assert set(sides["side"].to_pylist()) == {"helped", "hurt"}
    assert sides["source_set"][0].as_py() in ("alpha", "beta", "gamma")


def test_selections_keep_to_their_budget(client: TestClient, store_path: Path) -> None:
    store = open_store(store_path)
    scores = influence_scores(checkpoint_features(store))
    got = client.post("/v1/select", json={"count": 20}).json()
    ranked = select_top(scores.values, 298)
    assert [line["row"] for line in got["rows"]] == ranked[:20].tolist()
    assert got["rows"][0]["rank"] == 1
    tokens = store.generation("train/8").tokens
    got = client.post("/v1/select", json={"tokens": 500}).json()
    k = got["chosen"]
    assert got["tokens"] == tokens[ranked[:k]].sum() <= 500 < tokens[ranked[: k + 1]].sum()
    assert client.post("/v1/select", json={"fraction": 0.1}).json()["chosen"] == 29


@pytest.mark.parametrize("subset", SUBSETS)
def test_a_selection_by_any_rule_is_the_librarys(
    client: TestClient, store_path: Path, subset: Any
) -> None:
    pairs = checkpoint_features(open_store(store_path))
    for quotas in ({}, {"alpha": 5}, {"alpha": 0.2, "beta": 3}):
        wanted = select_subset(pairs, 25, subset, quotas=quotas)
        form = {"count": 25, "subset": subset, "quotas": quotas}
        got = client.post("/v1/select", json=form).json()
        assert [line["row"] for line in got["rows"]] == wanted.tolist()
        assert [line["rank"] for line in got["rows"]] == list(range(1, 26))
    form = {"tokens": 400, "subset": subset, "quotas": {"alpha": 5}}
    got = client.post("/v1/select", json=form).json()
    assert got["tokens"] <= 400
    assert sum(line["source"][0] == "alpha" for line in got["rows"]) <= 5


@pytest.mark.parametrize(
    ("subset", "params"),
    [("facility_location", {"discount": 0.3}), ("transport", {"blur": 0.2, "train": 3.0}),
     ("knn_uniform", {"alpha": 0.3})],
)  # fmt: skip
def test_a_selection_has_the_names_and_the_constants_of_the_library(
    client: TestClient, store_path: Path, subset: Any, params: dict[str, float]
) -> None:
    pairs = checkpoint_features(open_store(store_path))

    def rows(**form: Any) -> list[int]:
        answer = client.post("/v1/select", json={"subset": subset, **form})
        return [line["row"] for line in answer.raise_for_status().json()["rows"]]

    wanted = select_subset(pairs, 25, subset, subset_params=params).tolist()
    assert rows(k=25, subset_params=params) == rows(count=25, subset_params=params) == wanted
    assert rows(k=25) == select_subset(pairs, 25, subset).tolist()
    wanted = select_subset(pairs, subset=subset, token_budget=400, subset_params=params).tolist()
    assert rows(token_budget=400, subset_params=params) == wanted
    assert rows(tokens=400, subset_params=params) == wanted
    if subset != "knn_uniform":  # whose constants say how many neighbours are found: the same here
        assert rows(k=25) != rows(k=25, subset_params=params)


def test_rows_that_hurt_are_dropped_without_a_budget_and_lengths_taken_out(
    client: TestClient, store_path: Path
) -> None:
    store = open_store(store_path)
    scores, train = influence_scores(checkpoint_features(store)), store.generation("train/8")
    got = client.post("/v1/select", json={"subset": "drop_harmful"}).json()
    assert got["chosen"] == int((np.nan_to_num(scores.values) > 0).sum())
    left = without_length(scores.values, train.tokens, "bins", usable=scores.usable)
    form = {"count": 20, "length_correction": "bins"}
    got = client.post("/v1/select", json=form).json()
    assert [line["row"] for line in got["rows"]] == select_top(left, 20).tolist()


def test_two_selections_are_compared(client: TestClient) -> None:
    early, late = {"step": 4, "count": 50}, {"step": 8, "count": 60}
    rows = {
        name: {line["row"] for line in client.post("/v1/select", json=form).json()["rows"]}
        for name, form in (("early", early), ("late", late))
    }
    got = client.post("/v1/diff", json={"before": early, "after": late, "top": 1000}).json()
    assert {line["row"] for line in got["entered"]} == rows["late"] - rows["early"]
    assert {line["row"] for line in got["left"]} == rows["early"] - rows["late"]
    assert got["kept"] == len(rows["early"] & rows["late"])
    assert (got["before"]["generation"], got["after"]["generation"]) == ("train/4", "train/8")
    assert sum(got["after"]["sources"].values()) == 60


def test_rows_come_in_pages_sorted_and_filtered(client: TestClient) -> None:
    def get(**query: Any) -> Any:
        answer = client.get("/v1/rows", params=query)
        assert answer.status_code == 200, answer.text
        return answer.json()

    first, second = get(limit=7), get(limit=7, offset=7)
    assert [line["row"] for line in first["rows"] + second["rows"]] == list(range(14))
    assert (first["total"], first["matched"]) == (300, 300)
    by_score = [line["score"] for line in get(sort="-score", limit=1000)["rows"]]
    assert by_score[-2:] == [None, None]
    assert by_score[:-2] == sorted(by_score[:-2], reverse=True)
    lengths = [line["tokens"] for line in get(sort="length", limit=1000)["rows"]]
    assert lengths == sorted(lengths)
    sources = [line["source"] for line in get(sort="source", limit=1000)["rows"]]
    assert sources == sorted(sources)
    cut = by_score[40]
    assert get(min_score=cut, limit=0)["matched"] == 41
    assert get(min_score=1e300, limit=0)["matched"] == 0
    assert get(min_score=-1e300, max_score=1e300, limit=0)["matched"] == 298
    assert get(source="beta", limit=1)["matched"] == 100
    assert get(status=["zero_norm", "non_finite"])["matched"] == 2
    assert [line["row"] for line in get(contains="PLEASE", row=[1, 2, 10])["rows"]] == [1, 2]
    assert get(generation="target/one/8", limit=3)["rows"][2]["response"] == "It is 4."
    columns = table(client.get("/v1/rows", params={"limit": 5}, headers=ARROW))
    assert columns["source_row"].to_pylist() == [0, 1, 2, 3, 4]


def test_long_text_is_cut_with_its_length_and_given_whole_for_one_row(client: TestClient) -> None:
    line = client.get("/v1/rows", params={"row": 13}).json()["rows"][0]
    assert (len(line["prompt"]), line["prompt_length"]) == (400, 1_050_000)
    whole = client.get("/v1/rows/13").json()
    assert len(whole["prompt"]) == 1_050_000
    assert len(whole["row_hash"]) == 32


def test_the_map_is_the_pca_of_the_unit_rows(client: TestClient, store_path: Path) -> None:
    generation = open_store(store_path).generation("train/8")
    values = generation.read(0, 300)[generation.usable].astype(np.float64)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    centred = values - values.mean(axis=0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    got = client.get("/v1/map", params={"scored": True}).json()
    points = np.array([got["x"], got["y"]]).T
    np.testing.assert_allclose(np.abs(points), np.abs(left[:, :2] * sizes[:2]), atol=2e-4)
    np.testing.assert_allclose(got["explained"], sizes[:2] ** 2 / (sizes**2).sum(), rtol=1e-6)
    assert len(got["score"]) == got["usable_rows"] == 298
    assert len(client.get("/v1/map", params={"points": 50}).json()["row"]) == 50


@pytest.mark.parametrize(
    ("method", "path", "given", "status", "said"),
    [
        ("get", "/v1/rows/300", None, 404, "rows 0 to 299, not 300"),
        ("get", "/v1/rows?row=300", None, 404, "rows 0 to 299, not 300"),
        ("get", "/v1/rows?generation=train/5", None, 404, "it has: train/4"),
        ("get", "/v1/rows?generation=nonsense", None, 404, "names are [run/]train/STEP"),
        ("get", "/v1/rows?source=delta", None, 404, "alpha, beta, gamma"),
        ("get", "/v1/rows?sort=size", None, 422, "query.sort"),
        ("get", "/v1/rows?srot=row", None, 422, "srot"),
        ("get", "/v1/rows?status=fine", None, 422, "choose ok, masked"),
        ("get", "/v1/jobs/none", None, 404, "/v1/jobs lists"),
        ("get", "/v1/nothing", None, 404, "Not Found"),
        ("get", "/v1/score", None, 405, "Method Not Allowed"),
        ("post", "/v1/query", {"target_row": 8}, 422, "the set has rows 0-7"),
        ("post", "/v1/query", {"target": "six", "target_row": 0}, 422, "it has one, two"),
        ("post", "/v1/select", {"count": 299}, 422, "298 usable, 2 skipped"),
        ("post", "/v1/select", {}, 422, "exactly one of k (or count), fraction, "),
        ("post", "/v1/select", {"count": 9, "subset": "best"}, 422, "subset"),
        ("post", "/v1/select", {"count": 9, "subset": "round_robin"}, 422, "serve 16 target rows"),
        ("post", "/v1/select", {"count": 9, "neighbours": 3}, 422, "only the subset 'knn_uniform'"),
        ("post", "/v1/select", {"count": 9, "quotas": {"alpha": 0}}, 422, "quotas"),
        ("post", "/v1/select", {"count": 9, "quotas": {"alpha": 1.5}}, 422, "quotas"),
        ("post", "/v1/select", {"count": 9, "quotas": {"delta": 1}}, 422, "quota of 'delta', but"),
        ("post", "/v1/select", {"tokens": 9, "quotas": {"alpha": 0.5}}, 422, "number is not given"),
        ("post", "/v1/select", {"count": 20, "subset": "transport", "target_row": 1}, 422,
         "asks each target row, but target_row 1"),
        ("post", "/v1/select", {"count": 9, "subset": "drop_harmful", "length_correction": "bins"},
         422, "only 'top'"),
        ("post", "/v1/select", {"tokens": 1, "count": 1}, 422, "exactly one of"),
        ("post", "/v1/select", {"k": 1, "count": 1}, 422, "k and count; give exactly one of"),
        ("post", "/v1/select", {"tokens": 1, "token_budget": 1}, 422, "exactly one of"),
        ("post", "/v1/select", {"k": 9, "subset_params": {"discount": 0.3}}, 422, "no constant of"),
        ("post", "/v1/select", {"k": 9, "subset": "facility_location",
                                "subset_params": {"discount": "x"}}, 422, "discount"),
        ("post", "/v1/score", {"checkpoints": "3"}, 422, "the store has 2"),
        ("post", "/v1/score", {"run": "other"}, 422, "no committed train generation of run"),
    ],
)  # fmt: skip
def test_bad_input_is_a_problem_that_says_what_to_do(
    client: TestClient, method: str, path: str, given: Any, status: int, said: str
) -> None:
    answer = client.request(method, path, json=given)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    content = answer.json()
    assert said in content["detail"]
    assert content["status"] == status
    if status == 422:
        assert content["exit_code"] == 2


@pytest.mark.parametrize(
    "body",
    [b'{"target": ["\\ud800"]}', b'{"\\ud800": 1}', b'{"fraction": NaN, "count": 1}', b"\xff\xfe",
     b"[" * 100_000, b'{"count": ' + b"9" * 10_000 + b"}", b"", b"null",
     b'{"target": ["\\u0000"]}'],
    ids=range(9),
)  # fmt: skip
def test_a_body_that_is_no_question_is_a_problem(client: Any, body: bytes) -> None:
    answer = client.post("/v1/select", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422)
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["detail"]


def test_a_store_without_text_shows_source_and_number_and_how_to_add_text(
    ask: Callable[..., TestClient], explorer: Any, tmp_path: Path
) -> None:
    client = ask(explorer.build(tmp_path / "s", text=False, steps=(1,)))
    got = client.get("/v1/rows", params={"limit": 1}).json()
    assert got["text"] is False
    assert (got["rows"][0]["source"], got["rows"][0]["prompt"]) == (["alpha", 0], None)
    assert "store_text: true" in client.get("/v1/generations").json()["without_text"]
    refused = client.get("/v1/rows", params={"contains": "a"})
    assert refused.status_code == 422
    assert "store_text: true" in refused.json()["detail"]


def test_a_prompt_is_asked_of_the_run_step_and_checkpoints_that_are_named(
    ask: Callable[..., TestClient], explorer: Any, store_path: Path
) -> None:
    model = explorer.model()
    client = ask(store_path, model)
    newest = client.post("/v1/explain", json={"prompt": "a", "response": "b"}).json()
    named = {"run": "", "step": 4, "checkpoints": "2"}
    found = client.post("/v1/explain", json={"prompt": "a", "response": "b", **named}).json()
    assert (newest["generations"], found["generations"]) == (["train/8"], ["train/4"])
    assert model.asked == [{"checkpoints": "last", "run": "", "step": None},
                           {"checkpoints": 2, "run": "", "step": 4}]  # fmt: skip
    refused = client.post("/v1/explain", json={"prompt": "a", "checkpoints": "some"})
    assert (refused.status_code, refused.json()["exit_code"]) == (422, 2)


def test_an_empty_prompt_is_answered_as_the_command_does(
    ask: Callable[..., TestClient], explorer: Any, store_path: Path
) -> None:
    found = ask(store_path, explorer.model()).post("/v1/explain", json={"prompt": ""})
    assert (found.status_code, found.json()["target_row"]["prompt"]) == (200, "")
