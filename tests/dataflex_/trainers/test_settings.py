"""Settings of a resume: as JSON keeps them, compared without an order where they have none."""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dataflex.trainers.settings import (
    UNORDERED,
    comparable,
    differences,
    of_finetuning,
    of_optimizer,
    of_training,
    told,
)


class Kind(str, Enum):  # noqa: UP042 - as transformers declares its own
    """An enumeration of texts."""

    LINEAR = "linear"
    COSINE = "cosine"


@dataclass
class Tuned:
    """The part of LlamaFactory's arguments that matters here."""

    finetuning_type: str = "lora"
    lora_rank: int = 4
    lora_target: Any = field(default_factory=lambda: ["q_proj", "v_proj"])
    additional_target: Any = None
    loraplus_lr_ratio: float | None = None
    loraplus_lr_embedding: float = 1e-6
    use_galore: bool = False
    galore_rank: int = 16
    use_badam: bool = False
    badam_verbose: int = 0
    pissa_init: bool = False
    pissa_iter: int = 16
    freeze_trainable_layers: int = 2


@dataclass
class Args:
    """The part of TrainingArguments that matters here."""

    learning_rate: float = 2e-3
    weight_decay: float = 0.0
    lr_scheduler_type: Kind = Kind.LINEAR
    lr_scheduler_kwargs: Any = None
    warmup_steps: float = 0
    optim_args: str | None = None
    optim_target_modules: Any = None
    deepspeed: Any = None
    fsdp: Any = field(default_factory=list)


def settings(tuned: Tuned | None = None, args: Args | None = None, **more: Any) -> dict[str, Any]:
    tuned, args = tuned or Tuned(), args or Args()
    return {"seed": 1, **of_finetuning(tuned), "optimizer": of_optimizer(args, tuned),
            "training": of_training(args, steps=8), **more}  # fmt: skip


def as_saved(held: dict[str, Any]) -> Any:
    return json.loads(json.dumps(comparable(held)))


SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text()
    | st.sampled_from(Kind) | st.dates() | st.builds(Path, st.just("a/b"))
    | st.builds(np.float32, st.floats(width=32)) | st.builds(np.int64, st.integers(0, 9))
)  # fmt: skip
VALUES = st.recursive(
    SCALARS | st.frozensets(st.text() | st.integers()) | st.sets(st.text()),
    lambda inner: st.lists(inner) | st.tuples(inner, inner)
    | st.dictionaries(st.text() | st.integers() | st.sampled_from(Kind), inner),
    max_leaves=12,
)  # fmt: skip


@given(st.dictionaries(st.text() | st.sampled_from(sorted(UNORDERED)), VALUES))
@example({"APIKEY": Path("a/b")})
@example({"api_key": {datetime.date(2024, 1, 1)}})
def test_every_setting_survives_json_and_equals_itself(held: dict[str, Any]) -> None:
    plain = comparable(held)
    assert json.dumps(json.loads(json.dumps(plain))) == json.dumps(plain)
    assert comparable(plain) == plain or "NaN" in json.dumps(plain)
    assert differences(as_saved(held), held) == []


@given(st.lists(st.text(), unique=True, min_size=2), st.sampled_from(sorted(UNORDERED)))
def test_what_has_no_order_is_compared_without_one(names: list[str], key: str) -> None:
    for other in (names[::-1], set(names), tuple(names)):
        assert differences(as_saved({key: names}), {key: other}) == []
    assert differences(as_saved({key: names}), {key: names[1:]}) != []
    assert differences(as_saved({"order": names}), {"order": names[::-1]}) != []


def test_values_that_yaml_gives_can_be_saved() -> None:
    params = {1: 0.5, "since": datetime.date(2024, 1, 1), "rows": (1, 2)}
    assert as_saved(settings(component_params=params))["component_params"] == {
        "1": 0.5, "since": "2024-01-01", "rows": [1, 2]}  # fmt: skip
    assert differences(as_saved(settings(alpha=1)), settings(alpha=1.0)) == []


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"loraplus_lr_ratio": 16.0}, ["loraplus_lr_ratio None, now 16.0"]),
        ({"use_galore": True}, ["use_galore False, now True"]),
        ({"pissa_init": True}, ["pissa_init False, now True"]),
        ({"galore_rank": 8}, []),
        ({"freeze_trainable_layers": 1}, []),
        ({"lora_rank": 8}, ["lora_rank 4, now 8"]),
        ({"lora_target": {"v_proj", "q_proj"}}, []),
    ],
)
def test_keys_of_the_optimizer_are_compared_where_they_act(
    changed: dict[str, Any], says: list[str]
) -> None:
    assert differences(as_saved(settings()), settings(Tuned(**changed))) == says


@pytest.mark.parametrize(
    ("held", "now", "says"),
    [
        ({"loraplus_lr_ratio": 4.0}, {"loraplus_lr_embedding": 1e-3},
         ["loraplus_lr_embedding 1e-06, now 0.001"]),
        ({"use_galore": True}, {"galore_rank": 8}, ["galore_rank 16, now 8"]),
        ({"use_badam": True}, {"badam_verbose": 2}, []),
        ({"finetuning_type": "freeze"}, {"freeze_trainable_layers": 1},
         ["freeze_trainable_layers 2, now 1"]),
    ],
)  # fmt: skip
def test_parameters_of_an_optimizer_in_use_are_compared(
    held: dict[str, Any], now: dict[str, Any], says: list[str]
) -> None:
    assert differences(as_saved(settings(Tuned(**held))), settings(Tuned(**held | now))) == says


def test_another_sharding_keeps_the_optimizer_elsewhere_and_is_refused() -> None:
    now = settings(args=Args(deepspeed="ds.json"))
    assert differences(as_saved(settings()), now) == ["deepspeed False, now True"]


def test_a_checkpoint_of_before_these_keys_still_resumes() -> None:
    held = {k: v for k, v in settings().items() if k not in ("optimizer", "training")}
    now = settings(Tuned(loraplus_lr_ratio=16.0), Args(learning_rate=1.0))
    assert differences(as_saved(held), now) == []
    assert told(as_saved(held), now) is None


def test_what_acts_of_a_changed_schedule_and_what_does_not_is_told_in_one_line() -> None:
    args = Args(learning_rate=0.02, weight_decay=0.1, lr_scheduler_type=Kind.COSINE)
    now = {**settings(args=args), "training": of_training(args, steps=12)}
    held = as_saved(settings())
    assert differences(held, now) == []
    assert told(held, settings()) is None
    assert told(held, now) == (
        "changed since the checkpoint: learning_rate 0.002, now 0.02; weight_decay 0.0, now 0.1: "
        "without effect, the checkpoint's value goes on. lr_scheduler_type 'linear', now "
        "'cosine'; steps of the run 8, now 12: acts after the first step"
    )
