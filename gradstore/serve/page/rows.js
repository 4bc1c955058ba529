// All rows: the histogram filters, the heads sort, and only the rows in sight are in the page.

import { get, post, question } from "/page/api.js";
import { by, el, number, options, place, signed, visible } from "/page/dom.js";
import { histogram } from "/page/histogram.js";
import { change, read } from "/page/state.js";

const HEIGHT = 34; // of a row, as in style.css
const PAGE = 100;
const PAGES = 60; // kept
const MOST = 900_000; // rows: browsers refuse taller elements
const COLUMNS = [["row", "Row"], ["score", "Score"], ["length", "Tokens"], ["source", "Source"], ["", "Text"]];
const LARGEST_FIRST = ["score", "length"];

let table = null; // what is shown: { wanted, pages, matched, known }

export async function show(now, known, stale) {
  const scored = known.targets.length > 0;
  const asked = question(now);
  const wanted = { ...asked, scored, sort: scored || !now.sort.endsWith("score") ? now.sort : "row",
    source: now.source, contains: now.contains, characters: 160, limit: PAGE, wait: 1 };
  if (scored) {
    wanted.min_score = now.min;
    wanted.max_score = now.max;
    const summary = await post("/v1/score", { ...asked, values: false, bins: 60 }, stale);
    if (stale()) return;
    histogram(by("histogram"), summary.histogram, now.min, now.max, (min, max) => change({ min, max }));
  } else by("histogram").replaceChildren();
  const first = await get("/v1/rows", { ...wanted, offset: 0 }, stale);
  if (stale()) return;
  heads(wanted.sort, scored);
  options(by("filter").source, [["", "all"], ...first.sources.map((name) => [name, visible(name)])], now.source);
  by("filter").contains.value = now.contains;
  by("filter").contains.disabled = !first.text;
  by("filter").contains.placeholder = first.text ? "" : "no text in this store";
  by("matched").textContent = `${number(first.matched)} of ${number(first.total)} rows`
    + (first.matched > MOST ? `, the first ${number(MOST)} are listed` : "");
  table = { wanted, known, generation: first.generation, matched: Math.min(first.matched, MOST),
    pages: new Map([[0, first.rows]]), waiting: new Set() };
  by("table").setAttribute("aria-rowcount", first.matched + 1);
  by("spacer").style.height = `${table.matched * HEIGHT}px`;
  by("window").scrollTop = 0;
  paint();
}

function heads(sort, scored) {
  by("columns").replaceChildren(...COLUMNS.map(([key, text]) => {
    if (!key) return el("div", { role: "columnheader" }, text);
    const order = sort === key ? "ascending" : sort === `-${key}` ? "descending" : "none";
    const arrow = { ascending: " ↑", descending: " ↓", none: "" }[order];
    const down = order === "none" ? LARGEST_FIRST.includes(key) : order === "ascending";
    const sorts = () => change({ sort: down ? `-${key}` : key });
    const button = el("button", { type: "button", onclick: sorts }, text + arrow);
    button.disabled = key === "score" && !scored;
    return el("div", { role: "columnheader", "aria-sort": order }, button);
  }));
}

function paint() {
  const { scrollTop, clientHeight } = by("window");
  const start = Math.max(Math.floor(scrollTop / HEIGHT) - 5, 0);
  const stop = Math.min(Math.ceil((scrollTop + clientHeight) / HEIGHT) + 5, table.matched);
  const drawn = [];
  for (let i = start; i < stop; i++) {
    const page = Math.floor(i / PAGE);
    if (!table.pages.has(page)) load(page);
    drawn.push(line(i, table.pages.get(page)?.[i % PAGE]));
  }
  by("spacer").replaceChildren(...drawn);
}

function line(i, found) {
  const cells = found
    ? [el("button", { type: "button", onclick: () => table.known.open(found.row, table.generation) }, number(found.row)),
        found.score === undefined ? "–" : signed(found.score ?? null), number(found.tokens),
        visible(place(found)), text(found)]
    : ["…", "", "", "", ""];
  const made = el("div", { role: "row", "aria-rowindex": i + 2 }, ...cells.map((cell) => el("div", { role: "cell" }, cell)));
  made.style.top = `${i * HEIGHT}px`;
  return made;
}

function text(found) {
  if (found.prompt === null) return table.known.without;
  const words = `${found.prompt} → ${found.response}`;
  return visible(words.replace(/\s+/g, " "));
}

async function load(page) {
  const mine = table;
  if (mine.waiting.has(page)) return;
  mine.waiting.add(page);
  try {
    const found = await get("/v1/rows", { ...mine.wanted, offset: page * PAGE }, () => mine !== table);
    mine.pages.set(page, found.rows);
    if (mine.pages.size > PAGES) mine.pages.delete(mine.pages.keys().next().value);
    if (mine === table) paint();
  } catch (error) {
    if (mine === table) mine.known.say(error.message, true);
  } finally {
    mine.waiting.delete(page);
  }
}

let asked = false;
by("window").addEventListener("scroll", () => {
  if (asked || !table) return;
  asked = true;
  requestAnimationFrame(() => {
    asked = false;
    paint();
  });
});
addEventListener("resize", () => table && read().view === "rows" && paint());
by("filter").addEventListener("change", (event) => change({ [event.target.name]: event.target.value }));
by("filter").addEventListener("submit", (event) => event.preventDefault());
