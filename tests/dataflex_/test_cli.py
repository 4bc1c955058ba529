"""The command line without a run: help, version, components, wrong words."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from dataflex import cli


def call(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *argv: str
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `dataflex-cli argv`."""
    monkeypatch.setattr(sys, "argv", ["dataflex-cli", *argv])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr()
    return int(end.value.code or 0), said.out, said.err


def test_help_lists_every_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = call(capsys, monkeypatch, "--help")
    assert code == 0
    for command in ("train", "gradstore", "components", "version", *cli.PASSED_THROUGH):
        assert f" {command} " in out
    code, out, _ = call(capsys, monkeypatch, "gradstore", "--help")
    assert code == 0
    for command in ("build", "info", "verify", "score", "select", "query"):
        assert f" {command} " in out


def test_help_imports_nothing_heavy() -> None:
    """Help answers in under a second because these stay out."""
    script = (
        "import sys; sys.argv = ['dataflex-cli', '--help']\n"
        "from dataflex.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'llamafactory', 'zarr', 'numba', 'faiss', 'pyarrow'}\n"
        "print('loaded:', sorted(heavy & set(sys.modules)))"
    )
    told = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert told.stdout.rstrip().endswith("loaded: []")


@pytest.mark.parametrize("word", ["version", "--version"])
def test_version_names_the_distribution(
    word: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = call(capsys, monkeypatch, word)
    assert (code, out.split()[0]) == (0, "dataflex-gradstore")


@pytest.mark.parametrize("words", [("-h",), ("train", "-h"), ("gradstore", "score", "-h"), ()])
def test_help_is_short_too_and_is_what_no_word_gets(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out, err = call(capsys, monkeypatch, *words)
    assert "Usage:" in out + err


def test_components_lists_every_strategy_with_its_parameters(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = call(capsys, monkeypatch, "components", "--json")
    assert code == 0
    entries = {(entry["kind"], entry["name"]): entry for entry in json.loads(out)}
    less = entries["selector", "less"]
    assert less["parameters"]["gradient_type"] == "adam_marginal"
    assert less["describes"]["proj_dim"] == "projected dimensions d."
    assert all(set(e["describes"]) >= set(e["parameters"]) for e in entries.values())
    assert "arXiv:2402.04333" in less["paper"]
    assert less["presets"] == ["less"]
    assert {("selector", "loss"), ("selector", "random"), ("selector", "custom")} <= set(entries)
    summaries = [entry["summary"] for entry in entries.values()]
    assert all(summaries)
    assert not [s for s in summaries if "ALGORITHMS" in s or "(" in s]
    code, out, _ = call(capsys, monkeypatch, "components")
    assert code == 0
    assert "proj_dim" in out


@pytest.mark.parametrize(
    ("argv", "word"),
    [(["frobnicate"], "frobnicate"), (["train"], "CONFIG"), (["train", "x", "--dbug"], "--dbug"),
     (["gradstore", "scor"], "scor"), (["gradstore", "select", "x", "-k", "many"], "'-k'")],
)  # fmt: skip
def test_wrong_words_exit_2(
    argv: list[str],
    word: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code, _, err = call(capsys, monkeypatch, *argv)
    assert code == 2
    assert word in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "nowhere.yaml"],
        ["gradstore", "build", "nowhere.yaml"],
        ["gradstore", "info", "nowhere"],
        ["gradstore", "verify", "nowhere"],
        ["gradstore", "score", "nowhere"],
        ["gradstore", "select", "nowhere", "-k", "1", "-o", "selected.jsonl"],
        ["gradstore", "query", "nowhere", "--target-row", "0"],
    ],
)
def test_every_command_takes_debug_and_keeps_its_code_and_message(
    argv: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = call(capsys, monkeypatch, *argv)
    assert code == 2
    assert "Traceback" not in err
    for place in (0, len(argv)):
        words = [*argv[:place], "--debug", *argv[place:]]
        told = call(capsys, monkeypatch, *words)
        assert told[0] == code
        assert "Traceback" in told[2]
        assert told[2].endswith(err)


def test_help_names_debug(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = call(capsys, monkeypatch, "--help")
    assert code == 0
    assert "--debug" in out


@pytest.mark.parametrize("command", ["score", "select"])
def test_score_and_select_take_the_same_question(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = call(capsys, monkeypatch, "gradstore", command, "--help")
    assert code == 0
    for option in ("STORE", "--checkpoints", "--run", "--target", "--subtasks", "--aggregation"):
        assert option in out
    assert "--output" in out
