"""The table of an audit on the terminal, whatever the rows hold."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from typer.testing import CliRunner

from gradstore.cli import app
from gradstore.format.text_table import Text

N = 24
HOSTILE = ("<script>alert(1)</script>", "\x1b[2J\x07\x00\u202eleft [bold]x[/]", "\ud800 half",
           "word " * 210_000)  # fmt: skip


def test_hostile_text_is_printed_as_text_and_kept_whole_in_the_file(
    kit: Any, tmp_path: Path
) -> None:
    with kit.writer(tmp_path / "s") as writer:
        for name in ("train/1", "target/one/1"):
            generation = writer.begin(kit.record(name), kit.rows(N), dim=4)
            kit.fill(generation, kit.features(N))
            generation.commit()
        texts = [Text(HOSTILE[i % 4], f"{i} {HOSTILE[i % 4]}", 3) for i in range(N)]
        writer.keep_texts(kit.rows(N), texts)
    output = tmp_path / "audit.parquet"
    found = CliRunner().invoke(app, ["audit", str(tmp_path / "s"), "-o", str(output)])
    assert found.exit_code == 0, found.output
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e\ud800-\udfff]", found.stdout)
    assert len(found.stdout) < 100_000
    assert "<script>" in found.stdout
    assert "[bold]" in found.stdout
    assert pq.read_metadata(output).num_rows == N
