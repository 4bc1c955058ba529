"""What a run says of itself before its model is loaded."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from dataflex.bridge import arguments
from dataflex.config.keys import load
from dataflex.config.presets import resolve
from dataflex.data.order import BatchShape
from dataflex.launch.announced import announce, replaced_store, unsaved_updates
from dataflex.run.ranks import Ranks
from dataflex.trainers.job import Job, Run
from dataflex.trainers.row_seam import RowSeam
from gradstore.format.layout import METADATA

ROOT = Path(__file__).resolve().parents[3]
LESS = ROOT / "examples" / "train_lora" / "selectors" / "less.yaml"


def planned(path: Path, *overrides: str, epochs: float = 1, **args: Any) -> Run:
    """Plan a run of 1,000 rows with transformers' defaults where `args` says nothing."""
    config = load(path, overrides, arguments.accepted_keys())
    ours = config.dataflex
    component = resolve(ours.train_type, ours.component_name, ours.component_params)
    given: Any = SimpleNamespace(
        **{"num_train_epochs": epochs, "max_steps": -1, "save_strategy": "steps",
           "save_steps": config.get("save_steps", 500), **args}
    )  # fmt: skip
    data: Any = SimpleNamespace(train=range(1000))
    job = Job(config, component, component.build(), data, given, BatchShape(8, 1, 1), Ranks(0, 1))
    return Run(**vars(job), schedule=RowSeam.plan(job), run_id="")


@pytest.fixture(autouse=True)
def _at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def said(run: Run, caplog: pytest.LogCaptureFixture) -> list[str]:
    with caplog.at_level(logging.INFO, "dataflex"):
        announce(run, fresh=True)
    return [record.getMessage() for record in caplog.records]


def test_a_run_of_three_epochs_says_that_it_has_three_stages(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    given = ("warmup_step=100", "update_step=100", "update_times=4", f"output_dir={tmp_path}")
    (line,) = said(planned(LESS, *given, epochs=3), caplog)
    assert line == (
        "this run: 1,500 steps, 12 updates: 3 stages of 100 + 4 x 100 steps, by num_train_epochs 3"
    )
    caplog.clear()
    (line,) = said(planned(LESS, *given, "train_step=700", epochs=3), caplog)
    assert line == "this run: 700 steps, 5 updates: 2 stages of 100 + 4 x 100 steps"


def test_the_page_of_ones_own_data_says_what_its_configuration_will_say(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    page = (ROOT / "docs" / "guide" / "your-data.md").read_text()
    block = re.search(r"```yaml\n(.*?)```", page, flags=re.S)
    assert block is not None
    path = tmp_path / "config.yaml"
    path.write_text(block[1])
    content = yaml.safe_load(block[1])
    run = planned(path, epochs=content["num_train_epochs"], save_steps=content["save_steps"])
    (line,) = said(run, caplog)
    shown = " ".join(page.split())
    assert f"`{line.removeprefix('this run: ').partition(', by')[0]}`" in shown


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("target_dataset=null",), "those of eval_dataset (tiny_target_heldout)"),
        (("target_dataset=null", "eval_dataset=null", "val_size=0.1"), "a share of dataset"),
        ((), None),
        (("target_dataset=null", "component_name=random", "component_params={}"), None),
    ],
)
def test_a_target_that_nobody_named_is_told(
    overrides: tuple[str, ...], says: str | None, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    lines = said(planned(LESS, f"output_dir={tmp_path}", *overrides), caplog)[1:]
    assert len(lines) == (says is not None)
    assert all(str(says) in line for line in lines)


def test_a_store_that_a_run_replaces_is_named_with_its_size(tmp_path: Path) -> None:
    own = tmp_path / "gradstore"
    own.mkdir()
    run = planned(LESS, f"output_dir={tmp_path}")
    assert replaced_store(run, fresh=True) == "", "there is none yet"
    (own / METADATA).write_bytes(b"{}")
    (own / "chunk").write_bytes(bytes(3 << 20))
    assert f"{str(own)!r} (3 MiB), is removed" in replaced_store(run, fresh=True)
    assert "gradstore: FOLDER" in replaced_store(run, fresh=True)
    assert replaced_store(run, fresh=False) == "", "a run that goes on keeps it"
    for other in ("overwrite_output_dir=false", f"gradstore={own}"):
        assert replaced_store(planned(LESS, f"output_dir={tmp_path}", other), fresh=True) == ""


def test_a_run_none_of_whose_updates_is_saved_says_so_at_its_start(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    given = ("warmup_step=100", "update_step=100", "update_times=4", f"output_dir={tmp_path}")
    for every in (500, 0):
        caplog.clear()
        (_, warning) = said(planned(LESS, *given, save_steps=every), caplog)
        assert f"save_steps is {every}, and no update (at steps 100, 200, 300, ...)" in warning
        assert "save_steps: 100" in warning


@pytest.mark.parametrize(
    ("overrides", "args"),
    [
        ((), {"save_steps": 100}),
        ((), {"save_steps": 400}),  # the last update
        ((), {"save_steps": 0.2}),  # of the steps
        ((), {"save_strategy": "no"}),
        (("component_name=near", "component_params={}"), {}),  # stores no gradients
        (("component_params={scoring: direct}",), {}),
        (("finetuning_type=full",), {}),
        (("warmup_step=0", "update_times=1"), {}),  # at the start: there is no checkpoint
    ],
)
def test_nothing_is_said_where_an_update_is_saved_or_none_can_be_asked(
    overrides: tuple[str, ...], args: dict[str, Any]
) -> None:
    given = ("warmup_step=100", "update_step=100", "update_times=4")
    assert unsaved_updates(planned(LESS, *given, *overrides, **{"save_steps": 500, **args})) == ""
