"""Reports: every part of a run's records is on one sound page, whatever the data hold."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataflex.report import page as module
from dataflex.report.page import draw
from dataflex.run.log import RunLog
from dataflex.run.spread import spread_of

N = 40

VOID = {"meta", "link", "br", "hr", "img", "input"}

#: SVG's empty elements, which are closed where they open.
CLOSED = {"rect", "line", "circle", "polyline"}


class Page(HTMLParser):
    """Elements of a page; `faults` are tags without their other half, and twice used ids."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.faults: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        self.faults += [f"<{tag}> is left open" for tag in self._open]
        ids = [attributes["id"] for _, attributes in self.found if "id" in attributes]
        self.faults += [f"id {name!r} twice" for name in set(ids) if ids.count(name) > 1]
        self.faults += [f"no {href!r}" for href in self.all("a", "href")
                        if not href.startswith("#") or href[1:] not in ids]  # fmt: skip
        labels = self.all(None, "aria-labelledby")
        self.faults += [f"no label {name!r}" for name in labels if name not in ids]

    def all(self, tag: str | None, attribute: str) -> list[str]:
        """Values of an attribute, of one kind of element or of all."""
        return [str(attributes[attribute]) for name, attributes in self.found
                if tag in (None, name) and attribute in attributes]  # fmt: skip

    def count(self, tag: str) -> int:
        """Number of elements."""
        return sum(name == tag for name, _ in self.found)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        names = [name for name, _ in attrs]
        if len(set(names)) < len(names):
            self.faults.append(f"<{tag}> has an attribute twice")
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        if tag not in CLOSED:
            self.faults.append(f"<{tag}/> is not empty")
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.faults.append(f"</{tag}> closes nothing")

    def handle_data(self, data: str) -> None:
        self.text.append(data)


Show = Callable[[], Page]


@pytest.fixture
def show(tmp_path: Path) -> Show:
    """Draw the report of `tmp_path`; read it strictly."""

    def read() -> Page:
        path = draw(tmp_path / "dataflex")
        assert path == tmp_path / "dataflex" / "report.html"
        return checked(path.read_text(encoding="utf-8"))

    return read


def checked(text: str) -> Page:
    found = Page(text)
    assert found.faults == []
    for tag in ("script", "link", "img", "iframe", "form", "object"):
        assert found.count(tag) == 0, f"<{tag}> could ask for something"
    assert not re.search(r"https?://|//[a-z]|url\(|@import", text), "no address but its anchors"
    assert "default-src 'none'" in text
    assert found.count("h1") == found.count("main") == 1
    assert found.count("svg") == len(found.all("svg", "aria-label")), "each chart is told in words"
    assert found.count("svg") == found.count("details"), "each chart has its numbers"
    assert found.count("table") == found.count("caption")
    assert not re.search(r"<div [^>]*>\s*</div>", text), "it parts a heading from its rows"
    return found


def said(found: Page) -> str:
    return " ".join(" ".join(found.text).split())


def select(log: RunLog, step: int, rows: list[int], **more: Any) -> None:
    """What a selection of `rows` from N rows, scored 0 to 3.9, writes."""
    scores = np.arange(N) / 10
    chosen = np.array(rows)
    manifest = {"all_scores": spread_of(scores, np.ones(N, dtype=bool), chosen)}
    kinds = {"column": "skill", "chosen": {"date": len(rows)}, "all": {"add": 30, "date": 10}}
    log.selection(step, chosen, scores[chosen], {**manifest, "kinds": kinds})
    log.rows(f"step_{step}", [line(row, scores[row], **more) for row in rows])
    log.rows(f"lowest_{step}", [line(row, scores[row], **more) for row in range(3)])
    log.update("select", step, "less", "", train_rows=N, pause_seconds=1.5, export_seconds=1.25,
               tokens=1000, skipped={"no_target": 2}, chosen={"mine": len(rows) - 1, "yours": 1},
               train_sets={"mine": 30, "yours": 10}, won={"t1": len(rows), "t2": 0})  # fmt: skip


def line(row: int, score: float, **more: Any) -> dict[str, Any]:
    return {"rank": 1, "row": row, "score": score, "source": ["mine", row],
            "prompt": f"prompt {row}", "response": f"response {row}", **more}  # fmt: skip


def trained(folder: Path) -> None:
    history: list[dict[str, Any]] = [{"step": s, "loss": 2 / s} for s in range(2, 13, 2)]
    history += [{"step": s, "eval_held_loss": 1.5} for s in (6, 12)]
    (folder / "trainer_state.json").write_text(
        json.dumps({"global_step": 12, "log_history": history})
    )


def test_a_selections_report_has_every_section(show: Show, tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.receipt.begin("a", {"seed": 7, "hf_hub_token": "hf_abcdef"},
                      {"train_sha256": "abc", "dropped": {"empty": 4}}, 0)  # fmt: skip
    select(log, 4, [39, 38, 37, 36])
    select(log, 8, [39, 38, 5, 4])
    log.receipt.end("finished", ["all 4 chosen rows are copies"])
    trained(tmp_path)
    found = show()
    text = said(found)
    assert "Rows selected by less" in text
    assert f"Run {tmp_path.parent.name}/{tmp_path.name}, finished" in text
    assert found.all("section", "aria-labelledby") == [
        "warnings", "chosen", "scores", "rows", "overlap", "losses", "skipped", "cost", "receipt"
    ]  # fmt: skip
    for part in (
        "all 4 chosen rows are copies",
        "6 of 40 training rows (15%) were chosen at least once.",
        "mine is 75% of step 8; of all rows it is 75%.", "date is 100% of step 8; of all rows it "
        "is 25%.", "t1 4, t2 0",
        "40 usable rows with scores from 0 to 3.9; 4 chosen, all those from 3.6 upwards.",
        "40 usable rows with scores from 0 to 3.9; 4 chosen. ", "cut 3.6",
        "The rows with the largest scores were chosen, down to the cut. Without a cut, rows",
        "Step 8: highest scores of chosen rows", "prompt 39", "response 5",
        "Step 8: lowest scores of usable rows score", "prompt 2",
        "50% to 50% of the rows had been chosen before", "Drawn at random it would be 10%.",
        "The loss of training goes from 1 at step 2 to 0.1667 at step 12; "
        "the loss of evaluation held goes from 1.5 at step 6 to 1.5 at step 12.",
        "empty 4 while the data were read", "no_target 2 at step 4, 8",
        "2 updates took 3.0 s in all.", "Their passes read 2,000 tokens.",
        "train_sha256 abc", "seed 7", "hf_hub_token ***", "torch",
    ):  # fmt: skip
        assert part in text, part
    assert "hf_abcdef" not in text


def test_a_cost_is_a_share_of_the_time_that_the_sessions_took(show: Show, tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.receipt.begin("a", {}, {}, 0)
    select(log, 4, [1, 2])
    assert "one of its sessions was killed" in said(show())
    log.receipt._began = time.monotonic() - 15
    log.receipt.end("interrupted", [])
    text = said(show())
    assert "That is 10% of the 15.0 s of the run." in text
    assert "interrupted" in text


def test_a_mixture_weights_and_stages_are_shown_over_the_steps(show: Show, tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for step, part in ((0, 0.5), (4, 0.25)):
        log.update("mix", step, "doremi", "", proportions={"a": part, "b": 1 - part},
                   weights={"a": part, "b": 1 - part}, kept={"one": 10 + step})  # fmt: skip
    log.update("weight", 6, "doremi", "", weight_min=0.5, weight_mean=1.0, weight_max=2.0)
    text = said(show())
    assert "Domains mixed by doremi (one)" in text
    assert "b is 75% of step 4; of step 0 it is 50%." in text
    assert "a goes from 0.5 at step 0 to 0.25 at step 4" in text
    assert "one goes from 10 at step 0 to 14 at step 4." in text
    assert "The largest is 2 at step 6; the mean is 1 at step 6" in text


EVIL = "</td><script>alert(1)</script>&amp;\x00\x1b[2J\u202e\ud800'\"http://x.y"


def test_text_of_rows_names_and_messages_is_only_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Addresses that data hold are text, too; `checked` would take them for the page's."""
    log = RunLog(tmp_path)
    log.receipt.begin("a", {EVIL: EVIL}, {EVIL: [EVIL]}, 0)
    select(log, 4, [3, 1], prompt=EVIL, response=EVIL, source=[EVIL, 3])
    log.update("select", 8, EVIL, "", chosen={EVIL: 3, "b": 1}, won={EVIL: 3}, skipped={EVIL: 3})
    log.update("mix", 9, EVIL, "", proportions={EVIL: 0.5, "b": 0.5}, weights={EVIL: 1.0})
    log.receipt.end(f"failed: {EVIL}", [EVIL])
    path = draw(tmp_path / "dataflex")
    assert path is not None
    text = path.read_text(encoding="utf-8")
    found = checked(text.replace("http://x.y", ""))
    assert "alert(1)" in said(found)
    shown = "</td><script>alert(1)</script>&amp;\\x00\\x1b[2J\\u202e\\ud800'\""
    assert found.text.count(shown) >= 10, "as it is, with control characters spelled out"
    assert not set("\x00\x1b\u202e") & set(text)


def test_a_long_text_is_cut_and_its_length_is_said(show: Show, tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.receipt.begin("a", {"key": "k" * 10_000}, {}, 0)
    select(log, 4, [3, 1], prompt="p" * 2**20, response="\x00" * 500)
    log.receipt.end("finished", ["w" * 9_000])
    found = show()
    text = said(found)
    assert "first 600 of 1,048,576 characters" in text
    assert "first 600 of 2,000 characters, control characters spelled out" in text
    assert "(first 300 of 10,000 characters)" in text
    assert "(first 500 of 9,000 characters)" in text
    assert "p" * 601 not in text


def test_rows_without_text_say_how_to_keep_it(show: Show, tmp_path: Path) -> None:
    select(RunLog(tmp_path), 4, [3, 1], prompt=None, response=None)
    text = said(show())
    assert "not kept" in text
    assert "store_text: true" in text


def test_records_of_earlier_versions_have_a_report(show: Show, tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    own = {"all_scores": {"counts": 3}, "kinds": ["a user's own"]}
    log.selection(4, np.array([3, 1]), np.array([0.5, np.nan]), own)
    log.update("select", 4, "less", "", chosen={"mine": 2}, train_rows=9)
    log.selection(8, np.array([2]), None, {})
    found = show()
    assert found.all("section", "aria-labelledby") == ["chosen", "overlap"]
    assert "not ended when this page was made" in said(found)


def test_a_run_that_logged_nothing_has_no_report(tmp_path: Path) -> None:
    (tmp_path / "dataflex").mkdir()
    assert draw(tmp_path / "dataflex") is None
    assert list((tmp_path / "dataflex").iterdir()) == []


def test_losses_of_a_run_that_did_not_finish_are_those_of_its_own_log(
    show: Show, tmp_path: Path
) -> None:
    """An earlier run's trainer_state.json in the same folder tells of other steps."""
    trained(tmp_path)
    os.utime(tmp_path / "trainer_state.json", (0, 0))
    log = RunLog(tmp_path)
    log.receipt.begin("a", {}, {}, 0)
    select(log, 4, [3, 1])
    told = [{"current_steps": 4, "loss": 0.75}, {"current_steps": 4, "eval_loss": 0.5}]
    (tmp_path / "trainer_log.jsonl").write_text("\n".join(map(json.dumps, told)) + '\n{"loss"')
    text = said(show())
    assert (
        "The loss of training is 0.75 at step 4; the loss of evaluation is 0.5 at step 4." in text
    )


def test_many_names_and_long_ones_keep_the_page_small(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    names = {f"{'很' * 100}{i}": 1 + i for i in range(1000)}
    log.receipt.begin("a", {f"key{i}": "x" * 1000 for i in range(300)}, {}, 0)
    for step in range(100):
        select(log, step, [step % N, 1], prompt="&很" * 5000, response="\U000e0001" * 5000)
        log.update("pipeline", step, "lego", "", proportions=names, weights=names, skipped=names,
                   pause_seconds=1.0)  # fmt: skip
    log.receipt.end("finished", [f"{i} {'&' * 2000}" for i in range(200)])
    path = draw(tmp_path / "dataflex")
    assert path is not None
    assert path.stat().st_size < 1_500_000
    checked(path.read_text(encoding="utf-8"))


# -- colours --------------------------------------------------------------------------------------


def themes() -> Iterator[dict[str, str]]:
    """Colours of the style sheet: light, then dark, then print."""
    template = Path(module.__file__).with_name("page.html.j2").read_text(encoding="utf-8")
    for block in re.findall(r":root \{(.*?)\}", template, re.DOTALL):
        yield dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def contrast(one: str, other: str) -> float:
    high, low = sorted([luminance(one), luminance(other)], reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_text_and_charts_stand_out_in_light_dark_and_print() -> None:
    found = list(themes())
    assert len(found) == 3
    for theme in found:
        for ink in ("ink", "soft", "link", "warn"):
            if ink in theme:
                assert contrast(theme[ink], theme["page"]) >= 4.5, (ink, theme)
        for ink in ("ink", "soft"):
            assert contrast(theme[ink], theme["tint"]) >= 4.5
        for i in range(8):
            assert contrast(theme[f"c{i}"], theme["page"]) >= 3, (i, theme)
