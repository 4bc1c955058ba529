"""The embedded default (examples/tiny): what is committed is what the script makes."""

from __future__ import annotations

import json
import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny"
SKILLS = {"reverse", "sort", "add", "date", "convert", "vowels", "spell", "upper"}


def _rows(name: str) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = json.loads((TINY / "data" / f"{name}.json").read_text())
    return rows


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY / "model")


def test_committed_data_and_tokenizer_are_the_bytes_the_script_makes(tmp_path: Path) -> None:
    script = runpy.run_path(str(TINY / "make.py"))
    script["write_data"](tmp_path / "data")
    script["write_tokenizer"](tmp_path / "model")
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert len(made) == 2 + 4 + 2 + len(SKILLS) + len(SKILLS | {"noise"})
    for path in made:
        if path.name != "tokenizer_config.json":  # carries what the library's version adds
            assert (TINY / path).read_bytes() == (tmp_path / path).read_bytes(), path


@pytest.mark.parametrize("name", ["moe", "vision"])
def test_committed_models_and_pictures_are_what_their_scripts_make(
    name: str, tmp_path: Path
) -> None:
    """Weights to float16's last bits, which a CPU may round otherwise; pictures by their pixels."""
    runpy.run_path(str(TINY / f"make_{name}.py"))["main"](tmp_path)
    made = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    kept = {path.relative_to(TINY / name) for path in (TINY / name).rglob("*") if path.is_file()}
    assert made == kept
    for path in made:
        ours, theirs = TINY / name / path, tmp_path / path
        if path.suffix == ".safetensors":
            one, other = load_file(ours), load_file(theirs)
            assert one.keys() == other.keys()
            for key, weight in one.items():
                assert weight.dtype == torch.float16
                torch.testing.assert_close(weight, other[key], rtol=2e-3, atol=1e-6, msg=key)
        elif path.suffix == ".png":
            assert Image.open(ours).tobytes() == Image.open(theirs).tobytes(), path
        elif path.name in {"config.json", "vision.json", "dataset_info.json"}:
            assert json.loads(ours.read_text()) == json.loads(theirs.read_text()), path


def test_the_two_further_models_and_their_data_are_under_1_mb() -> None:
    files = [path for name in ("moe", "vision") for path in (TINY / name).rglob("*.*")]
    assert sum(path.stat().st_size for path in files) < 1e6


def test_everything_together_is_under_6_mb() -> None:
    files = [path for path in TINY.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 6e6


def test_train_holds_eight_skills_and_a_fifth_of_noise() -> None:
    counts = Counter(row["skill"] for row in _rows("train"))
    assert counts == {skill: 160 for skill in SKILLS} | {"noise": 320}


def test_targets_are_of_one_skill_and_share_no_question_with_train_or_each_other() -> None:
    names = ["train", "target_heldout", *(f"targets/{skill}" for skill in sorted(SKILLS))]
    questions = [row["input"] for name in names for row in _rows(name)]
    assert len(questions) == len(set(questions)) == 1600 + 64 + 8 * 32
    assert {row["skill"] for row in _rows("target") + _rows("target_heldout")} == {"date"}
    for skill in SKILLS:
        assert {row["skill"] for row in _rows(f"targets/{skill}")} == {skill}


def test_domains_share_out_the_rows_of_train_by_skill() -> None:
    train = _rows("train")
    for skill in SKILLS | {"noise"}:
        assert _rows(f"domains/{skill}") == [row for row in train if row["skill"] == skill]


def test_scored_rows_are_rows_of_train_with_the_letters_of_their_answers() -> None:
    scored: list[dict[str, Any]] = json.loads((TINY / "data" / "scored.json").read_text())
    train = [row for row in _rows("train") if row["skill"] != "noise"]
    difficulties = [row.pop("difficulty") for row in scored]
    assert scored == train[:480]
    assert difficulties == [len(row["output"]) for row in scored]
    lines = (TINY / "data" / "difficulty.jsonl").read_text().splitlines()
    assert list(map(int, lines)) == difficulties


def test_dataset_info_names_every_file() -> None:
    info = json.loads((TINY / "data" / "dataset_info.json").read_text())
    named = {entry["file_name"] for entry in info.values()}
    files = {str(path.relative_to(TINY / "data")) for path in (TINY / "data").rglob("*.json")}
    assert named == files - {"dataset_info.json"}


def test_tokenizer_gives_back_every_question_and_answer(tokenizer: Any) -> None:
    assert len(tokenizer) == 512
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == (
        "<pad>",
        "<s>",
        "</s>",
    )
    for row in _rows("train")[::7]:
        text = f"Human: {row['instruction']}\n{row['input']}\nAssistant:{row['output']}"
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_rows_are_short_with_the_default_template(tokenizer: Any) -> None:
    lengths = []
    for row in _rows("train"):
        prompt = f"Human: {row['instruction']}\n{row['input']}\nAssistant:"
        lengths.append(len(tokenizer(prompt + row["output"]).input_ids) + 3)
    assert sum(lengths) / len(lengths) <= 40
    assert max(lengths) <= 64


def test_model_is_a_small_llama_that_loads_as_float32() -> None:
    config = json.loads((TINY / "model" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"
    with safe_open(TINY / "model" / "model.safetensors", "pt") as weights:
        numel = sum(weights.get_tensor(name).numel() for name in weights.keys())
    assert 1e6 <= numel <= 3e6
