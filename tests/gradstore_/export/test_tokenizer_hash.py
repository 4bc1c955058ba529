"""One tokenizer has one hash, wherever it was loaded and whatever it was asked before."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import AutoTokenizer

from gradstore.export.gradient_space import tokenizer_hash

MODEL = Path(__file__).resolve().parents[3] / "examples" / "tiny" / "model"


def test_what_it_was_last_called_with_does_not_count() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    fresh = tokenizer_hash(tokenizer)
    tokenizer(["one", "and another"], truncation=True, max_length=4, padding=True)
    assert tokenizer_hash(tokenizer) == fresh
    assert tokenizer.backend_tokenizer.truncation, "and the caller's own is left alone"


def test_where_it_was_loaded_from_does_not_count(tmp_path: Path) -> None:
    fresh = tokenizer_hash(AutoTokenizer.from_pretrained(MODEL, local_files_only=False))
    assert tokenizer_hash(AutoTokenizer.from_pretrained(MODEL, local_files_only=True)) == fresh
    shutil.copytree(MODEL, tmp_path / "copied")
    copied = AutoTokenizer.from_pretrained(tmp_path / "copied")
    assert tokenizer_hash(copied) == fresh
    copied.init_kwargs["is_local"] = False  # as of a model's name on a hub
    assert tokenizer_hash(copied) == fresh


def test_what_it_makes_of_a_text_counts() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    fresh = tokenizer_hash(tokenizer)
    tokenizer.chat_template = "{{ messages }}"
    templated = tokenizer_hash(tokenizer)
    tokenizer.add_tokens(["dataflex"])
    assert len({fresh, templated, tokenizer_hash(tokenizer)}) == 3
