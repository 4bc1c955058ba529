// Start: what the store holds, the question above the views, and which view is shown.

import { get, Stale, tellStatus } from "/page/api.js";
import { by, el, number, options, visible } from "/page/dom.js";
import * as state from "/page/state.js";
import * as ask from "/page/ask.js";
import * as rows from "/page/rows.js";
import * as map from "/page/map.js";
import * as changes from "/page/changes.js";

const views = { ask, rows, map, changes };
let shown = 0;

function say(text, fault = false) {
  by("status").textContent = text;
  by("status").classList.toggle("fault", fault);
}

// What every view gets: the generations, and ways to open a row and to speak.
async function facts() {
  const [{ stores: [store] }, found] = await Promise.all([get("/v1/stores"), get("/v1/generations")]);
  const generations = found.generations.filter((each) => each.space === "gradient");
  const runs = [...new Set(generations.map((each) => each.run))].sort();
  return { store, runs, generations, without: found.without_text, open, say };
}

function inRun(known, now) {
  const run = known.runs.includes(now.run) ? now.run : known.runs[0] ?? "";
  const mine = known.generations.filter((each) => each.run === run);
  const trains = mine.filter((each) => each.role === "train" && each.set === "");
  const steps = [...new Set(trains.map((each) => each.step))].sort((a, b) => b - a);
  const last = now.step === "" ? steps[0] : Number(now.step);
  const targets = mine.filter((each) => each.role === "target" && each.step === last);
  return { ...known, run, trains, steps, targets, train: trains.findLast((each) => each.step <= last) };
}

function fill(known, now) {
  const form = by("question");
  by("run-label").hidden = known.runs.length < 2;
  options(form.run, known.runs.map((run) => [run, run || "(no name)"]), now.run);
  options(form.step, [["", "newest"], ...known.steps.map((step) => [step, `step ${step}`])], now.step);
  form.checkpoints.value = now.checkpoints;
  const sets = known.targets.map((each) => each.set);
  options(form.target, [["", sets.length > 1 ? `all ${sets.length}` : sets[0] ?? "none"],
    ...(sets.length > 1 ? sets.map((set) => [set, visible(set)]) : [])], now.target);
  form.row.value = now.row;
  const { store, train } = known;
  by("name").textContent = visible(store.name);
  by("facts").textContent = train
    ? `${train.name}: ${number(train.usable_rows)} of ${number(train.rows)} rows usable, `
      + `${number(train.dim)} dimensions, commit ${store.commit.slice(0, 10)}`
    : "no training rows are committed yet";
  document.title = `${store.name} · gradient store`;
}

async function draw(now) {
  const mine = ++shown;
  const stale = () => mine !== shown;
  const view = now.view in views ? now.view : "ask";
  for (const link of document.querySelectorAll("nav a")) {
    link.href = state.address({ view: link.dataset.view });
    if (link.dataset.view === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  for (const name in views) by(name).hidden = name !== view;
  say("…");
  try {
    const known = inRun(await facts(), now);
    if (stale()) return;
    now = { ...now, run: known.run };
    fill(known, now);
    if (!known.train) throw new Error("This store has no committed training rows yet; build them first.");
    await views[view].show(now, known, stale);
    if (!stale()) say("");
  } catch (error) {
    if (!(error instanceof Stale) && !stale()) say(error.message, true);
  }
}

async function open(row, generation) {
  try {
    const line = await get(`/v1/rows/${row}`, { generation });
    by("detail-title").textContent = `Row ${row} of ${line.generation}`;
    const told = { source: line.source?.join(" · ") ?? "not known", status: line.status,
      tokens: number(line.tokens), "gradient norm": line.norm ?? "–", hash: line.row_hash };
    by("detail-facts").replaceChildren(...Object.entries(told).flatMap(
      ([name, value]) => [el("dt", {}, name), el("dd", {}, visible(String(value)))]));
    for (const name of ["prompt", "response"]) {
      by(`detail-${name}`).textContent = visible(line[name] ?? "no text in this store");
    }
    by("detail").showModal();
  } catch (error) {
    say(error.message, true);
  }
}

by("question").addEventListener("change", (event) => {
  const { name, value } = event.target;
  const also = name === "row" ? {} : { row: name === "target" ? "" : state.read().row };
  state.change({ [name]: value, min: "", max: "", ...also, [name]: value });
});
by("question").addEventListener("submit", (event) => event.preventDefault());
document.querySelector("nav").addEventListener("click", (event) => {
  if (!event.target.dataset.view || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  state.change({ view: event.target.dataset.view });
});
tellStatus(say);
state.listen(draw);
state.announce();
