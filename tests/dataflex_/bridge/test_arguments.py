"""Arguments of LlamaFactory: what a process alone is given where several devices are visible."""

from __future__ import annotations

import os

import pytest

from dataflex.bridge import arguments


@pytest.mark.parametrize(
    ("visible", "number", "own"),
    [
        (None, 0, "0"),
        (None, 2, "2"),
        (None, 5, "1"),
        ("3,1,7,5", 1, "1"),
        ("GPU-a,GPU-b", 3, "GPU-b"),
    ],
)
def test_a_process_alone_takes_its_own_of_several_devices(
    visible: str | None, number: int, own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers i of N are given number i - 1, so that they spread over a machine's devices."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    count = len(visible.split(",")) if visible else 4
    monkeypatch.setattr(arguments, "device_count", lambda: count)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert arguments.alone({"seed": 1}, number) == {"seed": 1}
    assert os.environ["CUDA_VISIBLE_DEVICES"] == own


@pytest.mark.parametrize(("devices", "env"), [(1, {}), (0, {}), (4, {"LOCAL_RANK": "1"})])
def test_devices_stay_visible_to_who_has_one_or_none_and_to_processes_of_torchrun(
    devices: int, env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arguments, "device_count", lambda: devices)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name, value in {"CUDA_VISIBLE_DEVICES": "0,1,2,3", **env}.items():
        monkeypatch.setenv(name, value)
    arguments.alone({})
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"


def test_a_process_alone_is_not_spread_over_others_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    given = {"deepspeed": "ds_z3.json", "fsdp": "full_shard", "seed": 1}
    with caplog.at_level("INFO"):
        assert arguments.alone(given) == {"seed": 1}
        assert arguments.alone({"fsdp": "", "seed": 1}) == {"seed": 1}
    (said,) = caplog.messages
    assert said == "one process on one device: deepspeed and fsdp of the YAML without effect"
    assert "deepspeed" in given, "the run's own arguments stay as they are"
