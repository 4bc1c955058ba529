"""What a call may ask of a Ray cluster, and the environment that goes along."""

from __future__ import annotations

import math
from typing import Any

import pytest

from gradstore.cluster.options import RayOptions, room
from gradstore.errors import BadInput


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"actors": 0}, "actors is 0"),
        ({"cpus_per_actor": 0.0}, "cpus_per_actor is 0.0"),
        ({"cpus_per_actor": math.nan}, "cpus_per_actor is nan"),
        ({"gpus_per_actor": 1.5}, "gpus_per_actor is 1.5"),
        ({"gpus_per_actor": -1.0}, "gpus_per_actor is -1.0"),
        ({"memory_per_actor": 0.0}, "memory_per_actor is 0.0"),
        ({"address": ""}, "address is ''"),
        ({"address": "somewhere"}, r"address is 'somewhere'; .*HOST:PORT of the head"),
        ({"address": "ray://head:10001"}, "address is 'ray://head:10001'"),
        ({"address": "head:99999"}, "address is 'head:99999'"),
    ],
)
def test_numbers_out_of_range_are_named(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        RayOptions(**wrong)


def test_room_is_counted_by_node() -> None:
    """Half a GPU on each of two nodes is no room for a whole one."""
    assert room({"a": {"CPU": 1, "GPU": 0.5}, "b": {"CPU": 1, "GPU": 0.5}}, {"GPU": 1}) == 0
    assert room({"a": {"CPU": 0.3}}, {"CPU": 0.1}) == 3  # 0.3 / 0.1 is a little less than 3


def test_the_environment_goes_along_but_for_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "WANDB_API_KEY", "TOKENIZERS_PARALLELISM", "HOME"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    passed = RayOptions(cpus_per_actor=8).environment()
    assert {"HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM"} <= passed.keys()
    assert not {"HF_TOKEN", "WANDB_API_KEY", "HOME"} & passed.keys()
    assert passed["OMP_NUM_THREADS"] == "3"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert RayOptions(cpus_per_actor=8).environment()["OMP_NUM_THREADS"] == "8"
    assert RayOptions(cpus_per_actor=0.5).environment()["OMP_NUM_THREADS"] == "1"
