"""What one run sets in a chat template, the next of the same process does not find."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dataflex.bridge.questions import load_for_questions
from dataflex.bridge.running import load_untouched

TINY = Path(__file__).resolve().parents[3] / "examples" / "tiny"
MODEL = {"model_name_or_path": str(TINY / "model"), "template": "default", "cutoff_len": 64,
         "stage": "sft", "finetuning_type": "lora"}  # fmt: skip


def test_the_next_model_has_no_system_prompt_of_the_last() -> None:
    first = load_for_questions({**MODEL, "default_system": "Be brief."})
    assert "Be brief." in first.tokenizer.decode(first.request("How far?"))
    assert "Be brief." in first.tokenizer.chat_template
    second = load_for_questions(MODEL)
    assert "Be brief." not in second.tokenizer.decode(second.request("How far?"))
    assert "Be brief." not in second.tokenizer.chat_template
    assert "Be brief." in first.tokenizer.decode(first.request("How far?")), "it keeps its own"


def test_a_run_leaves_the_templates_as_they_were(dataset_dir: Any, tmp_path: Path) -> None:
    from llamafactory.data.template import TEMPLATES

    rows = [{"instruction": "How far?", "input": "", "output": "Far."}]
    run = {**MODEL, "default_system": "Be brief.", "dataset": "rows", "use_cpu": True,
           "dataset_dir": str(dataset_dir(rows=rows)), "output_dir": str(tmp_path / "run"),
           "do_train": True, "report_to": "none", "overwrite_cache": True}  # fmt: skip
    assert load_untouched(run) == 1
    assert TEMPLATES["default"].default_system == ""
