"""The command line without a run: help, version, components, wrong words."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dataflex import cli
from dataflex.bridge import arguments
from dataflex.config.keys import DataFlexConfig


@pytest.fixture(autouse=True)
def process_as_it_was() -> Iterator[None]:
    """A command sets up its process; this one goes on with other tests."""
    loggers = [logging.getLogger(name) for name in ("dataflex", "gradstore", "gradkernels")]
    environment, hook = dict(os.environ), sys.excepthook
    held = [(each.handlers[:], each.level, each.propagate) for each in loggers]
    yield
    os.environ.clear()
    os.environ.update(environment)
    sys.excepthook = hook
    for logger, (handlers, level, propagate) in zip(loggers, held, strict=True):
        logger.handlers, logger.level, logger.propagate = handlers, level, propagate


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
    for command in ("train", "gradstore", "components", "version", "webui", *cli.PASSED_THROUGH):
        assert f" {command} " in out
    code, out, _ = call(capsys, monkeypatch, "gradstore", "--help")
    assert code == 0
    for command in ("build", "info", "verify", "score", "select", "query"):
        assert f" {command} " in out


#: Runs command lines one after the other; prints the heavy modules that are loaded at the end.
CALLED = """
import sys
from dataflex.cli import main
for line in sys.argv[1:]:
    sys.argv = ["dataflex-cli", *line.split()]
    try: main()
    except SystemExit as end: print("exit:", end.code)
heavy = {"torch", "transformers", "llamafactory", "zarr", "numba", "faiss", "pyarrow", "datasets"}
print("loaded:", sorted(heavy & set(sys.modules)))
"""


#: Which shell this is, is not asked of the parent processes.
UNASKED = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}


def called(*lines: str) -> subprocess.CompletedProcess[str]:
    """What command lines say in a process of their own, as `CALLED` runs them."""
    return subprocess.run([sys.executable, "-c", CALLED, *lines], capture_output=True, text=True,
                          check=True, env={**os.environ, "COLUMNS": "80", **UNASKED})  # fmt: skip


def test_help_imports_nothing_heavy() -> None:
    """Help answers in under a second because these stay out."""
    told = called("--help", "-h", "--version", "version", "--show-completion bash", "train --help",
                  "gradstore --help", "gradstore score -h", "components -h")  # fmt: skip
    assert told.stdout.rstrip().endswith("loaded: []")
    assert told.stdout.count("exit: 0") == 9, told.stdout[-2000:]


def test_the_help_of_train_lists_every_key_in_80_columns() -> None:
    told = called("train --help").stdout
    listed = told.partition("Keys of CONFIG")[2].partition("exit:")[0].splitlines()
    keys = [line.split()[0] for line in listed if line.startswith("  ")]
    own = {field.name for field in dataclasses.fields(DataFlexConfig)}
    assert len(keys) == len(set(keys))
    assert set(keys) == own | arguments.accepted_keys()
    assert max(map(len, listed)) <= 80
    assert not [line for line in listed if line.startswith("  ") and len(line.split()) < 2]
    titles = [line for line in listed if line and not line.startswith(" ")]
    assert titles[:2] == ["DataFlex:", "LlamaFactory: DataArguments:"]
    assert "Transformers: TrainingArguments:" in titles


def test_a_wrong_name_is_told_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text("output_dir: a\ntrain_type: dynamic_select\ncomponent_name: less\n")
    (tmp_path / "own.yaml").write_text("output_dir: a\nwarmup_stepp: 3\n")
    (tmp_path / "theirs.yaml").write_text("output_dir: a\nlerning_rate: 3\n")
    (tmp_path / "syntax.yaml").write_text("output_dir: [\n")
    (tmp_path / "value.yaml").write_text("output_dir: a\nwarmup_step: many\n")
    (tmp_path / "type.yaml").write_text("output_dir: a\ntrain_type: dynamic_selekt\n")
    words = {
        f"{tmp_path}/none.yaml": "does not exist",
        f"{tmp_path}/syntax.yaml": "syntax.yaml",
        f"{tmp_path}/own.yaml": "did you mean 'warmup_step', 'warmup_steps' or 'warmup_ratio'?",
        f"{tmp_path}/theirs.yaml": "'lerning_rate' (did you mean 'learning_rate' or ",
        f"{tmp_path}/value.yaml": "warmup_step is 'many'; expected a whole number",
        f"{tmp_path}/type.yaml": "did you mean 'dynamic_select'",
        f"{run} component_name=les": "did you mean 'less'?). Accepted: ",
        f"{run} component_name=''": "component_name is ''; expected a preset's or strategy's name",
        f"{run} component_params.proj_dmi=3": "did you mean 'proj_dim'?). Accepted: ",
    }
    lines = [f"{command} {line}" for line in words for command in ("train", "gradstore build")]
    told = called(*lines)
    assert told.stdout.rstrip().endswith("loaded: []")
    assert told.stdout.count("exit: 2") == len(lines)
    for says in words.values():
        assert told.stderr.count(says) == 2, (says, told.stderr)
    assert told.stderr.count("`dataflex-cli train --help` lists every key.") == 4
    assert max(map(len, told.stderr.splitlines())) < 500


def test_a_wrong_input_is_told_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    """A name of a data set, a count, a model's folder: what files and values alone can tell."""
    rows = json.dumps([{"instruction": "a", "input": "", "output": "b"}])
    for name in ("alpaca", "arithmetic", "colours"):
        (tmp_path / f"{name}.json").write_text(rows)
    info = {name: {"file_name": f"{name}.json"} for name in ("alpaca", "arithmetic", "colours")}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    run = tmp_path / "run.yaml"
    model = Path(__file__).resolve().parents[2] / "examples" / "tiny" / "model"
    run.write_text(
        f"output_dir: {tmp_path}/out\ntrain_type: dynamic_select\ncomponent_name: less\n"
        f"model_name_or_path: {model}\ndataset_dir: {tmp_path}\ndataset: alpaca\n"
        "target_dataset: colours\ndo_train: true\n"
    )
    words = {
        "dataset=alpca": "dataset: unknown data set: 'alpca' (did you mean 'alpaca'?). Accepted: "
        "alpaca, arithmetic, colours",
        "target_dataset=coulours": "target_dataset: unknown data set: 'coulours' (did you mean "
        "'colours'?)",
        "eval_dataset=arithmetik": "(did you mean 'arithmetic'?)",
        "max_samples=0": "max_samples is 0, which leaves no row",
        "max_samples=many": "max_samples is 'many'; expected a whole number",
        "mix_strategy=concatt": "mix_strategy is 'concatt'; choose concat, ",
        f"dataset_dir={tmp_path}/nowhere": "does not exist: dataset_dir must hold",
        f"model_name_or_path={tmp_path}/none": "is not a folder on this machine",
        f"output_dir={run}/x": "is a file. Choose another.",
    }
    commands = [f"{name} {run} {word}" for word in words for name in ("train", "gradstore build")]
    told = called(*commands)
    assert told.stdout.rstrip().endswith("loaded: []"), told.stdout
    assert told.stdout.count("exit: 2") == len(commands) - 2, told.stdout
    assert told.stdout.count("exit: 5") == 2
    for says in words.values():
        assert told.stderr.count(says) == 2, (says, told.stderr)


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


@pytest.mark.parametrize("worker", ["0/4", "5/4", "x", "2"])
def test_a_wrong_worker_is_refused_before_anything_is_read(
    worker: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("gradstore", "build", "nowhere.yaml", "--worker", worker)
    code, _, err = call(capsys, monkeypatch, *command)
    assert code == 2
    assert err == (
        f"error: worker is {worker!r}; give i/N, this worker's number and how many there are, such "
        "as 1/4, 2/4, 3/4 and 4/4\n"
    )


def test_help_names_debug(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = call(capsys, monkeypatch, "--help")
    assert code == 0
    assert "--debug" in out


@pytest.mark.parametrize(
    ("argv", "named"),
    [(["train", "~/run.yaml"], "run.yaml"), (["gradstore", "build", "~/run.yaml"], "run.yaml"),
     (["gradstore", "info", "~/store"], "store"), (["gradstore", "verify", "~/store"], "store"),
     (["gradstore", "score", "~/store", "-o", "~/a.txt"], "a.txt"),
     (["gradstore", "score", "~/store", "--output=~/a.txt"], "a.txt"),
     (["gradstore", "select", "~/store", "-k", "1", "-o", "~/a.txt"], "a.txt"),
     (["gradstore", "query", "~/store", "--target-row", "0"], "store")],
)  # fmt: skip
def test_a_path_on_the_command_line_may_begin_in_the_home_folder(
    argv: list[str],
    named: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    code, _, err = call(capsys, monkeypatch, *argv)
    assert code == 2
    assert str(tmp_path / named) in err


@pytest.mark.parametrize("command", ["score", "select"])
def test_score_and_select_take_the_same_question(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = call(capsys, monkeypatch, "gradstore", command, "--help")
    assert code == 0
    for option in ("STORE", "--checkpoints", "--run", "--target", "--subtasks", "--aggregation"):
        assert option in out
    assert "--output" in out
