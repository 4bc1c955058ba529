"""What a resume takes from a checkpoint's state, and how it refuses what it cannot take."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dataflex.checkpoints.state import RunState
from dataflex.mixers.odm import OdmMixer
from dataflex.run.ranks import Ranks
from dataflex.trainers.seam import Seam
from gradstore.errors import BadInput, DamagedData

SHA = "0" * 64


def seam(strategy: Any) -> Any:
    """One at the beginning of a resume, without the Trainer below it."""
    made: Any = object.__new__(Seam)
    schedule = SimpleNamespace(warmup_step=2, update_step=2, update_times=2, budget=8)
    made.run = SimpleNamespace(schedule=schedule, strategy=strategy, name="odm", ranks=Ranks())
    made.rows_sha256, made._agreed = SHA, {"seed": 1}
    return made


def state(component: dict[str, Any], **changes: Any) -> RunState:
    return RunState(**{"step": 4, "run_id": "a", "schedule": (2, 2, 2), "rows_sha256": SHA,
                       "settings": {"seed": 1}, "component": component, **changes})  # fmt: skip


@pytest.mark.parametrize("component", [{}, {"rewards": "x"}, {"rewards": [[1], [2, 3]]}])
def test_a_state_that_the_component_cannot_take_is_damaged_data(component: dict[str, Any]) -> None:
    mixer = OdmMixer()
    held = {"averaging": mixer.averaging, **component}
    with pytest.raises(DamagedData, match=r"run/checkpoint-4/dataflex/state\.json.*'odm'"):
        seam(mixer)._restore(state(held), Path("run/checkpoint-4"))


def test_a_components_own_refusal_stays_what_it_is() -> None:
    mixer = OdmMixer()
    with pytest.raises(BadInput, match="averaging"):
        seam(mixer)._restore(state({"averaging": "other", "rewards": np.ones(2)}), Path("c"))


def test_a_changed_setting_and_another_schedule_are_refused_with_both_values() -> None:
    made = seam(OdmMixer())
    with pytest.raises(BadInput, match="seed 7, now 1"):
        made._restore(state({}, settings={"seed": 7}), Path("c"))
    with pytest.raises(BadInput, match=r"\(1, 2, 2\), this configuration has \(2, 2, 2\)"):
        made._restore(state({}, schedule=(1, 2, 2)), Path("c"))


def test_a_line_of_an_evaluation_has_no_number_of_ours_the_next_line_of_training_has_all(
    logging_seam: Any,
) -> None:
    """A model card takes every key of such a line for a metric; it failed on `kept_share`."""
    made, lines = logging_seam(Seam)
    made.add_to_log({"kept_share": 0.05})
    for line in ({"eval_loss": 1.0}, {"loss": 2.0}, {"loss": 3.0}):
        made.log(line)
    assert lines == [
        {"eval_loss": 1.0},
        {"loss": 2.0, "dataflex/kept_share": 0.05},
        {"loss": 3.0},
    ]
