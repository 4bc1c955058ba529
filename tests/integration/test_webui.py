"""LlamaBoard, without a browser: its own Runner starts a run that DataFlex decides about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]

#: What a user does on the page, by the page's Python: fill in the form, press Start, wait.
PAGE = """
import json, sys
from dataflex.launch.webui import own_command

from llamafactory.webui import interface
from llamafactory.webui.runner import Runner

engines = []
real = interface.Engine
interface.Engine = lambda *args, **kwargs: engines.append(real(*args, **kwargs)) or engines[0]
interface.create_ui()
manager, runner = engines[0].manager, engines[0].runner
assert isinstance(runner, Runner)
given = json.loads(sys.argv[1])
form = {elem: getattr(elem, "value", None) for elem in manager.get_elem_list()}
form.update({manager.get_elem_by_id(name): value for name, value in given.items()})
box = manager.get_elem_by_id("train.output_box")
with own_command():
    for shown in runner.run_train(form):
        pass
print(shown[box])
"""


def test_a_run_started_on_the_page_selects_its_rows(cli: Any, tmp_path: Path) -> None:
    extra = {"train_type": "dynamic_select", "component_name": "random", "warmup_step": 1,
             "update_step": 1, "update_times": 1, "optim": "adamw_torch"}  # fmt: skip
    form = {
        "top.lang": "en", "top.model_name": "Custom", "top.finetuning_type": "lora",
        "top.model_path": str(ROOT / "examples/tiny/model"), "top.template": "default",
        "train.dataset_dir": str(ROOT / "examples/tiny/data"), "train.dataset": ["tiny_train"],
        "train.max_samples": "64", "train.cutoff_len": 128, "train.compute_type": "fp32",
        "train.output_dir": "first", "train.logging_steps": 1,
        "train.extra_args": json.dumps(extra),
    }  # fmt: skip
    env = {"GRADIO_ANALYTICS_ENABLED": "False", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    found = cli("-c", PAGE, json.dumps(form), program="python", heavy=True, cwd=tmp_path, env=env)
    assert found.code == 0, found.err
    assert "Finished" in found.out, found.out + found.err
    assert "step 1: random chose 16 of 64 rows" in found.out  # in the page's own box
    output = tmp_path / "saves" / "Custom" / "lora" / "first"
    saved = yaml.safe_load((output / "training_args.yaml").read_text())
    assert saved["train_type"] == "dynamic_select"
    chosen = json.loads((output / "dataflex" / "selections" / "step_1.json").read_text())
    assert len(chosen["indices"]) == 16  # 2 rows x 8 micro-batches, the page's own defaults
