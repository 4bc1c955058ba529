"""A package that a key needs and that is not there is told with its command, importing nothing."""

from __future__ import annotations

import logging
import tomllib
from pathlib import Path
from typing import Any

import pytest
from transformers.integrations import integration_utils
from transformers.training_args import OptimizerNames

from dataflex.launch import packages
from dataflex.launch.configuration import read
from dataflex.launch.packages import REPORTERS, check_packages, check_reporters
from gradstore.errors import BadInput

ROOT = Path(__file__).resolve().parents[3]


def without(monkeypatch: pytest.MonkeyPatch, *there: str) -> None:
    """Let no package be installed but these."""
    find = {name: object() for name in there}
    monkeypatch.setattr(packages.importlib.util, "find_spec", find.get)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"use_swanlab": True}, r"use_swanlab is True, .*\[swanlab\]'$"),
        ({"use_unsloth": True}, "pip install unsloth$"),
        ({"enable_liger_kernel": True}, "pip install liger-kernel$"),
        ({"quantization_bit": 4}, "quantization_bit is 4, .*: pip install bitsandbytes$"),
        ({"quantization_bit": 8, "quantization_method": "hqq"}, "pip install hqq$"),
        ({"deepspeed": "z.json"}, "deepspeed is 'z.json', .*: pip install deepspeed$"),
        ({"use_galore": True}, "pip install galore-torch$"),
        ({"use_apollo": True}, "pip install apollo-torch$"),
        ({"use_badam": True}, "pip install 'badam>=1.2.1'$"),
        ({"use_adam_mini": True}, "pip install adam-mini$"),
        ({"optim": "paged_adamw_8bit"}, "optim is 'paged_adamw_8bit', .*bitsandbytes$"),
        ({"optim": "galore_adamw"}, "pip install galore-torch$"),
        ({"optim": "schedule_free_adamw"}, "pip install schedulefree$"),
        ({"predict_with_generate": True}, "jieba\n.*nltk\n.*rouge-chinese$"),
    ],
)
def test_a_key_whose_package_is_missing_is_told_with_the_command(
    keys: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch)
    with pytest.raises(BadInput, match=says):
        check_packages(keys)
    off = {key: False if value is True else None for key, value in keys.items()}
    check_packages(off)
    every = [*packages.SWITCHES.values(), *packages.QUANTIZERS.values(), *packages._MEASURES,
             *(package for _, package in packages.OPTIMIZERS)]  # fmt: skip
    without(monkeypatch, *(module for package in every for module in package.modules))
    check_packages(keys)


@pytest.mark.parametrize("name", REPORTERS)
def test_a_tracker_that_is_not_installed_is_refused_with_the_command(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch)
    for given in (name, ["none", name]):
        with pytest.raises(BadInput, match=f"report_to is {name}, .*: pip install .*none"):
            check_reporters({"report_to": given})
    without(monkeypatch, REPORTERS[name].modules[-1])
    check_reporters({"report_to": [name]})


def test_a_tracker_that_nobody_knows_is_refused_with_the_known_ones() -> None:
    with pytest.raises(BadInput, match=r"'wandbb' \(did you mean 'wandb'\?\). Accepted: all, "):
        check_reporters({"report_to": "wandbb"})
    says = r"unknown report_to: 'wandb,mlflow'.* Several are a list: report_to: \[wandb, mlflow\]"
    with pytest.raises(BadInput, match=says):
        check_reporters({"report_to": "wandb,mlflow"})  # one name to LlamaFactory
    for none in ({}, {"report_to": None}, {"report_to": "none"}, {"report_to": ["all"]}):
        check_reporters(none)


def test_every_tracker_of_transformers_is_known_and_every_extra_exists() -> None:
    assert set(REPORTERS) == set(integration_utils.INTEGRATION_TO_CALLBACK)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {p.requirement for p in REPORTERS.values() if "[" in p.requirement}
    trackers = set(project["optional-dependencies"]) - {"encoders", "ray", "s3"}
    assert named == {f"dataflex-gradstore[{extra}]" for extra in trackers}


def needs(optim: str) -> bool:
    """Whether an optimizer is refused for want of a package."""
    try:
        check_packages({"optim": optim})
    except BadInput:
        return True
    return False


def test_every_optimizer_of_transformers_needs_what_its_name_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without(monkeypatch)
    plain = {"adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused",
             "adafactor", "sgd", "adagrad", "rmsprop"}  # fmt: skip
    alone = {optim.value for optim in OptimizerNames if not needs(optim.value)}
    assert alone == plain


def test_flash_attention_that_is_missing_is_said_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without(monkeypatch)
    with caplog.at_level(logging.WARNING):
        check_packages({"flash_attn": "fa2"})
    assert "pip install flash-attn" in caplog.text


def test_reading_a_configuration_checks_its_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: a\nuse_unsloth: true\n")
    real = packages.importlib.util.find_spec
    monkeypatch.setattr(packages.importlib.util, "find_spec",
                        lambda name: None if name == "unsloth" else real(name))  # fmt: skip
    with pytest.raises(BadInput, match="pip install unsloth"):
        read(path, [])
