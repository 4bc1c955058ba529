"""Questions to a store in a bucket, or behind a service, get the answers that a folder gives."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from gradstore import open_store
from gradstore.store.verify import verify_store

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "tiny"


def ok(result: Any) -> Any:
    assert result.code == 0, result.err[-3000:]
    return result


def environment() -> dict[str, str]:
    """What a process needs to reach either."""
    return {k: v for k, v in os.environ.items() if k.startswith(("AWS_", "GRADSTORE_"))}


@pytest.fixture(params=["bucket", "service"])
def place(request: pytest.FixtureRequest) -> str:
    """An empty place."""
    found = request.getfixturevalue(request.param)
    return found if isinstance(found, str) else str(found.address)


def answers(cli: Any, path: Path, store: object, folder: Path) -> tuple[Any, ...]:
    """Build a store and ask it: rows that help and hurt, what the best ones gain, the audit."""
    row = json.loads((TINY / "data" / "train.json").read_text())[5]
    prompt = "\n".join(filter(None, (row["instruction"], row["input"])))
    env, table = environment(), folder / "audit.jsonl"
    ok(cli("gradstore", "build", path, f"gradstore={store}", env=env))
    told = ok(cli("gradstore", "explain", store, "--prompt", prompt, "--response", row["output"],
                  "--top", 3, "--json", env=env))  # fmt: skip
    ok(cli("gradstore", "audit", store, "-o", table, "--json", env=env))
    patched = ok(cli("gradstore", "eval", store, path, "--metric", "tail_patch", "--k", 2,
                     "--json", env=env))  # fmt: skip
    answer, gains = json.loads(told.out), json.loads(patched.out)
    assert answer["helped"][0]["row"] == 5
    measured = [gains[key] for key in ("mean", "low", "high", "queries")]
    return answer["helped"], answer["hurt"], measured, table.read_bytes()


@pytest.fixture(scope="module")
def of_folders() -> dict[str, tuple[Any, ...]]:
    """Answers of a store in a folder by its dtype, filled by the first test that needs them."""
    return {}


@pytest.mark.parametrize("dtype", ["int8", "1bit"])
def test_explain_audit_and_eval_answer_of_a_store_elsewhere_as_of_a_folder(
    cli: Any, config: Any, place: str, dtype: str, of_folders: dict[str, Any], tmp_path: Path
) -> None:
    keys: dict[str, Any] = {
        "max_samples": 40, "max_steps": 4, "gradient_accumulation_steps": 1, "warmup_step": 1,
        "update_step": 1,
        "component_params": {"proj_dim": 64, "gradient_type": "sgd", "dtype": dtype},
    }  # fmt: skip
    path = config(**keys)
    if dtype not in of_folders:
        of_folders[dtype] = answers(cli, path, tmp_path / "folder", tmp_path)
    assert answers(cli, path, place, tmp_path) == of_folders[dtype]
    assert verify_store(place).ok
    assert {each.dtype for each in open_store(place).generations()} == {dtype, "float16"}


@pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning")
def test_the_callback_of_a_plain_trainer_exports_to_a_store_elsewhere(
    place: str, tmp_path: Path
) -> None:
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    from dataflex.integrations import GradientStoreCallback
    from gradstore.export.token_rows import read_rows

    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    found = json.loads((TINY / "data" / "train.json").read_text())[:16]
    texts = [{"prompt": f"{r['instruction']} {r['input']}\n", "response": r["output"]}
             for r in found]  # fmt: skip
    stored = []
    for number, store in enumerate((tmp_path / "folder", place)):
        torch.manual_seed(3)
        lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(TINY / "model"), lora)
        set_seed(1)
        sets = [Dataset.from_list(read_rows(name, rows, tokenizer).items)
                for name, rows in (("train", texts[:12]), ("target", texts[12:]))]  # fmt: skip
        arguments = TrainingArguments(
            output_dir=str(tmp_path / f"run{number}"), max_steps=3, learning_rate=1e-2,
            per_device_train_batch_size=2, report_to="none", save_strategy="no", use_cpu=True,
            disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=sets[0], eval_dataset=sets[1],
                          data_collator=DataCollatorForSeq2Seq(tokenizer),
                          processing_class=tokenizer)  # fmt: skip
        trainer.add_callback(GradientStoreCallback(trainer, store, proj_dim=64, steps=(2,)))
        trainer.train()
        stored.append({
            each.name: tuple(each.raw(unit).tobytes() for unit in range(len(each.units)))
            for each in open_store(store).generations()
        })  # fmt: skip
    assert stored[0] == stored[1]
    assert len(stored[0]) == 4, "of two steps, training and target rows"
    assert verify_store(place).ok
