"""The explorer in a real browser: what a person does, by mouse and by keyboard."""

from __future__ import annotations

import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn

from gradstore.serve.app import create_app
from gradstore.serve.running import listen
from gradstore.serve.served import Served

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (uv sync)")
expect = api.expect

MINUS = "\N{MINUS SIGN}"  # how the page shows a negative score
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("no browser: apt-get install chromium, or set CHROMIUM", allow_module_level=True)


@contextmanager
def served(path: Path, explainer: Any = None) -> Iterator[str]:
    """A running server of a store; its address without the token."""
    sock = listen(0)
    sock.listen()
    app = create_app(Served(path, explainer), "a-token-for-the-tests")
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    while not server.started:
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def site(store_path: Path) -> Iterator[str]:
    with served(store_path) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, site: str) -> Iterator[Any]:
    """A page that has the cookie; ends with a look at its console."""
    context = browser.new_context(base_url=site)
    opened = context.new_page()
    complaints: list[str] = []
    opened.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.goto("/?token=a-token-for-the-tests")
    expect(opened).to_have_url(f"{site}/")
    yield opened
    assert complaints == []
    context.close()


def show(page: Any, address: str) -> None:
    page.goto(address)
    expect(page.locator("#status")).to_have_text("")


def cells(page: Any, column: int) -> list[str]:
    found = page.locator(f"#spacer [role=row] > :nth-child({column})").all_inner_texts()
    return [str(text) for text in found]


def test_characters_that_hide_text_are_shown_as_their_codes(page: Any) -> None:
    shown = page.evaluate(
        """async () => {
          const { visible } = await import("/page/dom.js");
          return visible("a\\u2028\\u2029\\u061c\\u00ad\\u202e\\u{e0041}\\u0007é\\n😀");
        }"""
    )
    assert shown == "a\\u2028\\u2029\\u061c\\u00ad\\u202e\\u{e0041}␇é\n😀"


def test_a_picked_row_shows_its_helpers_and_hurters(page: Any) -> None:
    show(page, "/?target=one")
    page.get_by_text("Choose another row of the set").click()
    page.get_by_role("button", name="3: one: what is 3 plus 3?").click()
    expect(page.locator("#target-text")).to_contain_text("It is 6.")
    expect(page).to_have_url(re.compile("target=one&row=3"))
    for side, sign in (("helped", "+"), ("hurt", MINUS)):
        cards = page.locator(f"#{side} article")
        expect(cards).to_have_count(20)
        expect(cards.first.locator("b")).to_contain_text(sign)
    page.get_by_role("button", name="Next").click()
    expect(page.locator("#target-text")).to_contain_text("It is 8.")
    page.go_back()
    expect(page.locator("#target-text")).to_contain_text("It is 6.")
    page.locator("#helped article").first.get_by_role("button", name="Whole row").click()
    expect(page.get_by_role("dialog")).to_contain_text("gradient norm")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).not_to_be_visible()


def test_words_of_the_target_are_marked(page: Any) -> None:
    show(page, "/?target=one&row=7")
    marked = page.locator("#helped mark, #hurt mark").all_inner_texts()
    asked = set(re.findall(r"\w+", page.locator("#target-text").inner_text().lower()))
    assert {word.lower() for word in marked} <= asked


def test_the_histogram_filters_by_mouse_and_by_keyboard(page: Any) -> None:
    show(page, "/?view=rows")
    expect(page.locator("#matched")).to_have_text("300 of 300 rows")
    box = page.locator("#histogram svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + 50, steps=4)
    page.mouse.up()
    expect(page).to_have_url(re.compile(r"min=.*max="))
    expect(page.locator("#matched")).not_to_have_text("300 of 300 rows")
    low = float(re.search(r"min=([-\d.e]+)", page.url)[1])  # type: ignore[index]
    scores = [float(text.replace(MINUS, "-")) for text in cells(page, 2)]
    assert min(scores) >= low - 1e-4
    page.get_by_role("button", name="All scores").click()
    expect(page.locator("#matched")).to_have_text("300 of 300 rows")
    page.get_by_role("slider", name="Score from").focus()
    page.keyboard.press("End")
    expect(page.locator("#matched")).to_have_text("1 of 300 rows")


def test_the_table_sorts_filters_and_scrolls_through_pages(page: Any) -> None:
    show(page, "/?view=rows")
    head = page.get_by_role("columnheader", name="Tokens")
    head.get_by_role("button").click()
    expect(head).to_have_attribute("aria-sort", "descending")
    expect(page.locator("#status")).to_have_text("")
    assert cells(page, 3)[:3] == ["37", "37", "37"]
    head.get_by_role("button").click()
    expect(head).to_have_attribute("aria-sort", "ascending")
    expect(page.locator("#spacer [role=row]").first.locator(":nth-child(3)")).to_have_text("1")
    head = page.get_by_role("columnheader", name="Row")
    head.get_by_role("button").click()
    expect(head).to_have_attribute("aria-sort", "ascending")
    page.locator("#window").evaluate("box => { box.scrollTop = 250 * 34 }")
    expect(page.locator("#spacer button", has_text=re.compile("^250$"))).to_be_visible()
    assert page.locator("#spacer [role=row]").count() < 60
    page.locator("#filter select").select_option("beta")
    expect(page.locator("#matched")).to_have_text("100 of 300 rows")
    page.get_by_label("Text holds").fill("capital")
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile("contains=capital"))
    expect(page.locator("#matched")).not_to_have_text("100 of 300 rows")
    expect(page.locator("#status")).to_have_text("")
    assert all("capital" in text for text in cells(page, 5))


def test_a_lasso_lists_the_rows_inside_and_its_address_brings_it_back(page: Any) -> None:
    show(page, "/?view=map")
    box = page.locator("#cloud").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.3)
    page.mouse.down()
    for x, y in ((0.7, 0.3), (0.7, 0.7), (0.3, 0.7)):
        page.mouse.move(box["x"] + box["width"] * x, box["y"] + box["height"] * y, steps=5)
    page.mouse.up()
    title = page.locator("#lassoed")
    expect(title).to_have_text(re.compile(r"^\d+ rows lassoed"))
    told, address = title.inner_text(), page.url
    expect(page.locator("#lasso-rows article").first).to_be_visible()
    page.get_by_role("button", name="Clear the lasso").click()
    expect(title).to_have_text("No rows lassoed")
    show(page, address)
    expect(title).to_have_text(told)
    page.keyboard.press("Tab")
    page.locator("#cloud").focus()
    page.keyboard.press("Escape")
    expect(title).to_have_text("No rows lassoed")
    for keys in (["ArrowLeft"] * 20, ["ArrowUp"] * 15, ["ArrowRight"] * 30, ["ArrowDown"] * 20):
        for key in keys:
            page.keyboard.press(key)
        page.keyboard.press("Enter")
    expect(title).to_have_text(re.compile(r"^\d+ rows lassoed"))


def test_two_selections_stand_side_by_side(page: Any) -> None:
    show(page, "/?view=changes")
    page.get_by_role("group", name="After").get_by_label("Rows").fill("40")
    page.keyboard.press("Tab")
    expect(page).to_have_url(re.compile("afterCount=40"))
    show(page, page.url)
    counts = [int(n) for n in re.findall(r"(\d+) (?:rows stayed|entered|left)",
                                         page.locator("#compared").inner_text())]  # fmt: skip
    assert (counts[0] + counts[1], counts[0] + counts[2]) == (40, 15)
    expect(page.locator("#entered article")).to_have_count(counts[1])


def test_hostile_text_is_shown_as_text(page: Any) -> None:
    show(page, "/?view=rows&sort=row")
    page.locator("#spacer button", has_text=re.compile("^10$")).click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("<script>document.title = 'taken'</script>")
    page.keyboard.press("Escape")
    page.locator("#spacer button", has_text=re.compile("^11$")).click()
    expect(dialog).to_contain_text("<img src=x onerror=")
    page.keyboard.press("Escape")
    page.locator("#spacer button", has_text=re.compile("^12$")).click()
    expect(dialog).to_contain_text("bell ␇, escape ␛[31mred")
    expect(dialog).to_contain_text("\\u202eright to left")
    page.keyboard.press("Escape")
    page.locator("#spacer button", has_text=re.compile("^13$")).click()
    expect(dialog.locator("#detail-prompt")).to_have_text(re.compile("^(word ){100}"))
    assert len(page.locator("#detail-prompt").text_content()) == 1_050_000
    assert page.locator("main img, main script, dialog img, dialog b").count() == 0
    assert "taken" not in page.title()


def test_a_prompt_of_ones_own_is_asked_where_there_is_a_model(
    browser: Any, page: Any, explorer: Any, store_path: Path
) -> None:
    show(page, "/")
    page.get_by_text("Ask about a prompt of your own").click()
    expect(page.get_by_label("Prompt")).to_be_disabled()
    expect(page.locator("#no-model")).to_contain_text("gradstore explain STORE")
    with served(store_path, explorer.model()) as site:
        other = browser.new_page(base_url=site)
        other.goto("/?token=a-token-for-the-tests")
        other.get_by_text("Ask about a prompt of your own").click()
        other.get_by_label("Prompt").fill("convert <b>feet</b> into metres")
        other.get_by_role("button", name="Ask").click()
        expect(other.locator("#target-text")).to_contain_text("convert <b>feet</b> into metres")
        expect(other.locator("#target-text")).to_contain_text("generated answer")
        expect(other.locator("#helped article").first).to_have_attribute("data-row", "40")
        expect(other.locator("#hurt article").first).to_have_attribute("data-row", "41")
        expect(other).to_have_url(re.compile("prompt=convert"))
        other.close()


def test_run_checkpoint_and_combine_act_on_prompts_and_on_the_download(
    browser: Any, explorer: Any, store_path: Path
) -> None:
    model = explorer.model()
    with served(store_path, model) as site:
        page = browser.new_page(base_url=site)
        page.goto("/?token=a-token-for-the-tests")
        show(page, "/?step=4&checkpoints=all&prompt=sort")
        expect(page.locator("#target-text")).to_contain_text("train/4")
        assert model.asked == [{"checkpoints": "all", "run": "", "step": 4}]
        for address in ("/?target=two&row=3&step=4", "/?target=two&row=3&checkpoints=all"):
            show(page, address)
            file = page.request.get(page.locator("#download").get_attribute("href")).json()
            shown = page.locator("#helped article").evaluate_all("a => a.map((e) => e.dataset.row)")
            assert [int(re.findall(r"\d+", place)[0]) for place in file["proponent_ids"]] == [
                int(row) for row in shown
            ]
        page.close()


@pytest.mark.parametrize("answer", [202, 429])
def test_a_question_left_for_another_is_not_asked_again_and_leaves_no_status(
    browser: Any, explorer: Any, store_path: Path, answer: int
) -> None:
    asked = []

    def busy(route: Any) -> None:
        asked.append(1)
        body = '{"id": "x", "kind": "explain", "stage": "loading the model", "progress": 0}'
        route.fulfill(status=answer, headers={"Retry-After": "0.2"}, body=body)

    with served(store_path, explorer.model()) as site:
        page = browser.new_page(base_url=site)
        page.goto("/?token=a-token-for-the-tests")
        page.route("**/v1/explain*", busy)
        page.goto("/?prompt=sort")
        if answer == 202:
            expect(page.locator("#status")).to_have_text("explain: loading the model")
        page.wait_for_timeout(500)
        page.get_by_role("button", name="Next").click()
        expect(page.locator("#helped article").first).to_be_visible()
        expect(page.locator("#target-text")).to_contain_text("row 1 of one")
        before = len(asked)
        page.wait_for_timeout(800)
        assert len(asked) <= before
        expect(page.locator("#status")).to_have_text("")
        page.close()


def test_a_question_left_for_another_ends_unless_another_page_asks_it_too(
    browser: Any, explorer: Any, store_path: Path
) -> None:
    model, gate = explorer.model(), threading.Event()
    whole = model.explain

    def slow(*args: Any, **named: Any) -> Any:
        while not gate.wait(0.02):
            named["on_stage"]("asking the model")  # raises once the job is to stop
        return whole(*args, **named)

    model.explain = slow
    with served(store_path, model) as site:
        pages = [browser.new_context(base_url=site).new_page() for _ in range(2)]
        for page in pages:
            page.goto("/?token=a-token-for-the-tests")
            page.goto("/?prompt=sort")
            expect(page.locator("#status")).to_have_text("explain: asking the model")

        def newest(kind: str) -> Any:
            jobs = pages[0].request.get("/v1/jobs").json()["jobs"]
            return next(job for job in jobs if job["kind"] == kind)

        first = newest("explain")
        for _ in range(50):  # a page asks again and again how far its job is
            if (first := newest("explain"))["waiters"] == 2:
                break
            pages[0].wait_for_timeout(100)
        assert first["waiters"] == 2
        pages[0].get_by_role("button", name="Next").click()
        expect(pages[0].locator("#target-text")).to_contain_text("row 1 of one")
        pages[0].wait_for_timeout(1500)
        assert (newest("score")["state"], newest("score")["waiters"]) == ("done", 0)
        assert (newest("explain")["state"], newest("explain")["waiters"]) == ("running", 1)
        pages[1].get_by_role("button", name="Next").click()
        pages[1].wait_for_timeout(1500)
        found = pages[0].request.get(f"/v1/jobs/{first['id']}").json()
        gate.set()
        assert found["state"] == "cancelled"


def test_without_text_a_page_shows_source_and_number_and_how_to_add_text(
    browser: Any, explorer: Any, tmp_path: Path
) -> None:
    with served(explorer.build(tmp_path / "s", text=False, steps=(1,))) as site:
        page = browser.new_page(base_url=site)
        page.goto("/?token=a-token-for-the-tests&view=rows&sort=row")
        expect(page.locator("#spacer [role=row]").nth(4)).to_contain_text("beta[4]")
        expect(page.locator("#spacer [role=row]").nth(4)).to_contain_text("store_text: true")
        expect(page.get_by_label("Text holds")).to_be_disabled()
        page.goto("/?view=ask")
        expect(page.locator("#helped article").first).to_contain_text("store_text: true")
        page.close()


def test_damaged_text_is_told_on_the_page_and_the_map_is_shown(
    browser: Any, store_path: Path, tmp_path: Path
) -> None:
    path = shutil.copytree(store_path, tmp_path / "s")
    train = max(path.glob("texts/*/*.parquet"), key=lambda file: file.stat().st_size)
    data = train.read_bytes()
    train.unlink()
    train.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with served(path) as site:
        page = browser.new_page(base_url=site)
        page.goto("/?token=a-token-for-the-tests")
        for view in ("ask", "rows", "changes"):
            page.goto(f"/?view={view}")
            expect(page.locator("#status")).to_contain_text(f"{train.relative_to(path)}: expected")
            expect(page.locator("#status")).to_contain_text("gradstore verify")
        show(page, "/?view=map")
        page.close()


def test_a_wrong_address_says_what_is_wrong(browser: Any, site: str) -> None:
    context = browser.new_context(base_url=site)
    page = context.new_page()
    page.goto("/?token=wrong&view=map")
    expect(page.locator("body")).to_contain_text("That token is wrong.")
    page.get_by_label("Token").fill("a-token-for-the-tests")
    page.get_by_role("button", name="Open").click()
    expect(page.locator("#name")).to_contain_text("gradstore")
    page.goto("/?step=2&view=rows")
    expect(page.locator("#status")).to_have_text(re.compile("no committed train|no training rows"))
    context.close()


def test_a_prompt_asks_the_run_that_is_shown(browser: Any, explorer: Any, tmp_path: Path) -> None:
    """A store need not have an unnamed run; the page shows the first, and asks the model of it."""
    with explorer.writer(tmp_path / "s") as writer:
        for run in ("a", "b"):

            def begin(record: Any, *rest: Any, run: str = run, **named: Any) -> Any:
                return writer.begin(replace(record, name=f"{run}/{record.name}"), *rest, **named)

            explorer.add(SimpleNamespace(begin=begin), 8)
        explorer.keep_texts(writer)
    model = explorer.model()
    with served(tmp_path / "s", model) as site:
        page = browser.new_page(base_url=site)
        page.goto("/?token=a-token-for-the-tests")
        for query, run in (("", "a"), ("&run=b", "b")):
            page.goto(f"/?prompt=sort{query}")
            page.locator("#target-text").get_by_text("your prompt").wait_for(timeout=20_000)
            assert model.asked[-1]["run"] == run
        page.close()
