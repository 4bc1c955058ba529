"""LlamaBoard starts `llamafactory-cli` by name; while our page is open, that name leads here."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from dataflex.launch import webui
from gradstore.errors import StoreIOError


def test_the_name_is_ours_while_the_page_is_open_and_for_its_processes_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = os.environ["PATH"]
    seen = []

    def page(arguments: list[str]) -> None:
        found = shutil.which("llamafactory-cli")
        assert found is not None
        seen.append(Path(found))
        assert arguments == ["webui"]
        assert stat.S_IMODE(Path(found).parent.stat().st_mode) == 0o700
        assert os.environ["PATH"] == f"{Path(found).parent}{os.pathsep}{before}"

    monkeypatch.setattr(webui, "passthrough", page)
    webui.open_page()
    assert os.environ["PATH"] == before
    assert not seen[0].parent.exists()


def test_a_page_that_fails_leaves_the_path_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.environ["PATH"]

    def page(_: list[str]) -> None:
        raise RuntimeError("no port")

    monkeypatch.setattr(webui, "passthrough", page)
    with pytest.raises(RuntimeError, match="no port"):
        webui.open_page()
    assert os.environ["PATH"] == before


def test_a_folder_where_nothing_runs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webui.shutil, "which", lambda _: "/usr/bin/llamafactory-cli")  # noexec
    monkeypatch.setattr(webui, "passthrough", lambda _: pytest.fail("the page was opened"))
    with pytest.raises(StoreIOError, match="Set TMPDIR to a folder that is not mounted noexec"):
        webui.open_page()


@pytest.mark.parametrize(
    ("content", "ours"),
    [
        ("stage: sft\ntrain_type: dynamic_select\n", True),
        ("stage: sft\ncomponent_params: {proj_dim: 64}\n", True),
        ("stage: sft\nwarmup_steps: 3\n", False),
        ("- train_type\n", False),
    ],
)
def test_a_key_of_dataflex_is_what_counts(
    content: str, ours: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LlamaFactory's own `warmup_steps` is not our `warmup_step`."""
    file = tmp_path / "training_args.yaml"
    file.write_text(content)
    went: list[list[str]] = []
    monkeypatch.setattr(webui, "passthrough", lambda words: went.append(["theirs", *words]))
    monkeypatch.setattr(webui.os, "execv", lambda _, words: went.append(["ours", *words]))
    webui.main(["train", str(file)])
    assert went[0][0] == ("ours" if ours else "theirs")
    assert str(file) in went[0]


def test_every_other_command_stays_llamafactorys(monkeypatch: pytest.MonkeyPatch) -> None:
    went: list[list[str]] = []
    monkeypatch.setattr(webui, "passthrough", lambda words: went.append(list(words)))
    webui.main(["version"])
    assert went == [["version"]]


def test_the_name_hands_its_arguments_and_exit_code_on(tmp_path: Path) -> None:
    """As the page starts it: by name, in another folder, which has a `dataflex` of its own."""
    (tmp_path / "dataflex").mkdir()
    (tmp_path / "dataflex" / "__init__.py").write_text("raise SystemExit('not this one')\n")
    file = tmp_path / "with a space.yaml"
    file.write_text("train_type: dynamic_selekt\nstage: sft\n")
    with webui.own_command():
        found = subprocess.run(["llamafactory-cli", "train", str(file)], cwd=tmp_path, text=True,
                               capture_output=True)  # fmt: skip
    assert found.returncode == 2
    assert "dynamic_selekt" in found.stderr
