"""The API answers whatever its own description allows without a 5xx."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from gradstore.serve.app import create_app
from gradstore.serve.keeping import Keeping
from gradstore.serve.served import Served
from gradstore.serve.writing import Writing
from gradstore.store.verify import verify_store

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed (uv sync)")
HEADERS = {"Authorization": "Bearer a-token-for-the-tests", "Host": "127.0.0.1"}


@pytest.mark.parametrize("writable", [False, True])
def test_no_input_makes_the_server_fail(explorer: Any, tmp_path: Path, writable: bool) -> None:
    served = Served(explorer.build(tmp_path / "s"))
    # The one key writes too, for the client to reach what is behind it.
    writing = Writing("a-token-for-the-tests", Keeping(served)) if writable else None
    app = create_app(served, "a-token-for-the-tests", writing)
    schema = schemathesis.openapi.from_asgi("/v1/openapi.json", app, headers=HEADERS)
    asked: dict[str, set[int]] = {}

    def check(case: Any) -> None:
        answer = case.call(headers=HEADERS)
        asked.setdefault(f"{case.method} {case.path}", set()).add(answer.status_code)
        assert answer.status_code < 500, f"{case.as_curl_command()}: {answer.text}"
        if answer.status_code >= 400:
            assert answer.headers["content-type"] == ["application/problem+json"]
            assert answer.json()["detail"]

    for found in schema.get_all_operations():
        settings(
            max_examples=25,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )(given(case=found.ok().as_strategy())(check))()
    served.desk.close()
    if writing is not None:
        writing.close()
        assert verify_store(tmp_path / "s").ok
    paths = {f"{method.upper()} {path}" for path, methods in app.openapi()["paths"].items()
             for method in methods}  # fmt: skip
    assert set(asked) == paths
    assert 200 in set().union(*asked.values())
