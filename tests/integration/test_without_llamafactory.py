"""docs/without-llamafactory.md: its scripts run, a killed one goes on, two processes share one."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradstore.scoring.frames import open_store
from gradstore.store.verify import verify_store

ROOT = Path(__file__).resolve().parents[2]

#: Runs scripts of the page one after the other, in units of 16 rows; tells the units computed.
DRIVER = """
import json, os, signal, sys
from dataflex.features import gradients
from gradstore.store import building
from gradstore.store.writer import StoreWriter
begin = StoreWriter.begin
StoreWriter.begin = lambda *args, **kwargs: begin(*args, **{**kwargs, "unit_rows": 16})
computed = []
def counting(module):
    compute = module.compute_unit
    def counted(*args, **kwargs):
        if len(computed) == int(os.environ.get("KILL_AFTER", "-1")):
            os.kill(os.getpid(), signal.SIGKILL)
        computed.append(args[3].start)
        return compute(*args, **kwargs)
    module.compute_unit = counted
counting(gradients), counting(building)
for script in sys.argv[1:]:
    exec(compile(open(script).read(), script, "exec"), {"__name__": "__main__"})
    print("computed", len(computed))
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The page's scripts, which write below this folder."""
    page = (ROOT / "docs" / "without-llamafactory.md").read_text()
    found = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    folder = tmp_path_factory.mktemp("scripts")
    for name, text in zip(("trainer", "sft", "script"), found, strict=True):
        (folder / f"{name}.py").write_text(text.replace('"out/', f'"{folder}/'))
    (folder / "driver.py").write_text(DRIVER)
    return [folder / f"{name}.py" for name in ("trainer", "sft", "script")]


@pytest.fixture
def run(cli: Any) -> Callable[..., Any]:
    """Run scripts by the driver beside the first of them."""

    def go(scripts: list[Path], ranks: int = 1, **env: str) -> Any:
        usual = {"TQDM_DISABLE": "1", "CUDA_VISIBLE_DEVICES": "", "LLAMAFACTORY_VERBOSITY": None}
        return cli(scripts[0].parent / "driver.py", *scripts, program="python", heavy=True,
                   ranks=ranks, env={**usual, **env})  # fmt: skip

    return go


def test_the_scripts_of_the_page_run_and_a_killed_one_computes_what_is_missing(
    scripts: list[Path], run: Callable[..., Any]
) -> None:
    # 20 target rows and 96 training rows are 2 and 6 units, after step 3 and after step 6.
    killed = run(scripts[:1], KILL_AFTER="11")
    assert killed.code == -signal.SIGKILL, killed.err
    store = open_store(scripts[0].parent / "trainer" / "gradstore")
    assert [g.name for g in store.generations()] == ["target/held_out/3", "train/3",
                                                     "target/held_out/6"]  # fmt: skip
    done = run(scripts)
    assert done.code == 0, done.err
    made = [int(n) for n in re.findall(r"^computed (\d+)", done.out, flags=re.M)]
    # The kill came as the eleventh was handed over: it may have been on its way.
    assert 0 <= made[0] - (16 - 11) <= 1, "the same steps again, what was written is reused"
    assert "response" in done.out
    steps = {"trainer": (3, 6), "trl": (2, 4), "script": (0,)}
    for name, exported in steps.items():
        path = scripts[0].parent / name / "gradstore"
        assert verify_store(path).ok
        store = open_store(path)
        assert [g.step for g in store.generations() if g.role == "train"] == list(exported)
        assert all(g.usable.all() for g in store.generations())
        frame = store.rows_frame(f"train/{exported[-1]}")
        first = json.loads((ROOT / "examples/tiny/data/train.json").read_text())[0]
        assert frame["response"][0] == first["output"]
        prompt = f"{first['instruction']}\n{first['input']}"
        as_given = name == "script"  # the others' is decoded from tokens
        assert frame["prompt"][0] == prompt + ("\n" if as_given else "")


def test_two_processes_share_a_callbacks_passes_and_one_writes(
    scripts: list[Path], run: Callable[..., Any], tmp_path: Path
) -> None:
    """Their features are those that one process takes at the checkpoint they saved."""
    script = tmp_path / "two.py"
    text = scripts[0].read_text().replace(str(scripts[0].parent), str(tmp_path))
    text = text.replace("report_to=", "use_cpu=True, report_to=")
    script.write_text(
        f"{text}\nimport gradstore\n"
        "if trainer.args.process_index == 0:\n"
        "    gradstore.build(trainer.model, trainer.data_collator, trainer.train_dataset,\n"
        f"                    trainer.eval_dataset, '{tmp_path}/alone', step=6, proj_dim=256,\n"
        "                    moments=trainer.optimizer)\n"
    )
    (tmp_path / "driver.py").write_text(DRIVER)
    done = run([script], ranks=2)
    assert done.code == 0, done.err[-3000:]
    shared, alone = (open_store(tmp_path / part) for part in ("trainer/gradstore", "alone"))
    assert [g.step for g in shared.generations() if g.role == "train"] == [3, 6]
    for name in ("train/6", "target/held_out/6"):
        a, b = shared.generation(name), alone.generation(name)
        assert a.record.adapter_hash == b.record.adapter_hash
        assert a.record.optimizer_hash == b.record.optimizer_hash
        assert np.abs(a.read(0, a.rows) - b.read(0, b.rows)).max() <= 1e-6
