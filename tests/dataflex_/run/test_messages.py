"""A failure is one message; a bug of ours stays a traceback."""

from __future__ import annotations

import errno
import functools
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm.auto import tqdm

from dataflex.data.rows import check_intervals
from dataflex.launch import worker as launched
from dataflex.run.messages import DEBUG, end_bars, explain
from dataflex.run.ranks import Ranks

OWN = """class Mine:
    def select(self, context):
        return len(context)
"""


def raised(call: Any) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever it is
        call()
    return caught.value


def test_an_error_in_a_users_class_names_class_file_and_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_selector.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    mine = importlib.import_module("own_selector").Mine()
    error = raised(lambda: Ranks(0, 1).gather(lambda: mine.select(3)))
    failure = explain(error)
    assert failure is not None
    assert failure.code == 2
    assert f"Mine.select ({tmp_path / 'own_selector.py'}, line 3): TypeError" in failure.message
    assert "--debug" in failure.message
    del sys.modules["own_selector"]


def test_a_bug_of_ours_has_no_message() -> None:
    broken: Any = None
    assert explain(raised(lambda: check_intervals(broken, 1, 1, 1))) is None


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 3 GiB"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        ImportError("libtorch.so: failed to map segment from shared object"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_memory_that_does_not_suffice_is_one_message(error: Exception) -> None:
    """As `ulimit -v` makes them: when a library is loaded, an array or a tensor made."""
    failure = explain(error)
    assert failure is not None
    assert failure.code == 5
    assert f"not enough memory ({error})" in failure.message
    assert "ulimit -v" in failure.message


@pytest.mark.parametrize(
    ("error", "code", "next_step"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.json"), 2, "Correct the"),
        (OSError(errno.ENOSPC, "No space left on device", "a.json"), 5, "Make room there"),
        (PermissionError(errno.EACCES, "Permission denied", "a.json"), 5, "Choose a place"),
        (OSError(errno.EIO, "Input/output error"), 5, "Run again with --debug"),
    ],
)
def test_a_failure_of_the_system_names_the_file_and_the_next_step(
    error: OSError, code: int, next_step: str
) -> None:
    failure = explain(error)
    assert failure is not None
    where = " (a.json)" if error.filename else ""
    assert failure.code == code
    assert failure.message.startswith(f"{error.strerror}{where}. {next_step}")


def test_a_worker_shows_its_traceback_with_debug_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(launched.FAILURES, str(tmp_path))
    assert launched.worker([str(tmp_path / "no.yaml")]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert json.loads((tmp_path / "0.json").read_text())["code"] == 2
    monkeypatch.setenv(DEBUG, "1")
    assert launched.worker([str(tmp_path / "no.yaml")]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_error_in_a_library_installed_from_its_developers_folder_is_no_users_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "own_selector.py").write_text(OWN)
    spec = importlib.util.spec_from_file_location(
        "peft.own_selector", tmp_path / "peft" / "own_selector.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    select = functools.partial(module.Mine().select, 3)
    assert explain(raised(functools.partial(Ranks(0, 1).gather, select))) is None


def test_a_failures_message_does_not_stick_to_an_open_bar(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with tqdm(total=3, file=sys.stderr) as bar:
        bar.update(1)
        end_bars()
        sys.stderr.write("error: x\n")
    assert "\nerror: x" in capsys.readouterr().err
