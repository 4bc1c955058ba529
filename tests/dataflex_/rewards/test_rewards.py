"""Judges: what counts as a score, what is refused, and a server that misbehaves."""

from __future__ import annotations

import json
import logging
import math
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from http.client import parse_headers
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from dataflex.config.secrets import redacted
from dataflex.rewards.base import JudgeRequest, RewardPrompts, parse_score
from dataflex.rewards.function import FunctionJudge
from dataflex.rewards.local import LocalJudge
from dataflex.rewards.overlap import exact_match, token_f1
from dataflex.rewards.server import ApiJudge, ApiSettings
from gradstore.errors import BadInput, StoreIOError

PROMPTS = RewardPrompts("{prompt} {reference} {response}", "{prompt} {response}")
ASKED = [JudgeRequest("p", f"r{i}", "") for i in range(5)]
MODEL = torch.nn.Linear(1, 1)
TINY = str(Path(__file__).resolve().parents[3] / "examples" / "tiny" / "model")


@pytest.mark.parametrize(
    ("text", "score"),
    [("0.8", 0.8), (" 1 ", 1.0), (".5", 0.5), ("8/10", 0.8), ("85%", 0.85), ("Score: 0.25", 0.25),
     ("I compared 3 facts. **Score**: 7/10.", 0.7), ("score 0.1, revised score: 0.9", 0.9),
     ("2 of 3 are right", None), ("", None), ("good", None), ("7", None), ("-0.5", None),
     ("Score: 9", None), ("1/0", None), ("nan", None)],
)  # fmt: skip
def test_a_score_is_one_number_from_0_to_1(text: str, score: float | None) -> None:
    found = parse_score(text)
    assert math.isnan(found) if score is None else found == pytest.approx(score)


def test_overlap_rewards_compare_words() -> None:
    assert token_f1("", "a b c", "b c d e") == pytest.approx(2 * 2 / 7)
    assert token_f1("", "", "") == 1.0
    assert exact_match("", "A  b", "a b") == 1.0


def test_prompts_that_hide_the_response_or_cannot_be_filled_are_faults() -> None:
    assert not PROMPTS.faults()
    faults = RewardPrompts("{prompt}", '{"score": 1} {response}').faults()
    assert "never shows the response" in faults[0]
    assert "reward_prompt_without_ref cannot be filled" in faults[1]
    old = RewardPrompts("{instruction}{input}{reference}{prediction}", "{prediction}")
    assert old.fill(JudgeRequest("p", "r", "ref")) == "prefr"


def test_a_function_is_called_with_prompt_response_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "def good(prompt, response, reference):\n"
        "    return {'r0': 0, 'r1': 1, 'r2': float('nan'), 'r3': 0.5, 'r4': True}[response]\n"
        "def large(prompt, response, reference): return 3\n"
        "def words(prompt, response, reference): return 'fine'\n"
        "def broken(prompt, response, reference): return {}[response]\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    rewards = [v.reward for v in FunctionJudge("my_rewards:good").judge(ASKED)]
    assert rewards[:2] == [0, 1]
    assert math.isnan(rewards[2])
    assert rewards[3:] == [0.5, 1.0]
    for name, says in (("large", "returned 3"), ("words", "'fine'"), ("broken", "KeyError('r0')")):
        with pytest.raises(BadInput, match="reward_function my_rewards:") as error:
            FunctionJudge(f"my_rewards:{name}").judge(ASKED)
        assert says in str(error.value)
    for target, says in (("my_rewards:number", "not a function"), ("nowhere:f", "cannot be im"),
                         ("my_rewards", "write it as")):  # fmt: skip
        assert says in FunctionJudge(target).faults()[0]


class Stub(BaseHTTPRequestHandler):
    """Answers from a list of (status, body, delay), then with the last of them."""

    answers: ClassVar[list[tuple[int, bytes, float]]] = []
    seen: ClassVar[list[Any]] = []
    under_way: ClassVar[list[int]] = [0, 0]  # now, and the most at once

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        self.seen.append((self.path, self.headers, json.loads(self.rfile.read(length))))
        answers = type(self).answers
        status, body, delay = answers.pop(0) if len(answers) > 1 else answers[0]
        self.under_way[0] += 1
        self.under_way[1] = max(self.under_way)
        time.sleep(delay)
        self.under_way[0] -= 1
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "http://127.0.0.1:9/elsewhere")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Stub.seen.clear()
    Stub.under_way[:] = [0, 0]
    with ThreadingHTTPServer(("127.0.0.1", 0), Stub) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}/v1"
        httpd.shutdown()
        thread.join()


def said(text: str) -> bytes:
    return json.dumps({"choices": [{"message": {"content": text}}]}).encode()


def judge(url: str, waits: list[float] | None = None, **changes: Any) -> ApiJudge:
    usual = {"base_url": url, "model": "m", "key_env": None, "timeout": 5.0, "retries": 3,
             "workers": 2, "max_tokens": 32}  # fmt: skip
    settings = ApiSettings(**{**usual, **changes})
    return ApiJudge(settings, PROMPTS, (waits if waits is not None else []).append)


def test_an_api_judge_speaks_chat_completions(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sesame")
    Stub.answers = [(200, said("0.5"), 0.0)]
    asking = judge(server, key_env="JUDGE_KEY")
    assert not asking.faults()
    asking.start(MODEL)
    assert [v.reward for v in asking.judge(ASKED)] == [0.5] * 5
    path, headers, body = Stub.seen[-1]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer sesame"
    assert (body["model"], body["temperature"]) == ("m", 0.0)
    assert {b["messages"][0]["content"] for _, _, b in Stub.seen[1:]} == {
        f"p r{i}" for i in range(5)
    }
    assert "sesame" not in json.dumps(asking.identity())


def test_the_key_is_in_no_message_and_no_log(
    server: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("JUDGE_KEY", "sesame")
    asking = judge(server, key_env="JUDGE_KEY", retries=0)
    for answer, says in (((401, b"no key sesame", 0.0), "no key ***"),
                         ((500, b"sesame?", 0.0), "***?"),
                         ((200, b"<i>sesame", 0.0), "'<i>***'")):  # fmt: skip
        Stub.answers = [answer]
        with pytest.raises((BadInput, StoreIOError)) as error:
            asking.start(MODEL)
        assert says in str(error.value)
        assert "sesame" not in "".join(traceback.format_exception(error.value))
    monkeypatch.setenv("JUDGE_KEY", "sesame\n")
    (fault,) = asking.faults()
    assert "a line break" in fault
    with pytest.raises(BadInput, match="a line break") as refused:
        asking.judge(ASKED)
    assert "sesame" not in caplog.text + fault + str(refused.value)


@pytest.mark.parametrize("key", ["sesame-street", 'sesame/"street"'])
@pytest.mark.parametrize("place", ["answer", "reason", "broken header", "escaped"])
def test_a_server_that_repeats_the_key_is_quoted_without_it(
    place: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its text, in the line of the status, in what is no HTTP, or escaped as JSON."""
    told = {
        "answer": "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + said(key).decode(),
        "reason": f"HTTP/1.1 401 {key} is wrong\r\nContent-Length: 0\r\n\r\n",
        "broken header": f"HTTP/1.1 200 OK\r\n{key}\r\n\r\n",
        "escaped": f"HTTP/1.1 403 No\r\nConnection: close\r\n\r\n{json.dumps([key])}",
    }[place]  # fmt: skip
    monkeypatch.setenv("JUDGE_KEY", key)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            with connection, connection.makefile("rb") as asked:
                # All of it: what is unread when a connection is closed resets it, answer and all.
                asked.readline()
                asked.read(int(parse_headers(asked)["Content-Length"]))
                connection.sendall(told.encode())

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        with pytest.raises((BadInput, StoreIOError)) as error:
            judge(url, key_env="JUDGE_KEY", retries=0).start(MODEL)
        thread.join()
    assert "***" in str(error.value)
    assert "sesame" not in str(error.value)
    assert "street" not in redacted("".join(traceback.format_exception(error.value)))


@pytest.mark.parametrize(
    "changes",
    [{"key_env": "sk-sesame-42"}, {"url": "http://me:sesame@host/v1"},
     {"url": "me:sesame@host/v1"}, {"url": "http://host/v1?api_key=sesame"}],
    ids=["key", "password", "no scheme", "parameter"],
)  # fmt: skip
def test_a_secret_in_the_wrong_place_is_refused_unseen(changes: dict[str, Any]) -> None:
    (fault,) = judge(**{"url": "http://host/v1", **changes}).faults()
    assert "sesame" not in fault


@pytest.mark.parametrize("url", ["http://[::1/v1", "http://host:99999/v1", "ftp://host/v1"])
def test_a_url_that_cannot_be_one_is_a_fault(url: str) -> None:
    (fault,) = judge(url).faults()
    assert url in fault


def test_no_more_requests_are_under_way_than_workers(server: str) -> None:
    Stub.answers = [(200, said("1"), 0.1)]
    assert len(judge(server, workers=3).judge(ASKED * 2)) == 10
    assert 2 <= Stub.under_way[1] <= 3


def test_no_more_of_an_answer_is_read_than_a_score_needs(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dataflex.rewards.server.MOST_BYTES", 12)
    Stub.answers = [(200, said("1"), 0.0)]
    with pytest.raises(StoreIOError, match=r"no chat completion: '\{\"choices\":' "):
        judge(server, retries=0).start(MODEL)


def test_a_proxy_that_cannot_be_used_is_named(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "carrier://pigeon:word@loft")
    with pytest.raises(BadInput, match="ALL_PROXY") as error:
        judge(server).start(MODEL)
    assert "word" not in str(error.value)


def test_a_busy_server_is_asked_again_after_growing_waits(server: str) -> None:
    Stub.answers = [(503, b"", 0), (429, b"slow down", 0), (200, b"<html>", 0), (200, said("1"), 0)]
    waits: list[float] = []
    assert [v.reward for v in judge(server, waits).judge(ASKED[:1])] == [1.0]
    assert waits == [0.5, 1.0, 2.0]


@pytest.mark.parametrize(
    ("answer", "kind", "says"),
    [
        ((500, b"out of memory", 0.0), StoreIOError, "500 Internal Server Error: out of memory"),
        ((200, b"<html>sorry", 0.0), StoreIOError, "no chat completion: '<html>sorry'"),
        ((200, b'{"choices": ' + b"[" * 50_000, 0.0), StoreIOError, "no chat completion: "),
        ((200, said("1"), 0.6), StoreIOError, "did not answer within 0.2 s"),
        ((401, b"no such key", 0.0), BadInput, "401 Unauthorized: no such key"),
        ((302, b"", 0.0), BadInput, "302 Found"),
        ((200, said("Certainly!"), 0.0), BadInput, "answered 'Certainly!'"),
    ],
    ids=["failing", "html", "nested", "slow", "refusing", "redirecting", "chatting"],
)
def test_a_useless_server_stops_the_run_with_its_own_words(
    server: str, answer: tuple[int, bytes, float], kind: type[Exception], says: str
) -> None:
    Stub.answers = [answer]
    with pytest.raises(kind) as error:
        judge(server, timeout=0.2 if answer[2] else 5.0, retries=1).start(MODEL)
    assert says in str(error.value)
    assert len(Stub.seen) == (2 if kind is StoreIOError else 1)


def test_an_unreachable_server_is_named() -> None:
    with pytest.raises(StoreIOError, match=r"'m' at http://127.0.0.1:9/v1 cannot be reached"):
        judge("http://127.0.0.1:9/v1", retries=0).judge(ASKED)


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"base_url": None}, "api_base_url is missing"), ({"model": None}, "api_model is missing"),
     ({"base_url": "file:///etc/passwd"}, "give a URL"),
     ({"key_env": "NOT_SET_ANYWHERE"}, "NOT_SET_ANYWHERE"),
     ({"base_url": "http://me:word@127.0.0.1:9/v1"}, "a user name or a password")],
)  # fmt: skip
def test_api_settings_that_cannot_work_are_faults(changes: dict[str, Any], says: str) -> None:
    asking = judge(changes.pop("base_url", "http://127.0.0.1:9/v1"), **changes)
    assert any(says in fault for fault in asking.faults())
    assert "word@" not in " ".join(asking.faults())


def test_a_local_language_model_that_answers_without_a_score_is_refused() -> None:
    asking = LocalJudge(TINY, PROMPTS, max_new_tokens=4)
    assert not asking.faults()
    with pytest.raises(BadInput, match="no score from 0 to 1"):
        asking.start(MODEL)


def test_a_local_classifier_rewards_by_its_logit(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16,
                         num_hidden_layers=1, num_attention_heads=2, num_labels=1,
                         pad_token_id=0)  # fmt: skip
    model = LlamaForSequenceClassification(config).eval()
    model.score.weight.data.normal_()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    asking = LocalJudge(str(tmp_path), PROMPTS, max_new_tokens=4)
    asking.start(MODEL)
    rewards = [v.reward for v in asking.judge(ASKED)]
    ids = tokenizer("p r3", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert rewards[3] == pytest.approx(model(ids).logits.sigmoid().item(), abs=1e-6)
    assert len(set(rewards)) > 1


def test_local_models_that_are_not_there_are_faults(tmp_path: Path) -> None:
    for path, says in ((None, "missing"), ("/no/such", "not a folder"), (str(tmp_path), "config")):
        assert says in LocalJudge(path, PROMPTS, max_new_tokens=4).faults()[0]
    for content, says in (("[" * 50_000, "nests more than"), ("[]", "no JSON object")):
        (tmp_path / "config.json").write_text(content)
        assert says in LocalJudge(str(tmp_path), PROMPTS, max_new_tokens=4).faults()[0]
