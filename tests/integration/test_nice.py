"""NICE through the command line: kills, ranks, judges on this machine and behind a server."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "tiny"

#: Small enough for a test: 32 target rows, 2 short responses each.
PARAMS = {"proj_dim": 128, "mc_samples": 2, "max_new_tokens": 8, "generation_batch_size": 8}


def nice(config: Any, name: str = "run.yaml", params: Any = None, **changes: Any) -> Path:
    changes = {"max_samples": 48, "gradient_accumulation_steps": 1, "component_name": "nice",
               "warmup_step": 1, "update_step": 2, "save_steps": 2, "train_step": 5, **changes,
               "component_params": {**PARAMS, **(params or {})}}  # fmt: skip
    path: Path = config(name, **changes)
    return path


def selections(run: Path) -> dict[str, Any]:
    found = {}
    for path in sorted((run / "dataflex" / "selections").glob("*.json")):
        content = json.loads(path.read_text())
        found[path.name] = (content["indices"], content["metric"]["score"])
    return found


def numbers(run: Path) -> dict[str, float]:
    """What the first update told."""
    line = (run / "dataflex" / "events.jsonl").read_text().splitlines()[0]
    return dict(json.loads(line)["numbers"])


def test_a_run_killed_in_its_export_resumes_to_the_same_bits(
    cli: Any, config: Any, tmp_path: Path
) -> None:
    whole = nice(config, "whole.yaml", output_dir=str(tmp_path / "whole"))
    result = cli("train", whole)
    assert result.code == 0, result.err[-3000:]
    assert 0 < numbers(tmp_path / "whole")["reward_mean"] < 1
    path = nice(config)
    assert cli("train", path, faults={"kill_rows": 20}).code == -9
    result = cli("train", path)
    assert result.code == 0, result.err[-3000:]
    runs = [tmp_path / name for name in ("run", "whole")]
    assert selections(runs[0]) == selections(runs[1])
    assert len(selections(runs[0])) == 2
    adapters = [(run / "adapter_model.safetensors").read_bytes() for run in runs]
    assert adapters[0] == adapters[1]


def test_two_processes_answer_and_choose_as_one_does(cli: Any, config: Any, tmp_path: Path) -> None:
    """Without a store; with one, the examples' tests do it."""
    changes = {"lora_dropout": 0.0, "train_step": 2, "per_device_train_batch_size": 1,
               "params": {"scoring": "direct"}}  # fmt: skip
    one = nice(config, "one.yaml", output_dir=str(tmp_path / "one"), **changes,
               gradient_accumulation_steps=2)  # fmt: skip
    two = nice(config, "two.yaml", output_dir=str(tmp_path / "two"), **changes)
    assert cli("train", one).code == 0
    result = cli("train", two, ranks=2)
    assert result.code == 0, result.err[-3000:]
    chosen = [selections(tmp_path / name)["step_1.json"] for name in ("one", "two")]
    assert chosen[0][0] == chosen[1][0]
    np.testing.assert_allclose(chosen[0][1], chosen[1][1], atol=1e-5)
    assert numbers(tmp_path / "one") == pytest.approx(numbers(tmp_path / "two"), abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"params": {"reward_function": "no.such:f"}}, "reward_function 'no.such:f' cannot be"),
        ({"params": {"mc_samples": 1}}, "mc_samples is 1, but baseline: loo"),
        ({"params": {"reward_model_path": "/no/such"}}, "reward_model_path '/no/such' is not a"),
        ({"params": {"policy_model_path": "./gone"}}, "policy_model_path './gone' is not a folder"),
        ({"params": {"reward_backend": "api"}}, "api_base_url is missing"),
        ({"train_on_prompt": True}, "train_on_prompt"),
        ({"params": {"max_new_tokens": 512}}, "max_new_tokens is 512, but the model has 256"),
        ({"params": {"reward_model_path": str(TINY / "model")}}, "no score from 0 to 1"),
    ],
    ids=lambda value: next(iter(value.get("params", value))) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_before_training(
    changes: dict[str, Any], says: str, cli: Any, config: Any, tmp_path: Path
) -> None:
    result = cli("train", nice(config, **changes))
    assert result.code == 2, result.err[-3000:]
    assert says in result.message
    assert "Traceback" not in result.err
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_rewards_that_never_differ_stop_the_run_with_a_way_out(cli: Any, config: Any) -> None:
    params = {"reward_function": "dataflex.rewards.overlap:exact_match"}
    result = cli("train", nice(config, params=params))
    assert result.code == 2
    assert "the rewards carry no signal" in result.message
    assert "gold_fallback: true" in result.message


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, taught to answer whatever it is asked with 0.5."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("judge")
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    model = AutoModelForCausalLM.from_pretrained(TINY / "model").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rows = json.loads((TINY / "data" / "train.json").read_text())
    answer = [*tokenizer("0.5")["input_ids"], tokenizer.eos_token_id]
    for row in rows[:100]:
        text = f"Human: {row['instruction']} {row['output']}\nAssistant:"
        ids = torch.tensor([[*tokenizer(text)["input_ids"], *answer]])
        labels = ids.clone()
        labels[:, : -len(answer)] = -100
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(judge: Path, cli: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """LlamaFactory's own chat server on a free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = tmp_path_factory.mktemp("server") / "api.yaml"
    path.write_text(f"model_name_or_path: {judge}\ntemplate: default\n")
    env = {"API_HOST": "127.0.0.1", "API_PORT": str(port)}
    process = cli("api", path, env=env, background=path.with_name("log")).code
    url = f"http://127.0.0.1:{port}/v1"
    try:
        for _ in range(1200):
            try:
                urllib.request.urlopen(f"{url}/models", timeout=1).close()
                break
            except (urllib.error.URLError, TimeoutError):
                time.sleep(0.1)
        yield url
    finally:
        os.kill(process, signal.SIGTERM)
        cli.ended(process)


def test_llamafactorys_own_server_can_be_the_judge(
    server: str, cli: Any, config: Any, tmp_path: Path
) -> None:
    params = {"api_base_url": server, "api_model": "tiny", "baseline": "none",
              "reward_prompt_with_ref": "{prompt} {response}"}  # fmt: skip
    result = cli("train", nice(config, params=params, train_step=2))
    assert result.code == 0, result.err[-3000:]
    assert numbers(tmp_path / "run")["reward_mean"] == pytest.approx(0.5, abs=0.1)


def test_a_local_model_can_be_the_judge(judge: Path, cli: Any, config: Any, tmp_path: Path) -> None:
    params = {"reward_model_path": str(judge), "baseline": "none",
              "reward_prompt_with_ref": "Human: {prompt} {response}\nAssistant:"}  # fmt: skip
    result = cli("train", nice(config, params=params, train_step=2))
    assert result.code == 0, result.err[-3000:]
    assert numbers(tmp_path / "run")["reward_mean"] == pytest.approx(0.5, abs=0.1)


class Echo(BaseHTTPRequestHandler):
    """A server that repeats the key it was given, in an answer with a score or without."""

    status = 200
    score = "0.5"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        key = self.headers["Authorization"].removeprefix("Bearer ")
        text = f"{self.score} for {key}"
        body = json.dumps({"choices": [{"message": {"content": text}}], "key": key}).encode()
        self.send_response(self.status, f"this is {key}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


SECRET = 'sk-open/sesame"street'

LEAKS: dict[str, tuple[dict[str, Any], dict[str, Any], str, int]] = {
    "answers": ({}, {}, SECRET, 0),
    "answer without a score": ({"score": "no"}, {}, SECRET, 2),
    "refusal": ({"status": 401}, {}, SECRET, 2),
    "fault": ({"status": 500}, {"api_retries": 0}, SECRET, 5),
    "line break": ({}, {}, f"{SECRET}\r\n", 2),
    "key for a name": ({}, {"api_key_env": SECRET}, SECRET, 2),
    "key under another name": ({}, {"api_key": SECRET}, SECRET, 2),
}


@pytest.mark.parametrize("case", LEAKS)
def test_a_judges_key_is_nowhere_in_what_a_run_says_or_writes(
    case: str, cli: Any, config: Any, tmp_path: Path
) -> None:
    told, changes, key, code = LEAKS[case]
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Told", (Echo,), told)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        params = {"api_base_url": f"http://127.0.0.1:{server.server_port}/v1", "api_model": "m",
                  "api_key_env": "JUDGE_KEY", "baseline": "none", **changes}  # fmt: skip
        path = nice(config, params=params, train_step=2, hf_hub_token=f"hf_{SECRET}")
        result = cli("train", path, "--debug", env={"JUDGE_KEY": key}, draws=True)
        server.shutdown()
        thread.join()
    path.unlink()
    assert result.code == code, result.err[-3000:]
    if case == "answers":
        files = {file.name for file in tmp_path.rglob("*")}
        assert {"events.jsonl", "step_1.json", "step_1.jsonl", "state.json", "run.json",
                "picture.png", "receipt.json", "report.html"} <= files  # fmt: skip
    written = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert "sesame" not in result.out + result.err
    assert b"sesame" not in written
    if code and "key" not in case and case != "line break":
        assert "***" in result.message


def test_a_server_that_is_not_there_is_named_before_training(cli: Any, config: Any) -> None:
    params = {"api_base_url": "http://127.0.0.1:9/v1", "api_model": "m", "api_retries": 0}
    result = cli("train", nice(config, params=params))
    assert result.code == 5
    assert "the judge 'm' at http://127.0.0.1:9/v1 cannot be reached" in result.message
