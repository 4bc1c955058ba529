// Two selections side by side: what entered, what left.

import { post, question } from "/page/api.js";
import { by, card, number, options, visible } from "/page/dom.js";
import { change } from "/page/state.js";

const TOP = 100;
const form = by("compare");

export async function show(now, known, stale) {
  const usual = Math.max(1, Math.round(known.train.usable_rows / 20));
  const steps = known.steps.map((step) => [step, `step ${step}`]);
  const sets = [["", "all"], ...known.targets.map((each) => [each.set, visible(each.set)])];
  const sides = {
    before: { step: now.before || known.steps[1] || known.steps[0], target: now.beforeTarget, count: now.beforeCount || usual },
    after: { step: now.after || known.steps[0], target: now.afterTarget, count: now.afterCount || usual },
  };
  for (const [name, side] of Object.entries(sides)) {
    options(form[name], steps, side.step);
    options(form[`${name}Target`], sets, side.target);
    form[`${name}Count`].value = side.count;
  }
  const budget = ({ step, target, count }) => question({ ...now, row: "", step, target, count });
  const asked = Object.fromEntries(Object.entries(sides).map(([name, side]) =>
    [name, { ...budget(side), count: Number(side.count) }]));
  const found = await post("/v1/diff", { ...asked, top: TOP }, stale);
  if (stale()) return;
  by("compared").textContent = `${number(found.kept)} rows stayed, ${number(found.entered_rows)} entered, `
    + `${number(found.left_rows)} left. ${mixture("Before", found.before)} ${mixture("After", found.after)}`;
  for (const side of ["entered", "left"]) {
    const count = found[`${side}_rows`];
    by(`${side}-title`).textContent = `${side === "left" ? "Left" : "Entered"}: ${number(count)}`
      + (count > TOP ? `, the first ${TOP}` : "");
    const generation = (side === "left" ? found.before : found.after).generation;
    by(side).replaceChildren(...found[side].map((line, i) =>
      card(line, i + 1, new Set(), (row) => known.open(row, generation), known.without)));
  }
}

function mixture(title, selection) {
  const parts = Object.entries(selection.sources).map(([name, count]) => `${visible(name || "unknown")} ${number(count)}`);
  return `${title}: ${parts.join(", ")}.`;
}

form.addEventListener("change", (event) => change({ [event.target.name]: event.target.value }));
form.addEventListener("submit", (event) => event.preventDefault());
