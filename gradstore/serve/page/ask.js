// Who taught this? One target row, or a prompt of one's own: helpers left, hurters right.

import { get, pathOf, post, question } from "/page/api.js";
import { by, card, el, texts, visible, wordsOf } from "/page/dom.js";
import { change, read } from "/page/state.js";

const TOP = 20;
const PAGE = 50;
let listed = "";
let last = 0;

export async function show(now, known, stale) {
  by("no-model").hidden = known.store.explains;
  for (const field of by("explain").elements) field.disabled = !known.store.explains;
  if (!known.targets.length) throw new Error("This store has no target rows at this checkpoint; build its target sets first.");
  const target = known.targets.find((each) => each.set === now.target) ?? known.targets[0];
  const row = Math.min(Math.max(Math.floor(Number(now.row)) || 0, 0), target.rows - 1);
  last = target.rows - 1;
  if (listed !== `${target.commit}`) {
    listed = target.commit;
    by("targets").replaceChildren();
    await list(target);
  }
  for (const button of by("targets").querySelectorAll("button")) {
    if (Number(button.value) === row) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  }
  by("more-targets").onclick = () => list(target);
  const { checkpoints, run, step } = question(now);
  const found = now.prompt
    ? await explained(now, { checkpoints, run, step }, stale)
    : await post("/v1/query", { checkpoints, run, step, target: target.set, target_row: row,
        top: TOP }, stale);
  if (stale()) return;
  by("download").href = pathOf("/v1/pair.jsonl", { checkpoints, run, step, target: target.set, row,
    top: TOP });
  by("download").hidden = Boolean(now.prompt);
  draw(found, row, known, target);
}

async function explained(now, asked, stale) {
  const form = by("explain");
  form.prompt.value = now.prompt;
  form.response.value = now.response;
  by("prompt-box").open = true;
  return post("/v1/explain", { ...asked, prompt: now.prompt, response: now.response || null,
    top: TOP }, stale);
}

function draw(found, row, known, target) {
  const line = found.target_row;
  const words = wordsOf(`${line.prompt ?? ""} ${line.response ?? ""}`);
  const title = line.row === undefined
    ? `your prompt${found.generated ? ", answered by the model" : ""}; asked: ${found.generations.join(", ")}`
    : `row ${row} of ${target.set}`;
  by("target-text").replaceChildren(el("p", { class: "note" }, visible(title)),
    ...texts(line, new Set(), known.without));
  for (const side of ["helped", "hurt"]) {
    by(side).replaceChildren(...found[side].map((each, i) =>
      card(each, i + 1, words, (r) => known.open(r, found.generation), known.without)));
  }
}

async function list(target) {
  const offset = by("targets").children.length;
  const page = await get("/v1/rows", { generation: target.name, offset, limit: PAGE, characters: 160 });
  by("targets").append(...page.rows.map((line) => el("li", {}, el("button", {
    type: "button", value: line.row,
    onclick: () => change({ target: target.set, row: line.row, prompt: "", response: "" }),
  }, `${line.row}: ${visible(line.prompt ?? (line.source ?? ["row", line.row]).join(" "))}`))));
  by("more-targets").hidden = by("targets").children.length >= page.matched;
}

const step = (by_) => {
  const row = Math.floor(Number(read().row)) || 0;
  change({ row: Math.min(Math.max(row + by_, 0), last), prompt: "", response: "" });
};
by("previous").addEventListener("click", () => step(-1));
by("next").addEventListener("click", () => step(1));
by("explain").addEventListener("submit", (event) => {
  event.preventDefault();
  change({ prompt: event.target.prompt.value, response: event.target.response.value });
});
