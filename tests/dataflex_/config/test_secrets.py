"""Secrets are known by the names of their keys, and replaced wherever a text quotes them."""

from __future__ import annotations

import html
import json
from datetime import date
from pathlib import Path
from urllib.parse import quote

import pytest

from dataflex.config import secrets
from dataflex.config.keys import load
from dataflex.config.presets import resolve
from dataflex.config.secrets import keep_secret, keep_secrets, redacted, without_secrets
from dataflex.run.messages import Failure
from gradstore.errors import BadInput

KEY = "sk-open/'sesame\"<42"


@pytest.fixture(autouse=True)
def none_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "_kept", set())


@pytest.mark.parametrize(
    "form", [KEY, quote(KEY), quote(KEY, safe=""), json.dumps(KEY), repr(KEY), html.escape(KEY)]
)
def test_a_known_secret_is_replaced_in_every_form_that_a_text_may_quote_it_in(form: str) -> None:
    keep_secret(KEY)
    shown = redacted(f"no access with {form}, sorry")
    assert "sesame" not in shown
    assert shown.startswith("no access with ")
    assert shown.endswith(", sorry")
    assert "***" in shown


def test_a_longer_secret_is_replaced_before_one_that_is_part_of_it() -> None:
    keep_secret("open")
    keep_secret("open-sesame\n")
    assert redacted("open-sesame, open") == "***, ***"
    keep_secret("no")  # a key this short would spoil every message
    assert redacted("no") == "no"


@pytest.mark.parametrize(
    "name",
    ["hf_hub_token", "ms_hub_token", "om_hub_token", "swanlab_api_key", "api_key", "password",
     "swanlab_lark_secret", "swanlab_lark_webhook_url", "hub_token", "token", "AWS_SECRET_KEY",
     "authorization", "Proxy-Authorization", "judge_key", "judge_token", "credentials", "X-Api-Key",
     "bearer", "api_keys"],
)  # fmt: skip
def test_texts_under_secret_names_are_left_out_of_files(name: str) -> None:
    params = {"judge": [{name: KEY, "temperature": 0.5}]}
    assert without_secrets(params) == {"judge": [{name: "***", "temperature": 0.5}]}
    assert params["judge"][0][name] == KEY, "a copy is changed"
    keep_secrets(params)
    assert redacted(KEY) == "***"


@pytest.mark.parametrize(
    ("name", "value"),
    [("eos_token", "</s>"), ("tokens_per_batch", 128), ("max_new_tokens", 8), ("pooling", "mean"),
     ("api_key_env", "JUDGE_KEY"), ("api_key", "JUDGE_KEY"), ("password", 3), ("monkey", "banana"),
     ("add_tokens", "<tool>"), ("stop_tokens", ["</s>"]), ("api_keys", ["JUDGE_KEY"]),
     ("sort_key", "length")],
)  # fmt: skip
def test_what_only_sounds_like_a_secret_is_shown(name: str, value: object) -> None:
    """DataFlex 1.1.0's `api_key` is the name of an environment variable."""
    assert without_secrets({name: value}) == {name: value}
    keep_secrets({name: value})
    assert redacted(str(value)) == str(value)


def test_every_text_in_a_list_or_a_mapping_under_a_secret_name_is_secret() -> None:
    params = {
        "hub_tokens": ["hf_first", "hf_second", "HF_TOKEN"],
        "credentials": {"user": "ada-of-old", "rights": [{"key": "sk-third"}], "tries": 3},
        "headers": {"Authorization": "Bearer sk-fourth"},
        "passwords": {Path("of/a/file")},
        "passphrase": date(2024, 1, 1),
    }
    assert without_secrets(params) == {
        "hub_tokens": ["***", "***", "HF_TOKEN"],
        "credentials": {"user": "***", "rights": [{"key": "***"}], "tries": 3},
        "headers": {"Authorization": "***"},
        "passwords": {"***"},
        "passphrase": "***",
    }
    keep_secrets(params)
    said = "hf_first hf_second HF_TOKEN ada-of-old sk-third 'Bearer sk-fourth' sk-fourth"
    assert redacted(said) == "*** *** HF_TOKEN *** *** '***' ***"
    assert redacted("of/a/file since 2024-01-01") == "*** since ***"


def test_keys_of_a_configuration_and_of_its_presets_are_known_once_they_are_read(
    tmp_path: Path,
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: runs/x\nhf_hub_token: hf_sesame\n")
    config = load(path, ["component_params.api_key=sk-sesame"], {"output_dir", "hf_hub_token"})
    assert config.llamafactory["hf_hub_token"] == "hf_sesame", "LlamaFactory gets it"
    shown = Failure(2, "LlamaFactory refuses hf_sesame and sk-sesame").message
    assert shown == "LlamaFactory refuses *** and ***"
    presets = tmp_path / "components.yaml"
    presets.write_text("selectors: {mine: {name: random, params: {password: open-sesame}}}")
    with pytest.raises(BadInput):
        resolve("dynamic_select", "mine", {}, presets)
    assert redacted("open-sesame") == "***"


def test_keys_of_a_service_are_known_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADSTORE_TOKEN", "reads-open-sesame")
    monkeypatch.setenv("GRADSTORE_WRITE_TOKEN", "writes-open-sesame")
    path = tmp_path / "run.yaml"
    path.write_text(f"output_dir: {tmp_path}\n")
    load(path, [], {"output_dir"})
    assert redacted("Bearer writes-open-sesame, reads-open-sesame") == "Bearer ***, ***"


@pytest.mark.parametrize(
    ("yaml", "override"),
    [
        ("hf_hub_token: {hf_sesame-1\n", "seed=1"),
        ('"hf_hub_token": "hf_sesame-1\n', "seed=1"),
        ("seed: 1\n", "hf_hub_token={hf_sesame-1"),
        ("seed: 1\n", "component_params.api_key=[hf_sesame-1"),
        ("headers: {X-Api-Key: [other-one, hf_sesame-1\n", "seed=1"),
    ],
)
def test_a_secret_in_text_that_does_not_parse_is_not_shown(
    yaml: str, override: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml)
    with pytest.raises(BadInput) as refused:
        load(path, [override], {"seed", "hf_hub_token"})
    assert "sesame" not in Failure(2, str(refused.value)).message
