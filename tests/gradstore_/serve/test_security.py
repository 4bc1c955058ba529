"""Nobody but the owner of the token gets an answer, and no other site's page does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PROBLEM = "application/problem+json"


@pytest.mark.parametrize(
    "headers",
    [{"Authorization": ""}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "},
     {"Authorization": "Basic a-token-for-the-tests"}, {"Cookie": "gradstore-80=wrong"},
     {"Authorization": "Bearer \xe4\xf6\xfc"}],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/stores", "/v1/rows/0", "/v1/openapi.json", "/page/main.js"])
def test_without_the_token_there_is_no_answer(
    ask: Callable[..., Any], store_path: Path, headers: dict[str, str], path: str
) -> None:
    sent = {"Authorization": "", **headers}
    encoded = {name: value.encode("latin-1") for name, value in sent.items()}
    answer = ask(store_path).get(path, headers=encoded)
    assert (answer.status_code, answer.headers["content-type"]) == (401, PROBLEM)
    assert answer.headers["www-authenticate"] == "Bearer"
    assert "gradstore" not in answer.text.replace("gradstore serve", "").replace(
        "urn:gradstore", ""
    )


def test_the_printed_address_becomes_a_cookie_and_the_token_leaves_the_address(
    ask: Callable[..., Any], store_path: Path, token: str
) -> None:
    client = ask(store_path, Authorization="")
    first = client.get(f"/?view=map&token={token}&row=1", follow_redirects=False)
    assert (first.status_code, first.headers["location"]) == (303, "/?view=map&row=1")
    cookie = first.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie
    assert client.get("/?view=map&row=1").status_code == 200
    assert client.get("/v1/stores").status_code == 200


def test_a_browser_without_the_token_is_asked_for_it(
    ask: Callable[..., Any], store_path: Path
) -> None:
    client = ask(store_path, Authorization="", Accept="text/html")
    assert "needs its token" in client.get("/").text
    wrong = client.get("/?token=no")
    assert (wrong.status_code, "That token is wrong" in wrong.text) == (401, True)


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8417", "127.0.0.1.evil.example", "", "[::1",
     "localhost@evil.example:1", "evil.example@localhost", "192.168.1.2"],
)  # fmt: skip
def test_another_host_name_is_refused_even_with_the_token(client: Any, host: str) -> None:
    answer = client.get("/v1/stores", headers={"Host": host})
    assert (answer.status_code, answer.headers["content-type"]) == (403, PROBLEM)


@pytest.mark.parametrize("host", ["127.0.0.1:1", "localhost", "localhost:9999", "[::1]:8417"])
def test_loopback_names_are_taken_at_any_port(client: Any, host: str) -> None:
    assert client.get("/v1/stores", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://[bad"])
def test_a_page_of_another_site_is_refused(client: Any, origin: str) -> None:
    answer = client.post("/v1/score", json={}, headers={"Origin": origin})
    assert (answer.status_code, answer.headers["content-type"]) == (403, PROBLEM)
    own = {"Origin": "http://127.0.0.1:80"}
    assert client.post("/v1/score", json={}, headers=own).status_code == 200


def test_every_answer_forbids_foreign_and_inline_scripts(client: Any) -> None:
    for path in ("/", "/page/main.js", "/v1/stores", "/v1/nothing"):
        policy = client.get(path).headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "unsafe" not in policy
        assert client.get(path).headers["x-content-type-options"] == "nosniff"
    page = Path("gradstore/serve/page")
    root = Path(__file__).resolve().parents[3] / page
    for file in root.iterdir():
        text = file.read_text()
        assert "innerHTML" not in text, f"{file.name}: text of rows must not be read as markup"
        assert not any(sign in text for sign in (" style=", "onclick=", "<script>", "https://")), (
            file
        )


def test_a_body_that_is_too_large_is_refused(client: Any) -> None:
    answer = client.post("/v1/explain", content=b" " * (5 << 20))
    assert answer.status_code == 413
    chunked = client.post("/v1/explain", content=iter([b"{}"]))
    assert chunked.status_code == 413


def test_no_method_writes(client: Any) -> None:
    for method in ("PUT", "PATCH", "DELETE", "POST"):
        assert client.request(method, "/v1/rows").status_code == 405
    assert client.get("/page/../app.py").status_code == 404
    assert client.get("/page/%2e%2e/app.py").status_code == 404
