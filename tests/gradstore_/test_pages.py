"""Python on the page of offline analysis runs as it stands, from its top to its end."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from gradstore.format.text_table import Text

PAGE = Path(__file__).resolve().parents[2] / "docs" / "guide" / "offline.md"


def test_the_python_of_the_offline_page_runs_from_its_top(
    kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with kit.writer(Path("runs/less/gradstore")) as writer:
        writer.keep_texts(kit.rows(100), [Text(f"question {i}", f"{i}", 3) for i in range(100)])
        kit.add(writer, "train/30", 100)
        kit.add(writer, "target/tiny_target/30", 9)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.M | re.S)
    assert len(blocks) == 3
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert len(names["found"]) == 7
    assert names["scores"].usable.sum() == 94
