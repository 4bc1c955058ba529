"""Records of a run: what a kill or damage has left of a line is passed over."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dataflex.mixers.doremi import EACH_STEP, forget_after
from dataflex.run.log import RunLog, read_events

DAMAGED = ["[]", "{}", "3", '{"event": "mix"}', '{"event": 4, "step": 2}',
           '{"event": "mix", "step": null}', "[" * 50_000, '{"event": "mi']  # fmt: skip


def test_damaged_lines_of_events_are_passed_over(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for step in (2, 4):
        log.update("mix", step=step, component="odm", summary="x")
        with (log.folder / "events.jsonl").open("a") as file:
            file.write("\n".join(DAMAGED) + "\n")
    assert [event["step"] for event in read_events(log.folder)] == [2, 4]


def test_damaged_lines_of_doremis_record_go_with_the_steps_of_no_checkpoint(tmp_path: Path) -> None:
    good = [json.dumps({"step": step}) for step in (1, 2, 3)]
    (tmp_path / EACH_STEP).write_text("\n".join([*good[:2], *DAMAGED[:4], good[2], "{"]))
    forget_after(tmp_path, last_step=2)
    assert (tmp_path / EACH_STEP).read_text().splitlines() == good[:2]


def test_rows_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.rows("step_4", [{"row": 1}])

    def lines(error: BaseException) -> Iterator[dict[str, Any]]:
        yield {"row": 2}
        raise error

    for error in (ValueError("a row's text"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            log.rows("step_4", lines(error))
    (path,) = (log.folder / "selections").iterdir()
    assert path.read_text() == '{"row": 1}\n'
